"""`datashunt run`: answer every row of a file, in constant memory, and go on after a kill where it stopped.

Finished rows stand in OUT in the order of the data. Rows of the steps that are under way are written to OUT.part as
they are answered, so that a kill loses only calls that had not returned; a finished step is appended to OUT.
"""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self, TextIO, cast

from langchain_datashunt._extras import require
from langchain_datashunt.cli.output import progress
from langchain_datashunt.data.reading import cell, read_rows, require_columns
from langchain_datashunt.decisions import ShuntResult
from langchain_datashunt.exceptions import ConfigurationError, DataError
from langchain_datashunt.policies import Policy, Threshold
from langchain_datashunt.pruning import NoHint, Pruning, SoftPrompt, TopHint
from langchain_datashunt.replay import ChatServer, RecordedAnswers
from langchain_datashunt.router_chain import ConfidenceRouterChain
from langchain_datashunt.small_models import load_small_model

FIELDS = ("row", "text", "answer", "route", "reason", "confidence", "cost_usd", "error")
STEPS_AT_ONCE = 3
"""One whose small model computes, and two whose large calls are waited for."""

PRUNINGS: dict[str, type[Pruning]] = {"soft": SoftPrompt, "top": TopHint, "none": NoHint}


@contextmanager
def large_model(spec: str, **settings: Any) -> Iterator[Any]:
    """The chat model of `openai:MODEL`, or a local server that replays `replay:FILE`.

    Raises:
        ConfigurationError: It is neither.
    """
    kind, _, name = spec.partition(":")
    if kind == "openai" and name:
        made = require("langchain_openai", "openai").ChatOpenAI
        try:
            model = made(model=name, max_retries=0, **settings)
        except Exception as error:  # of the client, mostly that it has no key
            raise ConfigurationError(f"--large {spec!r} cannot be used: {error}") from error
        yield model
    elif kind == "replay" and name:
        with ChatServer(RecordedAnswers.load(name)) as server:
            yield server.chat_model(**settings)
    else:
        raise ConfigurationError(f"--large {spec!r} is not known; use openai:MODEL or replay:FILE.")


def run_file(
    bundle: Path,
    large: str,
    data: Path,
    text: str,
    out: Path,
    *,
    threshold: float | None,
    pruning: str,
    on_large_error: str,
    concurrency: int,
    chunk: int,
    store: str | None = None,
    task: str = "default",
    computed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer what is not answered yet; returns the sums over the whole of OUT, JSON-ready.

    Raises:
        ShuntError: The bundle, the data, the large model or OUT cannot be used; nothing has been lost.
    """
    if pruning not in PRUNINGS or on_large_error not in ("raise", "small"):
        raise ConfigurationError("--pruning takes soft, top or none; --on-large-error takes raise or small.")
    require_columns(data, text)
    n = 0
    for n, row in enumerate(read_rows(data), start=1):
        cell(data, n, row, text)
    policy: Policy | None = None if threshold is None else Threshold(threshold)
    started = time.perf_counter()
    with (
        Journal(out).alone() as journal,
        large_model(large) as chat_model,
        _recorder(store, task) as recorder,
        progress() as bar,
    ):
        done = journal.resume(data, text)
        answered = done + len(journal.part)
        small = load_small_model(bundle, **(computed or {}))
        chain = ConfidenceRouterChain.from_models(
            small,
            chat_model,
            pruning=PRUNINGS[pruning]() if small.has_opinion else NoHint(),
            policy=policy,
            answer_format="text",
            on_large_error=cast(Literal["raise", "small"], on_large_error),
            max_concurrency=concurrency,
            return_decision=True,
            recorder=recorder,
        )
        rows_done = bar.add_task("rows", total=n, completed=done)
        rows = itertools.islice(enumerate(read_rows(data)), done, None)
        texts = ((i, str(row[text])) for i, row in rows)
        asyncio.run(_answer_all(chain, texts, chunk, journal, partial(bar.advance, rows_done)))
        return {**journal.sums(), "resumed_at": answered, "seconds": round(time.perf_counter() - started, 2)}


@contextmanager
def _recorder(store: str | None, task: str) -> Iterator[Any]:
    """A recorder on the store that was given, or none."""
    if store is None:
        yield None
        return
    from langchain_datashunt.distillation import Recorder

    with Recorder(store, task=task, sample_small=1.0) as recorder:
        yield recorder


async def _answer_all(
    chain: ConfidenceRouterChain,
    texts: Iterator[tuple[int, str]],
    chunk: int,
    journal: Journal,
    advance: Callable[[int], None],
) -> None:
    """Answer the rows that the journal has not, noting each as soon as it is there.

    Steps overlap: while large calls of one are waited for, the small model computes the next.
    """

    async def answer(step: dict[int, str]) -> None:
        todo = [i for i, text in step.items() if not journal.has(i, text)]
        advance(len(step) - len(todo))
        inputs = [step[i] for i in todo]
        async for position, result in chain.abatch_as_completed(inputs, return_exceptions=True):
            journal.note(_record(todo[position], inputs[position], result))
            advance(1)

    under_way: deque[tuple[list[int], asyncio.Task[None]]] = deque()
    try:
        while True:
            while len(under_way) < STEPS_AT_ONCE and (step := dict(itertools.islice(texts, chunk))):
                under_way.append((list(step), asyncio.create_task(answer(step))))
            if not under_way:
                return
            await under_way[0][1]
            journal.finish(under_way.popleft()[0])
    finally:
        tasks = [task for _, task in under_way]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        journal.close()


def _record(row: int, text: str, result: Any) -> dict[str, Any]:
    if isinstance(result, ShuntResult):
        confidence = None if result.prediction is None else round(result.prediction.confidence, 6)
        values = (
            row,
            text,
            result.output,
            result.route,
            result.reason,
            confidence,
            result.cost_usd,
            result.decision.error,
        )
    else:
        values = (row, text, None, "large", "large_error", None, None, f"{type(result).__name__}: {result}")
    written = (_writable(value) if isinstance(value, str) else value for value in values)
    return dict(zip(FIELDS, written, strict=True))


def _writable(text: str) -> str:
    """The same without halves of characters that no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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

    def resume(self, data: Path, text: str) -> int:
        """How many rows are finished. Whatever a kill left half written is put right.

        Raises:
            DataError: OUT belongs to other data, or cannot be gone on with.
        """
        self._restore()
        done = 0
        rows = read_rows(self.out) if self.out.exists() and self.out.stat().st_size else iter(())
        for done, (row, mine) in enumerate(zip_longest(rows, read_rows(data)), start=1):
            if row is None:
                done -= 1
                break
            if missing := [name for name in ("row", "text") if name not in row]:
                raise DataError(
                    f"{self.out} is none of this command: it has no column {missing[0]!r}. Give another --out."
                )
            if mine is None or _writable(str(mine[text])) != str(row["text"]):
                raise DataError(
                    f"{self.out} has answers that do not belong to {data.name} (row {done} has another text). "
                    f"Give another --out, or remove the file."
                )
        self.part = {row: record for row, record in self.part.items() if row >= done}
        return done

    def _restore(self) -> None:
        """Read OUT.part, and cut OUT back to what it was when that step began."""
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
        if kept["text"] != _writable(text):
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
        if self.part:
            self._rewrite()
        else:
            self.close()
            self.part_file.unlink()

    def sums(self) -> dict[str, Any]:
        """Counts, shares and cost over the whole of OUT."""
        rows = large = failed = 0
        cost: float | None = 0.0
        for record in read_rows(self.out) if self.out.exists() else ():
            rows += 1
            asked = record["route"] == "large" or record["reason"] == "large_error"
            large += asked
            failed += record["answer"] in (None, "") and bool(record["error"])
            value = record["cost_usd"]
            known = value not in (None, "")
            cost = cost + float(value) if known and cost is not None else (None if asked else cost)
        return {
            "rows": rows,
            "asked": large,
            "query_share": round(large / rows, 6) if rows else 0.0,
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
