"""Cost of recording calls, and memory use of a large call log.

    python -m tests.benchmarks.recording [--records N] [--large N] [--json F]

Records have an input of 400 characters, an answer of 200 characters and 20 probabilities, all different. SQLite uses
synchronous=FULL and groups of 32,768 records, the size that the recorder uses if records arrive faster than the disk
writes them. For comparison, the same texts are inserted into a bare table without an index, and the recorder writes
while another thread computes. With --large, a log of that many records is written. A fresh process then reads its
statistics and exports it, and its resident memory before and at the peak is reported.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from langchain_datashunt.call_log import CallLog, CallRecord, Recorder
from langchain_datashunt.call_log.export import export
from langchain_datashunt.cli.demo.benchmark_task import load_messages
from tests.benchmarks.memory import peak_mib

LABELS = tuple(f"label_{i}" for i in range(20))
GROUP = 32_768
ROUNDS = 5


def made(n: int, seed: int = 0) -> list[CallRecord]:
    """Return different records of natural text."""
    return list(stream(n, seed))


def stream(n: int, seed: int = 0) -> Iterator[CallRecord]:
    """Yield such records one by one."""
    task, rng = load_messages(), random.Random(seed)
    sentences = [*task.train.texts, *task.dev.texts, *task.test.texts]

    def text(length: int) -> str:
        return " ".join(rng.choices(sentences, k=12))[:length]

    for i in range(n):
        yield CallRecord(
            input=f"{seed} {i} {text(390)}",
            answer=text(200),
            labels=LABELS,
            probabilities=(0.05,) * 20,
            small_model="small",
            large_model="gpt-4",
            score=0.5,
            threshold=0.9,
            policy="Threshold(threshold=0.9, score=MaxProbability())",
            answer_label=LABELS[i % 20],
            input_tokens=100,
            output_tokens=50,
            cost_usd=0.01,
        )


def written(file: Path, records: list[CallRecord]) -> tuple[float, float]:
    """Return the records written per second, and the bytes per record."""
    with CallLog(file, durability="record") as store:
        started = time.perf_counter()
        for start in range(0, len(records), GROUP):
            store.append(records[start : start + GROUP])
        seconds = time.perf_counter() - started
    return len(records) / seconds, file.stat().st_size / len(records)


def plainly_inserted(file: Path, records: list[CallRecord]) -> float:
    """Return the records per second of the simplest SQLite table, with plain values and no index."""
    connection = sqlite3.connect(file, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(
        "CREATE TABLE calls (id INTEGER PRIMARY KEY, input TEXT, output TEXT, p BLOB, label TEXT, time REAL)"
    )
    started = time.perf_counter()
    for start in range(0, len(records), GROUP):
        group = records[start : start + GROUP]
        rows = [(r.input, r.answer, array("f", r.probabilities or ()).tobytes(), r.answer_label, r.time) for r in group]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO calls (input, output, p, label, time) VALUES (?, ?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return len(records) / seconds


def on_the_callers_path(file: Path, records: list[CallRecord]) -> float:
    """Return the seconds per call of `Recorder.record` in the calling thread."""
    with Recorder(file) as recorder:
        makers: list[Callable[[], CallRecord]] = [lambda record=record: record for record in records]  # type: ignore[misc]
        started = time.perf_counter()
        for maker in makers:
            recorder.record([maker])
        return (time.perf_counter() - started) / len(makers)


def beside_a_busy_thread(file: Path, records: list[CallRecord]) -> float:
    """Return the records per second of the writer while this thread computes without a pause."""
    with CallLog(file, durability="record") as store, Recorder(store) as recorder:
        makers: list[Callable[[], CallRecord]] = [lambda record=record: record for record in records]  # type: ignore[misc]
        started = time.perf_counter()
        for start in range(0, len(makers), 64):
            recorder.record(makers[start : start + 64])
        while recorder.counters.written < len(records):
            sum(range(1000))
        return len(records) / (time.perf_counter() - started)


def read_large(file: Path, out: Path) -> dict[str, Any]:
    """Read the statistics of a log and export it, and return the memory used. This runs in its own process."""
    figures: dict[str, Any] = {}
    with CallLog(file) as store:
        next(store.iterate(batch_size=10))
        figures["mib_before"] = round(peak_mib(), 1)
        steps: dict[str, Callable[[], Any]] = {
            "stats": store.stats,
            "jsonl": lambda: export(store, out / "calls.jsonl"),
            "parquet": lambda: export(store, out / "calls.parquet"),
        }
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            figures[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
            figures[f"mib_after_{name}"] = round(peak_mib(), 1)
    return figures


def large_store(n: int, folder: Path) -> dict[str, Any]:
    """Write a large log in this process, and read it in another one."""
    file, seconds = folder / "large.db", 0.0
    with CallLog(file, durability="record") as store:
        coming = stream(n, seed=1)
        while group := list(islice(coming, GROUP)):
            started = time.perf_counter()
            store.append(group)
            seconds += time.perf_counter() - started
    figures = {"records": n, "records_per_second": round(n / seconds), "bytes_per_record": file.stat().st_size / n}
    command = [sys.executable, "-m", "tests.benchmarks.recording", "--read", str(file)]
    return {**figures, **json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=65_536)
    parser.add_argument("--large", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read is not None:
        print(json.dumps(read_large(asked.read, asked.read.parent)))
        return
    records = made(asked.records)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds, plain = [], []
        for i in range(ROUNDS):
            rounds.append(written(folder / f"{i}.db", records))
            plain.append(plainly_inserted(folder / f"plain{i}.db", records))
        caller = statistics.median(on_the_callers_path(folder / f"c{i}.db", records[:2000]) for i in range(ROUNDS))
        busy = statistics.median(beside_a_busy_thread(folder / f"b{i}.db", records) for i in range(ROUNDS))
        figures: dict[str, Any] = {
            "records": asked.records,
            "records_per_second": round(statistics.median(rate for rate, _ in rounds)),
            "records_per_second_best": round(max(rate for rate, _ in rounds)),
            "plain_insert_records_per_second": round(statistics.median(plain)),
            "share_of_plain_insert": round(
                statistics.median(own / other for (own, _), other in zip(rounds, plain, strict=True)), 3
            ),
            "records_per_second_beside_a_busy_thread": round(busy),
            "bytes_per_record": round(rounds[0][1], 1),
            "caller_us": round(1e6 * caller, 2),
        }
        if asked.large:
            figures["large"] = large_store(asked.large, folder)
    print(json.dumps(figures, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
