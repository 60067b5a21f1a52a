"""Speed of the package against named targets, with value, target and result for each key.

    python -m tests.benchmarks.speed [--json F] [--markdown F] [--only P1,P4] [--texts N] [--rounds N] [--rows N]

P1  offline, short texts, one thread, through `batch`: compared with a transformers pipeline one by one, with a loop
    that tokenizes and predicts prompt by prompt (as RouteLLM's BERT router does), and with semantic-router if installed
P2  the same with long texts, and bf16 compared with the pipeline with batches of 32
P3  rate of `batch` as a share of the engine's rate on ready token ids, and of the rate of its matrix products alone,
    which is the upper bound
P4  256 concurrent `ainvoke` calls, compared with a thread-pool call of the plain model for each
P5  time that one idle `ShuntRunnable.ainvoke` adds to the bare forward pass, in milliseconds
P6  ShuntRunnable over the sum of its parts, as a share of RunnableBranch's whole call
P7  time per item of a batch of 1,000 with trivial models, as a share of RunnableBranch.batch: without and with a
    callback handler, with batch models, and with the same RunnableLambda as large model on both sides ("same parts")
P8  recording: time in the calling thread, rate of the writer, bytes per record
P9  import times
P10 selecting a threshold on a million rows of 77 labels
P11 growth of the resident memory of `datashunt run` over a million rows, from the first answers on
P12 with a GPU: share of the matrix products' time, and single requests (`python -m tests.benchmarks.gpu`)

The model is MiniLM with a head of four classes. Measurements are interleaved, and medians are reported with their
spread. Ratios are comparable between machines, and rates are not.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from langchain_datashunt import (
    AlwaysSmall,
    PredictProbaClassifier,
    ShuntRunnable,
    SmallModel,
    Threshold,
    TransformersClassifier,
)
from langchain_datashunt.cli.demo.benchmark_task import load_messages
from langchain_datashunt.large_models.replay import ChatServer
from langchain_datashunt.small_models import Scores, TrainingSettings
from langchain_datashunt.small_models.engine.layers import Linear
from langchain_datashunt.small_models.engine.text_batches import token_budget, token_budget_batches
from langchain_datashunt.small_models.kinds.encoder import bundled_encoder_path
from tests.benchmarks.encoder import long_texts, short_texts
from tests.benchmarks.gpu import measure as measure_gpu
from tests.benchmarks.overhead import measure as measure_overhead

Verdict = dict[str, Any]
Work = Callable[[], Any]


def verdict(values: dict[str, float], targets: dict[str, tuple[str, float]], **more: Any) -> Verdict:
    """Compare measured values with their targets.

    A target is ">=" or "<=" with a number. A target without a measured value is not met.
    """
    values = {**dict.fromkeys(targets, float("nan")), **values}
    met = {
        name: bool(values[name] >= limit if sign == ">=" else values[name] <= limit)
        for name, (sign, limit) in targets.items()
    }
    return {
        "value": values,
        "target": {name: f"{sign} {limit:g}" for name, (sign, limit) in targets.items()},
        "met": met,
        "all_met": bool(met) and all(met.values()),
        **more,
    }


def interleaved(ways: dict[str, tuple[Work, int]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the rate of each function in each round after a warm-up round, and the medians."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (work, n) in ways.items():
            started = time.perf_counter()
            work()
            if turn:
                rates[name].append(n / (time.perf_counter() - started))
    return rates, {name: statistics.median(each) for name, each in rates.items()}


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """Return the median over rounds of the ratio of two rates."""
    return float(np.median(np.array(rates[name]) / np.array(rates[other])))


class Models:
    """MiniLM with a head, as a transformers model and as our model in two dtypes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        auto = transformers.AutoModelForSequenceClassification
        network = auto.from_pretrained(bundled_encoder_path(), num_labels=4)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_encoder_path())
        self.corpus = _train_head(network.eval(), self.tokenizer)
        network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.network = network.eval()
        self.pipeline = transformers.pipeline(
            "text-classification", model=self.network, tokenizer=self.tokenizer, device="cpu", truncation=True
        )
        self.plain = TransformersClassifier(model=str(folder), engine="plain", max_length=256)
        self.fp32 = TransformersClassifier(model=str(folder), max_length=256)
        self.bf16 = TransformersClassifier(model=str(folder), dtype="bfloat16", max_length=256)

    def loop(self, texts: list[str]) -> list[Any]:
        """Predict prompt by prompt."""
        found = []
        for text in texts:
            inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            with torch.no_grad():
                found.append(torch.softmax(self.network(**inputs).logits, dim=-1)[0].numpy())
        return found


def _train_head(network: Any, tokenizer: Any) -> list[str]:
    """Train a head on four intents of the demo messages, and return the messages not used for training."""
    task = load_messages()
    wanted = sorted(set(task.train.labels))[:4]
    pairs = [pair for pair in zip(task.train.texts, task.train.labels, strict=True) if pair[1] in wanted]
    inputs = tokenizer([text for text, _ in pairs], return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        pooled = network.bert(**inputs).pooler_output.numpy()
        fitted = LogisticRegression(C=100.0, max_iter=5000).fit(pooled, [label for _, label in pairs])
        network.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        network.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))
    others = [*zip(task.dev.texts, task.dev.labels, strict=True), *zip(task.test.texts, task.test.labels, strict=True)]
    return [text for text, label in others if label in wanted]


def agreement(models: Models, texts: list[str]) -> dict[str, float]:
    """Return the difference of the probabilities from transformers, and the share of equal labels."""
    own = models.plain.predict_batch(texts).probabilities
    found = {}
    for name, model in (("fp32", models.fp32), ("bf16", models.bf16)):
        p = model.predict_batch(texts).probabilities
        found[f"{name}_largest_difference"] = float(np.abs(p - own).max())
        found[f"{name}_same_label"] = float((p.argmax(1) == own.argmax(1)).mean())
    return found


def offline(models: Models, texts: list[str], rounds: int, *, long: bool) -> Verdict:
    few = texts[: max(8, len(texts) // 8)]
    ways: dict[str, tuple[Work, int]] = {
        "pipeline_1": (lambda: [models.pipeline(text) for text in few], len(few)),
        "pipeline_32": (lambda: models.pipeline(texts, batch_size=32), len(texts)),
        "loop": (lambda: models.loop(few), len(few)),
        "plain_batch": (lambda: models.plain.batch(texts), len(texts)),
        "fp32": (lambda: models.fp32.batch(texts), len(texts)),
        "bf16": (lambda: models.bf16.batch(texts), len(texts)),
    }
    if (route := semantic_router()) is not None:
        ways["semantic_router"] = (lambda: [route(text) for text in few], len(few))
    rates, medians = interleaved(ways, rounds)
    values = {
        f"{ours}_over_{peer}": ratio(rates, ours, peer)
        for ours in ("fp32", "bf16")
        for peer in ways
        if peer not in ("fp32", "bf16")
    }
    # the processor's limit is the time of the same matrix products; ratios to other libraries depend on the processor
    shares = engine_share(models, texts, rounds)["value"]
    values |= {name: share for name, share in shares.items() if name.endswith("_of_products")}
    least = (0.75, 0.65) if long else (0.85, 0.75)
    targets = dict(
        zip(("fp32_share_of_products", "bf16_share_of_products"), ((">=", one) for one in least), strict=True)
    )
    if not long:
        peers = [name for name in ("pipeline_1", "loop", "semantic_router") if name in ways]
        targets |= {f"{ours}_over_{peer}": (">=", 1.0) for ours in ("fp32", "bf16") for peer in peers}
    spread = {name: [min(each), medians[name], max(each)] for name, each in rates.items()}
    if not long:
        values |= agreement(models, models.corpus)
        for name, far in (("fp32", 1e-4), ("bf16", 1e-2)):
            targets |= {f"{name}_largest_difference": ("<=", far), f"{name}_same_label": (">=", 0.995)}
    return verdict(values, targets, texts_per_second=spread)


def semantic_router() -> Callable[[str], Any] | None:
    """Measure the route layer of semantic-router with the same encoder, if it is installed."""
    if importlib.util.find_spec("semantic_router") is None:
        return None
    from semantic_router import Route
    from semantic_router.encoders import HuggingFaceEncoder
    from semantic_router.routers import SemanticRouter

    task = load_messages().train
    routes = [
        Route(name=label, utterances=[t for t, own in zip(task.texts, task.labels, strict=True) if own == label][:10])
        for label in sorted(set(task.labels))
    ]
    encoder = HuggingFaceEncoder(name=bundled_encoder_path())
    return SemanticRouter(encoder=encoder, routes=routes, auto_sync="local")


def engine_share(models: Models, texts: list[str], rounds: int) -> Verdict:
    values: dict[str, float] = {}
    for name, model in (("fp32", models.fp32), ("bf16", models.bf16)):
        ids = model.features(texts)
        lengths = [len(one) for one in ids]
        batches = [[ids[i] for i in rows] for rows in token_budget_batches(lengths, token_budget("cpu"))]
        padding_free = model._engine_selector.engine_for(model._network.base_model)
        if padding_free is None:
            return verdict({}, {"fp32_share": (">=", 0.95)}, note="no padding-free engine here")

        def raw(padding_free: Any = padding_free, batches: Any = batches) -> None:
            for batch in batches:
                padding_free(batch).first()

        ways: dict[str, tuple[Work, int]] = {
            "raw": (raw, len(texts)),
            "products": (products_of(model, [sum(map(len, batch)) for batch in batches]), len(texts)),
            "batch": (lambda model=model: model.batch(texts), len(texts)),  # type: ignore[misc]
        }
        rates, _ = interleaved(ways, rounds)
        values[f"{name}_share"] = ratio(rates, "batch", "raw")
        values[f"{name}_share_of_products"] = ratio(rates, "batch", "products")
    return verdict(values, {f"{name}_share": (">=", 0.95) for name in ("fp32", "bf16")})


def products_of(model: TransformersClassifier, tokens: list[int]) -> Work:
    """Return a function that computes only the products of the model's linear layers, as the engine does."""
    config, dtype = model._network.config, model._engine_selector.dtype
    d, inner = config.hidden_size, config.intermediate_size
    shapes = ((3 * d, d), (d, d), (inner, d), (d, inner))
    layers = [Linear(torch.randn(shape, dtype=dtype), torch.zeros(shape[0], dtype=dtype)) for shape in shapes]
    inputs = {size: torch.randn(max(tokens), size, dtype=dtype) for size in (d, inner)}

    def work() -> None:
        with torch.inference_mode():
            for n in tokens:
                for _ in range(config.num_hidden_layers):
                    for layer in layers:
                        layer(inputs[layer.weight.shape[1]][:n])

    return work


def concurrent(models: Models, texts: list[str], rounds: int) -> Verdict:
    """Run clients that each send the next request as soon as they receive an answer."""

    async def clients(n: int, ask: Callable[[str], Any]) -> list[float]:
        waiting, seconds = iter(texts), []

        async def client() -> None:
            for text in waiting:
                started = time.perf_counter()
                await ask(text)
                seconds.append(time.perf_counter() - started)

        await asyncio.gather(*(client() for _ in range(n)))
        return seconds

    def plain(pool: ThreadPoolExecutor) -> Callable[[str], Any]:
        def call(text: str) -> Any:
            return models.loop([text])[0]

        return lambda text: asyncio.get_running_loop().run_in_executor(pool, call, text)

    values, latencies = {}, {}
    with ThreadPoolExecutor(32) as pool:
        for n in (1, 64, 256):
            asks = {"threads": plain(pool), "fp32": models.fp32.ainvoke, "bf16": models.bf16.ainvoke}
            times: dict[str, list[float]] = {name: [] for name in asks}

            warm = dict.fromkeys(asks, False)

            def work(name: str, n: int = n, asks: Any = asks, times: Any = times, warm: Any = warm) -> None:
                seconds = asyncio.run(clients(n, asks[name]))
                times[name] = [*times[name], *seconds] if warm[name] else []
                warm[name] = True

            rates, medians = interleaved(
                {name: (lambda name=name: work(name), len(texts)) for name in asks},  # type: ignore[misc]
                rounds,
            )
            for name in asks:
                if name != "threads":
                    values[f"{name}_over_threads_{n}"] = ratio(rates, name, "threads")
                latencies[f"{name}_{n}"] = {
                    "requests_per_second": medians[name],
                    "p50_ms": float(np.percentile(times[name], 50) * 1e3),
                    "p99_ms": float(np.percentile(times[name], 99) * 1e3),
                }
    targets = {"fp32_over_threads_256": (">=", 10.0), "bf16_over_threads_256": (">=", 10.0)}
    return verdict(values, targets, clients=latencies)


def idle_request(models: Models, texts: list[str], rounds: int) -> Verdict:
    shunt = ShuntRunnable(small=models.fp32, large=RunnableLambda(str), policy=AlwaysSmall(), pruning=None)
    few = texts[:100]

    padding_free: Any = models.fp32._engine_selector.engine_for(models.fp32._network.base_model)
    ids = {text: models.fp32.features([text]) for text in few}

    def bare(text: str) -> None:
        with torch.inference_mode():
            models.fp32._logits(ids[text])

    async def in_a_thread(text: str) -> None:
        await asyncio.get_running_loop().run_in_executor(thread, bare, text)

    async def at_once(step: Callable[[str], Any], text: str) -> None:
        step(text)

    ways: dict[str, Callable[[str], Any]] = {
        "bare": partial(at_once, bare),
        "bare_in_a_thread": in_a_thread,
        "predict": partial(at_once, models.fp32.predict),
        "apredict": models.fp32.apredict,
        "invoke": partial(at_once, shunt.invoke),
        "ainvoke": shunt.ainvoke,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}

    async def all_of_them() -> None:
        for turn in range(rounds + 1):
            for text in few:  # interleaved, so that drift of the machine affects all alike
                for name, way in ways.items():
                    started = time.perf_counter()
                    await way(text)
                    if turn:  # the first round warms up
                        seconds[name].append(time.perf_counter() - started)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(torch.set_num_threads, 1).result()
        asyncio.run(all_of_them())
    added = {name: 1e3 * (np.array(seconds[name]) - np.array(seconds["bare"])) for name in ways}
    values = {f"{name}_adds_ms": float(np.median(added[name])) for name in ("invoke", "ainvoke")}
    values["bare_forward_ms"] = 1e3 * statistics.median(seconds["bare"])
    parts = {name: round(float(np.median(each)), 3) for name, each in added.items() if name != "bare"}
    targets = {"ainvoke_adds_ms": ("<=", 0.8), "invoke_adds_ms": ("<=", 0.8)}
    return verdict(values, targets, padding_free=padding_free is not None, adds_ms=parts)


def router_overhead(rounds: int) -> Verdict:
    found = measure_overhead(None, rounds)
    values = {}
    for row in found["rows"]:
        if row["what"].startswith(("invoke", "ainvoke")) and "branch_us" in row:
            values[row["what"]] = row["shunt_over_parts_us"] / row["branch_us"]
    return verdict(values, {name: ("<=", 0.5) for name in values}, rows=found["rows"])


class Trivial(SmallModel):
    """Small model that is confident about every input except "no"."""

    labels: tuple[str, ...] = ("a", "b")

    def predict_scores(self, texts: Any) -> Scores:
        return Scores(np.array([[0.2, 0.0] if text == "no" else [3.0, 0.0] for text in texts]))


class Echo(Runnable[Any, Any]):
    """Large model without cost."""

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> str:
        return "L"

    def batch(self, inputs: Any, config: Any = None, *, return_exceptions: bool = False, **kwargs: Any) -> list[str]:
        return ["L"] * len(inputs)


def trivial_batch(rounds: int) -> Verdict:
    small = Trivial()
    shunt = ShuntRunnable(small=small, large=Echo(), policy=Threshold(0.9), pruning=None)
    lambdas = ShuntRunnable(small=small, large=RunnableLambda(lambda _: "L"), policy=Threshold(0.9), pruning=None)
    branch = RunnableBranch(
        (RunnableLambda(lambda text: text != "no"), RunnableLambda(lambda _: "a")), RunnableLambda(lambda _: "L")
    )
    inputs = ["no" if i % 5 == 0 else f"text {i}" for i in range(1000)]
    values, details = {}, {}
    targets = {"no_handler": ("<=", 0.05), "one_handler": ("<=", 0.25)}
    targets |= {f"{name}_same_parts": limit for name, limit in targets.items()}
    for word, config in (("no_handler", None), ("one_handler", {"callbacks": [BaseCallbackHandler()]})):
        ways = {"shunt": shunt, "shunt_with_a_lambda": lambdas, "branch": branch}
        rates, medians = interleaved(
            {name: (lambda way=way, config=config: way.batch(inputs, config), 1000) for name, way in ways.items()},  # type: ignore[misc]
            rounds,
        )
        values[word] = ratio(rates, "branch", "shunt")
        values[f"{word}_same_parts"] = ratio(rates, "branch", "shunt_with_a_lambda")
        details[word] = {name: 1e6 / rate for name, rate in medians.items()}
    return verdict(values, targets, us_per_item=details)


def child(*words: str) -> dict[str, Any]:
    """Run another benchmark in its own process, and return its output."""
    done = subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def recording() -> Verdict:
    found = child("tests.benchmarks.recording", "--records", "10000")
    values = {
        name: float(found[name])
        for name in ("caller_us", "records_per_second", "bytes_per_record", "share_of_plain_insert")
    }
    targets = {
        "caller_us": ("<=", 5.0),
        "records_per_second": (">=", 30_000.0),
        "bytes_per_record": ("<=", 1200.0),
    }
    return verdict(values, targets)


def imports(rounds: int) -> Verdict:
    """Measure import times with cached bytecode, which a first, uncounted round writes."""
    programs = {"nothing": "pass", "package": "import langchain_datashunt"}
    programs["shunt"] = "from langchain_datashunt import ShuntRunnable"
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(rounds + 1):
            for name, program in programs.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], check=True, env=environment)
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["nothing"][1:])
    values = {f"{name}_s": statistics.median(seconds[name][1:]) - base for name in ("package", "shunt")}
    return verdict(values, {"package_s": ("<=", 0.1), "shunt_s": ("<=", 0.6)}, python_itself_s=base)


def selection() -> Verdict:
    found = child("tests.benchmarks.selection")
    values = {"select_seconds": found["select_seconds"], "select_peak_gib": found["select_peak_gib"]}
    return verdict(values, {"select_seconds": ("<=", 20.0), "select_peak_gib": ("<=", 4.0)}, details=found)


def bulk(rows: int, folder: Path) -> Verdict:
    """Measure `datashunt run` with a cheap n-gram model, so that the length of the file dominates."""
    task = load_messages().train
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10.0))
    quiet = TrainingSettings(progress=False)
    model = PredictProbaClassifier.train(task.texts, task.labels, estimator=words, settings=quiet)
    model.save(folder / "bundle")
    with (folder / "data.csv").open("w", encoding="utf-8") as stream:
        stream.write("text\n")
        for i in range(rows):
            text = task.texts[i % len(task.texts)].replace('"', "'")
            stream.write(f'"{text} {i}"\n')
    scores = model.predict_batch([f"{text} {i}" for i, text in enumerate(task.texts)]).confidence
    threshold = float(np.quantile(scores, 0.02))
    resident: list[float] = []
    with ChatServer(lambda _: task.labels[0], model="gpt-4") as serving:
        words = ["run", "--bundle", "bundle", "--large", "openai:gpt-4", "--data", "data.csv", "--text", "text"]
        words += ["--out", "out.jsonl", "--threshold", str(threshold), "--pruning", "none", "--json", "--chunk", "2000"]
        environment = {**os.environ, "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": serving.base_url}
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "langchain_datashunt", *words],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if (folder / "out.jsonl.part").exists() or (folder / "out.jsonl").exists():  # the first answers are written
                resident.append(watched.memory_info().rss / 2**20)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    resident = [mib for mib in resident if mib > 0] or [float("nan")]
    half = resident[len(resident) // 2 :]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0] * len(half)) if len(half) > 2 else 0.0
    values = {"mib_over_the_start": max(resident) - resident[0], "mib_grown_in_the_second_half": slope}
    targets = {"mib_over_the_start": ("<=", 500.0), "mib_grown_in_the_second_half": ("<=", 50.0)}
    more = {"rows": summary["rows"], "asked": summary["asked"], "failed": summary["failed"]}
    return verdict(values, targets, **more, rows_per_second=rows / seconds, mib_at_the_start=resident[0])


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    capable = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "?")()
    return {
        "processor": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "capability": capable,
        "amx_bf16": any("amx_bf16" in line for line in _lines("/proc/cpuinfo")),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "langchain-core", "numpy")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def on_a_gpu(rounds: int, folder: Path) -> Verdict:
    found = measure_gpu("cuda", 16_384, rounds, folder)
    values = {name: found.pop(name) for name in ("share_of_products", "single_p50_ms", "texts_per_second")}
    return verdict(values, {"share_of_products": (">=", 0.6), "single_p50_ms": ("<=", 1.5)}, **found)


def table(result: dict[str, Any]) -> str:
    lines = ["| # | what | value | target | met |", "|---|---|---|---|---|"]
    for key, found in result.items():
        if not key.startswith("P"):
            continue
        for name, value in found["value"].items():
            target, met = found["target"].get(name, ""), found["met"].get(name)
            word = "" if met is None else "yes" if met else "**no**"
            lines.append(f"| {key} | {name.replace('_', ' ')} | {value:,.3g} | {target} | {word} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only", default="", help="for example P1,P4")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file in P11")
    options = parser.parse_args()
    rounds, wanted = options.rounds, {name for name in options.only.split(",") if name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = short_texts(options.texts)
        long = long_texts(short, options.texts // 4)
        models = Models(folder / "model") if not wanted or wanted & {"P1", "P2", "P3", "P4", "P5"} else None

        def one_thread(work: Callable[[], Verdict]) -> Verdict:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return work()
            finally:
                torch.set_num_threads(before)

        steps: dict[str, Callable[[], Verdict]] = {
            "P1": lambda: one_thread(lambda: offline(models, short, rounds, long=False)),  # type: ignore[arg-type]
            "P2": lambda: one_thread(lambda: offline(models, long, rounds, long=True)),  # type: ignore[arg-type]
            "P3": lambda: one_thread(lambda: engine_share(models, short, rounds)),  # type: ignore[arg-type]
            "P4": lambda: concurrent(models, (short * 4)[:1024], rounds),  # type: ignore[arg-type]
            "P5": lambda: one_thread(lambda: idle_request(models, short, rounds)),  # type: ignore[arg-type]
            "P6": lambda: router_overhead(rounds),
            "P7": lambda: trivial_batch(rounds),
            "P8": recording,
            "P9": lambda: imports(rounds),
            "P10": selection,
            "P11": lambda: bulk(options.rows, folder),
        }
        if torch.cuda.is_available():
            steps["P12"] = lambda: on_a_gpu(rounds, folder / "gpu")
        result: dict[str, Any] = {"machine": machine()}
        for key, step in steps.items():
            if not wanted or key in wanted:
                print(f"{key} ...", file=sys.stderr, flush=True)
                result[key] = step()
    print(json.dumps(result, indent=2))
    print("\n" + table(result), file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(table(result) + "\n")


if __name__ == "__main__":
    main()
