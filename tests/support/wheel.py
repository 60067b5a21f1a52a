"""Check that built distributions contain the package and its licence, but no tests, caches or large data.

python -m tests.support.wheel dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

FORBIDDEN = ("tests/", "cookbook/", "docs/", "__pycache__", ".pyc", ".env", ".db")
LARGEST = 300_000
"""Maximum bytes of one file in a wheel. The demo messages are the largest file."""


def names_and_sizes(file: Path) -> dict[str, int]:
    """Return the files of a wheel or an sdist with their sizes in bytes."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return {one.filename: one.file_size for one in wheel.infolist()}
    with tarfile.open(file) as sdist:
        return {one.name.partition("/")[2]: one.size for one in sdist if one.isfile()}


def complaints(file: Path) -> list[str]:
    """Return descriptions of unexpected and missing files."""
    found = names_and_sizes(file)
    wrong = []
    if file.suffix == ".whl":
        wrong += [f"{name} does not belong there" for name in found if any(part in name for part in FORBIDDEN)]
        wrong += [f"{name} has {size} bytes" for name, size in found.items() if size > LARGEST]
        needed = ["langchain_datashunt/py.typed", "langchain_datashunt/evaluation/report.html.jinja"]
        wrong += [f"{name} is missing" for name in needed if name not in found]
        wrong += [] if any(name.endswith("licenses/LICENSE") for name in found) else ["the licence is missing"]
    else:
        needed = ["README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "langchain_datashunt/__init__.py"]
        wrong += [f"{name} is missing" for name in needed if name not in found]
    return wrong


def main() -> int:
    """Print the problems of each file. Return 1 if there are any, otherwise 0."""
    failed = 0
    for file in map(Path, sys.argv[1:]):
        wrong = complaints(file)
        failed += len(wrong)
        print(
            f"{file.name}: {len(names_and_sizes(file))} files, {file.stat().st_size / 1024:.0f} KiB", *wrong, sep="\n  "
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
