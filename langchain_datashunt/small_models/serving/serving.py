"""What serves one small model in this process: the line in front of it, and its memory of exact repeats."""

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
    """A small model as its `Serving` sees it."""

    cache_size: int

    @property
    def dynamic_batching(self) -> DynamicBatching | None:
        """How concurrent requests are batched."""

    @property
    def reader(self) -> InputReader:
        """How inputs are read."""

    def workers(self) -> int:
        """Return how many batches may be computed at once."""

    def _predict_many(self, values: list[Any]) -> list[Prediction | Exception]: ...


class Serving:
    """What serves one model in this process: its line and its memory. Copies and pickles of a model make their own."""

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
        """The line in front of the model, by the settings that it has now."""
        settings = model.dynamic_batching
        if settings is None:
            raise ConfigurationError(
                "This small model computes each request alone: its dynamic_batching is None. Set DynamicBatching()."
            )
        if self._batcher is None or self._settings is not settings:
            with self._mutex:
                if self._batcher is None or self._settings is not settings:
                    self._batcher = self._made(model, settings)
                    self._settings = settings
        return self._batcher

    @staticmethod
    def _made(model: Served, settings: DynamicBatching) -> DynamicBatcher:
        owner = weakref.ref(model)  # whoever waits for an answer holds the model

        def compute(values: list[Any]) -> list[Prediction | Exception]:
            served = owner()
            assert served is not None
            return served._predict_many(values)

        def workers() -> int:
            served = owner()
            return 1 if served is None else served.workers()

        return DynamicBatcher(compute, settings, settings.workers or workers, share_of_threads)

    def forget(self) -> None:
        """Remember nothing: the model computes other scores now."""
        self._cache = None

    def cache_of(self, model: Served) -> ResultCache[Any] | None:
        """The memory of the model, of the size that it has now; None where it remembers nothing."""
        if not model.cache_size:
            return None
        if self._cache is None or self._cache.size != model.cache_size:
            with self._mutex:
                if self._cache is None or self._cache.size != model.cache_size:
                    self._cache = ResultCache(model.cache_size, model.reader.key)
        return self._cache
