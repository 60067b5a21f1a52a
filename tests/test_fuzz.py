"""Whatever a file or an answer holds, readers give an error of ours or a value, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_datashunt import load_small_model
from langchain_datashunt._utils.table_files import labelled_texts, read_rows
from langchain_datashunt.call_log.record import CallRecord, columns_of
from langchain_datashunt.call_log.rows import Rows, record_of, rows_of
from langchain_datashunt.call_log.segments import MAX_RECORDS, Segment
from langchain_datashunt.exceptions import ShuntError, UnparsableAnswerError
from langchain_datashunt.large_models.label_parser import LabelParser
from langchain_datashunt.privacy import PrivacyGuard
from langchain_datashunt.routing import Subtask
from langchain_datashunt.routing.subtask_questions import OpenQuestion, OpenQuestions, read_answers
from langchain_datashunt.small_models import TextCNN, TrainingSettings

EXAMPLES = int(os.environ.get("DATASHUNT_FUZZ_EXAMPLES", "60"))
"""Examples of each test; `make fuzz` takes many more."""

LABELS = ("cancel", "refund", "order status")
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(
    st.text(max_size=300) | st.sampled_from(LABELS).flatmap(lambda label: st.text(max_size=20).map(lambda t: t + label))
)
def test_an_answer_is_a_label_or_unparsable(text: str) -> None:
    try:
        assert LabelParser(labels=LABELS).parse(text) in LABELS
    except UnparsableAnswerError as error:
        assert error.labels == LABELS


@FUZZ
@given(st.text(max_size=200) | JSON.map(lambda value: json.dumps(value)))
def test_answers_to_questions_are_texts_and_labels(text: str) -> None:
    questions = OpenQuestions([OpenQuestion(Subtask(name="a", labels=LABELS)), OpenQuestion(Subtask(name="b"))])
    found, wrong = read_answers(text, questions)
    assert set(found) | set(wrong) == {"a", "b"}
    assert not set(found) & set(wrong)
    assert found.get("a", LABELS[0]) in LABELS
    assert isinstance(found.get("b", ""), str)


@FUZZ
@given(st.binary(max_size=400), st.sampled_from(["csv", "jsonl", "parquet", "txt"]))
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes, ending: str) -> None:
    file = tmp_path / f"f.{ending}"
    file.write_bytes(data)
    for read in (lambda: list(read_rows(file)), lambda: labelled_texts(file, "text", "label")):
        try:
            read()
        except ShuntError as error:
            assert str(error)


@FUZZ
@given(st.lists(JSON, max_size=5))
def test_any_json_lines_are_read_or_refused(tmp_path: Path, values: list[Any]) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    try:
        texts, labels = labelled_texts(file, "text", "label")
        assert len(texts) == len(labels)
    except ShuntError as error:
        assert str(error)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings_ = TrainingSettings(progress=False, epochs=1)
    model = TextCNN.train(["a b", "c d"] * 4, ["x", "y"] * 4, settings=settings_, hidden_size=4, embedding_size=4)
    return model.save(tmp_path_factory.mktemp("bundle") / "bundle")


@FUZZ
@given(st.data())
def test_a_changed_bundle_is_refused_or_the_same(bundle: Path, data: st.DataObject) -> None:
    """Bytes of any of its files are changed, cut or added; what loads must predict, and everything else is an error."""
    file = data.draw(st.sampled_from(sorted(path for path in bundle.iterdir() if path.is_file())))
    good = file.read_bytes()
    how = data.draw(st.sampled_from(["flip", "cut", "add", "replace"]))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = {
        "flip": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at],
        "add": good + data.draw(st.binary(min_size=1, max_size=20)),
        "replace": data.draw(st.binary(max_size=100)),
    }[how]
    file.write_bytes(bad)
    try:
        load_small_model(bundle).predict("a b")
    except ShuntError as error:
        assert str(error)
    finally:
        file.write_bytes(good)


@FUZZ
@given(st.sampled_from(["labels", "temperature", "threshold", "policy", "fusion", "settings", "kind", "files"]), JSON)
def test_any_value_in_a_bundles_settings_is_refused_or_works(bundle: Path, name: str, value: Any) -> None:
    file = bundle / "config.json"
    good = file.read_text(encoding="utf-8")
    config = json.loads(good)
    if name == "settings" and isinstance(value, dict):
        value = {**config["settings"], **value}
    file.write_text(json.dumps({**config, name: value}), encoding="utf-8")
    try:
        load_small_model(bundle).predict("a b")
    except ShuntError as error:
        assert str(error)
    finally:
        file.write_text(good, encoding="utf-8")


class _Row(dict[str, Any]):
    """A row as the database gives it."""


@FUZZ
@given(
    st.text(max_size=100),
    st.none() | st.text(max_size=100),
    st.none() | st.text(max_size=50),
    st.none() | st.text(max_size=50),
)
def test_any_record_comes_back_from_its_row(text: str, raw: str | None, label: str | None, written: str | None) -> None:
    labels = ("answer", "other") if written is not None else LABELS
    record = CallRecord(
        input=text, raw_output=raw, label=label, labels=labels, small_answer=written,
        probabilities=tuple(1.0 / len(labels) for _ in labels), large_model="m",
    )  # fmt: skip
    columns = columns_of([record])
    segment = Segment.of(columns)
    (row,) = zip(*rows_of(columns, [bytes(16)], [1], segment, segment_number=7), strict=True)
    shared = {"task": record.task, "small_model": "", "large_model": "m", "policy": "", "labels": json.dumps(labels)}
    back = record_of({**dict(zip(Rows._fields, row, strict=True)), **shared}, Segment.unpack(segment.pack()))
    assert (back.input, back.raw_output, back.label, back.small_answer) == (text, raw, label, written)


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from([b"", b"p", b"z"]))
def test_a_damaged_segment_is_an_error(noise: bytes, at: int, kind: bytes) -> None:
    sound = Segment.of(columns_of([CallRecord(input=f"text {i}" * 9, labels=LABELS) for i in range(3)])).pack()
    for content in (kind + noise, sound[:at] + noise, sound[:at] + noise + sound[at + len(noise) :]):
        try:
            segment = Segment.unpack(content)
        except ValueError:
            continue
        assert len(segment.inputs) == len(segment.audits) <= MAX_RECORDS


@FUZZ
@given(
    st.lists(st.tuples(st.text(max_size=30), st.none() | st.text(max_size=9), st.integers(0, 3)), max_size=9), st.data()
)
def test_what_is_erased_leaves_the_rest_where_it_was(told: list[tuple[str, str | None, int]], data: Any) -> None:
    records = [
        CallRecord(
            input=text, raw_output=raw, labels=LABELS[:k], probabilities=(1.0 / k,) * k if k else None, audit=k == 1,
        )
        for text, raw, k in told
    ]  # fmt: skip
    gone = data.draw(st.sets(st.integers(0, max(0, len(told) - 1)))) if told else set()
    whole = Segment.unpack(Segment.of(columns_of(records)).pack())
    left = Segment.unpack(whole.without(gone).pack())
    for place in range(len(records)):
        if place not in gone:
            assert left[place] == whole[place]
        else:
            with pytest.raises(ValueError, match=f"place {place}"):
                left[place]


@FUZZ
@given(JSON)
def test_any_structure_passes_the_gate_unchanged_where_nothing_is_found(value: Any) -> None:
    guard = PrivacyGuard()
    out, placeholders = guard.outbound(value)
    if not placeholders:
        assert repr(out) == repr(value)
