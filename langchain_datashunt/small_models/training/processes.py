"""The processes that train together: one, or those that `accelerate launch` or torchrun started."""

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
    """One process alone."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and prints."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, or the error that it raises, in all of them."""
        return make()

    def device(self, own: Any) -> Any:
        """Where this process computes, given where the network is."""
        return own

    def spread(self, network: Any) -> Any:
        """A network whose gradients are averaged over the processes."""
        return network

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, element by element."""
        return list(values)

    def mine(self, rows: list[int]) -> tuple[list[int], float]:
        """This process's part of a batch, and the weight with which its mean loss counts.

        Gradients are averaged over processes, so the weights make them the gradient of the whole batch's mean. A
        process without a part computes one row at weight 0, for all must take every step.
        """
        if self.count == 1:
            return rows, 1.0
        part = rows[self.rank :: self.count]
        return part or rows[:1], len(part) * self.count / len(rows)


class Launched(Processes):
    """Several, by Hugging Face accelerate."""

    def __init__(self) -> None:
        accelerate = require("accelerate", "distill")
        has_device = require("torch", "torch").accelerator.is_available()
        self._accelerator = accelerate.Accelerator(cpu=not has_device)  # else processes without one are not joined
        self._share = require("accelerate.utils", "distill").broadcast_object_list
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    @override
    def share(self, make: Callable[[], T]) -> T:
        told: list[Any] = [None, None]
        if self.first:
            try:
                told = [make(), None]
            except Exception as error:
                told = [None, error]
        self._share(told)
        if told[1] is not None:
            raise told[1]
        value: T = told[0]
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
    """Those that this one belongs to."""
    return Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def launched_precision() -> str:
    """The number format that `accelerate launch --mixed_precision` asks for.

    Raises:
        ConfigurationError: One that training does not do.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ConfigurationError(f"Mixed precision {asked!r} is not supported in training; use bf16, or no.")
    return "bfloat16" if asked == "bf16" else "float32"
