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
def test_every_kind_of_input_has_its_text(value: object) -> None:
    assert text_of(value) == "where is it"


def test_another_key_can_hold_the_input() -> None:
    assert text_of({"question": "where"}, "question") == "where"
    with pytest.raises(InputError, match=r"no key 'input'; it has \['question'\]"):
        text_of({"question": "where"})


@pytest.mark.parametrize("value", [None, 3, [], ["text"], [AIMessage("only me")]])
def test_what_has_no_text_is_refused(value: object) -> None:
    with pytest.raises(InputError):
        text_of(value)


def test_the_mapping_for_prompts_splits_a_conversation() -> None:
    mapping = mapping_of(CONVERSATION)
    assert mapping["input"] == "where is it"
    assert mapping["history"] == CONVERSATION[:3]
    assert mapping["messages"] == CONVERSATION
    assert mapping_of("x") == {"input": "x"}
    assert mapping_of(3) == {"input": 3}


def test_a_callers_mapping_is_copied_and_its_own_keys_win() -> None:
    mine = {"input": Document(page_content="text"), "tone": "dry"}
    mapping = mapping_of(mine)
    assert mapping["input"] == "text"
    assert mapping["document"] is mine["input"]
    assert mapping["tone"] == "dry"
    assert isinstance(mine["input"], Document)
    assert mapping_of({"question": 1}) == {"question": 1}


def test_a_callers_history_is_kept_before_the_conversations_own() -> None:
    before, now = (
        [HumanMessage("before"), AIMessage("yes")],
        [HumanMessage("one"), AIMessage("two"), HumanMessage("now")],
    )
    mapping = mapping_of({"input": now, "history": before})
    assert mapping["history"] == [*before, *now[:2]]
    assert mapping_of({"input": HumanMessage("now"), "history": before})["history"] == before


def test_messages_are_recognised() -> None:
    assert messages_of("text") is None
    assert messages_of([]) is None
    assert messages_of(CONVERSATION) == CONVERSATION
