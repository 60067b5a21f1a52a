"""The rules of `make test-core`: no torch, no subprocess, no database. A pytest plugin (`-p tests.support.core`).

Torch and transformers cannot be imported. A test that starts a process or opens a database fails, with a
message that it needs the mark `heavy`, which leaves it out.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import Any

import pytest

FORBIDDEN = {"subprocess.Popen": "starts a process", "sqlite3.connect": "opens a database", "os.fork": "forks"}
"""Audit events, and what a test did that raises one."""

_seen: list[str] = []


def _note(event: str, _: Any) -> None:
    if event in FORBIDDEN:
        _seen.append(FORBIDDEN[event])


def pytest_configure(config: pytest.Config) -> None:
    """Make torch unavailable, and watch for what core tests must not do."""
    for name in ("torch", "transformers"):
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    platform.processor()  # runs `uname` once in a process, which a client of an LLM may otherwise do in any test
    sys.addaudithook(_note)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """Fail a test that did something forbidden."""
    _seen.clear()
    result = yield
    if _seen:
        pytest.fail(f"A core test {_seen[0]}. Mark it with @pytest.mark.heavy.", pytrace=False)
    return result
