"""Overhead of ShuntRunnable and of RunnableBranch over the Runnables that they call.

    python -m tests.benchmarks.overhead [--json F] [--rounds N]

Both routers use the same trivial parts: a small model (a RunnableLambda that returns a ready prediction), a condition
on its confidence, and a large model (a RunnableLambda). Both pass the input on unchanged (`pruning=None`). Separate
rows show the additional cost of the prompt variables of `SoftPruning`. "Over its parts" is the time of the router minus
that of the Runnables that it calls for the input, called alone in the same round. Rounds are interleaved. Reported are
medians over rounds in microseconds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableBranch, RunnableLambda

from langchain_datashunt import Prediction, ShuntRunnable, SoftPruning, Threshold

SURE = Prediction.from_probabilities({"a": 0.95, "b": 0.05})
UNSURE = Prediction.from_probabilities({"a": 0.6, "b": 0.4})
BATCH = 1000


def parts() -> dict[str, Any]:
    small = RunnableLambda(lambda x: SURE if x else UNSURE)
    answer = RunnableLambda(lambda x: "a")
    large = RunnableLambda(lambda x: "L")
    sure = RunnableLambda(lambda x: (SURE if x else UNSURE).confidence >= 0.9)
    return {
        "small": small,
        "large": large,
        "condition": sure,
        "answer": answer,
        "shunt": ShuntRunnable(small=small, large=large, policy=Threshold(0.9), pruning=None),
        "pruning shunt": ShuntRunnable(small=small, large=large, policy=Threshold(0.9), pruning=SoftPruning()),
        "branch": RunnableBranch((sure, answer), large),
    }


def timed(call: Callable[[], Any], repeat: int) -> float:
    """Return the microseconds per call, averaged over `repeat` calls."""
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat * 1e6


def atimed(call: Callable[[], Any], repeat: int) -> float:
    async def loop() -> float:
        started = time.perf_counter()
        for _ in range(repeat):
            await call()
        return (time.perf_counter() - started) / repeat * 1e6

    return asyncio.run(loop())


def contestants(config: Any) -> dict[str, Callable[[], float]]:
    p = parts()
    inputs = [i % 5 != 0 for i in range(BATCH)]

    def single(name: str, value: bool) -> Callable[[], float]:
        return lambda: timed(lambda: p[name].invoke(value, config), 300)

    def asingle(name: str, value: bool) -> Callable[[], float]:
        return lambda: atimed(lambda: p[name].ainvoke(value, config), 300)

    def batch(name: str) -> Callable[[], float]:
        return lambda: timed(lambda: p[name].batch(inputs, config), 1) / BATCH

    found: dict[str, Callable[[], float]] = {}
    for name in ("small", "large", "condition", "answer", "shunt", "pruning shunt", "branch"):
        for value, word in ((True, "kept"), (False, "deferred")):
            found[f"{name} invoke {word}"] = single(name, value)
            found[f"{name} ainvoke {word}"] = asingle(name, value)
    for name in ("shunt", "branch", "small"):
        found[f"{name} batch"] = batch(name)
    return found


def rows(medians: dict[str, float]) -> list[dict[str, Any]]:
    """Return the overhead of both routers, and the ratio of their total times."""
    found = []
    for way in ("invoke", "ainvoke"):
        for word in ("kept", "deferred"):
            asked = f"{way} {word}"
            shunt_parts = medians[f"small {asked}"] + (medians[f"large {asked}"] if word == "deferred" else 0.0)
            last = "large" if word == "deferred" else "answer"
            branch_parts = medians[f"condition {asked}"] + medians[f"{last} {asked}"]
            shunt, branch = medians[f"shunt {asked}"], medians[f"branch {asked}"]
            found.append(
                {
                    "what": asked,
                    "shunt_us": shunt,
                    "shunt_over_parts_us": shunt - shunt_parts,
                    "branch_us": branch,
                    "branch_over_parts_us": branch - branch_parts,
                    "whole_ratio": shunt / branch,
                }
            )
        soft, plain = (medians[f"{name} {way} deferred"] for name in ("pruning shunt", "shunt"))
        found.append({"what": f"{way} deferred, filling the prompt variables as well", "more_us": soft - plain})
    shunt, branch = medians["shunt batch"], medians["branch batch"]
    found.append(
        {
            "what": f"batch of {BATCH}, an item",
            "shunt_us": shunt,
            "shunt_over_parts_us": shunt - medians["small batch"],
            "branch_us": branch,
            "branch_over_parts_us": None,
            "whole_ratio": shunt / branch,
        }
    )
    return found


def measure(config: Any, rounds: int) -> dict[str, Any]:
    runs = contestants(config)
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    medians = {name: statistics.median(times) for name, times in samples.items()}
    spread = {name: [min(times), statistics.median(times), max(times)] for name, times in samples.items()}
    return {"rows": rows(medians), "us_min_median_max": spread}


def table(title: str, result: dict[str, Any]) -> str:
    lines = [
        f"\n{title}\n",
        "| call | shunt, us | over its parts | RunnableBranch, us | over its parts | shunt / branch |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "more_us" in row:
            lines.append(f"| {row['what']} | +{row['more_us']:.1f} | | | | |")
            continue
        own = row["branch_over_parts_us"]
        lines.append(
            f"| {row['what']} | {row['shunt_us']:.1f} | {row['shunt_over_parts_us']:.1f} | {row['branch_us']:.1f} | "
            f"{'' if own is None else f'{own:.1f}'} | {row['whole_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "no_handler": measure(None, options.rounds),
        "one_handler": measure({"callbacks": [BaseCallbackHandler()]}, options.rounds),
        "python": platform.python_version(),
        "langchain_core": version("langchain-core"),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    print(table("No callback handler", result["no_handler"]))
    print(table("One callback handler", result["one_handler"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
