"""Evaluation: figures with their uncertainty."""

from __future__ import annotations

from langchain_datashunt.evaluation.intervals import Interval, mean_interval

__all__ = ["Interval", "mean_interval"]
