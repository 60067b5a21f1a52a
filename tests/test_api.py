"""Tests of the public API and the command line against snapshots.

After an intended change, run `DATASHUNT_UPDATE_SNAPSHOTS=1 pytest tests/test_api.py` to update the snapshots. Review
the difference before committing it, and describe the change in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from langchain_datashunt.cli.app import app

SNAPSHOTS = Path(__file__).parent / "snapshots"
MODULES = (
    "langchain_datashunt",
    "langchain_datashunt.agents",
    "langchain_datashunt.calibration",
    "langchain_datashunt.call_log",
    "langchain_datashunt.chat",
    "langchain_datashunt.distillation",
    "langchain_datashunt.evaluation",
    "langchain_datashunt.exceptions",
    "langchain_datashunt.large_models",
    "langchain_datashunt.llama_index",
    "langchain_datashunt.policies",
    "langchain_datashunt.privacy",
    "langchain_datashunt.ray",
    "langchain_datashunt.routing",
    "langchain_datashunt.large_models.replay",
    "langchain_datashunt.small_models",
)


def written(value: Any) -> str:
    """Return the source form of a default, or "..." if it is long or depends on the run."""
    text = repr(value)
    return "..." if " at 0x" in text or len(text) > 60 or "/" in text else text


def field_lines(model: type[BaseModel]) -> Iterator[str]:
    """Yield one line for each setting that is defined in this package."""
    ours = [base for base in model.__mro__ if base.__module__.startswith("langchain_datashunt")]
    names = {name for base in ours for name in vars(base).get("__annotations__", {})}
    for name, field in model.model_fields.items():
        if name in names:
            yield f"  {name}: {kind(field)}{default(field)}"


def kind(field: FieldInfo) -> str:
    return re.sub(r"\b[a-z_]+\.(?:[A-Za-z_]+\.)*", "", inspect.formatannotation(field.annotation))


def default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    return " = ..." if field.default_factory is not None else f" = {written(field.default)}"


def signature_line(function: Any) -> str:
    parameters = []
    for name, one in inspect.signature(function).parameters.items():
        if name in ("self", "cls"):
            continue
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        if one.kind == one.KEYWORD_ONLY and "*" not in parameters and not any(p.startswith("*") for p in parameters):
            parameters.append("*")
        parameters.append(f"{stars}{name}" + ("" if one.default is one.empty else f"={written(one.default)}"))
    return f"({', '.join(parameters)})"


def public_names() -> set[str]:
    return {name for module in MODULES for name in getattr(importlib.import_module(module), "__all__", ())}


def methods(cls: type) -> Iterator[str]:
    """Yield the signatures of methods defined by a class or by its private bases in this package."""
    known = public_names()
    own = [
        base for base in cls.__mro__
        if base is cls or (base.__module__.startswith("langchain_datashunt") and base.__name__ not in known)
    ]  # fmt: skip
    found = {name: value for base in reversed(own) for name, value in vars(base).items()}
    for name, value in sorted(found.items()):
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and inspect.isfunction(plain):
            yield f"  .{name}{signature_line(plain)}"
        elif not name.startswith("_") and isinstance(value, property):
            yield f"  .{name}"


def told(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__.partition("[")[0] for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if issubclass(value, BaseModel):
            yield from field_lines(value)
        elif "__init__" in vars(value):
            yield f"  {signature_line(value.__init__)}"
        yield from methods(value)
    elif callable(value):
        yield f"def {name}{signature_line(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def public_surface() -> Iterator[str]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None)
        if names is None:
            names = [
                name for name, one in vars(module).items()
                if not name.startswith("_") and getattr(one, "__module__", "") == module_name
            ]  # fmt: skip
        yield f"# {module_name}"
        for name in sorted(names):
            yield from told(name, getattr(module, name))
        yield ""


def commands() -> Iterator[str]:
    def walk(command: Any, words: str) -> Iterator[str]:
        for name, one in sorted(getattr(command, "commands", {}).items()):
            yield from walk(one, f"{words} {name}")
        if not hasattr(command, "commands"):
            yield f"{words}: {(command.help or '').strip().splitlines()[0]}"
            for option in command.params:
                says = "" if getattr(option, "help", None) is None else f"  {option.help}"
                needed = " (required)" if option.required else ""
                yield f"  {'/'.join([*option.opts, *option.secondary_opts])}{needed}{says}"

    yield from walk(typer.main.get_command(app), "datashunt")


@pytest.mark.parametrize(("name", "lines"), [("api.txt", public_surface), ("cli.txt", commands)])
def test_public_api_matches_snapshot(name: str, lines: Any) -> None:
    text, file = "\n".join(lines()) + "\n", SNAPSHOTS / name
    text = text.replace("ndarray[Any, dtype[Any]]", "ndarray[tuple[Any, ...], dtype[Any]]")  # numpy 1 and 2
    if os.environ.get("DATASHUNT_UPDATE_SNAPSHOTS"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"see the docstring of {Path(__file__).name}"


def test_public_names_exist_and_have_docstrings() -> None:
    """Every name in `__all__` of a public module exists, once, and has a docstring."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = list(getattr(module, "__all__", []))
        assert len(names) == len(set(names)), module_name
        for name in names:
            assert getattr(module, name) is not None
            assert inspect.getdoc(getattr(module, name)), f"{module_name}.{name} has no docstring"
