from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    MessagesPlaceholder,
)
from langchain_core.runnables import RunnableLambda
from pydantic import PrivateAttr

from langchain_datashunt import (
    AlwaysLarge,
    ConfidenceRouterChain,
    HardPruning,
    NoPruning,
    Prediction,
    Retry,
    ShuntRunnable,
    SoftPruning,
    Threshold,
    TopHint,
    UnparsableAnswerError,
)
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.large_models.chat_asker import ChatAsker, default_prompt, offers_structured_output
from langchain_datashunt.large_models.label_parser import LabelParser
from langchain_datashunt.large_models.prompt_pruning import Pruning
from langchain_datashunt.policies import Entropy, Margin, MaxProbability
from langchain_datashunt.policies.thresholds import AllOf, AnyOf
from tests.support.handlers import RunBook
from tests.support.models import LABELS, CountingLarge, WordModel, predict_words


class Scripted(FakeListChatModel):
    """Chat model with scripted answers by the first human message, which records all requests."""

    responses: list[str] = ["refund"]
    script: dict[str, list[str]] = {}
    _asked: list[list[BaseMessage]] = PrivateAttr(default_factory=list)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self._asked.append(messages)
        first = next(str(m.content) for m in messages if m.type == "human")
        asked_again = sum(m.type == "ai" for m in messages)
        answers = self.script.get(first, ["refund"])
        text = answers[min(asked_again, len(answers) - 1)]
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])


def chain(script: dict[str, list[str]] | None = None, **settings: Any) -> tuple[ConfidenceRouterChain, Scripted]:
    model = Scripted(script=script or {})
    return ConfidenceRouterChain.from_models(WordModel(), model, **settings), model


def test_router_every_call_method_returns_label() -> None:
    router, model = chain({"where?": ["Status."]})
    assert router.invoke("surely cancel") == "cancel"
    assert router.invoke("where?") == "status"
    assert asyncio.run(router.ainvoke("where?")) == "status"
    assert router.batch(["surely cancel", "where?", "x"]) == ["cancel", "status", "refund"]
    assert asyncio.run(router.abatch(["surely cancel", "where?", "x"])) == ["cancel", "status", "refund"]
    assert list(router.stream("where?")) == ["status"]
    assert len(model._asked) == 7


def test_default_prompt_contains_candidates_probabilities_history_and_input() -> None:
    router, model = chain(labels={"cancel": "stop it", "refund": "", "status": "where it is"})
    router.invoke([HumanMessage("hello"), AIMessage("hi"), HumanMessage("my refund {x}")])
    system, *rest = model._asked[0]
    assert "- cancel: stop it\n- refund\n- status: where it is" in str(system.content)
    assert "- refund with probability 0.48" in str(system.content)
    assert [m.content for m in rest] == ["hello", "hi", "my refund {x}"]


@pytest.mark.parametrize(
    ("pruning", "there", "absent"),
    [
        (SoftPruning(top_k=1), "with probability", "says refund"),
        (TopHint(), "says refund, with confidence 0.48", "with probability"),
        (HardPruning(proficient=("status",)), "- cancel\n- refund\n\n", "- status"),
        (NoPruning(), "- status", "probability"),
    ],
)
def test_default_prompt_contains_paragraph_of_pruning_strategy(pruning: Pruning, there: str, absent: str) -> None:
    router, model = chain(pruning=pruning)
    router.invoke("refund")
    system = str(model._asked[0][0].content)
    assert there in system
    assert absent not in system


def test_router_custom_prompt_keeps_examples_and_variables() -> None:
    examples = FewShotChatMessagePromptTemplate(
        examples=[{"q": "stop it", "a": "cancel"}],
        example_prompt=ChatPromptTemplate.from_messages([("human", "{q}"), ("ai", "{a}")]),
    )
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "One of {candidates}; the small model: {small_label} ({small_confidence}). Tone: {tone}"),
            examples,
            MessagesPlaceholder("history", optional=True),
            ("human", "{input}"),
        ]
    )
    router, model = chain({"stop it": ["refund"]}, prompt=prompt, pruning=TopHint())
    assert router.invoke({"input": "refund", "tone": "dry"}) == "refund"
    contents = [str(m.content) for m in model._asked[0]]
    assert contents[1:] == ["stop it", "cancel", "refund"]
    assert contents[0].endswith("the small model: refund (0.48). Tone: dry")


def test_router_prompt_without_pruning_variable_raises() -> None:
    with pytest.raises(ConfigurationError, match="candidate_probabilities"):
        chain(prompt=ChatPromptTemplate.from_template("{candidates} {input}"))


def test_router_invalid_answer_is_reasked_until_max_reasks() -> None:
    script = {"a": ["Hard to say.", "Well: status?", "status"], "b": ["refund"], "c": ["nonsense"]}
    router, model = chain(script, max_reasks=2)
    outputs = router.batch(["a", "b", "c"], return_exceptions=True)
    assert outputs[:2] == ["status", "refund"]
    assert isinstance(outputs[2], UnparsableAnswerError)
    assert (outputs[2].raw, outputs[2].attempts) == ("nonsense", 3)
    again = next(messages for messages in model._asked if len(messages) == 6)
    assert [m.type for m in again] == ["system", "human", "ai", "human", "ai", "human"]
    assert again[2].content == "Hard to say."
    with pytest.raises(UnparsableAnswerError, match="tried 3 times"):
        router.invoke("c")


def test_router_zero_max_reasks_makes_one_call() -> None:
    router, model = chain({"c": ["nonsense"]}, max_reasks=0)
    with pytest.raises(UnparsableAnswerError):
        asyncio.run(router.ainvoke("c"))
    assert len(model._asked) == 1


def test_router_unparsable_answer_falls_back_without_retry() -> None:
    router, model = chain({"refund": ["?"]}, on_large_error="small", max_reasks=0, return_decision=True)
    result = router.invoke("refund")
    assert (result.output, result.reason) == ("refund", "large_error")
    assert "UnparsableAnswerError" in result.decision.error
    assert len(model._asked) == 1


def test_router_alias_in_answer_maps_to_label() -> None:
    router, _ = chain({"x": ["money back"]}, aliases={"refund": ["Money back"]})
    assert router.invoke("x") == "refund"


def test_router_unknown_or_missing_labels_raise() -> None:
    with pytest.raises(ConfigurationError, match="unknown before its first call"):
        ConfidenceRouterChain.from_models(RunnableLambda(predict_words), Scripted())
    with pytest.raises(ConfigurationError, match="not in `labels`: status"):
        chain(labels=["cancel", "refund"])
    router, model = chain({"x": ["brand new"]}, labels=[*LABELS, "brand new"])
    assert router.invoke("x") == "brand new"
    assert "- brand new" in str(model._asked[0][0].content)


class Structured(Scripted):
    """Scripted model with structured output, like the models of large providers."""

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> Any:
        assert include_raw
        assert schema["properties"]["label"]["enum"] == list(LABELS)

        def structured(messages: Any) -> dict[str, Any]:
            raw = self.invoke(messages)
            label = str(raw.content)
            parsed = None if label == "broken" else {"label": label}
            return {"raw": raw, "parsed": parsed, "parsing_error": None}

        return RunnableLambda(structured)


def test_router_uses_structured_output_if_model_offers_it() -> None:
    assert offers_structured_output(Structured())
    assert not offers_structured_output(Scripted())
    assert not offers_structured_output(RunnableLambda(str))
    router = ConfidenceRouterChain.from_models(WordModel(), Structured(script={"x": ["status"], "y": ["broken"]}))
    assert router.invoke("x") == "status"
    with pytest.raises(UnparsableAnswerError) as caught:
        router.invoke("y")
    assert caught.value.raw == "broken"
    text = ConfidenceRouterChain.from_models(WordModel(), Structured(), answer_format="text")
    assert text.invoke("x") == "refund"
    with pytest.raises(ConfigurationError, match="no structured output"):
        chain(answer_format="structured")


def test_router_accepts_any_runnable_as_chat_model() -> None:
    router = ConfidenceRouterChain.from_models(WordModel(), RunnableLambda(lambda prompt: "status"))
    assert router.invoke("x") == "status"
    assert ConfidenceRouterChain.from_models(WordModel(), lambda prompt: 7, max_reasks=0).invoke is not None
    with pytest.raises(ConfigurationError, match="Expected a"):
        ConfidenceRouterChain.from_models(WordModel(), 7)  # type: ignore[arg-type]


def test_router_chat_model_error_is_raised() -> None:
    def broken(prompt: Any) -> str:
        raise ValueError("down")

    router = ConfidenceRouterChain.from_models(WordModel(), RunnableLambda(broken))
    with pytest.raises(ValueError, match="down"):
        router.invoke("x")
    with pytest.raises(ValueError, match="down"):
        asyncio.run(router.ainvoke("x"))


async def test_router_reask_creates_two_model_runs_in_one_tree() -> None:
    for way in ("invoke", "ainvoke", "batch", "abatch"):
        book = RunBook()
        router, _ = chain({"x": ["?", "status"]})
        config: Any = {"callbacks": [book]}
        if way == "invoke":
            router.invoke("x", config)
        elif way == "ainvoke":
            await router.ainvoke("x", config)
        elif way == "batch":
            router.batch(["x", "surely refund"], config)
        else:
            await router.abatch(["x", "surely refund"], config)
        book.assert_balanced()
        assert len(book.named("ChatAsker")) == 1
        assert len(book.named("Scripted")) == 2
        assert not book.failed


async def test_router_astream_events_contain_model_tokens() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("status")]))
    router = ConfidenceRouterChain.from_models(WordModel(), model, answer_format="text")
    events = [event async for event in router.astream_events("x", version="v2")]
    tokens = [e["data"]["chunk"].content for e in events if e["event"] == "on_chat_model_stream"]
    assert "".join(tokens) == "status"
    assert events[-1]["data"]["output"] == "status"


def test_router_custom_input_key_accepts_mapping_and_text() -> None:
    model = Scripted(script={"my refund": ["status"]})
    router = ConfidenceRouterChain.from_models(WordModel(input_key="question"), model, input_key="question")
    assert router.invoke({"question": "my refund"}) == router.invoke("my refund") == "status"


def test_asker_prompt_output_of_wrong_type_returns_error() -> None:
    for give in (lambda m: "abc", lambda m: HumanMessage("abc"), lambda m: [HumanMessage("abc")]):
        model = Scripted()
        asker = ChatAsker.from_labels(LABELS, model, RunnableLambda(give))
        assert asker.invoke({}) == "refund"
        assert model._asked == [[HumanMessage("abc")]]
    picky = RunnableLambda(lambda m: None if m["bad"] else "abc")
    asker = ChatAsker.from_labels(LABELS, Scripted(), picky)
    outcomes = asker.batch([{"bad": False}, {"bad": True}], return_exceptions=True)
    assert outcomes[0] == "refund"
    assert "from `prompt`, got NoneType" in str(outcomes[1])


def test_asker_reports_schemas_graph_and_rejects_empty_labels() -> None:
    asker = ChatAsker.from_labels(LABELS, Scripted(), default_prompt(None))
    assert asker.OutputType is str
    assert "object" in str(asker.get_input_jsonschema())
    assert [node.name for node in asker.get_graph().nodes.values()][1:3] == ["ChatPromptTemplate", "Scripted"]
    assert asker.config_specs == []
    assert asker.batch([]) == asyncio.run(asker.abatch([])) == []
    with pytest.raises(Exception, match="input"):
        asker.invoke({})
    with pytest.raises(ConfigurationError, match="labels"):
        ChatAsker.from_labels((), Scripted(), default_prompt(None))


OURS = [
    AlwaysLarge, ConfidenceRouterChain, Entropy, HardPruning, ChatAsker, LabelParser, Margin, NoPruning, Retry,
    ShuntRunnable, SoftPruning, Threshold, TopHint, WordModel,
]  # fmt: skip


def test_langchain_serialisation_round_trips_policies_and_prunings() -> None:
    policy = Threshold(0.8, score=Margin()) & (Threshold(0.9) | AlwaysLarge())
    for value in (policy, SoftPruning(top_k=3), HardPruning(proficient=("a",)), Retry(attempts=5)):
        again = loads(
            dumps(value),
            allowed_objects=[*OURS, AllOf, AnyOf, MaxProbability],
            valid_namespaces=["langchain_datashunt", "tests"],
        )
        assert again == value


@pytest.mark.heavy
def test_langchain_serialisation_round_trips_shunt_with_bundle(tmp_path: Any, shop_messages: Any) -> None:
    from langchain_datashunt.small_models import BundledSmallModel, TextCNN, TrainingSettings

    texts, labels = shop_messages
    small = TextCNN.train(texts, labels, settings=TrainingSettings(epochs=1, progress=False))
    small.save(tmp_path / "bundle")
    router = ConfidenceRouterChain.from_models(
        small,
        FakeListChatModel(responses=["promo_code"]),
        prompt=ChatPromptTemplate.from_template("{candidates} {small_label} {input}"),
        pruning=TopHint(),
        policy=Threshold(0.999),
    )
    dumped = dumpd(router)
    assert dumped["type"] == "constructor"
    assert dumped["kwargs"]["small"]["kwargs"]["path"] == str(tmp_path / "bundle")
    shunt = ShuntRunnable(small=small, large=default_prompt(TopHint()), pruning=TopHint(), policy=Threshold(0.999))
    again = load(
        dumpd(shunt),
        allowed_objects=[*OURS, BundledSmallModel, MaxProbability, ChatPromptTemplate, *_prompt_parts()],
        valid_namespaces=["langchain_datashunt"],
    )
    assert isinstance(again.small, BundledSmallModel)
    assert again.policy == Threshold(0.999)
    assert again.small.invoke(texts[0]).label == small.invoke(texts[0]).label
    unpruned = ShuntRunnable(small=small, large=default_prompt(None), pruning=None, policy=Threshold(0.999))
    small.threshold, small.temperature = 0.3, 9.0
    back = load(
        dumpd(unpruned),
        allowed_objects=[*OURS, BundledSmallModel, MaxProbability, ChatPromptTemplate, *_prompt_parts()],
        valid_namespaces=["langchain_datashunt"],
    )
    assert back.pruning is None
    assert (back.small.threshold, back.small.temperature) == (0.3, 9.0)
    small.temperature = again.small.temperature
    assert pickle.loads(pickle.dumps(again)).small.invoke(texts[0]).label == small.invoke(texts[0]).label


def _prompt_parts() -> list[type]:
    from langchain_core.prompts import HumanMessagePromptTemplate, PromptTemplate, SystemMessagePromptTemplate

    return [HumanMessagePromptTemplate, PromptTemplate, SystemMessagePromptTemplate, MessagesPlaceholder]


def test_langchain_serialisation_marks_unsaved_parts_not_implemented() -> None:
    dumped = dumpd(ShuntRunnable(small=predict_words, large=CountingLarge()))
    assert dumped["kwargs"]["small"]["type"] == "not_implemented"
    assert dumpd(WordModel())["type"] == "not_implemented"
    assert Prediction.from_probabilities({"a": 1.0}) is not None
