"""The base of everything that a user configures: serialisable, strict, and with errors of our own type."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, ValidationError
from typing_extensions import override

from langchain_datashunt.exceptions import ConfigurationError


class Configured(Serializable):
    """A pydantic object that LangChain can serialise, that refuses unknown settings, and names what is wrong."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, **settings: Any) -> None:
        """Check the settings.

        Raises:
            ConfigurationError: A setting is unknown, missing, of a wrong type or out of range.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigurationError(in_words(type(self).__name__, error)) from error

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: LangChain's `dumps` and `loads` keep it."""
        return True


class LaidOut(Configured):
    """Configured, with something made of the settings (steps, locks) that a copy or a pickle makes anew for itself."""

    kept_privates: ClassVar[dict[str, Any]] = {}
    """Private attributes that have to be there before `_build` is called after unpickling, with their values."""

    @abstractmethod
    def _build(self) -> None:
        """Make it of the settings."""

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        copied._build()
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copied = self.__copy__()
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        copied._build()
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        """Without what holds locks; it is made again where the object is unpickled."""
        return {**super().__getstate__(), "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__({**state, "__pydantic_private__": dict(self.kept_privates)})
        self._build()


class Strategy(Configured):
    """A small immutable object with one idea: a policy, a score, a pruning strategy."""

    model_config = ConfigDict(frozen=True)

    def __str__(self) -> str:
        return repr(self)


def to_dict(value: Configured) -> dict[str, Any]:
    """A configured object as JSON-ready values: its class's name and its settings, nested ones likewise."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, Configured):
            return to_dict(inner)
        if isinstance(inner, dict):
            return {key: plain(one) for key, one in inner.items()}
        return [plain(one) for one in inner] if isinstance(inner, (list, tuple)) else inner

    return {"is": type(value).__name__, **{name: plain(getattr(value, name)) for name in type(value).model_fields}}


def from_dict(value: Any, classes: Mapping[str, type[Configured]]) -> Any:
    """What `to_dict` wrote, made of the given classes only.

    Raises:
        ConfigurationError: It names another class, or its settings are wrong.
    """
    if isinstance(value, list):
        return tuple(from_dict(one, classes) for one in value)
    if not isinstance(value, dict):
        return value
    inner = {key: from_dict(one, classes) for key, one in value.items() if key != "is"}
    if "is" not in value:
        return inner
    if value["is"] not in classes:
        raise ConfigurationError(f"{value['is']!r} is none of what is known here: {', '.join(sorted(classes))}.")
    return classes[value["is"]](**inner)


def in_words(owner: str, error: ValidationError) -> str:
    """What pydantic found wrong with `owner`, as one sentence: setting, complaint, value."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        seen = "" if problem["type"] == "missing" else f" (given: {_short(problem.get('input'))})"
        lines.append(f"{where}: {problem['msg']}{seen}")
    return f"{owner} cannot be made so: " + "; ".join(lines) + "."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
