"""CSV, JSONL and Parquet files, row by row in constant memory; a wrong column or a broken row is named."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import DataError

Row = dict[str, Any]


def read_rows(file: str | Path) -> Iterator[Row]:
    """The rows of a file by its ending: .csv, .jsonl (or .ndjson), .parquet.

    Raises:
        DataError: The file is missing, of another kind, or a row cannot be read; the message names the row.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path.")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is of no kind that is read here; use one of {', '.join(readers)}.")
    return reader(path)


def columns_of(file: str | Path) -> list[str]:
    """Names of a file's columns, read from its first row.

    Raises:
        DataError: The file has no rows.
    """
    first = next(read_rows(file), None)
    if first is None:
        raise DataError(f"{Path(file).name} has no rows.")
    return list(first)


def require_columns(file: str | Path, *names: str) -> None:
    """Raise a `DataError` unless the file has these columns; the message names those that there are."""
    there = columns_of(file)
    for name in names:
        if name not in there:
            raise DataError(f"{Path(file).name} has no column {name!r}; it has: {', '.join(there)}.")


def cell(file: str | Path, i: int, row: Row, name: str) -> Any:
    """What a row says in a column.

    Raises:
        DataError: The row, the `i`-th of the file from 1 on, has no such column, or nothing in it.
    """
    if row.get(name) is None:
        what = "is empty" if name in row else "is missing"
        raise DataError(f"{Path(file).name}, row {i}: column {name!r} {what}. Fill or remove the row.")
    return row[name]


def labelled_texts(file: str | Path, text: str, label: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a file; labels become strings.

    Raises:
        DataError: A column is missing, or a row has no text or no label; the message names the row.
    """
    require_columns(file, text, label)
    texts: list[str] = []
    labels: list[str] = []
    for i, row in enumerate(read_rows(file), start=1):
        for name in (text, label):
            if row.get(name) is None or not str(row[name]).strip():
                raise DataError(f"{Path(file).name}, row {i}: column {name!r} is empty. Fill or remove the row.")
        texts.append(str(row[text]))
        labels.append(str(row[label]).strip())
    return texts, labels


def texts_of(file: str | Path, text: str) -> list[str]:
    """The texts of a file.

    Raises:
        DataError: The column is missing, or empty in a row; the message names the row.
    """
    require_columns(file, text)
    texts = [row.get(text) for row in read_rows(file)]
    for i, found in enumerate(texts, start=1):
        if found is None or not str(found).strip():
            raise DataError(f"{Path(file).name}, row {i}: column {text!r} is empty. Fill or remove the row.")
    return [str(found) for found in texts]


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            names = reader.fieldnames or ()
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise DataError(f"{path.name} has more than one column {twice[0]!r}. Give each a name of its own.")
            for i, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise DataError(f"{path.name}, row {i}: it has not the {len(names)} fields that the header has.")
                yield row
        except UnicodeDecodeError as error:  # found in a block that is read ahead, so the reader's line is another
            where = _undecodable_line(path)
            raise DataError(f"{path.name}, line {where}, is no UTF-8. Save the file as UTF-8.") from error
        except csv.Error as error:
            raise DataError(f"{path.name} cannot be read after line {reader.line_num}: {error}.") from error


def _undecodable_line(path: Path) -> int:
    """The first line that is no UTF-8."""
    with path.open("rb") as stream:
        for i, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return i
    return 0


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for i, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError too
                raise DataError(f"{path.name}, line {i} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path.name}, line {i} is a {type(row).__name__}; each line must be an object.")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", "cli")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is no Parquet file: {error}.") from error
    try:
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is damaged: {error}.") from error


def sample_per_label(
    texts: Sequence[str], labels: Sequence[str], per_label: int, seed: int
) -> tuple[list[str], list[str]]:
    """A random sample of at most so many examples of each label, in a stable order."""
    import numpy as np

    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(label, []).append(i)
    chosen = [
        rng.choice(rows, size=min(per_label, len(rows)), replace=False).tolist() for _, rows in sorted(by_label.items())
    ]
    rows = list(itertools.chain.from_iterable(chosen))
    return [texts[i] for i in rows], [labels[i] for i in rows]
