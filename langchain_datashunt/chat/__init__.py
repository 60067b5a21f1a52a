"""The shunt as a chat model, and chat models as small models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.chat.answers import ToolAnswer
    from langchain_datashunt.chat.model import ShuntChatModel
    from langchain_datashunt.chat.small_model import SmallChatModel

_MODULE_OF = {
    "ShuntChatModel": "model",
    "SmallChatModel": "small_model",
    "ToolAnswer": "answers",
}

__all__ = [
    "ShuntChatModel",
    "SmallChatModel",
    "ToolAnswer",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
