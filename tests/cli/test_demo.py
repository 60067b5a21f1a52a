"""End-to-end tests of the demo with both data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_datashunt import load_small_model
from langchain_datashunt.cli.app import app
from langchain_datashunt.large_models.replay import ChatServer

PROMISED = {
    "n", "small_accuracy", "large_accuracy", "shunt_accuracy", "deferral_rate", "cost_large_usd", "cost_shunt_usd",
    "data", "seed",
}  # fmt: skip


def run_demo(folder: Path, *more: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["demo", "--json-out", str(folder / "f.json"), "--out", str(folder / "out"), *more])
    assert done.exit_code == 0, done.output
    figures: dict[str, Any] = json.loads((folder / "f.json").read_text())
    assert set(figures) >= PROMISED
    for words in ("small alone", "large alone", "shunt", "deferral rate", "Data:", figures["data"][:30]):
        assert words in done.output
    return figures


def test_demo_banking77_shunt_beats_both_models(banking77: Path, tmp_path: Path) -> None:
    figures = run_demo(tmp_path)
    assert figures["n"] == 3080
    assert figures["shunt_accuracy"] >= 0.875
    assert figures["deferral_rate"] <= 0.30
    assert figures["large_accuracy"] == pytest.approx(0.8305, abs=5e-4)
    assert figures["shunt_minus_large_interval"][0] > 0.03
    assert figures["shunt_accuracy"] > figures["small_accuracy"]
    assert figures["cost_shunt_usd"] < 0.3 * figures["cost_large_usd"]
    assert figures["large_errors"] == 0
    tokens = {name: row["tokens"] for name, row in figures["prompt_tokens"].items()}
    assert tokens["conformal, alpha 0.05"] < tokens["hard"] < tokens["all candidates"] < tokens["soft, top 5"]
    assert figures["prompt_tokens"]["conformal, alpha 0.05"]["true_label_kept"] >= 0.92
    loop = figures["loop"]
    assert loop["gate_n"] == 1001
    assert loop["after"]["small_accuracy"] > loop["before"]["small_accuracy"] - 0.01
    assert loop["after"]["deferral_rate"] < loop["before"]["deferral_rate"] - 0.02
    small = load_small_model(figures["bundle"])
    assert small.threshold == figures["threshold"]
    assert small.temperature != 1.0


def test_demo_without_data_uses_packaged_messages(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("DATASHUNT_DATA_DIR", raising=False)
    figures = run_demo(tmp_path, "--seed", "1")
    assert (figures["task"], figures["n"], figures["seed"]) == ("messages", 144, 1)
    assert "stand-in" in figures["large"]
    assert figures["large_accuracy"] > figures["small_accuracy"]
    assert figures["deferral_rate"] < 1.0


def test_demo_openai_model_is_called_over_http(tmp_path: Path, monkeypatch: Any) -> None:
    """`--large openai:MODEL` with a local server."""
    from langchain_datashunt.cli.demo.benchmark_task import load_messages

    monkeypatch.delenv("DATASHUNT_DATA_DIR", raising=False)
    task = load_messages()
    truth = {
        text: label
        for part in (task.train, task.dev, task.test)
        for text, label in zip(part.texts, part.labels, strict=True)
    }

    def answer(messages: Any) -> str:
        return truth[messages[-1]["content"]]

    with ChatServer(answer, model="gpt-4o") as serving:
        serving.keep_bodies = True
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        monkeypatch.setenv("OPENAI_BASE_URL", serving.base_url)
        figures = run_demo(tmp_path, "--large", "openai:gpt-4o", "--limit", "30")
        assert "with probability" in str(serving.bodies[-1]), "the prompt must have the small model's probabilities"
    assert (figures["n"], figures["large_accuracy"], figures["replayed"]) == (30, 1.0, False)
    assert figures["large"] == "openai:gpt-4o, called in this run"
    assert figures["shunt_accuracy"] >= figures["small_accuracy"]


def test_demo_failed_download_exits_with_error(tmp_path: Path, monkeypatch: Any) -> None:
    from langchain_datashunt.cli.demo import command as demo

    def refused(root: Path) -> Path:
        from langchain_datashunt.cli.demo.benchmark_task import download_banking77

        return download_banking77(root, "http://127.0.0.1:9/nothing")

    monkeypatch.setattr(demo, "download_banking77", refused)
    done = CliRunner().invoke(app, ["demo", "--download", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "Cannot download" in done.output
