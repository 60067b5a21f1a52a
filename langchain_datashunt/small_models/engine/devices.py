"""Device, dtype and thread count of torch models."""

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
    """Return the given device, or the first available of cuda, mps and cpu.

    Args:
        device: Torch device name; None or "auto" selects the device.

    Raises:
        ConfigurationError: If the device is unknown or not available.
    """
    torch_ = require("torch", "torch")
    there = {"cuda": torch_.cuda.is_available(), "mps": torch_.backends.mps.is_available(), "cpu": True}
    if device is None or device == "auto":
        device = next(name for name, found in there.items() if found)
    try:
        chosen: torch.device = torch_.device(device)
    except RuntimeError as error:
        raise ConfigurationError(
            f"Expected a torch device for `device`, got {device!r}: {error}. Use 'cuda', 'mps' or 'cpu'."
        ) from error
    if not there.get(chosen.type, False):
        found = ", ".join(name for name, yes in there.items() if yes)
        raise ConfigurationError(f"The device {device!r} is not available on this machine. Use one of: {found}.")
    return chosen


def choose_dtype(dtype: str, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the torch dtype of a name, and warn once if it is slow on this processor.

    Args:
        dtype: One of float32, bfloat16, float16 and auto. "auto" is bfloat16 on a GPU with native support for it, and
            float32 otherwise.
        device: Device of the model.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    names = ("float32", "bfloat16", "float16")
    if dtype == "auto":
        on_gpu = getattr(device, "type", device) == "cuda"
        half = on_gpu and require("torch", "torch").cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if half else "float32"
    if dtype == "bfloat16" and getattr(device, "type", device) == "cpu" and not cpu_has_bfloat16():
        _say_that_it_is_slow()
    if dtype not in names:
        raise ConfigurationError(f"Unknown dtype {dtype!r}. Use one of {', '.join(names)}, auto.")
    chosen: torch.dtype = getattr(require("torch", "torch"), dtype)
    return chosen


def kept_dtype(dtype: torch.dtype, device: torch.device | str, engine: str) -> torch.dtype:
    """Return the dtype of a network's weights in memory, if an engine is to compute in `dtype`.

    On a CPU, the padding-free encoder keeps a float32 network and computes only the matrix products in bfloat16. This
    is as fast as bfloat16 weights and halves the difference from float32.
    """
    torch_, on_cpu = require("torch", "torch"), getattr(device, "type", device) == "cpu"
    kept: torch.dtype = (
        torch_.float32 if on_cpu and dtype == torch_.bfloat16 and engine in ("auto", "padding-free") else dtype
    )
    return kept


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Return whether an x86 processor has bfloat16 instructions. Return True if torch cannot detect it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    cpu = require("torch", "torch").cpu
    checks = [getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check is not None) or not any(checks)


@lru_cache(maxsize=1)
def _say_that_it_is_slow() -> None:
    _LOG.warning(
        "This processor has no bfloat16 instructions, so dtype='bfloat16' is several times slower than dtype='float32'."
    )


MAX_WORKERS = 4
"""Maximum concurrent batches of one model on a CPU."""

_ONE_SHARES = Mutex()
"""Lock for changing and restoring torch's default number of threads."""


def cpu_workers(device: torch.device | str) -> int:
    """Return how many batches to compute concurrently on a device.

    Short batches leave CPU threads idle, so this is the number of threads, up to `MAX_WORKERS`. On a GPU it is 1.
    """
    if getattr(device, "type", device) != "cpu":
        return 1
    with _ONE_SHARES:
        return max(1, min(MAX_WORKERS, int(require("torch", "torch").get_num_threads())))


class _Quiet:
    """Reference count of threads that silence transformers, with the settings to restore."""

    def __init__(self) -> None:
        self.mutex = Mutex()
        self.threads = 0
        self.library: Any = None
        self.verbosity, self.bars = 0, False
        AFTER_FORK.add(self)

    def begin(self) -> None:
        """Silence transformers if this is the first thread."""
        with self.mutex:
            if not self.threads:
                self.library = log = require("transformers.utils.logging", "torch")
                self.verbosity, self.bars = log.get_verbosity(), log.is_progress_bar_enabled()
                log.set_verbosity_error()
                log.disable_progress_bar()
            self.threads += 1

    def end(self) -> None:
        """Restore the settings if this is the last thread."""
        with self.mutex:
            self.threads -= 1
            if self.threads == 0:
                self._put_back()

    def after_fork(self) -> None:
        """Restore the settings, because the threads that changed them run in the parent process only."""
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
    """Disable progress bars and log messages of transformers below the error level inside the `with` block.

    If several threads are inside such a block, the last one restores the settings.
    """
    _QUIET.begin()
    try:
        yield
    finally:
        _QUIET.end()


def share_of_threads(workers: int) -> None:
    """Limit the torch and BLAS threads of the calling thread to its share among `workers` threads.

    `torch.set_num_threads` sets both the number of the calling thread and the default of threads started later, so a
    helper thread restores the default. Limiting OpenMP alone is not enough. After any call of `set_num_threads`, MKL
    splits every small attention product among that many threads, which then wait for each other.
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
    with suppress(MissingExtraError):  # other libraries that use OpenMP
        require("threadpoolctl", "torch").threadpool_limits(each, user_api="openmp")


def on_host(parts: Sequence[torch.Tensor]) -> NDArray[np.float32]:
    """Concatenate batches and return them as one host array, with one device transfer."""
    together = parts[0] if len(parts) == 1 else require("torch", "torch").cat(list(parts))
    array: NDArray[np.float32] = together.cpu().numpy()
    return array


def on_device(array: NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Return a copy of a host array on a device."""
    host: torch.Tensor = require("torch", "torch").from_numpy(array)
    return host.to(device)
