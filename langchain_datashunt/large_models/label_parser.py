"""From a large model's answer to a label, strictly: the whole answer is a label or an alias, or it is unparsable."""

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
    """Reads a label out of an answer.

    Accepted are a label or an alias and nothing else, in any case and with blanks, `_` and `-` alike; around it
    quotes, Markdown emphasis, final punctuation and a lead such as "Label:"; and a JSON object whose `label` is one.
    A sentence that merely contains a label is not accepted: text that the model repeats from the input must not
    choose the label.
    """

    model_config = ConfigDict(extra="forbid")

    labels: tuple[str, ...] = Field(min_length=1)
    """What may be answered."""

    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Other wordings by label."""

    _exact: dict[str, str] = PrivateAttr(default_factory=dict)
    _loose: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Index the wordings; refuse those that mean two labels."""
        super().model_post_init(context)
        if unknown := sorted(set(self.aliases) - set(self.labels)):
            raise ConfigurationError(
                f"Aliases are given for labels that do not exist: {', '.join(unknown[:5])}. Leave them out."
            )
        self._exact = {label: label for label in self.labels}
        self._loose = _index(self.labels, self.aliases)

    @property
    @override
    def _type(self) -> str:
        return "datashunt_label"

    @override
    def parse(self, text: str) -> str:
        """The label.

        Raises:
            UnparsableAnswerError: The answer is none of the labels; it carries the raw text.
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
    """Case, Unicode form and the choice of separator between two words do not count; a sign such as -1 does."""
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
    """Normalised wording -> label. Labels that differ only by case or separator must be answered exactly."""
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
                    f"The alias {wording!r} of {label!r} means another label too. Remove it from one of them."
                )
            index[key] = label
    return index
