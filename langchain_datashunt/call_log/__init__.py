"""Call log: one record per routed call, with its database, background writer and summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.call_log.callbacks import RecordingCallbackHandler
    from langchain_datashunt.call_log.filters import CallFilter
    from langchain_datashunt.call_log.ledger import SharedLedger
    from langchain_datashunt.call_log.record import CallRecord, latest_of_each_input
    from langchain_datashunt.call_log.recorder import Recorder, RecorderCounters
    from langchain_datashunt.call_log.redaction_rules import OutputBudget, RedactionRules
    from langchain_datashunt.call_log.shared_threshold import SharedThreshold
    from langchain_datashunt.call_log.store import CallLog
    from langchain_datashunt.call_log.summary import SummaryRow, summarize

_MODULE_OF = {
    "CallFilter": "filters",
    "CallLog": "store",
    "CallRecord": "record",
    "OutputBudget": "redaction_rules",
    "Recorder": "recorder",
    "RecorderCounters": "recorder",
    "RecordingCallbackHandler": "callbacks",
    "RedactionRules": "redaction_rules",
    "SharedLedger": "ledger",
    "SharedThreshold": "shared_threshold",
    "SummaryRow": "summary",
    "latest_of_each_input": "record",
    "summarize": "summary",
}

__all__ = [
    "CallFilter",
    "CallLog",
    "CallRecord",
    "OutputBudget",
    "Recorder",
    "RecorderCounters",
    "RecordingCallbackHandler",
    "RedactionRules",
    "SharedLedger",
    "SharedThreshold",
    "SummaryRow",
    "latest_of_each_input",
    "summarize",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
