"""2-Stage Confidence Distillation: training data, training, the promotion gate and the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_datashunt._utils.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_datashunt.distillation.continual import ContinualDistiller
    from langchain_datashunt.distillation.distiller import (
        DistillationSettings,
        Distilled,
        TwoStageDistiller,
        cold_start,
    )
    from langchain_datashunt.distillation.gate import PromotionGate, Verdict
    from langchain_datashunt.distillation.prepared import DistillationReport
    from langchain_datashunt.distillation.registry import ModelRegistry, ModelVersion, RegistryModel
    from langchain_datashunt.distillation.teacher import TeacherCheck, TeacherVerdict

_MODULE_OF = {
    "ContinualDistiller": "continual",
    "DistillationReport": "prepared",
    "DistillationSettings": "distiller",
    "Distilled": "distiller",
    "ModelRegistry": "registry",
    "ModelVersion": "registry",
    "PromotionGate": "gate",
    "RegistryModel": "registry",
    "TeacherCheck": "teacher",
    "TeacherVerdict": "teacher",
    "TwoStageDistiller": "distiller",
    "Verdict": "gate",
    "cold_start": "distiller",
}

__all__ = [
    "ContinualDistiller",
    "DistillationReport",
    "DistillationSettings",
    "Distilled",
    "ModelRegistry",
    "ModelVersion",
    "PromotionGate",
    "RegistryModel",
    "TeacherCheck",
    "TeacherVerdict",
    "TwoStageDistiller",
    "Verdict",
    "cold_start",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
