"""Every Python block of the README and the docs runs; the large model of the README is a local server."""

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
def test_code_in_the_docs_runs(block: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with ChatServer(lambda messages: "status", model="gpt-4o") as serving:
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        monkeypatch.setenv("OPENAI_BASE_URL", serving.base_url)
        exec(compile(block, "docs", "exec", dont_inherit=True), {"__name__": "docs"})  # our own files


def test_the_readmes_first_code_runs_without_a_key(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[0]
    exec(compile(block, "readme", "exec", dont_inherit=True), {"__name__": "readme"})  # our own file
    assert capsys.readouterr().out == "status\n"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_errors_of_the_faq_are_those_of_the_code() -> None:
    """What stands in bold quotes is what a user sees, but for what is filled in ("..." and single capitals)."""
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "langchain_datashunt").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # messages are written as several strings
    words = re.sub(r"\{[^{}]*\}", "*", joined)
    quotes = re.findall(r'\*\*"(.+?)"\*\*', (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(quotes) > 10
    for quote in quotes:
        for part in re.split(r"\.\.\.|'\.\.\.'|\[\.\.\.\]|'x'|\bN\b|ChatOpenAI|SoftPruning", " ".join(quote.split())):
            assert part.strip(" .") in words, f"no message of ours says {part!r}"
