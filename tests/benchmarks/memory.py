"""The resident memory of a process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_mib() -> float:
    """The highest resident memory of this process so far, in MiB.

    On Linux of its own program alone: what `getrusage` tells begins with what the process was before it became this
    program, a copy of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
