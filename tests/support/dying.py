"""Simulation of training that is killed before it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from langchain_datashunt.small_models.training import fitting


class Killed(Exception):
    """Raised in place of a kill."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Raise `Killed` inside the `with` block before training step `steps` + 1, and expect it."""
    real, left = fitting._Fit._step, [steps]

    def step(self: Any, stage: int, rows: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(self, stage, rows)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fitting._Fit, "_step", step)
        yield
