"""The command line: `datashunt train | run | demo`. Commands read options and print; the work is done elsewhere."""

from __future__ import annotations


def main() -> None:
    """Run the command line; says what to install where the `cli` extra is missing."""
    import sys

    from langchain_datashunt._utils.optional import require
    from langchain_datashunt.exceptions import MissingExtraError

    try:
        for package in ("typer", "rich"):
            require(package, "cli")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    from langchain_datashunt.cli.app import app

    app()
