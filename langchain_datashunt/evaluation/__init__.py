"""Evaluation: metrics, curves, and figures with confidence intervals."""

from __future__ import annotations

from langchain_datashunt.evaluation.agreement import Agreement, agreement
from langchain_datashunt.evaluation.betting import ConfidenceSequence, betting_p_value
from langchain_datashunt.evaluation.curves import (
    DeferralCurve,
    Reliability,
    RiskCoverage,
    deferral_curve,
    reliability,
    risk_coverage,
)
from langchain_datashunt.evaluation.intervals import (
    Interval,
    joint_intervals,
    mean_interval,
    resampled_interval,
    wilson_interval,
)
from langchain_datashunt.evaluation.offline import Evaluation, evaluate

__all__ = [
    "Agreement",
    "ConfidenceSequence",
    "DeferralCurve",
    "Evaluation",
    "Interval",
    "Reliability",
    "RiskCoverage",
    "agreement",
    "betting_p_value",
    "deferral_curve",
    "evaluate",
    "joint_intervals",
    "mean_interval",
    "reliability",
    "resampled_interval",
    "risk_coverage",
    "wilson_interval",
]
