"""Export of the call log to JSONL, Parquet, OpenAI fine-tuning chats or a Hugging Face dataset, in constant memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from langchain_datashunt._utils.atomic_dir import put_in_place
from langchain_datashunt._utils.optional import require
from langchain_datashunt.call_log.filters import EVERYTHING, CallFilter
from langchain_datashunt.call_log.record import HASHED, LEFT_OUT, CallRecord
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.prediction import ANSWER_LABELS

WRITTEN_INSTRUCTION = "Answer the message."
"""System message of exported chats whose answers are generated texts."""

DEFAULT_INSTRUCTION = "Sort the message into one of these labels and answer with the label only: {labels}"
"""Default system message of exported chats whose answers are labels. `{labels}` is replaced by the label set."""


def export(
    store: CallLog,
    out: str | Path,
    *,
    kind: str | None = None,
    which: CallFilter = EVERYTHING,
    instruction: str = DEFAULT_INSTRUCTION,
) -> int:
    """Write records to a file.

    Args:
        store: Call log.
        out: Path of the file, or of a folder if `kind` is "datasets". If the export fails, an existing file is kept.
        kind: "jsonl", "parquet", "openai" or "datasets". None uses the file's suffix.
        which: Filter of the records. By default, all records.
        instruction: System message of "openai" chats whose answers are labels. `{labels}` is replaced by the labels.

    Returns:
        Number of exported records.

    Raises:
        ConfigurationError: If `kind` is unknown, or `out` is something else that must not be overwritten.
        MissingExtraError: If the extra `cli` (for Parquet) or `distill` (for datasets) is not installed.
        StoreError: If a record cannot be read.
    """
    path = Path(out)
    chosen = kind or path.suffix.removeprefix(".")
    writers: dict[str, Callable[[], int]] = {
        "jsonl": lambda: _lines(path, (plain(call) for call in _calls(store, which))),
        "openai": lambda: _lines(path, chats(store, which, instruction)),
        "parquet": lambda: _parquet(path, store, which),
        "datasets": lambda: _dataset(path, store, which),
    }
    if chosen not in writers:
        raise ConfigurationError(f"Expected an export kind of {', '.join(writers)}, got {chosen!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return writers[chosen]()


def plain(call: CallRecord) -> dict[str, Any]:
    """Return a record as JSON-ready values, with its computed values and without the subject's hash."""
    computed = {"small_label": call.small_label, "confidence": call.confidence, "input_hash": call.input_hash}
    values = {**vars(call), **computed}
    del values["subject"]
    return values


def chats(store: CallLog, which: CallFilter, instruction: str) -> Iterator[dict[str, Any]]:
    """Yield one chat for each record, in the format of OpenAI fine-tuning.

    The answer is the true label if it is known, else the large model's label. Records without either are skipped, and
    so are those whose input or answer was hashed or left out.
    """
    for call in _calls(store, which):
        answer = call.gold or call.answer_label
        if answer is not None and call.readable and not answer.startswith((HASHED, LEFT_OUT)):
            written = call.labels == ANSWER_LABELS
            system = WRITTEN_INSTRUCTION if written else instruction.replace("{labels}", ", ".join(call.labels))
            yield {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": call.input},
                    {"role": "assistant", "content": answer},
                ]
            }


def _calls(store: CallLog, which: CallFilter) -> Iterator[CallRecord]:
    for batch in store.iterate(which):
        yield from batch


def _lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    n = 0
    with _whole(path) as partial, partial.open("wb") as stream:
        for row in rows:
            stream.write(_as_json(row) + b"\n")
            n += 1
    return n


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder, which replaces `path` if the block succeeds."""
    if path.is_dir():
        raise ConfigurationError(f"Expected a file, got the folder {path}. Pass the path of a file.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_json(row: dict[str, Any]) -> bytes:
    """Return a row as a line of JSON. Lone surrogates, which UTF-8 cannot encode, become question marks."""
    try:
        return to_json(row)
    except ValueError:
        return json.dumps(row, ensure_ascii=False).encode(errors="replace")


def _schema(pa: Any) -> Any:
    text, number = pa.string(), pa.float64()
    return pa.schema(
        [
            *(
                (name, text)
                for name in ("id", "task", "input", "input_hash", "small_model", "policy", "route", "reason")
            ),
            *(
                (name, text)
                for name in (
                    "large_model",
                    "answer",
                    "answer_label",
                    "small_label",
                    "small_answer",
                    "gold",
                    "gold_source",
                    "disclosed",
                )
            ),
            *(
                (name, number)
                for name in ("time", "confidence", "score", "threshold", "large_confidence", "cost_usd", "weight")
            ),
            *((name, number) for name in ("small_seconds", "large_seconds")),
            *((name, pa.int64()) for name in ("schema_version", "input_tokens", "output_tokens")),
            ("audit", pa.bool_()),
            ("labels", pa.list_(text)),
            ("probabilities", pa.list_(pa.float32())),
            ("large_probabilities", pa.list_(pa.float32())),
        ]
    )


def _parquet(path: Path, store: CallLog, which: CallFilter) -> int:
    pa, parquet = require("pyarrow", "cli"), require("pyarrow.parquet", "cli")
    n, schema = 0, _schema(pa)
    with _whole(path) as partial, parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for batch in store.iterate(which, batch_size=5000):
            rows = [plain(call) for call in batch]
            try:
                table = pa.Table.from_pylist(rows, schema=schema)
            except UnicodeEncodeError:
                table = pa.Table.from_pylist([json.loads(_as_json(row)) for row in rows], schema=schema)
            writer.write_table(table)
            n += len(batch)
    return n


def _dataset(folder: Path, store: CallLog, which: CallFilter) -> int:
    """Save a `datasets.Dataset` by way of a temporary Parquet file, and return its number of rows."""
    datasets = require("datasets", "distill")
    if folder.exists() and not (folder / "dataset_info.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigurationError(
            f"Expected a new or empty folder or a saved dataset, got {folder}. Pass another folder."
        )
    table, whole = (folder.with_name(f".{folder.name}.{what}") for what in ("parquet", "partial"))
    try:
        n = _parquet(table, store, which)
        if n:
            made = datasets.Dataset.from_parquet(str(table))
        else:  # datasets does not load an empty Parquet file
            features = datasets.Features.from_arrow_schema(_schema(require("pyarrow", "cli")))
            made = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        made.save_to_disk(str(whole), num_shards=None if n else 1)
        put_in_place(whole, folder)
    finally:
        table.unlink(missing_ok=True)
        shutil.rmtree(whole, ignore_errors=True)
    return n
