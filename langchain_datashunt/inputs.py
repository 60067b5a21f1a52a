"""Input types of shunts and small models, and readers that convert them for models, prompts and records."""

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
"""Text, a document, a conversation (its last human message is classified), or a mapping with one of these."""

DEFAULT_INPUT_KEY = "input"


class InputReader(Strategy):
    """Base class that converts one kind of input for the small model, the LLM prompt and the call log.

    `read` returns the data for the small model. `write` returns text that `read` accepts as the same input again.
    """

    input_key: str = DEFAULT_INPUT_KEY
    """Key of the input in mappings."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return the data that a small model classifies.

        Raises:
            InputError: The value does not contain an input of this kind.
        """

    @abstractmethod
    def key(self, item: Any) -> bytes:
        """Return a 16-byte digest of data returned by `read`."""

    @abstractmethod
    def lay_out(self, value: Any) -> dict[str, Any]:
        """Return the caller's input as a new mapping of prompt variables.

        Raises:
            InputError: The value does not contain an input of this kind.
        """

    def snapshot(self, value: Any) -> Any:
        """Return the input in its current state, for a record that is written later."""
        return value

    @abstractmethod
    def write(self, value: Any) -> str:
        """Return the text that the call log stores and training reads, for any value."""


class TextReader(InputReader):
    """Reader for text: strings, documents, conversations, and mappings with one of these."""

    def read(self, value: Any) -> str:
        """Return the text of the input (see `text_of`)."""
        return value if type(value) is str else text_of(value, self.input_key)

    def key(self, item: Any) -> bytes:
        """Return a hash of the text."""
        return blake2b(item.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def lay_out(self, value: Any) -> dict[str, Any]:
        """Return the prompt variables (see `mapping_of`)."""
        return mapping_of(value, self.input_key)

    def snapshot(self, value: Any) -> str:
        """Return the text, because the caller may extend a conversation or change a mapping."""
        return value if type(value) is str else self.write(value)

    def write(self, value: Any) -> str:
        """Return the text, or JSON if the value does not contain text."""
        try:
            return self.read(value)
        except InputError:
            return json.dumps(value, default=str, ensure_ascii=False)


@lru_cache(maxsize=64)
def text_reader(input_key: str = DEFAULT_INPUT_KEY) -> TextReader:
    """Return the cached text reader for an input key."""
    return TextReader(input_key=input_key)


def text_of(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> str:
    """Return the text that a small model classifies.

    Strings are used as they are. A `Document` supplies its content, a message its text, a conversation (list of
    messages or prompt value) its last human message, and a mapping the text of its value under `input_key`.

    Raises:
        InputError: The value does not contain text. The message names its type or its keys.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        if input_key not in value:
            msg = (
                f"The input mapping has no key {input_key!r}, only {sorted(map(str, value))}. "
                f"Rename the key, or pass `input_key=` to the small model."
            )
            raise InputError(msg)
        return text_of(value[input_key], input_key)
    if isinstance(value, Document):
        return value.page_content
    if (messages := messages_of(value)) is not None:
        return _message_text(messages[_last_human(messages)])
    msg = (
        f"Expected text input, got {type(value).__name__!r}. Pass a string, a Document, "
        f"a list of messages, or a mapping with one of these under {input_key!r}."
    )
    raise InputError(msg)


def messages_of(value: Any) -> list[BaseMessage] | None:
    """Return the messages of a conversation, or None if the value is not one."""
    if isinstance(value, BaseMessage):
        return [value]
    if isinstance(value, PromptValue):
        return value.to_messages()
    if isinstance(value, Sequence) and value and all(isinstance(item, BaseMessage) for item in value):
        return list(value)
    return None


def mapping_of(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> dict[str, Any]:
    """Return the caller's input as a new mapping of prompt variables.

    The variables depend on the input:

    * text: `input`
    * document: `input` (its content), `document`
    * conversation: `input` (text of the last human message), `history` (the messages before it), `messages` (all)
    * anything else: `input`, unchanged

    A mapping is copied, and the value under its `input_key` is expanded in this way. The caller's other keys take
    precedence. If the caller passes a `history`, it is placed before the one from the conversation.
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
    raise InputError(f"The conversation has no human message to classify, only {kinds}. Add a human message.")


def _message_text(message: BaseMessage) -> str:
    return str(message.text)
