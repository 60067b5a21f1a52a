"""Records lost when the process is killed, or when the database is unreachable.

    python -m tests.benchmarks.durability [--json F] [--repetitions N] [--outage SECONDS]

Kill: a process answers 200 concurrent calls at a time through a shunt that records to a SQLite file, and prints each
call that has returned. It is killed at a random moment. Then the file is opened and the missing records are counted.
Outage: a proxy between the recorder and PostgreSQL is cut under load and restored. Lost records and the latency of
calls before, during and after the outage are measured. The server keeps running.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import create_engine, text

from langchain_datashunt import ShuntRunnable
from langchain_datashunt.call_log import CallLog, Recorder
from tests.support.models import WordModel

POSTGRES = os.environ.get("DATASHUNT_TEST_POSTGRES", "postgresql+psycopg://127.0.0.1:5432/test")
CLIENTS = 200

PROGRAM = """
import asyncio, itertools, sys
from langchain_core.runnables import RunnableLambda
from langchain_datashunt import ShuntRunnable
from langchain_datashunt.call_log import Recorder
from tests.support.models import WordModel

async def large(asked):
    await asyncio.sleep(0.005)
    return asked["input"]

async def main():
    recorder = Recorder(sys.argv[1], durability=sys.argv[2])
    shunt = ShuntRunnable(small=WordModel(), large=RunnableLambda(str, afunc=large), recorder=recorder)
    numbers = itertools.count()
    async def client():
        while True:
            i = next(numbers)
            await shunt.ainvoke(f"question {i}")
            sys.stdout.write(f"{i}\\n")
            sys.stdout.flush()
    print("ready", flush=True)
    await asyncio.gather(*(client() for _ in range(int(sys.argv[3]))))

asyncio.run(main())
"""


def killed_once(durability: str, rng: random.Random, folder: Path) -> dict[str, int]:
    """Kill a process at a random moment, and count the returned calls, the missing records and the damaged ones."""
    url = folder / f"{uuid4().hex}.db"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(url), durability, str(CLIENTS)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    threading.Timer(rng.uniform(0.3, 2.0), process.kill).start()
    returned = {int(line) for line in process.stdout if line.endswith("\n")}
    process.wait()
    with CallLog(url) as store:
        stored = {int(call.input.split()[1]) for batch in store.iterate() for call in batch}
        problems = store.verify()
    return {"returned": len(returned), "missing": len(returned - stored), "damaged": len(problems)}


class Proxy:
    """TCP proxy on the loopback interface that can be interrupted."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.server = socket.create_server(("127.0.0.1", 0))
        self.open: list[socket.socket] = []
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> int:
        return int(self.server.getsockname()[1])

    def _accept(self) -> None:
        while True:
            client, _ = self.server.accept()
            if self.is_cut:
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", self.port))
            self.open += [client, upstream]
            for a, b in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        finally:
            a.close()
            b.close()

    def cut(self) -> None:
        self.is_cut = True
        for one in self.open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.open = []

    def restore(self) -> None:
        self.is_cut = False


def outage(seconds: float, folder: Path) -> dict[str, Any]:
    """Interrupt the connection to PostgreSQL under load, and measure lost records and latencies."""
    engine, schema = create_engine(POSTGRES), f"datashunt_{uuid4().hex[:12]}"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    proxy = Proxy(5432)
    url = f"postgresql+psycopg://127.0.0.1:{proxy.address}/test?options=-csearch_path%3D{schema}&connect_timeout=3"
    recorder = Recorder(url, spool=folder / "spool.db", retry_seconds=1.0)
    shunt = ShuntRunnable(small=WordModel(), large=_answer, recorder=recorder)
    latencies: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    asked = 0
    gc.collect()
    gc.freeze()  # a full collection scans all imported modules and can delay a call by 100 ms
    try:
        for phase, length in (("before", 3.0), ("during", seconds), ("after", 3.0)):
            (proxy.cut if phase == "during" else proxy.restore)()
            until = time.monotonic() + length
            while time.monotonic() < until:
                started = time.perf_counter()
                shunt.invoke(f"question {asked}")
                latencies[phase].append(time.perf_counter() - started)
                asked += 1
                time.sleep(0.004)
        restored = time.monotonic()
        recorder.flush()
        while time.monotonic() - restored < 60:
            counters = recorder.counters
            if counters.drained >= counters.spooled:
                break
            time.sleep(0.1)
        drained_after = time.monotonic() - restored
        with CallLog(f"{POSTGRES}?options=-csearch_path%3D{schema}") as store:
            stored, problems = store.count(), len(store.verify())
        counters = recorder.counters
    finally:
        gc.unfreeze()
        recorder.close()
        with engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        engine.dispose()
    return {
        "seconds": seconds,
        "calls": asked,
        "lost": asked - stored,
        "damaged": problems,
        "spooled": counters.spooled,
        "failed": counters.failed,
        "drained_after_s": round(drained_after, 2),
        **{f"p50_ms_{phase}": round(1e3 * statistics.median(times), 3) for phase, times in latencies.items()},
        **{f"max_ms_{phase}": round(1e3 * max(times), 3) for phase, times in latencies.items()},
        "stated_wait_ms": recorder.max_wait_ms,
    }


def _answer(asked: dict[str, Any]) -> str:
    return str(asked["input"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--outage", type=float, default=30.0)
    options = parser.parse_args()
    rng, result = random.Random(0), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for durability in ("record", "group"):
            runs = [killed_once(durability, rng, folder) for _ in range(options.repetitions)]
            result[f"kill_{durability}"] = {
                "repetitions": len(runs),
                "returned": sum(run["returned"] for run in runs),
                "missing": sum(run["missing"] for run in runs),
                "most_missing_in_one": max(run["missing"] for run in runs),
                "damaged": sum(run["damaged"] for run in runs),
            }
        result["outage"] = outage(options.outage, folder)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
