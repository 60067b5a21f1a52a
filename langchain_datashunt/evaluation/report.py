"""HTML report of an evaluation, in one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.optional import require
from langchain_datashunt._version import __version__
from langchain_datashunt.evaluation.curves import Reliability
from langchain_datashunt.evaluation.figures import Chart, Line, Point
from langchain_datashunt.evaluation.offline import Evaluation, LabelRow
from langchain_datashunt.prediction import FloatArray

TEMPLATE = "report.html.jinja"
WORST_LABELS = 25


def write_report(
    file: str | Path, evaluation: Evaluation, *, title: str = "Data Shunt report", texts: Sequence[str] | None = None
) -> Path:
    """Write an HTML report of an evaluation.

    Args:
        file: Path of the report. Missing parent folders are created.
        evaluation: Evaluation to report.
        title: Heading of the report.
        texts: Texts of the examples, `n` in their order, to show those that were routed wrongly. None omits all texts.

    Returns:
        Path of the report.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(evaluation, title=title, texts=texts), encoding="utf-8")
    return path


def render(evaluation: Evaluation, *, title: str = "Data Shunt report", texts: Sequence[str] | None = None) -> str:
    """Return the report as HTML. The arguments are those of `write_report`."""
    jinja = require("jinja2", "report")
    environment = jinja.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["share"], environment.filters["figure"] = _share, _figure
    source = files("langchain_datashunt.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    charts = [chart for chart in (_cost_accuracy(evaluation), _reliability(evaluation), _risk(evaluation)) if chart]
    html: str = environment.from_string(source).render(
        title=title,
        version=__version__,
        evaluation=evaluation,
        figures=evaluation.figures,
        headline=_headline(evaluation),
        guarantee=evaluation.guarantee.replace("None: ", "No guarantee: ", 1),
        charts=[{"chart": chart, "svg": chart.svg(), "legend": chart.legend()} for chart in charts],
        labels=[(row, _advice(row)) for row in evaluation.labels[:WORST_LABELS]],
        more_labels=max(0, len(evaluation.labels) - WORST_LABELS),
        examples=_examples(evaluation, texts),
    )
    return html


def _headline(evaluation: Evaluation) -> str:
    f = evaluation.figures
    asked = _share(f["deferral_rate"].value)
    if math.isnan(f["shunt_accuracy"].value):
        wrong = _share(f["selective_risk"].value)
        return f"{asked} of {evaluation.n:,} inputs are deferred to the large model. Of the rest, {wrong} are wrong."
    best = f["shunt_accuracy"].value
    if not math.isnan(f["fused_accuracy"].value):
        best = f["fused_accuracy"].value
    gap = 100 * (best - f["large_accuracy"].value)
    words = (
        "as accurate as"
        if abs(gap) < 0.05
        else f"{abs(gap):.1f} percentage points {'more' if gap > 0 else 'less'} accurate than"
    )
    return f"Deferring {asked} of {evaluation.n:,} inputs to the large model is {words} deferring all of them."


def _cost_accuracy(evaluation: Evaluation) -> Chart | None:
    curve, f = evaluation.curve, evaluation.figures
    if curve is None:
        return None
    small, large = f["small_accuracy"].value, f["large_accuracy"].value
    lines = [Line("Small model if confident, else large model", curve.deferral_rate.tolist(), curve.accuracy.tolist())]
    chosen = f["shunt_accuracy"].value
    if (fused := evaluation.fused_curve) is not None:
        lines.append(Line("With fused answers", fused.deferral_rate.tolist(), fused.accuracy.tolist(), "--b"))
        chosen = f["fused_accuracy"].value
    lines.append(Line("Random deferral", [0.0, 1.0], [small, large], "--d", dashed=True))
    points = [
        Point("small model", 0.0, small, "--d"),
        Point("large model", 1.0, large, "--d"),
        Point("chosen", f["deferral_rate"].value, chosen),
    ]
    return Chart("Accuracy by deferral rate", "deferral rate", "accuracy", lines, points)


def _reliability(evaluation: Evaluation) -> Chart:
    after, before = evaluation.reliability_after, evaluation.reliability_before
    lines = [Line("Current probabilities", after.confidence.tolist(), after.accuracy.tolist())]
    if before is not None and not _same(before, after):
        lines.append(Line("Before calibration", before.confidence.tolist(), before.accuracy.tolist(), "--b"))
    lines.append(Line("Perfect calibration", [0.0, 1.0], [0.0, 1.0], "--d", dashed=True))
    share = after.count / after.count.sum()
    bars = [(float(c) - 0.02, float(c) + 0.02, float(s)) for c, s in zip(after.confidence, share, strict=True)]
    return Chart("Reliability", "confidence", "accuracy (bars: share of inputs)", lines, (), bars, square=True)


def _risk(evaluation: Evaluation) -> Chart:
    found, f = evaluation.risk_coverage, evaluation.figures
    kept = 1.0 - f["deferral_rate"].value
    points = [] if math.isnan(f["selective_risk"].value) else [Point("chosen", kept, f["selective_risk"].value)]
    line = Line("Most confident inputs first", found.coverage.tolist(), found.risk.tolist())
    return Chart("Risk and coverage", "coverage (share answered locally)", "selective risk", [line], points)


def _same(one: Reliability, other: Reliability) -> bool:
    def close(a: FloatArray, b: FloatArray) -> bool:
        return a.shape == b.shape and bool(np.allclose(a, b, atol=1e-3))

    return close(one.confidence, other.confidence) and close(one.accuracy, other.accuracy)


def _advice(row: LabelRow) -> str:
    """Return advice for a label, or an empty string if none is needed."""
    if row.n < 10:
        return "Few examples: label more before you act on these figures."
    if not math.isnan(row.selective_risk) and row.selective_risk > 0.1 and row.kept > 0.2:
        return "Many wrong local answers: use a threshold per label (RiskControl with per_label), or add examples."
    if row.small_accuracy < 0.7 and row.large_accuracy < 0.7:
        return "Hard for both models: check whether the definition overlaps with another label."
    if row.small_accuracy < 0.7:
        return "Hard for the small model: add training examples, or distil from the large model's answers."
    if row.kept < 0.3:
        return "Accurate but rarely confident: add training examples, so that more inputs are answered locally."
    return ""


def _examples(evaluation: Evaluation, texts: Sequence[str] | None) -> list[dict[str, Any]]:
    kinds = (
        ("Answered locally but wrong", evaluation.kept_wrongly),
        ("Deferred although only the small model was right", evaluation.deferred_needlessly),
    )
    return [
        {"title": title, "rows": [(example, None if texts is None else texts[example.row]) for example in shown]}
        for title, shown in kinds
        if shown
    ]


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
