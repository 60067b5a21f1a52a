"""Arguments of a tool call that need no large model: none, the whole text, or what a pattern finds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from langchain_core.tools import BaseTool
from pydantic import BaseModel, ValidationError

from langchain_datashunt.chat.answers import of_json_type
from langchain_datashunt.exceptions import ConfigurationError


class ArgumentExtractor(Protocol):
    """Finds the arguments of a call in the user's text."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """The arguments, None where they cannot be told."""


class NoArguments:
    """For tools that need none."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """No arguments, where none is required."""
        return {}


class WholeText:
    """The user's whole text as the one argument, for tools that take a single text: search, ask, translate."""

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """The text under the tool's one parameter, None for tools with more."""
        known = _parameters(tool).get("properties", {})
        names = list(known)
        return {names[0]: text} if len(names) == 1 and known[names[0]].get("type") == "string" else None


class PatternArguments:
    """What named groups of a regular expression find.

    Args:
        patterns: Expression by tool; its named groups are the arguments.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        try:
            self.patterns = {name: re.compile(pattern) for name, pattern in patterns.items()}
        except re.error as error:
            raise ConfigurationError(f"{error.pattern!r} is no regular expression: {error}.") from error

    def __call__(self, tool: BaseTool, text: str) -> dict[str, Any] | None:
        """The groups that were found; None where the pattern is not in the text."""
        pattern = self.patterns.get(tool.name)
        found = pattern.search(text) if pattern else None
        return (
            None if found is None else {name: value for name, value in found.groupdict().items() if value is not None}
        )


def extracted(extractor: ArgumentExtractor, tool: BaseTool, text: str) -> dict[str, Any] | None:
    """Arguments that fit the tool's schema, None where there are none that do."""
    args = extractor(tool, text)
    if args is None:
        return None
    schema = tool.tool_call_schema  # without what the agent injects
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        try:
            schema.model_validate(args)
        except ValidationError:
            return None
        return args
    wanted = _parameters(tool)
    known, needed = wanted.get("properties", {}), wanted.get("required", [])
    fits = set(needed) <= set(args) <= set(known) and all(of_json_type(known[k], v) for k, v in args.items())
    return args if fits else None


def _parameters(tool: BaseTool) -> dict[str, Any]:
    """The JSON schema of what a caller gives, also of tools that have nothing else."""
    schema = tool.tool_call_schema
    if isinstance(schema, dict):
        return schema
    found: dict[str, Any] = schema.model_json_schema() if issubclass(schema, BaseModel) else {}
    return found
