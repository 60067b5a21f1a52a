"""Choose the spool file of a call log. This module opens no file."""

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
    """Return the default spool file of a call log.

    The spool of a SQLite log is next to its file. Each other database has its own spool in the user's state folder,
    so that no record reaches another database.

    Raises:
        ConfigurationError: If there is neither a writable state folder nor a private temporary folder.
    """
    url = make_url(url_of(store.url.render_as_string() if isinstance(store, CallLog) else store))
    if url.get_backend_name() == "sqlite":
        if url.database and url.database != ":memory:":
            return Path(f"{url.database}.spool")
        digest = hashlib.sha256(f"memory {os.getpid()}".encode()).hexdigest()[:16]  # no other process can drain it
        return _state_folder() / f"spool-{digest}.db"
    digest = hashlib.sha256(url.render_as_string(hide_password=True).encode()).hexdigest()[:16]
    return _state_folder() / f"spool-{digest}.db"


def _state_folder() -> Path:
    """Return the user's state folder, or a private temporary folder if the state folder is not writable.

    Raises:
        ConfigurationError: If other users own or can access the temporary folder.
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
        raise ConfigurationError(
            f"The spool folder {folder} is not private to this user. Pass another file: Recorder(..., spool='FILE')."
        )
    return folder
