"""Servers without JSON schemas, label sets too large for one, and schemas that a local answer must fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from langchain_core.tools import tool

from langchain_datashunt import ConfidenceRouterChain, ShuntChatModel
from langchain_datashunt._utils.json_schemas import schema_error
from langchain_datashunt.chat import ToolAnswer
from langchain_datashunt.chat.answers import fitted
from langchain_datashunt.exceptions import ConfigurationError, ShuntWarning
from langchain_datashunt.large_models.chat_asker import MOST_ENUM_VALUES, ChatAsker
from tests.routing.test_shunt import EVERY_WAY, call
from tests.support.models import LABELS, WordModel
from tests.support.scripted_server import ScriptedServer


class NoSchemas(ScriptedServer):
    """Server that refuses requests with a JSON schema or tools, as some OpenAI-compatible servers do."""

    refused = 0
    status = 400

    def fault(self, number: int, body: Mapping[str, Any], handler: Any) -> bool:
        if "response_format" in body or "tools" in body or self.status >= 500:
            self.refused += 1
            handler.send_json(self.status, {"error": {"message": "response_format is not supported"}})
            return True
        return super().fault(number, body, handler)


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_asker_server_that_refuses_schemas_is_asked_for_text_from_then_on(way: str) -> None:
    with NoSchemas(text="refund") as server:
        router = ConfidenceRouterChain.from_models(WordModel(), server.chat_model(max_retries=0), labels=LABELS)
        with pytest.warns(ShuntWarning, match="refuses a JSON schema"):
            assert await call(router, way, "status") == "refund"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert await call(router, way, "cancel") == "refund"
        assert server.refused == 1, "later calls are plain text at once"


def test_asker_other_failure_with_schema_does_not_change_format() -> None:
    with NoSchemas(text="refund") as server:
        server.status = 500
        model = server.chat_model(max_retries=0)
        router = ConfidenceRouterChain.from_models(WordModel(), model, labels=LABELS, retry={"attempts": 1})
        with pytest.raises(Exception, match="not supported"):
            router.invoke("status")
        server.status = 400
        strict = ConfidenceRouterChain.from_models(WordModel(), model, labels=LABELS, answer_format="structured")
        with pytest.raises(Exception, match="not supported"):
            strict.invoke("status")


def test_asker_label_set_beyond_schema_limit_is_asked_as_text() -> None:
    labels = [f"label {i}" for i in range(MOST_ENUM_VALUES + 1)]
    with NoSchemas(text="label 7") as server:
        asker = ChatAsker.from_labels(labels, server.chat_model(), prompt=lambda value: "Which?")
        assert asker.invoke({"input": "x"}) == "label 7"
        assert server.refused == 0


NESTED = {
    "type": "object",
    "properties": {"intent": {"$ref": "#/$defs/Intent"}},
    "required": ["intent"],
    "$defs": {"Intent": {"enum": ["cancel", "refund"]}},
}


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        (NESTED, {"intent": "cancel"}, True),
        (NESTED, {"intent": "status"}, False),
        ({"type": "object", "properties": {"a": {"type": "object", "required": ["b"]}}}, {"a": {}}, False),
        ({"type": "integer"}, True, False),
        ({"type": "integer", "minimum": 3}, 2, False),
        ({"type": "string", "pattern": "^x"}, "y", False),
        ({"anyOf": [{"const": 1}, {"type": "null"}]}, None, True),
        ({"type": "array", "items": {"enum": [1]}}, [1, 2], False),
        ({"type": "string", "format": "date"}, "not a date", False),
        ({"type": "string", "nullable": True}, None, False),
        ({"type": "string", "mustRhyme": True}, "x", False),
        ({"type": "string", "x-order": 1}, "x", True),
        ({"$ref": "http://example.com/schema.json"}, "x", False),
        ({"$ref": "#/$defs/Missing"}, "x", False),
        ({"type": "no such type"}, "x", False),
    ],
)
def test_schema_error_only_understood_and_fulfilled_schemas_fit(schema: Any, value: Any, fits: bool) -> None:
    assert (schema_error(schema, value) is None) is fits


def test_local_answer_outside_nested_enum_is_deferred() -> None:
    schema = {"title": "Intent", "description": "What is wanted.", **NESTED}
    assert fitted(schema, {"intent": "cancel"}) == {"intent": "cancel"}
    assert fitted(schema, {"intent": "status"}) is None
    assert fitted(schema, {"intent": "cancel", "more": 1}) is None


def test_bind_tools_answer_with_invalid_arguments_raises() -> None:
    @tool
    def cancel_order(order: int) -> str:
        """Cancel an order."""
        return str(order)

    with ScriptedServer() as server:
        answers = {"cancel": ToolAnswer("cancel_order", {"order": "seven"})}
        chat = ShuntChatModel(small=WordModel(), large=server.chat_model(), answers=answers)
        with pytest.raises(ConfigurationError, match="do not fit the tool 'cancel_order': order"):
            chat.bind_tools([cancel_order])
        fine = {"cancel": ToolAnswer("cancel_order", {"order": 7})}
        chat = ShuntChatModel(small=WordModel(), large=server.chat_model(), answers=fine)
        assert chat.bind_tools([cancel_order]).invoke("surely cancel").tool_calls[0]["args"] == {"order": 7}
