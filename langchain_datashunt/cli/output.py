"""Output of the command line: messages and progress to standard error, JSON to standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from langchain_datashunt.exceptions import ShuntError

console = Console(stderr=True)


@contextmanager
def errors() -> Iterator[None]:
    """Print errors of this package and of files as one message, and exit with status 2."""
    try:
        yield
    except (ShuntError, OSError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def report(summary: dict[str, Any], as_json: bool, json_out: Path | None, line: str) -> None:
    """Print a summary, either as JSON to standard output or as text to standard error.

    Args:
        summary: JSON-ready figures.
        as_json: Whether to print JSON.
        json_out: File to write the JSON to in addition, or None.
        line: First line of the text.
    """
    write_json(json_out, summary)
    if as_json:
        say_json(summary)
        return
    console.print(line, highlight=False, markup=False)
    for key, value in summary.items():
        console.print(f"  {key}: {value}", highlight=False, markup=False)


def progress() -> Progress:
    """Return a progress bar with count, rate and remaining time, on standard error."""

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f}/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def say_json(value: Any) -> None:
    """Print a JSON document to standard output."""
    print(json.dumps(value, indent=2, default=str))


def write_json(file: Path | None, figures: Any) -> None:
    """Write figures to a JSON file, if one is given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
