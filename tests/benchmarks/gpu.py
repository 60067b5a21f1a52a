"""Speed of a small model on a GPU: throughput in half precision, and latency of single requests.

    python -m tests.benchmarks.gpu [--json F] [--device cuda] [--texts N] [--rounds N]

P12 compares two times: texts of 128 tokens through `batch`, including tokenization, and the matrix products of the same
linear layers alone. The products of attention are not counted, so the reported share is a lower bound. Single requests
by `invoke` are measured with transformers ("auto" on a GPU) and with the padding-free encoder. Rounds are interleaved,
and figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from langchain_datashunt import TransformersClassifier
from langchain_datashunt.small_models.kinds.encoder import bundled_encoder_path
from tests.benchmarks.encoder import short_texts

TOKENS = 128


def texts_of(tokens: int, n: int) -> list[str]:
    """Return different texts of `tokens` tokens each: one-token words between the two special tokens."""
    words = ["card", "money", "bank", "account", "transfer", "payment", "when", "where", "lost", "new"]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, tokens - 2)) for _ in range(n)]


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the seconds until the device has finished the work."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def products(config: Any, tokens: int, device: str) -> Callable[[], None]:
    """Return a function that computes the products of the encoder's linear layers, in batches of the engine's size."""
    d, inner, step = config.hidden_size, config.intermediate_size, min(tokens, 65_536)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    inputs = {size: torch.randn(step, size, **given) for size in (d, inner)}
    weights = [torch.randn(rows, columns, **given) for rows, columns in ((3 * d, d), (d, d), (inner, d), (d, inner))]

    def work() -> None:
        for start in range(0, tokens, step):
            n = min(step, tokens - start)
            for _ in range(config.num_hidden_layers):
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]][:n], weight)

    return work


def measure(device: str, n: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return all figures of one device."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(bundled_encoder_path(), num_labels=4).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bundled_encoder_path()).save_pretrained(folder)

    def model(dtype: str, **more: Any) -> TransformersClassifier:
        return TransformersClassifier(model=str(folder), device=device, dtype=dtype, max_length=256, **more)

    padding_free, plain = model("bfloat16", engine="padding-free"), model("bfloat16")
    full = model("float32", engine="plain")
    long, short = texts_of(TOKENS, n), short_texts(200)
    own = full.predict_batch(short).probabilities
    half = padding_free.predict_batch(short).probabilities
    encoder = padding_free._engine_selector.engine_for(padding_free._network.base_model)
    ways: dict[str, Callable[[], Any]] = {
        "batch": lambda: padding_free.batch(long),
        "plain_batch": lambda: plain.batch(long),
        "products": products(padding_free._network.config, TOKENS * n, device),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    singles: dict[str, list[float]] = {"single": [], "single_plain": []}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            seconds = seconds_of(work, device)
            if turn:
                taken[name].append(seconds)
        for text in short[: 100 if turn else 20]:
            for name, one in zip(singles, (padding_free, plain), strict=True):
                seconds = seconds_of(lambda one=one, text=text: one.invoke(text), device)  # type: ignore[misc]
                if turn:
                    singles[name].append(seconds)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "engine": type(encoder).__name__,
        "texts_per_second": n / statistics.median(taken["batch"]),
        "plain_texts_per_second": n / statistics.median(taken["plain_batch"]),
        "share_of_products": float(np.median(np.array(taken["products"]) / np.array(taken["batch"]))),
        "largest_difference": float(np.abs(own - half).max()),
        "same_label": float((own.argmax(1) == half.argmax(1)).mean()),
    }
    for name, each in singles.items():
        found[f"{name}_p50_ms"] = float(np.percentile(each, 50) * 1e3)
        found[f"{name}_p99_ms"] = float(np.percentile(each, 99) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--texts", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        found = measure(options.device, options.texts, options.rounds, Path(name))
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
