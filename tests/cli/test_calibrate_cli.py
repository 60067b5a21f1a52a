"""Tests of `datashunt calibrate` and `evaluate` on files, and of the report in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from langchain_datashunt import ConfidenceRouterChain, load_small_model
from langchain_datashunt.cli.app import app
from langchain_datashunt.policies.thresholds import AlwaysLarge, AlwaysSmall, Threshold

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LABELS = ("cancel", "refund", "status")


def rows(n: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        label = str(rng.choice(LABELS))
        word = label if rng.random() < 0.8 else str(rng.choice(LABELS))
        large = label if rng.random() < 0.85 else str(rng.choice([*LABELS, ""]))
        text = f"about my {word} number {seed}-{i} <b>{rng.integers(50)}</b>"
        made.append({"text": text, "label": label, "large": large, "usd": f"{rng.random() / 100:.5f}"})
    return made


def write(file: Path, made: list[dict[str, str]]) -> str:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label", "large", "usd"])
        writer.writeheader()
        writer.writerows(made)
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Folder with a bundle, and files for calibration and evaluation."""
    where: Path = tmp_path_factory.mktemp("calibrate")
    write(where / "train.csv", rows(200, 0))
    write(where / "dev.csv", rows(600, 1))
    write(where / "test.csv", rows(600, 2))
    run("train", where, "train.csv", "--model", "textcnn", "--out", str(where / "base"), "--epochs", "6")
    return where


def run(command: str, folder: Path, data: str, *more: str, code: int = 0) -> str:
    given = [command, "--data", str(folder / data), "--text", "text", "--label", "label", *more]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture
def bundle(folder: Path, tmp_path: Path) -> str:
    shutil.copytree(folder / "base", tmp_path / "bundle")
    return str(tmp_path / "bundle")


def test_train_auto_saves_best_kind(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "best")
    said = run("train", folder, "train.csv", "--model", "auto", "--out", out, "--time-budget", "3", "--epochs", "2")
    assert "embedding: NLL" in said
    assert load_small_model(out).labels == LABELS
    words = run("train", folder, "train.csv", "--model", "textcnn", "--out", out, "--label-names-as-examples", code=2)
    assert (
        "Expected --model embedding, neighbours, ensemble, contrastive or auto with --label-names-as-examples" in words
    )


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("max-accuracy", ["--large-label", "large"]),
        ("max-accuracy", ["--large-label", "large", "--fusion"]),
        ("match-large", ["--large-label", "large"]),
        ("match-large=0.02", ["--large-label", "large"]),
        ("deferral=0.2", ["--large-label", "large"]),
        ("deferral=0.2", []),
        ("cost=1.5", ["--large-label", "large", "--large-cost", "usd"]),
        ("cost=1.5", ["--large-label", "large", "--large-cost", "0.005"]),
        ("risk=0.15", []),
        ("risk=0.2", []),
    ],
)
def test_calibrate_every_objective_is_saved_in_bundle(
    objective: str, more: list[str], folder: Path, bundle: str, tmp_path: Path
) -> None:
    out = tmp_path / "choice.json"
    run("calibrate", folder, "dev.csv", "--bundle", bundle, "--objective", objective, "--json-out", str(out), *more)
    told, small = json.loads(out.read_text()), load_small_model(bundle)
    if objective == "risk=0.2":  # the error is 13% at full coverage, so every input may be answered locally
        assert isinstance(small.policy, AlwaysSmall)
    else:
        assert isinstance(small.policy, Threshold)
        assert small.policy.threshold == told["threshold"] == small.threshold
    assert (small.fusion is not None) == ("--fusion" in more)
    if objective.startswith("deferral"):
        assert told["deferral_rate"] <= 0.2 + 1e-9
    if objective.startswith("cost"):
        assert told["usd_per_1000"] <= 1.5 + 1e-9
    if objective.startswith("risk"):
        percent = objective.removeprefix("risk=0.").ljust(2, "0")
        assert f"With 95% confidence, at most {percent}%" in told["guarantee"]
        assert told["selective_risk"] <= int(percent) / 100
        assert told["temperature"] == load_small_model(folder / "base").temperature, (
            "the scores must not depend on the labels"
        )
    from langchain_core.language_models import FakeListChatModel

    chain = ConfidenceRouterChain.from_models(small, FakeListChatModel(responses=["refund"]), answer_format="text")
    assert chain.policy_in_service == small.policy


def test_calibrate_guarantee_not_shown_exits_with_status_1(folder: Path, bundle: str) -> None:
    said = run("calibrate", folder, "dev.csv", "--bundle", bundle, "--objective", "risk=0.02", code=1)
    assert "everything is sent to the large model" in said
    assert isinstance(load_small_model(bundle).policy, AlwaysLarge)


def test_evaluate_json_has_stable_keys_with_intervals(folder: Path, bundle: str, tmp_path: Path) -> None:
    out, asked = tmp_path / "figures.json", ["--large-label", "large"]
    run("calibrate", folder, "dev.csv", "--bundle", bundle, "--objective", "max-accuracy", "--fusion", *asked)
    given = ["--bundle", bundle, "--json-out", str(out), *asked, "--large-cost", "usd"]
    run("evaluate", folder, "test.csv", *given)
    told = json.loads(out.read_text())
    keys = (
        "small_accuracy", "large_accuracy", "shunt_accuracy", "deferral_rate", "fused_accuracy", "random_mix_accuracy",
        "aurc", "ece_before", "ece_after", "savings_usd_per_1000",
    )  # fmt: skip
    assert told["n"] == 600
    for key in keys:
        low, high = told[f"{key}_interval"]
        assert low <= high
    assert told["shunt_accuracy"] > told["random_mix_accuracy"]
    run("evaluate", folder, "test.csv", *given, "--threshold", "0.99")
    assert json.loads(out.read_text())["deferral_rate"] > told["deferral_rate"]


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        ("train.csv", ["--objective", "risk=0.3"], "texts of .*train.csv were used in training \\(first in row 1\\)"),
        ("dev.csv", ["--objective", "best"], "Expected max-accuracy, match-large"),
        ("dev.csv", ["--objective", "risk"], "Expected a number for --objective, got 'risk'. Write it like risk=0.05"),
        ("dev.csv", ["--objective", "risk=high"], "Expected a number for --objective, got 'risk=high'"),
        ("dev.csv", ["--objective", "max-accuracy"], "`large` is None"),
        ("dev.csv", ["--objective", "max-accuracy", "--fusion"], "Pass --large-label"),
        (
            "dev.csv",
            ["--objective", "max-accuracy", "--large-label", "gpt"],
            "no column 'gpt'. Available columns: text, label",
        ),
        (
            "dev.csv",
            ["--objective", "cost=1", "--large-label", "large", "--large-cost", "text"],
            "Expected USD as a number in column 'text'",
        ),
        ("dev.csv", ["--objective", "risk=0.0001"], "calibration examples to bound the selective risk"),
        ("empty.csv", ["--objective", "risk=0.1"], "has no rows"),
        ("strange.csv", ["--objective", "deferral=0.1"], "label set: unheard-of"),
        ("one.csv", ["--objective", "deferral=0.1"], "got 'refund' for all 20 examples"),
    ],
)
def test_calibrate_invalid_input_error_names_remedy(
    data: str, more: list[str], words: str, folder: Path, bundle: str
) -> None:
    write(folder / "empty.csv", [])
    write(folder / "strange.csv", [{**row, "label": "unheard-of"} for row in rows(3, 5)] + rows(30, 6))
    write(folder / "one.csv", [{**row, "label": "refund"} for row in rows(20, 7)])
    before = (Path(bundle) / "config.json").read_text()
    said = run("calibrate", folder, data, "--bundle", bundle, *more, code=2)
    assert re.search(words, said), said
    assert (Path(bundle) / "config.json").read_text() == before, "the bundle must not change"


# The report


@pytest.fixture
def report(folder: Path, bundle: str, tmp_path: Path) -> Path:
    asked = ["--large-label", "large"]
    run("calibrate", folder, "dev.csv", "--bundle", bundle, "--objective", "max-accuracy", "--fusion", *asked)
    file = tmp_path / "report.html"
    run("evaluate", folder, "test.csv", "--bundle", bundle, "--report", str(file), *asked, "--large-cost", "usd")
    return file


def test_report_is_self_contained_and_escapes_texts(report: Path, folder: Path, bundle: str) -> None:
    page = report.read_text()
    assert "&lt;b&gt;" in page and "<b>4" not in page, "texts must be escaped"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page), "the report must load no other file"
    assert "<script" not in page
    for title in ("Accuracy by deferral rate", "Reliability", "Risk and coverage", "Labels, least accurate first"):
        assert title in page
    quiet = report.with_name("quiet.html")
    run(
        "evaluate",
        folder,
        "test.csv",
        "--bundle",
        bundle,
        "--large-label",
        "large",
        "--report",
        str(quiet),
        "--no-texts",
    )
    assert "about my" not in quiet.read_text()
    alone = report.with_name("alone.html")
    run("evaluate", folder, "test.csv", "--bundle", bundle, "--report", str(alone))
    assert "Accuracy by deferral rate" not in alone.read_text(), "without recorded answers there is no such curve"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("size", "scheme"), [("1280,1600", 0), ("1280,1600", 1), ("390,1600", 1)])
def test_report_renders_in_browser(report: Path, size: str, scheme: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, f"--screenshot={shot}", report.as_uri()], capture_output=True, text=True, timeout=90
    )
    assert shot.stat().st_size > 20_000, done.stderr
    assert "CONSOLE" not in done.stderr
    page = subprocess.run([*command, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=90).stdout
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        assert re.search(r'<polyline points="[\d.]+,[\d.]+ [\d.]+', figure)
        assert "NaN" not in figure and "nan" not in figure
