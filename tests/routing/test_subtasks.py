from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from pydantic import Field

from langchain_datashunt import AlwaysSmall, Retry, ShuntRunnable, SubtaskShunt, Threshold
from langchain_datashunt.call_log import CallFilter, CallLog, Recorder
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.exceptions import ConfigurationError, UnparsableAnswerError
from langchain_datashunt.policies import MeanTokenProbability
from langchain_datashunt.routing import Subtask, SubtaskResult
from langchain_datashunt.routing.subtask_questions import (
    KnownAnswers,
    OpenQuestion,
    OpenQuestions,
    answer_schema,
    read_answers,
)
from tests.support.handlers import RunBook
from tests.support.modalities import ScriptedSmall
from tests.support.models import LABELS, WordModel, failing_word_model

NO_RETRY = Retry(attempts=1)


class Scripted(BaseChatModel):
    """Chat model that returns scripted answers in order, and records its prompts."""

    answers: list[Any]
    asked: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.asked.append("\n".join(str(message.text) for message in messages))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        text = answer if isinstance(answer, str) else json.dumps(answer)
        message = AIMessage(text, usage_metadata=usage, response_metadata={"model_name": "gpt-4"})  # type: ignore[arg-type]
        return ChatResult(generations=[ChatGeneration(message=message)])


def triage(*answers: Any, **settings: Any) -> tuple[SubtaskShunt, Scripted]:
    model = Scripted(answers=list(answers))
    parts = [
        Subtask(name="intent", question="What is wanted?", small=WordModel()),
        Subtask(
            name="tone", question="How does it sound?", small=WordModel(labels=("kind", "cross"), model_id="tones")
        ),
        Subtask(name="reply", question="What do we answer?"),
    ]
    return SubtaskShunt.from_chat_model(parts, model, retry=NO_RETRY, **settings), model


SURE, UNSURE, HALF = "surely refund and surely kind", "refund and kind", "surely refund"


def test_subtasks_prompt_contains_known_answers_and_open_questions() -> None:
    shunt, model = triage({"reply": "Here it is."}, {"tone": "cross", "reply": "Sorry."})
    assert shunt.invoke(SURE) == {"intent": "refund", "tone": "kind", "reply": "Here it is."}
    assert "- intent: refund\n- tone: kind" in model.asked[0]
    assert "- reply: What do we answer?" in model.asked[0]
    assert SURE in model.asked[0]
    assert shunt.invoke(HALF) == {"intent": "refund", "tone": "cross", "reply": "Sorry."}
    assert (
        "- tone: How does it sound? One of: kind, cross. (A small model thinks: kind with probability 0.5"
        in model.asked[1]
    )


async def test_subtasks_every_call_method_returns_same_answers() -> None:
    replies = [{"reply": "A"}, {"intent": "refund", "tone": "kind", "reply": "B"}]
    expected = [
        {"intent": "refund", "tone": "kind", "reply": "A"},
        {"intent": "refund", "tone": "kind", "reply": "B"},
    ]
    shunt, _ = triage(*replies, max_concurrency=1)
    assert shunt.batch([SURE, UNSURE]) == expected
    shunt, _ = triage(*replies, max_concurrency=1)
    assert await shunt.abatch([SURE, UNSURE]) == expected
    shunt, _ = triage(*replies)
    assert [await shunt.ainvoke(one) for one in (SURE, UNSURE)] == expected
    shunt, _ = triage(*replies)
    chunks = list(shunt.stream(SURE))
    assert chunks == [{"intent": "refund", "tone": "kind"}, {"reply": "A"}]
    assert list(shunt.stream(UNSURE)) == [expected[1]]
    shunt, _ = triage(*replies)
    chunks = [chunk async for chunk in shunt.astream(SURE)]
    assert chunks[0] + chunks[1] == expected[0]
    assert shunt.batch([]) == []
    assert await shunt.abatch([]) == []


def test_subtasks_without_open_question_make_no_large_call() -> None:
    model = Scripted(answers=[])
    shunt = SubtaskShunt.from_chat_model([Subtask(name="intent", small=WordModel())], model, return_decision=True)
    result = shunt.invoke("surely refund")
    assert isinstance(result, SubtaskResult)
    assert (result.outputs, result.cost_usd, result.usage) == ({"intent": "refund"}, 0.0, {})
    assert result.decisions["intent"].route == "small"
    assert list(shunt.stream("surely refund"))[0].outputs == {"intent": "refund"}
    plain = SubtaskShunt.from_chat_model([Subtask(name="intent", small=WordModel())], model)
    assert list(plain.stream("surely refund")) == [{"intent": "refund"}]


def test_subtasks_policies_decide_independently() -> None:
    model = Scripted(answers=[{"intent": "cancel"}])
    parts = [
        Subtask(name="intent", small=WordModel(), policy=Threshold(0.999)),
        Subtask(name="again", small=WordModel(), policy=AlwaysSmall()),
    ]
    result = SubtaskShunt.from_chat_model(parts, model, return_decision=True).invoke("surely refund")
    assert result.outputs == {"intent": "cancel", "again": "refund"}
    intent, again = result.decisions["intent"], result.decisions["again"]
    assert (intent.route, intent.reason, intent.threshold) == ("large", "deferred", 0.999)
    assert (again.route, again.reason) == ("small", "confident")
    assert result.usage["gpt-4"]["total_tokens"] == 15
    assert result.cost_usd is not None
    assert result.cost_usd > 0
    assert result.record_id


def test_subtasks_incomplete_answer_is_reasked() -> None:
    shunt, model = triage(
        {"tone": "angry", "reply": "R"}, "```json\n" + json.dumps({"tone": "cross", "reply": "S"}) + "\n```"
    )
    assert shunt.invoke(HALF) == {"intent": "refund", "tone": "cross", "reply": "R"}
    assert "tone: it must be one of kind, cross" in model.asked[1]
    shunt, model = triage("what?", "what?")
    with pytest.raises(UnparsableAnswerError, match="tried 2 times"):
        shunt.invoke(HALF)
    shunt, _ = triage("Just this.")  # a single open question may be answered in plain text
    assert shunt.invoke(SURE)["reply"] == "Just this."


def test_read_answers_rejects_invalid_values_and_broken_json() -> None:
    questions = OpenQuestions(
        [OpenQuestion(Subtask(name="tone", labels=("kind", "cross"))), OpenQuestion(Subtask(name="n"))]
    )
    found, wrong = read_answers('{"tone": "it is kind, not cross", "n": true}', questions)
    assert found == {}
    assert wrong == {"tone": "it must be one of kind, cross", "n": "it is no text"}
    assert read_answers('{"tone": "kind", "n": 3}', questions)[0] == {"tone": "kind", "n": "3"}
    one = OpenQuestions([questions[1]])
    assert read_answers('{"n": "line1\nline2"}', one)[0] == {"n": "line1\nline2"}
    assert read_answers("Just so.", one)[0] == {"n": "Just so."}
    for broken in ('{"n": "Dear cust', 'Here you go: {"n": "x"}', "[]", "null", '```json\n{"n"'):
        assert read_answers(broken, one)[0] == {}
        assert "n" in read_answers(broken, one)[1]
    assert read_answers('{"tone": "KIND", "n": " x ", "more": 1}', questions) == ({"tone": "kind", "n": "x"}, {})
    assert set(read_answers("[1]", questions)[1]) == {"tone", "n"}
    schema = answer_schema(questions)
    assert schema["required"] == ["tone", "n"]
    assert schema["properties"]["tone"]["enum"] == ["kind", "cross"]
    assert f"{KnownAnswers()}" == "(nothing)"
    assert str(questions[1]) == "- n: n"


def test_subtasks_small_error_defers_question() -> None:
    model = Scripted(answers=[{"intent": "status", "words": "w"}])
    parts = [
        Subtask(name="intent", small=failing_word_model(RuntimeError("broken"))),
        Subtask(name="words", small=ScriptedSmall()),
    ]
    result = SubtaskShunt.from_chat_model(parts, model, return_decision=True).invoke("fail")
    assert result.outputs == {"intent": "status", "words": "w"}
    assert [one.reason for one in result.decisions.values()] == ["small_error", "small_error"]
    assert "broken" in str(result.decisions["intent"].error)


def test_subtasks_large_error_raises_or_falls_back() -> None:
    shunt, _ = triage(RuntimeError("down"))
    with pytest.raises(RuntimeError, match="down"):
        shunt.invoke(HALF)
    shunt, _ = triage(RuntimeError("down"), {"reply": "fine"}, max_concurrency=1)
    found = shunt.batch([HALF, SURE], return_exceptions=True)
    assert isinstance(found[0], RuntimeError)
    assert found[1]["reply"] == "fine"
    shunt, _ = triage(RuntimeError("down"), on_large_error="small", return_decision=True)
    result = shunt.invoke(HALF)
    assert result.outputs == {"intent": "refund", "tone": "kind", "reply": None}
    reasons = {name: (one.route, one.reason) for name, one in result.decisions.items()}
    assert reasons == {
        "intent": ("small", "confident"), "tone": ("small", "large_error"), "reply": ("large", "large_error"),
    }  # fmt: skip
    assert "down" in str(result.decisions["reply"].error)


def test_subtasks_large_runnable_must_return_complete_mapping() -> None:
    parts = [Subtask(name="intent", small=WordModel()), Subtask(name="reply")]

    def answer(mapping: Any) -> Any:
        assert mapping["input"] == "x"
        return {question.subtask.name: mapping["given"] for question in mapping["open"]}

    shunt = SubtaskShunt(subtasks=tuple(parts), large=RunnableLambda(answer))
    assert shunt.invoke({"input": "x", "given": "refund"}) == {"intent": "refund", "reply": "refund"}
    with pytest.raises(UnparsableAnswerError):
        shunt.invoke({"input": "x", "given": "no label"})
    with pytest.raises(ConfigurationError, match="Expected a mapping with intent, reply from `large`, got str"):
        SubtaskShunt(subtasks=tuple(parts), large=RunnableLambda(lambda _: "text")).invoke("x")
    with pytest.raises(UnparsableAnswerError):
        SubtaskShunt(subtasks=tuple(parts), large=RunnableLambda(lambda _: {"intent": "refund"})).invoke("x")


def test_subtasks_custom_prompt_is_formatted() -> None:
    model = Scripted(answers=[{"reply": "R"}])
    prompt = ChatPromptTemplate.from_messages([("human", "KNOWN {known} OPEN {open} TEXT {input}")])
    parts = [Subtask(name="intent", small=WordModel()), Subtask(name="reply")]
    SubtaskShunt.from_chat_model(parts, model, prompt=prompt).invoke("surely refund")
    assert model.asked == ["KNOWN - intent: refund OPEN - reply: reply TEXT surely refund"]


def test_subtasks_invalid_names_or_models_raise() -> None:
    with pytest.raises(ConfigurationError, match="got 'two words'"):
        Subtask(name="two words")
    with pytest.raises(ConfigurationError, match="Expected unique names for `subtasks`, got a, a"):
        SubtaskShunt(subtasks=(Subtask(name="a"), Subtask(name="a")), large=str)
    with pytest.raises(ConfigurationError, match="subtasks"):
        SubtaskShunt(subtasks=(), large=str)
    with pytest.raises(ConfigurationError, match="Expected a"):
        Subtask(name="a", small=3)  # type: ignore[arg-type]


@pytest.mark.heavy
def test_subtasks_are_logged_as_own_tasks_and_can_be_distilled(tmp_path: Path) -> None:
    texts = [f"refund case {i}" for i in range(30)] + [f"surely status {i}" for i in range(10)]
    answers = [{"intent": "cancel", "tone": "kind", "reply": f"R{i}"} for i in range(30)]
    answers += [{"tone": "kind", "reply": "S"} for _ in range(10)]
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        with Recorder(store, task="triage", sample_small=1.0) as recorder:
            shunt, _ = triage(*answers, recorder=recorder, max_concurrency=1)
            shunt.batch(texts, {"configurable": {"shunt_subject": "jane"}})
        by_task = {
            name: [call for part in store.iterate(CallFilter(task=f"triage/{name}")) for call in part]
            for name in ("intent", "tone", "reply")
        }
        assert {name: len(found) for name, found in by_task.items()} == {"intent": 40, "tone": 40, "reply": 40}
        assert {call.route for call in by_task["intent"]} == {"small", "large"}
        asked = [call for call in by_task["intent"] if call.route == "large"]
        assert {call.answer_label for call in asked} == {"cancel"}
        assert {call.answer for call in asked} == {"cancel"}
        assert {call.labels for call in asked} == {LABELS}
        assert all(call.large_model == "gpt-4" and call.input_tokens == 10 for call in asked)
        assert all(
            call.input_tokens is None for call in by_task["reply"][:30]
        )  # counted once, in the record of the first question
        total = sum(call.input_tokens or 0 for found in by_task.values() for call in found)
        assert total == 10 * len(texts)
        assert {call.answer for call in by_task["reply"]} >= {"R0", "R29", "S"}
        assert store.delete(subject="jane") == 120

    class Learner(WordModel):
        def fit_soft_targets(self, stages: Any, held_out: Any, settings: Any, loss: Any) -> Any:
            self.lineage["stages"] = [len(stage) for stage in stages]
            return self.model_copy()

    learner = Learner()
    report = TwoStageDistiller(DistillationSettings(threshold=0.9)).distill(learner, by_task["intent"]).report
    assert (report.stage_a, report.stage_b) == (30, 10)


def test_subtask_labels_that_differ_from_small_model_raise() -> None:
    with pytest.raises(ConfigurationError, match="can answer cancel, refund, status, but"):
        Subtask(name="intent", small=WordModel(), labels=("yes", "no"))
    with pytest.raises(ConfigurationError, match="writes free text"):
        Subtask(name="intent", small=ScriptedSmall(), labels=("yes", "no"))


def test_subtasks_copies_and_pickles_keep_or_change_settings() -> None:
    part = Subtask(name="reply")
    first, second = (FakeListChatModel(responses=[text]) for text in ("A", "B"))
    for shunt in (
        SubtaskShunt.from_chat_model([part], first), SubtaskShunt.from_chat_model([part], first, max_concurrency=2),
    ):  # fmt: skip
        assert shunt.invoke("x") == {"reply": "A"}
        other = SubtaskShunt.from_chat_model([part], second).large
        assert shunt.model_copy(update={"large": other}).invoke("x") == {"reply": "B"}
        for copied in (copy.deepcopy(shunt), pickle.loads(pickle.dumps(shunt))):
            assert copied.invoke("x") == {"reply": "A"}
            assert copied.max_concurrency == shunt.max_concurrency
        with pytest.raises(ConfigurationError, match="frozen"):
            shunt.large = other
    asker = SubtaskShunt.from_chat_model([part], first).large
    asked = {"input": "x", "known": KnownAnswers(), "open": OpenQuestions([OpenQuestion(part)])}
    assert asker.invoke(asked) == {"reply": "A"}
    assert asker.model_copy(update={"chat_model": second}).invoke(asked) == {"reply": "B"}


def test_subtasks_score_without_token_logprobs_defers(tmp_path: Path) -> None:
    policy = Threshold(0.9, score=MeanTokenProbability())
    shunt = SubtaskShunt(
        subtasks=(Subtask(name="reply", small=ScriptedSmall(), policy=policy),),
        large=RunnableLambda(lambda mapping: {"reply": "large"}), return_decision=True,
    )  # fmt: skip
    found = shunt.batch(["surely a", "b"], return_exceptions=True)
    assert [one.outputs for one in found] == [{"reply": "large"}] * 2
    assert {one.decisions["reply"].reason for one in found} == {"small_error"}
    plain = ShuntRunnable(small=ScriptedSmall(), large=lambda _: "large", pruning=None, policy=policy)
    assert plain.invoke("surely a") == "large"
    assert plain.batch(["surely a", "b"]) == ["large", "large"]


@pytest.mark.heavy
def test_subtasks_records_have_own_ids_and_inputs(tmp_path: Path) -> None:
    parts = (
        Subtask(name="subject", small=WordModel(), policy=Threshold(0.9)),
        Subtask(name="body", small=WordModel(input_key="body"), policy=Threshold(0.9)),
    )
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        with Recorder(store, task="t", sample_small=1.0) as recorder:
            shunt = SubtaskShunt(
                subtasks=parts, large=RunnableLambda(lambda _: {}), recorder=recorder, return_decision=True
            )
            value = {"input": "surely refund SUBJECT", "body": "surely status BODY"}
            result = shunt.invoke(value, {"run_id": "my-run"})  # type: ignore[typeddict-item]
        store.label(result.record_ids["body"], "status")
        calls = {call.task: call for part in store.iterate() for call in part}
    assert (calls["t/subject"].input, calls["t/subject"].small_label) == ("surely refund SUBJECT", "refund")
    assert (calls["t/body"].input, calls["t/body"].small_label) == ("surely status BODY", "status")
    assert calls["t/body"].gold == "status"


def test_subtasks_graph_schemas_and_config_specs() -> None:
    shunt, _ = triage()
    drawn = shunt.get_graph()
    names = {node.name for node in drawn.nodes.values()}
    assert {"small: intent", "small: tone", "large"} <= names
    assert shunt.get_input_jsonschema()
    assert shunt.get_output_jsonschema()
    large = FakeListChatModel(responses=["a"]).configurable_fields(responses=ConfigurableField(id="said"))
    free = SubtaskShunt.from_chat_model([Subtask(name="reply")], large)
    assert [spec.id for spec in free.config_specs] == ["said"]


async def test_subtasks_runs_end_and_emit_all_decisions() -> None:
    for asynchronous in (False, True):
        shunt, _ = triage({"reply": "A"}, RuntimeError("down"), max_concurrency=1)
        book = RunBook()
        config: Any = {"callbacks": [book]}
        if asynchronous:
            await shunt.abatch([SURE, HALF], config, return_exceptions=True)
        else:
            shunt.batch([SURE, HALF], config, return_exceptions=True)
        book.assert_balanced()
        told = [data for name, data, _ in book.events if name == "shunt_decision"]
        assert [one["shunt_subtask"] for one in told] == ["intent", "intent", "tone", "tone", "reply", "reply"]
        assert [one["shunt_route"] for one in told] == ["small", "small", "small", "large", "large", "large"]
