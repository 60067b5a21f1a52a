"""Calibration: probabilities that mean what they say, and thresholds chosen on held-out data."""

from __future__ import annotations

from langchain_datashunt.calibration.temperature import fit_temperature
from langchain_datashunt.calibration.thresholds import (
    MatchLarge,
    MaxAccuracy,
    Objective,
    QueryShare,
    ThresholdChoice,
    deferral_curve,
    select_threshold,
)

__all__ = [
    "MatchLarge",
    "MaxAccuracy",
    "Objective",
    "QueryShare",
    "ThresholdChoice",
    "deferral_curve",
    "fit_temperature",
    "select_threshold",
]
