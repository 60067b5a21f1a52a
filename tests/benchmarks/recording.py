"""What recording costs: microseconds on the caller's path, records a second, bytes a record.

    python -m tests.benchmarks.recording [--records N]

Records have a 400-character input, a 200-character answer and 20 probabilities, all different; SQLite with
synchronous=FULL, groups of 512.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from langchain_datashunt.data.benchmark_task import load_messages
from langchain_datashunt.distillation import DistillationStore, Recorder, RoutedCall

LABELS = tuple(f"label_{i}" for i in range(20))


def made(n: int) -> list[RoutedCall]:
    """Different records of natural text."""
    task, rng = load_messages(), random.Random(0)
    sentences = [*task.train.texts, *task.dev.texts, *task.test.texts]

    def text(length: int) -> str:
        return " ".join(rng.choices(sentences, k=12))[:length]

    return [
        RoutedCall(
            input=f"{i} {text(395)}",
            raw_output=text(200),
            labels=LABELS,
            probabilities=(0.05,) * 20,
            small_model="small",
            large_model="gpt-4",
            score=0.5,
            threshold=0.9,
            policy="Threshold(threshold=0.9, score=MaxProbability())",
            input_tokens=100,
            output_tokens=50,
            cost_usd=0.01,
        )
        for i in range(n)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=60_000)
    n = parser.parse_args().records
    records = made(n)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.db"
        with DistillationStore(file, durability="record") as store:
            started = time.perf_counter()
            for start in range(0, n, 512):
                store.append(records[start : start + 512])
            seconds = time.perf_counter() - started
        size = file.stat().st_size
        with Recorder(Path(folder) / "caller.db") as recorder:
            makers: list[Callable[[], RoutedCall]] = [lambda record=record: record for record in records[:2000]]  # type: ignore[misc]
            started = time.perf_counter()
            for maker in makers:
                recorder.record([maker])
            caller = (time.perf_counter() - started) / len(makers)
    figures = {
        "records": n,
        "records_per_second": round(n / seconds),
        "bytes_per_record": round(size / n, 1),
        "caller_us": round(1e6 * caller, 2),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
