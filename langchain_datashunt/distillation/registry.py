"""Model registry: a folder with versions of a small model, one of them in service.

    versions/0001/          bundle
    versions/0001.json      metrics, result of the gate, status
    current.json            version in service, and the versions that preceded it

Promotion is atomic. `current.json` is replaced as a whole, so a reader gets either the old version or the new one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.fork import Mutex
from langchain_datashunt._utils.optional import require
from langchain_datashunt.distillation.gate import PromotionGate, PromotionResult
from langchain_datashunt.distillation.teacher import TeacherCheckResult
from langchain_datashunt.exceptions import RegistryError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.bundles.loading import load_small_model
from langchain_datashunt.small_models.scores import Outcome, Scores
from langchain_datashunt.small_models.serving.caching import ResultCache

_LOG = logging.getLogger(__name__)


class ModelVersion(BaseModel):
    """Metadata of one version.

    Attributes:
        version: Version number, from 1.
        status: Outcome of the gate or of a manual promotion.
        reason: Explanation of the status.
        metrics: Metrics of the gate and of the caller.
        parent: Version in service when this one was added.
        created: Creation time in seconds since 1970 UTC.
    """

    model_config = ConfigDict(protected_namespaces=())

    version: int
    status: Literal["candidate", "promoted", "rejected"]
    reason: str = ""
    metrics: dict[str, Any] = Field(default_factory=dict)
    parent: int | None = None
    created: float = Field(default_factory=time.time)


_LOCK_SECONDS = 60.0
"""Seconds to wait for another process that changes the same registry."""


class ModelRegistry:
    """Registry of the versions of one small model.

    ```python
    registry = ModelRegistry("models/support")
    registry.promote(registry.add(small))                      # the first version
    version = registry.consider(candidate, texts, labels)      # promoted if it passes the gate
    shunt = ShuntRunnable(small=registry.model(), large=...)   # follows promotions between calls
    ```

    Args:
        folder: Folder of the registry, created if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        (self.folder / "versions").mkdir(parents=True, exist_ok=True)

    # Versions

    def versions(self) -> list[ModelVersion]:
        """Return the metadata of all versions, oldest first."""
        files = sorted((self.folder / "versions").glob("*.json"))
        return [ModelVersion.model_validate_json(file.read_text(encoding="utf-8")) for file in files]

    def version(self, number: int) -> ModelVersion:
        """Return the metadata of one version.

        Raises:
            RegistryError: If the version does not exist.
        """
        file = self._info(number)
        if not file.is_file():
            there = ", ".join(str(found.version) for found in self.versions()) or "none"
            raise RegistryError(f"{self.folder} has no version {number}. Available versions: {there}.")
        return ModelVersion.model_validate_json(file.read_text(encoding="utf-8"))

    def add(self, model: SmallModel, metrics: dict[str, Any] | None = None) -> int:
        """Save a model as a new candidate and return its version number."""
        with self._locked():
            return self._add(model, metrics or {})

    def _add(self, model: SmallModel, metrics: dict[str, Any]) -> int:
        number = max((found.version for found in self.versions()), default=0) + 1
        model.save(self.bundle(number))
        self._note(ModelVersion(version=number, status="candidate", metrics=metrics, parent=self.current_version()))
        return number

    def bundle(self, number: int) -> Path:
        """Return the folder of a version's bundle."""
        return self.folder / "versions" / f"{number:04d}"

    def load(self, number: int | None = None, **overrides: Any) -> SmallModel:
        """Load the model of a version.

        Args:
            number: Version number, or None for the version in service.
            **overrides: Keyword arguments of `load_small_model`.

        Raises:
            RegistryError: If the version does not exist, or no version is in service.
        """
        chosen = number if number is not None else self.current_version()
        if chosen is None:
            raise RegistryError(f"{self.folder} has no version in service. Promote one with registry.promote(number).")
        return load_small_model(self.bundle(self.version(chosen).version), **overrides)

    # Version in service

    def current_version(self) -> int | None:
        """Return the number of the version in service, or None if there is none."""
        version: int | None = self._state()["version"]
        return version

    def first_version(self) -> int:
        """Return the number of the version that was in service first, which is S1 of 2CD.

        Raises:
            RegistryError: If no version is in service.
        """
        state = self._state()
        if state["version"] is None:
            raise RegistryError(f"{self.folder} has no version in service. Promote one with registry.promote(number).")
        return int((state["before"] or [state["version"]])[0])

    def in_service_since(self) -> float:
        """Return the time from which calls are attributed to the version in service, in seconds since 1970 UTC.

        This is the version's creation time. It is 0.0 if no version is in service, and for the first version, which may
        have answered before the registry existed.
        """
        state = self._state()
        return self.version(state["version"]).created if state["before"] else 0.0

    def promote(self, number: int, reason: str = "promoted by hand") -> None:
        """Put a version into service atomically.

        Args:
            number: Version number.
            reason: Explanation, saved with the version.

        Raises:
            RegistryError: If the version does not exist.
        """
        with self._locked():
            self._promote(number, reason)

    def _promote(self, number: int, reason: str) -> None:
        found, state = self.version(number), self._state()
        before = [*state["before"], *([state["version"]] if state["version"] is not None else [])]
        self._note(found.model_copy(update={"status": "promoted", "reason": reason}))
        self._set({"version": number, "before": before})

    def rollback(self) -> int:
        """Put the previous version back into service and return its number.

        The version that it replaces is marked as rejected.

        Raises:
            RegistryError: If no previous version exists.
        """
        with self._locked():
            state = self._state()
            if not state["before"]:
                raise RegistryError(
                    f"{self.folder} has no earlier version to roll back to. Promote a version with "
                    f"registry.promote(number)."
                )
            *before, last = state["before"]
            if state["version"] is not None:
                undone = self.version(state["version"]).model_copy(
                    update={"status": "rejected", "reason": f"rolled back to version {last}"}
                )
                self._note(undone)
            self._set({"version": last, "before": before})
            return int(last)

    def consider(
        self,
        candidate: SmallModel,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        gate: PromotionGate | None = None,
        metrics: dict[str, Any] | None = None,
        teacher: TeacherCheckResult | None = None,
    ) -> tuple[int, PromotionResult]:
        """Test a candidate against the version in service, save it, and promote or reject it.

        Args:
            candidate: Small model that may replace the version in service.
            texts: Held-out inputs.
            labels: Their true labels.
            gate: Promotion gate; None uses the default settings.
            metrics: Additional metrics to save with the version.
            teacher: Result of a `TeacherCheck` of the candidate's training answers.

        Returns:
            Version number of the candidate, and the result of the gate.

        Raises:
            RegistryError: If no version is in service.
            DataError: If the gate cannot score the held-out examples. The candidate is then not saved.
        """
        while True:
            in_service = self.current_version()
            verdict = (gate or PromotionGate()).test(self.load(in_service), candidate, texts, labels, teacher=teacher)
            with self._locked():
                if self.current_version() != in_service:
                    continue  # another version was promoted during the test: compare with that one instead
                number = self._add(candidate, {**(metrics or {}), **_figures(verdict)})
                if verdict.passed:
                    self._promote(number, verdict.reason)
                else:
                    rejected = {"status": "rejected", "reason": verdict.reason}
                    self._note(self.version(number).model_copy(update=rejected))
                return number, verdict

    def model(self, **overrides: Any) -> RegistryModel:
        """Return a small model that follows the version in service, with the arguments of `RegistryModel.following`."""
        return RegistryModel.following(self, **overrides)

    # Files

    def _info(self, number: int) -> Path:
        return self.folder / "versions" / f"{number:04d}.json"

    def _note(self, version: ModelVersion) -> None:
        _replace(self._info(version.version), version.model_dump_json(indent=2))

    def _state(self) -> dict[str, Any]:
        file = self.folder / "current.json"
        if not file.is_file():
            return {"version": None, "before": []}
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state

    def _set(self, state: dict[str, Any]) -> None:
        _replace(self.folder / "current.json", json.dumps(state))

    def stamp(self) -> int:
        """Return a hash that changes when another version is put into service. Hashes have no order."""
        try:
            content = (self.folder / "current.json").read_bytes()
        except FileNotFoundError:
            return 0
        return int.from_bytes(sha256(content).digest()[:8], "big")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the writer lock, which excludes other threads and processes and is released if the process dies."""
        filelock = require("filelock", "store")
        lock = filelock.FileLock(self.folder / ".lock", timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise RegistryError(
                f"Another process has held the lock of {self.folder} for {_LOCK_SECONDS:g} s. It may be stopped. End "
                f"it, and try again."
            ) from error
        try:
            yield
        finally:
            lock.release()


class RegistryModel(SmallModel):
    """Small model that follows the version in service of a registry.

    A newly promoted version is loaded and warmed up in the background. The previous version answers until then, so no
    call waits. A running call finishes with the version that it started with. If a version cannot be loaded, a warning
    is logged and the previous version stays in use.
    """

    folder: str
    """Folder of the registry."""

    check_seconds: float = Field(default=1.0, ge=0.0)
    """Minimum seconds between two checks of the folder."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of `load_small_model`."""

    _model: SmallModel | None = PrivateAttr(default=None)
    _stamp: int = PrivateAttr(default=-1)
    _checked: float = PrivateAttr(default=0.0)
    _coming: weakref.ref[threading.Thread] | None = PrivateAttr(default=None)
    _failed: int = PrivateAttr(default=-1)
    _lock: Any = PrivateAttr(default_factory=Mutex)

    @classmethod
    def following(cls, registry: ModelRegistry, *, check_seconds: float = 1.0, **overrides: Any) -> Self:
        """Return a small model that follows a registry.

        Args:
            registry: Registry with a version in service.
            check_seconds: Minimum seconds between two checks of the folder.
            **overrides: `dynamic_batching` and `cache_size` of the returned model, and keyword arguments of
                `load_small_model`.

        Raises:
            RegistryError: If no version is in service.
        """
        serving = {name: overrides.pop(name) for name in ("dynamic_batching", "cache_size") if name in overrides}
        stamp = registry.stamp()  # read before the slow load, so that a promotion meanwhile is still noticed
        first = registry.load(**overrides)
        model = cls(
            **serving,
            folder=str(registry.folder),
            check_seconds=check_seconds,
            overrides=overrides,
            **{name: getattr(first, name) for name in ("labels", "model_id", "temperature", "threshold", "input_key")},
        )
        model._model, model._stamp = first, stamp
        return model

    def reload(self, *, now: bool = True) -> SmallModel:
        """Return the version in service, or the loaded one while a newer one is loaded in the background.

        Args:
            now: Whether to wait for a newer version to be loaded. False returns the loaded version, checks the folder
                at most every `check_seconds`, and loads a newer version in the background.

        Raises:
            RegistryError: If a version has to be loaded and none is in service.
        """
        if not now and time.monotonic() - self._checked < self.check_seconds and self._model is not None:
            return self._model
        with self._lock:
            registry = ModelRegistry(self.folder)
            stamp = registry.stamp()
            if self._model is None or (now and stamp != self._stamp):
                self._take(registry.load(**self.overrides), stamp)
            elif stamp != self._stamp and not self._is_loading():
                loads = (registry, stamp, self._stamp)
                coming = threading.Thread(target=self._prepare, args=loads, name="datashunt-registry", daemon=True)
                self._coming = weakref.ref(coming)
                coming.start()
            self._checked = time.monotonic()
            assert self._model is not None
            return self._model

    def _take(self, model: SmallModel, stamp: int) -> None:
        self._model, self._stamp = model, stamp
        self.labels, self.temperature = model.labels, model.temperature
        self.model_id, self.threshold = model.model_id, model.threshold

    def _is_loading(self) -> bool:
        coming = None if self._coming is None else self._coming()
        return coming is not None and coming.is_alive()

    def _prepare(self, registry: ModelRegistry, stamp: int, before: int) -> None:
        """Load the version in service and warm it up, so that the first call does not wait."""
        try:
            model = registry.load(**self.overrides)
            if model.reads_text:
                model.predict_batch(["."])
        except Exception as error:  # no caller waits on this thread, and the old version still serves
            if self._failed != stamp:
                self._failed = stamp
                _LOG.warning(
                    "%s: cannot load the new version, so the previous version stays in use: %s", self.folder, error
                )
            return
        with self._lock:
            if self._stamp == before:  # no other version was loaded in the meantime
                self._take(model, stamp)

    @property
    @override
    def reader(self) -> InputReader:
        return self.reload(now=False).reader.model_copy(update={"input_key": self.input_key})

    @override
    def workers(self) -> int:
        return self.reload(now=False).workers()

    @property
    @override
    def cache(self) -> ResultCache[Any] | None:
        return self._remembering().cache

    @override
    def forget(self) -> None:
        super().forget()
        if self._model is not None:
            self._model.forget()

    @override
    def _outcome(self, inputs: Sequence[Any]) -> Outcome:
        return self._remembering().predict_batch(inputs, return_errors=True)

    def _remembering(self) -> SmallModel:
        """Return the version in service with this model's cache size. Every version starts with an empty cache."""
        model, size = self.reload(now=False), self.cache_size or int(self.overrides.get("cache_size", 0))
        if model.cache_size != size:
            with self._lock:
                if self._model is model:
                    self._model = model = model.model_copy(update={"cache_size": size})
        return model

    @override
    def predict_scores(self, texts: Sequence[str]) -> Scores:
        return self.reload(now=False).predict_scores(texts)

    @override
    def to_json(self) -> Any:
        """Serialize the folder of the registry and the settings, without the model."""
        names = ("folder", "check_seconds", "overrides", "labels")
        kwargs = {name: getattr(self, name) for name in names}
        return {"lc": 1, "type": "constructor", "id": self.lc_id(), "kwargs": kwargs}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        anew = {"_model": None, "_stamp": -1, "_coming": None, "_failed": -1}
        private = {**(state["__pydantic_private__"] or {}), **anew}
        return {**state, "__pydantic_private__": private}


def _figures(verdict: PromotionResult) -> dict[str, Any]:
    return {
        "n": verdict.n,
        "old_accuracy": verdict.old_accuracy,
        "new_accuracy": verdict.new_accuracy,
        "lower_bound": verdict.lower_bound,
        "proficient_lower_bound": verdict.proficient_lower_bound,
        "forgotten": verdict.forgotten,
        **({} if verdict.teacher is None else {"teacher": _finite(vars(verdict.teacher))}),
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN with None, since JSON has no NaN."""
    return {name: None if value != value else value for name, value in figures.items()}


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, file)
