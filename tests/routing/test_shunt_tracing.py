from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from langchain_datashunt import Prediction, Retry, ShuntDecision, ShuntRunnable
from langchain_datashunt.exceptions import PredictionError
from tests.support.handlers import RunBook
from tests.support.models import CountingLarge, HttpError, WordModel, failing_word_model, predict_words

QUICK = Retry(attempts=2, initial_wait=0.0, jitter=0.0)
MIXED = ["surely refund", "x", "surely status", "refund"]
PROMPT = ChatPromptTemplate.from_template("{input}\n{candidate_probabilities}")


def talking(**settings: Any) -> ShuntRunnable:
    large = PROMPT | FakeListChatModel(responses=["one two three"]) | StrOutputParser()
    return ShuntRunnable(**{"small": WordModel(), "large": large, "retry": QUICK, **settings})


async def test_trace_small_and_large_runs_share_parent() -> None:
    for way in ("invoke", "ainvoke"):
        book = RunBook()
        shunt = talking()
        config: Any = {"callbacks": [book]}
        assert (shunt.invoke("x", config) if way == "invoke" else await shunt.ainvoke("x", config)) == "one two three"
        book.assert_balanced()
        assert [run["name"] for run in book.roots()] == ["ShuntRunnable"]
        (small,) = book.named("WordModel")
        (large,) = book.named("RunnableSequence")
        assert small["parent"] == large["parent"] is not None
        assert "shunt:small" in small["tags"]
        assert "shunt:large" in large["tags"]
        assert len(book.named("FakeListChatModel")) == len(book.named("StrOutputParser")) == 1


async def test_trace_runs_carry_decision() -> None:
    book, collector = RunBook(), RunCollectorCallbackHandler()
    talking().invoke("x", {"callbacks": [book, collector], "metadata": {"mine": 1}})
    (large,) = book.named("RunnableSequence")
    assert large["metadata"]["shunt_route"] == "large"
    assert large["metadata"]["shunt_label"] == "cancel"
    assert large["metadata"]["mine"] == 1
    assert book.named("FakeListChatModel")[0]["metadata"]["shunt_reason"] == "deferred"
    (event,) = book.events
    assert event[0] == "shunt_decision"
    assert event[1]["shunt_threshold"] == 0.9
    root = collector.traced_runs[0]
    assert root.extra["metadata"]["shunt_route"] == "large"
    assert {"shunt_route:large", "shunt_reason:deferred"} <= set(root.tags)


@pytest.mark.parametrize("way", ["batch", "abatch", "as_completed", "abatch_as_completed"])
@pytest.mark.parametrize("fails", [False, True])
async def test_trace_batch_has_run_and_decision_per_input(way: str, fails: bool) -> None:
    book = RunBook()
    large = CountingLarge({"x": [HttpError(400)], "refund": [HttpError(500)]} if fails else None)
    shunt = ShuntRunnable(small=WordModel(), large=large, retry=QUICK)
    config: Any = {"callbacks": [book]}
    if way == "batch":
        shunt.batch(MIXED, config, return_exceptions=True)
    elif way == "abatch":
        await shunt.abatch(MIXED, config, return_exceptions=True)
    elif way == "as_completed":
        list(shunt.batch_as_completed(MIXED, config, return_exceptions=True))
    else:
        [pair async for pair in shunt.abatch_as_completed(MIXED, config, return_exceptions=True)]
    book.assert_balanced()
    assert len(book.roots()) == 4
    routes = [event[1]["shunt_route"] for event in book.events if event[1]["shunt_reason"] != "large_error"]
    assert sorted(routes) == ["large", "large", "small", "small"]
    assert [e[1]["shunt_reason"] for e in book.events].count("large_error") == len(book.failed) == (1 if fails else 0)


@pytest.mark.parametrize("way", ["invoke", "batch", "stream", "ainvoke", "abatch", "astream", "abatch_as_completed"])
async def test_trace_large_error_ends_all_runs(way: str) -> None:
    book = RunBook()
    shunt = ShuntRunnable(
        small=failing_word_model(ValueError("small broke")),
        large=RunnableLambda(lambda _: (_ for _ in ()).throw(HttpError(400))),
        retry=QUICK,
    )
    config: Any = {"callbacks": [book]}
    with pytest.raises(HttpError):
        if way == "invoke":
            shunt.invoke("x", config)
        elif way == "batch":
            shunt.batch(["x", "y"], config)
        elif way == "stream":
            list(shunt.stream("x", config))
        elif way == "ainvoke":
            await shunt.ainvoke("x", config)
        elif way == "abatch":
            await shunt.abatch(["x", "y"], config)
        elif way == "astream":
            [chunk async for chunk in shunt.astream("x", config)]
        else:
            [pair async for pair in shunt.abatch_as_completed(["x", "y"], config)]
    book.assert_balanced()


async def test_trace_cancellation_ends_all_runs() -> None:
    async def slow(asked: Any) -> str:
        await asyncio.sleep(5)
        return "late"

    shunt = ShuntRunnable(small=WordModel(), large=RunnableLambda(lambda _: "x", afunc=slow))
    for start in (shunt.ainvoke, lambda v, c: shunt.abatch([v, "surely refund"], c)):
        book = RunBook()
        task = asyncio.ensure_future(start("x", {"callbacks": [book]}))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        book.assert_balanced()
        assert book.failed

    book = RunBook()
    pairs = shunt.abatch_as_completed(["x", "surely refund"], {"callbacks": [book]})
    assert await anext(pairs) == (1, "refund")
    await asyncio.sleep(0.05)  # LangChain loses the end of a run that is cancelled while its start is awaited
    await pairs.aclose()
    book.assert_balanced()


async def test_trace_closed_stream_ends_all_runs() -> None:
    book = RunBook()
    shunt = talking()
    chunks = shunt.stream("x", {"callbacks": [book]})
    next(chunks)
    chunks.close()
    achunks = shunt.astream("x", {"callbacks": [book]})
    await anext(achunks)
    await achunks.aclose()
    pairs = shunt.batch_as_completed(MIXED, {"callbacks": [book]})
    next(pairs)
    pairs.close()
    assert not [run for id, run in book.started.items() if run["parent"] is None and id not in book.ended + book.failed]
    await asyncio.sleep(0.05)  # LangChain's RunnableSequence ends its inner runs one turn of the event loop later
    book.assert_balanced()


async def test_trace_events_show_decision_before_tokens() -> None:
    shunt = talking()
    events = [event async for event in shunt.astream_events("x", version="v2")]
    kinds = [event["event"] for event in events]
    assert "on_custom_event" in kinds
    (decision,) = [event for event in events if event["event"] == "on_custom_event"]
    assert (decision["name"], decision["data"]["shunt_route"]) == ("shunt_decision", "large")
    tokens = [event["data"]["chunk"].content for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(tokens) == "one two three"
    assert kinds.index("on_custom_event") < kinds.index("on_chat_model_stream"), "the decision must precede the tokens"
    roots = [event for event in events if event["name"] == "ShuntRunnable" and event["event"] == "on_chain_end"]
    assert roots[0]["data"]["output"] == "one two three"


async def test_stream_yields_large_tokens_one_by_one() -> None:
    shunt = talking()
    assert len(list(shunt.stream("x"))) > 3
    assert "".join([chunk async for chunk in shunt.astream("x")]) == "one two three"
    assert list(shunt.stream("surely refund")) == ["refund"]


def test_trace_run_name_id_and_tags_apply_to_root_run() -> None:
    book, run_id = RunBook(), uuid4()
    shunt = ShuntRunnable(small=predict_words, large=CountingLarge(), return_decision=True)
    result = shunt.invoke(
        "surely refund", {"callbacks": [book], "run_name": "my call", "run_id": run_id, "tags": ["t"]}
    )
    assert result.record_id == str(run_id)
    assert book.started[run_id]["name"] == "my call"
    assert book.started[run_id]["tags"] == ["t"]
    assert shunt.invoke("surely refund", {"run_id": run_id}).record_id == str(run_id)
    batch = shunt.batch(["surely refund", "x"], [{"run_id": run_id}, {}])
    assert batch[0].record_id == str(run_id) != batch[1].record_id
    with pytest.warns(RuntimeWarning, match="only for the first"):
        assert shunt.batch(["surely refund", "x"], {"run_id": run_id})[0].record_id == str(run_id)


def test_trace_nested_call_without_config_joins_run() -> None:
    inner = RunnableLambda(lambda x: x, name="inner").with_config(run_name="inner")
    book = RunBook()
    shunt = ShuntRunnable(small=WordModel(), large=lambda asked: inner.invoke(asked["input"]))
    shunt.invoke("x", {"callbacks": [book]})
    assert book.named("inner")[0]["parent"] is not None
    book.assert_balanced()


def test_trace_fallback_decision_replaces_first_tags() -> None:
    collector = RunCollectorCallbackHandler()
    large = CountingLarge({"x": [HttpError(400)]})
    shunt = ShuntRunnable(small=WordModel(), large=large, on_large_error="small")
    shunt.invoke("x", {"callbacks": [collector]})
    tags = collector.traced_runs[0].tags
    assert [tag for tag in tags if tag.startswith("shunt_")] == ["shunt_route:small", "shunt_reason:large_error"]


def test_trace_raising_handler_ends_other_runs() -> None:
    class Angry(RunBook):
        raise_error = True

        def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
            super().on_chain_end(outputs, run_id=run_id, **kwargs)
            if outputs == "refund":
                raise ValueError("angry")

    for way in ("batch", "abatch"):
        book = Angry()
        shunt = ShuntRunnable(small=predict_words, large=CountingLarge())
        config: Any = {"callbacks": [book]}
        with pytest.raises(ValueError, match="angry"):
            if way == "batch":
                shunt.batch(["surely refund"] * 3, config)
            else:
                asyncio.run(shunt.abatch(["surely refund"] * 3, config))
        roots = [run_id for run_id, run in book.started.items() if run["parent"] is None]
        assert set(roots) <= set(book.ended)


def test_result_usage_is_counted_once_and_priced() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 10, "total_tokens": 1010}
    reply = AIMessage("x", usage_metadata=usage, response_metadata={"model_name": "gpt-4"})  # type: ignore[arg-type]

    class Priced(FakeListChatModel):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            from langchain_core.outputs import ChatGeneration, ChatResult

            return ChatResult(generations=[ChatGeneration(message=reply)])

        def _call(self, *args: Any, **kwargs: Any) -> str:
            return "x"

    large = PROMPT | Priced(responses=["x"]) | StrOutputParser()
    inner = ShuntRunnable(small=WordModel(), large=large)
    for shunt in (inner.model_copy(update={"return_decision": True}), talking(large=inner, return_decision=True)):
        result = shunt.invoke("x")
        assert result.usage["gpt-4"]["total_tokens"] == 1010
        assert result.cost_usd == pytest.approx(0.0306)
        kept, asked = shunt.batch(["surely refund", "x"])
        assert (kept.usage, kept.cost_usd) == ({}, 0.0)
        assert asked.usage["gpt-4"]["input_tokens"] == 1000


def test_decision_metadata_hides_error_text_that_quotes_answers() -> None:
    told = [
        ShuntDecision("large", "small_error", error=error).to_metadata()["shunt_error"]
        for error in ("UnparsableAnswerError: the model said 'jane's number is 4711'", "PredictionError: NaN", None)
    ]
    assert told == ["UnparsableAnswerError", "PredictionError: NaN", None]
    with pytest.raises(PredictionError) as caught:
        Prediction.from_answer("jane's number is 4711", 1.5)
    assert "4711" not in str(caught.value)
