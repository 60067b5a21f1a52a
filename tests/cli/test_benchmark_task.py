from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_datashunt._utils.table_files import (
    columns_of,
    labelled_texts,
    read_rows,
    require_columns,
    sample_per_label,
)
from langchain_datashunt.cli.demo import benchmark_task
from langchain_datashunt.cli.demo.benchmark_task import (
    banking77_folder,
    download_banking77,
    load_banking77,
    load_messages,
    names_digest,
)
from langchain_datashunt.exceptions import DataError, ReplayError
from langchain_datashunt.large_models.replay import RecordedAnswers, estimate_message_tokens, estimate_tokens

ROWS = [{"text": 'a, "quoted"\ntext', "label": "1"}, {"text": "b", "label": "2"}]


def write(folder: Path, kind: str) -> Path:
    file = folder / f"data.{kind}"
    if kind == "csv":
        file.write_text('text,label\n"a, ""quoted""\ntext",1\nb,2\n', encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "ndjson"])
def test_read_rows_every_format_gives_same_rows(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, kind)
    assert list(read_rows(file)) == ROWS
    assert columns_of(file) == ["text", "label"]
    assert labelled_texts(file, "text", "label") == (['a, "quoted"\ntext', "b"], ["1", "2"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "text,label\na\n", "row 1: expected 2 fields"),
        ("x.csv", 'text,label\n"a,1\n', "invalid CSV after line"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2: invalid JSON"),
        ("x.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("x.parquet", "nonsense", "is not a valid Parquet file"),
        ("x.txt", "a", "Unsupported file type of x.txt"),
        ("x.csv", "text,label\n", "has no rows"),
        ("x.csv", "text,label,text\na,1,b\n", "more than one column 'text'"),
        ("x.csv", "text,label\n" + "a,1\n" * 5000 + "\udcff,1\n", "line 5002: invalid UTF-8"),
        ("x.jsonl", '{"text": "\udcff"}\n', "line 1: invalid JSON"),
    ],
)
def test_read_rows_broken_file_error_names_location(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=words):
        list(read_rows(tmp_path / name))
        columns_of(tmp_path / name)


def test_read_rows_missing_file_column_or_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "nothing.csv")
    file = write(tmp_path, "csv")
    with pytest.raises(DataError, match="no column 'intent'. Available columns: text, label"):
        require_columns(file, "text", "intent")
    (tmp_path / "e.csv").write_text("text,label\na,1\n ,2\n")
    with pytest.raises(DataError, match="row 2: column 'text' is empty"):
        labelled_texts(tmp_path / "e.csv", "text", "label")


@settings(max_examples=60)
@given(st.text(max_size=200))
def test_read_rows_arbitrary_content_gives_rows_or_data_error(content: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("csv", "jsonl", "parquet"):
            file = Path(folder) / f"x.{kind}"
            file.write_text(content, encoding="utf-8", errors="replace", newline="")
            with contextlib.suppress(DataError):
                assert all(isinstance(row, dict) for row in read_rows(file))


def test_sample_per_label_is_stratified_and_repeatable() -> None:
    texts, labels = [f"t{i}" for i in range(40)], ["a", "b", "b", "b"] * 10
    chosen = sample_per_label(texts, labels, 12, seed=3)
    assert Counter(chosen[1]) == {"a": 10, "b": 12}
    assert chosen == sample_per_label(texts, labels, 12, seed=3)
    assert chosen != sample_per_label(texts, labels, 12, seed=4)
    assert all(labels[texts.index(text)] == label for text, label in zip(*chosen, strict=True))


def test_load_messages_splits_without_overlap() -> None:
    task = load_messages()
    sizes = [len(part) for part in (task.train, task.dev, task.test)]
    assert sizes == [180, 108, 144]
    everything = [*task.train.texts, *task.dev.texts, *task.test.texts]
    assert len(set(everything)) == 432, "no message may be in two splits"
    assert len(task.labels) == 12
    assert set(task.descriptions) == set(task.labels)
    assert load_messages(1).test.texts != task.test.texts


def test_load_banking77_has_names_and_recorded_answers(banking77: Path) -> None:
    task = load_banking77(banking77)
    assert [len(part) for part in (task.train, task.dev, task.test)] == [9002, 1001, 3080]
    assert len(task.labels) == 77
    right = [a == b for a, b in zip(task.test.large, task.test.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(0.8305, abs=5e-4)
    assert task.test.head(5).large == task.test.large[:5]
    assert not task.train.large


def test_banking77_folder_follows_environment_variable(banking77: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("DATASHUNT_DATA_DIR", str(banking77.parent))
    assert banking77_folder() == banking77
    monkeypatch.setenv("DATASHUNT_DATA_DIR", str(tmp_path))
    assert banking77_folder() is None
    monkeypatch.delenv("DATASHUNT_DATA_DIR")
    assert banking77_folder() is None


@pytest.fixture
def published(banking77: Path, tmp_path: Path) -> Any:
    """Local HTTP server with the published files."""
    root = tmp_path / "published"
    for name, (where, _) in benchmark_task._PUBLISHED.items():
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / where).write_bytes((banking77 / name).read_bytes())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_download_banking77_verifies_checksums_and_keeps_valid_files(published: Any, tmp_path: Path) -> None:
    root, url = published
    folder = download_banking77(tmp_path / "mine", url)
    assert len(load_banking77(folder).test) == 3080
    (root / "raw/banking77/test.csv").write_text("text,label\nchanged,1\n")
    assert download_banking77(tmp_path / "mine", url) == folder, "valid files must not be downloaded again"
    (folder / "test.csv").write_text("cut")
    with pytest.raises(DataError, match="the checksum differs"):
        download_banking77(tmp_path / "mine", url)
    with pytest.raises(DataError, match="Cannot download"):
        download_banking77(tmp_path / "other", url + "/nowhere")
    assert names_digest(root / "raw/banking77/test.csv") is None


def test_recorded_answers_match_last_known_user_message(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,answer\nwhere is it,status\nmoney,refund\n")
    recorded = RecordedAnswers.load(tmp_path / "a.csv")
    system = {"role": "system", "content": "money"}
    assert recorded([system, {"role": "user", "content": " where is it "}]) == "status"
    parts = [{"type": "text", "text": "money"}]
    assert recorded([{"role": "user", "content": parts}]) == "refund"
    correction = [{"role": "user", "content": "money"}, {"role": "user", "content": "Not a label. Again."}]
    assert recorded(correction) == "refund"
    for messages in ([system], [{"role": "user", "content": "unheard of"}], [{"role": "user", "content": None}]):
        with pytest.raises(ReplayError, match="Nothing was recorded"):
            recorded(messages)


def test_recorded_answers_ambiguous_file_raises_replay_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,answer\nx,1\nx,2\n")
    with pytest.raises(ReplayError, match="row 2: this input occurs twice"):
        RecordedAnswers.load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,reply\nx,1\n")
    with pytest.raises(ReplayError, match="no column with recorded answers"):
        RecordedAnswers.load(tmp_path / "b.csv")
    assert RecordedAnswers.load(tmp_path / "b.csv", answer="reply").by_text == {"x": "1"}


def test_estimate_tokens_counts_characters() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("12345678") == 2
    assert estimate_message_tokens(["1234", "12345"]) == 3 + 4 + 1 + 4 + 2
