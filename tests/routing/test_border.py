"""Inputs that no model, or only the large model, is to answer, and small models that cannot work as they are set up."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from langchain_core.decisions import ChoiceAnswer
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import SecretStr

from langchain_datashunt import (
    ConfidenceRouterChain,
    Prediction,
    ShuntChatModel,
    ShuntRunnable,
    SubtaskShunt,
    Threshold,
)
from langchain_datashunt.exceptions import (
    ConfigurationError,
    InputError,
    NotAPredictionError,
    PredictionError,
    ShuntWarning,
    SmallModelError,
)
from langchain_datashunt.prediction import prediction_from
from langchain_datashunt.routing.subtask_questions import Subtask
from tests.routing.test_shunt import EVERY_WAY, Records, call, make
from tests.support.models import LABELS, CountingLarge, WordModel, failing_word_model, predict_words

BLANK = ["", "   ", "\n\t", "\u200b\u200b", "\ufeff", "\u00a0\u2003"]
MISSING = [None, math.nan]
NO_TEXT = [7, 3.5, True, b"bytes", ["a", "b"], {"other": "refund"}, object(), [], {}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("value", [*BLANK, *MISSING, *NO_TEXT])
async def test_shunt_value_without_text_is_refused_and_nothing_is_called(way: str, value: Any) -> None:
    large, records = CountingLarge(), list[Any]()
    with pytest.raises(InputError):
        await call(make(large=large, recorder=Records(records)), way, value)
    assert large.invoked == records == []


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_shunt_blank_text_in_any_form_is_refused(blank: Any) -> None:
    shunt, large = make(), CountingLarge()
    forms: list[Any] = [{"input": blank}]
    if blank is not None:
        forms += [Document(blank), [HumanMessage(blank)], [("human", blank)], {"input": [HumanMessage(blank)]}]
    for value in forms:
        with pytest.raises(InputError):
            shunt.invoke(value)
    with pytest.raises(InputError):
        make(small=predict_words, large=large).invoke({"input": blank})
    assert large.invoked == []


def test_batch_refused_values_do_not_affect_others() -> None:
    large = CountingLarge()
    found = make(large=large).batch(["surely refund", "", None, "status", 7], return_exceptions=True)
    assert [type(one) for one in found] == [str, InputError, InputError, str, InputError]
    assert (found[0], found[3]) == ("refund", "L:status")
    pairs = dict(make().batch_as_completed(["", "surely refund"], return_exceptions=True))
    assert isinstance(pairs[0], InputError)
    assert pairs[1] == "refund"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_too_long_text_is_refused(way: str) -> None:
    large = CountingLarge()
    with pytest.raises(InputError, match="100,001 characters, more than max_input_characters=100,000"):
        await call(make(large=large), way, "x" * 100_001)
    assert large.invoked == []
    assert await call(make(large=large, max_input_characters=None), way, "x" * 100_001) == "L:" + "x" * 100_001
    with pytest.raises(InputError, match="5 characters, more than max_input_characters=4"):
        await call(make(max_input_characters=4), way, [HumanMessage("hello")])


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize(
    "talk",
    [
        [{"role": "user", "content": "surely refund"}],
        {"role": "user", "content": "surely refund"},
        [("system", "Be kind."), ("human", "surely refund")],
        [SystemMessage("Be kind."), {"role": "user", "content": "surely refund"}],
        [{"role": "user", "content": [{"type": "text", "text": "surely "}, {"type": "text", "text": "refund"}]}],
        {"input": [{"role": "user", "content": "surely refund"}]},
    ],
)
async def test_shunt_dicts_and_tuples_as_messages_are_a_conversation(way: str, talk: Any) -> None:
    assert await call(make(), way, talk) == "refund"
    large = CountingLarge()
    unsure = {"role": "user", "content": "status"}
    await call(make(large=large), way, [{"role": "assistant", "content": "Hello"}, unsure])
    assert large.invoked[0]["input"] == "status"
    assert large.invoked[0]["history"] == [AIMessage("Hello")]


def test_shunt_lists_that_are_no_messages_are_no_conversation() -> None:
    for value in ([{"role": "manager", "content": "x"}], [("refund", "status")], [{"a": 1}], ["human", "x"]):
        with pytest.raises(InputError):
            make().invoke(value)


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("text", ["", "surely refund"])
async def test_shunt_message_with_picture_is_deferred_whole(way: str, text: str) -> None:
    seen: list[Any] = []
    records: list[Any] = []

    def answer(messages: Any) -> str:
        seen.append(messages.to_messages() if hasattr(messages, "to_messages") else messages)
        return "status"

    router = ConfidenceRouterChain.from_models(
        WordModel(), RunnableLambda(answer), return_decision=True, recorder=Records(records)
    )
    talk = [HumanMessage([{"type": "text", "text": text}, PICTURE] if text else [PICTURE])]
    result = await call(router, way, talk)
    assert (result.output, result.reason) == ("status", "unreadable")
    assert PICTURE in seen[0][-1].content, "the large model gets the picture"
    if text:
        assert {"type": "text", "text": text} in seen[0][-1].content
    (record,) = records
    assert record.input == f"{text} [image_url]".strip()
    assert record.reason == "unreadable"
    assert talk[0].content[-1] == PICTURE, "the caller's message is unchanged"


def test_shunt_prompt_that_drops_picture_is_refused() -> None:
    talk = [HumanMessage([{"type": "text", "text": "surely refund"}, PICTURE])]
    text_only = ChatPromptTemplate.from_messages([("system", "{candidate_probabilities}"), ("human", "{input}")])
    model = FakeListChatModel(responses=["status"])
    with pytest.raises(InputError, match="the prompt of `large` would leave out"):
        make(large=text_only | model).invoke(talk)
    whole = ChatPromptTemplate.from_messages([("system", "{candidate_probabilities}"), MessagesPlaceholder("messages")])
    assert make(large=whole | model).invoke(talk).content == "status"


# Small models that cannot work as they are set up


def named(label: str) -> Any:
    return lambda text: label


async def only_async(text: str) -> Prediction:
    return Prediction.from_probabilities({"refund": 1.0})


WRONG: dict[str, Any] = {
    "a label": named("login"),
    "a list of unnamed numbers": lambda text: [0.2, 0.8],
    "one of many labels with its score": lambda text: [{"label": "refund", "score": 0.7}],
    "numbers that are no distribution": lambda text: {"refund": 0.9, "status": 0.9},
    "a dict of texts": lambda text: {"refund": "high"},
    "none": lambda text: None,
    "a missing key": lambda text: text["question"],
    "a wrong call": lambda text: text.nothing(),
    "a missing package": lambda text: __import__("no_such_package"),
    "a prediction that contradicts itself": lambda text: Prediction("b", 0.9, np.array([0.9, 0.1]), ("a", "b")),
}


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("kind", list(WRONG))
async def test_shunt_small_model_that_cannot_work_raises_on_first_call(way: str, kind: str) -> None:
    large = CountingLarge()
    with pytest.raises((NotAPredictionError, KeyError, AttributeError, ImportError, TypeError)):
        await call(make(small=WRONG[kind], large=large), way, "refund")
    assert large.invoked == []


def test_shunt_async_only_small_model_raises_in_sync_call() -> None:
    class OnlyAsync(Runnable[Any, Prediction]):
        def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
            raise NotImplementedError("only async")

        async def ainvoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
            return await only_async(input)

    for small in (OnlyAsync(), RunnableLambda(only_async)):
        with pytest.raises((NotImplementedError, TypeError)):
            make(small=small).invoke("x")


async def test_shunt_small_model_wrong_shape_or_labels_raise() -> None:
    class Narrow(WordModel):
        def predict_scores(self, texts: Any) -> Any:
            return super().predict_scores(texts)._replace(logits=np.zeros((len(texts), 2)))

    for way in EVERY_WAY:
        with pytest.raises(NotAPredictionError, match="Expected scores of shape"):
            await call(make(small=Narrow()), way, "refund")
    with pytest.raises(NotAPredictionError, match="not in `labels`: zzz"):
        make(small=lambda _: Prediction.from_probabilities({"zzz": 1.0}), labels=("a", "b")).invoke("x")


def test_subtasks_and_chat_model_small_model_that_cannot_work_raises() -> None:
    chat = ShuntChatModel(small=named("login"), large=FakeListChatModel(responses=["x"]))
    with pytest.raises(NotAPredictionError):
        chat.invoke("refund")
    with pytest.raises(InputError):
        chat.invoke("  ")
    parts = [Subtask(name="intent", small=named("login"), labels=LABELS)]
    shunt = SubtaskShunt(subtasks=tuple(parts), large=lambda asked: {"intent": "refund"})
    with pytest.raises(NotAPredictionError):
        shunt.invoke("refund")
    fine = SubtaskShunt(subtasks=(Subtask(name="intent", small=WordModel()),), large=lambda asked: {"intent": "status"})
    for blank in BLANK:
        with pytest.raises(InputError):
            fine.invoke(blank)
    found = fine.batch(["surely refund", "", "x"], return_exceptions=True)
    assert [found[0], found[2]] == [{"intent": "refund"}, {"intent": "status"}]
    assert isinstance(found[1], InputError)


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_small_failures_warn_once_and_stop_after_limit(way: str) -> None:
    shunt = make(small=failing_word_model(RuntimeError("out of memory")), max_small_errors=3)
    with pytest.warns(ShuntWarning, match="out of memory"):
        assert await call(shunt, way, "refund") == "L:refund"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert await call(shunt, way, "refund") == "L:refund"
    with pytest.raises(SmallModelError, match="failed on 4 inputs in a row"):
        await call(shunt, way, "refund")
    strict = make(small=failing_word_model(RuntimeError("out of memory")), on_small_error="raise")
    with pytest.raises(RuntimeError, match="out of memory"):
        await call(strict, way, "refund")


@pytest.mark.filterwarnings("ignore::langchain_datashunt.exceptions.ShuntWarning")
def test_shunt_small_failures_between_successes_never_stop() -> None:
    shunt = make(max_small_errors=2, deduplicate=False)
    for _ in range(5):
        assert shunt.batch(["nan", "surely refund"]) == ["L:nan", "refund"]
    copied = pickle.loads(pickle.dumps(make(small=predict_words, large=upper, max_small_errors=7)))
    assert copied.invoke("x") == "X"


# Predictions of other libraries


@pytest.mark.parametrize(
    ("output", "labels"),
    [
        ({"a": 0.7, "b": 0.3}, None),
        ({"b": 0.3, "a": np.float32(0.7)}, None),
        ([("a", 0.7), ("b", 0.3)], None),
        ([{"label": "a", "score": 0.7}, {"label": "b", "score": 0.3}], None),
        ([[{"label": "b", "score": 0.3}, {"label": "a", "score": 0.7}]], None),
        ({"label": "a", "score": 0.7}, ("a", "b")),
        ([{"label": "b", "score": 0.3}], ("a", "b")),
        ([0.7, 0.3], ("a", "b")),
        (np.array([0.7, 0.3]), ("a", "b")),
        (np.array([[0.7, 0.3]]), ("a", "b")),
        (ChoiceAnswer(choice="a", probabilities={"a": 0.7, "b": 0.3}, confidence=0.4, type="choice"), None),
    ],
)
def test_prediction_from_whole_distributions_of_other_libraries(output: Any, labels: Any) -> None:
    found = prediction_from(output, labels)
    assert found.label == "a"
    assert found.probability("b") == pytest.approx(0.3)
    shunt = make(small=lambda text: output, labels=labels or ("a", "b"), policy=None)
    assert shunt.invoke("x") == "L:x"
    assert shunt.batch(["x"]) == ["L:x"]


@pytest.mark.parametrize(
    "output",
    [
        "a", 0.7, None, [], {}, [0.7, 0.3], {"label": "a", "score": 0.7}, [("a", 0.7), ("a", 0.3)],
        {"a": True, "b": 0.0}, {"a": "0.7", "b": 0.3}, [("a", 0.7, 1), ("b", 0.3, 1)], {"a": 0.7}, object(),
    ],
)  # fmt: skip
def test_prediction_from_part_of_distribution_raises(output: Any) -> None:
    with pytest.raises(NotAPredictionError):
        prediction_from(output)


def test_prediction_from_nan_is_passing_error() -> None:
    with pytest.raises(PredictionError) as caught:
        prediction_from({"a": math.nan, "b": 0.3})
    assert not isinstance(caught.value, NotAPredictionError)


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_labels_that_are_no_strings_become_text(way: str) -> None:
    for labels in ((0, 1), (np.int64(0), np.int64(1)), (False, True)):
        prediction = Prediction.from_probabilities(dict(zip(labels, (0.96, 0.04), strict=True)))
        assert await call(make(small=lambda text, one=prediction: one), way, "x") in ("0", "False")
    back = Prediction(label="a", confidence=0.7, probabilities=[0.7, 0.3], labels=["a", "b"])  # type: ignore[arg-type]
    assert (back.labels, back.probabilities.dtype) == (("a", "b"), np.float64)
    assert await call(make(small=lambda text: back), way, "x") == "L:x"


# One input key, one call for each distinct text


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_input_key_reaches_small_model_and_prompt(way: str) -> None:
    large = CountingLarge()
    large._answer = lambda value: f"L:{value['ticket']}"  # type: ignore[method-assign]
    for settings in ({"input_key": "ticket"}, {"small": WordModel(input_key="ticket")}):
        shunt = make(large=large, **settings)
        assert await call(shunt, way, {"ticket": "surely refund"}) == "refund"
        assert await call(shunt, way, {"ticket": "status"}) == "L:status"
        with pytest.raises(InputError, match="no key 'ticket', only"):
            await call(shunt, way, {"question": "status"})
    other = make(small=WordModel(input_key="text"), large=large, input_key="ticket")
    assert await call(other, way, {"ticket": "surely refund"}) == "refund"


@pytest.mark.parametrize("way", ["batch", "abatch", "as_completed", "abatch_as_completed"])
async def test_batch_equal_inputs_share_one_large_call(way: str) -> None:
    inputs = [
        "status",
        "refund",
        "status",
        {"input": "status", "n": "1"},
        "surely refund",
        "refund",
        {"n": "1", "input": "status"},
    ]

    async def run(shunt: ShuntRunnable) -> list[Any]:
        if way == "batch":
            return shunt.batch(inputs)
        if way == "abatch":
            return await shunt.abatch(inputs)
        if way == "as_completed":
            found = dict(shunt.batch_as_completed(inputs))
        else:
            found = {i: output async for i, output in shunt.abatch_as_completed(inputs)}
        return [found[i] for i in range(len(inputs))]

    large, records = CountingLarge(), list[Any]()
    answers = await run(make(large=large, recorder=Records(records)))
    assert answers == ["L:status", "L:refund", "L:status", "L:status", "refund", "L:refund", "L:status"]
    assert len(large.invoked) == 3
    assert len(records) == 7, "each input has its record"
    alone = CountingLarge()
    await run(make(large=alone, deduplicate=False))
    assert len(alone.invoked) == 6


def test_batch_equal_inputs_with_different_settings_are_asked_apart() -> None:
    large = CountingLarge()
    configs: Any = [{"configurable": {"key": SecretStr(key)}} for key in ("a", "b", "a")]
    make(large=large).batch(["status"] * 3, configs)
    assert len(large.invoked) == 3, "calls with configs of their own may belong to different people"
    asked = CountingLarge()
    make(large=asked).batch([{"input": "status", "n": 1}, {"input": "status", "n": True}])
    assert len(asked.invoked) == 2


def test_batch_series_and_arrays_are_accepted() -> None:
    assert make().batch(np.array(["surely refund", "status"])) == ["refund", "L:status"]  # type: ignore[arg-type]


def test_shunt_settings_errors_name_remedy() -> None:
    with pytest.raises(ConfigurationError, match="on_small_error"):
        make(on_small_error="ignore")


def upper(asked: dict[str, Any]) -> str:
    return str(asked["input"]).upper()


def test_policy_learns_deferral_rate_of_answered_inputs_only() -> None:
    class Told(Threshold):
        def observe(self, asked: int, total: int) -> None:
            told.append((asked, total))

    told: list[tuple[int, int]] = []
    alarmed: Any = type("Alarmed", (), {"alarmed": True, "saw": lambda *_: None})()
    inputs = ["surely refund", "", "surely cancel", "status"]
    for settings in ({}, {"shadow": True}, {"fail_safe": "large", "monitor": alarmed}):
        make(policy=Told(0.9), **settings).batch(inputs, return_exceptions=True)
    assert told == [(1, 3)] * 3


@pytest.mark.filterwarnings("ignore::langchain_datashunt.exceptions.ShuntWarning")
def test_decision_explain_says_who_answered_and_why() -> None:
    shunt = make(
        return_decision=True, on_large_error="small", large=CountingLarge({"cancel": [ValueError("down")] * 3})
    )
    lines = [shunt.invoke(text).decision.explain() for text in ("surely refund", "refund", "nan", "cancel")]
    assert lines[0].startswith("answered locally by small: refund, score 0.99")
    assert lines[1].startswith("deferred to large: refund, score 0.")
    assert lines[1].endswith(" < 0.9")
    assert lines[2].startswith("deferred to large, because the small model failed: PredictionError: ")
    assert lines[3].startswith("the large model failed, so small answered: cancel, score 0.")
    assert lines[3].endswith("ValueError: down")
