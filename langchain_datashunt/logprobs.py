"""Reading confidences from a large model's message: token log-probabilities and stated numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from langchain_datashunt.prediction import FloatArray


def message_of(response: LLMResult) -> AIMessage | None:
    """The message of a chat model's reply, None for anything else."""
    generation = response.generations[0][0] if response.generations and response.generations[0] else None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    return message if isinstance(message, AIMessage) else None


def said(message: AIMessage) -> str:
    """What a message says: its text, or the arguments of its tool calls as JSON."""
    text = str(message.text)
    return text if text or not message.tool_calls else json.dumps([call["args"] for call in message.tool_calls])


def stated_confidence(text: str | None) -> float | None:
    """The number in [0, 1] that a JSON answer gives as its `confidence`, None where it gives none."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    value = found.get("confidence") if isinstance(found, dict) else None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
    return float(value) if number else None  # type: ignore[arg-type]


def token_logprobs(tokens: Sequence[Mapping[str, Any]]) -> FloatArray:
    """The log-probabilities of `logprobs["content"]` as OpenAI-compatible APIs give it, shape `[t]`."""
    return np.array([float(token["logprob"]) for token in tokens])


def label_distribution(
    tokens: Sequence[Mapping[str, Any]], labels: Sequence[str], answer: str
) -> tuple[FloatArray, float] | None:
    """The large model's distribution over labels from the log-probabilities of its answer's tokens.

    The answer's own probability is the product over its tokens. The first token's alternatives give the other
    labels theirs: an alternative that begins exactly one label belongs to it, one that begins several is shared by
    them; what fits no label is spread over all others, or over all labels where the others would get more of it than
    the answer has: what is not known of an answer does not make another one likely.

    Args:
        tokens: `logprobs["content"]` as OpenAI-compatible APIs give it: token, logprob, top_logprobs.
        labels: The label set, `k` names.
        answer: The label that was answered.

    Returns:
        Probabilities `[k]` and the answer's own; None where the tokens say nothing of this answer.
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
