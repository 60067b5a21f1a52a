"""What the built files hold: the package and its licence, and no tests, no caches, no large data.

python -m tests.support.wheel dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

FORBIDDEN = ("tests/", "cookbook/", "docs/", "__pycache__", ".pyc", ".env", ".db")
LARGEST = 300_000
"""Bytes of one file in a wheel: the shipped messages are the largest that belongs there."""


def names_and_sizes(file: Path) -> dict[str, int]:
    """The files of a wheel or of an sdist."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return {one.filename: one.file_size for one in wheel.infolist()}
    with tarfile.open(file) as sdist:
        return {one.name.partition("/")[2]: one.size for one in sdist if one.isfile()}


def complaints(file: Path) -> list[str]:
    """What does not belong into it, or is missing."""
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
    """Print what is wrong; 1 where something is."""
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
