"""Short reprs: the settings that matter, each in a few words, and never a whole array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from langchain_core.runnables import Runnable
from pydantic import BaseModel
from pydantic.fields import FieldInfo


class ShortRepr(BaseModel):
    """Shows the settings that differ from their defaults, each in a few words."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.repr and not _is_default(field, value):
                yield name, Short(value)


class Short:
    """A value with a repr of at most a line."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        value = self.value
        if isinstance(value, (tuple, list, set, frozenset, dict)) and len(value) > 6:
            return f"<{len(value)} {'entries' if isinstance(value, dict) else 'items'}>"
        if (shape := getattr(value, "shape", None)) is not None:
            return f"<array {list(shape)}>"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(repr(Short(one)) for one in value)}]" if value else "[]"
        if isinstance(value, Runnable):
            return value.get_name()
        text = repr(value)
        return text if len(text) <= 200 else f"{text[:197]}..."


def _is_default(field: FieldInfo, value: Any) -> bool:
    if field.is_required():
        return False
    try:
        return bool(value == field.get_default(call_default_factory=True))
    except Exception:  # arrays have no single truth value, and a factory may need the other fields
        return False


def short_repr(value: Any) -> str:
    """Return a short repr of a dataclass; use it as `__repr__ = short_repr`."""
    parts = (f"{one.name}={Short(getattr(value, one.name))!r}" for one in fields(value) if one.repr)
    return f"{type(value).__name__}({', '.join(parts)})"
