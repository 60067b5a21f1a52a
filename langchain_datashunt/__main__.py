"""Entry point of `python -m langchain_datashunt`, equivalent to the `datashunt` command."""

from langchain_datashunt.cli import main

main()
