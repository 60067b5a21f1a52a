"""`python -m langchain_datashunt`, the same as `datashunt`."""

from langchain_datashunt.cli import main

main()
