"""Check values against JSON schemas, where a keyword that is not understood means that the value does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
        "example", "deprecated", "readOnly", "writeOnly", "strict",
    }
)  # fmt: skip
"""Keywords that do not restrict values."""

_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are mappings from names to schemas."""

_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE = frozenset(
    {"items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames", "unevaluatedProperties",
     "unevaluatedItems"}
)  # fmt: skip


def schema_error(schema: Mapping[str, Any], value: Any) -> str | None:
    """Return why a value does not fit a JSON schema, or None if it fits.

    A keyword that is not understood, an invalid schema and a reference that cannot be resolved count as not fitting.
    Nothing is loaded from the network.
    """
    from jsonschema import exceptions, validators
    from referencing.exceptions import Unresolvable

    dialect = validators.validator_for(schema, default=validators.Draft202012Validator)
    known = {*dialect.VALIDATORS, *_ANNOTATIONS}
    strange = sorted({key for key in _keywords(schema) if key not in known and not key.startswith("x-")})
    if strange:
        return f"the schema uses {', '.join(strange[:5])}, which cannot be checked"
    try:
        dialect.check_schema(schema)
        found = next(iter(dialect(schema, format_checker=dialect.FORMAT_CHECKER).iter_errors(value)), None)
    except (exceptions.SchemaError, Unresolvable, RecursionError) as error:
        return f"the schema cannot be used ({type(error).__name__})"
    if found is None:
        return None
    where = "/".join(map(str, found.absolute_path))
    return f"{where + ': ' if where else ''}it does not satisfy {found.validator!r}"


def _keywords(schema: Any) -> Iterator[str]:
    """Yield the keywords of a schema and of the schemas in it."""
    if not isinstance(schema, Mapping):
        return
    for key, part in schema.items():
        yield str(key)
        if key in _MAPS and isinstance(part, Mapping):
            for inner in part.values():
                yield from _keywords(inner)
        elif key in _LISTS and isinstance(part, list):
            for inner in part:
                yield from _keywords(inner)
        elif key in _SINGLE:
            for inner in part if isinstance(part, list) else [part]:
                yield from _keywords(inner)
