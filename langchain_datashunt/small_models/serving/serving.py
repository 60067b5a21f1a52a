"""Serving state of one small model in this process: its request queue and its cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from langchain_datashunt._utils.fork import Mutex
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.prediction import Prediction
from langchain_datashunt.small_models.engine.devices import share_of_threads
from langchain_datashunt.small_models.serving.caching import ResultCache
from langchain_datashunt.small_models.serving.dynamic_batching import DynamicBatcher, DynamicBatching


class Served(Protocol):
    """Interface of a small model that `Serving` requires."""

    cache_size: int

    @property
    def dynamic_batching(self) -> DynamicBatching | None:
        """Batching settings. None computes each request alone."""

    @property
    def reader(self) -> InputReader:
        """Input reader of the model."""

    def workers(self) -> int:
        """Return how many batches may be computed concurrently."""

    def _predict_many(self, values: list[Any]) -> list[Prediction | Exception]: ...


class Serving:
    """Request queue and cache of one model in this process. Copies and pickles of a model create their own."""

    def __init__(self, owner: Served | None = None) -> None:
        self.owner: Callable[[], Served | None] = (lambda: None) if owner is None else weakref.ref(owner)
        self._batcher: DynamicBatcher | None = None
        self._settings: DynamicBatching | None = None
        self._cache: ResultCache[Any] | None = None
        self._mutex = Mutex()

    def __reduce__(self) -> tuple[Any, ...]:
        return Serving, ()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Serving:
        return Serving()

    def batcher_of(self, model: Served) -> DynamicBatcher:
        """Return the model's batcher, rebuilt if its settings have changed.

        Raises:
            ConfigurationError: If the model's `dynamic_batching` is None.
        """
        settings = model.dynamic_batching
        if settings is None:
            raise ConfigurationError(
                "This small model has no batcher, because its dynamic_batching is None. Set it to DynamicBatching()."
            )
        if self._batcher is None or self._settings is not settings:
            with self._mutex:
                if self._batcher is None or self._settings is not settings:
                    self._batcher = self._made(model, settings)
                    self._settings = settings
        return self._batcher

    @staticmethod
    def _made(model: Served, settings: DynamicBatching) -> DynamicBatcher:
        owner = weakref.ref(model)  # weak, so that an unused model is freed, and waiting callers keep it alive

        def compute(values: list[Any]) -> list[Prediction | Exception]:
            served = owner()
            assert served is not None
            return served._predict_many(values)

        def workers() -> int:
            served = owner()
            return 1 if served is None else served.workers()

        return DynamicBatcher(compute, settings, settings.workers or workers, share_of_threads)

    def forget(self) -> None:
        """Drop the cache, because the model now computes different scores."""
        self._cache = None

    def cache_of(self, model: Served) -> ResultCache[Any] | None:
        """Return the model's cache, rebuilt if its size has changed, or None if the model has no cache."""
        if not model.cache_size:
            return None
        if self._cache is None or self._cache.size != model.cache_size:
            with self._mutex:
                if self._cache is None or self._cache.size != model.cache_size:
                    self._cache = ResultCache(model.cache_size, model.reader.key)
        return self._cache
