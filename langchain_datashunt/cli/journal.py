"""Journal of `datashunt run`: the answers in OUT and OUT.part, from which a killed run resumes.

OUT has the finished rows in the order of the data. OUT.part has the answered rows of unfinished steps. A finished step
is appended to OUT. New answers to failed rows stay in OUT.retried.jsonl until they are merged into OUT.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TextIO

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.table_files import read_rows
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.prediction import writable

FIELDS = ("row", "text", "answer", "route", "reason", "confidence", "cost_usd", "error")
_NUMBERS = {"row": int, "confidence": float, "cost_usd": float}


def is_failed(record: dict[str, Any]) -> bool:
    """Return whether a row of OUT has an error and no answer."""
    return record["answer"] in (None, "") and bool(record["error"])


class Journal:
    """Journal of answered rows in OUT and OUT.part.

    Args:
        out: Path of OUT, ending in .jsonl or .csv.

    Raises:
        ConfigurationError: If `out` has another suffix.
    """

    def __init__(self, out: Path) -> None:
        if out.suffix.lower() not in (".jsonl", ".csv"):
            raise ConfigurationError(f"Expected a .jsonl or .csv file for --out, got {out.name}.")
        self.out = out
        self.part_file = out.with_name(out.name + ".part")
        self.part: dict[int, dict[str, Any]] = {}
        self._stream: TextIO | None = None

    @contextmanager
    def alone(self) -> Iterator[Self]:
        """Lock OUT against other runs. The lock is released even if the run is killed.

        Raises:
            DataError: If another run holds the lock.
        """
        filelock = require("filelock", "cli")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.out.with_name(f".{self.out.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise DataError(
                f"Another run is writing to {self.out}. Wait until it has finished, or pass another --out."
            ) from None
        try:
            yield self
        finally:
            lock.release()

    def resume(self, texts: Iterable[str], name: str) -> int:
        """Repair OUT after a kill, and return the number of finished rows.

        Args:
            texts: Texts of all rows.
            name: Name of the data in error messages.

        Raises:
            DataError: If OUT belongs to other data, or cannot be resumed.
        """
        self._restore()
        if not self.out.exists():  # retried answers belong to an OUT that was removed
            for file in (self.beside().out, self.beside().part_file):
                file.unlink(missing_ok=True)
        done = 0
        for done, (row, mine) in enumerate(zip_longest(self.rows(), texts), start=1):
            if row is None:
                done -= 1
                break
            if mine is None or writable(mine) != str(row["text"]):
                raise DataError(
                    f"Expected answers to {name} in {self.out}, got another text in row {done}. "
                    f"Pass another --out, or remove the file."
                )
        self.part = {row: record for row, record in self.part.items() if row >= done}
        return done

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of OUT, or none if OUT does not exist.

        Raises:
            DataError: If OUT was not written by this command, or was changed since.
        """
        if not self.out.exists() or not self.out.stat().st_size:
            return
        is_csv = self.out.suffix.lower() == ".csv"
        for i, row in enumerate(read_rows(self.out), start=1):
            if tuple(row) != FIELDS if is_csv else not row.keys() >= set(FIELDS):
                raise DataError(
                    f"Expected the columns {', '.join(FIELDS)} in this order in {self.out}, got {', '.join(row)} in "
                    f"row {i}. Pass another --out, or restore the file."
                )
            try:
                yield _typed(row) if is_csv else row
            except ValueError as error:
                raise DataError(
                    f"Cannot read row {i} of {self.out}: {error}. Pass another --out, or restore the file."
                ) from error

    def _restore(self) -> None:
        """Read OUT.part, and truncate OUT to its size when OUT.part was written."""
        self._put_in_place()
        if not self.part_file.exists():
            return
        lines = self.part_file.read_bytes().split(b"\n")[:-1]  # a kill may have cut the last line
        if not lines:
            self.part_file.unlink()
            return
        try:
            size = int(json.loads(lines[0])["out_size"])
            self.part = {int(record["row"]): record for record in map(json.loads, lines[1:])}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Cannot read the damaged file {self.part_file}: {error}. Remove it to answer its rows again."
            ) from error
        there = self.out.stat().st_size if self.out.exists() else 0
        if size and not there:  # OUT.part belongs to an OUT that was removed
            self.part = {}
            self.part_file.unlink()
            return
        if there < size:
            raise DataError(
                f"Expected at least {size} bytes in {self.out}, got {there}. Restore the file, or remove it."
            )
        if there:
            with self.out.open("rb+") as stream:
                stream.truncate(size)
        self._rewrite()

    def _rewrite(self) -> None:
        """Replace OUT.part atomically with the rows of unfinished steps."""
        self.close()
        size = self.out.stat().st_size if self.out.exists() else 0
        lines = [json.dumps({"out_size": size}), *map(json.dumps, self.part.values())]
        fresh = self.part_file.with_name(self.part_file.name + ".new")
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(fresh, self.part_file)

    def close(self) -> None:
        """Close OUT.part. The next `note` opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def has(self, row: int, text: str) -> bool:
        """Return whether OUT.part has an answer to a row.

        Raises:
            DataError: If the answer belongs to another text.
        """
        if (kept := self.part.get(row)) is None:
            return False
        if kept["text"] != writable(text):
            raise DataError(
                f"Expected answers to the data in {self.part_file}, got another text in row {row + 1}. Pass another "
                f"--out, or remove the file."
            )
        return True

    def note(self, record: dict[str, Any]) -> None:
        """Record one answer in OUT.part, and flush it before the next one arrives."""
        if not self.part:
            self._rewrite()
        self.part[record["row"]] = record
        if self._stream is None:
            self._stream = self.part_file.open("a", encoding="utf-8")
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def finish(self, rows: list[int]) -> None:
        """Move the rows of the first unwritten step from OUT.part to OUT, in order."""
        new = not self.out.exists() or not self.out.stat().st_size
        with self.out.open("a", encoding="utf-8", newline="") as stream:
            stream.write(_lines([self.part.pop(i) for i in rows], self.out.suffix.lower(), header=new))
        self._tidy()

    def withdraw(self, rows: Iterable[int]) -> None:
        """Remove answers from OUT.part, so that the rows are answered again."""
        for row in rows:
            self.part.pop(row, None)
        self._tidy()

    def _tidy(self) -> None:
        if self.part:
            self._rewrite()
        else:
            self.close()
            self.part_file.unlink(missing_ok=True)

    def beside(self) -> Journal:
        """Return the journal of retried rows, which `mend` merges into OUT."""
        return Journal(self.out.with_name(self.out.name + ".retried.jsonl"))

    def mend(self) -> None:
        """Merge the retried answers into OUT, and remove their journal.

        OUT.part must be empty. OUT is never half written: the merged file is completed first, and then the rename of
        the retried journal commits it.
        """
        beside = self.beside()
        beside._restore()
        if beside.part:
            beside.finish(sorted(beside.part))
        if not beside.out.exists():
            return
        others, fresh, header = beside.rows(), self._fresh(), True
        other = next(others, None)
        with fresh.open("w", encoding="utf-8", newline="") as stream:
            for row in self.rows():
                while other is not None and other["row"] < row["row"]:
                    other = next(others, None)
                answers = other is not None and other["row"] == row["row"] and other["text"] == row["text"]
                mended = other if answers and is_failed(row) else row
                stream.write(_lines([mended or row], self.out.suffix.lower(), header=header))
                header = False
        shutil.copymode(self.out, fresh)
        os.replace(beside.out, self._used())
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Complete a merge that was committed and then interrupted."""
        if self._used().exists():
            if self._fresh().exists():
                os.replace(self._fresh(), self.out.resolve())
            self._used().unlink()

    def _fresh(self) -> Path:
        there = self.out.resolve()  # replace the target of a symbolic link, not the link
        return there.with_name(there.name + ".new")

    def _used(self) -> Path:
        return self.out.with_name(self.out.name + ".retried")

    def sums(self) -> dict[str, Any]:
        """Return counts, the deferral rate and the cost over the whole of OUT."""
        rows = large = failed = 0
        cost: float | None = 0.0
        for record in self.rows():
            rows += 1
            asked = record["route"] == "large" or record["reason"] == "large_error"
            large += asked
            failed += is_failed(record)
            value = record["cost_usd"]
            known = value is not None  # the total is unknown if the cost of one deferred row is
            cost = cost + float(value) if known and cost is not None else (None if asked else cost)
        return {
            "rows": rows,
            "asked": large,
            "deferral_rate": round(large / rows, 6) if rows else 0.0,
            "failed": failed,
            "cost_usd": cost,
        }


def _lines(records: list[dict[str, Any]], suffix: str, *, header: bool) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(record) + "\n" for record in records)
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    if header:
        writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Convert the numbers of a CSV row, and empty cells other than the text to None."""
    return {
        name: None if value == "" and name != "text" else _NUMBERS.get(name, str)(value) for name, value in row.items()
    }
