"""The call log: one record per routed call, its store, its writer and its exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.call_log.callbacks import RecordingCallbackHandler
    from langchain_datashunt.call_log.filters import CallFilter
    from langchain_datashunt.call_log.ledger import SharedLedger
    from langchain_datashunt.call_log.record import RoutedCall
    from langchain_datashunt.call_log.recorder import Recorder, RecorderCounters
    from langchain_datashunt.call_log.redaction_rules import Keeping, OutputBudget
    from langchain_datashunt.call_log.shared_threshold import SharedControl
    from langchain_datashunt.call_log.store import DistillationStore
    from langchain_datashunt.call_log.summary import OverviewRow, overview_of

_MODULE_OF = {
    "CallFilter": "filters",
    "DistillationStore": "store",
    "Keeping": "redaction_rules",
    "OutputBudget": "redaction_rules",
    "OverviewRow": "summary",
    "Recorder": "recorder",
    "RecorderCounters": "recorder",
    "RecordingCallbackHandler": "callbacks",
    "RoutedCall": "record",
    "SharedControl": "shared_threshold",
    "SharedLedger": "ledger",
    "overview_of": "summary",
}

__all__ = [
    "CallFilter",
    "DistillationStore",
    "Keeping",
    "OutputBudget",
    "OverviewRow",
    "Recorder",
    "RecorderCounters",
    "RecordingCallbackHandler",
    "RoutedCall",
    "SharedControl",
    "SharedLedger",
    "overview_of",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
