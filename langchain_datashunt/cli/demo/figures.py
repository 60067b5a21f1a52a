"""Figures of the demo: accuracies with intervals, costs, and prompt lengths by pruning strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from langchain_datashunt._utils.pricing import token_price
from langchain_datashunt.calibration import ThresholdChoice
from langchain_datashunt.cli.demo.benchmark_task import BenchmarkTask, Labelled
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.evaluation import mean_interval
from langchain_datashunt.large_models.chat_asker import default_prompt
from langchain_datashunt.large_models.prompt_pruning import (
    ConformalPruning,
    HardPruning,
    NoPruning,
    Pruning,
    SoftPruning,
    TopHint,
)
from langchain_datashunt.large_models.replay import estimate_message_tokens, estimate_tokens
from langchain_datashunt.policies.thresholds import Policy
from langchain_datashunt.prediction import PredictionBatch


@dataclass(frozen=True)
class Setup:
    """Data and large model of a demo run.

    Attributes:
        task: Task with the large model's answers to the development and test splits.
        large: "replay" or openai:MODEL.
        price_model: Model whose prices apply.
        note: Description of the large model.
        train: Training texts of the small model.
    """

    task: BenchmarkTask
    large: str
    price_model: str
    note: str
    train: Labelled


def figures_of(setup: Setup, results: list[ShuntResult], choice: ThresholdChoice) -> dict[str, Any]:
    """Return accuracies, deferral rates and costs of small model, large model and shunt, JSON-ready."""
    test = setup.task.test
    small_right = np.array(
        [r.prediction is not None and r.prediction.label == y for r, y in zip(results, test.labels, strict=True)]
    )
    large_right = np.array([answer == y for answer, y in zip(test.large, test.labels, strict=True)])
    shunt_right = np.array([r.output == y for r, y in zip(results, test.labels, strict=True)])
    asked = np.array([r.route == "large" or r.reason == "large_error" for r in results])
    cost_shunt = _tokens_priced(setup, results)
    cost_large, prompt_tokens = _cost_of_asking_all(setup)
    return {
        "n": len(test),
        **with_interval("small_accuracy", small_right),
        **with_interval("large_accuracy", large_right),
        **with_interval("shunt_accuracy", shunt_right),
        **with_interval("deferral_rate", asked),
        **with_interval("shunt_minus_large", shunt_right.astype(float) - large_right),
        **with_interval("shunt_minus_small", shunt_right.astype(float) - small_right),
        "cost_large_usd": cost_large,
        "cost_shunt_usd": cost_shunt,
        "price_model": setup.price_model,
        "prompt_tokens_per_call_alone": prompt_tokens,
        "threshold": choice.threshold,
        "threshold_chosen_on": choice.fitted_on,
        "large_errors": sum(r.reason == "large_error" for r in results),
        "data": setup.task.source,
        "large": setup.note,
        "task": setup.task.name,
        "replayed": setup.large == "replay",
        "tokens_estimated": setup.large == "replay",
    }


def with_interval(name: str, values: Any) -> dict[str, Any]:
    """Return the mean of `values` under `name`, and its interval under `name_interval`."""
    interval = mean_interval(values)
    return {
        name: round(interval.value, 6),
        f"{name}_interval": [round(interval.low, 6), round(interval.high, 6)],
    }


def _tokens_priced(setup: Setup, results: list[ShuntResult]) -> float | None:
    counts = [usage for result in results for usage in result.usage.values()]
    prompt = sum(usage["input_tokens"] for usage in counts)
    reply = sum(usage["output_tokens"] for usage in counts)
    price = token_price(setup.price_model, prompt, reply)
    return None if price is None else round(price, 6)


def _cost_of_asking_all(setup: Setup) -> tuple[float | None, float]:
    """Estimate the price and the mean prompt tokens of deferring every test text with all candidates."""
    template, task = default_prompt(NoPruning()), setup.task
    tokens = [_prompt_tokens(template, mapping_for(text, task)) for text in task.test.texts]
    reply = sum(estimate_tokens(answer) for answer in task.test.large)
    price = token_price(setup.price_model, sum(tokens), reply)
    return None if price is None else round(price, 6), round(float(np.mean(tokens)), 1)


def prompt_figures(
    task: BenchmarkTask, results: list[ShuntResult], dev: PredictionBatch, policy: Policy
) -> dict[str, Any]:
    """Estimate the prompt tokens of the deferred calls under each pruning strategy."""
    asked = [i for i, r in enumerate(results) if r.route == "large" and r.prediction is not None]
    if not asked:
        return {"prompt_tokens": {}}
    batch = PredictionBatch.stack([p for i in asked if (p := results[i].prediction) is not None])
    strategies: dict[str, Pruning] = {
        "all candidates": NoPruning(),
        "top hint": TopHint(),
        "soft, top 5": SoftPruning(top_k=5),
        "hard": HardPruning.fit(dev, task.dev.labels, policy),
        "conformal, alpha 0.05": ConformalPruning(alpha=0.05).fit(dev, task.dev.labels, policy),
    }
    truth = [task.test.labels[i] for i in asked]
    rows = {}
    for name, strategy in strategies.items():
        variables = strategy.prepare(batch, task.labels, task.descriptions)
        template = default_prompt(strategy)
        tokens = [
            _prompt_tokens(template, {"input": task.test.texts[i], **more})
            for i, more in zip(asked, variables, strict=True)
        ]
        candidates = [more["candidates"] for more in variables]
        rows[name] = {
            "tokens": round(float(np.mean(tokens)), 1),
            "candidates": round(float(np.mean([len(c) for c in candidates])), 1),
            "true_label_kept": round(float(np.mean([y in c for y, c in zip(truth, candidates, strict=True)])), 4),
        }
    return {"prompt_tokens": rows}


def _prompt_tokens(template: Any, mapping: dict[str, Any]) -> int:
    return estimate_message_tokens(message.text for message in template.invoke(mapping).to_messages())


def mapping_for(text: str, task: BenchmarkTask) -> dict[str, Any]:
    """Return the variables of the default prompt for a text, with all candidates and without a hint."""
    return {"input": text, **NoPruning().without_prediction(task.labels, task.descriptions)}
