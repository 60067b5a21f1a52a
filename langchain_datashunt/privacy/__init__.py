"""Privacy guard: detect entities, redact what is sent to the LLM, and limit its amount."""

from __future__ import annotations

from langchain_datashunt.privacy.budget import Disclosure, DisclosureBudget, LocalLedger
from langchain_datashunt.privacy.detectors import (
    DETECTORS,
    Detector,
    Entity,
    PatternDetector,
    PresidioDetector,
    find_entities,
)
from langchain_datashunt.privacy.guard import AbstainedLocally, GuardedModel, PrivacyGuard
from langchain_datashunt.privacy.redaction import Placeholders, StreamRestorer

__all__ = [
    "DETECTORS",
    "AbstainedLocally",
    "Detector",
    "Disclosure",
    "DisclosureBudget",
    "Entity",
    "GuardedModel",
    "LocalLedger",
    "PrivacyGuard",
    "PatternDetector",
    "Placeholders",
    "PresidioDetector",
    "StreamRestorer",
    "find_entities",
]
