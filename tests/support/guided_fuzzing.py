"""Coverage-guided fuzzing of the readers of untrusted input, for a limited time.

    python -m tests.support.guided_fuzzing [--seconds N] [--target answers|bundle|row] [--corpus DIR]

Requires atheris (`pip install --group audit`). For any input, each target must return a value or raise an error of this
package. Otherwise the run exits with status 1, and atheris saves the input. Memory is limited to 4 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["langchain_datashunt"]):
    from langchain_datashunt import UnparsableAnswerError, load_small_model
    from langchain_datashunt.call_log.record import CallRecord
    from langchain_datashunt.call_log.rows import COLUMNS, record_of, row_of
    from langchain_datashunt.exceptions import ShuntError
    from langchain_datashunt.large_models.label_parser import LabelParser
    from langchain_datashunt.small_models import TextCNN, TrainingSettings

LABELS = ("cancel", "refund", "order status")
PARSER = LabelParser(labels=LABELS)


def answers(data: bytes) -> None:
    """Parse an LLM answer, which must give a label or an `UnparsableAnswerError`."""
    text = atheris.FuzzedDataProvider(data).ConsumeUnicode(sys.maxsize)
    try:
        assert PARSER.parse(text) in LABELS
    except UnparsableAnswerError:
        return


def row(data: bytes) -> None:
    """Read a call log row, which must give a record, a `ShuntError` or a `ValueError`."""
    labels = ("a", "b")
    values = row_of(CallRecord(input="text", labels=labels, probabilities=(0.5, 0.5)), 1, None, sqlite=False)
    found = dict(zip(COLUMNS, values, strict=True)) | {"probabilities": data, "answer": data.decode("latin-1")}
    with contextlib.suppress(ShuntError, ValueError):
        record_of(found, labels, None)


class Bundle:
    """Target that overwrites part of one file of a valid bundle."""

    def __init__(self, folder: Path) -> None:
        texts, labels = ["where is it", "money back"] * 8, ["status", "refund"] * 8
        TextCNN.train(texts, labels, settings=TrainingSettings(progress=False, epochs=1)).save(folder)
        self.folder, self.sound = folder, {file: file.read_bytes() for file in folder.iterdir()}

    def __call__(self, data: bytes) -> None:
        """Load the bundle, which must succeed or raise a `ShuntError`."""
        choice = atheris.FuzzedDataProvider(data)
        file = choice.PickValueInList(sorted(self.sound))
        content = self.sound[file]
        at = choice.ConsumeIntInRange(0, len(content))
        changed = choice.ConsumeBytes(sys.maxsize)
        file.write_bytes(content[:at] + changed + content[at + len(changed) :])
        try:
            load_small_model(self.folder, device="cpu")
        except ShuntError:
            pass
        finally:
            file.write_bytes(content)


TARGETS = ("answers", "row", "bundle")


def fuzz(target: str, seconds: int, corpus: Path | None) -> None:
    """Fuzz one target until the time limit, then exit the process."""
    chosen: dict[str, Callable[[], Any]] = {
        "answers": lambda: answers,
        "row": lambda: row,
        "bundle": lambda: Bundle(Path(tempfile.mkdtemp()) / "bundle"),
    }
    words = [sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=20", "-print_final_stats=1"]
    atheris.Setup(words + ([] if corpus is None else [str(corpus)]), chosen[target]())
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="time limit per target")
    parser.add_argument("--target", choices=TARGETS, help="target to fuzz, by default all in turn")
    parser.add_argument("--corpus", type=Path, help="folder of initial inputs, which atheris extends")
    options = parser.parse_args()
    if options.target is not None:
        fuzz(options.target, options.seconds, options.corpus)
        return
    for target in TARGETS:  # each in its own process, because atheris exits the process when it is done
        print(f"{target}: {options.seconds} s", flush=True)
        words = ["--target", target, "--seconds", str(options.seconds)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.guided_fuzzing", *words], capture_output=True, text=True
        )
        told = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"  {'no fault found' if done.returncode == 0 else 'FAULT'}; {' '.join(told)}", flush=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])


if __name__ == "__main__":
    main()
