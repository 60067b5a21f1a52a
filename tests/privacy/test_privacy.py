from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda
from pydantic import BaseModel

from langchain_datashunt import (
    AlwaysLarge,
    NoPruning,
    Prediction,
    ShuntChatModel,
    ShuntRunnable,
    SoftPruning,
    SubtaskShunt,
    Threshold,
    TopHint,
)
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.exceptions import ConfigurationError, LocalOnlyError, ShuntError
from langchain_datashunt.privacy import (
    DETECTORS,
    AbstainedLocally,
    DisclosureBudget,
    Entity,
    PatternDetector,
    Placeholders,
    PresidioDetector,
    PrivacyGuard,
    StreamRestorer,
    find_entities,
)
from langchain_datashunt.routing import Subtask
from tests.support.event_loop import longest_hold
from tests.support.handlers import RunBook
from tests.support.modalities import ScriptedSmall
from tests.support.models import WordModel, failing_word_model


def kinds(text: str) -> dict[str, str]:
    """Return the kind of each entity by its text."""
    return {text[one.start : one.end]: one.kind for one in find_entities(text, DETECTORS)}


FOUND = [
    ("mail jane.doe+x@mail.example.co.uk now", "jane.doe+x@mail.example.co.uk", "EMAIL"),
    ("<jane@example.com>", "jane@example.com", "EMAIL"),
    ("jané@exämple.de", "jané@exämple.de", None),
    ("call +49 (0)89 1234-5678.", "+49 (0)89 1234-5678", "PHONE"),
    ("call +14155552671", "+14155552671", "PHONE"),
    ("call (415) 555-2671", "(415) 555-2671", "PHONE"),
    ("call 415-555-2671", "415-555-2671", "PHONE"),
    ("tel 089 12345678", "089 12345678", "PHONE"),
    ("card 4111 1111 1111 1111.", "4111 1111 1111 1111", "CARD"),
    ("card 5500-0000-0000-0004", "5500-0000-0000-0004", "CARD"),
    ("card 378282246310005", "378282246310005", "CARD"),
    ("iban DE89 3704 0044 0532 0130 00.", "DE89 3704 0044 0532 0130 00", "IBAN"),
    ("iban gb82west12345698765432", "gb82west12345698765432", "IBAN"),
    ("from 192.168.0.17 today", "192.168.0.17", "IP"),
    ("from 2001:db8::8a2e:370:7334 today", "2001:db8::8a2e:370:7334", "IP"),
    ("see https://x.org/a?id=3&token=abc123&z=1", "abc123", "URL_SECRET"),
    ("see postgresql://me:hunter2@db/x", "me:hunter2", "URL_SECRET"),
    ("key sk-proj-abcdefghijklmnop1234", "sk-proj-abcdefghijklmnop1234", "API_KEY"),
    ("AKIAIOSFODNN7EXAMPLE is it", "AKIAIOSFODNN7EXAMPLE", "API_KEY"),
    ("ghp_" + "a1" * 18, "ghp_" + "a1" * 18, "API_KEY"),
    ("jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijk", None, "API_KEY"),
    ("api_key = 'f3A9k2L8m1Q7z5X4'", "f3A9k2L8m1Q7z5X4", "API_KEY"),
    ("password: hunter2!", "hunter2!", "PASSWORD"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", None, "PRIVATE_KEY"),
    ("ssn 123-45-6789", "123-45-6789", "NATIONAL_ID"),
    ("nino AB 12 34 56 C", "AB 12 34 56 C", "NATIONAL_ID"),
    ("dni 12345678Z", "12345678Z", "NATIONAL_ID"),
    ("nir 1 85 05 78 006 084 91", None, "NATIONAL_ID"),
    ("steuer 86 095 742 719", "86 095 742 719", "NATIONAL_ID"),
    ("bsn 111222333", "111222333", "NATIONAL_ID"),
    ("cpf 529.982.247-25", "529.982.247-25", "NATIONAL_ID"),
    ("cf RSSMRA85T10A562S", "RSSMRA85T10A562S", "NATIONAL_ID"),
    ("aadhaar 2341 2341 2346", "2341 2341 2346", "NATIONAL_ID"),
]  # fmt: skip


SPELLINGS = [
    ("mail jane\u200b@example.com", "EMAIL"),
    ("mail jane\u2060@exam\u00adple.com", "EMAIL"),
    ("mail jane%40example.com", "EMAIL"),
    ("mailto:jane%2Edoe%40example%2Ecom", "EMAIL"),
    ("mail jane&#64;example.com", "EMAIL"),
    ("mail jane&commat;example.com", "EMAIL"),
    ('{"mail": "jane\\u0040example.com"}', "EMAIL"),
    ("mail jane (at) example [dot] com", "EMAIL"),
    ("mail jane[at]example.com", "EMAIL"),
    ("mail ｊａｎｅ＠ｅｘａｍｐｌｅ．ｃｏｍ", "EMAIL"),
    ("iban DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000", "IBAN"),
    ("iban DE89\u202f3704\u202f0044\u202f0532\u202f0130\u202f00", "IBAN"),
    ("iban DE89‑3704‑0044‑0532‑0130‑00", "IBAN"),
    ("card 4111\u00a01111\u00a01111\u00a01111", "CARD"),
    ("card 4111–1111–1111–1111", "CARD"),
    ("card ４１１１１１１１１１１１１１１１", "CARD"),
    ("card 4111\u200b1111\u200b1111\u200b1111", "CARD"),
    ("card ٤١١١١١١١١١١١١١١١", "CARD"),
    ("call +49\u00a089\u00a012345678", "PHONE"),
    ("call 415‑555‑2671", "PHONE"),
    ("ssn 123‑45‑6789", "NATIONAL_ID"),
    ("ssn 123\u201145\u20116789", "NATIONAL_ID"),
    ("from 192.168.0.17:8080 today", "IP"),
    ("from 192.168.0.17:8080/path", "IP"),
    ('{"password": "hunter2!"}', "PASSWORD"),
    ("'password' = 'hunter2!'", "PASSWORD"),
    ("passwd: hunter2!", "PASSWORD"),
    ("Kennwort: hunter2!", "PASSWORD"),
    ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nabc\n-----END PGP PRIVATE KEY BLOCK-----", "PRIVATE_KEY"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "PRIVATE_KEY"),
]


@pytest.mark.parametrize(("text", "kind"), SPELLINGS)
def test_detectors_everyday_spelling_is_found_and_replaced(text: str, kind: str) -> None:
    assert kind in {entity.kind for entity in find_entities(text, DETECTORS)}
    out, placeholders = PrivacyGuard().outbound(f"before {text} after")
    assert f"<{kind}_1>" in out
    assert out.startswith("before ")
    assert out.endswith(" after") or kind in ("PRIVATE_KEY",)
    assert placeholders.restore(out) == f"before {text} after"


@pytest.mark.parametrize(("text", "entity", "kind"), [one for one in FOUND if one[2] is not None])
def test_detectors_valid_entity_is_found(text: str, entity: str | None, kind: str) -> None:
    found = kinds(text)
    if entity is None:
        assert kind in found.values()
    else:
        assert found.get(entity) == kind, found


NOT_FOUND = [
    "no at sign @ here", "version 1.2.3.4.5", "card 4111 1111 1111 1112", "iban XX89 3704 5544 5532",
    "999.1.1.1", "the year 2024", "order 12345", "0.1234567890123456", "a 12:30:45 time", "it costs 1,234,567.89",
    "ssn 666-12-3456", "ssn 123-00-4567", "dni 12345678A", "cpf 529.982.247-26", "cpf 111.111.111-11", "bsn 111222334",
    "aadhaar 2341 2341 2347", "nino BG 12 34 56 C", "0000 0000 0000 0000", "password reset please", "std::vector of a",
    "cf RSSMRA85T10A562T", "my token is here", "the key=value store", "x = 2026-11-21T10:00:00",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_FOUND)
def test_detectors_invalid_entity_is_not_found(text: str) -> None:
    assert kinds(text) == {}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    "text",
    ["a." * 50_000, "a@" * 50_000, "1 " * 50_000, "1" * 100_000, "+1 " * 33_000, "::" * 50_000, "AB12 " * 20_000,
     "-----BEGIN PRIVATE KEY-----" * 4_000, "https://" + "a:" * 50_000, "key=" * 25_000, "password is " * 8_000,
     "eyJa." * 20_000, "0" + "-1" * 50_000, "x@a." + "a-" * 50_000],
)  # fmt: skip
def test_detector_adversarial_text_stays_fast(detector: PatternDetector, text: str) -> None:
    started = time.perf_counter()
    list(detector.find(text))
    assert time.perf_counter() - started < 3.0


def test_find_entities_overlap_merges_to_kind_of_longest() -> None:
    class Words:
        kinds = ("A", "B")

        def find(self, text: str) -> list[Entity]:
            return [Entity("A", 0, 3), Entity("B", 1, 7), Entity("A", 7, 9), Entity("B", 8, 8)]

    assert find_entities("x" * 10, [Words()]) == [Entity("B", 0, 7), Entity("A", 7, 9)]


class Analyzer:
    """Minimal stand-in for Presidio's AnalyzerEngine."""

    def get_supported_entities(self, language: str) -> list[str]:
        return ["PERSON"]

    def analyze(self, text: str, language: str, entities: Any, score_threshold: float) -> list[Any]:
        start = text.find("Jane Doe")
        kind = type("Result", (), {"entity_type": "PERSON", "start": start, "end": start + 8})
        return [kind()] if start >= 0 else []


def test_presidio_detector_entities_are_redacted() -> None:
    guard = PrivacyGuard(detectors=(*DETECTORS, PresidioDetector(Analyzer())), local_kinds={"IBAN"})
    out, placeholders = guard.outbound({"input": "Jane Doe, jane@example.com"})
    assert out == {"input": "<PERSON_1>, <EMAIL_1>"}
    assert placeholders.counts == {"PERSON": 1, "EMAIL": 1}
    with pytest.raises(ConfigurationError, match="analyze"):
        PresidioDetector(3)


# Redaction and restoring

MAIL, OTHER = "jane@example.com", "joe@example.com"


def test_guard_redacts_every_structure_without_changing_it_in_place() -> None:
    class Form(BaseModel):
        who: str
        n: int = 3

    talk = [
        SystemMessage(f"You help {MAIL}."),
        HumanMessage([{"type": "text", "text": f"I am {MAIL}"}], name=None),
        AIMessage("", tool_calls=[{"name": "find", "args": {"mail": OTHER}, "id": "1"}]),
        ToolMessage(f"{OTHER} found", tool_call_id="1"),
    ]
    value = {
        "input": f"{MAIL} and {OTHER}", "history": talk,
        "documents": [Document(f"by {OTHER}", metadata={"from": MAIL})],
        "form": Form(who=MAIL), "numbers": (1, 2.5, None, True), f"key {MAIL}": {MAIL}, "card": 4111111111111111,
    }  # fmt: skip
    before = repr(value)
    out, placeholders = PrivacyGuard().outbound(value)
    assert repr(value) == before
    assert MAIL not in repr(out)
    assert OTHER not in repr(out)
    assert "4111" not in repr(out)
    assert out["input"] == "<EMAIL_1> and <EMAIL_2>"
    assert out["history"][1].content[0]["text"] == "I am <EMAIL_1>"
    assert out["history"][2].tool_calls[0]["args"] == {"mail": "<EMAIL_2>"}
    assert out["numbers"] == (1, 2.5, None, True)
    back = placeholders.restore(out)
    assert back["input"] == value["input"]
    assert back["history"][2].tool_calls[0]["args"] == {"mail": OTHER}
    assert back["form"].who == MAIL
    assert back["documents"][0].metadata == {"from": MAIL}
    assert placeholders.counts == {"EMAIL": 2, "CARD": 1}


def test_guard_placeholder_in_input_is_not_restored() -> None:
    out, placeholders = PrivacyGuard().outbound({"input": f"<EMAIL_1> <email_7> {MAIL}"})
    assert out["input"] == "<EMAIL_1> <email_7> <EMAIL_2>"
    assert placeholders.restore("<EMAIL_1> <EMAIL_2> <Email_2> <EMAIL_9>") == f"<EMAIL_1> {MAIL} {MAIL} <EMAIL_9>"


def test_guard_redact_replaces_only_chosen_kinds() -> None:
    text = f"{MAIL} from 192.168.0.17"
    assert PrivacyGuard(redact={"IP"}).outbound(text)[0] == f"{MAIL} from <IP_1>"
    assert PrivacyGuard(redact="none").outbound(text)[0] == text
    with pytest.raises(ConfigurationError, match="No detector finds NAME"):
        PrivacyGuard(redact={"NAME"})
    with pytest.raises(ConfigurationError, match="Expected a detector"):
        PrivacyGuard(detectors=(3,))


def test_guard_local_data_raises_without_quoting_it() -> None:
    guard = PrivacyGuard(local_kinds={"IBAN"}, local_where=lambda text: "secret project" in text)
    for value in ("DE89 3704 0044 0532 0130 00", {"history": [HumanMessage("about the secret project")]}):
        with pytest.raises(LocalOnlyError) as caught:
            guard.outbound(value)
        assert "0532" not in str(caught.value)
    assert guard.outbound("hello")[0] == "hello"


def test_guard_binary_data_or_failing_detector_keeps_input_local() -> None:
    image = {"type": "image", "base64": "aaaa", "mime_type": "image/png"}
    for value in (b"bytes", {"input": [HumanMessage([image])]}, {"x": object()}):
        with pytest.raises(LocalOnlyError, match="detectors cannot check"):
            PrivacyGuard().outbound(value)
        PrivacyGuard(allow_binary=True).outbound(value)

    class Broken:
        kinds = ("X",)

        def find(self, text: str) -> list[Entity]:
            raise RuntimeError(f"cannot read {text}")

    for guard in (PrivacyGuard(detectors=(Broken(),)), PrivacyGuard(local_where=lambda text: 1 / 0 > 1)):
        with pytest.raises(LocalOnlyError, match="a detector or rule failed") as caught:
            guard.outbound("the text")
        assert "the text" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([MAIL, OTHER, "<", ">", "<EMAIL_1>", "<EMA", " ", "a<b", "4111 1111 1111 1111", "\n"]),
        max_size=12,
    ),
    st.integers(1, 6),
)
def test_stream_restorer_any_chunk_size_restores_text(parts: list[str], size: int) -> None:
    text = " ".join(parts)
    out, placeholders = PrivacyGuard().outbound(text)
    assert MAIL not in out
    restorer = StreamRestorer(placeholders)
    shown = [restorer.feed(out[i : i + size]) for i in range(0, len(out), size)]
    assert "".join([*shown, *restorer.rest()]) == text
    restorer = StreamRestorer(placeholders)
    chunks = [restorer.feed(AIMessageChunk(out[i : i + size])) for i in range(0, len(out), size)]
    whole = "".join(str(chunk.content) for chunk in [*chunks, *restorer.rest()])
    assert whole == text


def test_stream_restorer_restores_tool_arguments_across_chunks() -> None:
    _, placeholders = PrivacyGuard().outbound(MAIL)
    restorer = StreamRestorer(placeholders)
    pieces = ['{"to": "<EM', "AIL_", '1>", "n": "<"', "}"]
    total: Any = None
    for i, piece in enumerate(pieces):
        call = {"name": "send" if i == 0 else None, "args": piece, "id": "1" if i == 0 else None, "index": 0}
        chunk = restorer.feed(AIMessageChunk("", tool_call_chunks=[{**call, "type": "tool_call_chunk"}]))
        total = chunk if total is None else total + chunk
    for chunk in restorer.rest():
        total = total + chunk
    assert total.tool_calls[0]["args"] == {"to": MAIL, "n": "<"}


# Guards in shunts


class Listening(Runnable[Any, Any]):
    """Large model that records its inputs and repeats them."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        self.asked.append(input)
        return f"You said {input['input']}; I think {input.get('small_label')}"

    def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
        text = self.invoke(input)
        for i in range(0, len(text), 3):
            yield text[i : i + 3]


async def test_shunt_redacts_inputs_and_restores_answers() -> None:
    large = Listening()
    shunt = ShuntRunnable(
        small=ScriptedSmall(), large=large, policy=Threshold(0.9), pruning=TopHint(), guard=PrivacyGuard()
    )
    text = f"I am {MAIL}"
    expected = f"You said {text}; I think short: {text}"
    assert shunt.invoke(text) == expected
    assert await shunt.ainvoke(text) == expected
    assert shunt.batch([text, f"surely {MAIL}"]) == [expected, f"short: surely {MAIL}"]
    assert (await shunt.abatch([text]))[0] == expected
    assert "".join(shunt.stream(text)) == expected
    assert "".join([chunk async for chunk in shunt.astream(text)]) == expected
    assert dict(shunt.batch_as_completed([text])) == {0: expected}
    assert len(large.asked) == 7
    assert MAIL not in repr(large.asked)
    assert large.asked[0]["small_label"] == "short: I am <EMAIL_1>"


async def test_shunt_on_local_answers_abstains_or_raises() -> None:
    iban = "refund to DE89 3704 0044 0532 0130 00"
    for on_local, expected in (("small", "refund"), ("abstain", None), ("raise", None)):
        large = Listening()
        shunt = ShuntRunnable(
            small=WordModel(), large=large, policy=AlwaysLarge(), pruning=NoPruning(), return_decision=True,
            guard=PrivacyGuard(local_kinds={"IBAN"}, on_local=on_local),
        )  # fmt: skip
        book = RunBook()
        if on_local == "raise":
            with pytest.raises(LocalOnlyError, match="IBAN"):
                shunt.invoke(iban, {"callbacks": [book]})
            found = shunt.batch([iban, "hello"], return_exceptions=True)
            assert isinstance(found[0], LocalOnlyError)
            assert found[1].output == "You said hello; I think None" or found[1].output.startswith("You said hello")
            continue
        results = [
            shunt.invoke(iban, {"callbacks": [book]}), await shunt.ainvoke(iban), shunt.batch([iban, "hello"])[0],
            list(shunt.stream(iban))[-1], [chunk async for chunk in shunt.astream(iban)][-1],
        ]  # fmt: skip
        for result in results:
            assert (result.route, result.reason) == ("small", "local_only")
            assert result.cost_usd == 0.0, "nothing was sent"
            assert "0532" not in str(result.decision.error)
            if expected:
                assert result.output == expected
            else:
                assert isinstance(result.output, AbstainedLocally)
                assert result.output.kinds == ("IBAN",)
                assert result.output.prediction is not None
                assert "IBAN" in str(result.output)
        book.assert_balanced()
        assert [one["input"] for one in large.asked] == ["hello"]


def test_shunt_local_label_or_failed_small_model_keeps_input_local() -> None:
    large = Listening()
    guard = PrivacyGuard(local_labels={"refund"}, on_local="abstain")
    shunt = ShuntRunnable(small=WordModel(), large=large, policy=AlwaysLarge(), pruning=None, guard=guard)
    assert isinstance(shunt.invoke({"input": "refund"}), AbstainedLocally)
    assert str(shunt.invoke({"input": "status"})).startswith("You said status")
    failing = ShuntRunnable(small=failing_word_model(RuntimeError("x")), large=large, pruning=NoPruning(), guard=guard)
    answer = failing.invoke("status")
    assert isinstance(answer, AbstainedLocally)
    assert answer.prediction is None
    assert len(large.asked) == 1


def test_shunt_audits_are_redacted_too() -> None:
    large = Listening()
    guard = PrivacyGuard(local_labels={"refund"}, local_kinds={"IBAN"})
    shunt = ShuntRunnable(
        small=WordModel(), large=large, policy=Threshold(0.5), pruning=NoPruning(), guard=guard, audit_rate=1.0
    )
    shunt.batch([f"surely status {MAIL}", "surely refund", "surely status DE89 3704 0044 0532 0130 00"])
    assert shunt.auditor is not None
    shunt.auditor.flush()
    assert [one["input"] for one in large.asked] == ["surely status <EMAIL_1>"]


@pytest.mark.heavy
def test_recorder_local_only_call_has_no_large_model(tmp_path: Any) -> None:
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        with Recorder(store, task="t") as recorder:
            shunt = ShuntRunnable(
                small=WordModel(), large=Listening(), policy=AlwaysLarge(), pruning=NoPruning(), recorder=recorder,
                guard=PrivacyGuard(local_kinds={"IBAN"}),
            )  # fmt: skip
            shunt.batch(["refund to DE89 3704 0044 0532 0130 00", "status"])
        calls = {call.reason: call for part in store.iterate() for call in part}
    assert set(calls) == {"local_only", "deferred"}
    assert (calls["local_only"].route, calls["local_only"].large_model) == ("small", "")
    assert calls["local_only"].answer is None


def test_subtask_shunt_redacts_inputs_and_drafts() -> None:
    asked: list[Any] = []

    def answer(mapping: Any) -> Any:
        asked.append(mapping)
        return {question.subtask.name: f"about {mapping['input']}" for question in mapping["open"]}

    def small(text: str) -> Prediction:
        return (
            Prediction.from_probabilities({"refund": 0.9, "status": 0.1})
            if "refund" in text
            else Prediction.from_probabilities({"refund": 0.2, "status": 0.8})
        )

    parts = (
        Subtask(name="draft", small=ScriptedSmall(), policy=Threshold(0.9)),
        Subtask(name="intent", small=small, labels=("refund", "status"), policy=Threshold(0.1)),
        Subtask(name="reply"),
    )
    guard = PrivacyGuard(local_kinds={"IBAN"})
    shunt = SubtaskShunt(subtasks=parts, large=RunnableLambda(answer), guard=guard)
    assert shunt.invoke(f"I am {MAIL}")["reply"] == f"about I am {MAIL}"
    assert MAIL not in str(asked[0]["open"])
    assert "short: I am <EMAIL_1>" in str(asked[0]["open"])
    iban = "refund to DE89 3704 0044 0532 0130 00"
    assert shunt.invoke(iban) == {"draft": f"short: {iban}", "intent": "refund", "reply": None}
    assert len(asked) == 1
    strict = SubtaskShunt(
        subtasks=parts, large=RunnableLambda(answer), guard=PrivacyGuard(local_kinds={"IBAN"}, on_local="raise")
    )
    with pytest.raises(LocalOnlyError):
        strict.invoke(iban)


def test_guarded_model_stream_keeps_usage_and_metadata() -> None:
    def chunks(_: Any) -> Iterator[Any]:
        usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
        yield AIMessageChunk("Dear <EMA", id="a")
        yield AIMessageChunk("IL_1>!", id="a", usage_metadata=usage, response_metadata={"model_name": "m"})  # type: ignore[arg-type]

    def given(inputs: Iterator[Any]) -> Iterator[Any]:
        for one in inputs:
            yield from chunks(one)

    gated = PrivacyGuard().around(RunnableGenerator(given))
    total: Any = None
    for chunk in gated.stream(MAIL):
        total = chunk if total is None else total + chunk
    assert total.content == f"Dear {MAIL}!"
    assert total.usage_metadata["total_tokens"] == 3
    assert total.response_metadata["model_name"] == "m"


def test_shunt_large_model_traces_contain_redacted_input() -> None:
    seen: list[str] = []

    class Tracer(RunBook):
        def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            super().on_chain_start(serialized, inputs, **kwargs)
            if "shunt:large" in (kwargs.get("tags") or []):
                seen.append(repr(inputs))

    prompt = ChatPromptTemplate.from_messages([("human", "{input} {candidate_probabilities}")])
    shunt = ShuntRunnable(
        small=WordModel(), large=prompt | RunnableLambda(lambda value: value.to_string()), pruning=SoftPruning(),
        policy=AlwaysLarge(), guard=PrivacyGuard(),
    )  # fmt: skip
    assert MAIL in shunt.invoke(f"refund {MAIL}", {"callbacks": [Tracer()]})
    assert seen
    assert MAIL not in "".join(seen)


def test_guard_custom_detector_or_rule_is_not_serialised() -> None:
    guard = PrivacyGuard(local_kinds={"IBAN"}, redact={"EMAIL"}, on_local="abstain")
    back = load(dumpd(guard), allowed_objects=[PrivacyGuard], valid_namespaces=["langchain_datashunt"])
    assert back == guard
    assert back.detectors == DETECTORS
    for own in (PrivacyGuard(local_where=lambda text: True), PrivacyGuard(detectors=DETECTORS[:2])):
        assert dumpd(own)["type"] == "not_implemented"
    assert json.dumps(dumpd(guard))


def test_placeholders_without_entities_are_falsy_and_restore_unchanged() -> None:
    assert issubclass(LocalOnlyError, ShuntError)
    assert Placeholders(DETECTORS).restore("x") == "x"
    assert not Placeholders(DETECTORS)


def test_guard_longer_entity_of_other_kind_hides_none() -> None:
    secret = "connect to postgres://admin:Tr0ub4dor@db.example.com/prod"
    assert PrivacyGuard(redact={"URL_SECRET"}).outbound(secret)[0] == (
        "connect to postgres://<URL_SECRET_1>@db.example.com/prod"
    )
    with pytest.raises(LocalOnlyError, match="URL_SECRET"):
        PrivacyGuard(local_kinds={"URL_SECRET"}).outbound(secret)
    out, placeholders = PrivacyGuard().outbound(secret)
    assert "admin" not in out
    assert placeholders.restore(out) == secret
    assert PrivacyGuard(redact={"NATIONAL_ID"}).outbound("my SSN is 078-05-1120")[0] == "my SSN is <NATIONAL_ID_1>"
    with pytest.raises(LocalOnlyError, match="NATIONAL_ID"):
        PrivacyGuard(local_kinds={"NATIONAL_ID"}).outbound("my SSN is 078-05-1120")
    _, found = PrivacyGuard(redact={"URL_SECRET"}).outbound(f"{secret}, {MAIL}")
    assert found.plain == {"EMAIL": 1}, "an entity inside a replaced one is not plain"


def test_guard_many_entities_take_linear_time() -> None:
    text = " ".join(f"u{i}@example.com" for i in range(20_000))
    started = time.perf_counter()
    _, placeholders = PrivacyGuard().outbound(text)
    assert placeholders.counts == {"EMAIL": 20_000}
    assert time.perf_counter() - started < 30


def test_streamed_tool_arguments_inserted_value_is_escaped() -> None:
    """Otherwise an input could inject arguments into a tool call."""
    values = ['Ab"12\\x9z', '-----BEGIN PRIVATE KEY-----","role":"admin","x":"-----END PRIVATE KEY-----']
    for text, kind in zip(
        ("My password: " + values[0], "store " + values[1]), ("PASSWORD", "PRIVATE_KEY"), strict=True
    ):
        _, placeholders = PrivacyGuard().outbound(text)
        for shown in (f"<{kind}_1>", f"\\u003c{kind}_1\\u003e"):
            restorer, args, total = StreamRestorer(placeholders), f'{{"key": "{shown}"}}', None
            parts = [args[i : i + 3] for i in range(0, len(args), 3)]
            chunks = [
                AIMessageChunk(
                    "",
                    tool_call_chunks=[
                        {"name": None if i else "k", "args": part, "id": None if i else "c", "index": 0,
                         "type": "tool_call_chunk"}
                    ],
                )
                for i, part in enumerate(parts)
            ]  # fmt: skip
            for chunk in [*map(restorer.feed, chunks), *restorer.rest()]:
                total = chunk if total is None else total + chunk
            assert total is not None
            assert [call["args"] for call in total.tool_calls] == [{"key": next(iter(placeholders._texts.values()))}]
        raw = {"tool_calls": [{"function": {"name": "k", "arguments": f'{{"key": "<{kind}_1>"}}'}}]}
        back = placeholders.restore(AIMessage("", additional_kwargs=raw))
        arguments = back.additional_kwargs["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments) == {"key": next(iter(placeholders._texts.values()))}


@pytest.mark.parametrize(
    "value",
    [
        AIMessage("", additional_kwargs={"reasoning": "PROJECT X starts"}),
        AIMessage("", invalid_tool_calls=[{"name": "n", "args": "PROJECT X", "id": "1", "error": None}]),
        HumanMessage("hello", name="PROJECT X"),
        ToolMessage("done", tool_call_id="1", artifact={"of": "PROJECT X"}),
        {"order": "PROJECT X"},
    ],
)
def test_guard_rule_checks_every_part_of_a_message(value: Any) -> None:
    with pytest.raises(LocalOnlyError, match="the rule `local_where` matches"):
        PrivacyGuard(local_where=lambda text: "PROJECT X" in text).outbound([HumanMessage("hi"), value])


def test_guard_rule_checks_numbers_but_not_subtask_questions() -> None:
    guard = PrivacyGuard(local_where=lambda text: "4711" in text or "salary" in text, on_local="raise")
    with pytest.raises(LocalOnlyError):
        guard.outbound({"input": "order", "order": 4711})
    assert guard.outbound({"input": "order", "paid": True, "note": None})[0]["paid"] is True
    salary = Subtask(name="topic", question="Is it about a salary?", labels=("yes", "no"))
    asked: list[Any] = []
    shunt = SubtaskShunt(subtasks=[salary], large=lambda value: asked.append(value) or {"topic": "no"}, guard=guard)
    assert shunt.invoke("When does the canteen open?") == {"topic": "no"}
    assert asked


def test_guard_tool_call_chunks_in_input_are_redacted() -> None:
    streamed = AIMessageChunk(
        "",
        tool_call_chunks=[
            {"name": "mail", "args": f'{{"to": "{MAIL}"}}', "id": "c", "index": 0, "type": "tool_call_chunk"}
        ],
    )
    (out,), _ = PrivacyGuard().outbound([streamed])
    assert MAIL not in repr(out)
    assert json.loads(out.tool_call_chunks[0]["args"]) == {"to": "<EMAIL_1>"}


@pytest.mark.parametrize("kind", ["2FA_CODE", "ÄRZTE", "x" * 60, "DE_STEUER-ID"])
def test_placeholders_unusual_kind_is_restored(kind: str) -> None:
    guard = PrivacyGuard(detectors=[PatternDetector(kind, re.compile(r"(?<!_)\d{6}"))])
    out, placeholders = guard.outbound("code 123456, not <EMAIL_999999>")
    assert "123456" not in out
    assert placeholders.restore(out) == "code 123456, not <EMAIL_999999>"


async def test_guarded_model_closed_stream_closes_inner_stream() -> None:
    closed: list[str] = []

    class Streaming(Runnable[Any, Any]):
        def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            raise NotImplementedError

        def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            try:
                yield from "abc"
            finally:
                closed.append("sync")

        async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            try:
                for character in "abc":
                    yield character
            finally:
                closed.append("async")

    gated = PrivacyGuard().around(Streaming())
    chunks = gated.stream("x")
    assert next(chunks) == "a"
    chunks.close()  # type: ignore[attr-defined]
    assert closed == ["sync"]
    achunks = gated.astream("x")
    assert await anext(achunks) == "a"
    await achunks.aclose()  # type: ignore[attr-defined]
    assert closed == ["sync", "async"]


# One door for everything that leaves

UNREADABLE = [
    {"type": "input_file", "file_data": "x"}, {"type": "video_url", "video_url": {"url": "http://127.0.0.1/x"}},
    {"type": "image", "base64": "AAAA", "mime_type": "image/png"}, {"type": "document", "source": {}},
    {"type": "text-plain", "base64": "AAAA"}, {"type": "input_image", "image_url": "x"}, {"type": "brand_new_block"},
    {"no": "type"}, {"type": "non_standard", "value": {"type": "file"}},
    {"type": "text", "text": "see data:application/pdf;base64,JVBERi0xLjQK"}, {"type": "text", "text": "A" * 300},
    {"type": "text", "text": "x", "extra": {"data": "data:;base64,AAAA"}},
]  # fmt: skip


@pytest.mark.parametrize("block", UNREADABLE)
@pytest.mark.parametrize("place", ["message", "history", "tool result", "list"])
def test_guard_content_that_detectors_cannot_read_stays(block: dict[str, Any], place: str) -> None:
    message: Any = HumanMessage([block])
    value = {
        "message": message, "history": {"input": "x", "history": [message]}, "list": [AIMessage([block])],
        "tool result": [ToolMessage([block], tool_call_id="1")],
    }[place]  # fmt: skip
    with pytest.raises(LocalOnlyError, match="detectors cannot check"):
        PrivacyGuard().outbound(value)
    assert PrivacyGuard(allow_binary=True).outbound(value)


class Told:
    """Large model that keeps what it got."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def __call__(self, asked: Any, **kwargs: Any) -> str:
        self.got.append((asked, kwargs))
        return "status"


WAYS = ["invoke", "ainvoke", "batch", "abatch", "stream", "astream"]


async def answer_by(model: Any, way: str, value: Any, **kwargs: Any) -> Any:
    if way == "invoke":
        return model.invoke(value, **kwargs)
    if way == "ainvoke":
        return await model.ainvoke(value, **kwargs)
    if way == "batch":
        return model.batch([value], **kwargs)[0]
    if way == "abatch":
        return (await model.abatch([value], **kwargs))[0]
    if way == "stream":
        return list(model.stream(value, **kwargs))[-1]
    return [chunk async for chunk in model.astream(value, **kwargs)][-1]


@pytest.mark.parametrize("way", WAYS)
async def test_guard_keyword_arguments_are_redacted(way: str) -> None:
    large = Told()
    shunt = ShuntRunnable(
        small=WordModel(), large=RunnableLambda(large), pruning=NoPruning(), policy=AlwaysLarge(), guard=PrivacyGuard()
    )
    await answer_by(shunt, way, "hello", stop=["jane@example.com"], user="jane@example.com", n=1)
    assert "jane@" not in str(large.got)
    assert large.got[0][1] == {"stop": ["<EMAIL_1>"], "user": "<EMAIL_1>", "n": 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "talk",
    [
        [HumanMessage("surely refund"), AIMessage("Done."), HumanMessage("surely status")],
        [HumanMessage("surely status"), HumanMessage("maybe refund, refund"), AIMessage("?"), HumanMessage("cancel")],
        {"input": "status", "history": [HumanMessage("surely refund")]},
    ],
)
async def test_guard_local_label_of_earlier_turn_stays(way: str, talk: Any) -> None:
    large = Told()
    guard = PrivacyGuard(local_labels={"refund"}, on_local="raise")
    shunt = ShuntRunnable(
        small=WordModel(), large=RunnableLambda(large), pruning=NoPruning(), policy=AlwaysLarge(), guard=guard
    )
    with pytest.raises(LocalOnlyError):
        await answer_by(shunt, way, talk)
    assert large.got == []
    assert await answer_by(shunt, way, [HumanMessage("surely cancel"), AIMessage("?"), HumanMessage("surely status")])


def test_guard_probable_local_label_stays_though_another_is_likelier() -> None:
    large = Told()
    near = Prediction.from_probabilities({"refund": 0.49, "status": 0.51})
    guard = PrivacyGuard(local_labels={"refund"}, on_local="raise")
    shunt = ShuntRunnable(small=lambda _: near, large=large, pruning=NoPruning(), guard=guard)
    with pytest.raises(LocalOnlyError, match="a probability of 0.49"):
        shunt.invoke("x")
    far = guard.model_copy(update={"local_probability": 0.6})
    assert shunt.model_copy(update={"guard": far}).invoke("x") == "status"


def test_guard_chat_turn_after_tool_result_stays_with_local_label() -> None:
    talk = [
        HumanMessage("surely refund"), AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
        ToolMessage("done", tool_call_id="1"),
    ]  # fmt: skip
    chat = ShuntChatModel(
        small=WordModel(), large=FakeListChatModel(responses=["x"]), guard=PrivacyGuard(local_labels={"refund"})
    )
    with pytest.raises(LocalOnlyError):
        chat.invoke(talk)


def test_guard_subtask_with_local_label_beside_open_one_stays() -> None:
    large = Told()
    other: Any = RunnableLambda(lambda text: Prediction.from_probabilities({"short": 0.5, "long": 0.5}))
    shunt = SubtaskShunt(
        subtasks=(Subtask(name="intent", small=WordModel()), Subtask(name="size", small=other)), large=large,
        guard=PrivacyGuard(local_labels={"refund"}, on_local="raise"),
    )  # fmt: skip
    with pytest.raises(LocalOnlyError):
        shunt.invoke("surely refund")
    assert large.got == []


async def test_guard_long_payload_does_not_hold_event_loop() -> None:
    shunt = ShuntRunnable(
        small=WordModel(), large=lambda asked: "status", pruning=NoPruning(), policy=AlwaysLarge(),
        guard=PrivacyGuard(), max_input_characters=None,
    )  # fmt: skip
    text = "The order 12345 of jane@example.com came late. " * 20_000
    async with longest_hold() as hold:
        assert await shunt.ainvoke(text) == "status"
    assert hold.seconds < 0.5


def test_disclosure_budget_clock_set_back_does_not_reopen_period() -> None:
    now = [200_000.0]
    budget = DisclosureBudget(calls=2, period_seconds=100.0, clock=lambda: now[0])
    assert [budget.above({"calls": 1}, None) for _ in range(3)] == ["", "", "calls"]
    now[0] = 100_000.0
    assert budget.above({"calls": 1}, None) == "calls"
    now[0] = 200_100.0
    assert budget.above({"calls": 1}, None) == ""


@pytest.mark.parametrize("way", WAYS)
async def test_shunt_panic_of_native_code_defers(way: str) -> None:
    class PanicException(BaseException):
        pass

    class Panicking(WordModel):
        def predict_scores(self, texts: Any) -> Any:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    shunt = ShuntRunnable(small=Panicking(), large=lambda asked: "status", pruning=NoPruning())
    assert await answer_by(shunt, way, "surely refund") == "status"
