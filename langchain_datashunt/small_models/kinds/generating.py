"""Small models that write their answer: the base of text generators and captioners. No network here."""

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
    """What was written for one input.

    Attributes:
        answer: The text.
        logprobs: Log-probabilities of its tokens, without that of the end, shape `[t]`, in nats.
        truncated: Whether the input was cut to the model's maximal length.
    """

    answer: str
    logprobs: FloatArray
    truncated: bool = False


@dataclass(frozen=True)
class AnswerExamples:
    """Inputs with the answers that are taught.

    Attributes:
        texts: `n` inputs as texts (an image as its data URL).
        answers: `n` texts.
    """

    texts: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> AnswerExamples:
        """Some of them, by index."""
        return AnswerExamples([self.texts[i] for i in rows], [self.answers[i] for i in rows])


class GeneratingModel(SmallModel):
    """A small model that writes its answer.

    Its prediction is over "answer" and "other": how likely what it wrote is right. That follows from the probabilities
    of the tokens, which the generation itself leaves behind, by `score`, and by `slope` and `intercept` where
    `fit_confidence` has measured them. A kind implements `generate`, and `learn_answers` where it can learn.
    """

    labels: tuple[str, ...] = ANSWER_LABELS

    score: TokenScore = Field(default_factory=MeanTokenProbability)
    """From token probabilities to one number in [0, 1]."""

    slope: float = 1.0
    """P(right) = sigmoid(slope * logit(score) + intercept)."""

    intercept: float = 0.0

    @abstractmethod
    def generate(self, inputs: Sequence[Any]) -> list[Generated]:
        """Write an answer to each of `n` inputs, as `reader` reads them."""

    @override
    def predict_scores(self, texts: Sequence[Any]) -> Scores:
        made = self.generate(texts)
        errors: dict[int, Exception] = {
            i: PredictionError(f"{self.model_id or type(self).__name__} wrote an empty answer to input {i}.")
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
        """A copy whose confidence is the probability that the answer is right, measured on held-out inputs.

        Args:
            inputs: `n` inputs that the model was not trained on.
            right: Whether its answer to each is right (as you judge: equal, close enough, approved).

        Raises:
            DataError: Lengths differ, or all answers are right, or all wrong.
        """
        truth = np.array([bool(one) for one in right])
        if len(truth) != len(inputs) or truth.all() or not truth.any():
            raise DataError(
                f"{len(inputs)} inputs with {int(truth.sum())} right of {len(truth)} judged answers tell nothing of "
                f"when the model is right; give one judgement for each input, of both kinds."
            )
        plain = self.model_copy(update={"slope": 1.0, "intercept": 0.0, "temperature": 1.0})
        batch = plain.predict_batch(inputs)
        slope, intercept = _logistic(_logit(batch.confidence), truth)
        return self.model_copy(update={"slope": slope, "intercept": intercept, "temperature": 1.0})

    def learn_answers(
        self, stages: Sequence[AnswerExamples], held_out: AnswerExamples, settings: TrainingSettings
    ) -> Self:
        """A copy of this model, trained on answers of several stages in turn; this one is not changed.

        Args:
            stages: Inputs with the answers that are taught; a step on each is taken in turn.
            held_out: What training stops on.
            settings: How to train; what is None is filled with this kind's defaults.

        Raises:
            ConfigurationError: This kind cannot learn.
        """
        raise ConfigurationError(f"A {type(self).__name__} cannot learn from answers; use a kind that does.")

    @override
    def settings(self) -> dict[str, Any]:
        return {"score": self._plain(self.score), "slope": self.slope, "intercept": self.intercept}


def split_answers(inputs: Sequence[str], answers: Sequence[str], settings: TrainingSettings) -> list[AnswerExamples]:
    """Examples to learn from, and examples to stop on.

    Raises:
        DataError: Lengths differ, there are fewer than two, or an answer is empty.
    """
    if len(inputs) != len(answers):
        raise DataError(f"{len(inputs)} inputs and {len(answers)} answers: give one answer for each input.")
    if len(inputs) < 2:
        raise DataError(f"{len(inputs)} examples are too few to learn from and to stop on; give at least two.")
    if empty := [i for i, answer in enumerate(answers) if not answer.strip()]:
        raise DataError(f"Training answer {empty[0]} is empty ({len(empty)} in all); remove such rows.")
    everything = AnswerExamples(list(inputs), list(answers))
    names = sorted(set(everything.texts))  # captions of one picture stay together
    order = np.random.default_rng(settings.seed).permutation(len(names))
    held = {names[i] for i in order[: max(1, round(len(names) * settings.validation_fraction))].tolist()}
    if len(held) == len(names):
        raise DataError("All examples have one input, so none can be held out; give a validation set.")
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
    """Fit a network that writes, as `fit_network` does.

    Args:
        network: Trained in place.
        losses_of: From the network and features to the loss of each answer, shape `[n, 1]`.
        stages: Features to learn from.
        held_out: Features to stop on.
        settings: All fields filled.
        what: Title of the progress bar.
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
    """A copy of a generating model with a torch network, trained on answers.

    Args:
        model: Has `_network`, `losses_of` and `features`; it is not changed.
        stages: What is learnt from.
        held_out: What training stops on.
        settings: All fields filled.
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
    """What a bundle says of a training on answers; JSON-ready."""
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
    """Inputs as texts that read as the same inputs again."""
    return [reader.write(reader.read(one)) for one in inputs]


def _logit(p: FloatArray) -> FloatArray:
    held = np.clip(p, 1.0 - _SUREST, _SUREST)
    return np.asarray(np.where(np.isnan(p), np.nan, np.log(held) - np.log1p(-held)))


def _logistic(x: FloatArray, right: np.ndarray[Any, np.dtype[np.bool_]], strength: float = 1e-3) -> tuple[float, float]:
    """Slope and intercept of a logistic regression, by Newton's method, with a slight pull of the slope towards 1."""
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
    slope = max(0.0, float(w[0] / spread))  # surer never counts as less likely right
    return slope, float(w[1] - slope * center)
