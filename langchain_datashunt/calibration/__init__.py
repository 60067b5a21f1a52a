"""Calibration of probabilities, and selection of thresholds on held-out data."""

from __future__ import annotations

from langchain_datashunt.calibration.objectives import (
    MatchLarge,
    MaxAccuracy,
    MaxCost,
    MaxDeferralRate,
    Objective,
    RiskControl,
)
from langchain_datashunt.calibration.scaling import VectorScaling, fit_vector_scaling
from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.calibration.thresholds import ThresholdChoice, select_threshold
from langchain_datashunt.evaluation.curves import DeferralCurve, deferral_curve

__all__ = [
    "DeferralCurve",
    "MatchLarge",
    "MaxAccuracy",
    "MaxCost",
    "Objective",
    "MaxDeferralRate",
    "RiskControl",
    "ThresholdChoice",
    "VectorScaling",
    "deferral_curve",
    "fit_temperature",
    "fit_vector_scaling",
    "select_threshold",
]
