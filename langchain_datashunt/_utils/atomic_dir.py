"""Atomic replacement of folders that other processes may be reading or replacing."""

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
"""Maximum seconds that a reader waits for the end of a replacement."""


def put_in_place(staging: Path, folder: Path) -> None:
    """Replace a folder by another one. If several processes do so, the last one wins.

    Args:
        staging: New folder, on the same file system. It is moved.
        folder: Target path. An existing folder is removed.
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
    """Return the result of `read`, repeating it if the folder was replaced during the call.

    Args:
        folder: Folder that other processes may replace.
        read: Function that reads the folder. It may be called several times.

    Raises:
        Exception: The exception that `read` raised, if the folder was not replaced during the call.
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
    """Wait for a running replacement of a missing folder, and return whether the folder exists afterwards."""
    give_up, aside = time.monotonic() + _WAIT_SECONDS, f"{glob.escape(_aside(folder))}*"
    # Several looks in a row, because one may fall between two writers or miss a new directory entry.
    alone = 0
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
