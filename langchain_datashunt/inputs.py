"""What a caller may pass in, and how models and prompts read it; nothing is ever changed in place."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias

from langchain_core.documents import Document
from langchain_core.messages import AnyMessage, BaseMessage, HumanMessage
from langchain_core.prompt_values import PromptValue

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import InputError

ShuntInput: TypeAlias = str | Document | list[AnyMessage] | dict[str, Any]
"""Text, a document, a conversation (its last human message is classified), or a mapping with such a value."""

DEFAULT_INPUT_KEY = "input"


class InputReader(Strategy):
    """One kind of input: how a small model, a prompt and a record read it.

    What is read is computed on; what is written is a text that reads as the same input again.
    """

    input_key: str = DEFAULT_INPUT_KEY
    """Where mappings hold the input."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """What a small model computes on.

        Raises:
            InputError: The value holds no such input.
        """

    @abstractmethod
    def key(self, item: Any) -> bytes:
        """16 bytes that stand for something that was read."""

    @abstractmethod
    def lay_out(self, value: Any) -> dict[str, Any]:
        """The caller's input as a new mapping, as prompt templates want it.

        Raises:
            InputError: The value holds no such input.
        """

    def snapshot(self, value: Any) -> Any:
        """The input as it is now, for a record that is made later."""
        return value

    @abstractmethod
    def write(self, value: Any) -> str:
        """The text under which an input is recorded, and learnt from again; whatever it is."""


class TextReader(InputReader):
    """Text: strings, documents, conversations, and mappings with one of these."""

    def read(self, value: Any) -> str:
        """The text; see `text_of`."""
        return value if type(value) is str else text_of(value, self.input_key)

    def key(self, item: Any) -> bytes:
        """A hash of the text."""
        return blake2b(item.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def lay_out(self, value: Any) -> dict[str, Any]:
        """As `mapping_of`."""
        return mapping_of(value, self.input_key)

    def write(self, value: Any) -> str:
        """The text; anything else as JSON."""
        try:
            return self.read(value)
        except InputError:
            return json.dumps(value, default=str, ensure_ascii=False)


@lru_cache(maxsize=64)
def text_reader(input_key: str = DEFAULT_INPUT_KEY) -> TextReader:
    """The reader of texts under a key."""
    return TextReader(input_key=input_key)


def text_of(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> str:
    """The text that a small model reads.

    A string is itself, a `Document` its content, a message its text, a conversation (list of messages or prompt
    value) its last human message, a mapping whatever stands under `input_key`.

    Raises:
        InputError: There is no text to be found; the message says what was there.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if input_key not in value:
            msg = (
                f"The input mapping has no key {input_key!r}; it has {sorted(map(str, value))}. "
                f"Rename the key, or give the small model `input_key=`."
            )
            raise InputError(msg)
        return text_of(value[input_key], input_key)
    if isinstance(value, Document):
        return value.page_content
    if (messages := messages_of(value)) is not None:
        return _message_text(messages[_last_human(messages)])
    msg = (
        f"An input of type {type(value).__name__!r} cannot be read as text. Give a string, a Document, "
        f"a list of messages, or a mapping with one of these under {input_key!r}."
    )
    raise InputError(msg)


def messages_of(value: Any) -> list[BaseMessage] | None:
    """The messages of a conversation, or None for anything that is not one."""
    if isinstance(value, BaseMessage):
        return [value]
    if isinstance(value, PromptValue):
        return value.to_messages()
    if isinstance(value, Sequence) and value and all(isinstance(item, BaseMessage) for item in value):
        return list(value)
    return None


def mapping_of(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> dict[str, Any]:
    """The caller's input as a new mapping, as prompt templates want it.

    A mapping is copied; where its `input_key` holds a conversation or a document, that is laid out as below, and so
    is any input that is no mapping. Keys that the caller gives win; a `history` of the caller comes first.

    * text: `input`
    * document: `input` (its content), `document`
    * conversation: `input` (text of the last human message), `history` (the messages before it), `messages` (all)
    * anything else: `input`, as it is
    """
    if isinstance(value, Mapping):
        if input_key not in value:
            return dict(value)
        laid_out = _build(value[input_key], input_key)
        merged = {**laid_out, **value, input_key: laid_out[input_key]}
        if isinstance(value.get("history"), list):
            merged["history"] = [*value["history"], *laid_out.get("history", [])]
        return merged
    return _build(value, input_key)


def _build(value: Any, input_key: str) -> dict[str, Any]:
    if isinstance(value, Document):
        return {input_key: value.page_content, "document": value}
    if not isinstance(value, str) and (messages := messages_of(value)) is not None:
        last = _last_human(messages)
        return {input_key: _message_text(messages[last]), "history": messages[:last], "messages": messages}
    return {input_key: value}


def _last_human(messages: Sequence[BaseMessage]) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if isinstance(messages[i], HumanMessage):
            return i
    kinds = [message.type for message in messages]
    raise InputError(f"The conversation has no human message to classify; its messages are {kinds}. Add one.")


def _message_text(message: BaseMessage) -> str:
    return str(message.text)
