"""Base class and training helpers for small models that generate their answer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import Field
from typing_extensions import override

from langchain_datashunt.exceptions import ConfigurationError, DataError, PredictionError
from langchain_datashunt.inputs import InputReader
from langchain_datashunt.policies.scores import MeanTokenProbability, TokenScore
from langchain_datashunt.prediction import ANSWER_LABELS, FloatArray
from langchain_datashunt.small_models.base import SmallModel
from langchain_datashunt.small_models.scores import Scores
from langchain_datashunt.small_models.training.fitting import Stage, fit_network
from langchain_datashunt.small_models.training.training import TrainingReport, TrainingSettings, text_hashes

_SUREST = 1.0 - 1e-6


class Generated(NamedTuple):
    """A generated answer to one input.

    Attributes:
        answer: Generated text.
        logprobs: Log-probabilities of the answer's tokens without the end token, shape `[t]`, in nats.
        truncated: Whether the input was truncated to the model's maximum length.
    """

    answer: str
    logprobs: FloatArray
    truncated: bool = False


@dataclass(frozen=True)
class AnswerExamples:
    """Inputs with target answers.

    Attributes:
        texts: `n` inputs as texts; an image is represented by its data URL.
        answers: `n` target answers.
    """

    texts: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> AnswerExamples:
        """Return the examples at the given indices."""
        return AnswerExamples([self.texts[i] for i in rows], [self.answers[i] for i in rows])


class GeneratingModel(SmallModel):
    """Base class of small models that generate their answer.

    The prediction has two labels, "answer" and "other". The confidence in "answer" is computed from the token
    probabilities of the generation by `score`. It becomes the probability that the answer is right once
    `fit_confidence` has fitted `slope` and `intercept`.

    Subclasses implement `generate`, and `learn_answers` if they can be trained.
    """

    labels: tuple[str, ...] = ANSWER_LABELS

    score: TokenScore = Field(default_factory=MeanTokenProbability)
    """Score in [0, 1] computed from the token probabilities."""

    slope: float = 1.0
    """Slope in `confidence = sigmoid(slope * logit(score) + intercept)`."""

    intercept: float = 0.0
    """Intercept in the same formula."""

    @abstractmethod
    def generate(self, inputs: Sequence[Any]) -> list[Generated]:
        """Generate an answer to each of `n` inputs that `reader` has prepared."""

    @override
    def predict_scores(self, texts: Sequence[Any]) -> Scores:
        made = self.generate(texts)
        errors: dict[int, Exception] = {
            i: PredictionError(
                f"{self.model_id or type(self).__name__} generated an empty answer to input {i}. Check the prompt "
                f"template and the stop texts."
            )
            for i, one in enumerate(made)
            if not one.answer.strip() or not len(one.logprobs)
        }
        c = np.array([0.5 if i in errors else self.score.of_tokens(one.logprobs) for i, one in enumerate(made)])
        sure = self.slope * _logit(c) + self.intercept
        return Scores(
            np.stack([sure, np.zeros(len(made))], axis=1),
            np.array([one.truncated for one in made], dtype=np.bool_),
            None,
            tuple(one.answer for one in made),
            tuple(one.logprobs for one in made),
            errors,
        )

    def fit_confidence(self, inputs: Sequence[Any], right: Sequence[bool]) -> Self:
        """Return a copy whose confidence is calibrated to the probability that the answer is right.

        Fits `slope` and `intercept` by logistic regression on held-out inputs.

        Args:
            inputs: `n` inputs that the model was not trained on.
            right: Whether the model's answer to each input is right, by your own criterion.

        Returns:
            A copy of this model with fitted `slope` and `intercept`.

        Raises:
            DataError: The lengths differ, or the answers are all right or all wrong.
        """
        truth = np.array([bool(one) for one in right])
        if len(truth) != len(inputs) or truth.all() or not truth.any():
            raise DataError(
                f"Expected one judgement for each input, with both right and wrong answers, got {len(inputs)} inputs "
                f"and {int(truth.sum())} right of {len(truth)} judged answers."
            )
        plain = self.model_copy(update={"slope": 1.0, "intercept": 0.0, "temperature": 1.0})
        batch = plain.predict_batch(inputs)
        slope, intercept = _logistic(_logit(batch.confidence), truth)
        return self.model_copy(update={"slope": slope, "intercept": intercept, "temperature": 1.0})

    def learn_answers(
        self, stages: Sequence[AnswerExamples], held_out: AnswerExamples, settings: TrainingSettings
    ) -> Self:
        """Return a copy of this model trained further on the answers of one or several stages.

        Args:
            stages: Inputs with target answers. Training steps alternate between the stages.
            held_out: Inputs with target answers for early stopping.
            settings: Training settings. Fields that are None use this kind's defaults.

        Returns:
            A trained copy. This model is not changed.

        Raises:
            ConfigurationError: This kind of model cannot be trained.
        """
        raise ConfigurationError(
            f"A {type(self).__name__} cannot be trained on answers. Use a trainable kind such as TransformersGenerator."
        )

    @override
    def settings(self) -> dict[str, Any]:
        return {"score": self._plain(self.score), "slope": self.slope, "intercept": self.intercept}


def split_answers(inputs: Sequence[str], answers: Sequence[str], settings: TrainingSettings) -> list[AnswerExamples]:
    """Split inputs and answers into training and validation examples.

    All answers to the same input stay in the same part.

    Returns:
        Training examples and validation examples.

    Raises:
        DataError: The lengths differ, there are fewer than two distinct inputs, or an answer is empty.
    """
    if len(inputs) != len(answers):
        raise DataError(f"Expected one answer for each input, got {len(inputs)} inputs and {len(answers)} answers.")
    if len(inputs) < 2:
        raise DataError(f"Expected at least two examples, for training and validation, got {len(inputs)}.")
    if empty := [i for i, answer in enumerate(answers) if not answer.strip()]:
        raise DataError(
            f"Training answer {empty[0]} is empty ({len(empty)} empty answers in total). Remove these rows."
        )
    everything = AnswerExamples(list(inputs), list(answers))
    names = sorted(set(everything.texts))  # split by distinct input, so that captions of one image stay together
    order = np.random.default_rng(settings.seed).permutation(len(names))
    held = {names[i] for i in order[: max(1, round(len(names) * settings.validation_fraction))].tolist()}
    if len(held) == len(names):
        raise DataError(
            "Expected at least two distinct inputs, got one, so none can be held out for validation. Add examples with "
            "other inputs."
        )
    rows = [[i for i, one in enumerate(everything.texts) if (one in held) is wanted] for wanted in (False, True)]
    return [everything.take(rows[0]), everything.take(rows[1])]


def fit_answers(
    network: Any,
    losses_of: Callable[[Any, list[Any]], Any],
    stages: Sequence[list[Any]],
    held_out: list[Any],
    settings: TrainingSettings,
    *,
    what: str,
) -> TrainingReport:
    """Fit a generating network in place with `fit_network`.

    Args:
        network: Network to train in place.
        losses_of: Function from the network and features to the loss of each answer, shape `[n, 1]`.
        stages: Features of the training examples, one list per stage.
        held_out: Features of the examples for early stopping.
        settings: Training settings with all fields set.
        what: Title of the progress bar.

    Returns:
        The validation losses of the training.
    """

    def mean(losses: Any, _: Any) -> Any:
        return losses.float().mean()

    made = [Stage(features, np.zeros((len(features), 1))) for features in (*stages, held_out)]
    return fit_network(
        network, losses_of, made[:-1], made[-1], settings, what=what, loss=mean, validation_loss=mean
    )  # fmt: skip


def learned_answers(
    model: Any, stages: Sequence[AnswerExamples], held_out: AnswerExamples, settings: TrainingSettings
) -> Any:
    """Return a copy of a generating model with a torch network, trained on answers.

    Args:
        model: Generating model with `_network`, `losses_of` and `features`. It is not changed.
        stages: Training examples of each stage.
        held_out: Examples for early stopping.
        settings: Training settings with all fields set.
    """
    learner = model.model_copy()
    learner._network, learner._bundle = copy.deepcopy(model._network), None
    features = [learner.features(stage) for stage in (*stages, held_out)]
    report = fit_answers(
        learner._network, learner.losses_of, features[:-1], features[-1], settings, what="distillation"
    )
    learner.lineage = {
        "parent": model.lineage,
        "steps": len(report.history),
        "held_out_nll": report.best_loss,
        "training_text_hashes": text_hashes([text for stage in (*stages, held_out) for text in stage.texts]),
    }
    return learner


def answer_lineage(
    split: Sequence[AnswerExamples], settings: TrainingSettings, report: TrainingReport, **more: Any
) -> dict[str, Any]:
    """Return the training record stored in a bundle, as JSON-compatible values."""
    return {
        "training": settings.what_matters(),
        "examples": len(split[0]),
        "validation_examples": len(split[1]),
        "validation_nll": report.best_loss,
        "best_step": report.best_step,
        "steps": len(report.history),
        "seconds": round(report.seconds, 3),
        "training_text_hashes": text_hashes([text for part in split for text in part.texts]),
        **more,
    }


def written(reader: InputReader, inputs: Sequence[Any]) -> list[str]:
    """Serialise inputs as texts from which `reader` restores the same inputs."""
    return [reader.write(reader.read(one)) for one in inputs]


def _logit(p: FloatArray) -> FloatArray:
    held = np.clip(p, 1.0 - _SUREST, _SUREST)
    return np.asarray(np.where(np.isnan(p), np.nan, np.log(held) - np.log1p(-held)))


def _logistic(x: FloatArray, right: np.ndarray[Any, np.dtype[np.bool_]], strength: float = 1e-3) -> tuple[float, float]:
    """Fit slope and intercept of a logistic regression by Newton's method.

    A weak penalty pulls the slope towards 1, so that the fit is finite if the classes are separable.
    """
    center, spread = float(x.mean()), max(float(x.std()), 1e-6)
    z = np.stack([(x - center) / spread, np.ones(len(x))], axis=1)
    w = np.array([spread, center])
    pull = np.array([strength, 1e-6]) * len(x)
    prior = np.array([spread, 0.0])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ w, -30, 30)))
        gradient = z.T @ (p - right) + pull * (w - prior)
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(pull)
        step = np.linalg.solve(hessian, gradient)
        w = w - np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    slope = max(0.0, float(w[0] / spread))  # a higher score must never lower the confidence
    return slope, float(w[1] - slope * center)
