"""A real `ChatOpenAI` with a local OpenAI-compatible server, with and without faults."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import BadRequestError, InternalServerError, RateLimitError

from langchain_datashunt import (
    ConfidenceRouterChain,
    ConformalPruning,
    NoPruning,
    Retry,
    ShuntResult,
    ShuntRunnable,
    SoftPruning,
    UnparsableAnswerError,
)
from tests.support.faulty_server import FaultyServer
from tests.support.handlers import RunBook
from tests.support.models import LABELS, WordModel

QUICK = Retry(attempts=4, initial_wait=0.01, max_wait=0.2, jitter=0.01)


def answer(messages: Any) -> str:
    """Return the last label in the first user message, or "status"."""
    text = next(m["content"] for m in messages if m["role"] == "user")
    found = [label for label in LABELS if label in text.split()]
    return found[-1] if found else "status"


def server(plan: Any = None, **settings: Any) -> FaultyServer:
    return FaultyServer(answer, plan, **settings)


def router(serving: FaultyServer, **settings: Any) -> ConfidenceRouterChain:
    model = serving.chat_model(timeout=settings.pop("timeout", 5.0))
    defaults: dict[str, Any] = {"retry": QUICK, "answer_format": "text"}
    return ConfidenceRouterChain.from_models(WordModel(), model, **{**defaults, **settings})


def faults(*names: str | None) -> Any:
    """Return a plan with these faults for the first requests, and none afterwards."""
    return lambda number, body: names[number - 1] if number <= len(names) else None


async def test_router_deferred_input_is_answered_over_http_with_cost() -> None:
    with server() as serving:
        serving.keep_bodies = True
        chain = router(serving, return_decision=True)
        assert chain.invoke("surely refund").route == "small"
        assert serving.bodies == []
        result = chain.invoke("my refund")
        assert (result.output, result.route) == ("refund", "large")
        assert (await chain.ainvoke("please cancel")).output == "cancel"
        assert result.usage["gpt-4"]["output_tokens"] == 2
        assert result.cost_usd == pytest.approx((result.usage["gpt-4"]["input_tokens"] * 30 + 2 * 60) / 1e6)


async def test_request_body_contains_pruned_probabilities() -> None:
    with server() as serving:
        serving.keep_bodies = True
        router(serving, pruning=SoftPruning(top_k=2)).invoke("refund")
        system = serving.bodies[-1]["messages"][0]["content"]
        assert "- refund with probability 0.48\n- cancel with probability 0.26" in system
        router(serving, pruning=NoPruning()).invoke("refund")
        assert "probability" not in str(serving.bodies[-1])
        fitted = ConformalPruning(alpha=0.1, quantile=0.6, n_calibration=50)
        router(serving, pruning=fitted).invoke("refund")
        system = serving.bodies[-1]["messages"][0]["content"]
        assert "- refund" in system
        assert "- cancel" not in system


async def test_structured_output_request_lists_labels_as_enum() -> None:
    for model in ("gpt-4", "gpt-4o"):  # gpt-4 uses a forced function call, gpt-4o a response format
        with server() as serving:
            serving.keep_bodies = True
            chat_model = serving.chat_model(model=model)
            chain = ConfidenceRouterChain.from_models(WordModel(), chat_model, return_decision=True)
            assert chain.invoke("refund").output == "refund"
            results = await chain.abatch(["refund", "cancel"])
            assert [result.output for result in results] == ["refund", "cancel"]
            assert results[0].usage
            body = serving.bodies[0]
            asked = body["tools"][0]["function"] if model == "gpt-4" else body["response_format"]["json_schema"]
            schema = asked.get("parameters") or asked["schema"]
            assert schema["properties"]["label"]["enum"] == list(LABELS)


@pytest.mark.parametrize("fault", ["429", "500", "malformed", "html", "timeout"])
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch"])
async def test_router_transient_faults_are_retried(fault: str, way: str) -> None:
    with server(faults(fault, fault), hang=0.6) as serving:
        chain = router(serving, timeout=0.3)
        if way == "invoke":
            found = [chain.invoke("refund")]
        elif way == "ainvoke":
            found = [await chain.ainvoke("refund")]
        elif way == "batch":
            found = chain.batch(["refund"])
        else:
            found = await chain.abatch(["refund"])
        assert found == ["refund"]
        assert serving.faults == [fault, fault]


async def test_router_persistent_fault_raises_or_falls_back() -> None:
    with server(lambda number, body: "429") as serving:
        with pytest.raises(RateLimitError):
            await router(serving).ainvoke("refund")
        assert len(serving.faults) == 4
        result = router(serving, on_large_error="small", return_decision=True).invoke("refund")
        assert (result.output, result.reason) == ("refund", "large_error")
    with server(lambda number, body: "500") as serving, pytest.raises(InternalServerError):
        router(serving).invoke("refund")
    with server(lambda number, body: "400") as serving:
        with pytest.raises(BadRequestError):
            router(serving).invoke("refund")
        assert len(serving.faults) == 1, "a permanent error must not be retried"


async def test_router_waits_for_retry_after_header() -> None:
    import time

    patient = Retry(attempts=2, initial_wait=0.0, jitter=0.0, max_wait=5.0)
    with server(faults("429"), retry_after="0.5") as serving:
        started = time.perf_counter()
        assert router(serving, retry=patient).invoke("refund") == "refund"
        assert time.perf_counter() - started >= 0.5


async def test_router_invalid_answer_is_reasked_over_http() -> None:
    with server(faults("wrong")) as serving:
        serving.keep_bodies = True
        assert router(serving).invoke("refund") == "refund"
        assert [m["role"] for m in serving.bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    with server(lambda number, body: "wrong" if number % 2 else "empty") as serving:
        with pytest.raises(UnparsableAnswerError) as caught:
            await router(serving).ainvoke("refund")
        assert caught.value.attempts == 2


def streaming(serving: FaultyServer, **settings: Any) -> ShuntRunnable:
    prompt = ChatPromptTemplate.from_messages([("system", "{candidates} {small_label}"), ("human", "{input}")])
    from langchain_datashunt import TopHint

    model = serving.chat_model(stream_usage=True)
    return ShuntRunnable(
        small=WordModel(), large=prompt | model | StrOutputParser(), pruning=TopHint(), retry=QUICK, **settings
    )


async def test_stream_yields_tokens_and_usage() -> None:
    with FaultyServer(lambda messages: "one two three") as serving:
        shunt = streaming(serving, return_decision=True)
        chunks = [chunk async for chunk in shunt.astream("refund")]
        assert len(chunks) >= 4
        total = chunks[0]
        for chunk in chunks[1:]:
            total = total + chunk
        assert isinstance(total, ShuntResult)
        assert total.output == "one two three"
        assert total.usage["gpt-4"]["output_tokens"] == 4
        assert total.cost_usd == pytest.approx(total.usage["gpt-4"]["input_tokens"] * 3e-5 + 4 * 6e-5)
        assert "".join(shunt.model_copy(update={"return_decision": False}).stream("refund")) == "one two three"


@pytest.mark.parametrize("fault", ["cut-at-once", "500"])
async def test_stream_broken_before_first_token_is_retried(fault: str) -> None:
    with FaultyServer(lambda messages: "one two three", faults(fault)) as serving:
        assert "".join(streaming(serving).stream("refund")) == "one two three"
    with FaultyServer(lambda messages: "one two three", faults(fault)) as serving:
        assert "".join([c async for c in streaming(serving).astream("refund")]) == "one two three"


async def test_stream_broken_after_first_token_raises_and_ends_runs() -> None:
    with FaultyServer(lambda messages: "one two three", lambda number, body: "cut") as serving:
        for way in ("stream", "astream"):
            book, seen = RunBook(), []
            shunt = streaming(serving, on_large_error="small")
            with pytest.raises(Exception, match="closed|incomplete|peer|onnection"):
                if way == "stream":
                    for chunk in shunt.stream("refund", {"callbacks": [book]}):
                        seen.append(chunk)
                else:
                    async for chunk in shunt.astream("refund", {"callbacks": [book]}):
                        seen.append(chunk)
            assert "".join(seen) == "one two", "the yielded tokens must not be mixed with a small answer"
            book.assert_balanced()


async def test_router_200_concurrent_calls_with_faults_return_own_answers() -> None:
    rng = random.Random(0)
    kinds = ["429", "500", "malformed", "wrong", None, None, None]
    with server(lambda number, body: rng.choice(kinds) if number <= 300 else None) as serving:
        book = RunBook()
        chain = router(
            serving, max_concurrency=32, max_reasks=8, return_decision=True,
            retry=Retry(attempts=12, initial_wait=0.01, max_wait=0.2, jitter=0.02),
        )  # fmt: skip
        inputs = [f"{'surely ' if i % 4 == 0 else ''}number {i} {LABELS[i % 3]}" for i in range(200)]
        results = await asyncio.gather(*(chain.ainvoke(text, {"callbacks": [book]}) for text in inputs))
        assert [result.output for result in results] == [LABELS[i % 3] for i in range(200)]
        assert [result.route for result in results] == ["small" if i % 4 == 0 else "large" for i in range(200)]
        assert len(serving.faults) > 100
        book.assert_balanced()
        assert len(book.roots()) == 200
        tokens = sum(usage["output_tokens"] for result in results for usage in result.usage.values())
        assert tokens >= 150 * 2
        assert len({result.record_id for result in results}) == 200


async def test_router_batch_of_120_keeps_order_over_http() -> None:
    with server(lambda number, body: "500" if number % 7 == 0 else None) as serving:
        inputs = [f"{'surely ' if i % 3 else ''}x{i} {LABELS[i % 3]}" for i in range(120)]
        expected = [LABELS[i % 3] for i in range(120)]
        assert router(serving, max_concurrency=16).batch(inputs) == expected
        assert await router(serving, max_concurrency=16).abatch(inputs) == expected
        pairs = dict(router(serving).batch_as_completed(inputs))
        assert [pairs[i] for i in range(120)] == expected


def test_replay_server_unrecorded_input_raises(tmp_path: Any) -> None:
    from langchain_datashunt.large_models.replay import ChatServer, RecordedAnswers

    with ChatServer(RecordedAnswers({"refund": "refund"})) as serving:
        chain = ConfidenceRouterChain.from_models(WordModel(), serving.chat_model(), answer_format="text")
        assert chain.invoke("refund") == "refund"
        with pytest.raises(Exception, match="Nothing was recorded"):
            chain.invoke("unheard of")
        assert isinstance(serving.chat_model(), ChatOpenAI)
        assert serving.served == 1
