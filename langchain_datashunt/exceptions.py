"""Every error and warning of this package; nothing here computes.

* ShuntError
  * ConfigurationError         the parts do not fit together, or a setting is out of range
    * MissingExtraError        an optional dependency is not installed (also an ImportError)
  * InputError                 one input of a call cannot be read as what the model needs
  * PredictionError            a small model gave something that is no prediction
  * QueueFullError             more requests wait for a model than may
  * LargeTimeoutError          one attempt of a large call took longer than it may (also a TimeoutError)
  * CircuitOpenError           a large model has kept failing, and is left alone for a while
  * UnparsableAnswerError           a large model's answer is none of the labels
  * LocalOnlyError                 an input must not leave this machine
  * DataError                  a data file, a column or a training set is not usable
  * BundleError                a saved small model cannot be loaded
    * BundleTruncatedError     files are missing, cut short or changed
    * BundleTooNewError        written by a newer format than this version reads
    * BundleMismatchError      its labels, its weights and its encoder disagree
  * TooManyFailuresError       one large call after the other failed, so it was not gone on with
  * ReplayError                recorded answers cannot be replayed
  * StoreError                 the store of routed calls cannot be used
    * RecordRefusedError       it is there, and does not take a record
  * RegistryError              a version of a model that is asked for is not there

* ShuntWarning
  * ThresholdWarning           a threshold that can never, or always, fire
  * TruncationWarning          inputs were cut to the model's maximal length
  * PruningWarning             a prompt strategy had to fall back
"""

from __future__ import annotations

from collections.abc import Sequence


class ShuntError(Exception):
    """Base of all errors that this package raises itself."""


class ConfigurationError(ShuntError):
    """The parts do not fit together, or a setting is out of its range."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional dependency is missing; the message names the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"The package {package!r} is needed here and is not installed. "
            f"Install it with: pip install 'langchain-datashunt[{extra}]'"
        )
        self.package = package
        self.extra = extra


class InputError(ShuntError):
    """One input of a call cannot be read as what the model needs."""


class PredictionError(ShuntError):
    """A small model gave something that is no prediction (NaN, wrong shape, not a distribution)."""


class QueueFullError(ShuntError):
    """More requests wait for a model than its settings allow."""


class LargeTimeoutError(ShuntError, TimeoutError):
    """One attempt of a large call took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"The large model has not answered within {self.seconds:g} s, which is what one attempt may take. Raise "
            f"Retry(attempt_seconds=...), or set on_large_error='small' to have the small model answer."
        )


class CircuitOpenError(ShuntError):
    """A large model has kept failing, so it is not asked for a while.

    Attributes:
        failures: How often in a row it failed.
        seconds: Until it is tried again; 0.0 where that is being done.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        super().__init__(failures, seconds)
        self.failures = failures
        self.seconds = seconds

    def __str__(self) -> str:
        when = f"it is tried again in {self.seconds:.1f} s" if self.seconds > 0 else "another call is trying it now"
        return (
            f"The large model has failed {self.failures} times in a row and is left alone; {when}. Set "
            f"on_large_error='small' to have the small model answer meanwhile."
        )


class UnparsableAnswerError(ShuntError):  # noqa: N818
    """A large model's answer is none of the labels.

    Attributes:
        raw: The answer's text as the model gave it.
        labels: The labels that would have been accepted.
        attempts: How many times the model was asked.
    """

    def __init__(self, raw: str, labels: Sequence[str], attempts: int = 1) -> None:
        super().__init__(raw, tuple(labels), attempts)
        self.raw = raw
        self.labels = tuple(labels)
        self.attempts = attempts

    def __str__(self) -> str:
        shown = ", ".join(self.labels[:5]) + (", ..." if len(self.labels) > 5 else "")
        answer = self.raw if len(self.raw) <= 200 else self.raw[:200] + "..."
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        return (
            f"The large model's answer {answer!r} is none of the {len(self.labels)} labels ({shown}); "
            f"it was asked {times}. Add an alias for this wording, raise `max_reasks`, or set "
            f"on_large_error='small' to use the small model's answer instead."
        )


class LocalOnlyError(ShuntError):  # noqa: N818
    """An input must not leave this machine, so no large model was asked.

    Attributes:
        reason: Why, in words; never the input itself.
        kinds: The kinds of entities that keep it here.
    """

    def __init__(self, reason: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(reason, tuple(kinds))
        self.reason = reason
        self.kinds = tuple(kinds)

    def __str__(self) -> str:
        return f"This input stays on this machine: {self.reason}. No large model was asked."


class DataError(ShuntError):
    """A data file, a column or a training set is not usable."""


class BundleError(ShuntError):
    """A saved small model cannot be loaded."""


class BundleTruncatedError(BundleError):
    """Files of the bundle are missing, cut short or changed since it was saved."""


class BundleTooNewError(BundleError):
    """The bundle was written in a newer format than this version reads."""


class BundleMismatchError(BundleError):
    """The labels, the weights and the encoder of the bundle disagree."""


class TooManyFailuresError(ShuntError):
    """One large call after the other failed, so it was not gone on with.

    Attributes:
        failures: How many.
        last: What the last one said.
        out: Where answers stand.
    """

    def __init__(self, failures: int, last: str, out: str) -> None:
        super().__init__(failures, last, out)
        self.failures = failures
        self.last = last
        self.out = out

    def __str__(self) -> str:
        return (
            f"{self.failures} large calls failed one after the other, the last with {self.last!r}. What was answered "
            f"is in {self.out}. Put right what failed and run again: these rows are asked anew. --max-failures 0 goes "
            f"on whatever fails."
        )


class ReplayError(ShuntError):
    """Recorded answers cannot be replayed."""


class StoreError(ShuntError):
    """The store of routed calls cannot be used."""


class RecordRefusedError(StoreError):
    """The database is there, and does not take what was to be written: trying again does not help."""


class RegistryError(ShuntError):
    """A version of a model that is asked for is not there."""


class ShuntWarning(UserWarning):
    """Base of all warnings that this package gives."""


class ThresholdWarning(ShuntWarning):
    """A threshold that can never, or always, fire."""


class TruncationWarning(ShuntWarning):
    """Inputs were cut to the model's maximal length."""


class PruningWarning(ShuntWarning):
    """A prompt strategy had to fall back to something safer."""
