"""Tables of the demo's figures, with their sources."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_figures(figures: dict[str, Any]) -> None:
    """Print the tables, followed by notes on data, models and estimates."""
    console = Console()
    console.print(_main_table(figures))
    if figures["prompt_tokens"]:
        console.print(_prompt_table(figures))
    if figures["loop"]["distilled"]:
        console.print(_loop_table(figures["loop"]))
    for line in _remarks(figures):
        console.print(line, highlight=False)


def _main_table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"{figures['n']} test texts, 95% intervals in brackets")
    for column in ("", "accuracy", "deferral rate", "cost, USD", "p50 of one call"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("small alone", _share(figures, "small_accuracy"), "0%", "0", f"{figures['p50_ms_small']:.1f} ms")
    replayed = " (replayed)" if figures["replayed"] else ""
    table.add_row(
        "large alone",
        _share(figures, "large_accuracy"),
        "100%",
        _usd(figures["cost_large_usd"]),
        f"{figures['p50_ms_large']:.1f} ms{replayed}",
    )
    table.add_row(
        "[bold]shunt[/]",
        f"[bold]{_share(figures, 'shunt_accuracy')}[/]",
        _share(figures, "deferral_rate"),
        _usd(figures["cost_shunt_usd"]),
        f"{figures['p50_ms_shunt']:.1f} ms{replayed}",
    )
    return table


def _prompt_table(figures: dict[str, Any]) -> Table:
    table = Table(title="Prompt of a deferred call by pruning strategy (estimated tokens)")
    for column in ("strategy", "tokens", "candidates", "true label included"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name, row in figures["prompt_tokens"].items():
        table.add_row(name, f"{row['tokens']:.0f}", f"{row['candidates']:.1f}", f"{100 * row['true_label_kept']:.1f}%")
    return table


def _loop_table(loop: dict[str, Any]) -> Table:
    table = Table(title=f"Distillation from the calls of one half, evaluated on the other half ({loop['n']} texts)")
    for column in ("", "small alone", "shunt", "deferral rate"):
        table.add_column(column, justify="left" if not column else "right")
    for row, words in ((loop["before"], "before"), (loop["after"], "after distillation")):
        names = ("small_accuracy", "shunt_accuracy", "deferral_rate")
        table.add_row(words, *(_share(row, name) for name in names))
    return table


def _remarks(figures: dict[str, Any]) -> list[str]:
    low, high = figures["shunt_minus_large_interval"]
    lines = [
        f"Shunt minus large model: {100 * figures['shunt_minus_large']:+.1f} points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}], paired bootstrap. "
        f"The threshold {figures['threshold']:.4f} was chosen on {figures['threshold_chosen_on']} other texts.",
        f"Data: {figures['data']}. Large model: {figures['large']}.",
    ]
    loop = figures["loop"]
    if loop["distilled"]:
        learnt = loop["learnt_from"]
        lines.append(
            f"Distilled from {learnt['stage_a']} answers of the large model and {learnt['stage_b']} of the small "
            f"model, without true labels of these texts. The gate {'promoted' if loop['promoted'] else 'rejected'} the "
            f"student on {loop['gate_n']} development texts: {loop['reason']}."
        )
    else:
        lines.append(f"No student was distilled: {loop['reason']}")
    if figures["tokens_estimated"]:
        lines.append(
            f"Tokens are estimated (characters / 4) and priced as {figures['price_model']} by genai-prices. The "
            f"answers of the large model were replayed from a local HTTP server. They show neither its real latency "
            f"nor the effect of pruning strategies on its accuracy."
        )
    if figures["large_errors"]:
        lines.append(f"{figures['large_errors']} LLM calls failed after all retries. The small model answered instead.")
    lines.append(f"Small model: {figures['bundle']} · {figures['seconds']} s · version {figures['version']}")
    return lines


def _share(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{100 * figures[name]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _usd(value: float | None) -> str:
    return "not available" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.4f}"
