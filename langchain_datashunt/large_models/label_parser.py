"""LabelParser: parse the answer of a large model into a label, strictly."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.output_parsers import BaseOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import override

from langchain_datashunt._utils.settings import Configured
from langchain_datashunt.exceptions import ConfigurationError, IncompleteAnswerError, UnparsableAnswerError
from langchain_datashunt.large_models.messages import incomplete_reason

_NAMES = (
    "label|answer|category|class|intent|étiquette|réponse|catégorie|antwort|kategorie|klasse|etiqueta|respuesta|"
    "categoría|rótulo|resposta|categoria|etichetta|risposta|метка|ответ|категория|标签|答案|类别|回答|分类|"
    "ラベル|答え|カテゴリ|레이블|답변|답"
)
_LEAD = re.compile(rf"^(?:the\s+)?(?:final\s+)?(?:{_NAMES})\s*(?:is)?\s*[:=：]\s*", re.I)
_BULLET = re.compile(r"^[-–—•‣*]\s+")
_THOUGHT = re.compile(r"^\s*<(think|thinking|thought|reasoning)>.*?</\1>\s*", re.I | re.S)
_FENCE = re.compile(r"^(`{3,}|~{3,})[\w+-]*[ \t]*\n(.*?)\n?[ \t]*\1$", re.S)

_WRAPPING = frozenset(".,;:!'\"*`_")
"""ASCII characters that may surround a label, such as quotes, Markdown emphasis and final punctuation."""

_STOPS = frozenset("。｡．、，；：！।॥။።۔։؛،…‥·¡´")
"""Other characters that end or open a sentence. Question marks are missing, because they express doubt."""

_MOST_STRIPPED = 12
"""Maximum characters that are stripped on each side of a label."""


class LabelParser(Configured, BaseOutputParser[str]):
    """Parse an answer that consists of one label or alias and nothing else.

    Case and the form of Unicode characters are ignored, and spaces, `_` and dashes are equivalent. Quotes, brackets,
    Markdown, final punctuation of any script and a lead such as "Label:" may surround the label. A reasoning block in
    `<think>` tags may precede it, and a JSON object may contain it under `label`. A sentence that merely contains a
    label is rejected, since text that the model repeats from the input must not choose the label.
    """

    model_config = ConfigDict(extra="forbid")

    labels: tuple[str, ...] = Field(min_length=1)
    """Accepted labels."""

    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Other accepted wordings of each label."""

    _exact: dict[str, str] = PrivateAttr(default_factory=dict)
    _loose: dict[str, str] = PrivateAttr(default_factory=dict)
    _bare: dict[str, str] = PrivateAttr(default_factory=dict)

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
        self._bare = _without_punctuation(self._loose)

    @property
    @override
    def _type(self) -> str:
        return "datashunt_label"

    @override
    def parse_result(self, result: list[Generation], *, partial: bool = False) -> str:
        """Return the label in a message.

        Raises:
            IncompleteAnswerError: The message was cut, filtered or refused, or is empty.
            UnparsableAnswerError: The answer is not one of the labels.
        """
        message = result[0].message if isinstance(result[0], ChatGeneration) else None
        if (reason := incomplete_reason(message)) is not None:
            raise IncompleteAnswerError(result[0].text, self.labels, reason=reason)
        return self.parse(result[0].text)

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
        # the label's own final punctuation is missing, as in "U.S" for the label "U.S."
        for candidate in _readings(text):
            if (label := self._bare.get(normalised(candidate))) is not None and candidate:
                return label
        raise UnparsableAnswerError(text, self.labels)

    @override
    def get_format_instructions(self) -> str:
        return "Answer with exactly one of these labels and nothing else: " + ", ".join(self.labels)


def normalised(text: str) -> str:
    """Return the text without differences in case, Unicode form, dashes, apostrophes and word separators.

    Invisible characters are removed. A sign as in "-1" stays.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_FOLDED)
    folded = "".join(_folded(character) for character in folded)
    return re.sub(r"(?<=\w)[\s_\-]+(?=\w)", " ", folded.replace("_", " ")).strip()


_FOLDED = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "´": "'", "′": "'", "＇": "'", "−": "-"})


def _folded(character: str) -> str:
    if character.isascii():
        return character
    category = unicodedata.category(character)
    return "-" if category == "Pd" else "" if category == "Cf" else character


def _readings(text: str) -> Iterator[str]:
    """Yield the texts that may be the label, from the whole answer to the most that is stripped from it."""
    stripped = _THOUGHT.sub("", text).strip()
    yield stripped
    if (fenced := _FENCE.match(stripped)) is not None:
        yield from _readings(fenced[2])
        return
    if stripped.startswith(("{", "[")):
        try:
            found = json.loads(stripped)
        except ValueError:
            found = None
        if isinstance(found, dict):
            if isinstance(found.get("label"), str):
                yield from _stepwise(found["label"])
            return
        if isinstance(found, list):
            if len(found) == 1 and isinstance(found[0], str):
                yield from _stepwise(found[0])
            return
        if stripped.startswith("{"):
            return
    yield from _stepwise(stripped)
    for lead in (_BULLET, _LEAD):
        for bare in (stripped, *_stepwise(stripped)):
            if (rest := lead.sub("", bare)) != bare:
                yield from _stepwise(rest)


def _stepwise(text: str) -> Iterator[str]:
    """Yield the text with ever more wrapping characters stripped on both sides, the least stripped first."""
    text = text.strip()
    lefts = [0, *_ends(text)]
    rights = [0, *_ends(text[::-1])]
    for total in range(len(lefts) + len(rights) - 1):
        for left in range(max(0, total - len(rights) + 1), min(total, len(lefts) - 1) + 1):
            start, end = lefts[left], len(text) - rights[total - left]
            if start < end:
                yield text[start:end].strip()


def _ends(text: str) -> Iterator[int]:
    """Yield the lengths of ever longer runs of wrapping characters at the start of a text."""
    for n, character in enumerate(text[:_MOST_STRIPPED], 1):
        if not (character in _WRAPPING or character in _STOPS or _wraps(character)):
            return
        yield n


def _wraps(character: str) -> bool:
    """Return whether a character is white space, invisible, a bracket or a quotation mark."""
    return unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Pi", "Pf", "Ps", "Pe")


def _without_punctuation(index: Mapping[str, str]) -> dict[str, str]:
    """Map wordings without their final punctuation to labels, except those that would be ambiguous."""
    found: dict[str, str | None] = {}
    for wording, label in index.items():
        shorter = wording.rstrip(".!。")
        if shorter and shorter != wording and shorter not in index:
            found[shorter] = label if found.get(shorter, label) == label else None
    return {wording: label for wording, label in found.items() if label is not None}


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
