"""Soak test with many clients and faults, for memory leaks, lost records and mixed-up answers.

    python -m tests.benchmarks.soak [--minutes 10] [--clients 500] [--json F]

Concurrent clients call one `ConfidenceRouterChain`, each with its own texts and one call at a time. A TextCNN trained
on the demo messages answers locally if it is confident. Otherwise `ChatOpenAI` calls a local HTTP server in another
process. The server sometimes fails with 429, 500, a truncated reply, an HTML page, an answer that is not a label, or a
reply after two seconds. All calls are recorded in a SQLite file, a privacy guard replaces addresses, and the small
model answers if the large model fails finally.

The cache of the database is kept small, so that filling it is not mistaken for a leak.

Reported are the answers that belong to another text, the calls that raised, the missing records, the growth of memory
after the first fifth of the time (MB per minute, by a line fitted to one sample per second), and the latency of the
small route.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import psutil
from sqlalchemy import event

from langchain_datashunt import ConfidenceRouterChain, PrivacyGuard, Retry, Threshold
from langchain_datashunt.call_log import CallLog, Recorder
from langchain_datashunt.cli.demo.benchmark_task import load_messages
from langchain_datashunt.large_models import CircuitBreaker
from langchain_datashunt.prediction import Reason
from langchain_datashunt.small_models import SmallModel, TextCNN, TrainingSettings

FAULTS = {"429": 0.03, "500": 0.02, "malformed": 0.01, "html": 0.01, "wrong": 0.01, "timeout": 0.002}
LABELS = tuple(load_messages().labels)


def right_answer(text: str) -> str:
    """Return the label of a text. Any other answer of the large model belongs to another text."""
    return LABELS[hashlib.sha256(text.encode()).digest()[0] % len(LABELS)]


def serve(pipe: Connection) -> None:
    """Serve the large model, which answers each text with its label and fails at the rates in `FAULTS`."""
    from tests.support.faulty_server import FaultyServer

    rng = np.random.default_rng(0)
    names, shares = list(FAULTS), np.cumsum(list(FAULTS.values()))

    def answer(messages: Any) -> str:
        text = next(message["content"] for message in messages if message["role"] == "user")
        return right_answer(text)

    def plan(number: int, body: Any) -> str | None:
        place = int(np.searchsorted(shares, rng.random()))
        return names[place] if place < len(names) else None

    with FaultyServer(answer, plan, hang=2.0) as server:
        pipe.send(server.base_url)
        pipe.recv()


class Soak:
    """Clients with their counters."""

    def __init__(self, chain: ConfidenceRouterChain, small: SmallModel, texts: list[str]) -> None:
        self.chain, self.texts = chain, texts
        self.own = small.predict_batch([self.about(text, 0) for text in texts]).label_names()
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.number = 0

    @staticmethod
    def about(text: str, number: int) -> str:
        """Return a unique text that is equivalent for the small model, because it does not know the added words."""
        return f"{text} (case x{number}x, user{number}q@example.com)"

    async def client(self, until: float) -> None:
        while time.monotonic() < until:
            self.number += 1
            base = self.number % len(self.texts)
            text, number = self.about(self.texts[base], self.number), self.number
            started = time.perf_counter()
            try:
                result = await self.chain.ainvoke(text)
            except Exception as error:
                self.counts[f"raised {type(error).__name__}"] += 1
                continue
            self.counts[result.reason] += 1
            if result.route == "small" and result.reason == "confident":
                self.latencies.append(time.perf_counter() - started)
            sent = text.replace(f"user{number}q@example.com", "<EMAIL_1>")
            expected = right_answer(sent) if result.route == "large" else self.own[base]
            self.counts["mixed"] += result.output != expected

    async def memory(self, until: float, samples: list[tuple[float, float]]) -> None:
        process, started = psutil.Process(), time.monotonic()
        while time.monotonic() < until:
            samples.append((time.monotonic() - started, process.memory_info().rss / 2**20))
            await asyncio.sleep(1.0)


def store_without_cache(file: Path) -> CallLog:
    """Return a log with a database cache of 2 MiB instead of 64, because filling it would look like a leak."""
    store = CallLog(file)
    event.listen(store.engine, "connect", lambda connection, _: connection.execute("PRAGMA cache_size=-2048"))
    store.engine.dispose()
    return store


async def run(minutes: float, clients: int, folder: Path, url: str) -> dict[str, Any]:
    task = load_messages()
    quiet = TrainingSettings(progress=False, epochs=15)
    small = TextCNN.train(task.train.texts, task.train.labels, settings=quiet, label_set=LABELS)
    from langchain_openai import ChatOpenAI

    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=30.0) as client:
        model = ChatOpenAI(
            base_url=url, api_key="none", model="gpt-4", max_retries=0, timeout=10.0, http_async_client=client
        )  # type: ignore[arg-type, call-arg]
        recorder = Recorder(store_without_cache(folder / "calls.db"), task="soak", sample_small=1.0)
        confidence = small.predict_batch(task.test.texts).confidence
        chain = ConfidenceRouterChain.from_models(
            small, model, policy=Threshold(float(np.quantile(confidence, 0.5))), answer_format="text",
            recorder=recorder, retry=Retry(attempts=3, initial_wait=0.05, jitter=0.05), on_large_error="small",
            return_decision=True, guard=PrivacyGuard(), breaker=CircuitBreaker(failures=50, reset_seconds=1.0),
            max_concurrency=64,
        )  # fmt: skip
        soak, samples = Soak(chain, small, list(task.test.texts)), []  # type: ignore[var-annotated]
        started = time.monotonic()
        until = started + 60.0 * minutes
        await asyncio.gather(soak.memory(until, samples), *(soak.client(until) for _ in range(clients)))
        seconds = time.monotonic() - started
        recorder.close()
    with CallLog(folder / "calls.db") as store:
        stored = int(store.stats()["calls"])
    answered = sum(n for name, n in soak.counts.items() if name in get_args(Reason))
    raised = sum(n for name, n in soak.counts.items() if name.startswith("raised"))
    later = np.array([sample for sample in samples if sample[0] >= 0.2 * seconds])
    slope = float(np.polyfit(later[:, 0], later[:, 1], 1)[0] * 60.0) if len(later) > 2 else float("nan")
    return {
        "clients": clients,
        "minutes": seconds / 60.0,
        "calls": answered + raised,
        "calls_per_second": (answered + raised) / seconds,
        "by_reason": dict(soak.counts),
        "mixed_answers": soak.counts["mixed"],
        "raised": raised,
        "lost_records": answered - stored,
        "failed_records": recorder.counters.failed,
        "memory_mb": {"after_a_fifth": float(later[0, 1]), "at_the_end": float(later[-1, 1]), "mb_per_minute": slope},
        "small_route_ms": {
            name: float(np.quantile(soak.latencies, q) * 1e3)
            for name, q in (("p50", 0.5), ("p99", 0.99))
            if soak.latencies
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(run(options.minutes, options.clients, Path(folder), here.recv()))
    finally:
        here.send("end")
        server.join(timeout=10)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
