from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompt_values import ChatPromptValue

from langchain_datashunt.exceptions import InputError
from langchain_datashunt.inputs import mapping_of, messages_of, text_of

CONVERSATION = [SystemMessage("be kind"), HumanMessage("hello"), AIMessage("yes?"), HumanMessage("where is it")]


@pytest.mark.parametrize(
    "value",
    [
        "where is it",
        HumanMessage("where is it"),
        CONVERSATION,
        ChatPromptValue(messages=CONVERSATION),
        Document(page_content="where is it"),
        {"input": "where is it", "other": 3},
        {"input": CONVERSATION},
        {"input": Document(page_content="where is it")},
        [HumanMessage([{"type": "text", "text": "where is it"}])],
    ],
)
def test_text_of_every_input_type_returns_text(value: object) -> None:
    assert text_of(value) == "where is it"


def test_text_of_custom_key_is_read_and_missing_key_raises() -> None:
    assert text_of({"question": "where"}, "question") == "where"
    with pytest.raises(InputError, match=r"no key 'input', only \['question'\]"):
        text_of({"question": "where"})


@pytest.mark.parametrize("value", [None, 3, [], ["text"], [AIMessage("only me")]])
def test_text_of_input_without_text_raises(value: object) -> None:
    with pytest.raises(InputError):
        text_of(value)


def test_mapping_of_conversation_separates_history() -> None:
    mapping = mapping_of(CONVERSATION)
    assert mapping["input"] == "where is it"
    assert mapping["history"] == CONVERSATION[:3]
    assert mapping["messages"] == CONVERSATION
    assert mapping_of("x") == {"input": "x"}
    assert mapping_of(3) == {"input": 3}


def test_mapping_of_mapping_is_copied_and_keeps_own_keys() -> None:
    mine = {"input": Document(page_content="text"), "tone": "dry"}
    mapping = mapping_of(mine)
    assert mapping["input"] == "text"
    assert mapping["document"] is mine["input"]
    assert mapping["tone"] == "dry"
    assert isinstance(mine["input"], Document)
    assert mapping_of({"question": 1}) == {"question": 1}


def test_mapping_of_own_history_precedes_conversation() -> None:
    before, now = (
        [HumanMessage("before"), AIMessage("yes")],
        [HumanMessage("one"), AIMessage("two"), HumanMessage("now")],
    )
    mapping = mapping_of({"input": now, "history": before})
    assert mapping["history"] == [*before, *now[:2]]
    assert mapping_of({"input": HumanMessage("now"), "history": before})["history"] == before


def test_messages_of_non_conversation_is_none() -> None:
    assert messages_of("text") is None
    assert messages_of([]) is None
    assert messages_of(CONVERSATION) == CONVERSATION
