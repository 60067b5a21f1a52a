"""Speed of embedding texts without padding, in sorted batches with transformers, and one by one.

    python -m tests.benchmarks.encoder [--json F] [--texts N] [--rounds N] [--threads N] [--architectures]

The encoder is MiniLM. Short texts are gold-price headlines, or the demo messages if DATASHUNT_DATA_DIR does not contain
them. Long texts are short ones joined, up to 256 tokens. Rounds are interleaved. Reported are medians, ratios, and the
largest difference of a component from transformers in float32. With `--architectures`, the speedup of the padding-free
encoder over transformers is measured for each architecture, in float32, at MiniLM's size (6 layers, 384 wide) and with
random weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from langchain_datashunt.cli.demo.benchmark_task import DATA_DIR_VARIABLE, load_messages
from langchain_datashunt.small_models.engine.architectures import ARCHITECTURES
from langchain_datashunt.small_models.engine.padding_free import EngineSelector, plain_encoder
from langchain_datashunt.small_models.engine.text_batches import token_budget, token_budget_batches
from langchain_datashunt.small_models.kinds.encoder import SentenceEncoder


def short_texts(n: int) -> list[str]:
    file = Path(os.environ.get(DATA_DIR_VARIABLE, "")) / "headlines" / "test.csv"
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as stream:
            return [row[0].removeprefix("Q:").removesuffix("A:").strip() for row in csv.reader(stream)][:n]
    texts = list(load_messages().train.texts)
    return (texts * (n // len(texts) + 1))[:n]


def long_texts(short: list[str], n: int) -> list[str]:
    """Return texts with log-normal lengths and a mean of about 90 tokens."""
    rng = np.random.default_rng(0)
    words = " ".join(short).split()
    lengths = np.clip(rng.lognormal(4.1, 0.6, n), 8, 180).astype(int)
    starts = rng.integers(0, max(1, len(words) - 200), n)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def compare(texts: list[str], rounds: int) -> dict[str, Any]:
    plain, padding_free = SentenceEncoder(engine="plain"), SentenceEncoder(engine="padding-free")
    half_plain, half = (SentenceEncoder(engine=engine, dtype="bfloat16") for engine in ("plain", "padding-free"))  # type: ignore[arg-type]
    few = texts[: max(1, len(texts) // 8)]
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "one_by_one": (lambda: [plain.encode([text]) for text in few], len(few)),
        "plain": (lambda: plain.encode(texts), len(texts)),
        "padding-free": (lambda: padding_free.encode(texts), len(texts)),
        "plain_bf16": (lambda: half_plain.encode(texts), len(texts)),
        "packed_bf16": (lambda: half.encode(texts), len(texts)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(rounds + 1):
        for name, (work, n) in ways.items():
            started = time.perf_counter()
            work()
            if run:  # the first round warms up
                rates[name].append(n / (time.perf_counter() - started))
    found: dict[str, Any] = {name: float(np.median(each)) for name, each in rates.items()}
    for name in ("plain", "padding-free", "packed_bf16"):
        found[f"{name}_over_one_by_one"] = found[name] / found["one_by_one"]
    found["packed_over_plain"] = float(np.median(np.array(rates["padding-free"]) / np.array(rates["plain"])))
    found["packed_bf16_over_plain_bf16"] = float(np.median(np.array(rates["packed_bf16"]) / rates["plain_bf16"]))
    own = plain.encode(texts)[0]
    found["largest_difference"] = float(np.abs(padding_free.encode(texts)[0] - own).max())
    found["largest_difference_bf16"] = float(np.abs(half.encode(texts)[0] - own).max())
    return found


def network_of(kind: str) -> Any:
    """Return an encoder of MiniLM's size with random weights."""
    more: dict[str, Any] = {"num_attention_heads": 12, "pad_token_id": 0}
    if kind == "distilbert":
        more = {"dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536, "pad_token_id": 0}
    elif kind == "modernbert":
        more |= {"cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
    elif kind == "deberta-v2":  # the settings of DeBERTa v3
        more |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256}
        more |= {
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        }
    sizes = {} if kind == "distilbert" else {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    config = transformers.AutoConfig.for_model(kind, vocab_size=30_522, **sizes, **more)
    return transformers.AutoModel.from_config(config).eval()


def architectures(texts: list[str], rounds: int) -> dict[str, Any]:
    """Return the speedup of the padding-free encoder over transformers, by architecture and length."""
    encoder = SentenceEncoder(engine="plain")
    found: dict[str, Any] = {}
    for kind in ARCHITECTURES:
        network = network_of(kind)
        engines = {
            name: EngineSelector(name).engine_for(network) or plain_encoder(network)
            for name in ("padding-free", "plain")
        }  # type: ignore[arg-type]
        found[kind] = {}
        for name, some in (("short", texts), ("long", long_texts(texts, len(texts) // 4)), ("single", texts[:50])):
            ids = encoder.tokenizer(some)[0]
            batches = list(
                token_budget_batches([len(one) for one in ids], token_budget("cpu"), 1 if name == "single" else None)
            )
            taken: dict[str, list[float]] = {engine: [] for engine in engines}
            for _ in range(rounds):
                for engine, compute in engines.items():
                    started = time.perf_counter()
                    for rows in batches:
                        compute([ids[i] for i in rows])
                    taken[engine].append(time.perf_counter() - started)
            found[kind][name] = round(float(np.median(np.array(taken["plain"]) / np.array(taken["padding-free"]))), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--architectures", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    short = short_texts(options.texts)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": options.threads,
    }
    if options.architectures:
        result["packed_over_plain"] = architectures(short, options.rounds)
    else:
        result["short"] = compare(short, options.rounds)
        result["long"] = compare(long_texts(short, options.texts // 4), options.rounds)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
