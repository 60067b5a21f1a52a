"""`datashunt log`: inspect, export, verify, prune and label a call log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from langchain_datashunt.cli.output import console, errors, report, say_json, write_json
from langchain_datashunt.exceptions import ConfigurationError

if TYPE_CHECKING:
    from langchain_datashunt.call_log.store import CallLog

log_app = typer.Typer(help="Inspect and maintain the call log.", no_args_is_help=True)

Url = Annotated[str, typer.Option("--store", help="SQLAlchemy URL, or the path of a SQLite file.")]
Task = Annotated[str | None, typer.Option(help="Only this task.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
JsonOut = Annotated[Path | None, typer.Option("--json-out", help="Write the JSON to this file.")]


def moment(text: str | None) -> float | None:
    """Convert an ISO date or time to seconds since 1970 UTC. The time zone defaults to UTC.

    Raises:
        ConfigurationError: If the text is not an ISO date or time.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(
            f"Expected an ISO date or time, got {text!r}. Write it like 2026-01-31 or 2026-01-31T12:00."
        ) from error
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


@contextmanager
def opened_store(store: str) -> Iterator[CallLog]:
    """Open an existing call log.

    The log is never created here, because an empty new log would make a mistyped path look like a valid, empty result.

    Raises:
        Exit: If the file does not exist.
    """
    with errors():
        from langchain_datashunt.call_log.store import CallLog

        require_store(store)
        with CallLog(store) as opened:
            yield opened


def require_store(store: str) -> None:
    """Raise an error if the file of a SQLite call log does not exist, since opening it would create it.

    Raises:
        ConfigurationError: If the file does not exist.
    """
    from langchain_datashunt.call_log.store import url_of

    path = url_of(store).partition("sqlite:///")[2].partition("?")[0]
    if path and path != ":memory:" and not Path(path).is_file():
        raise ConfigurationError(f"No call log found at {path}. Check --store.")


@log_app.command()
def stats(store: Url, task: Task = None, as_json: AsJson = False, json_out: JsonOut = None) -> None:
    """Print counts, cost, and the agreement of both models."""
    with opened_store(store) as opened:
        from langchain_datashunt.call_log.filters import CallFilter

        report(opened.stats(CallFilter(task=task)), as_json, json_out, store)


@log_app.command()
def export(
    store: Url,
    out: Annotated[Path, typer.Option(help="File to write, or a folder for --format datasets.")],
    kind: Annotated[str | None, typer.Option("--format", help="jsonl, parquet, openai or datasets.")] = None,
    task: Task = None,
    since: Annotated[str | None, typer.Option(help="Only records from this date or time (UTC) on.")] = None,
    until: Annotated[str | None, typer.Option(help="Only records before this date or time (UTC).")] = None,
    route: Annotated[str | None, typer.Option(help="Only this route: small, student or large.")] = None,
    min_confidence: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Minimum confidence of the small model.")
    ] = None,
    max_confidence: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Maximum confidence of the small model.")
    ] = None,
    agreeing: Annotated[
        bool | None,
        typer.Option(
            "--agreeing/--disagreeing", help="Only records with equal answers of both models, or with different ones."
        ),
    ] = None,
) -> None:
    """Export records to a file."""
    with errors():
        from langchain_datashunt.call_log.export import export as write
        from langchain_datashunt.call_log.filters import CallFilter
        from langchain_datashunt.prediction import ROUTES

        if route is not None and route not in ROUTES:
            raise ConfigurationError(f"Expected one of {', '.join(ROUTES)} for --route, got {route!r}.")
        which = CallFilter(
            task=task, since=moment(since), until=moment(until), route=route,
            min_confidence=min_confidence, max_confidence=max_confidence, agrees=agreeing,
        )  # fmt: skip
        with opened_store(store) as opened:
            written = write(opened, out, kind=kind, which=which)
        console.print(f"{written} records written to {out}", highlight=False)


@log_app.command()
def verify(store: Url, as_json: AsJson = False, json_out: JsonOut = None) -> None:
    """Verify all records against their hashes.

    Exits with status 1 if a record is damaged.
    """
    with opened_store(store) as opened:
        problems = opened.verify()
        report({"calls": opened.count(), "problems": problems}, as_json, json_out, store)
    if problems:
        raise typer.Exit(1)


@log_app.command()
def prune(
    store: Url,
    max_age_days: Annotated[float | None, typer.Option(min=0.0, help="Delete records that are older.")] = None,
    max_records: Annotated[int | None, typer.Option(min=0, help="Keep only this many of the newest records.")] = None,
    subject: Annotated[str | None, typer.Option(help="Delete all records of this person.")] = None,
) -> None:
    """Delete records by age, by count, or of one person."""
    with opened_store(store) as opened:
        if max_age_days is None and max_records is None and subject is None:
            raise ConfigurationError("No records selected. Pass --max-age-days, --max-records or --subject.")
        age = None if max_age_days is None else max_age_days * 86400.0
        gone = opened.prune(max_age_seconds=age, max_records=max_records)
        gone += 0 if subject is None else opened.delete(subject=subject)
        console.print(f"{gone} records deleted", highlight=False)


@log_app.command()
def label(
    store: Url,
    source_file: Annotated[Path, typer.Option("--from", help="File with the columns id and label.")],
    source: Annotated[str, typer.Option(help="Source of the labels.")] = "user",
) -> None:
    """Save true labels of logged calls.

    Exits with status 1 if some ids are not in the log.
    """
    from langchain_datashunt._utils.table_files import labelled_texts
    from langchain_datashunt.exceptions import StoreError

    missing = []
    with opened_store(store) as opened:
        ids, labels = labelled_texts(source_file, "id", "label")
        for record_id, true_label in zip(ids, labels, strict=True):
            try:
                opened.label(record_id, true_label, source)
            except StoreError:
                missing.append(record_id)
        console.print(f"{len(ids) - len(missing)} labels saved, {len(missing)} ids not found", highlight=False)
    if missing:
        raise typer.Exit(1)


@log_app.command()
def summary(
    store: Url,
    task: Task = None,
    by: Annotated[str, typer.Option(help="Period of a row: day, week or all.")] = "day",
    since: Annotated[str | None, typer.Option(help="Only records from this date or time (UTC) on.")] = None,
    until: Annotated[str | None, typer.Option(help="Only records before this date or time (UTC).")] = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Print outbound data, cost and quality by period."""
    from langchain_datashunt.call_log.filters import CallFilter
    from langchain_datashunt.call_log.summary import summarize
    from langchain_datashunt.cli.log_summary import print_summary

    with errors():
        which = CallFilter(task=task, since=moment(since), until=moment(until))
        with opened_store(store) as opened:
            rows = summarize(opened, by=by, which=which)  # type: ignore[arg-type]
            found = [row.to_dict() for row in rows]
        write_json(json_out, found)
    if as_json:
        say_json(found)
    else:
        print_summary(rows, by)
