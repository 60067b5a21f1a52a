"""Time and memory of selecting and scoring a threshold on many rows.

    python -m tests.benchmarks.selection [--rows N] [--labels K] [--json F]

The predictions are synthetic, over K labels. Reported are the peak resident memory of the process and the size of the
rows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt.calibration import MaxAccuracy, RiskControl, select_threshold
from langchain_datashunt.evaluation import evaluate
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.prediction import PredictionBatch
from tests.benchmarks.memory import peak_mib


def made(n: int, k: int) -> tuple[PredictionBatch, list[str], list[str]]:
    """Return predictions, true labels, and large answers that are correct for 83% of the rows."""
    rng, names = np.random.default_rng(0), [f"label_{i}" for i in range(k)]
    truth = rng.integers(k, size=n)
    logits = rng.standard_normal((n, k), dtype=np.float32).astype(np.float64)
    logits[np.arange(n), truth] += rng.normal(4.0, 2.0, n)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    large = np.where(rng.random(n) < 0.83, truth, rng.integers(k, size=n))
    return PredictionBatch(tuple(names), p), [names[i] for i in truth], [names[i] for i in large]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=77)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batch, truth, large = made(options.rows, options.labels)
    result: dict[str, Any] = {
        "rows": options.rows,
        "labels": options.labels,
        "gib_with_rows": round(peak_mib() / 1024, 2),
    }

    def timed(name: str, step: Any) -> Any:
        started = time.perf_counter()
        found = step()
        result[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
        result[f"{name}_peak_gib"] = round(peak_mib() / 1024, 2)
        return found

    timed("select", lambda: select_threshold(batch, truth, large=large, objective=MaxAccuracy()))
    timed("risk", lambda: select_threshold(batch, truth, objective=RiskControl(alpha=0.05)))
    fusion = timed("fit_fusion", lambda: AnswerFusion.fit(batch.labels, truth, large))
    choice = timed("select_fused", lambda: select_threshold(batch, truth, large=large, fusion=fusion))
    timed("evaluate", lambda: evaluate(batch, truth, choice.policy, large=large, fusion=fusion, large_cost=0.001))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
