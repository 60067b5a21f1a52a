"""Small and large models for tests, as Runnables with simple, predictable behaviour."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import PrivateAttr

from langchain_datashunt import Prediction, SmallModel
from langchain_datashunt.inputs import text_of
from langchain_datashunt.small_models import Scores

LABELS = ("cancel", "refund", "status")


class WordModel(SmallModel):
    """Small model that predicts the label named in the text, confidently with "surely", and NaN with "nan"."""

    labels: tuple[str, ...] = LABELS
    model_id: str = "words"
    _calls: list[int] = PrivateAttr(default_factory=list)
    _fail: Exception | None = PrivateAttr(default=None)

    def predict_scores(self, texts: Sequence[str]) -> Scores:
        self._calls.append(len(texts))
        if self._fail is not None:
            raise self._fail
        rows = []
        for text in texts:
            strength = 6.0 if "surely" in text else 0.6
            rows.append([np.nan if "nan" in text.split() else strength * (label in text) for label in self.labels])
        return Scores(np.array(rows))


def failing_word_model(error: Exception) -> WordModel:
    model = WordModel()
    model._fail = error
    return model


class LetterEmbeddings(Embeddings):
    """Custom encoder without weights that counts letters."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=float)
        return np.roll(counts / (1 + counts.sum(axis=1, keepdims=True)), self.shift, axis=1).tolist()  # type: ignore[no-any-return]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class CountingLarge(Runnable[Any, Any]):
    """Large model that answers "L:<input>", counts single and batch calls, and raises the given errors by input."""

    def __init__(self, failures: dict[str, list[Exception]] | None = None) -> None:
        self.failures = failures or {}
        self.invoked: list[Any] = []
        self.batches: list[int] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def _answer(self, value: Any) -> Any:
        text = value["input"] if isinstance(value, dict) else value
        with self.lock:
            self.invoked.append(value)
            if queue := self.failures.get(text):
                raise queue.pop(0)
        return f"L:{text}"

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        with self.lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            threading.Event().wait(0.005)
            return self._answer(input)
        finally:
            with self.lock:
                self.running -= 1

    def batch(self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any) -> Any:
        self.batches.append(len(inputs))
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Any:
        self.batches.append(len(inputs))
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)


class HttpError(Exception):
    """Error with a status code and headers, as raised by API clients."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.response = type("Response", (), {"status_code": status, "headers": headers or {}})()


def predict_words(value: Any) -> Prediction:
    """Predict as a plain function, to be used as a small model."""
    text = text_of(value)
    sure = 0.96 if "surely" in text else 0.5
    label = next((label for label in LABELS if label in text), LABELS[0])
    rest = (1.0 - sure) / 2
    return Prediction.from_probabilities(
        {name: sure if name == label else rest for name in LABELS}, model_id="function"
    )
