from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import langchain_datashunt
from langchain_datashunt._utils.optional import require
from langchain_datashunt.exceptions import MissingExtraError

HEAVY = ("torch", "transformers", "llama_index", "langchain", "openai", "datasets", "sklearn", "pyarrow", "typer")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import langchain_datashunt",
        "from langchain_datashunt import ShuntRunnable, ConfidenceRouterChain, Threshold, SoftPruning, SmallModel",
    ],
)
def test_import_loads_no_heavy_dependency(statement: str) -> None:
    assert not loaded_by(statement) & set(HEAVY)


def test_public_names_can_be_imported() -> None:
    for name in langchain_datashunt.__all__:
        assert getattr(langchain_datashunt, name) is not None
    assert set(langchain_datashunt._MODULE_OF) == set(langchain_datashunt.__all__) - {"__version__"}
    assert dir(langchain_datashunt) == sorted(langchain_datashunt.__all__)
    for module in ("langchain_datashunt", "langchain_datashunt.small_models"):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            import_module(module).nothing  # noqa: B018


def test_require_missing_package_error_gives_pip_command() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'langchain-datashunt\[torch\]'"):
        require("a_package_that_is_not_there.module", "torch")
    with pytest.raises(ImportError):
        require("a_package_that_is_not_there", "torch")


def test_require_import_error_inside_package_is_raised_unchanged(tmp_path: object, monkeypatch: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "broken_package.py").write_text("import something_else_that_is_missing\n")
    monkeypatch.syspath_prepend(str(folder))  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError, match="something_else"):
        require("broken_package", "torch")


def test_dependencies_have_reviewed_licences(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.licences import main

    assert main() == 0, capsys.readouterr().out
    assert "langchain-core" in capsys.readouterr().out
