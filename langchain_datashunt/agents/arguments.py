"""Extract the arguments of a tool call from the text, without a large model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ValidationError

from langchain_datashunt._utils.json_schemas import schema_error
from langchain_datashunt.exceptions import ConfigurationError


class ArgumentExtractor(Protocol):
    """Callable that extracts the arguments of a tool call from the user's text."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """Return the arguments, or None if they cannot be determined."""


class NoArguments:
    """Extractor for tools without required arguments."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """Return no arguments, which `extracted` rejects if the tool requires some."""
        return {}


class WholeText:
    """Extractor that passes the whole text as the only argument, for tools such as search or translation."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """Return the text under the tool's parameter, or None if the tool does not take exactly one string."""
        known = _parameters(tool).get("properties", {})
        names = list(known)
        return {names[0]: text} if len(names) == 1 and known[names[0]].get("type") == "string" else None


class PatternArguments:
    """Extractor that reads arguments from the named groups of a regular expression.

    Args:
        patterns: Regular expression for each tool name. Its named groups are the arguments.

    Raises:
        ConfigurationError: A pattern is not a valid regular expression.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        try:
            self.patterns = {name: re.compile(pattern) for name, pattern in patterns.items()}
        except re.error as error:
            raise ConfigurationError(
                f"Invalid regular expression {error.pattern!r} in `patterns`: {error}. Fix the pattern."
            ) from error

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """Return the matched groups, or None if the tool has no pattern or the text does not match."""
        pattern = self.patterns.get(tool.name)
        found = pattern.search(text) if pattern else None
        return (
            None if found is None else {name: value for name, value in found.groupdict().items() if value is not None}
        )


def extracted(extractor: ArgumentExtractor, tool: BaseTool, text: str) -> dict[str, Any] | None:
    """Return the extracted arguments if they fit the tool's schema, else None."""
    args = extractor(tool, text)
    if args is None:
        return None
    schema = tool.tool_call_schema  # excludes arguments that the agent injects
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        try:
            schema.model_validate(args)
        except ValidationError:
            return None
        return args
    wanted = _parameters(tool)
    return args if set(args) <= set(wanted.get("properties", {})) and schema_error(wanted, args) is None else None


def _parameters(tool: BaseTool) -> dict[str, Any]:
    """Return the JSON schema of the caller's arguments, from a Pydantic or a JSON schema."""
    schema = tool.tool_call_schema
    if isinstance(schema, dict):
        return schema
    found: dict[str, Any] = schema.model_json_schema() if issubclass(schema, BaseModel) else {}
    return found
