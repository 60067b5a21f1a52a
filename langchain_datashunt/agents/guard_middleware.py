"""PrivacyGuardMiddleware: what an agent's model is shown passes the guard, and its answers come back restored."""

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
    """An outbound guard around the model of `create_agent`.

    ```python
    guard = PrivacyGuard(local_kinds={"API_KEY"}, on_local="abstain")
    agent = create_agent(ChatOpenAI(model="gpt-4o"), tools, middleware=[router, PrivacyGuardMiddleware(guard)])
    ```

    Put it last, next to the model, so that it sees what the other middlewares made of the turn. The system message and
    all messages pass, results of tools too; descriptions of tools are yours and are not looked at. The turns of a local
    model in a `ShuntModelRouterMiddleware` do not pass, for they stay on this machine. Tokens that the agent streams
    while the model writes show placeholders; messages have the texts again. (`ShuntChatModel(guard=...)` restores
    streamed tokens as well.)

    Args:
        guard: The guard. With `on_local="raise"`, a turn that must stay raises `LocalOnlyError`; otherwise the agent
            says so and ends.
        name: Name of this middleware; several in one agent need different ones.

    Raises:
        ConfigurationError: The guard has `local_labels`, and here is no small model that knows labels.
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
        told = {"system": request.system_message, "messages": list(request.messages)}
        out, placeholders = self.guard.outbound(told, subject_of(ensure_config()))
        return request.override(system_message=out["system"], messages=out["messages"]), placeholders

    @staticmethod
    def _restored(response: ModelResponse[Any], placeholders: Placeholders) -> ModelResponse[Any]:
        structured = placeholders.restore(response.structured_response)
        return replace(response, result=placeholders.restore(list(response.result)), structured_response=structured)

    def _abstained(self, error: LocalOnlyError) -> ModelResponse[Any]:
        if self.guard.on_local == "raise":
            raise error
        return ModelResponse(result=[AIMessage(str(self.guard.abstained(error, None)))])
