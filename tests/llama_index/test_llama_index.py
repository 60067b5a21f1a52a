from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import PromptTemplate, QueryBundle, Settings, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.base_selector import SelectorResult, SingleSelection
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.base.response.schema import Response
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.retrievers import RouterRetriever
from llama_index.core.schema import Document
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool, RetrieverTool, ToolMetadata
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import BaseModel

from langchain_datashunt import AlwaysLarge, ConformalPruning, EmbeddingClassifier, NoPruning, Threshold
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.chat import ToolAnswer
from langchain_datashunt.exceptions import ConfigurationError, UnparsableAnswerError
from langchain_datashunt.llama_index import (
    EncoderEmbedding,
    ShuntDecisionEvent,
    ShuntFunctionCallingLLM,
    ShuntLLM,
    ShuntQueryEngine,
    ShuntSelection,
    ShuntSelector,
)
from langchain_datashunt.policies import MeanTokenProbability
from langchain_datashunt.small_models import TrainingSettings
from tests.support.models import WordModel, failing_word_model, predict_words

SURE, UNSURE = "surely cancel it", "maybe cancel it"


class Listener(BaseEventHandler):
    """Stores all events of the dispatcher."""

    seen: list[Any] = []

    @classmethod
    def class_name(cls) -> str:
        return "Listener"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)

    def decisions(self) -> list[str]:
        return [event.route for event in self.seen if isinstance(event, ShuntDecisionEvent)]

    def llm_calls(self) -> int:
        return sum(event.class_name() in ("LLMChatStartEvent", "LLMCompletionStartEvent") for event in self.seen)


@pytest.fixture
def listener() -> Iterator[Listener]:
    root, handler = get_dispatcher(), Listener(seen=[])
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


def large(text: str = "From the large one.", *, calls: Sequence[ToolCallBlock] = ()) -> MockFunctionCallingLLM:
    """Return an LLM with one fixed answer that stores its requests and calls the given tools once."""

    def reply(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        asked.append(list(messages))
        if calls and kwargs.get("tools") and messages[-1].role != "tool":
            return ChatMessage(role="assistant", blocks=list(calls))
        return ChatMessage(role="assistant", content=text)

    asked: list[Any] = []
    made = MockFunctionCallingLLM(response_generator=reply, is_chat_model=True)
    made.__dict__["asked"] = asked
    return made


def user(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=text)]


# ShuntLLM


def test_shunt_llm_function_calling_large_returns_function_calling_llm() -> None:
    over = ShuntLLM(small=WordModel(), large=large())
    assert isinstance(over, ShuntFunctionCallingLLM)
    assert isinstance(over, FunctionCallingLLM)
    assert over.metadata.is_function_calling_model
    plain = ShuntLLM(small=WordModel(), large=MockLLM())
    assert not isinstance(plain, FunctionCallingLLM)
    assert plain.class_name() == "ShuntLLM"
    for wrong in ({"policy": "sure"}, {"pruning": "soft"}):
        with pytest.raises(ConfigurationError, match="Expected a P"):
            ShuntLLM(small=WordModel(), large=MockLLM(), **wrong)


def test_shunt_llm_model_copy_uses_its_own_policy() -> None:
    llm = ShuntLLM(small=WordModel(), large=large(), policy=Threshold(0.9))
    strict = llm.model_copy(update={"policy": Threshold(0.999)})
    said = [one.chat(user(SURE)).additional_kwargs["shunt"]["route"] for one in (llm, strict, llm)]
    assert said == ["small", "large", "small"]


async def all_ways(llm: Any, text: str) -> list[Any]:
    """Return the final response of every call method."""
    found = [llm.chat(user(text)), await llm.achat(user(text)), llm.complete(text), await llm.acomplete(text)]
    found.append(list(llm.stream_chat(user(text)))[-1])
    found.append([one async for one in await llm.astream_chat(user(text))][-1])
    found.append(list(llm.stream_complete(text))[-1])
    found.append([one async for one in await llm.astream_complete(text)][-1])
    return found


async def test_shunt_llm_every_call_method_routes_by_confidence(listener: Listener) -> None:
    big = large()
    llm = ShuntLLM(small=WordModel(), large=big, answers={"cancel": "It is cancelled."})
    answers = await all_ways(llm, SURE)
    assert [one.message.content if hasattr(one, "message") else one.text for one in answers] == ["It is cancelled."] * 8
    assert {one.additional_kwargs["shunt"]["route"] for one in answers} == {"small"}
    assert (listener.decisions(), listener.llm_calls()) == (["small"] * 8, 0)
    answers = await all_ways(llm, UNSURE)
    said = {one.message.content if hasattr(one, "message") else one.text for one in answers}
    assert "From the large one." in said
    assert {one.additional_kwargs["shunt"]["label"] for one in answers} == {"cancel"}
    calls = listener.llm_calls()
    assert listener.decisions()[8:] == ["large"] * 8
    await all_ways(large(), UNSURE)
    assert listener.llm_calls() == 2 * calls, "as many LLM events as the large LLM emits by itself"
    system = big.__dict__["asked"][0][0]
    assert "Be brief." in system.content
    assert "- cancel with probability 0.48" in system.content
    assert "cancel with probability" in llm.complete(UNSURE).text, "the mock echoes its prompt"


async def test_shunt_llm_without_local_answer_defers_to_large_llm() -> None:
    big = large()
    llm = ShuntLLM(small=WordModel(), large=big, answers={"cancel": "It is cancelled."}, pruning=NoPruning())
    assert llm.chat(user("surely refund it")).message.content == "From the large one."
    assert big.__dict__["asked"][-1] == user("surely refund it"), "NoPruning adds no hint"
    answers = await all_ways(llm, "surely refund it")
    assert {one.additional_kwargs["shunt"]["reason"] for one in answers} == {"deferred"}
    talk = [*user(SURE), ChatMessage(role="assistant", content="Hm."), ChatMessage(role="tool", content="done")]
    for one in (
        llm.chat(talk), await llm.achat(talk), list(llm.stream_chat(talk))[-1],
        [each async for each in await llm.astream_chat(talk)][-1],
    ):  # fmt: skip
        assert one.message.content == "From the large one."
        assert one.additional_kwargs["shunt"]["policy"].startswith("the conversation does not end")
    broken = ShuntLLM(small=failing_word_model(ValueError("broken")), large=big)
    told = broken.chat(user(SURE)).additional_kwargs["shunt"]
    assert (told["reason"], told["error"]) == ("small_error", "ValueError")
    framed = ShuntLLM(small=WordModel(), large=big, question_of=lambda prompt: prompt.split("Question: ")[1])
    assert framed.complete("cancel refund status\nQuestion: surely refund").text == "refund"


def test_shunt_llm_token_counter_counts_large_calls_once() -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    big = large()
    big.callback_manager = CallbackManager([counter])
    llm = ShuntLLM(small=WordModel(), large=big, callback_manager=CallbackManager([counter]))
    llm.chat(user(SURE))
    assert counter.total_llm_token_count == 0
    llm.chat(user(UNSURE))
    once = counter.total_llm_token_count
    counter.reset_counts()
    big.chat(big.__dict__["asked"][-1])
    assert once == counter.total_llm_token_count > 0


async def test_shunt_llm_structured_output_and_required_tools_defer(listener: Listener) -> None:
    class Intent(BaseModel):
        """Intent of the user."""

        intent: str

    call = ToolCallBlock(tool_call_id="1", tool_name="Intent", tool_kwargs={"intent": "x"})
    llm: Any = ShuntLLM(small=WordModel(), large=large(calls=[call]), answers={"cancel": "It is cancelled."})
    prompt = PromptTemplate(SURE)
    assert llm.structured_predict(Intent, prompt) == Intent(intent="x")
    assert await llm.astructured_predict(Intent, prompt) == Intent(intent="x")
    assert llm.as_structured_llm(Intent).chat(user(SURE)).raw == Intent(intent="x")
    tool = FunctionTool.from_defaults(cancel_order)
    required = llm.chat_with_tools([tool], user_msg=SURE, tool_required=True)
    assert required.additional_kwargs["shunt"]["route"] == "large", "a text answer is not a tool call"
    assert llm.chat_with_tools([tool], user_msg=SURE).message.content == "It is cancelled."
    picture = ChatMessage(role="user", blocks=[TextBlock(text=SURE), ImageBlock(url="http://127.0.0.1/x.png")])
    assert llm.chat([picture]).additional_kwargs["shunt"]["route"] == "large", "the classifier cannot see the image"
    with pytest.raises(ConfigurationError, match="frozen"):
        llm.policy = AlwaysLarge()
    llm = llm.model_copy(update={"policy": AlwaysLarge()})
    assert llm.chat(user(SURE)).additional_kwargs["shunt"]["route"] == "large"
    broken: Any = ShuntLLM(small=WordModel(), large=MockFunctionCallingLLM(response_generator=lambda *a, **k: 1 / 0))
    listener.seen.clear()
    with pytest.raises(ZeroDivisionError):
        broken.chat(user(UNSURE))
    assert listener.decisions() == ["large"], "the event is sent before the LLM is called"
    counter = TokenCountingHandler(tokenizer=str.split)
    ShuntLLM(small=WordModel(), large=MockLLM(), callback_manager=CallbackManager([counter])).complete(UNSURE)
    assert counter.total_llm_token_count > 0


def cancel_order(order: str = "the last") -> str:
    """Cancel an order."""
    return f"cancelled {order}"


async def test_shunt_llm_tool_answers_from_small_and_large_call_tools() -> None:
    tool = FunctionTool.from_defaults(cancel_order)
    by_large = ToolCallBlock(tool_call_id="1", tool_name="cancel_order", tool_kwargs={"order": "8"})
    big = large(calls=[by_large])
    answers = {"cancel": [ToolAnswer("cancel_order", {"order": "7"}), "Which one?"]}
    llm: Any = ShuntLLM(small=WordModel(), large=big, answers=answers)
    for text, order in ((SURE, "7"), (UNSURE, "8")):
        assert llm.predict_and_call([tool], user_msg=text).response == f"cancelled {order}"
        assert (await llm.apredict_and_call([tool], user_msg=text)).response == f"cancelled {order}"
    assert llm.chat(user(SURE)).message.content == "Which one?", "without tools the text is the answer"
    silent: Any = ShuntLLM(small=WordModel(), large=large(), answers={"cancel": "Text."})
    with pytest.raises(ValueError, match="at least one tool call"):
        silent.predict_and_call([tool], user_msg=SURE)


async def test_shunt_llm_in_agent_and_workflow_answers(listener: Listener) -> None:
    llm = ShuntLLM(
        small=WordModel(), large=large("All done."), answers={"cancel": ToolAnswer("cancel_order", {"order": "7"})}
    )
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(cancel_order)], llm=llm)
    result = await agent.run(user_msg=SURE)
    assert str(result) == "All done."
    assert [call.tool_output.content for call in result.tool_calls] == ["cancelled 7"]
    assert listener.decisions() == ["small", "large"]

    class Asking(Workflow):
        @step
        async def ask(self, event: StartEvent) -> StopEvent:
            return StopEvent(result=(await llm.acomplete(event.question)).text)

    answer = await Asking(timeout=30).run(question="maybe a refund")
    assert answer.endswith("maybe a refund")


async def test_llama_index_async_calls_do_not_block_event_loop() -> None:
    class Slow(WordModel):
        def predict_scores(self, texts: Sequence[str]) -> Any:
            time.sleep(0.3)
            return super().predict_scores(texts)

    llm = ShuntLLM(small=Slow(), large=large())
    engine = ShuntQueryEngine(Slow(), lambda text, prediction: time.sleep(0.3) or "Slowly.", Fixed("large"))
    selector = ShuntSelector(Slow(), First())
    choices = [ToolMetadata(description="", name=name) for name in ("cancel", "refund", "status")]
    for waiting in (llm.achat(user(SURE)), engine.aquery(SURE), selector.aselect(choices, SURE)):
        task, longest, last = asyncio.ensure_future(waiting), 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        assert longest < 0.2, "the event loop was blocked while the small model computed"


# ShuntSelector


class First(LLMSingleSelector):
    """Selects the choice at a fixed position, and stores the choices shown."""

    def __init__(self, position: int = 0) -> None:
        self.shown: list[list[str | None]] = []
        self.position = position

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _select(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        self.shown.append([choice.name for choice in choices])
        return SelectorResult(selections=[SingleSelection(index=self.position, reason="the first")])

    async def _aselect(self, choices: Sequence[ToolMetadata], query: QueryBundle) -> SelectorResult:
        return self._select(choices, query)


def metadata(*names: str) -> list[ToolMetadata]:
    return [ToolMetadata(description=f"About {name}.", name=name) for name in names]


async def test_selector_low_confidence_sends_narrowed_choices_to_llm(listener: Listener) -> None:
    asked = First()
    selector = ShuntSelector(WordModel(), asked, keep=1)
    choices = metadata("other", "status", "cancel", "refund")
    for found in (selector.select(choices, SURE), await selector.aselect(choices, SURE)):
        assert isinstance(found, ShuntSelection)
        assert (found.ind, found.decision["route"], asked.shown) == (2, "small", [])
        assert found.scores == [0.0, *[pytest.approx(p, abs=1e-3) for p in (0.0025, 0.995, 0.0025)]]
        assert "words chose it with probability 1.00" in found.reason or "0.99" in found.reason
    for found in (selector.select(choices, UNSURE), await selector.aselect(choices, UNSURE)):
        assert isinstance(found, ShuntSelection)
        assert (found.ind, found.candidates, found.reason) == (0, [0, 2], "the first")
    assert asked.shown == [["other", "cancel"]] * 2, "the most likely choice, and the one unknown to the small model"
    assert listener.decisions() == ["small", "small", "large", "large"]
    only = selector.select(metadata("status", "cancel", "refund"), UNSURE)
    assert isinstance(only, ShuntSelection)
    assert (only.ind, len(asked.shown)) == (1, 2), "a single candidate needs no LLM call"
    assert (only.decision["route"], only.decision["policy"][-27:]) == ("small", "no other candidate was left")
    selector.select(metadata("status", "refund", "other"), SURE)
    assert asked.shown[-1] == ["status", "refund", "other"], "the predicted label is not a choice, so the LLM sees all"
    fitted = ConformalPruning(alpha=0.5, quantile=0.6, n_calibration=9)
    ShuntSelector(WordModel(), asked, pruning=fitted).select(choices, UNSURE)
    assert asked.shown[-1] == ["other", "cancel"]
    everything = ShuntSelector(WordModel(), asked).select(metadata("cancel", "refund", "status"), UNSURE)
    assert everything.ind == 0
    assert asked.shown[-1] == ["cancel", "refund", "status"]
    failed = ShuntSelector(failing_word_model(ValueError("broken")), asked, keep=1).select(choices, SURE)
    assert isinstance(failed, ShuntSelection)
    assert (failed.scores, failed.decision["reason"], asked.shown[-1]) == ([], "small_error", [c.name for c in choices])


def test_selector_invalid_settings_and_choices_raise() -> None:
    with pytest.raises(ConfigurationError, match="No label of the small model .cancel, refund, status. is the name"):
        ShuntSelector(WordModel(), First()).select(metadata("a", "b"), SURE)
    with pytest.raises(ConfigurationError, match="several choices share a name: cancel"):
        ShuntSelector(WordModel(), First()).select(metadata("cancel", "cancel"), SURE)
    with pytest.raises(ConfigurationError, match="nothing to choose from"):
        ShuntSelector(WordModel(), First()).select([], SURE)
    with pytest.raises(ConfigurationError, match="keep=0"):
        ShuntSelector(WordModel(), First(), keep=0)
    with pytest.raises(ConfigurationError, match="not both"):
        ShuntSelector(WordModel(), First(), keep=2, pruning=NoPruning())
    with pytest.raises(UnparsableAnswerError, match="not one of the 2 labels"):
        ShuntSelector(WordModel(), First(position=2), keep=2).select(metadata("cancel", "refund", "status"), UNSURE)
    named = ShuntSelector(WordModel(), First(), names={"cancel": "cancellations"})
    assert named.select(metadata("refund", "cancellations"), SURE).ind == 1
    function = ShuntSelector(predict_words, First(position=1), names={"refund": "orders", "status": "orders"})
    merged = function.select(metadata("orders", "new"), "surely refund")
    assert isinstance(merged, ShuntSelection)
    assert merged.ind == 0
    assert merged.scores == [pytest.approx(0.98), 0.0], "probabilities of two labels of one choice are added"
    assert function.select(metadata("orders", "new"), "maybe").ind == 1, "a choice unknown to the small model is shown"


TOPICS = {
    "gardening": ["Prune roses in early spring.", "Tomatoes need sun and water.", "Compost feeds the soil."],
    "astronomy": ["Jupiter has four large moons.", "A light year is a distance.", "Stars fuse hydrogen."],
    "cooking": ["Simmer the sauce for an hour.", "Knead the bread dough well.", "Salt the pasta water."],
    "finance": ["A bond pays interest.", "Diversify a portfolio of stocks.", "Inflation erodes savings."],
    "football": ["The striker scored a goal.", "Offside is called by the referee.", "The league has twenty teams."],
}
QUESTIONS = {
    "gardening": ["When do I prune my roses?", "How much water do tomato plants need?", "What is good compost?"],
    "astronomy": ["How many moons has Jupiter?", "What do stars burn?", "How far is a light year?"],
    "cooking": ["How long does the sauce simmer?", "How do I knead dough?", "How much salt for the pasta?"],
    "finance": ["What does a bond pay?", "How do I diversify my stocks?", "What does inflation do to savings?"],
    "football": ["Who scored the goal?", "When is it offside?", "How many teams play in the league?"],
}


async def test_selector_five_real_engines_routes_confident_questions_without_llm(listener: Listener) -> None:
    """Confident questions are routed without an LLM call, others with fewer choices."""
    embedding = EncoderEmbedding()
    llm = large("The answer.")
    texts = [question for questions in QUESTIONS.values() for question in questions]
    labels = [topic for topic, questions in QUESTIONS.items() for _ in questions]
    small = EmbeddingClassifier.train(texts, labels, settings=TrainingSettings(progress=False))
    tools, retrievers = [], []
    for topic, sentences in TOPICS.items():
        index = VectorStoreIndex.from_documents([Document(text=one) for one in sentences], embed_model=embedding)
        engine = index.as_query_engine(llm=llm, similarity_top_k=1)
        tools.append(QueryEngineTool.from_defaults(engine, name=topic, description=f"Answers questions on {topic}."))
        retrievers.append(
            RetrieverTool.from_defaults(index.as_retriever(similarity_top_k=1), name=topic, description=topic)
        )
    selector = ShuntSelector(small, First(), policy=Threshold(0.5), keep=2)
    router = RouterQueryEngine(selector=selector, query_engine_tools=tools, llm=llm)
    for topic, question in (("astronomy", "Has Jupiter moons?"), ("gardening", "Roses: when to prune them?")):
        listener.seen.clear()
        response = router.query(question)
        assert str(response) == "The answer."
        assert response.metadata["selector_result"].decision["label"] == topic
        assert response.source_nodes[0].node.get_content() == TOPICS[topic][0]
        assert listener.decisions() == ["small"]
        assert listener.llm_calls() == 1, "one call for the engine's answer, none for the choice"
        again = await router.aquery(question)
        assert again.metadata["selector_result"].ind == list(TOPICS).index(topic)
    picky = First()
    unsure = ShuntSelector(small, picky, policy=Threshold(0.999), keep=2)
    RouterQueryEngine(selector=unsure, query_engine_tools=tools, llm=llm).query("Has Jupiter moons?")
    assert len(picky.shown[0]) == 2
    assert "astronomy" in picky.shown[0]
    nodes = RouterRetriever(selector=selector, retriever_tools=retrievers, llm=llm).retrieve("Has Jupiter moons?")
    assert nodes[0].node.get_content() == TOPICS["astronomy"][0]
    assert (await embedding.aget_query_embedding("a"))[:3] == embedding.get_query_embedding("a")[:3]
    assert len(await embedding.aget_text_embedding_batch(["a", "b"])) == 2


def test_selector_llm_selectors_receive_pruned_choices() -> None:
    reply = json.dumps([{"choice": 2, "reason": "it fits"}])
    choices = metadata("other", "status", "cancel", "refund")
    for kind in (LLMSingleSelector, LLMMultiSelector):
        llm = large(reply)
        found = ShuntSelector(WordModel(), kind.from_defaults(llm=llm), keep=1).select(choices, UNSURE)
        assert (found.inds, found.reasons) == ([2], ["it fits"])
        shown = str(llm.__dict__["asked"][-1])
        assert "About cancel." in shown
        assert "About refund." not in shown


# ShuntQueryEngine


class Fixed(ShuntQueryEngine):
    """Query engine with one fixed answer that stores its questions."""

    def __init__(self, text: str) -> None:
        self.text, self.questions = text, []  # type: ignore[var-annotated]
        self.callback_manager = CallbackManager([])

    def _get_prompt_modules(self) -> Any:
        return {}

    def _query(self, query_bundle: QueryBundle) -> Any:
        self.questions.append(query_bundle.query_str)
        return Response(self.text, metadata={"own": 1})

    async def _aquery(self, query_bundle: QueryBundle) -> Any:
        return self._query(query_bundle)

    def retrieve(self, query_bundle: QueryBundle) -> Any:
        return ["nodes"]

    def synthesize(self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None) -> Any:
        return Response("made of nodes")

    async def asynthesize(self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None) -> Any:
        return Response("made of nodes")


async def test_query_engine_confident_question_returns_local_answer(listener: Listener) -> None:
    big, cached = Fixed("From the large engine."), Fixed("From the cache.")
    ready = Response("Ready.", metadata={"mine": True})
    engine = ShuntQueryEngine(WordModel(), {"cancel": "It is cancelled.", "refund": cached, "status": ready}, big)
    for question, said in (
        (SURE, "It is cancelled."), ("surely refund", "From the cache."), ("surely status", "Ready."),
        (UNSURE, "From the large engine."),
    ):  # fmt: skip
        for response in (engine.query(question), await engine.aquery(question)):
            assert str(response) == said
            assert response.metadata["shunt"]["route"] == ("large" if question == UNSURE else "small")
    assert big.questions == [UNSURE] * 2
    assert engine.query("surely status").metadata["mine"]
    assert ready.metadata == {"mine": True}, "the given response is not modified"
    assert listener.decisions().count("large") == 2
    assert engine.retrieve(QueryBundle("x")) == ["nodes"]
    assert str(engine.synthesize(QueryBundle("x"), [])) == str(await engine.asynthesize(QueryBundle("x"), []))
    with pytest.raises(ConfigurationError, match="labels that the small model does not have: cancle"):
        ShuntQueryEngine(WordModel(), {"cancle": "?"}, big)


async def test_query_engine_local_function_returns_answer_or_defers() -> None:
    big = Fixed("From the large engine.")

    def answer(text: str, prediction: Any) -> str | None:
        return None if "refund" in text else f"{prediction.label}: {text}"

    async def answer_soon(text: str, prediction: Any) -> str | None:
        return answer(text, prediction)

    engine = ShuntQueryEngine(WordModel(), answer, big)
    assert str(engine.query(SURE)) == str(await engine.aquery(SURE)) == f"cancel: {SURE}"
    left = engine.query("surely refund")
    assert (str(left), left.metadata["shunt"]["reason"]) == ("From the large engine.", "deferred")
    soon = ShuntQueryEngine(WordModel(), answer_soon, big)
    assert str(await soon.aquery(SURE)) == f"cancel: {SURE}"
    assert str(await soon.aquery("surely refund")) == "From the large engine."
    with pytest.raises(ConfigurationError, match="Use `aquery`"):
        soon.query(SURE)


async def test_llama_index_recorder_logs_large_answers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'calls.db'}"
    with Recorder(url, task="choices", sample_small=1.0) as recorder:
        selector = ShuntSelector(WordModel(), First(), recorder=recorder)
        selector.select(metadata("refund", "cancel"), UNSURE)
        await selector.aselect(metadata("refund", "cancel"), SURE)
        ShuntQueryEngine(WordModel(), {}, Fixed("Said."), recorder=recorder).query("maybe status")
        llm = ShuntLLM(small=WordModel(), large=large("Spoken."), recorder=recorder)
        await llm.achat(user("maybe a refund"))
    with CallLog(url) as store:
        records = {record.input: record for batch in store.iterate() for record in batch}
    chosen = records[UNSURE]
    assert (chosen.answer_label, chosen.route, chosen.large_model) == ("refund", "large", "First")
    assert records[SURE].route == "small"
    assert records["maybe status"].answer == "Said."
    assert records["maybe a refund"].answer == "Spoken."


def test_settings_llm_accepts_shunt_llm() -> None:
    before = Settings._llm
    try:
        Settings.llm = ShuntLLM(small=WordModel(), large=large())
        assert Settings.llm.complete("surely refund").text == "refund"
    finally:
        Settings._llm = before


def test_shunt_llm_tool_choice_limits_local_tool_call() -> None:
    big = large()
    llm: Any = ShuntLLM(small=WordModel(), large=big, answers={"cancel": ToolAnswer("cancel_order", {"order": "7"})})
    tools = [FunctionTool.from_defaults(cancel_order).metadata.to_openai_tool()]
    other = {"type": "function", "function": {"name": "another"}}
    for choice, mine in (("auto", True), ("cancel_order", True), ("none", False), ("another", False), (other, False)):
        blocks = llm.chat(user(SURE), tools=tools, tool_choice=choice).message.blocks
        assert any(isinstance(block, ToolCallBlock) for block in blocks) == mine


def test_shunt_llm_policy_without_score_defers() -> None:
    llm = ShuntLLM(small=WordModel(), large=large(), policy=Threshold(0.5, score=MeanTokenProbability()))
    response = llm.chat(user(SURE))
    assert response.message.content == "From the large one."
    assert response.additional_kwargs["shunt"]["reason"] == "small_error"
