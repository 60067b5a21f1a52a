"""Command line of the package: commands parse options and print the results of other modules."""

from __future__ import annotations


def main() -> None:
    """Run the command line, or exit with an install command if the `cli` extra is missing."""
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
