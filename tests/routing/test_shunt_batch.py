from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_datashunt import NoPruning, Prediction, Retry, ShuntRunnable, SoftPruning, Threshold
from langchain_datashunt.exceptions import InputError, PredictionError
from tests.support.models import CountingLarge, HttpError, WordModel, failing_word_model, predict_words

QUICK = Retry(attempts=2, initial_wait=0.0, jitter=0.0)
MIXED = ["surely refund", "x", "surely status", "refund", "y", "surely cancel"]
EXPECTED = ["refund", "L:x", "status", "L:refund", "L:y", "cancel"]


def run_batch(shunt: ShuntRunnable, way: str, inputs: list[Any], config: Any = None, **kwargs: Any) -> list[Any]:
    if way == "batch":
        return shunt.batch(inputs, config, **kwargs)
    return asyncio.run(shunt.abatch(inputs, config, **kwargs))


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_makes_one_small_and_one_grouped_large_call(way: str) -> None:
    small, large = WordModel(), CountingLarge()
    inputs = [f"surely refund {i}" if i % 4 else f"x{i}" for i in range(1000)]
    outputs = run_batch(ShuntRunnable(small=small, large=large, max_concurrency=64), way, inputs)
    assert small._calls == [1000]
    assert large.batches == [250]
    assert outputs == [f"L:{text}" if text[0] == "x" else "refund" for text in inputs]


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_keeps_order(way: str) -> None:
    assert run_batch(ShuntRunnable(small=WordModel(), large=CountingLarge()), way, MIXED) == EXPECTED
    assert run_batch(ShuntRunnable(small=predict_words, large=CountingLarge()), way, MIXED) == EXPECTED


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_empty_makes_no_calls(way: str) -> None:
    small, large = WordModel(), CountingLarge()
    assert run_batch(ShuntRunnable(small=small, large=large), way, []) == []
    assert small._calls == large.batches == []


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_all_confident_makes_no_large_call(way: str) -> None:
    large = CountingLarge()
    run_batch(ShuntRunnable(small=WordModel(), large=large), way, ["surely refund"] * 5)
    assert large.batches == []


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_errors_keep_position_or_first_is_raised(way: str) -> None:
    def shunt() -> ShuntRunnable:
        large = CountingLarge({"x": [HttpError(400)], "y": [HttpError(401)]})
        return ShuntRunnable(small=WordModel(), large=large, retry=QUICK)

    outputs = run_batch(shunt(), way, MIXED, return_exceptions=True)
    assert [str(o) if isinstance(o, Exception) else o for o in outputs] == [
        "refund", "status 400", "status", "L:refund", "status 401", "cancel",
    ]  # fmt: skip
    with pytest.raises(HttpError, match="400"):
        run_batch(shunt(), way, MIXED)


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_retries_only_failed_inputs_and_keeps_order(way: str) -> None:
    large = CountingLarge({"x": [HttpError(500)], "refund": [HttpError(429)]})
    shunt = ShuntRunnable(small=WordModel(), large=large, retry=QUICK)
    assert run_batch(shunt, way, MIXED) == EXPECTED
    assert large.batches == [3]
    assert sorted(asked["input"] for asked in large.invoked) == ["refund", "refund", "x", "x", "y"]


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_config_per_input_sets_threshold(way: str) -> None:
    shunt = ShuntRunnable(small=WordModel(), large=CountingLarge())
    configs = [{"configurable": {"shunt_threshold": t}} for t in (0.99999, 0.3, None)]
    assert run_batch(shunt, way, ["surely refund", "refund", "refund"], configs) == [
        "L:surely refund", "refund", "L:refund",
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_bad_prediction_defers_only_its_input(way: str) -> None:
    shunt = ShuntRunnable(small=WordModel(), large=CountingLarge(), return_decision=True)
    results = run_batch(shunt, way, ["surely refund", "nan", 7, "surely cancel"], return_exceptions=True)
    assert [r.reason for r in results[:2]] == ["confident", "small_error"]
    assert "PredictionError" in results[1].decision.error
    assert isinstance(results[2], InputError)
    assert results[3].output == "cancel"


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_small_call_error_defers_all_inputs(way: str) -> None:
    shunt = ShuntRunnable(small=failing_word_model(MemoryError("full")), large=CountingLarge(), return_decision=True)
    assert {r.reason for r in run_batch(shunt, way, MIXED)} == {"small_error"}


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_large_batch_that_raises_falls_back(way: str) -> None:
    class Broken(CountingLarge):
        def batch(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
            raise ValueError("no batches here")

        async def abatch(self, inputs: Any, config: Any = None, **kwargs: Any) -> Any:
            raise ValueError("no batches here")

    shunt = ShuntRunnable(small=WordModel(), large=Broken(), on_large_error="small")
    assert run_batch(shunt, way, MIXED) == ["refund", "cancel", "status", "refund", "cancel", "cancel"]


def test_batch_prediction_with_other_labels_defers_only_its_input() -> None:
    def small(text: str) -> Prediction:
        return Prediction.from_probabilities({"a": 0.99, "b": 0.01} if text != "odd" else {"z": 0.99, "b": 0.01})

    shunt = ShuntRunnable(small=small, large=lambda asked: "large", return_decision=True)
    results = shunt.batch(["one", "odd", "two"])
    assert [r.output for r in results] == ["a", "large", "a"]
    assert "differs from the first" in results[1].decision.error


def test_batch_as_completed_yields_local_answers_first() -> None:
    large = CountingLarge()
    shunt = ShuntRunnable(small=WordModel(), large=large)
    pairs = shunt.batch_as_completed(MIXED)
    assert [next(pairs), next(pairs), next(pairs)] == [(0, "refund"), (2, "status"), (5, "cancel")]
    assert sorted(pairs) == [(1, "L:x"), (3, "L:refund"), (4, "L:y")]


async def test_abatch_as_completed_yields_local_answers_first() -> None:
    shunt = ShuntRunnable(small=WordModel(), large=CountingLarge())
    pairs = [pair async for pair in shunt.abatch_as_completed(MIXED)]
    assert pairs[:3] == [(0, "refund"), (2, "status"), (5, "cancel")]
    assert sorted(pairs[3:]) == [(1, "L:x"), (3, "L:refund"), (4, "L:y")]


async def test_batch_as_completed_returns_or_raises_errors() -> None:
    def shunt() -> ShuntRunnable:
        return ShuntRunnable(small=WordModel(), large=CountingLarge({"x": [HttpError(400)]}), retry=QUICK)

    assert isinstance(dict(shunt().batch_as_completed(MIXED, return_exceptions=True))[1], HttpError)
    with pytest.raises(HttpError):
        list(shunt().batch_as_completed(MIXED))
    found = {i: o async for i, o in shunt().abatch_as_completed(MIXED, return_exceptions=True)}
    assert isinstance(found[1], HttpError)
    with pytest.raises(HttpError):
        [pair async for pair in shunt().abatch_as_completed(MIXED)]
    assert list(shunt().batch_as_completed([])) == []
    assert [pair async for pair in shunt().abatch_as_completed([])] == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["surely refund", "refund", "nan", "status"]),
            st.lists(st.sampled_from([400, 429, 500]), max_size=3),
        ),
        max_size=8,
    )
)
def test_batch_outputs_equal_single_calls_under_faults(plan: list[tuple[str, list[int]]]) -> None:
    """`batch`, `abatch` and `invoke` return the same output for each input, for any sequence of errors."""
    inputs = [f"{text} #{i}" for i, (text, _) in enumerate(plan)]

    def shunt() -> ShuntRunnable:
        failures: dict[str, list[Exception]] = {
            text: [HttpError(status) for status in statuses] for text, (_, statuses) in zip(inputs, plan, strict=True)
        }
        return ShuntRunnable(small=WordModel(), large=CountingLarge(failures), retry=QUICK)

    single, one = [], shunt()
    for value in inputs:
        try:
            single.append(one.invoke(value))
        except HttpError as error:
            single.append(str(error))
    for way in ("batch", "abatch"):
        outputs = run_batch(shunt(), way, inputs, return_exceptions=True)
        assert [str(o) if isinstance(o, Exception) else o for o in outputs] == single


@pytest.mark.parametrize("way", ["batch", "abatch"])
def test_batch_predictions_with_permuted_labels_are_aligned(way: str) -> None:
    def small(text: str) -> Prediction:
        return Prediction.from_probabilities({"a": 0.95, "b": 0.05} if "a" in text else {"b": 0.95, "a": 0.05})

    shunt = ShuntRunnable(small=small, large=lambda asked: "large")
    assert run_batch(shunt, way, ["a", "x", "a", "y"]) == ["a", "b", "a", "b"]


@pytest.mark.parametrize("labels", [None, ("c", "a", "b")])
def test_batch_label_order_of_predictions_does_not_affect_prompts(labels: Any) -> None:
    """Prompts, answers and decisions do not depend on the batch or on its first input."""
    scores = {
        "x": {"a": 0.5, "b": 0.3, "c": 0.2}, "y": {"c": 0.6, "b": 0.4, "a": 0.0}, "tie": {"c": 0.4, "b": 0.4, "a": 0.2},
    }  # fmt: skip
    prompts: list[Any] = []

    def large(asked: Any) -> str:
        prompts.append(asked["candidates"])
        return "large"

    for pruning in (NoPruning(), SoftPruning()):
        shunt = ShuntRunnable(
            small=lambda text: Prediction.from_probabilities(scores[text]), large=large, pruning=pruning,
            policy=Threshold(0.7), labels=labels,
        )  # fmt: skip
        seen = []
        for texts in (["x"], ["y"], ["tie"], ["x", "y", "tie"], ["tie", "y", "x"]):
            prompts.clear()
            assert (shunt.batch(texts) if len(texts) > 1 else [shunt.invoke(texts[0])]) == ["large"] * len(texts)
            seen.append(dict(zip(texts, prompts, strict=True)))
        for text in scores:
            assert len({str(one[text]) for one in seen if text in one}) == 1
        if pruning == NoPruning():
            assert len({str(told) for one in seen for told in one.values()}) == 1
    keeping = ShuntRunnable(
        small=lambda text: Prediction.from_probabilities(scores[text]),
        large=large,
        policy=Threshold(0.39),
        labels=labels,
    )
    alone = [keeping.invoke(text) for text in scores]
    assert alone[2] == ("b" if labels is None else "c")
    assert keeping.batch(list(scores)) == alone
    assert keeping.batch(list(scores)[::-1]) == alone[::-1]


def test_batch_max_concurrency_holds_across_concurrent_batches() -> None:
    import threading

    large = CountingLarge()
    shunt = ShuntRunnable(small=WordModel(), large=large, max_concurrency=2)
    threads = [threading.Thread(target=shunt.batch, args=([f"{t}-{i}" for i in range(4)],)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def many() -> None:
        await asyncio.gather(*(shunt.abatch([f"{t}-{i}" for i in range(4)]) for t in range(4)))

    asyncio.run(many())
    assert len(large.invoked) == 32
    assert large.most_running <= 2


async def test_batch_retries_respect_max_concurrency_of_config() -> None:
    inputs = [f"x{i}" for i in range(6)]
    large = CountingLarge({text: [HttpError(500)] for text in inputs})
    shunt = ShuntRunnable(small=WordModel(), large=large, retry=QUICK)
    assert await shunt.abatch(inputs, {"max_concurrency": 1}) == [f"L:{text}" for text in inputs]
    assert large.most_running == 1


def test_predict_batch_invalid_distribution_raises() -> None:
    with pytest.raises(PredictionError, match="not a distribution"):
        WordModel().predict_batch(["nan"])
    assert len(WordModel().predict_batch([])) == 0
