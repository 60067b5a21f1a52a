"""LabelParser: parse the answer of a large model into a label, strictly."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.output_parsers import BaseOutputParser
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, UnparsableAnswerError

_LEAD = re.compile(r"^(?:the\s+)?(?:final\s+)?(?:label|answer|category|class|intent)\s*(?:is)?\s*[:=]\s*", re.I)
_WRAPPING = " \t\r\n\"'`*“”‘’.,;:"


class LabelParser(Configured, BaseOutputParser[str]):
    """Parse an answer that consists of one label or alias and nothing else.

    Case is ignored, and spaces, `_` and `-` are equivalent. Quotes, Markdown emphasis, final punctuation and a lead
    such as "Label:" may surround the label, and a JSON object may contain it under `label`. A sentence that merely
    contains a label is rejected, since text that the model repeats from the input must not choose the label.
    """

    model_config = ConfigDict(extra="forbid")

    labels: tuple[str, ...] = Field(min_length=1)
    """Accepted labels."""

    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Other accepted wordings of each label."""

    _exact: dict[str, str] = PrivateAttr(default_factory=dict)
    _loose: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Index the wordings.

        Raises:
            ConfigurationError: An alias is ambiguous, or its label does not exist.
        """
        super().model_post_init(context)
        if unknown := sorted(set(self.aliases) - set(self.labels)):
            raise ConfigurationError(f"`aliases` has labels that do not exist: {', '.join(unknown[:5])}. Remove them.")
        self._exact = {label: label for label in self.labels}
        self._loose = _index(self.labels, self.aliases)

    @property
    @override
    def _type(self) -> str:
        return "datashunt_label"

    @override
    def parse(self, text: str) -> str:
        """Return the label in an answer.

        Raises:
            UnparsableAnswerError: The answer is not one of the labels. The error carries the raw text.
        """
        for candidate in _readings(text):
            label = self._exact.get(candidate) or self._loose.get(normalised(candidate))
            if label is not None and candidate:
                return label
        raise UnparsableAnswerError(text, self.labels)

    @override
    def get_format_instructions(self) -> str:
        return "Answer with exactly one of these labels and nothing else: " + ", ".join(self.labels)


def normalised(text: str) -> str:
    """Return the text without differences in case, Unicode form and word separators. A sign as in "-1" stays."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"(?<=\w)[\s_\-]+(?=\w)", " ", folded.replace("_", " ")).strip()


def _readings(text: str) -> Iterable[str]:
    stripped = text.strip()
    yield stripped
    if stripped.startswith("{"):
        try:
            found = json.loads(stripped)
        except ValueError:
            return
        if isinstance(found, dict) and isinstance(found.get("label"), str):
            yield found["label"].strip()
        return
    bare = stripped.strip(_WRAPPING)
    yield bare
    yield _LEAD.sub("", bare).strip(_WRAPPING)


def _index(labels: tuple[str, ...], aliases: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Map each normalised wording to its label. Labels that share one are left out and must be answered exactly."""
    index: dict[str, str] = {}
    clashing: set[str] = set()
    for label in labels:
        key = normalised(label)
        if key in index:
            clashing.add(key)
        index[key] = label
    for key in clashing:
        del index[key]
    for label, wordings in aliases.items():
        for wording in wordings:
            key = normalised(wording)
            if index.get(key, label) != label or key in clashing:
                raise ConfigurationError(
                    f"The alias {wording!r} of {label!r} also matches another label. Remove it from one of them."
                )
            index[key] = label
    return index
