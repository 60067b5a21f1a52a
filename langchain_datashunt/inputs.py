"""Input types of shunts and small models, and readers that convert them for models, prompts and records."""

from __future__ import annotations

import json
import math
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias

from langchain_core.documents import Document
from langchain_core.messages import AnyMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue

from langchain_datashunt._utils.settings import Strategy
from langchain_datashunt.exceptions import InputError, PartialInputError

ShuntInput: TypeAlias = str | Document | list[AnyMessage] | dict[str, Any]
"""Text, a document, a conversation (its last human message is classified), or a mapping with one of these.

The messages of a conversation may also be dicts as in the OpenAI API, or (role, content) tuples."""

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

    def refusal(self, value: Any, max_characters: int | None = None) -> InputError | None:
        """Return the error for a value that no model is to answer, or None.

        Args:
            value: The caller's input.
            max_characters: Maximum length of the text, in characters. None means unlimited.
        """
        return refusal_of_missing(value, self.input_key)

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

    def refusal(self, value: Any, max_characters: int | None = None) -> InputError | None:
        """Return the error for a value without text, with blank text, or with too long a text, or None."""
        try:
            text = self.read(value)
        except PartialInputError:
            return None
        except InputError as error:
            return error
        if is_blank(text):
            return InputError("The input is blank. Pass a text, or leave this call out.")
        if max_characters is not None and len(text) > max_characters:
            return InputError(
                f"The input has {len(text):,} characters, more than max_input_characters={max_characters:,}. Shorten "
                f"it, or raise `max_input_characters`."
            )
        return None

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
        """Return the text, with other parts of a message named in brackets, or JSON if it has no text."""
        try:
            return self.read(value)
        except PartialInputError:
            return _written(value, self.input_key)
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
        PartialInputError: The message has other parts than text, such as an image.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and not (_is_message(value) and input_key not in value):
        if input_key not in value:
            msg = (
                f"The input mapping has no key {input_key!r}, only {sorted(map(str, value))}. "
                f"Rename the key, or pass `input_key=`."
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


def refusal_of_missing(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> InputError | None:
    """Return the error for None, NaN or blank text in any form, or None for other values.

    Values of other forms are accepted, because a small model may read them by itself.
    """
    inner = value[input_key] if isinstance(value, Mapping) and input_key in value else value
    if _is_missing(inner):
        return InputError(f"Expected an input, got {inner!r}. Pass one, or leave this call out.")
    try:
        blank = is_blank(text_of(inner, input_key))
    except InputError:
        return None
    return InputError("The input is blank. Pass a text, or leave this call out.") if blank else None


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return not any(map(_visible, text))


def _visible(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in ("Cf", "Cc")


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and is_blank(value))
    )


_ROLES = frozenset({"system", "developer", "human", "user", "ai", "assistant", "tool", "function"})


def _is_message(value: Any) -> bool:
    """Return whether a value is a message, or a dict or tuple that stands for one."""
    if isinstance(value, BaseMessage):
        return True
    if isinstance(value, Mapping):
        return value.get("role") in _ROLES and ("content" in value or "tool_calls" in value)
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0] in _ROLES


def messages_of(value: Any) -> list[BaseMessage] | None:
    """Return the messages of a conversation, or None if the value is not one.

    Dicts as in the OpenAI API and (role, content) tuples are converted to messages.

    Raises:
        InputError: A message cannot be converted.
    """
    if isinstance(value, BaseMessage):
        return [value]
    if isinstance(value, PromptValue):
        return value.to_messages()
    if _is_message(value):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        return None
    if all(isinstance(item, BaseMessage) for item in value):
        return list(value)
    if not all(_is_message(item) for item in value):
        return None
    try:
        return convert_to_messages(value)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise InputError(f"A message of the conversation cannot be read: {error}. Pass LangChain messages.") from error


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
    if isinstance(value, Mapping) and not (_is_message(value) and input_key not in value):
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
        text = _parts(messages[last])[0]
        return {input_key: text, "history": messages[:last], "messages": messages}
    return {input_key: value}


def is_question(message: Any) -> bool:
    """Return whether a message comes from a human, and not from a middleware such as a summary of the conversation."""
    return isinstance(message, HumanMessage) and not message.additional_kwargs.get("lc_source")


def _last_human(messages: Sequence[BaseMessage]) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if is_question(messages[i]):
            return i
    kinds = [message.type for message in messages]
    raise InputError(f"The conversation has no human message to classify, only {kinds}. Add a human message.")


def _message_text(message: BaseMessage) -> str:
    text, others = _parts(message)
    if others:
        raise PartialInputError(
            f"The message has parts that a text model cannot read: {', '.join(sorted(set(map(_kind, others))))}. It is "
            f"left to the large model."
        )
    return text


def _parts(message: BaseMessage) -> tuple[str, list[Any]]:
    """Return the text of a message, and its content blocks that are not text."""
    if isinstance(message.content, str):
        return str(message.content), []
    texts: list[str] = []
    others: list[Any] = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") in ("text", "input_text") and isinstance(block.get("text"), str):
            texts.append(block["text"])
        else:
            others.append(block)
    return "".join(texts), others


def _kind(block: Any) -> str:
    return str(block.get("type", "unknown"))


def _question_parts(value: Any, input_key: str) -> tuple[str, list[Any]]:
    """Return the parts of the last human message of a conversation, which may be under the input key of a mapping."""
    if isinstance(value, Mapping) and input_key in value:
        return _question_parts(value[input_key], input_key)
    messages = None if isinstance(value, (str, Document)) else messages_of(value)
    return ("", []) if messages is None else _parts(messages[_last_human(messages)])


def other_parts(value: Any, input_key: str = DEFAULT_INPUT_KEY) -> list[Any]:
    """Return the content blocks of the last human message that are not text, or an empty list."""
    return _question_parts(value, input_key)[1]


def _written(value: Any, input_key: str) -> str:
    text, others = _question_parts(value, input_key)
    return " ".join([text, *(f"[{_kind(block)}]" for block in others)]).strip()
