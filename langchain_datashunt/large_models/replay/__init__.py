"""Replay recorded answers of a large model from a local OpenAI-compatible HTTP server."""

from __future__ import annotations

from langchain_datashunt.large_models.replay.answers import RecordedAnswers
from langchain_datashunt.large_models.replay.server import ChatServer, replay_model
from langchain_datashunt.large_models.replay.tokens import estimate_message_tokens, estimate_tokens

__all__ = ["ChatServer", "RecordedAnswers", "estimate_message_tokens", "estimate_tokens", "replay_model"]
