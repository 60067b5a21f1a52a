"""Tests that the Python blocks of the README and the docs run, with a local server as the LLM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from langchain_datashunt.large_models.replay import ChatServer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_docs_python_block_runs(block: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with ChatServer(lambda messages: "status", model="gpt-4o") as serving:
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        monkeypatch.setenv("OPENAI_BASE_URL", serving.base_url)
        exec(compile(block, "docs", "exec", dont_inherit=True), {"__name__": "docs"})  # trusted code of this repository


def test_readme_first_block_runs_without_api_key(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[0]
    exec(compile(block, "readme", "exec", dont_inherit=True), {"__name__": "readme"})  # trusted code of this repository
    assert capsys.readouterr().out == "status\n"


def test_docs_relative_links_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_faq_quoted_messages_exist_in_code() -> None:
    """Quotes in bold are messages of the package, with placeholders ("..." and single capitals) for inserted values."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "langchain_datashunt").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # joins messages that are split over several string literals
    words = re.sub(r"\{[^{}]*\}", "*", joined)
    quotes = re.findall(r'\*\*"(.+?)"\*\*', (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(quotes) > 10
    for quote in quotes:
        for part in re.split(r"\.\.\.|'\.\.\.'|\[\.\.\.\]|'x'|\bN\b|ChatOpenAI|SoftPruning", " ".join(quote.split())):
            assert part.strip(" .") in words, f"no message of the package contains {part!r}"
