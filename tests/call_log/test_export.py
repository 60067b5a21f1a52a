"""Tests of the export to files and datasets."""

# ruff: noqa: F811  (imported fixtures are also argument names)

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from langchain_datashunt.call_log import CallFilter, CallLog
from langchain_datashunt.call_log.export import export
from langchain_datashunt.exceptions import ConfigurationError, StoreError
from tests.call_log.test_store import call, store, url  # noqa: F401  # fixtures
from tests.support.models import LABELS


def test_export_jsonl_and_parquet_equal_stored_records(store: CallLog, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lone = call(3, input="half a \ud800 pair")
    odd = 'a line\nof "text"\u2028 über 😀 \x00'
    store.append(
        [
            call(1, input=odd, answer=odd, gold=None, cost_usd=1e-7, time=1.7e9, subject="alice"),
            call(2, probabilities=None, score=None, answer_label="a label of its own", audit=True),
            lone,
        ]
    )
    stored = [record for batch in store.iterate() for record in batch]
    export(store, tmp_path / "calls.jsonl")
    export(store, tmp_path / "calls.parquet")
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_bytes().split(b"\n")[:-1]]
    rows = parquet.read_table(tmp_path / "calls.parquet").to_pylist()
    for record, line, row in zip(stored, lines, rows, strict=True):
        computed = {"input_hash": record.input_hash, "confidence": record.confidence, "small_label": record.small_label}
        assert line == {**record.model_dump(mode="json", exclude={"subject"}), **computed}
        assert {name: row[name] for name in line} == {
            **line,
            "probabilities": line["probabilities"] and pytest.approx(line["probabilities"]),
        }


def test_export_failure_keeps_previous_file(store: CallLog, tmp_path: Path) -> None:
    store.append([call(i) for i in range(3)])
    for name in ("calls.jsonl", "calls.parquet"):
        export(store, tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("calls.*") if file.suffix != ".db"}
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE calls SET probabilities = :nothing"), {"nothing": b"zzz"})
    for name in ("calls.jsonl", "calls.parquet"):
        with pytest.raises(StoreError):
            export(store, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before[name]
    assert not list(tmp_path.glob(".calls*"))
    with pytest.raises(ConfigurationError, match="Expected a file, got the folder"):
        export(store, tmp_path, kind="jsonl")


def test_export_openai_skips_unreadable_texts(store: CallLog, tmp_path: Path) -> None:
    written = call(2, labels=("answer", "other"), probabilities=(0.4, 0.6), answer_label="It is on its way.")
    store.append(
        [
            call(1),
            written,
            call(3, input="hashed:sha256:" + "0" * 64),
            call(4, labels=("answer", "other"), probabilities=(0.4, 0.6), answer_label="left out: 20 characters"),
        ]
    )
    assert export(store, tmp_path / "chats.jsonl", kind="openai") == 2
    told = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").open()]
    assert [one[0]["content"][:20] for one in told] == ["Sort the message int", "Answer the message."]
    assert told[1][2]["content"] == "It is on its way."


def test_export_empty_dataset_loads_and_other_folders_are_kept(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with CallLog(tmp_path / "calls.db") as store:
        store.append([call(i) for i in range(3)])
        nothing = CallFilter(until=1.0)
        for which, n in ((nothing, 0), (CallFilter(), 3), (nothing, 0)):
            assert export(store, tmp_path / "ds", kind="datasets", which=which) == n
            assert datasets.load_from_disk(str(tmp_path / "ds")).num_rows == n
        assert "input_hash" in datasets.load_from_disk(str(tmp_path / "ds")).column_names
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        with pytest.raises(ConfigurationError, match="empty folder or a saved dataset"):
            export(store, tmp_path / "mine", kind="datasets")
        chats = tmp_path / "chats.jsonl"
        export(store, chats, kind="openai", instruction='Say {"label": "x"}, one of {labels}.')
        system = json.loads(chats.read_text().splitlines()[0])["messages"][0]["content"]
        assert system == 'Say {"label": "x"}, one of ' + ", ".join(LABELS) + "."
        with pytest.raises(StoreError, match="'xyz' is not an input hash"):
            store.delete(input_hash="xyz")
