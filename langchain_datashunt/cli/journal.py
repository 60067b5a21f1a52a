"""OUT of `datashunt run` with its OUT.part: what is answered, and where to go on after a kill.

Finished rows stand in OUT in the order of the data. Rows of the steps that are under way are written to OUT.part as
they are answered; a finished step is appended to OUT. What failed rows are answered that are asked again stands in
OUT.retried.jsonl until OUT is mended by it.
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
    """Whether a row of OUT has an error and no answer."""
    return record["answer"] in (None, "") and bool(record["error"])


class Journal:
    """OUT with its OUT.part: what is answered, and where to go on."""

    def __init__(self, out: Path) -> None:
        if out.suffix.lower() not in (".jsonl", ".csv"):
            raise ConfigurationError(f"--out {out.name} must end in .jsonl or .csv.")
        self.out = out
        self.part_file = out.with_name(out.name + ".part")
        self.part: dict[int, dict[str, Any]] = {}
        self._stream: TextIO | None = None

    @contextmanager
    def alone(self) -> Iterator[Self]:
        """While it lasts, no other run writes to OUT; a run that is killed leaves it free.

        Raises:
            DataError: Another does already.
        """
        filelock = require("filelock", "cli")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.out.with_name(f".{self.out.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise DataError(
                f"Another run writes to {self.out}. Wait until it is done, or give another --out."
            ) from None
        try:
            yield self
        finally:
            lock.release()

    def resume(self, texts: Iterable[str], name: str) -> int:
        """How many rows are finished. Whatever a kill left half written is put right.

        Args:
            texts: Those of all rows.
            name: What they are called in errors.

        Raises:
            DataError: OUT belongs to other data, or cannot be gone on with.
        """
        self._restore()
        if not self.out.exists():  # what was asked anew for an OUT that was removed goes with it
            for file in (self.beside().out, self.beside().part_file):
                file.unlink(missing_ok=True)
        done = 0
        for done, (row, mine) in enumerate(zip_longest(self.rows(), texts), start=1):
            if row is None:
                done -= 1
                break
            if mine is None or writable(mine) != str(row["text"]):
                raise DataError(
                    f"{self.out} has answers that do not belong to {name} (row {done} has another text). "
                    f"Give another --out, or remove the file."
                )
        self.part = {row: record for row, record in self.part.items() if row >= done}
        return done

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of OUT, one after the other; none where there is no OUT.

        Raises:
            DataError: It was not written by this command, or its columns were changed since.
        """
        if not self.out.exists() or not self.out.stat().st_size:
            return
        is_csv = self.out.suffix.lower() == ".csv"
        for i, row in enumerate(read_rows(self.out), start=1):
            if tuple(row) != FIELDS if is_csv else not row.keys() >= set(FIELDS):
                raise DataError(
                    f"{self.out} is none of this command, or was changed: row {i} has {', '.join(row)}, and "
                    f"{', '.join(FIELDS)} are needed in this order. Give another --out."
                )
            try:
                yield _typed(row) if is_csv else row
            except ValueError as error:
                raise DataError(f"{self.out}, row {i}, was changed: {error}. Give another --out.") from error

    def _restore(self) -> None:
        """Read OUT.part, and cut OUT back to what it was when that step began."""
        self._put_in_place()
        if not self.part_file.exists():
            return
        lines = self.part_file.read_bytes().split(b"\n")[:-1]  # behind the last line end: cut short by a kill
        if not lines:
            self.part_file.unlink()
            return
        try:
            size = int(json.loads(lines[0])["out_size"])
            self.part = {int(record["row"]): record for record in map(json.loads, lines[1:])}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.part_file} is damaged ({error}). Remove it: what it had is asked again.") from error
        there = self.out.stat().st_size if self.out.exists() else 0
        if size and not there:  # OUT was removed, and what was under way after it goes with it
            self.part = {}
            self.part_file.unlink()
            return
        if there < size:
            raise DataError(f"{self.out} is shorter than it was ({there} bytes of {size}). Restore it, or remove it.")
        if there:
            with self.out.open("rb+") as stream:
                stream.truncate(size)
        self._rewrite()

    def _rewrite(self) -> None:
        """Begin OUT.part anew with what is under way; at no time is there a half-written one."""
        self.close()
        size = self.out.stat().st_size if self.out.exists() else 0
        lines = [json.dumps({"out_size": size}), *map(json.dumps, self.part.values())]
        fresh = self.part_file.with_name(self.part_file.name + ".new")
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(fresh, self.part_file)

    def close(self) -> None:
        """Let go of OUT.part; it is opened again when it is needed."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def has(self, row: int, text: str) -> bool:
        """Whether a row is answered.

        Raises:
            DataError: What is kept of it is an answer to another text.
        """
        if (kept := self.part.get(row)) is None:
            return False
        if kept["text"] != writable(text):
            raise DataError(
                f"{self.part_file} has answers that do not belong to the data (row {row + 1} has another text). Give "
                f"another --out, or remove the file."
            )
        return True

    def note(self, record: dict[str, Any]) -> None:
        """Keep one answer, on disk before the next is waited for."""
        if not self.part:
            self._rewrite()
        self.part[record["row"]] = record
        if self._stream is None:
            self._stream = self.part_file.open("a", encoding="utf-8")
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def finish(self, rows: list[int]) -> None:
        """Move a finished step, the first of those under way, from OUT.part to OUT, in order."""
        new = not self.out.exists() or not self.out.stat().st_size
        with self.out.open("a", encoding="utf-8", newline="") as stream:
            stream.write(_lines([self.part.pop(i) for i in rows], self.out.suffix.lower(), header=new))
        self._tidy()

    def withdraw(self, rows: Iterable[int]) -> None:
        """Take answers back that are not finished, so that they are asked again."""
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
        """A journal of rows that are asked anew, until OUT is mended by them."""
        return Journal(self.out.with_name(self.out.name + ".retried.jsonl"))

    def mend(self) -> None:
        """Put what failed rows were answered meanwhile, in the journal beside, in their place, and remove that journal.

        Nothing may be under way in this one. At no time is OUT half new: once the new one is whole, the file beside it
        is renamed, which says that it counts.
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
        """Go on where `mend` was cut, if it was."""
        if self._used().exists():
            if self._fresh().exists():
                os.replace(self._fresh(), self.out.resolve())
            self._used().unlink()

    def _fresh(self) -> Path:
        there = self.out.resolve()  # where it is a link, the file that it names is mended
        return there.with_name(there.name + ".new")

    def _used(self) -> Path:
        return self.out.with_name(self.out.name + ".retried")

    def sums(self) -> dict[str, Any]:
        """Counts, shares and cost over the whole of OUT."""
        rows = large = failed = 0
        cost: float | None = 0.0
        for record in self.rows():
            rows += 1
            asked = record["route"] == "large" or record["reason"] == "large_error"
            large += asked
            failed += is_failed(record)
            value = record["cost_usd"]
            known = value is not None
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
    """A row of a CSV file with its numbers as such, and None for what is empty but the text."""
    return {
        name: None if value == "" and name != "text" else _NUMBERS.get(name, str)(value) for name, value in row.items()
    }
