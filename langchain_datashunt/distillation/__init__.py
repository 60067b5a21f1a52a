"""Distillation: the record of routed calls, its store and its writer, and what is trained from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_datashunt.distillation.callbacks import RecordingCallbackHandler
    from langchain_datashunt.distillation.continual import ContinualDistiller
    from langchain_datashunt.distillation.controls import SharedControl
    from langchain_datashunt.distillation.distiller import (
        DistillationSettings,
        Distilled,
        TwoStageDistiller,
        cold_start,
    )
    from langchain_datashunt.distillation.filters import CallFilter
    from langchain_datashunt.distillation.gate import PromotionGate, Verdict
    from langchain_datashunt.distillation.keeping import Keeping, OutputBudget
    from langchain_datashunt.distillation.ledger import SharedLedger
    from langchain_datashunt.distillation.overview import OverviewRow, overview_of
    from langchain_datashunt.distillation.prepared import DistillationReport
    from langchain_datashunt.distillation.record import RoutedCall
    from langchain_datashunt.distillation.recorder import Recorder, RecorderCounters
    from langchain_datashunt.distillation.registry import ModelRegistry, ModelVersion, RegistryModel
    from langchain_datashunt.distillation.store import DistillationStore
    from langchain_datashunt.distillation.teacher import TeacherCheck, TeacherVerdict

_WHERE = {
    "CallFilter": "filters",
    "cold_start": "distiller",
    "ContinualDistiller": "continual",
    "DistillationReport": "prepared",
    "DistillationSettings": "distiller",
    "DistillationStore": "store",
    "Distilled": "distiller",
    "Keeping": "keeping",
    "ModelRegistry": "registry",
    "ModelVersion": "registry",
    "OutputBudget": "keeping",
    "overview_of": "overview",
    "OverviewRow": "overview",
    "PromotionGate": "gate",
    "Recorder": "recorder",
    "RecorderCounters": "recorder",
    "RecordingCallbackHandler": "callbacks",
    "RegistryModel": "registry",
    "RoutedCall": "record",
    "SharedControl": "controls",
    "SharedLedger": "ledger",
    "TeacherCheck": "teacher",
    "TeacherVerdict": "teacher",
    "TwoStageDistiller": "distiller",
    "Verdict": "gate",
}

__all__ = [
    "CallFilter",
    "ContinualDistiller",
    "DistillationReport",
    "DistillationSettings",
    "DistillationStore",
    "Distilled",
    "Keeping",
    "ModelRegistry",
    "ModelVersion",
    "OutputBudget",
    "OverviewRow",
    "PromotionGate",
    "Recorder",
    "RecorderCounters",
    "RecordingCallbackHandler",
    "RegistryModel",
    "RoutedCall",
    "SharedControl",
    "SharedLedger",
    "TeacherCheck",
    "TeacherVerdict",
    "TwoStageDistiller",
    "Verdict",
    "cold_start",
    "overview_of",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
