"""SmallErrors: count the failures of a small model, warn once, and stop after too many."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from langchain_datashunt._utils.fork import AFTER_FORK
from langchain_datashunt.exceptions import ShuntWarning, SmallModelError

_LOG = logging.getLogger(__name__)


class SmallErrors:
    """Failures of a shunt's small model that may pass, such as NaN for one input or a lack of memory.

    Each such input costs a large call, so the first one warns, and too many of them in a row are an error.

    Args:
        on_error: "large" defers inputs on which the small model fails. "raise" raises the error.
        limit: Inputs on which the model may fail in a row. None means unlimited.
    """

    def __init__(self, on_error: Literal["large", "raise"], limit: int | None) -> None:
        self.on_error, self.limit = on_error, limit
        self.count = 0
        """Inputs on which the small model failed, since the shunt was created."""
        self.in_a_row = 0
        """Inputs in a row on which it failed, up to the last call."""
        self._warned = False
        self.after_fork()
        AFTER_FORK.add(self)

    def after_fork(self) -> None:
        """Replace the lock in a forked child."""
        self._lock = threading.Lock()

    def note(self, errors: Mapping[int, Exception], *, answered: int) -> dict[int, Exception]:
        """Count the failures of one call, and return those inputs that are to be refused, with their errors.

        Args:
            errors: Errors by input.
            answered: Number of inputs of the call on which the small model did not fail.
        """
        if not errors:
            if answered:
                self.in_a_row = 0
            return {}
        first = next(iter(errors.values()))
        with self._lock:
            self.count += len(errors)
            self.in_a_row = len(errors) if answered else self.in_a_row + len(errors)
            in_a_row, warn, self._warned = self.in_a_row, not self._warned, True
        if self.on_error == "raise":
            return dict(errors)
        if self.limit is not None and in_a_row > self.limit:
            return {i: self._stopped(in_a_row, error) for i, error in errors.items()}
        if warn:
            message = (
                f"The small model failed ({type(first).__name__}: {first}), so the large model answers. Further "
                f"failures are counted without a warning, and more than {self.limit} in a row are an error. Set "
                f"on_small_error='raise' to stop at the first."
            )
            _LOG.warning(message)
            warnings.warn(message, ShuntWarning, stacklevel=2)
        return {}

    def _stopped(self, in_a_row: int, error: Exception) -> SmallModelError:
        stopped = SmallModelError(
            f"The small model has failed on {in_a_row} inputs in a row, the last time with {type(error).__name__}: "
            f"{error}. Mend it, or raise `max_small_errors`."
        )
        stopped.__cause__ = error
        return stopped

    def __reduce__(self) -> tuple[Any, ...]:
        return SmallErrors, (self.on_error, self.limit)
