"""Confidences from an LLM's response: token log-probabilities and verbalised confidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from langchain_datashunt.prediction import FloatArray


def stated_confidence(text: str | None) -> float | None:
    """Return the `confidence` of a JSON answer, or None if it is missing or not a number in [0, 1]."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    value = found.get("confidence") if isinstance(found, dict) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
    return float(value) if number else None  # type: ignore[arg-type]


def token_logprobs(tokens: Sequence[Mapping[str, Any]]) -> FloatArray:
    """Return the log-probabilities of `logprobs["content"]` from an OpenAI-compatible API, shape `[t]`."""
    return np.array([float(token["logprob"]) for token in tokens])


def label_distribution(
    tokens: Sequence[Mapping[str, Any]], labels: Sequence[str], answer: str
) -> tuple[FloatArray, float] | None:
    """Return the LLM's distribution over labels, derived from the token log-probabilities of its answer.

    The answer's probability is the product of its tokens' probabilities. The alternatives of its first token give the
    other labels their probabilities: an alternative's probability is split evenly among the labels that begin with it,
    unless the answer begins with it too.

    The remaining probability is spread evenly over the other labels. If that would raise one of them above the answer
    and above every alternative, it is spread over all labels instead, because missing information must not make
    another label the most probable one.

    Args:
        tokens: `logprobs["content"]` of an OpenAI-compatible API, with token, logprob and top_logprobs.
        labels: Label set, `k` names.
        answer: Label that the LLM answered.

    Returns:
        Probabilities `[k]` and the answer's own probability before normalisation. None if there are no tokens, or if
        the answer is not one of the labels.
    """
    named = [token for token in tokens if str(token.get("token", "")).strip()]
    if not named or answer not in labels:
        return None
    own = float(np.exp(sum(float(token["logprob"]) for token in named)))
    p, position = np.zeros(len(labels)), list(labels).index(answer)
    for alternative in named[0].get("top_logprobs") or ():
        text = str(alternative["token"]).strip().lower()
        begun = [i for i, label in enumerate(labels) if text and i != position and label.lower().startswith(text)]
        if begun and not answer.lower().startswith(text):
            p[begun] += float(np.exp(alternative["logprob"])) / len(begun)
    p[position] = own
    rest = max(0.0, 1.0 - float(p.sum()))
    others = np.arange(len(labels)) != position
    if others.any() and (p[others] + rest / int(others.sum())).max() <= max(own, p[others].max()):
        p[others] += rest / int(others.sum())
    else:
        p += rest / len(labels)
    return p / p.sum(), min(own, 1.0)
