"""Where a torch model runs, in which number format, and with how many threads."""

from __future__ import annotations

import logging
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from langchain_datashunt._utils.fork import AFTER_FORK, Mutex
from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    import torch


_LOG = logging.getLogger(__name__)


def choose_device(device: str | None = None) -> torch.device:
    """The device that was asked for, else the first there is of cuda, mps, cpu.

    Raises:
        ConfigurationError: The device that was asked for is not there.
    """
    torch_ = require("torch", "torch")
    there = {"cuda": torch_.cuda.is_available(), "mps": torch_.backends.mps.is_available(), "cpu": True}
    if device is None or device == "auto":
        device = next(name for name, found in there.items() if found)
    try:
        chosen: torch.device = torch_.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"{device!r} is no torch device: {error}. Use 'cuda', 'mps' or 'cpu'.") from error
    if not there.get(chosen.type, False):
        found = ", ".join(name for name, yes in there.items() if yes)
        raise ConfigurationError(f"The device {device!r} is not available here; there is: {found}.")
    return chosen


def choose_dtype(dtype: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The torch dtype of a name: float32, bfloat16, float16, or auto.

    "auto" is bfloat16 on a GPU that computes it, and float32 elsewhere.

    Raises:
        ConfigurationError: Any other name.
    """
    names = ("float32", "bfloat16", "float16")
    if dtype == "auto":
        on_gpu = getattr(device, "type", device) == "cuda"
        half = on_gpu and require("torch", "torch").cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if half else "float32"
    if dtype == "bfloat16" and getattr(device, "type", device) == "cpu" and not cpu_has_bfloat16():
        _say_that_it_is_slow()
    if dtype not in names:
        raise ConfigurationError(f"{dtype!r} is no number format for inference; use one of {', '.join(names)}, auto.")
    chosen: torch.dtype = getattr(require("torch", "torch"), dtype)
    return chosen


def kept_dtype(dtype: torch.dtype, device: torch.device | str, engine: str) -> torch.dtype:
    """The number format that a network is kept in which an engine computes in another.

    On a CPU the packed form takes float32 and computes products alone in bfloat16: it is as quick, and half as far
    from float32.
    """
    torch_, on_cpu = require("torch", "torch"), getattr(device, "type", device) == "cpu"
    kept: torch.dtype = (
        torch_.float32 if on_cpu and dtype == torch_.bfloat16 and engine in ("auto", "padding-free") else dtype
    )
    return kept


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether an x86 processor multiplies bfloat16 itself; True for others, where torch does not tell."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    cpu = require("torch", "torch").cpu
    checks = [getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check is not None) or not any(checks)


@lru_cache(maxsize=1)
def _say_that_it_is_slow() -> None:
    _LOG.warning("This processor has no bfloat16 arithmetic, so it is several times slower than dtype='float32' here.")


MAX_WORKERS = 4
"""Batches of one model computed at once on a CPU at the most."""

_ONE_SHARES = Mutex()
"""Torch's number of threads for threads to come is changed, and put back, by one thread at a time."""


def cpu_workers(device: torch.device | str) -> int:
    """How many batches are best computed at once: short ones leave threads idle, so as many as there are threads."""
    if getattr(device, "type", device) != "cpu":
        return 1
    with _ONE_SHARES:
        return max(1, min(MAX_WORKERS, int(require("torch", "torch").get_num_threads())))


class _Quiet:
    """How many threads want transformers to be quiet, and what its settings were before the first of them."""

    def __init__(self) -> None:
        self.mutex = Mutex()
        self.threads = 0
        self.library: Any = None
        self.verbosity, self.bars = 0, False
        AFTER_FORK.add(self)

    def begin(self) -> None:
        """Of one thread."""
        with self.mutex:
            if not self.threads:
                self.library = log = require("transformers.utils.logging", "torch")
                self.verbosity, self.bars = log.get_verbosity(), log.is_progress_bar_enabled()
                log.set_verbosity_error()
                log.disable_progress_bar()
            self.threads += 1

    def end(self) -> None:
        """Of one thread; the last one puts the settings back."""
        with self.mutex:
            self.threads -= 1
            if self.threads == 0:
                self._put_back()

    def after_fork(self) -> None:
        """Put the settings back: the threads that wanted them otherwise are the parent's."""
        if self.threads > 0:
            self._put_back()
        self.threads = 0

    def _put_back(self) -> None:
        self.library.set_verbosity(self.verbosity)
        if self.bars:
            self.library.enable_progress_bar()


_QUIET = _Quiet()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the transformers library's own progress bars and reports.

    Its settings are put back afterwards, by the last of several threads.
    """
    _QUIET.begin()
    try:
        yield
    finally:
        _QUIET.end()


def share_of_threads(workers: int) -> None:
    """Have this thread's torch and BLAS products use its share of the process's threads, where several work.

    Torch's number of threads is the calling thread's own, for OpenMP and for MKL, and what threads to come begin with;
    so another thread puts the latter back. OpenMP alone would not do: once somebody has set torch's number, MKL has
    every small product of attention shared among as many threads, which then wait for each other.
    """
    torch = sys.modules.get("torch")
    if workers == 1 or torch is None:
        return
    with _ONE_SHARES:
        every = int(torch.get_num_threads())
        each = max(1, every // workers)
        torch.set_num_threads(each)
        restoring = threading.Thread(target=torch.set_num_threads, args=(every,))
        restoring.start()
        restoring.join()
    with suppress(MissingExtraError):  # what else computes by OpenMP
        require("threadpoolctl", "torch").threadpool_limits(each, user_api="openmp")


def on_host(parts: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Batches one after the other on the host, by one copy."""
    together = parts[0] if len(parts) == 1 else require("torch", "torch").cat(list(parts))
    array: NDArray[np.float32] = together.cpu().numpy()
    return array


def on_device(array: NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Return a copy of a host array on a device."""
    host: torch.Tensor = require("torch", "torch").from_numpy(array)
    return host.to(device)
