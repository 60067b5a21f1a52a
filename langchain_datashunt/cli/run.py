"""`datashunt run`: answer every row of a file in constant memory, and resume after a kill.

Answers are written to OUT and OUT.part (see `Journal`), so a kill loses only calls that had not returned.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from langchain_datashunt._utils.optional import require
from langchain_datashunt._utils.table_files import cell, read_rows, require_columns
from langchain_datashunt.cli.journal import FIELDS, Journal, is_failed
from langchain_datashunt.cli.output import progress
from langchain_datashunt.decision import ShuntResult
from langchain_datashunt.exceptions import ConfigurationError, TooManyFailuresError
from langchain_datashunt.large_models.prompt_pruning import NoPruning, Pruning, SoftPruning, TopHint
from langchain_datashunt.large_models.replay import ChatServer, RecordedAnswers
from langchain_datashunt.policies.thresholds import Policy, Threshold
from langchain_datashunt.prediction import writable
from langchain_datashunt.routing.label_router import ConfidenceRouterChain
from langchain_datashunt.small_models import load_small_model

STEPS_AT_ONCE = 3
"""Maximum concurrent steps: one for the small model, and two that wait for LLM calls."""

_MOST_STEPS = 16
"""Maximum unwritten steps, including finished ones that may have to be retried."""

PRUNINGS: dict[str, type[Pruning]] = {"soft": SoftPruning, "top": TopHint, "none": NoPruning}


@contextmanager
def large_model(spec: str, **settings: Any) -> Iterator[Any]:
    """Yield the chat model of `openai:MODEL`, or that of a local server that replays `replay:FILE`.

    Raises:
        ConfigurationError: If `spec` is neither, or the client cannot be created.
    """
    kind, _, name = spec.partition(":")
    if kind == "openai" and name:
        made = require("langchain_openai", "openai").ChatOpenAI
        try:
            model = made(model=name, max_retries=0, **settings)
        except Exception as error:  # the client raises its own types, mostly for a missing API key
            raise ConfigurationError(f"Cannot create the client for --large {spec!r}: {error}") from error
        yield model
    elif kind == "replay" and name:
        with ChatServer(RecordedAnswers.load(name)) as server:
            yield server.chat_model(**settings)
    else:
        raise ConfigurationError(f"Expected openai:MODEL or replay:FILE for --large, got {spec!r}.")


def run_file(
    bundle: Path,
    large: str,
    data: Path,
    text: str,
    out: Path,
    *,
    threshold: float | None,
    pruning: str,
    on_large_error: str,
    concurrency: int,
    chunk: int,
    store: str | None = None,
    task: str = "default",
    retry_failed: bool = False,
    max_failures: int = 0,
    computed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer the rows that are not answered yet, and return JSON-ready totals over the whole of OUT.

    Raises:
        TooManyFailuresError: If `max_failures` consecutive LLM calls failed (0 means unlimited). The next run retries
            the failed rows.
        ShuntError: If the bundle, the data, the large model or OUT cannot be used. No answer is lost.
    """
    if pruning not in PRUNINGS or on_large_error not in ("raise", "small"):
        raise ConfigurationError("Expected soft, top or none for --pruning, and raise or small for --on-large-error.")
    require_columns(data, text)
    n = 0
    for n, row in enumerate(read_rows(data), start=1):
        cell(data, n, row, text)
    policy: Policy | None = None if threshold is None else Threshold(threshold)
    started = time.perf_counter()
    with (
        Journal(out).alone() as journal,
        large_model(large) as chat_model,
        _recorder(store, task) as recorder,
        progress() as bar,
    ):
        done = journal.resume((str(row[text]) for row in read_rows(data)), data.name)
        if retry_failed:
            journal.withdraw([i for i, record in journal.part.items() if is_failed(record)])
        answered = done + len(journal.part)
        small = load_small_model(bundle, **(computed or {}))
        chain = ConfidenceRouterChain.from_models(
            small,
            chat_model,
            pruning=NoPruning() if small.is_placeholder else PRUNINGS[pruning](),
            policy=policy,
            answer_format="text",
            on_large_error=cast(Literal["raise", "small"], on_large_error),
            max_concurrency=concurrency,
            return_decision=True,
            recorder=recorder,
        )

        async def answer(texts: Iterator[tuple[int, str]], into: Journal, what: str, total: int, done: int = 0) -> None:
            advance = partial(bar.advance, bar.add_task(what, total=total, completed=done))
            await _answer_all(chain, texts, chunk, into, advance, max_failures)

        async def answer_all() -> int:
            rows = itertools.islice(enumerate(read_rows(data)), done, None)
            await answer(((i, str(row[text])) for i, row in rows), journal, "rows", n, done)
            return await _retried(journal, data, text, done, answer) if retry_failed else 0

        retried = asyncio.run(answer_all())
        seconds = round(time.perf_counter() - started, 2)
        return {**journal.sums(), "resumed_at": answered, "retried": retried, "seconds": seconds}


async def _retried(journal: Journal, data: Path, text: str, before: int, answer: Callable[..., Awaitable[None]]) -> int:
    """Retry the rows of OUT that failed before this run, and replace them with the new answers.

    The new answers stay in a separate file until all rows are retried, so a kill loses none of them.

    Returns:
        Number of retried rows.
    """

    def failed() -> Iterator[tuple[int, str]]:
        pairs = itertools.islice(zip(journal.rows(), read_rows(data), strict=False), before)
        return ((int(record["row"]), str(row[text])) for record, row in pairs if is_failed(record))

    journal.mend()  # first merge the answers of a killed run
    if n := sum(1 for _ in failed()):
        await answer(failed(), journal.beside(), "failed rows", n)
        journal.mend()
    return n


@contextmanager
def _recorder(store: str | None, task: str) -> Iterator[Any]:
    """Yield a recorder for the call log, or None if no log is given."""
    if store is None:
        yield None
        return
    from langchain_datashunt.call_log.recorder import Recorder

    with Recorder(store, task=task, sample_small=1.0, durability="record") as recorder:  # on disk before its row
        yield recorder


async def _answer_all(
    chain: ConfidenceRouterChain,
    texts: Iterator[tuple[int, str]],
    chunk: int,
    journal: Journal,
    advance: Callable[[int], None],
    max_failures: int = 0,
) -> None:
    """Answer the rows that are missing from the journal, and record each answer as it arrives.

    Steps overlap: the small model computes the next step while the LLM calls of the previous one are pending.

    Raises:
        TooManyFailuresError: If `max_failures` LLM calls failed without a success in between. Their rows are withdrawn
            from the journal.
    """
    # Failed rows, with the number of LLM answers since. Calls that were already in flight prove no recovery.
    failing: dict[int, int] = {}
    under_way_at_once = 2 * (chain.max_concurrency or 1)
    streak, stopped = 0, False

    async def answer(step: dict[int, str]) -> None:
        nonlocal streak, stopped
        todo = [i for i, text in step.items() if not journal.has(i, text)]
        advance(len(step) - len(todo))
        inputs = [step[i] for i in todo]
        async for position, result in chain.abatch_as_completed(inputs, return_exceptions=True):
            record = _record(todo[position], inputs[position], result)
            journal.note(record)
            advance(1)
            if not max_failures:
                continue
            if is_failed(record):
                streak += 1
                failing[record["row"]] = 0
            elif record["route"] == "large" and not stopped:
                streak = 0
                for row in [row for row, since in failing.items() if since >= under_way_at_once]:
                    del failing[row]
                failing.update({row: since + 1 for row, since in failing.items()})
            if streak >= max_failures:
                stopped = True
                raise TooManyFailuresError(streak, str(record["error"]), str(journal.out))

    under_way: deque[tuple[list[int], asyncio.Task[None]]] = deque()
    try:
        while True:
            at_work = [task for _, task in under_way if not task.done()]
            while (
                len(at_work) < STEPS_AT_ONCE
                and len(under_way) < _MOST_STEPS
                and (step := dict(itertools.islice(texts, chunk)))
            ):
                at_work.append(asyncio.create_task(answer(step)))
                under_way.append((list(step), at_work[-1]))
            if not under_way:
                return
            rows, first = under_way[0]
            # While a failure streak lasts, a finished step with failed rows is not written: the rows may be withdrawn.
            in_doubt = at_work and len(under_way) < _MOST_STEPS and not failing.keys().isdisjoint(rows)
            if first.done() and not in_doubt:
                first.result()
                journal.finish(under_way.popleft()[0])
                continue
            for task in (await asyncio.wait(at_work, return_when=asyncio.FIRST_COMPLETED))[0]:
                task.result()  # an error in one step ends the run
    finally:
        tasks = [task for _, task in under_way]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if stopped:
            journal.withdraw(failing)
        journal.close()


def _record(row: int, text: str, result: Any) -> dict[str, Any]:
    if isinstance(result, ShuntResult):
        confidence = None if result.prediction is None else round(result.prediction.confidence, 6)
        values = (
            row,
            text,
            result.output,
            result.route,
            result.reason,
            confidence,
            result.cost_usd,
            result.decision.error,
        )
    else:
        values = (row, text, None, "large", "large_error", None, None, f"{type(result).__name__}: {result}")
    written = (writable(value) if isinstance(value, str) else value for value in values)
    return dict(zip(FIELDS, written, strict=True))
