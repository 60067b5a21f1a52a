"""The demo's figures as tables for people, with what they come from."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_figures(figures: dict[str, Any]) -> None:
    """Print the tables and the line that says where the numbers come from."""
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
    for column in ("", "accuracy", "share asked", "cost, USD", "p50 of one call"):
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
    table = Table(title="Prompt of an asked call, by pruning strategy (estimated tokens)")
    for column in ("strategy", "tokens", "candidates", "true label among them"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name, row in figures["prompt_tokens"].items():
        table.add_row(name, f"{row['tokens']:.0f}", f"{row['candidates']:.1f}", f"{100 * row['true_label_kept']:.1f}%")
    return table


def _loop_table(loop: dict[str, Any]) -> Table:
    table = Table(title=f"The loop: learnt from one half's calls, scored on the other half ({loop['n']} texts)")
    for column in ("", "small alone", "shunt", "share asked"):
        table.add_column(column, justify="left" if not column else "right")
    for row, words in ((loop["before"], "before"), (loop["after"], "after distillation")):
        names = ("small_accuracy", "shunt_accuracy", "deferral_rate")
        table.add_row(words, *(_share(row, name) for name in names))
    return table


def _remarks(figures: dict[str, Any]) -> list[str]:
    low, high = figures["shunt_minus_large_interval"]
    lines = [
        f"Shunt less large: {100 * figures['shunt_minus_large']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
        f"paired bootstrap. Threshold {figures['threshold']:.4f}, chosen on {figures['threshold_chosen_on']} other "
        f"texts.",
        f"Data: {figures['data']}. Large model: {figures['large']}.",
    ]
    loop = figures["loop"]
    if loop["distilled"]:
        learnt = loop["learnt_from"]
        lines.append(
            f"Distilled from {learnt['stage_a']} answers of the large model and {learnt['stage_b']} of the small one, "
            f"no true label among them; the gate {'promoted' if loop['promoted'] else 'rejected'} it on "
            f"{loop['gate_n']} development texts: {loop['reason']}."
        )
    else:
        lines.append(f"Nothing was distilled: {loop['reason']}")
    if figures["tokens_estimated"]:
        lines.append(
            f"Tokens are estimated (characters / 4) and priced as {figures['price_model']} by genai-prices. The large "
            f"model's answers were replayed over HTTP on this machine, so its latency is not that of the real one, and "
            f"no pruning strategy's effect on its accuracy can be read from them."
        )
    if figures["large_errors"]:
        lines.append(f"{figures['large_errors']} large calls failed for good; the small model's answer stood in.")
    lines.append(f"Small model: {figures['bundle']} · {figures['seconds']} s · version {figures['version']}")
    return lines


def _share(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{100 * figures[name]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _usd(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f}" if value >= 1 else f"{value:.4f}"
