"""Exceptions and warnings raised by this package.

* ShuntError
  * ConfigurationError         components do not fit together, or a setting is out of range
    * MissingExtraError        an optional dependency is not installed (also an ImportError)
  * InputError                 an input is missing, blank, too long, or not of the form that the model requires
    * PartialInputError        an input has parts that the small model cannot read, such as an image
  * PredictionError            a small model returned an invalid prediction
    * NotAPredictionError      its output cannot be used as a prediction over the labels
  * QueueFullError             the queue of a model is full
  * LargeTimeoutError          one attempt of an LLM call timed out (also a TimeoutError)
  * CircuitOpenError           the circuit breaker is open after repeated LLM failures
  * StreamClosedError          the caller stopped reading a stream before its end (only in records)
  * UnparsableAnswerError      the LLM's answer is not one of the labels (also an OutputParserException)
    * IncompleteAnswerError    the LLM's message was cut, filtered or refused, or is empty
  * LocalOnlyError             the privacy guard keeps an input on this machine
  * DataError                  a data file, a column or a training set is not usable
  * BundleError                a saved small model cannot be loaded
    * BundleTruncatedError     files are missing, truncated or changed
    * BundleTooNewError        the format is newer than this version supports
    * BundleMismatchError      labels, weights and encoder disagree
  * SmallModelError            a small model failed on too many inputs in a row
  * TooManyFailuresError       stopped after too many consecutive LLM failures
  * ReplayError                recorded answers cannot be replayed
  * StoreError                 the call log cannot be used
    * RecordRefusedError       the database is reachable but rejects a record
  * RegistryError              the registry does not have the requested model version

* ShuntWarning
  * ThresholdWarning           a threshold is always reached, or never
  * TruncationWarning          inputs were truncated to the model's maximum length
  * PruningWarning             a pruning strategy used its fallback
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.exceptions import OutputParserException


class ShuntError(Exception):
    """Base class of all errors raised by this package."""


class ConfigurationError(ShuntError):
    """Raised if components do not fit together, or if a setting is out of range."""


class MissingExtraError(ConfigurationError, ImportError):
    """Raised if an optional dependency is not installed. The message gives the pip command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"The optional package {package!r} is required here but is not installed. "
            f"Install it with: pip install 'langchain-datashunt[{extra}]'"
        )
        self.package = package
        self.extra = extra


class InputError(ShuntError):
    """Raised if an input is missing, blank, too long, or not of the form that the model requires."""


class PartialInputError(InputError):
    """Raised if an input has parts that the small model cannot read, such as an image. A shunt defers such inputs."""


class PredictionError(ShuntError):
    """Raised if a small model returns an invalid prediction (NaN, wrong shape, probabilities that do not sum to 1)."""


class NotAPredictionError(PredictionError):
    """Raised if the output of a small model cannot be used as a prediction over the labels of the task."""


class SmallModelError(ShuntError):
    """Raised if a small model failed on too many inputs in a row, each of which cost an LLM call."""


class QueueFullError(ShuntError):
    """Raised if the queue of a model is full."""


class LargeTimeoutError(ShuntError, TimeoutError):
    """Raised if one attempt of an LLM call exceeds its time limit.

    Attributes:
        seconds: Time limit of one attempt, in seconds.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"The large model has not answered within {self.seconds:g} s, the limit for one attempt. Increase "
            f"Retry(attempt_seconds=...), or set on_large_error='small' to use the small model's answer instead."
        )


class CircuitOpenError(ShuntError):
    """Raised instead of an LLM call while the circuit breaker is open.

    Attributes:
        failures: Number of consecutive failures.
        seconds: Seconds until the next trial call, 0.0 if a trial call is running now.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        super().__init__(failures, seconds)
        self.failures = failures
        self.seconds = seconds

    def __str__(self) -> str:
        when = f"the next trial call is in {self.seconds:.1f} s" if self.seconds > 0 else "a trial call is running now"
        return (
            f"The large model has failed {self.failures} times in a row, so the circuit breaker is open ({when}). Set "
            f"on_large_error='small' to use the small model's answer in the meantime."
        )


class StreamClosedError(ShuntError):
    """Error of a call in the log whose stream the caller closed before its end."""

    def __init__(self) -> None:
        super().__init__("The caller closed the stream before its end.")


class UnparsableAnswerError(ShuntError, OutputParserException):
    """Raised if the LLM's answer is not one of the labels.

    Attributes:
        raw: Text of the answer, unmodified.
        labels: Accepted labels.
        attempts: Number of LLM calls made for this input.
    """

    def __init__(self, raw: str, labels: Sequence[str], attempts: int = 1) -> None:
        OutputParserException.__init__(self, self, llm_output=raw)
        self.args = (raw, tuple(labels), attempts)  # its own, for pickling
        self.raw = raw
        self.labels = tuple(labels)
        self.attempts = attempts

    @property
    def _times(self) -> str:
        return "once" if self.attempts == 1 else f"{self.attempts} times"

    def __str__(self) -> str:
        shown = ", ".join(self.labels[:5]) + (", ..." if len(self.labels) > 5 else "")
        answer = self.raw if len(self.raw) <= 200 else self.raw[:200] + "..."
        return (
            f"The large model's answer {answer!r} is not one of the {len(self.labels)} labels ({shown}), "
            f"tried {self._times}. Add an alias for this wording, increase `max_reasks`, or set "
            f"on_large_error='small' to use the small model's answer instead."
        )


class IncompleteAnswerError(UnparsableAnswerError):
    """Raised if the LLM's message was cut, filtered or refused, or is empty, even if its text is a label.

    Attributes:
        reason: Reason that the provider stated, such as "length" or "content_filter", or "empty".
    """

    def __init__(self, raw: str, labels: Sequence[str], attempts: int = 1, reason: str = "empty") -> None:
        super().__init__(raw, labels, attempts)
        self.args = (raw, tuple(labels), attempts, reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"The large model's message is incomplete ({self.reason}), so its text {self.raw[:80]!r} cannot be used, "
            f"tried {self._times}. Raise the limit on output tokens, or set on_large_error='small' to use the small "
            f"model's answer."
        )


class LocalOnlyError(ShuntError):
    """Raised if the privacy guard keeps an input on this machine, so the LLM is not called.

    Attributes:
        reason: Reason as a clause, such as "it contains IBAN". Never quotes the input.
        kinds: Kinds of the entities that caused it. Empty if the reason is another one.
    """

    def __init__(self, reason: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(reason, tuple(kinds))
        self.reason = reason
        self.kinds = tuple(kinds)

    def __str__(self) -> str:
        return f"This input stays on this machine: {self.reason}. The large model was not called."


class DataError(ShuntError):
    """Raised if a data file, a column or a training set is not usable."""


class BundleError(ShuntError):
    """Raised if a saved small model cannot be loaded."""


class BundleTruncatedError(BundleError):
    """Raised if files of the bundle are missing, truncated or changed since it was saved."""


class BundleTooNewError(BundleError):
    """Raised if the bundle's format is newer than this version supports."""


class BundleMismatchError(BundleError):
    """Raised if the labels, the weights and the encoder of the bundle disagree."""


class TooManyFailuresError(ShuntError):
    """Stopped after too many consecutive LLM failures.

    Attributes:
        failures: Number of consecutive failures.
        last: Message of the last failure.
        out: Path of the output file with the answers so far.
    """

    def __init__(self, failures: int, last: str, out: str) -> None:
        super().__init__(failures, last, out)
        self.failures = failures
        self.last = last
        self.out = out

    def __str__(self) -> str:
        return (
            f"Stopped after {self.failures} consecutive failures of large calls, the last with {self.last!r}. The "
            f"answers so far are in {self.out}. Fix the cause and run again to retry the failed rows. Set "
            f"--max-failures 0 to continue despite failures."
        )


class ReplayError(ShuntError):
    """Raised if recorded answers cannot be replayed."""


class StoreError(ShuntError):
    """Raised if the call log cannot be used."""


class RecordRefusedError(StoreError):
    """Raised if the database is reachable but rejects a record, so that a retry cannot succeed."""


class RegistryError(ShuntError):
    """Raised if the registry does not have the requested model version, or has none in service."""


class ShuntWarning(UserWarning):
    """Base class of all warnings issued by this package."""


class ThresholdWarning(ShuntWarning):
    """Issued if a threshold is always reached, or can never be reached."""


class TruncationWarning(ShuntWarning):
    """Issued when inputs are truncated to the model's maximum length."""


class PruningWarning(ShuntWarning):
    """Issued when a pruning strategy uses its fallback."""
