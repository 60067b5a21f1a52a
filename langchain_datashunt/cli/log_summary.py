"""`datashunt log summary`: outbound data, cost and quality as a table."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from langchain_datashunt.call_log.summary import SummaryRow


def summary_table(rows: Sequence[SummaryRow], by: str) -> Table:
    """Return a table of outbound data, cost and quality, one row for each period."""
    table = Table(title="Outbound data, cost and quality", caption="- : not available")
    table.add_column("since" if by == "all" else by)
    for name in ("calls", "deferral rate", "sent (characters)", "held back", "replaced", "sent unmasked"):
        table.add_column(name, justify="right")
    for name in ("USD", "USD / 1,000", "all deferred", "agreement", "accuracy", "small", "large"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            datetime.fromtimestamp(row.start, UTC).date().isoformat(),
            f"{row.calls:,.0f}",
            _share(row.deferral_rate),
            f"{row.sent:,} ({row.characters:,})",
            f"{row.refused:,}",
            _kinds(row.replaced),
            _kinds(row.plain),
            f"{row.cost_usd:,.2f}",
            _usd(row.usd_per_1000),
            _usd(row.all_large_usd_per_1000),
            _share(row.agreement),
            _share(row.accuracy) + (f" of {row.labelled:,}" if row.labelled else ""),
            _share(row.small_accuracy),
            _share(row.large_accuracy),
        )
    return table


def print_summary(rows: Sequence[SummaryRow], by: str) -> None:
    """Print the summary to standard output, 240 columns wide if that is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(summary_table(rows, by))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _kinds(counts: dict[str, Any]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "0"
