"""Check the English of docstrings: words that make prose hard to read, per 1,000 words, and a list of words to avoid.

    python -m tests.support.prose [FILE ...]

Without files it reads the package. Markdown files may be given too; their code blocks are left out. It prints the
figures and exits with status 1 if one of them is out of bounds.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

MOST = {
    "where": (r"\bwhere\b", 2.0),
    ";": (r";(?=\s|$)", 4.0),
    "what is/was/it/the/they": (r"\bwhat (?:is|was|it|the|they)\b", 1.0),
    "told/tells/stands": (r"\b(?:told|tells|stands)\b", 0.5),
}
"""Patterns, and how often each may occur in 1,000 words."""

LEAST = {"if": (r"\bif\b", 3.0)}
"""Patterns, and how often each must occur: conditions are written with "if"."""

AVOID = (
    "anew", "beside", "at the most", "is no", "in the end", "affair", "laid out", "nobody", "as ever",
)  # fmt: skip
"""Words that have plainer substitutes."""

Passage = tuple[str, int, str]
"""File, line and text."""


def docstrings(file: Path) -> Iterator[Passage]:
    """Yield the docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for part in node.body:
                value = part.value if isinstance(part, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(file), part.lineno, value.value


def passages(files: Sequence[Path]) -> list[Passage]:
    """Return the prose of Python and Markdown files, without code."""
    found: list[Passage] = []
    for file in files:
        if file.suffix == ".md":
            found.append((str(file), 1, file.read_text(encoding="utf-8")))
        else:
            found.extend(docstrings(file))
    return [(name, line, re.sub(r"```.*?```", "", text, flags=re.S)) for name, line, text in found]


def problems(prose: Sequence[Passage]) -> list[str]:
    """Return what is out of bounds, a line each."""
    whole = " ".join(text for _, _, text in prose)
    words = max(1, len(whole.split()))
    found = []
    for bounds, too in ((MOST, "most"), (LEAST, "least")):
        for name, (pattern, bound) in bounds.items():
            rate = 1000 * len(re.findall(pattern, whole, re.IGNORECASE)) / words
            print(f"{name}: {rate:.1f} per 1,000 words (at {too} {bound})")
            if rate > bound if too == "most" else rate < bound:
                found.append(f"{name} occurs {rate:.1f} times per 1,000 words; the bound is {bound}")
    for name, line, text in prose:
        for word in AVOID:
            if re.search(rf"\b{word}\b", text, re.IGNORECASE):
                found.append(f"{name}:{line}: avoid {word!r}")
    return found


def main() -> int:
    """Print figures and problems; return the exit status."""
    files = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "langchain_datashunt").rglob("*.py"))
    found = problems(passages(files))
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
