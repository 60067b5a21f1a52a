"""Where a store's records are spooled while its database is away; nothing is opened here."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from sqlalchemy import make_url

from langchain_datashunt.call_log.store import CallLog, url_of
from langchain_datashunt.exceptions import ConfigurationError


def spool_of(store: CallLog | str | Path) -> Path:
    """Beside a SQLite file; for another database a file of its own, so that its records reach no other.

    Raises:
        ConfigurationError: The user has no home, and the folder in the temporary one is another user's.
    """
    url = make_url(url_of(store.url.render_as_string() if isinstance(store, CallLog) else store))
    if url.get_backend_name() == "sqlite":
        return Path(f"{url.database}.spool")
    digest = hashlib.sha256(url.render_as_string(hide_password=True).encode()).hexdigest()[:16]
    return _state_folder() / f"spool-{digest}.db"


def _state_folder() -> Path:
    """Where a user's programs keep what is to survive a restart; without a home, a private temporary folder.

    Raises:
        ConfigurationError: The temporary folder is another user's.
    """
    with suppress(RuntimeError):
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        there = next(folder for folder in (home, *home.parents) if folder.is_dir())
        if os.access(there, os.W_OK):
            return home / "langchain-datashunt"
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"langchain-datashunt-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if hasattr(os, "getuid") and (found.st_uid != user or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077):
        raise ConfigurationError(f"{folder} can be used by others; say where to spool: Recorder(..., spool='FILE').")
    return folder
