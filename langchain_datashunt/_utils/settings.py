"""Base classes of configurable objects, which are serializable and reject unknown settings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Self

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, PrivateAttr, ValidationError
from typing_extensions import override

from langchain_datashunt._utils.short_repr import Short, ShortRepr
from langchain_datashunt.exceptions import ConfigurationError


class Configured(ShortRepr, Serializable):
    """Pydantic object that LangChain can serialize. It rejects unknown settings with a `ConfigurationError`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Validate the settings.

        Raises:
            ConfigurationError: If a setting is unknown, missing, of the wrong type or out of range, or not named.
        """
        if args:
            names = ", ".join(f"{name}=..." for name in list(type(self).model_fields)[: len(args)])
            raise ConfigurationError(
                f"{type(self).__name__} takes its settings by name. Write {type(self).__name__}({names})."
            )
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigurationError(in_words(type(self).__name__, error, type(self).model_fields)) from error

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True, so that LangChain's `dumps` and `loads` support this class."""
        return True


class Frozen(Configured):
    """Object with immutable settings. Copying and unpickling create a new object from the settings.

    A copy therefore has its own runtime state, such as locks, pools and call pipelines, and `model_copy(update=...)`
    validates the new settings.
    """

    _built: bool = PrivateAttr(default=False)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._built = True

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other settings.

        Args:
            update: New values by setting.
            deep: Whether to copy the values of the other settings, too.

        Raises:
            ConfigurationError: If a setting is unknown, of the wrong type or out of range.
        """
        settings = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**(copy.deepcopy(settings) if deep else settings), **(update or {})})

    def __copy__(self) -> Self:
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        settings = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**copy.deepcopy(settings, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_settings, (type(self), {name: getattr(self, name) for name in self.model_fields_set})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields and self._built:
            raise ConfigurationError(
                f"The settings of a {type(self).__name__} are frozen. Use model_copy(update={{{name!r}: ...}})."
            )
        super().__setattr__(name, value)


def _from_settings(cls: type[Frozen], settings: dict[str, Any]) -> Frozen:
    return cls(**settings)


class Strategy(Configured):
    """Base class of small immutable strategies, such as policies, scores and pruning strategies."""

    model_config = ConfigDict(frozen=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show all settings: the text of a policy stands in every log record."""
        for name, field in type(self).model_fields.items():
            if field.repr:
                yield name, Short(getattr(self, name))

    def __str__(self) -> str:
        return repr(self)


def to_dict(value: Configured) -> dict[str, Any]:
    """Return a configured object as JSON-ready values: the name of its class, and its settings recursively."""

    def plain(inner: Any) -> Any:
        if isinstance(inner, Configured):
            return to_dict(inner)
        if isinstance(inner, dict):
            return {key: plain(one) for key, one in inner.items()}
        return [plain(one) for one in inner] if isinstance(inner, (list, tuple)) else inner

    return {"is": type(value).__name__, **{name: plain(getattr(value, name)) for name in type(value).model_fields}}


def from_dict(value: Any, classes: Mapping[str, type[Configured]]) -> Any:
    """Create the object that `to_dict` wrote, allowing the given classes only.

    Raises:
        ConfigurationError: If it names another class, or if its settings are invalid.
    """
    if isinstance(value, list):
        return tuple(from_dict(one, classes) for one in value)
    if not isinstance(value, dict):
        return value
    inner = {key: from_dict(one, classes) for key, one in value.items() if key != "is"}
    if "is" not in value:
        return inner
    if value["is"] not in classes:
        raise ConfigurationError(f"Unknown class {value['is']!r}. Use one of: {', '.join(sorted(classes))}.")
    return classes[value["is"]](**inner)


def in_words(owner: str, error: ValidationError, known: Iterable[str] = ()) -> str:
    """Return pydantic's validation errors of `owner` as one sentence with setting, problem and value.

    Args:
        owner: Name of the class.
        error: The validation errors.
        known: Names of its settings, of which the closest to an unknown one is suggested.
    """
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        seen = "" if problem["type"] == "missing" else f" (got {_short(problem.get('input'))})"
        if problem["type"] == "extra_forbidden" and (close := get_close_matches(where, list(known), 1)):
            seen += f", did you mean {close[0]!r}?"
        lines.append(f"{where}: {problem['msg']}{seen}")
    return f"Invalid settings of {owner}: " + "; ".join(lines) + "."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
