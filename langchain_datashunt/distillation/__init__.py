"""2-Stage Confidence Distillation: training data, training, the promotion gate and the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.distillation.continual import ContinualDistiller
    from langchain_datashunt.distillation.distiller import DistillationResult, TwoStageDistiller, cold_start
    from langchain_datashunt.distillation.gate import PromotionGate, PromotionResult
    from langchain_datashunt.distillation.prepared import DistillationReport, DistillationSettings
    from langchain_datashunt.distillation.registry import ModelRegistry, ModelVersion, RegistryModel
    from langchain_datashunt.distillation.teacher import TeacherCheck, TeacherCheckResult

_MODULE_OF = {
    "ContinualDistiller": "continual",
    "DistillationReport": "prepared",
    "DistillationResult": "distiller",
    "DistillationSettings": "prepared",
    "ModelRegistry": "registry",
    "ModelVersion": "registry",
    "PromotionGate": "gate",
    "PromotionResult": "gate",
    "RegistryModel": "registry",
    "TeacherCheck": "teacher",
    "TeacherCheckResult": "teacher",
    "TwoStageDistiller": "distiller",
    "cold_start": "distiller",
}

__all__ = [
    "ContinualDistiller",
    "DistillationReport",
    "DistillationResult",
    "DistillationSettings",
    "ModelRegistry",
    "ModelVersion",
    "PromotionGate",
    "PromotionResult",
    "RegistryModel",
    "TeacherCheck",
    "TeacherCheckResult",
    "TwoStageDistiller",
    "cold_start",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
