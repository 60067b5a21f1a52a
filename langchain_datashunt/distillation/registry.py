"""ModelRegistry: versions of a small model in a folder, and which one is in service; promotion is atomic.

    versions/0001/          a bundle
    versions/0001.json      metrics, the gate's verdict, status
    current.json            the version in service, and those that were before it

A reader sees the old version or the new one, never half of either: `current.json` is replaced at once.
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
    """What is known of one version."""

    model_config = ConfigDict(protected_namespaces=())

    version: int
    status: Literal["candidate", "promoted", "rejected"]
    reason: str = ""
    metrics: dict[str, Any] = Field(default_factory=dict)
    parent: int | None = None
    created: float = Field(default_factory=time.time)


class ModelRegistry:
    """Versions of one small model.

    ```python
    registry = ModelRegistry("models/support")
    registry.promote(registry.add(small))                      # the first one
    version = registry.consider(candidate, texts, labels)      # passes the gate, or stays as rejected
    shunt = ShuntRunnable(small=registry.model(), large=...)   # follows promotions between calls
    ```

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        (self.folder / "versions").mkdir(parents=True, exist_ok=True)

    # Versions

    def versions(self) -> list[ModelVersion]:
        """All versions, the oldest first."""
        files = sorted((self.folder / "versions").glob("*.json"))
        return [ModelVersion.model_validate_json(file.read_text(encoding="utf-8")) for file in files]

    def version(self, number: int) -> ModelVersion:
        """One version.

        Raises:
            RegistryError: There is no such version.
        """
        file = self._info(number)
        if not file.is_file():
            there = ", ".join(str(found.version) for found in self.versions()) or "none"
            raise RegistryError(f"{self.folder} has no version {number}; it has: {there}.")
        return ModelVersion.model_validate_json(file.read_text(encoding="utf-8"))

    def add(self, model: SmallModel, metrics: dict[str, Any] | None = None) -> int:
        """Save a model as a new candidate; returns its number."""
        with self._locked():
            return self._add(model, metrics or {})

    def _add(self, model: SmallModel, metrics: dict[str, Any]) -> int:
        number = max((found.version for found in self.versions()), default=0) + 1
        model.save(self.bundle(number))
        self._note(ModelVersion(version=number, status="candidate", metrics=metrics, parent=self.current_version()))
        return number

    def bundle(self, number: int) -> Path:
        """The folder of a version's bundle."""
        return self.folder / "versions" / f"{number:04d}"

    def load(self, number: int | None = None, **overrides: Any) -> SmallModel:
        """A version's model; None for the one in service.

        Raises:
            RegistryError: There is none.
        """
        chosen = number if number is not None else self.current_version()
        if chosen is None:
            raise RegistryError(f"{self.folder} has no version in service. Promote one: registry.promote(number).")
        return load_small_model(self.bundle(self.version(chosen).version), **overrides)

    # Service

    def current_version(self) -> int | None:
        """The version in service."""
        version: int | None = self._state()["version"]
        return version

    def first_version(self) -> int:
        """The version that was in service first: S1 of 2CD.

        Raises:
            RegistryError: None ever was.
        """
        state = self._state()
        if state["version"] is None:
            raise RegistryError(f"{self.folder} has no version in service. Promote one: registry.promote(number).")
        return int((state["before"] or [state["version"]])[0])

    def in_service_since(self) -> float:
        """From when calls are those of the version in service, seconds since 1970 UTC.

        0.0 for the first version, which may have answered before there was a registry, and where there is none.
        """
        state = self._state()
        return self.version(state["version"]).created if state["before"] else 0.0

    def promote(self, number: int, reason: str = "promoted by hand") -> None:
        """Put a version into service, at once for all readers."""
        with self._locked():
            self._promote(number, reason)

    def _promote(self, number: int, reason: str) -> None:
        found, state = self.version(number), self._state()
        before = [*state["before"], *([state["version"]] if state["version"] is not None else [])]
        self._note(found.model_copy(update={"status": "promoted", "reason": reason}))
        self._set({"version": number, "before": before})

    def rollback(self) -> int:
        """Put the version that was in service before back; returns its number.

        Raises:
            RegistryError: There was none before.
        """
        with self._locked():
            state = self._state()
            if not state["before"]:
                raise RegistryError(
                    f"{self.folder} has no earlier version in service to go back to. Promote one by its number: "
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
        """Add a candidate, test it against the version in service, and promote or reject it with the reason.

        Args:
            candidate: What may take over.
            texts: Held-out inputs.
            labels: Their true labels.
            gate: What it must pass; None for the defaults.
            metrics: To be kept with the version.
            teacher: What a `TeacherCheck` found of the answers that taught it.

        Raises:
            RegistryError: Nothing is in service to compare with.
            DataError: There are no held-out examples; the candidate is not kept.
        """
        while True:
            in_service = self.current_version()
            verdict = (gate or PromotionGate()).test(self.load(in_service), candidate, texts, labels, teacher=teacher)
            with self._locked():
                if self.current_version() != in_service:
                    continue  # another was promoted meanwhile: it is that which the candidate has to be as good as
                number = self._add(candidate, {**(metrics or {}), **_figures(verdict)})
                if verdict.passed:
                    self._promote(number, verdict.reason)
                else:
                    rejected = {"status": "rejected", "reason": verdict.reason}
                    self._note(self.version(number).model_copy(update=rejected))
                return number, verdict

    def model(self, **overrides: Any) -> RegistryModel:
        """A small model that follows the version in service; `overrides` as for `load_small_model`."""
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
        """Another number whenever another version is put into service; which is the later is not told by it."""
        try:
            said = (self.folder / "current.json").read_bytes()
        except FileNotFoundError:
            return 0
        return int.from_bytes(sha256(said).digest()[:8], "big")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, also over processes; a process that ends in whatever way gives the lock up."""
        with require("filelock", "store").FileLock(self.folder / ".lock"):
            yield


class RegistryModel(SmallModel):
    """The version in service of a registry as a small model: it follows promotions between calls.

    A version that was put into service is loaded, and computes a first text, in the background; the one before it
    answers until then, so that no call waits. A call that is under way ends with the version that it began with. Where
    a version cannot be loaded, the log says so and the one before it stays.
    """

    folder: str
    """The registry's folder."""

    check_seconds: float = Field(default=1.0, ge=0.0)
    """How often the folder is looked at."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Passed on to `load_small_model`."""

    _model: SmallModel | None = PrivateAttr(default=None)
    _stamp: int = PrivateAttr(default=-1)
    _checked: float = PrivateAttr(default=0.0)
    _coming: weakref.ref[threading.Thread] | None = PrivateAttr(default=None)
    _failed: int = PrivateAttr(default=-1)
    _lock: Any = PrivateAttr(default_factory=Mutex)

    @classmethod
    def following(cls, registry: ModelRegistry, *, check_seconds: float = 1.0, **overrides: Any) -> Self:
        """Follow a registry.

        Raises:
            RegistryError: It has no version in service.
        """
        serving = {name: overrides.pop(name) for name in ("dynamic_batching", "cache_size") if name in overrides}
        stamp = registry.stamp()  # before what it stands for is loaded, which may take a while
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
        """The version in service, loaded at once where `now`.

        Else the one that is loaded; the folder is looked at where the last look was long enough ago, and what is new
        there is loaded in the background.

        Raises:
            RegistryError: It is to be loaded now, and there is none.
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
        """Load what is in service and have it compute something, so that the first call does not wait for that."""
        try:
            model = registry.load(**self.overrides)
            if model.reads_text:
                model.predict_batch(["."])
        except Exception as error:  # a thread has nobody to raise to, and the calls have a model
            if self._failed != stamp:
                self._failed = stamp
                _LOG.warning("%s: the new version cannot be loaded, the one before it stays: %s", self.folder, error)
            return
        with self._lock:
            if self._stamp == before:  # nobody has loaded another meanwhile
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
        """The version in service, which remembers as many texts as this model is to; each version begins anew."""
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
        """As the registry's folder."""
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
    """As JSON can have them: None for a number that there is not."""
    return {name: None if value != value else value for name, value in figures.items()}


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, file)
