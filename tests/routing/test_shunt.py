from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

from langchain_datashunt import (
    AlwaysLarge,
    AlwaysSmall,
    NoPruning,
    Prediction,
    Retry,
    ShuntResult,
    ShuntRunnable,
    SoftPruning,
    Threshold,
    TopHint,
)
from langchain_datashunt.exceptions import ConfigurationError, InputError, NotAPredictionError, ThresholdWarning
from langchain_datashunt.small_models import Scores
from tests.support.models import LABELS, CountingLarge, HttpError, WordModel, failing_word_model, predict_words

QUICK = Retry(attempts=3, initial_wait=0.0, jitter=0.0)
EVERY_WAY = ["invoke", "ainvoke", "batch", "abatch", "stream", "astream", "as_completed", "abatch_as_completed"]


async def call(shunt: Any, way: str, value: Any, config: Any = None) -> Any:
    """Return the output for one input, with any of the Runnable call methods."""
    if way == "invoke":
        return shunt.invoke(value, config)
    if way == "ainvoke":
        return await shunt.ainvoke(value, config)
    if way == "batch":
        return shunt.batch([value], config)[0]
    if way == "abatch":
        return (await shunt.abatch([value], config))[0]
    if way == "as_completed":
        return next(iter(shunt.batch_as_completed([value], config)))[1]
    if way == "abatch_as_completed":
        return [pair async for pair in shunt.abatch_as_completed([value], config)][0][1]
    chunks = list(shunt.stream(value, config)) if way == "stream" else [c async for c in shunt.astream(value, config)]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total


def make(**settings: Any) -> ShuntRunnable:
    defaults: dict[str, Any] = {"small": WordModel(), "large": CountingLarge(), "retry": QUICK}
    return ShuntRunnable(**{**defaults, **settings})


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_confident_input_is_answered_locally(way: str) -> None:
    large = CountingLarge()
    assert await call(make(large=large), way, "surely refund") == "refund"
    assert large.invoked == []


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_deferred_input_carries_prediction(way: str) -> None:
    large = CountingLarge()
    assert await call(make(large=large), way, "refund") == "L:refund"
    asked = large.invoked[0]
    assert asked["input"] == "refund"
    assert asked["small_label"] == "refund"
    assert set(asked["candidates"]) == set(LABELS)
    assert next(iter(asked["candidate_probabilities"])) == "refund"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_result_contains_decision_cost_and_latency(way: str) -> None:
    shunt = make(return_decision=True)
    kept = await call(shunt, way, "surely refund")
    assert isinstance(kept, ShuntResult)
    assert (kept.output, kept.route, kept.reason, kept.threshold) == ("refund", "small", "confident", 0.9)
    assert kept.prediction is not None
    assert kept.prediction.model_id == "words"
    assert kept.cost_usd == 0.0
    asked = await call(shunt, way, "refund")
    assert (asked.output, asked.route, asked.reason) == ("L:refund", "large", "deferred")
    assert asked.latency.large_seconds > 0.0
    assert asked.record_id is not None
    assert asked.cost_usd is None


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_accepts_functions_as_models(way: str) -> None:
    shunt = make(small=predict_words, large=lambda asked: asked["input"].upper())
    assert await call(shunt, way, "surely refund") == "refund"
    assert await call(shunt, way, "refund") == "REFUND"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_small_error_defers(way: str) -> None:
    shunt = make(small=failing_word_model(RuntimeError("out of memory")), return_decision=True)
    result = await call(shunt, way, "surely refund")
    assert (result.output, result.route, result.reason) == ("L:surely refund", "large", "small_error")
    assert result.prediction is None
    assert "out of memory" in result.decision.error


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_large_error_raises_or_falls_back(way: str) -> None:
    def large() -> CountingLarge:
        return CountingLarge({"refund": [HttpError(400)]})

    with pytest.raises(HttpError, match="400"):
        await call(make(large=large()), way, "refund")
    result = await call(make(large=large(), on_large_error="small", return_decision=True), way, "refund")
    assert (result.output, result.route, result.reason) == ("refund", "small", "large_error")
    assert "400" in result.decision.error


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_both_models_fail_raises_large_error(way: str) -> None:
    large = CountingLarge({"x": [HttpError(400)]})
    shunt = make(small=failing_word_model(ValueError()), large=large, on_large_error="small")
    with pytest.raises(HttpError, match="400"):
        await call(shunt, way, "x")


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_retryable_large_errors_are_retried(way: str) -> None:
    large = CountingLarge({"refund": [HttpError(500), HttpError(429)]})
    assert await call(make(large=large), way, "refund") == "L:refund"
    assert len(large.invoked) == 3


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_student_answers_before_large_model(way: str) -> None:
    def learned(text: str) -> Prediction:
        sure = 0.97 if "seen" in text else 0.7
        return Prediction.from_probabilities({"cancel": 1 - sure, "refund": 0.0, "status": sure}, model_id="S2")

    shunt = make(student=learned, return_decision=True)
    assert (await call(shunt, way, "surely refund")).route == "small"
    result = await call(shunt, way, "seen before")
    assert (result.output, result.route, result.reason) == ("status", "student", "confident")
    asked = await call(shunt, way, "refund")
    assert asked.route == "large"
    assert asked.prediction.model_id == "S2", "the more confident prediction must be used"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_threshold_in_config_applies_to_one_call(way: str) -> None:
    shunt = make()
    config = {"configurable": {"shunt_threshold": 0.4}}
    assert await call(shunt, way, "refund", config) == "refund"
    assert await call(shunt, way, "refund") == "L:refund"
    assert await call(shunt.with_config(config), way, "refund") == "refund"


@pytest.mark.parametrize("value", ["high", float("nan"), True])
def test_shunt_invalid_threshold_in_config_raises(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="shunt_threshold"):
        make().invoke("x", {"configurable": {"shunt_threshold": value}})


def test_shunt_configurable_policy_applies_to_one_call() -> None:
    shunt = make().configurable_fields(policy=ConfigurableField(id="policy"))
    assert shunt.invoke("refund", {"configurable": {"policy": AlwaysSmall()}}) == "refund"
    assert shunt.invoke("surely refund", {"configurable": {"policy": AlwaysLarge()}}) == "L:surely refund"
    assert shunt.invoke("surely refund") == "refund"


def test_shunt_without_policy_uses_threshold_of_small_model() -> None:
    shunt = make(small=WordModel(threshold=0.3334), return_decision=True)
    assert shunt.invoke("nothing known").threshold == 0.3334
    assert make(return_decision=True).invoke("x").threshold == 0.9


def test_shunt_threshold_below_uniform_probability_warns() -> None:
    with pytest.warns(ThresholdWarning, match="over 3 labels"):
        make(policy=Threshold(0.3))


def test_shunt_small_output_maps_local_answers() -> None:
    shunt = make(
        small_output=lambda prediction: AIMessage(prediction.label), large=lambda asked: AIMessage("from large")
    )
    assert shunt.invoke("surely refund") == AIMessage("refund")
    assert [m.content for m in shunt.batch(["surely refund", "x"])] == ["refund", "from large"]
    assert asyncio.run(shunt.ainvoke("surely refund")).content == "refund"


def test_shunt_small_output_error_fails_only_its_input() -> None:
    def broken(prediction: Prediction) -> str:
        if prediction.label == "refund":
            raise ValueError("no words for it")
        return prediction.label

    shunt = make(small_output=broken)
    with pytest.raises(ValueError, match="no words"):
        shunt.invoke("surely refund")
    outputs = shunt.batch(["surely refund", "surely cancel"], return_exceptions=True)
    assert isinstance(outputs[0], ValueError)
    assert outputs[1] == "cancel"


def test_shunt_without_pruning_passes_input_unchanged() -> None:
    large = CountingLarge()
    shunt = make(large=large, pruning=None)
    shunt.invoke("refund")
    shunt.batch(["status", "cancel"])
    assert sorted(large.invoked) == ["cancel", "refund", "status"]


@pytest.mark.parametrize(
    "value",
    [
        Document(page_content="refund"),
        [HumanMessage("hello"), AIMessage("hi"), HumanMessage("refund")],
        {"input": "refund", "customer": 7},
        HumanMessage("refund"),
    ],
)
def test_shunt_input_of_any_type_is_not_mutated(value: Any) -> None:
    large = CountingLarge()
    before = copy.deepcopy(value)
    assert make(large=large).invoke(value) == "L:refund"
    assert value == before
    if isinstance(value, dict):
        assert large.invoked[0]["customer"] == 7
    if isinstance(value, list):
        assert len(large.invoked[0]["history"]) == 2


def test_shunt_unreadable_input_raises_input_error() -> None:
    with pytest.raises(InputError, match="no human message"):
        make().invoke([AIMessage("only me")])
    outputs = make().batch([[AIMessage("only me")], "surely refund"], return_exceptions=True)
    assert isinstance(outputs[0], InputError)
    assert outputs[1] == "refund"


def test_shunt_bare_chat_model_with_pruning_raises() -> None:
    with pytest.raises(ConfigurationError, match="takes a mapping for `large`, got FakeListChatModel"):
        make(large=FakeListChatModel(responses=["x"]))
    plain = make(large=FakeListChatModel(responses=["x"]), pruning=None, small_output=lambda p: AIMessage(p.label))
    assert plain.invoke("refund").content == "x"


def test_shunt_template_without_pruning_variable_raises() -> None:
    model = FakeListChatModel(responses=["x"]) | StrOutputParser()
    blind = ChatPromptTemplate.from_template("Classify: {input}") | model
    with pytest.raises(
        ConfigurationError, match=r"none of the variables that SoftPruning fills: \['candidate_probabilities'\]"
    ):
        make(large=blind)
    with pytest.raises(ConfigurationError, match="TopHint"):
        make(large=ChatPromptTemplate.from_template("{input} {candidates}") | model, pruning=TopHint())
    make(large=blind, pruning=NoPruning())
    make(large=ChatPromptTemplate.from_template("{input} {candidate_probabilities}") | model)


def test_shunt_invalid_settings_raise() -> None:
    with pytest.raises(ConfigurationError, match="got int"):
        make(small=3)
    with pytest.raises(ConfigurationError, match="on_large_error"):
        make(on_large_error="ignore")
    with pytest.raises(ConfigurationError, match="tresh"):
        make(tresh=0.5)


def test_nested_shunt_result_contains_decisions_of_all_tiers() -> None:
    middle = make(small=predict_words, policy=Threshold(0.45), large=CountingLarge())
    outer = make(large=middle, return_decision=True)
    result = outer.invoke("refund")
    assert result.output == "refund"
    assert [d.route for d in result.decisions] == ["large", "small"]
    assert result.prediction.model_id == "words"
    assert result.inner.prediction.model_id == "function"
    last = outer.invoke("refund", {"configurable": {"shunt_threshold": 2.0}})
    assert last.output == "L:refund"
    assert [d.route for d in last.decisions] == ["large", "large"]
    assert outer.batch(["refund", "surely refund"])[0].decisions == result.decisions
    streamed = list(outer.stream("refund"))
    assert streamed[0].inner is not None
    assert not middle.return_decision, "the caller's own object must not change"


def test_nested_shunt_threshold_id_sets_inner_threshold() -> None:
    middle = make(small=predict_words, threshold_id="middle_threshold")
    outer = make(large=middle)
    assert {spec.id for spec in outer.config_specs} == {"shunt_threshold", "middle_threshold"}
    assert outer.invoke("refund", {"configurable": {"middle_threshold": 0.4}}) == "refund"


def test_shunt_composes_with_other_runnables() -> None:
    shunt = make()
    chain = {"question": RunnablePassthrough()} | RunnablePassthrough.assign(
        label=RunnableLambda(lambda x: x["question"]) | shunt
    )
    assert chain.invoke("surely refund") == {"question": "surely refund", "label": "refund"}
    assert shunt.map().invoke(["surely refund", "x"]) == ["refund", "L:x"]
    failing = make(large=CountingLarge({"x": [HttpError(400)]}))
    assert failing.with_fallbacks([RunnableLambda(lambda _: "fallback")]).invoke("x") == "fallback"
    assert list(shunt.transform(iter(["sure", "ly refund"]))) == ["refund"]


def test_shunt_schemas_specs_and_graph() -> None:
    shunt = make(student=predict_words)
    assert "string" in str(shunt.get_input_jsonschema())
    assert shunt.get_output_schema() is not None
    assert make(return_decision=True).OutputType is ShuntResult
    assert [spec.id for spec in shunt.config_specs] == ["shunt_threshold"]
    graph = shunt.get_graph()
    names = [node.name for node in graph.nodes.values()]
    assert {"WordModel", "predict_words", "CountingLarge"} <= set(names)
    assert {edge.data for edge in graph.edges if edge.conditional} == {"confident", "deferred"}
    assert "WordModel" in graph.draw_ascii()
    prompted = make(
        large=ChatPromptTemplate.from_template("{candidate_probabilities}") | FakeListChatModel(responses=["x"])
    )
    assert "ChatPromptTemplate" in prompted.get_graph().draw_mermaid()


def test_shunt_pickle_and_copy_keep_behaviour() -> None:
    shunt = make(large=RunnableLambda(echo_input), max_concurrency=2, policy=Threshold(0.8))
    shunt.invoke("x")
    for again in (pickle.loads(pickle.dumps(shunt)), copy.deepcopy(shunt), shunt.model_copy()):
        assert again.invoke("surely refund") == "refund"
        assert again.invoke("x") == "echo x"
        assert again.policy == Threshold(0.8)
    assert shunt.model_copy(update={"policy": AlwaysLarge()}).invoke("surely x") == "echo surely x"


def echo_input(asked: dict[str, Any]) -> str:
    return f"echo {asked['input']}"


def test_shunt_label_descriptions_appear_in_candidates() -> None:
    large = CountingLarge()
    make(large=large, label_descriptions={"refund": "money back"}).invoke("refund")
    assert "- refund: money back" in str(large.invoked[0]["candidates"])


def test_shunt_max_concurrency_limits_large_calls() -> None:
    large = CountingLarge()
    shunt = make(large=large, max_concurrency=2)
    shunt.batch([f"x{i}" for i in range(12)])
    assert large.most_running <= 2
    assert len(list(shunt.batch_as_completed([f"y{i}" for i in range(12)]))) == 12
    assert large.most_running <= 2

    async def many() -> None:
        await asyncio.gather(*(shunt.ainvoke(f"z{i}") for i in range(12)))
        assert len([pair async for pair in shunt.abatch_as_completed([f"w{i}" for i in range(12)])]) == 12

    asyncio.run(many())
    assert large.most_running <= 2


def test_shunt_call_inside_open_stream_does_not_deadlock() -> None:
    shunt = make(large=lambda asked: asked["input"], max_concurrency=1)
    for _ in shunt.stream("one"):
        assert shunt.invoke("two") == "two"

    async def both() -> None:
        async for _ in shunt.astream("one"):
            assert await shunt.ainvoke("two") == "two"

    asyncio.run(asyncio.wait_for(both(), 5))


@pytest.mark.parametrize(
    "prediction",
    [
        Prediction("zzz", 0.99, np.array([0.5, 0.5]), ("a", "b")),
        Prediction("b", 0.99, np.array([0.99, 0.01]), ("a", "b")),
        Prediction("a", 0.99, np.array(["x", "y"]), ("a", "b")),  # type: ignore[arg-type]
    ],
)
def test_shunt_inconsistent_prediction_raises(prediction: Prediction) -> None:
    shunt = make(small=lambda _: prediction, return_decision=True)
    with pytest.raises(NotAPredictionError, match="is not a distribution"):
        shunt.invoke("x")
    assert {type(one) for one in shunt.batch(["x", "y"], return_exceptions=True)} == {NotAPredictionError}


def test_shunt_accepts_list_of_probabilities() -> None:
    shunt = make(small=lambda _: Prediction("a", 0.99, [0.99, 0.01], ("a", "b")))  # type: ignore[arg-type]
    assert shunt.invoke("x") == "a"


def test_shunt_label_outside_task_raises() -> None:
    with pytest.raises(ConfigurationError, match="not in `labels`: status"):
        make(labels=("cancel", "refund"))
    with pytest.raises(ConfigurationError, match="not in `labels`"):
        make(small=predict_words, labels=("cancel", "refund"), student=WordModel())
    shunt = make(small=lambda _: Prediction.from_probabilities({"zzz": 1.0}), labels=("a", "b"), return_decision=True)
    with pytest.raises(NotAPredictionError, match="not in `labels`: zzz"):
        shunt.batch(["x", "y"])


def test_shunt_model_copy_applies_settings_and_validates() -> None:
    shunt = make()
    assert shunt.invoke("surely refund") == "refund"
    always = shunt.model_copy(update={"policy": AlwaysLarge()})
    assert always.invoke("surely refund") == "L:surely refund"
    assert always.model_copy(update={"return_decision": True}).invoke("x").route == "large"
    assert shunt.invoke("surely refund") == "refund"
    with pytest.raises(ConfigurationError, match="on_large_error"):
        shunt.model_copy(update={"on_large_error": "ignore"})
    with pytest.raises(ConfigurationError, match="got int"):
        shunt.model_copy(update={"small": 3})
    with pytest.raises(ConfigurationError, match="model_copy"):
        shunt.policy = AlwaysLarge()


def test_shunt_graph_interrupt_from_either_model_is_raised() -> None:
    class GraphBubbleUp(Exception):
        """Has the name of the base class of LangGraph's interrupts."""

    def interrupt(_: Any) -> Any:
        raise GraphBubbleUp

    for shunt in (make(large=interrupt, on_large_error="small"), make(small=interrupt)):
        with pytest.raises(GraphBubbleUp):
            shunt.invoke("x")
        with pytest.raises(GraphBubbleUp):
            shunt.batch(["x", "y"], return_exceptions=True)
        with pytest.raises(GraphBubbleUp):
            asyncio.run(shunt.ainvoke("x"))


def test_shunt_stream_of_partial_json_sums_to_last_chunk() -> None:
    from langchain_core.output_parsers import JsonOutputParser

    model = FakeListChatModel(responses=['{"a": 1, "b": [1, 2]}'])
    large = ChatPromptTemplate.from_template("{candidate_probabilities}") | model | JsonOutputParser()
    chunks = list(make(large=large, return_decision=True).stream("x"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.output == {"a": 1, "b": [1, 2]}


def test_nested_shunt_graph_can_be_drawn() -> None:
    prompted = ChatPromptTemplate.from_template("{candidate_probabilities}") | FakeListChatModel(responses=["x"])
    nested = make(large=make(large=prompted))
    assert nested.get_graph().draw_mermaid()
    assert nested.get_graph().draw_ascii()
    assert (make() | make(pruning=None)).get_graph().draw_mermaid()
    assert make(large=RunnablePassthrough()).get_graph().nodes


def test_shunt_result_has_json_schema() -> None:
    assert "decision" in str(make(return_decision=True).get_output_jsonschema())
    assert "probabilities" in str(WordModel().get_output_jsonschema())


def test_shunt_soft_pruning_discloses_only_prompt_variables() -> None:
    large = CountingLarge()
    make(large=large, pruning=SoftPruning(top_k=1)).invoke("refund")
    assert set(large.invoked[0]) == {
        "input", "candidates", "candidate_probabilities", "small_label", "small_confidence",
    }  # fmt: skip
    assert len(large.invoked[0]["candidate_probabilities"]) == 1


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_graph_interrupt_does_not_fall_back(way: str) -> None:
    class GraphBubbleUp(Exception):
        """Has the name of the base class of LangGraph's interrupts."""

    def large(_: Any) -> str:
        raise GraphBubbleUp

    shunt = make(large=RunnableLambda(large), on_large_error="small")
    with pytest.raises(GraphBubbleUp):
        await call(shunt, way, "refund")


def test_shunt_rejected_model_copy_leaves_original_unchanged() -> None:
    prompt = ChatPromptTemplate.from_template("{candidate_probabilities} {input}")
    shunt = make(large=prompt | FakeListChatModel(responses=["a"]) | StrOutputParser(), pruning=SoftPruning())
    with pytest.raises(ConfigurationError):
        shunt.model_copy(update={"pruning": TopHint()})
    assert isinstance(shunt.pruning, SoftPruning)
    assert shunt.invoke("refund") == "a"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_failed_small_output_is_not_recorded_as_small_answer(way: str) -> None:
    def broken(prediction: Any) -> Any:
        raise KeyError("no template")

    records: list[Any] = []
    shunt = make(
        large=CountingLarge({"refund": [ValueError("down")]}), small_output=broken, on_large_error="small",
        recorder=Records(records),
    )  # fmt: skip
    with pytest.raises(ValueError, match="down"):
        await call(shunt, way, "refund")
    assert [(record.route, record.reason) for record in records] == [("large", "large_error")]


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_wiring_error_of_large_is_raised_despite_fallback(way: str) -> None:
    def wired_wrongly(value: Any) -> Any:
        raise ConfigurationError("Expected a label.")

    with pytest.raises(ConfigurationError, match="Expected a label"):
        await call(make(large=wired_wrongly, on_large_error="small"), way, "refund")


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_shunt_conversation_changed_after_call_is_recorded_as_it_was(way: str) -> None:
    calls: list[Any] = []
    talk = [HumanMessage("surely refund")]
    assert await call(make(recorder=Records(calls, late=True)), way, talk) == "refund"
    talk.append(HumanMessage("another question"))
    assert [finished().input for finished in calls] == ["surely refund"]


class Records:
    """Recorder that keeps its records, or with `late` the calls that they are created from."""

    task = "test"

    def __init__(self, records: list[Any], late: bool = False) -> None:
        self.records, self.late = records, late

    def wants(self, route: str) -> bool:
        return True

    def weight(self, route: str) -> float:
        return 1.0

    def record(self, calls: Any) -> None:
        self.records += calls if self.late else [finished() for finished in calls]

    async def arecord(self, calls: Any) -> None:
        self.record(calls)


async def test_batch_as_completed_large_calls_start_before_local_answers_are_taken() -> None:
    large, inputs = CountingLarge(), ["surely refund", "status", "surely cancel"]
    pairs = make(large=large).batch_as_completed(inputs)
    assert next(pairs) == (0, "refund")
    for _ in range(200):
        if large.invoked:
            break
        await asyncio.sleep(0.01)
    assert len(large.invoked) == 1, "the consumer has taken one local answer only"
    assert dict(pairs) == {2: "cancel", 1: "L:status"}
    large = CountingLarge()
    apairs = make(large=large).abatch_as_completed(inputs)
    assert await anext(apairs) == (0, "refund")
    await asyncio.sleep(0.05)
    assert len(large.invoked) == 1
    assert {i: output async for i, output in apairs} == {2: "cancel", 1: "L:status"}


def test_shunt_shadow_with_student_keeps_prediction_that_would_have_answered() -> None:
    class Surer(WordModel):
        model_id: str = "surer"

        def predict_scores(self, texts: Any) -> Any:
            return Scores(super().predict_scores(texts).logits * 3)

    for shadow in (False, True):
        shunt = make(small=WordModel(), student=Surer(), policy=Threshold(0.9), shadow=shadow, return_decision=True)
        sure, unsure = shunt.batch(["surely refund", "refund"])
        assert sure.decision.prediction.model_id == "words", "the student would not have been asked"
        assert unsure.decision.prediction.model_id == "surer"
