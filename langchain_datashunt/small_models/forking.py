"""What a forked child begins anew: locks that another thread of the parent may have held, and threads it has not."""

from __future__ import annotations

import os
import sys
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something that begins anew in a forked child."""

    def after_fork(self) -> None:
        """Begin anew."""


AFTER_FORK: weakref.WeakSet[Forked] = weakref.WeakSet()
"""Whatever is to begin anew."""


def _begin_anew() -> None:
    one_thread = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if one_thread is not None:  # the team of threads that OpenMP would wait for is not here
        one_thread(1)
    for one in list(AFTER_FORK):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
