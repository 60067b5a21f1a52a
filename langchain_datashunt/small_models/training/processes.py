"""Processes that train one model together: a single one, or those of `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from typing_extensions import override

from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import ConfigurationError

T = TypeVar("T")


class Processes:
    """A single training process."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reads, writes and prints for all."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process, and return its result or raise its error in all processes."""
        return make()

    def device(self, own: Any) -> Any:
        """Return the device on which this process computes, given the device of the network."""
        return own

    def spread(self, network: Any) -> Any:
        """Return the network, wrapped so that its gradients are averaged over the processes."""
        return network

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sums over all processes."""
        return list(values)

    def mine(self, rows: list[int]) -> tuple[list[int], float]:
        """Return this process's rows of a batch, and the weight of their mean loss.

        With these weights, the gradient averaged over the processes is the gradient of the batch's mean loss. If a
        process has no rows, it computes one row with weight 0, because all processes must take every step.
        """
        if self.count == 1:
            return rows, 1.0
        part = rows[self.rank :: self.count]
        return part or rows[:1], len(part) * self.count / len(rows)


class Launched(Processes):
    """Several training processes, joined by Hugging Face accelerate."""

    def __init__(self) -> None:
        accelerate = require("accelerate", "distill")
        has_device = require("torch", "torch").accelerator.is_available()
        self._accelerator = accelerate.Accelerator(cpu=not has_device)  # accelerate joins CPU processes only if asked
        self._share = require("accelerate.utils", "distill").broadcast_object_list
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    @override
    def share(self, make: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome = [make(), None]
            except Exception as error:
                outcome = [None, error]
        self._share(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        value: T = outcome[0]
        return value

    @override
    def device(self, own: Any) -> Any:
        return self._accelerator.device

    @override
    def spread(self, network: Any) -> Any:
        return self._accelerator.prepare_model(network)

    @override
    def total(self, values: Sequence[float]) -> list[float]:
        torch = require("torch", "torch")
        here = torch.tensor(list(values), dtype=torch.float64, device=self._accelerator.device)
        summed: list[float] = self._accelerator.reduce(here, reduction="sum").tolist()
        return summed


@cache
def processes() -> Processes:
    """Return the group of training processes that this one belongs to."""
    return Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def launched_precision() -> str:
    """Return the precision requested by `accelerate launch --mixed_precision`.

    Raises:
        ConfigurationError: If training does not support this precision.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ConfigurationError(f"Mixed precision {asked!r} is not supported in training. Use bf16 or no.")
    return "bfloat16" if asked == "bf16" else "float32"
