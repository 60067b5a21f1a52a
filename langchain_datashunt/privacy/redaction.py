"""Redaction: replace entities by placeholders in any structure, and restore them in answers and streams."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.prompt_values import PromptValue
from pydantic import BaseModel

from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.exceptions import LocalOnlyError
from langchain_datashunt.prediction import Candidates
from langchain_datashunt.privacy.detectors import Detector, Entity, all_entities, without_overlaps

_PLACEHOLDER = re.compile(r"<([A-Z][A-Z_]{0,40})_(\d{1,6})>", re.IGNORECASE)
_IN_JSON = re.compile(r"(?:<|\\u003c)([A-Z][A-Z_]{0,40})_(\d{1,6})(?:>|\\u003e)", re.IGNORECASE)
_UNFINISHED_IN_JSON = re.compile(r"(?:(?:<|\\u003c)\w{0,48})?(?:\\(?:u(?:0(?:0(?:3)?)?)?)?)?$", re.IGNORECASE)
_LONGEST = 50
_LONGEST_KIND = 40
_BINARY = ("image", "image_url", "audio", "input_audio", "video", "file", "media", "document")
"""Types of parts that detectors cannot check, wherever they are."""

_READABLE = frozenset(
    {
        "text", "input_text", "output_text", "refusal", "citation", "reasoning", "reasoning_content", "thinking",
        "redacted_thinking", "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "tool_result",
        "function_call", "function_call_output", "server_tool_call", "server_tool_call_chunk", "server_tool_result",
        "cachePoint",
    }
)  # fmt: skip
"""Types of content blocks whose texts detectors can check. Blocks of other types are not sent."""

_EMBEDDED = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]*)*;base64,|[A-Za-z0-9+/]{256}", re.IGNORECASE)
"""Data URLs and long base64, which detectors cannot check."""

_JSON_FIELDS = ("args", "arguments", "partial_json")
"""Fields of message parts that contain JSON as text."""


class CallKeywords(dict[str, Any]):
    """Keyword arguments of a call. Texts in them are redacted, and objects such as functions and classes are kept."""


class Placeholders:
    """Replacements of one call. Equal texts have the same placeholder in prompt, variables and history.

    Args:
        detectors: Detectors to apply.
        kinds: Kinds to replace. None replaces all that are found.
        local: Kinds that must not leave this machine.
        allow_binary: Whether images, audio and files may be sent, although detectors cannot check them.
        local_where: Rule that returns True for texts that must not leave this machine. It is not applied to labels and
            to the questions of subtasks.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        *,
        kinds: frozenset[str] | None = None,
        local: frozenset[str] = frozenset(),
        allow_binary: bool = False,
        local_where: Callable[[str], bool] | None = None,
    ) -> None:
        self.local_where = local_where
        self.detectors, self.kinds, self.local, self.allow_binary = detectors, kinds, local, allow_binary
        self.counts: dict[str, int] = {}
        """Number of replaced entities by kind."""
        self.plain: dict[str, int] = {}
        """Number of entities by kind that were found and left unchanged."""
        self.characters = 0
        """Number of characters of the redacted text."""
        self._names: dict[tuple[str, str], str] = {}
        self._texts: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._taken: set[tuple[str, int]] = set()
        self._seen = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """16-byte hash of the redacted text."""
        return self._seen.digest()[:16]

    def __bool__(self) -> bool:
        return bool(self._texts)

    # Redaction

    def reserve(self, value: Any) -> None:
        """Reserve the placeholders that the value already contains.

        Otherwise a literal `<EMAIL_1>` in the input would be restored to a real address in the answer.
        """
        for text in texts_in(value):
            for kind, number in _PLACEHOLDER.findall(text):
                self._taken.add((kind.upper(), int(number)))

    def redact(self, value: Any) -> Any:
        """Return a copy of a structure with the entities in its texts replaced.

        Raises:
            LocalOnlyError: The value contains data that must not leave this machine or that detectors cannot check.
        """
        if isinstance(value, Enum):  # a constant of the caller's code, not user data
            return value
        if isinstance(value, str):
            return self._redact_text(value)
        if isinstance(value, CallKeywords):
            return {self._redact_text(name): self._redact_setting(one) for name, one in value.items()}
        if (own := getattr(value, "redacted_with", None)) is not None:
            return own(self.redact)
        if isinstance(value, Candidates):
            descriptions = {self._replaced(k): self._replaced(v) for k, v in value.descriptions.items()}
            return Candidates([self._replaced(one) for one in value], descriptions)
        if isinstance(value, BaseMessage):
            return self._redact_message(value)
        if isinstance(value, PromptValue):
            return [self.redact(message) for message in value.to_messages()]
        if isinstance(value, Document):
            return Document(page_content=self._redact_text(value.page_content), metadata=self.redact(value.metadata))
        if isinstance(value, Mapping):
            if not self.allow_binary and value.get("type") in _BINARY:
                raise LocalOnlyError(f"it contains a part of type {value['type']!r}, which detectors cannot check")
            made = {self.redact(key): self.redact(one) for key, one in value.items()}
            return made if type(value) is dict else self._same_kind(value, made)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.redact(one) for one in value))
        if isinstance(value, list | tuple | set | frozenset):
            inner = [self.redact(one) for one in value]
            return inner if type(value) is list else self._same_kind(value, inner)
        if isinstance(value, BaseModel):
            kind = getattr(value, "block_type", None)
            if not self.allow_binary and kind is not None and kind not in _READABLE:
                raise LocalOnlyError(f"it contains a block of type {value.block_type!r}, which detectors cannot check")  # type: ignore[attr-defined]
            return value.model_copy(update={name: self.redact(one) for name, one in fields_of(value).items()})
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value, **{one.name: self.redact(getattr(value, one.name)) for one in fields(value) if one.init}
            )
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float | complex):
            return self._redact_number(value)
        if isinstance(value, bytes | bytearray | memoryview) and not self.allow_binary:
            raise LocalOnlyError(f"it contains {type(value).__name__}, which detectors cannot check")
        if self.allow_binary:
            return value
        raise LocalOnlyError(f"it contains a {type(value).__name__}, which detectors cannot check")

    @staticmethod
    def _same_kind(value: Any, made: Any) -> Any:
        """Convert a collection to the class of the original, or return it unchanged if that fails."""
        try:
            return type(value)(made)
        except Exception:
            return made

    def _redact_number(self, value: Any) -> Any:
        """Return the number, or its placeholder if it is an entity, such as a card or phone number."""
        text = str(value)
        found = self._redact_text(text)
        return value if found == text else found

    def _redact_setting(self, value: Any) -> Any:
        if isinstance(value, str | int | float | list | tuple | dict | BaseMessage) and not isinstance(value, bool):
            if isinstance(value, dict):
                return {self._redact_setting(key): self._redact_setting(one) for key, one in value.items()}
            if isinstance(value, list | tuple):
                inner = [self._redact_setting(one) for one in value]
                return inner if isinstance(value, list) else tuple(inner)
            return self.redact(value)
        return value

    def _redact_block(self, block: Any) -> Any:
        """Return a content block of a message with its texts redacted.

        Raises:
            LocalOnlyError: The block is of a type that detectors cannot check.
        """
        if isinstance(block, Mapping) and not self.allow_binary and block.get("type") not in _READABLE:
            raise LocalOnlyError(f"it contains a part of type {block.get('type')!r}, which detectors cannot check")
        return self.redact(block)

    def _redact_message(self, message: BaseMessage) -> BaseMessage:
        content: Any = message.content
        blocks = isinstance(content, list)
        changed: dict[str, Any] = {"content": [*map(self._redact_block, content)] if blocks else self.redact(content)}
        if message.name:
            changed["name"] = self._redact_text(message.name)
        if isinstance(message, AIMessage):
            changed["tool_calls"] = [{**call, "args": self.redact(call["args"])} for call in message.tool_calls]
            changed["invalid_tool_calls"] = self.redact(message.invalid_tool_calls)
        if isinstance(message, AIMessageChunk):
            changed["tool_call_chunks"] = _chunks_of(changed["tool_calls"], changed["invalid_tool_calls"])
        changed["additional_kwargs"] = self.redact(message.additional_kwargs)
        if (artifact := getattr(message, "artifact", None)) is not None:
            changed["artifact"] = self.redact(artifact)
        changed["response_metadata"] = {}
        return message.model_copy(update=changed)

    def _redact_text(self, text: str) -> str:
        if self.local_where is not None and self.local_where(text):
            raise LocalOnlyError("the rule `local_where` matches it")
        if not self.allow_binary and _EMBEDDED.search(text) is not None:
            raise LocalOnlyError("it contains encoded data, which detectors cannot check")
        return self._replaced(text)

    def _replaced(self, text: str) -> str:
        parts, at = [], 0
        for entity in self._entities(text):
            parts += [text[at : entity.start], self._name_of(entity.kind, text[entity.start : entity.end])]
            at = entity.end
        parts.append(text[at:])
        made = "".join(parts)
        self.characters += len(made)
        self._seen.update(made.encode(errors="surrogatepass") + b"\0")
        return made

    def _entities(self, text: str) -> list[Entity]:
        if not text:
            return []
        found = all_entities(text, self.detectors)
        if here := sorted({entity.kind for entity in found} & self.local):
            raise LocalOnlyError(f"it contains {', '.join(here)}", kinds=tuple(here))
        if self.kinds is None:
            return [whole for whole, _ in without_overlaps(found)]
        for whole, parts in without_overlaps(found):
            if not any(part.kind in self.kinds for part in parts):
                self.plain[whole.kind] = self.plain.get(whole.kind, 0) + 1
        return [whole for whole, _ in without_overlaps([one for one in found if one.kind in self.kinds])]

    def _name_of(self, kind: str, text: str) -> str:
        if (kind, text) not in self._names:
            kind_name = re.sub(r"[^A-Z_]", "_", kind.upper())
            kind_name = (kind_name if kind_name[:1].isalpha() else f"X{kind_name}")[:_LONGEST_KIND]
            number = self._numbers.get(kind_name, 0) + 1
            while (kind_name, number) in self._taken:
                number += 1
            self._numbers[kind_name] = number
            name = f"<{kind_name}_{number}>"
            self._names[kind, text], self._texts[name] = name, text
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return self._names[kind, text]

    # Restoring

    def restore(self, value: Any) -> Any:
        """Return a copy of an answer with this call's placeholders replaced by the original texts."""
        if not self._texts:
            return value
        if isinstance(value, str):
            return self.restore_text(value)
        if isinstance(value, ShuntResult):
            return replace(
                value, output=self.restore(value.output), large_output=self.restore(value.large_output),
                inner=self.restore(value.inner),
            )  # fmt: skip
        if isinstance(value, BaseMessage):
            changed: dict[str, Any] = {"content": self.restore_parts(value.content)}
            changed["additional_kwargs"] = self.restore_parts(value.additional_kwargs)
            if isinstance(value, AIMessage):
                changed["tool_calls"] = self.restore(value.tool_calls)
                changed["invalid_tool_calls"] = self.restore_parts(value.invalid_tool_calls)
            if isinstance(value, AIMessageChunk):
                changed["tool_call_chunks"] = self.restore_parts(value.tool_call_chunks)
            return value.model_copy(update=changed)
        if isinstance(value, Document):
            return Document(page_content=self.restore(value.page_content), metadata=self.restore(value.metadata))
        if isinstance(value, Mapping):
            made = {self.restore(key): self.restore(one) for key, one in value.items()}
            return made if type(value) is dict else self._same_kind(value, made)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.restore(one) for one in value))
        if isinstance(value, list | tuple | set | frozenset):
            inner = [self.restore(one) for one in value]
            return inner if type(value) is list else self._same_kind(value, inner)
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: self.restore(one) for name, one in fields_of(value).items()})
        if is_dataclass(value) and not isinstance(value, type):
            changed = {one.name: self.restore(getattr(value, one.name)) for one in fields(value) if one.init}
            return replace(value, **changed)
        return value

    def restore_text(self, text: str) -> str:
        """Return the text with placeholders restored, in any letter case that the model wrote."""
        return _PLACEHOLDER.sub(lambda match: self._texts.get(match.group().upper(), match.group()), text)

    def restore_json(self, text: str) -> str:
        """Return a fragment of JSON text with placeholders restored.

        Inserted texts are escaped, so that they cannot end a JSON string.
        """

        def escaped(match: re.Match[str]) -> str:
            known = self._texts.get(f"<{match.group(1)}_{match.group(2)}>".upper())
            return match.group() if known is None else json.dumps(known, ensure_ascii=False)[1:-1]

        return _IN_JSON.sub(escaped, text)

    def restore_parts(self, value: Any) -> Any:
        """Return the parts of a message with placeholders restored, including tool arguments given as JSON text."""
        if isinstance(value, Mapping):
            return {
                key: self.restore_json(one) if key in _JSON_FIELDS and isinstance(one, str) else self.restore_parts(one)
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [self.restore_parts(one) for one in value]
        return self.restore(value)


class StreamRestorer:
    """Restore placeholders in a stream of chunks, even if a placeholder is split across chunks.

    Text, messages with text and arguments of tool calls are buffered while they may end in a partial placeholder. Other
    chunks are restored one by one.
    """

    def __init__(self, placeholders: Placeholders) -> None:
        self._placeholders = placeholders
        self._held: dict[Any, str] = {}
        self._last: Any = None

    def feed(self, chunk: Any) -> Any:
        """Return the part of a chunk that can be shown now, as a chunk of the same type."""
        self._last = chunk
        if isinstance(chunk, str):
            return self._text("", chunk)
        if isinstance(chunk, AIMessageChunk):
            return self._message(chunk)
        if isinstance(chunk, ShuntResult):
            return replace(chunk, output=self.feed(chunk.output)) if chunk.output is not None else chunk
        return self._placeholders.restore(chunk)

    def rest(self) -> Iterator[Any]:
        """Yield the text that is still buffered at the end of the stream, as chunks of the last one's type."""
        held, self._held = {key: text for key, text in self._held.items() if text}, {}
        for key, text in held.items():
            in_json = isinstance(self._last, AIMessageChunk) and isinstance(key, int)
            whole = self._placeholders.restore_json(text) if in_json else self._placeholders.restore_text(text)
            if in_json:
                call = {"name": None, "args": whole, "id": None, "index": key, "type": "tool_call_chunk"}
                yield AIMessageChunk(content="", tool_call_chunks=[call], id=self._last.id)
            elif isinstance(self._last, AIMessageChunk):
                yield AIMessageChunk(content=whole, id=self._last.id)
            elif isinstance(self._last, ShuntResult):
                yield replace(self._last, output=whole)
            else:
                yield whole

    def _text(self, key: Any, new: str) -> str:
        text = self._held.get(key, "") + new
        now = without_unfinished(text)
        self._held[key] = text[len(now) :]
        return self._placeholders.restore_text(now)

    def _json(self, key: Any, new: str) -> str:
        text = self._held.get(key, "") + new
        unfinished = _UNFINISHED_IN_JSON.search(text)
        now = text if unfinished is None else text[: unfinished.start()]
        self._held[key] = text[len(now) :]
        return self._placeholders.restore_json(now)

    def _message(self, chunk: AIMessageChunk) -> AIMessageChunk:
        changed: dict[str, Any] = {"additional_kwargs": self._placeholders.restore_parts(chunk.additional_kwargs)}
        if isinstance(chunk.content, str):
            changed["content"] = self._text("", chunk.content)
        else:
            changed["content"] = [self._block(block) for block in chunk.content]
        calls = []
        for call in chunk.tool_call_chunks:
            made = copy.copy(call)
            if call.get("args"):
                made["args"] = self._json(call.get("index") if call.get("index") is not None else 0, call["args"] or "")
            calls.append(made)
        changed["tool_call_chunks"] = calls
        return AIMessageChunk(**{**_fields(chunk), **changed})

    def _block(self, block: Any) -> Any:
        if isinstance(block, Mapping) and isinstance(block.get("text"), str):
            return {**block, "text": self._text(("block", block.get("index")), block["text"])}
        return self._placeholders.restore_parts(block)


def _chunks_of(calls: Sequence[Any], invalid: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the tool call chunks of a message with these calls."""
    texts = [(call, json.dumps(call["args"], ensure_ascii=False)) for call in calls]
    texts += [(call, call.get("args") or "") for call in invalid]
    return [
        {"name": call.get("name"), "args": args, "id": call.get("id"), "index": i, "type": "tool_call_chunk"}
        for i, (call, args) in enumerate(texts)
    ]


def without_unfinished(text: str) -> str:
    """Return the text without a possible partial placeholder at its end."""
    start = text.rfind("<")
    unfinished = start >= 0 and ">" not in text[start:] and len(text) - start <= _LONGEST
    return text[:start] if unfinished else text


def _fields(chunk: AIMessageChunk) -> dict[str, Any]:
    names = ("id", "name", "additional_kwargs", "response_metadata", "usage_metadata", "chunk_position")
    return {name: getattr(chunk, name) for name in names if hasattr(chunk, name)}


def fields_of(value: BaseModel) -> dict[str, Any]:
    """Return all fields of a pydantic object, including extra ones."""
    return {**{name: getattr(value, name) for name in type(value).model_fields}, **(value.model_extra or {})}


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a structure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, BaseMessage):
        yield from texts_in([value.content, value.name, value.additional_kwargs])
        for name in ("tool_calls", "invalid_tool_calls", "artifact"):
            yield from texts_in(getattr(value, name, None))
    elif isinstance(value, PromptValue):
        yield from texts_in(value.to_messages())
    elif isinstance(value, Document):
        yield value.page_content
        yield from texts_in(value.metadata)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from texts_in(key)
            yield from texts_in(one)
    elif isinstance(value, list | tuple | set | frozenset):
        for one in value:
            yield from texts_in(one)
    elif isinstance(value, BaseModel):
        yield from texts_in(fields_of(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from texts_in({name: getattr(value, name) for name in value.__dataclass_fields__})


def human_texts(value: Any) -> Iterator[str]:
    """Yield the text of every human message in a payload, and the payload itself or its `input` if that is a text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, HumanMessage):
        yield str(value.text)
    elif isinstance(value, PromptValue):
        yield from human_texts(value.to_messages())
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if not isinstance(one, str) or key == "input":
                yield from human_texts(one)
    elif isinstance(value, (list, tuple)) and not isinstance(value, Candidates):
        for one in value:
            if not isinstance(one, str):
                yield from human_texts(one)
