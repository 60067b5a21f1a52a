"""The shunt as a chat model, and chat models as small models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.chat.answers import ToolAnswer
    from langchain_datashunt.chat.model import ShuntChatModel
    from langchain_datashunt.chat.small_model import ChatModelSmallModel

_MODULE_OF = {
    "ChatModelSmallModel": "small_model",
    "ShuntChatModel": "model",
    "ToolAnswer": "answers",
}

__all__ = [
    "ChatModelSmallModel",
    "ShuntChatModel",
    "ToolAnswer",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
