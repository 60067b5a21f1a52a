"""Reading labelled data: files that users bring, Banking77 with recorded answers, and the messages that we ship."""

from __future__ import annotations

from langchain_datashunt.data.reading import columns_of, labelled_texts, read_rows

__all__ = ["columns_of", "labelled_texts", "read_rows"]
