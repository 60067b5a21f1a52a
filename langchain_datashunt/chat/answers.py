"""Local answers for the small model's labels: text, tool calls or structured objects."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from langchain_core.messages import AIMessage, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.uuid import uuid7
from pydantic import BaseModel, Field, PrivateAttr, ValidationError
from typing_extensions import override

from langchain_datashunt._utils.json_schemas import schema_error
from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.policies.thresholds import Policy, PolicyDecision
from langchain_datashunt.prediction import FloatArray, Prediction, PredictionBatch, answer_text


class ToolAnswer(Configured):
    """Local answer that calls one tool."""

    tool: str
    """Name of the tool. The answer is used only if this tool is bound."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the call."""

    def __init__(self, tool: str, args: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """Accept the tool and its arguments by position or by name."""
        super().__init__(tool=tool, args=dict(args or {}), **settings)


Answer: TypeAlias = str | AIMessage | ToolAnswer | BaseModel | dict[str, Any]
"""Text, a complete message, a tool call, or an object (or its fields) for structured output."""


@dataclass(frozen=True)
class AnswerForm:
    """Form that an answer to one call must have.

    Attributes:
        tools: Names of the bound tools.
        must_call: Whether a tool call is required.
        only: Name of the only tool allowed, None for any.
        schema: Schema of structured output (a Pydantic class, a TypedDict or a JSON schema), None for messages.
        closed: Whether only the large model can answer.
        structured: Whether the answer is an object instead of a message.
        bound: Bound keyword arguments, which those of a call are merged into.
    """

    tools: frozenset[str] = frozenset()
    must_call: bool = False
    only: str | None = None
    schema: Any = None
    closed: bool = False
    structured: bool = False
    bound: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def with_call(self, settings: Mapping[str, Any]) -> AnswerForm:
        """Return the form with the keyword arguments of one call merged in."""
        if self.structured or "response_format" in settings:
            return replace(self, closed=True)
        all_told = {**self.bound, **settings}
        return AnswerForm.from_tools(all_told.get("tools") or (), all_told.get("tool_choice"), all_told)

    def allows(self, message: AIMessage) -> bool:
        """Return whether a message calls allowed tools only, and at least one if required."""
        called = {call["name"] for call in message.tool_calls}
        return called <= ({self.only} if self.only else self.tools) and bool(called or not self.must_call)

    @classmethod
    def from_tools(cls, tools: Sequence[Any], tool_choice: Any, settings: Mapping[str, Any]) -> AnswerForm:
        """Create the form of a call with bound tools.

        Args:
            tools: Tools in any format that `bind_tools` accepts.
            tool_choice: Tool choice in any format that `bind_tools` accepts.
            settings: Other bound keyword arguments. A response format leaves the call to the large model.
        """
        names = frozenset(tool_name(tool) for tool in tools)
        if isinstance(tool_choice, Mapping):
            tool_choice = tool_choice.get("function", tool_choice).get("name") or tool_choice.get("type")
        elif tool_choice is True:
            tool_choice = next(iter(names)) if len(names) == 1 else "any"
        if tool_choice in (None, False, "auto"):
            must_call, only = False, None
        else:
            must_call, only = tool_choice != "none", tool_choice if tool_choice in names else None
        return cls(
            names if tool_choice != "none" else frozenset(),
            must_call,
            only,
            closed="response_format" in settings,
            bound={**settings, "tools": tools, "tool_choice": tool_choice},
        )


class SmallAnswers(Configured):
    """Local answers by label."""

    answers: dict[str, Any] | None = None
    """Label -> an `Answer`, or a list of answers of which the first suitable one is used. Labels without an answer are
    deferred. None answers with the label itself."""

    model_id: str = ""
    """Name of the small model in message metadata."""

    def answerable(self, text: str, form: AnswerForm) -> bool:
        """Return whether a label or a written answer has a local answer in this form."""
        return self._find(text, form) is not None

    def give(self, label: str, form: AnswerForm) -> Any:
        """Return the answer for a label: a message, or an object if the form has a schema.

        Raises:
            ConfigurationError: The label has no answer in this form.
        """
        found = self._find(label, form)
        if found is None:
            raise ConfigurationError(
                f"The label {label!r} has no local answer in the requested form. Add one to `answers`."
            )
        return found

    def _find(self, label: str, form: AnswerForm) -> Any:
        if form.closed:
            return None
        given = label if self.answers is None else self.answers.get(label)
        for one in given if isinstance(given, list) else [given]:
            if one is not None and (found := self._fit(one, label, form)) is not None:
                return found
        return None

    def _fit(self, answer: Any, label: str, form: AnswerForm) -> Any:
        if form.structured:
            fields = {self._one_field(form.schema): label} if isinstance(answer, str) else answer
            return None if None in fields else fitted(form.schema, fields)
        if isinstance(answer, ToolAnswer):
            call = ToolCall(
                name=answer.tool, args=copy.deepcopy(answer.args), id=f"call_{uuid7().hex}", type="tool_call"
            )
            answer = AIMessage("", tool_calls=[call])
        elif isinstance(answer, str):
            answer = AIMessage(answer)
        if not isinstance(answer, AIMessage):
            return None
        return self.as_returned(answer) if form.allows(answer) else None

    def as_returned(self, answer: AIMessage) -> AIMessage:
        """Return a copy with its own id, the small model's name and zero token usage."""
        none = UsageMetadata(input_tokens=0, output_tokens=0, total_tokens=0)
        metadata = {**answer.response_metadata, "model_name": self.model_id, "finish_reason": "stop"}
        changed = {"id": f"shunt-{uuid7()}", "usage_metadata": none, "response_metadata": metadata}
        return answer.model_copy(update=changed, deep=True)

    @staticmethod
    def _one_field(schema: Any) -> str | None:
        """Return the only field of a schema, which a label can fill, or None if it has several."""
        fields = json_schema(schema).get("properties", {})
        return next(iter(fields)) if len(fields) == 1 else None


class Answerable(Policy):
    """Answer locally only if the label or the written text has a local answer in the requested form."""

    answers: SmallAnswers = Field(repr=False)
    """Local answers by label."""

    form: AnswerForm = Field(repr=False)
    """Form that the answer must have."""

    _known: dict[str, bool] = PrivateAttr(default_factory=dict)

    @override
    def evaluate(self, batch: PredictionBatch, threshold: FloatArray | None = None) -> PolicyDecision:
        if batch.answers is None:
            among = np.array([self._known_label(label) for label in batch.labels], dtype=np.bool_)
            keep = among[batch.best]
        else:
            keep = np.array([self.answers.answerable(text, self.form) for text in map(answer_text, batch.answers)])
        nothing = np.full(len(batch), np.nan)
        return PolicyDecision(keep.astype(np.bool_), nothing, nothing)

    def _known_label(self, label: str) -> bool:
        if label not in self._known:
            self._known[label] = self.answers.answerable(label, self.form)
        return self._known[label]


class Answering:
    """Map a prediction to its local answer."""

    def __init__(self, answers: SmallAnswers, form: AnswerForm, raw: bool) -> None:
        self.answers, self.form, self.raw = answers, form, raw

    def __call__(self, prediction: Prediction) -> Any:
        """Return the answer. If `raw` is set, return it together with its raw message."""
        text = prediction.label if prediction.answer is None else answer_text(prediction.answer)
        found = self.answers.give(text, self.form)
        if not self.raw:
            return found
        return {"raw": self.answers.as_returned(AIMessage(text)), "parsed": found, "parsing_error": None}


def fitted(schema: Any, fields: Any) -> Any:
    """Return a new object made of `fields` if they fit the schema, else None."""
    if isinstance(fields, BaseModel):
        fields = fields.model_dump()
    if not isinstance(fields, dict):
        return None
    fields = copy.deepcopy(fields)
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            return schema.model_validate(fields)
        wanted = json_schema(schema)
    except (ValidationError, ValueError, TypeError):
        return None
    known = wanted.get("properties", {})
    return fields if set(fields) <= set(known) and schema_error(wanted, fields) is None else None


def check_tool_answers(answers: Mapping[str, Any], tools: Sequence[Any]) -> None:
    """Check that the arguments of all tool answers fit the bound tools.

    Raises:
        ConfigurationError: Arguments do not fit. Such a call would fail in the tool.
    """
    schemas = {tool_name(tool): tool for tool in tools}
    for label, given in answers.items():
        for answer in given if isinstance(given, list) else [given]:
            if not isinstance(answer, ToolAnswer) or answer.tool not in schemas:
                continue
            try:
                wanted = json_schema(schemas[answer.tool])
            except (ValueError, TypeError, KeyError):  # a tool of the provider, without a schema of its own
                continue
            if wanted and (problem := schema_error(wanted, answer.args)) is not None:
                raise ConfigurationError(
                    f"The arguments of the answer for {label!r} do not fit the tool {answer.tool!r}: {problem}. "
                    f"Change `answers`."
                )


def json_schema(schema: Any) -> dict[str, Any]:
    """Return the JSON schema of the parameters, in any format that `with_structured_output` accepts."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    found: dict[str, Any] = convert_to_openai_tool(schema)["function"].get("parameters", {})
    return found


def tool_name(tool: Any) -> str:
    """Return the name of a tool in any format that `bind_tools` accepts."""
    own = getattr(tool, "name", None)
    if isinstance(own, str):
        return own
    if isinstance(tool, Mapping):
        named = tool.get("function", tool)
        return str(named.get("name") or named.get("title") or named.get("type") or json.dumps(dict(tool), default=str))
    return str(convert_to_openai_tool(tool)["function"]["name"])
