"""Folders that take another's place whole, while others may be reading it or taking it too."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_TRIES = 100
_LOOKS = 4
_WAIT_SECONDS = 2.0
"""How long a reader waits for the end of a replacement."""


def put_in_place(staging: Path, folder: Path) -> None:
    """Put a folder in another's place; where two do so at once, that of the last one stays, whole.

    Args:
        staging: What is to stand there, on the same file system.
        folder: Where; what stands there now is removed.
    """
    with tempfile.TemporaryDirectory(prefix=_aside(folder), dir=folder.parent, ignore_cleanup_errors=True) as aside:
        for i in range(_TRIES):
            with suppress(FileNotFoundError):
                os.replace(folder, Path(aside) / str(i))
            try:
                os.replace(staging, folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or i == _TRIES - 1:
                    with suppress(OSError):
                        os.replace(Path(aside) / str(i), folder)
                    raise


def unless_replaced(folder: Path, read: Callable[[], T]) -> T:
    """What is read of a folder that others may be replacing: all of it is of one of them.

    Args:
        folder: Which.
        read: Reads it, and may be called several times.

    Raises:
        Exception: As `read` raises it, where nobody replaced the folder meanwhile.
    """
    for _ in range(_TRIES):
        before = _identity(folder)
        try:
            found = read()
        except Exception:
            if _identity(folder) == before and not (before is None and _comes_back(folder)):
                raise
        else:
            if _identity(folder) == before:
                return found
    return read()


def _aside(folder: Path) -> str:
    return f".{folder.name}-old-"


def _comes_back(folder: Path) -> bool:
    """Whether a folder that is not in its place is between the two renames of a replacement; waits for its end."""
    give_up, aside = time.monotonic() + _WAIT_SECONDS, f"{glob.escape(_aside(folder))}*"
    alone = 0  # looks at which nobody was replacing it: one may fall between two writers, or miss a new entry
    while alone < _LOOKS and time.monotonic() < give_up:
        if folder.exists():
            return True
        alone = 0 if any(folder.parent.glob(aside)) else alone + 1
        time.sleep(0.01)
    return folder.exists()


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
