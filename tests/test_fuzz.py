"""Property tests: for arbitrary input, readers return a value or raise one of the package's errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_datashunt import load_small_model
from langchain_datashunt._utils.table_files import labelled_texts, read_rows
from langchain_datashunt.call_log.encryption import Seal
from langchain_datashunt.call_log.record import CallRecord
from langchain_datashunt.call_log.rows import COLUMNS, as_text, record_of, row_of
from langchain_datashunt.exceptions import ShuntError, StoreError, UnparsableAnswerError
from langchain_datashunt.large_models.label_parser import LabelParser
from langchain_datashunt.privacy import PrivacyGuard
from langchain_datashunt.routing import Subtask
from langchain_datashunt.routing.subtask_questions import OpenQuestion, OpenQuestions, read_answers
from langchain_datashunt.small_models import TextCNN, TrainingSettings

EXAMPLES = int(os.environ.get("DATASHUNT_FUZZ_EXAMPLES", "60"))
"""Examples per test. `make fuzz` sets a larger number."""

LABELS = ("cancel", "refund", "order status")
SEAL = Seal([Fernet.generate_key()])
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
def test_label_parser_any_answer_gives_label_or_unparsable_error(text: str) -> None:
    try:
        assert LabelParser(labels=LABELS).parse(text) in LABELS
    except UnparsableAnswerError as error:
        assert error.labels == LABELS


@FUZZ
@given(st.text(max_size=200) | JSON.map(lambda value: json.dumps(value)))
def test_read_answers_any_text_gives_valid_answers_or_errors(text: str) -> None:
    questions = OpenQuestions([OpenQuestion(Subtask(name="a", labels=LABELS)), OpenQuestion(Subtask(name="b"))])
    found, wrong = read_answers(text, questions)
    assert set(found) | set(wrong) == {"a", "b"}
    assert not set(found) & set(wrong)
    assert found.get("a", LABELS[0]) in LABELS
    assert isinstance(found.get("b", ""), str)


@FUZZ
@given(st.binary(max_size=400), st.sampled_from(["csv", "jsonl", "parquet", "txt"]))
def test_read_rows_any_bytes_gives_rows_or_shunt_error(tmp_path: Path, data: bytes, ending: str) -> None:
    file = tmp_path / f"f.{ending}"
    file.write_bytes(data)
    for read in (lambda: list(read_rows(file)), lambda: labelled_texts(file, "text", "label")):
        try:
            read()
        except ShuntError as error:
            assert str(error)


@FUZZ
@given(st.lists(JSON, max_size=5))
def test_labelled_texts_any_json_lines_gives_texts_or_shunt_error(tmp_path: Path, values: list[Any]) -> None:
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
def test_load_small_model_changed_bytes_predicts_or_raises_shunt_error(bundle: Path, data: st.DataObject) -> None:
    """Changes, truncates, extends or replaces a random file of a bundle. If it still loads, it must predict."""
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
def test_load_small_model_changed_config_predicts_or_raises_shunt_error(bundle: Path, name: str, value: Any) -> None:
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


@FUZZ
@given(
    st.text(max_size=100),
    st.none() | st.text(max_size=100),
    st.none() | st.text(max_size=50),
    st.none() | st.text(max_size=50),
    st.booleans(),
)
def test_call_log_row_any_record_round_trips(
    text: str, raw: str | None, label: str | None, written: str | None, encrypted: bool
) -> None:
    labels = ("answer", "other") if written is not None else LABELS
    record = CallRecord(
        input=text, answer=raw, answer_label=label, labels=labels, small_answer=written,
        probabilities=tuple(1.0 / len(labels) for _ in labels), large_model="m",
    )  # fmt: skip
    seal = SEAL if encrypted else None
    row = dict(zip(COLUMNS, row_of(record, 1, seal, sqlite=False), strict=True))
    back = record_of(row, labels, seal)
    expected = (text, raw, label, written)
    assert (back.input, back.answer, back.answer_label, back.small_answer) == tuple(
        one and as_text(one) for one in expected
    )
    assert back.time == record.time
    if encrypted and len(text.strip()) > 8:  # shorter ones occur in ciphertext by chance
        assert text not in str(row["input"])


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(["input", "probabilities", "label_set", "answer"]))
def test_call_log_row_damaged_gives_record_or_error(noise: bytes, column: str) -> None:
    record = CallRecord(input="a text", labels=LABELS, probabilities=(0.5, 0.25, 0.25))
    row = dict(zip(COLUMNS, row_of(record, 1, SEAL, sqlite=False), strict=True))
    row[column] = noise if column == "probabilities" else noise.decode("latin-1")
    try:
        back = record_of(row, LABELS, SEAL)
    except (StoreError, ShuntError, ValueError):
        return
    assert column in ("label_set", "probabilities")
    assert back.input == "a text"


@FUZZ
@given(JSON)
def test_privacy_guard_value_without_findings_is_unchanged(value: Any) -> None:
    guard = PrivacyGuard()
    out, placeholders = guard.outbound(value)
    if not placeholders:
        assert repr(out) == repr(value)
