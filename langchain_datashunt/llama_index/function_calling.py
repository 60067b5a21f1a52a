"""PreparedByLarge: base class of LLM wrappers that delegate the preparation of tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.tools.types import BaseTool
from typing_extensions import override


class PreparedByLarge(FunctionCallingLLM):
    """Delegate the preparation of tool calls to `large`, since every LLM has its own request format."""

    large: FunctionCallingLLM

    @override
    def _prepare_chat_with_tools(
        self, tools: Sequence[BaseTool], user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None, verbose: bool = False, allow_parallel_tool_calls: bool = False,
        tool_required: bool = False, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        return self.large._prepare_chat_with_tools_compat(
            tools, user_msg=user_msg, chat_history=chat_history, verbose=verbose,
            allow_parallel_tool_calls=allow_parallel_tool_calls, tool_required=tool_required, **kwargs,
        )  # fmt: skip
