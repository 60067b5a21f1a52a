"""PrivacyGuardMiddleware: redact requests to an agent's model and restore its responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage
from langchain_core.runnables.config import ensure_config
from typing_extensions import override

from langchain_datashunt.agents.turns import is_draft
from langchain_datashunt.exceptions import LocalOnlyError
from langchain_datashunt.privacy.guard import PrivacyGuard, subject_of
from langchain_datashunt.privacy.redaction import Placeholders


class PrivacyGuardMiddleware(AgentMiddleware[Any, Any, Any]):
    """Redact requests to the model of `create_agent` and restore its responses.

    ```python
    guard = PrivacyGuard(local_kinds={"API_KEY"}, on_local="abstain")
    agent = create_agent(ChatOpenAI(model="gpt-4o"), tools, middleware=[router, PrivacyGuardMiddleware(guard)])
    ```

    Put it last, next to the model, so that it redacts the request after all other middleware. It redacts the system
    message and all messages, including tool results. Tool descriptions are sent unchanged. Turns of the local model in
    a `ShuntModelRouterMiddleware` bypass the guard, since they stay on this machine. Tokens that the agent streams
    while the model writes show placeholders, and the final messages contain the original texts.
    `ShuntChatModel(guard=...)` restores streamed tokens as well.

    Args:
        guard: Privacy guard. If a turn must stay local, `on_local="raise"` raises `LocalOnlyError`. Otherwise the agent
            ends with a message that explains it.
        name: Middleware name, unique within the agent.

    Raises:
        ConfigurationError: The guard has `local_labels`, which require a small model.
    """

    def __init__(self, guard: PrivacyGuard, *, name: str = "PrivacyGuardMiddleware") -> None:
        super().__init__()
        guard.check_without_labels("an agent's middleware")
        self.guard, self._name = guard, name

    @property
    @override
    def name(self) -> str:
        return self._name

    @override
    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        if is_draft():
            return handler(request)
        try:
            asked, placeholders = self._outbound(request)
        except LocalOnlyError as error:
            return self._abstained(error)
        return self._restored(handler(asked), placeholders)

    @override
    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        if is_draft():
            return await handler(request)
        try:
            asked, placeholders = self._outbound(request)
        except LocalOnlyError as error:
            return self._abstained(error)
        return self._restored(await handler(asked), placeholders)

    def _outbound(self, request: ModelRequest[Any]) -> tuple[ModelRequest[Any], Placeholders]:
        payload = {"system": request.system_message, "messages": list(request.messages)}
        out, placeholders = self.guard.outbound(payload, subject_of(ensure_config()))
        return request.override(system_message=out["system"], messages=out["messages"]), placeholders

    @staticmethod
    def _restored(response: ModelResponse[Any], placeholders: Placeholders) -> ModelResponse[Any]:
        structured = placeholders.restore(response.structured_response)
        return replace(response, result=placeholders.restore(list(response.result)), structured_response=structured)

    def _abstained(self, error: LocalOnlyError) -> ModelResponse[Any]:
        if self.guard.on_local == "raise":
            raise error
        return ModelResponse(result=[AIMessage(str(self.guard.abstained(error, None)))])
