"""RecordedAnswers: recorded answers of a large model by input text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_datashunt._utils.table_files import cell, read_rows, require_columns
from langchain_datashunt.exceptions import ReplayError

_ANSWER_COLUMNS = ("answer", "large_label", "gpt-label", "output", "label")


class RecordedAnswers:
    """Recorded answers by input text.

    A chat request is matched by its latest user message that has a recorded answer.

    Args:
        by_text: Input text -> answer.
    """

    def __init__(self, by_text: Mapping[str, str]) -> None:
        self.by_text = {text.strip(): answer for text, answer in by_text.items()}

    @classmethod
    def load(cls, file: str | Path, text: str = "text", answer: str | None = None) -> RecordedAnswers:
        """Load recorded answers from a CSV, JSONL or Parquet file.

        Args:
            file: Path of the file, with one row per input.
            text: Column of the inputs.
            answer: Column of the answers. None uses the first that exists of answer, large_label, gpt-label, output and
                label.

        Raises:
            DataError: The file or a column is missing.
            ReplayError: The file has no answer column, or an input has two different answers.
        """
        require_columns(file, text)
        rows = list(read_rows(file))
        column = answer or next((name for name in _ANSWER_COLUMNS if name in rows[0]), None)
        if column is None or column not in rows[0]:
            raise ReplayError(
                f"{Path(file).name} has no column with recorded answers. Expected one of {', '.join(_ANSWER_COLUMNS)}, "
                f"got {', '.join(rows[0])}."
            )
        by_text: dict[str, str] = {}
        for i, row in enumerate(rows, start=1):
            key, value = str(cell(file, i, row, text)).strip(), str(cell(file, i, row, column))
            if by_text.setdefault(key, value) != value:
                raise ReplayError(
                    f"{Path(file).name}, row {i}: this input occurs twice with different answers. Keep one."
                )
        return cls(by_text)

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the recorded answer to a chat request.

        Raises:
            ReplayError: None of the user messages has a recorded answer.
        """
        users = [_content(message) for message in messages if message.get("role") == "user"]
        for text in reversed(users):
            if (answer := self.by_text.get(text.strip())) is not None:
                return answer
        shown = users[-1][:80] if users else ""
        raise ReplayError(f"Nothing was recorded for the user message {shown!r}. Add it to the recorded answers.")


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part.get("text", "") for part in parts if isinstance(part, Mapping))
