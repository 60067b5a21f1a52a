"""Accuracy of thresholds and fusion, and validity of guarantees, on recorded answers of real LLMs.

    python -m tests.benchmarks.thresholds [--json F] [--seeds N] [--risk-seeds N]

Banking77 with GPT-4's answers: the small model is a linear head and kernel neighbours on MiniLM embeddings before and
after contrastive fine-tuning. It is trained on 10 examples per label of train.csv, the label names, and the other texts
of train.csv without their labels. `--labelled-only` omits those texts, and `--frozen` omits them and the fine-tuning.
Temperature, fusion and threshold come from dev.csv alone, and the score is measured once on test.csv. Risk: for 20
training samples, a selective risk of at most 5% with 95% confidence is certified on dev.csv and checked on test.csv.
MMLU and GSM8K of RouteLLM (Mixtral-8x7B, GPT-4): the correct model is predicted from the embedding of the question,
5-fold cross-validated, and reported as APGR and CPT.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.table_files import sample_per_label
from langchain_datashunt.calibration import (
    MatchLarge,
    MaxAccuracy,
    RiskControl,
    deferral_curve,
    fit_temperature,
    select_threshold,
)
from langchain_datashunt.cli.demo.benchmark_task import BenchmarkTask, banking77_folder, load_banking77
from langchain_datashunt.evaluation import mean_interval
from langchain_datashunt.evaluation.metrics import apgr, call_performance_threshold
from langchain_datashunt.policies import LearnedDeferral
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.prediction import BoolArray, FloatArray, PredictionBatch
from langchain_datashunt.small_models import (
    ContrastiveClassifier,
    EmbeddingClassifier,
    EnsembleClassifier,
    SmallModel,
    TrainingSettings,
)
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, embed, shared_encoder

PER_LABEL = 10
QUIET = TrainingSettings(progress=False)
ALPHA, CONFIDENCE = 0.05, 0.95
FOLDS = 5


def calibrated(small: SmallModel, texts: list[str], labels: list[str]) -> SmallModel:
    """Return the model with its temperature fitted on the given examples."""
    logits = small.predict_scores(texts).logits
    truth = np.array([small.labels.index(label) for label in labels])
    return small.model_copy(update={"temperature": fit_temperature(np.asarray(logits, np.float64), truth)})


def right(names: list[Any], labels: list[str]) -> BoolArray:
    return np.array([a == b for a, b in zip(names, labels, strict=True)])


def one_seed(
    task: BenchmarkTask, encoder: PrecomputedEmbeddings, seed: int, contrastive: bool, unlabelled: list[str]
) -> dict[str, Any]:
    """Select all settings on dev.csv, and return the scores on test.csv."""
    texts, labels = sample_per_label(task.train.texts, task.train.labels, PER_LABEL, seed)
    names = {label: label.replace("_", " ") for label in set(labels)}
    settings = QUIET.model_copy(update={"seed": seed})
    small: SmallModel
    if contrastive:
        small = ContrastiveClassifier.train(texts, labels, settings=settings, label_texts=names, unlabelled=unlabelled)
    else:
        small = EnsembleClassifier.train(texts, labels, settings=settings, embeddings=encoder, label_texts=names)
    small = calibrated(small, task.dev.texts, task.dev.labels)
    dev, test = small.predict_batch(task.dev.texts), small.predict_batch(task.test.texts)
    fusion = AnswerFusion.fit(small.labels, task.dev.labels, task.dev.large)
    fused_names = [fusion.labels[i] for i in fused(fusion, test, task.test.large)]
    answered = {
        "small": right(test.label_names(), task.test.labels),
        "large": right(task.test.large, task.test.labels),
        "fused": right(fused_names, task.test.labels),
    }
    given: dict[str, Any] = {"large": task.dev.large}
    choices = {
        "plain": (
            select_threshold(dev, task.dev.labels, **given, objective=MaxAccuracy(max_deferral_rate=0.25)),
            "large",
        ),
        "fused": (
            select_threshold(
                dev, task.dev.labels, **given, objective=MaxAccuracy(max_deferral_rate=0.3), fusion=fusion
            ),
            "fused",
        ),
        "match_large": (select_threshold(dev, task.dev.labels, **given, objective=MatchLarge()), "large"),
    }
    found: dict[str, Any] = {"small": answered["small"], "large": answered["large"]}
    for name, (choice, asked) in choices.items():
        keep = choice.policy.evaluate(test).keep
        found[name] = np.where(keep, answered["small"], answered[asked])
        found[f"{name}_asked"] = ~keep
    return found


def fused(fusion: AnswerFusion, batch: PredictionBatch, answers: list[Any]) -> list[int]:
    p = fusion.aligned(batch).probabilities
    best: list[int] = fusion.posterior(p, fusion.columns(answers)).argmax(axis=1).tolist()
    return best


def banking(
    task: BenchmarkTask, encoder: PrecomputedEmbeddings, seeds: int, contrastive: bool, unlabelled: list[str]
) -> dict[str, Any]:
    runs = []
    for seed in range(seeds):
        runs.append(one_seed(task, encoder, seed, contrastive, unlabelled))
        told = {name: round(float(values.mean()), 4) for name, values in runs[-1].items()}
        print(f"seed {seed}: {told}", file=sys.stderr, flush=True)
    mean = {name: float(np.mean([run[name].mean() for run in runs])) for name in runs[0]}
    gain = mean_interval(np.concatenate([run["fused"].astype(float) - run["plain"] for run in runs]))
    return {
        "small_accuracy": mean["small"],
        "large_accuracy": mean["large"],
        "plain_accuracy": mean["plain"],
        "plain_share": mean["plain_asked"],
        "fused_accuracy": mean["fused"],
        "fused_share": mean["fused_asked"],
        "fused_less_plain": list(gain),
        "match_large_accuracy": mean["match_large"],
        "match_large_share": mean["match_large_asked"],
        "random_mix_at_plain_share": (1 - mean["plain_asked"]) * mean["small"] + mean["plain_asked"] * mean["large"],
        "seeds": seeds,
        "unlabelled": len(unlabelled),
    }


def risk(task: BenchmarkTask, encoder: PrecomputedEmbeddings, seeds: int) -> dict[str, Any]:
    """Return how often the guarantee for locally answered texts holds on test.csv."""
    selective_risks, shares = [], []
    for seed in range(seeds):
        texts, labels = sample_per_label(task.train.texts, task.train.labels, PER_LABEL, seed)
        small = EmbeddingClassifier.train(texts, labels, settings=QUIET, embeddings=encoder)
        dev, test = small.predict_batch(task.dev.texts), small.predict_batch(task.test.texts)
        aim = RiskControl(alpha=ALPHA, confidence=CONFIDENCE)
        keep = select_threshold(dev, task.dev.labels, objective=aim).policy.evaluate(test).keep
        wrong = ~right(test.label_names(), task.test.labels)
        selective_risks.append(float(wrong[keep].mean()) if keep.any() else 0.0)
        shares.append(1.0 - float(keep.mean()))
    return {
        "risk_seeds_kept": int(sum(error <= ALPHA for error in selective_risks)),
        "risk_seeds": seeds,
        "risk_mean_selective_risk": float(np.mean(selective_risks)),
        "risk_worst_selective_risk": float(np.max(selective_risks)),
        "risk_mean_share": float(np.mean(shares)),
    }


def routing(files: list[Path]) -> dict[str, float]:
    """Return APGR and CPT of a score that is learned from the embedding of the question."""
    csv.field_size_limit(10**8)
    rows = [row for file in files for row in csv.DictReader(file.open(encoding="utf-8"))]
    weak = np.array([row["mistralai/Mixtral-8x7B-Instruct-v0.1"] == "True" for row in rows])
    strong = np.array([row["gpt-4-1106-preview"] == "True" for row in rows])
    vectors = np.asarray(embed(shared_encoder(), [row["prompt"] for row in rows])[0], dtype=np.float64)
    score = cross_fitted(vectors, weak, strong)
    curve = deferral_curve(score, weak, strong)
    return {
        "n": float(len(rows)),
        "weak": float(weak.mean()),
        "strong": float(strong.mean()),
        "apgr": apgr(curve),
        "cpt50": call_performance_threshold(curve, 0.5),
        "cpt80": call_performance_threshold(curve, 0.8),
    }


def cross_fitted(columns: FloatArray, weak: BoolArray, strong: BoolArray) -> FloatArray:
    score = np.zeros(len(columns))
    for rows in np.array_split(np.random.default_rng(0).permutation(len(columns)), FOLDS):
        rest = np.setdiff1d(np.arange(len(columns)), rows)
        learnt = LearnedDeferral.fit_columns(columns[rest], weak[rest], strong[rest])
        score[rows] = learnt.of_columns(columns[rows])
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--risk-seeds", type=int, default=20)
    parser.add_argument("--frozen", action="store_true", help="an ensemble on the encoder without fine-tuning")
    parser.add_argument("--labelled-only", action="store_true", help="without the unlabelled texts of train.csv")
    options = parser.parse_args()
    folder = banking77_folder()
    if folder is None:
        raise SystemExit("DATASHUNT_DATA_DIR does not contain banking77_gpt4. See docs/data.md.")
    task = load_banking77(folder)
    names = {label.replace("_", " ") for label in task.train.labels}
    encoder = PrecomputedEmbeddings(
        shared_encoder(), [*task.train.texts, *task.dev.texts, *task.test.texts, *sorted(names)]
    )
    asked_of = {*task.dev.texts, *task.test.texts}
    unlabelled = [text for text in task.train.texts if text not in asked_of]
    if options.frozen or options.labelled_only:
        unlabelled = []
    result = banking(task, encoder, options.seeds, not options.frozen, unlabelled)
    result |= risk(task, encoder, options.risk_seeds)
    llm = folder.parent / "routellm"
    if llm.is_dir():
        for name, files in (("mmlu", sorted((llm / "mmlu").glob("*.csv"))), ("gsm8k", [llm / "gsm8k_responses.csv"])):
            result |= {f"{key}_{name}": value for key, value in routing(files).items()}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
