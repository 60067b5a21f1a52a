"""A local chat model as the small model, and images sent to multimodal chat models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_openai import ChatOpenAI

from langchain_datashunt import (
    AlwaysLarge,
    ConfidenceRouterChain,
    ShuntChatModel,
    ShuntRunnable,
    SoftPruning,
    Threshold,
    TopHint,
)
from langchain_datashunt.agents import ShuntModelRouterMiddleware
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.chat import SmallChatModel
from langchain_datashunt.evaluation.monitor import Monitor
from langchain_datashunt.exceptions import ConfigurationError, InputError, PredictionError
from langchain_datashunt.images import ImageReader, Picture
from langchain_datashunt.policies import Entropy, Margin, MeanTokenProbability, MinTokenProbability
from tests.support.handlers import RunBook
from tests.support.modalities import ScriptedSmall, image_modality
from tests.support.models import LABELS
from tests.support.scripted_server import ScriptedServer


def reply(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Reply as the small model, confident about texts that contain "surely"."""
    if body["model"] != "tiny":
        return None
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
    if "nothing" in text:
        return {"content": ""}
    label = next((label for label in LABELS if label in text), "A small answer.")
    return {"content": label, "logprob": math.log(0.97 if "surely" in text else 0.4)}


def tiny(server: ScriptedServer, **settings: Any) -> ChatOpenAI:
    model: ChatOpenAI = server.chat_model(model="tiny", http_async_client=httpx.AsyncClient(), **settings)
    return model


async def test_small_chat_model_without_labels_returns_answer_and_confidence() -> None:
    with ScriptedServer(reply) as server:
        small = SmallChatModel(chat_model=tiny(server))
        assert small.model_id == "tiny"
        one = small.invoke("surely something")
        assert (one.answer, one.label, one.model_id) == ("A small answer.", "answer", "tiny")
        assert one.confidence == pytest.approx(0.97)
        assert one.token_logprobs is not None
        assert len(one.token_logprobs) == 3
        assert server.bodies[-1]["logprobs"] is True
        assert (await small.ainvoke("hm")).confidence == pytest.approx(0.4)
        found = small.batch(["surely", "nothing", "hm"], return_exceptions=True)
        assert [getattr(item, "confidence", None) for item in found] == [pytest.approx(0.97), None, pytest.approx(0.4)]
        assert "empty answer" in str(found[1])
        again = await small.abatch(["surely", 3, "hm"], return_exceptions=True)
        assert isinstance(again[1], Exception)
        assert again[0].answer == "A small answer."
        talk = [SystemMessage("Be brief."), HumanMessage("one"), AIMessage("two"), HumanMessage("surely three")]
        small.invoke(talk)
        assert [message["content"] for message in server.bodies[-1]["messages"]] == [
            "Be brief.", "one", "two", "surely three",
        ]  # fmt: skip
        least = SmallChatModel(chat_model=tiny(server), score=MinTokenProbability(), model_id="mine")
        assert least.invoke("surely").model_id == "mine"
        other = server.chat_model(model="other")
        assert small.model_copy(update={"chat_model": other}).model_id == "other"
        assert least.model_copy(update={"chat_model": other}).model_id == "mine", "an explicit name is kept"
        with pytest.raises(ConfigurationError, match="frozen"):
            small.chat_model = other


async def test_shunt_small_chat_model_and_llm_routes_and_records(tmp_path: Path) -> None:
    with ScriptedServer(reply) as server, CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        prompt = ChatPromptTemplate.from_messages(
            [("system", "A small model says: {small_label} ({small_confidence})"), ("human", "{input}")]
        )
        large = prompt | server.chat_model(http_async_client=httpx.AsyncClient()) | StrOutputParser()
        with Recorder(store, task="chat", sample_small=1.0) as recorder:
            shunt = ShuntRunnable(
                small=SmallChatModel(chat_model=tiny(server)), large=large, policy=Threshold(0.9),
                pruning=TopHint(),
                recorder=recorder,
            )  # fmt: skip
            book = RunBook()
            assert shunt.invoke("surely x", {"callbacks": [book]}) == "A small answer."
            assert shunt.invoke("x", {"callbacks": [book]}) == server.text
            book.assert_balanced()
            assert server.bodies[-1]["messages"][0]["content"] == "A small model says: A small answer. (0.4)"
            assert "".join(shunt.stream("x")) == server.text
            assert "".join([chunk async for chunk in shunt.astream("surely x")]) == "A small answer."
            assert await shunt.abatch(["surely x", "x"]) == ["A small answer.", server.text]
            assert shunt.invoke("nothing") == server.text
        calls = {call.input: call for part in store.iterate() for call in part if call.route == "large"}
        assert calls["x"].small_answer == "A small answer."
        assert calls["x"].answer_label == server.text
        assert calls["x"].confidence == pytest.approx(0.4, abs=1e-3)
        assert calls["nothing"].reason == "small_error"


def test_small_chat_model_with_labels_returns_label_probabilities() -> None:
    with ScriptedServer(reply) as server:
        small = SmallChatModel(chat_model=tiny(server), labels=LABELS, aliases={"refund": ("money back",)})
        one = small.invoke("surely refund")
        assert (one.label, one.answer) == ("refund", None)
        assert one.confidence == pytest.approx(0.97)
        assert one.probabilities.sum() == pytest.approx(1.0)
        assert server.bodies[-1]["top_logprobs"] == 10
        assert "- cancel\n- refund\n- status" in str(server.bodies[-1]["messages"][0]["content"])
        found = small.batch(["refund", "hello"], return_exceptions=True)
        assert found[0].label == "refund"
        assert "not one of the 3 labels" in str(found[1])
        chain = ConfidenceRouterChain.from_models(small, FakeListChatModel(responses=["status"]), policy=Threshold(0.9))
        assert chain.batch(["surely refund", "refund", "hello"]) == ["refund", "status", "status"]


async def test_small_chat_model_without_logprobs_raises_and_shunt_defers() -> None:
    small = SmallChatModel(chat_model=FakeListChatModel(responses=["hello"]))
    with pytest.raises(PredictionError, match="returned no log-probabilities"):
        small.invoke("x")
    with pytest.raises(PredictionError, match="returned no log-probabilities"):
        await small.ainvoke("x")
    shunt = ShuntRunnable(small=small, large=lambda _: "large", pruning=None, return_decision=True)
    result = shunt.invoke("x")
    assert (result.output, result.reason) == ("large", "small_error")
    with pytest.raises(ConfigurationError, match="Expected a Runnable, got int"):
        SmallChatModel(chat_model=3)  # type: ignore[arg-type]
    with pytest.raises(PredictionError, match="Expected an AIMessage from .*, got str"):
        SmallChatModel(chat_model=lambda _: "text").invoke("x")  # type: ignore[arg-type]


def test_label_router_image_is_sent_with_probabilities(tmp_path: Path) -> None:
    modality = image_modality(tmp_path)
    with ScriptedServer(text="red") as server:
        chain = ConfidenceRouterChain.from_models(
            modality.small, server.chat_model(), policy=AlwaysLarge(), pruning=SoftPruning(), answer_format="text"
        )
        value = HumanMessage([{"type": "text", "text": "Which colour?"}, Picture(modality.inputs[0]).block()])
        assert chain.invoke(value) == "red"
        system, human = server.bodies[-1]["messages"]
        assert "- blue with probability" in system["content"]
        assert human["content"][0] == {"type": "text", "text": "Which colour?"}
        sent = human["content"][1]["image_url"]["url"]
        assert ImageReader().read(sent) == Picture(modality.inputs[0])
        own = ChatPromptTemplate.from_messages(
            [("human", [{"type": "text", "text": "{candidate_probabilities}"},
                        {"type": "image_url", "image_url": {"url": "{image_url}"}}])]
        )  # fmt: skip
        chain = ConfidenceRouterChain.from_models(
            modality.small, server.chat_model(), policy=AlwaysLarge(), prompt=own, answer_format="text"
        )
        assert chain.batch(list(modality.inputs[:2])) == ["red", "red"]
        assert ImageReader().read(server.bodies[-1]["messages"][0]["content"][1]["image_url"]["url"]).pixels.shape == (
            12,
            12,
            3,
        )
        with pytest.raises(InputError):
            chain.invoke("no image")


def test_small_chat_model_image_reader_sends_image() -> None:
    with ScriptedServer(reply) as server:
        small = SmallChatModel(chat_model=tiny(server), reader=ImageReader(), labels=LABELS)
        found = small.batch([np.zeros((8, 8, 3), np.uint8), "no image"], return_exceptions=True)
        assert isinstance(found[0], Exception)  # the scripted model returns no label for an image
        assert isinstance(found[1], InputError)
        assert server.bodies[-1]["messages"][-1]["content"][0]["type"] == "image_url"


def said(text: str, tokens: list[Any], **metadata: Any) -> Runnable[Any, Any]:
    """Return a chat model with one fixed message."""
    message = AIMessage(text, response_metadata={"logprobs": {"content": tokens}, **metadata})
    return RunnableLambda(lambda _: message)


def token(text: str, p: float, *others: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": word, "logprob": math.log(q)} for word, q in others]
    return {"token": text, "logprob": math.log(p) if p == p else p, "top_logprobs": top}


def test_small_chat_model_label_confidence_is_that_of_its_own_tokens() -> None:
    for tokens in (
        [token("Label", 0.06, ("status", 0.9)), token(":", 1), token(" status", 0.99)],
        [token("stat", 0.9, ("stat", 0.9), ("ref", 0.05)), token("us", 0.1)],
    ):
        small = SmallChatModel(chat_model=said("status", tokens), labels=("status", "refund"))
        one = small.invoke("x")
        assert (one.label, one.confidence < 0.9) == ("status", True)


def test_small_chat_model_invalid_logprobs_fail_their_own_input_only() -> None:
    bad = {
        "that are NaN": said("hello", [token("hello", float("nan"))]),
        "invalid log-probabilities": said("hello", [{"token": "hello", "logprob": None}]),
        "is incomplete": said("Dear customer, we wi", [token("Dear", 0.99)], finish_reason="length"),
    }
    for words, model in bad.items():
        with pytest.raises(PredictionError, match=words):
            SmallChatModel(chat_model=model, model_id="m").invoke("x")
    good, none = said("hello", [token("hello", 0.9)]), bad["invalid log-probabilities"]
    mixed = RunnableLambda(lambda value: (none if "bad" in value.to_string() else good).invoke(value))
    found = SmallChatModel(chat_model=mixed, model_id="m").batch(["a", "bad", "c"], return_exceptions=True)
    assert [getattr(one, "answer", None) for one in found] == ["hello", None, "hello"]


def test_small_chat_model_copy_uses_its_own_chat_model() -> None:
    small = SmallChatModel(chat_model=said("A", [token("A", 0.9)]), model_id="m")
    assert small.invoke("x").answer == "A"
    assert small.model_copy(update={"chat_model": said("C", [token("C", 0.9)])}).invoke("x").answer == "C"
    assert len(small.get_graph().nodes) > 2


def test_written_answers_in_chat_models_llms_and_audits_are_used() -> None:
    from llama_index.core.llms import MockLLM

    from langchain_datashunt.llama_index import ShuntLLM

    small = SmallChatModel(chat_model=said("hello there", [token("hello", 0.99)]), model_id="m")
    chat = ShuntChatModel(small=small, large=FakeListChatModel(responses=["large"]))
    assert chat.invoke("hi").content == "hello there"
    assert ShuntLLM(small=ScriptedSmall(), large=MockLLM()).complete("surely hi").text == "short: surely hi"
    monitor = Monitor()
    shunt = ShuntRunnable(
        small=ScriptedSmall(), large=RunnableLambda(lambda _: "short: surely hi"), pruning=None, audit_rate=1.0,
        monitor=monitor, policy=Threshold(0.9),
    )  # fmt: skip
    for _ in range(5):
        shunt.invoke("surely hi")
    assert shunt.auditor is not None
    shunt.auditor.flush()
    assert (monitor.disagreement.n, monitor.disagreement.total) == (5, 0.0)


def test_chat_model_rejected_draft_is_recorded_with_token_score(tmp_path: Path) -> None:
    draft = AIMessage("hello there", response_metadata={"logprobs": {"content": [token("hello", 0.5)]}})
    tiny_model = GenericFakeChatModel(messages=iter([draft, draft]))
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        with Recorder(store) as recorder:
            large = FakeListChatModel(responses=["BIG"])
            policy = Threshold(0.9, score=MeanTokenProbability())
            chat = ShuntChatModel(small=tiny_model, large=large, recorder=recorder, policy=policy)
            assert chat.invoke("hi").content == "BIG"
        (call,) = [call for part in store.iterate() for call in part]
    assert (call.small_answer, call.score) == ("hello there", 0.5)
    assert call.agrees is not True
    for score in (Margin(), Entropy()):
        with pytest.raises(ConfigurationError, match="generates its answers"):
            ShuntModelRouterMiddleware(large, policy=Threshold(0.8, score=score))


def test_decision_event_carries_tags_and_metadata_of_its_run() -> None:
    seen: list[Any] = []

    class Listener(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            seen.append((data["shunt_route"], kwargs["tags"], kwargs["metadata"].get("shunt_route")))

    shunt = ShuntRunnable(small=ScriptedSmall(), large=lambda _: "L", pruning=None)
    shunt.invoke("surely hi", {"callbacks": [Listener()]})
    assert seen == [("small", ["shunt_route:small", "shunt_reason:confident"], "small")]
