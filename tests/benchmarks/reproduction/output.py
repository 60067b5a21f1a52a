"""Output of tables as Markdown between marks of a page, and of plots as standalone SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt.evaluation.figures import HEIGHT, WIDTH, Chart

_STYLE = (
    ":root{--a:#2563eb;--b:#d97706;--c:#059669;--d:#9333ea;--e:#64748b}"
    "text{font:12px system-ui,sans-serif;fill:#334155}.grid{stroke:#e2e8f0}"
    "@media(prefers-color-scheme:dark){text{fill:#cbd5e1}.grid{stroke:#334155}rect.page{fill:#0f172a}}"
)


@dataclass
class Found:
    """Result of a run.

    Attributes:
        figures: JSON-ready figures.
        markdown: Table as Markdown.
        plots: Charts by file name.
    """

    figures: dict[str, Any]
    markdown: str
    plots: dict[str, Chart] = field(default_factory=dict)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Return the mean in percent, with half the width of its 95% interval (Student's t) if there are several seeds."""
    from scipy.stats import t

    mean, n = float(np.nanmean(values)), len(values)
    if n < 2:
        return f"{100 * mean:.1f}"
    half = float(t.ppf(0.975, n - 1) * np.nanstd(values, ddof=1) / np.sqrt(n))
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def write(found: Found, folder: Path, name: str) -> None:
    """Write the table between its marks, and the plots to the folder of the page."""
    page = folder / "reproduction.md"
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: made by the command above -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"Expected the marks {begin} and {end} in {page}. Add them.")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n{found.markdown}\n{end}{after}", encoding="utf-8")
    (folder / "reproduction").mkdir(exist_ok=True)
    for file, chart in found.plots.items():
        (folder / "reproduction" / file).write_text(standalone(chart) + "\n", encoding="utf-8")


def standalone(chart: Chart) -> str:
    """Return a chart as a standalone SVG with style, title and legend."""
    inner = chart.svg().removesuffix("</svg>").split(">", 1)[1]
    high = HEIGHT + 22 * ((len(chart.lines) + 2) // 3) + 24
    legend = []
    for i, line in enumerate(chart.lines):
        x, y = 60 + 170 * (i % 3), HEIGHT + 18 + 22 * (i // 3)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        legend.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="var({line.colour})" stroke-width="2.5"'
            f'{dash}/><text x="{x + 28}" y="{y}">{escape(line.name)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {WIDTH} {high}" role="img" '
        f'aria-label="{escape(chart.title)}"><style>{_STYLE}</style>'
        f'<rect class="page" x="0" y="-24" width="{WIDTH}" height="{high}" fill="#fff"/>'
        f'<text x="{WIDTH / 2}" y="-6" text-anchor="middle" font-weight="600">{escape(chart.title)}</text>'
        f"{inner}{''.join(legend)}</svg>"
    )
