"""Bulk routing on local Ray: two workers, an HTTP server, PostgreSQL, and an actor that is killed."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from pydantic import BaseModel
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from langchain_datashunt import (
    ConfidenceRouterChain,
    DeferralBudget,
    NoPruning,
    Prediction,
    PredictProbaClassifier,
    ShuntRunnable,
    Threshold,
)
from langchain_datashunt.exceptions import BundleError, ConfigurationError
from langchain_datashunt.large_models.replay import ChatServer, RecordedAnswers
from langchain_datashunt.policies import Margin
from langchain_datashunt.small_models import BundledSmallModel, TrainingSettings, load_small_model
from tests.call_log.test_store import postgres_url

arrow = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'langchain-datashunt[ray]'")
pytest.importorskip("ray.data")

from langchain_datashunt.ray import ANSWER_COLUMNS, _LargeStage, _SmallStage, shunt_dataset  # noqa: E402


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """Local Ray with two CPUs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=150 * 2**20, log_to_driver=False,
        configure_logging=False, _node_ip_address="127.0.0.1",
    )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield ray.data
    ray.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any, shop_messages: Any) -> Path:
    texts, labels = shop_messages
    settings = TrainingSettings(progress=False)
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10.0))
    model = PredictProbaClassifier.train(texts, labels, estimator=words, settings=settings, model_id="shop")
    folder: Path = tmp_path_factory.mktemp("ray") / "bundle"
    model.save(folder)
    return folder


class CountingServer(ChatServer):
    """Counts how many requests were open at once."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer, model="gpt-4")
        self.open = self.most_open = 0
        self._count = threading.Lock()
        self.asked: Counter[str] = Counter()

    def take(self, body: dict[str, Any]) -> int:
        with self._count:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.asked[body["messages"][-1]["content"]] += 1
        try:
            time.sleep(0.01)
            return super().take(body)
        finally:
            with self._count:
                self.open -= 1


@pytest.mark.timeout(240)
def test_shunt_dataset_killed_actor_answers_every_row_once(
    local_ray: Any, bundle: Path, tmp_path: Path, shop_messages: Any
) -> None:
    texts, labels = shop_messages
    n, url = 600, postgres_url()
    questions = [f"{texts[i % len(texts)]} ({i})" for i in range(n)]
    recorded = RecordedAnswers({question: labels[i % len(texts)] for i, question in enumerate(questions)})
    killed, path = str(tmp_path / "killed"), str(bundle)
    with CountingServer(recorded) as server:
        base_url = server.base_url

        def make_chain() -> Any:
            from langchain_openai import ChatOpenAI

            from langchain_datashunt.call_log import Recorder, SharedThreshold

            model = ChatOpenAI(model="gpt-4", base_url=base_url, api_key="none", max_retries=0)  # type: ignore[arg-type]
            calls = [0]

            def die_once(message: AIMessage) -> AIMessage:
                calls[0] += 1
                if calls[0] == 20:
                    try:
                        os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        return message
                    os.kill(os.getpid(), signal.SIGKILL)
                return message

            return ConfidenceRouterChain.from_models(
                BundledSmallModel.from_folder(path),
                model | die_once,
                pruning=NoPruning(),
                answer_format="text",
                policy=DeferralBudget(rate=0.3, start=0.5, control=SharedThreshold(url, "ray")),
                recorder=Recorder(url, task="ray"),
            )

        rows = [{"number": i, "question": question} for i, question in enumerate(questions)]
        answered = shunt_dataset(
            local_ray.from_items(rows, override_num_blocks=12), make_chain, column="question", batch_size=50,
            small_actors=1, small_cpus=0.5, large_actors=2, large_cpus=0.25, large_concurrency=6,
        )  # fmt: skip
        found = sorted(answered.take_all(), key=lambda row: row["number"])
    assert Path(killed).exists(), "no actor was killed"
    assert [row["number"] for row in found] == list(range(n))
    assert set(found[0]) == {"number", "question", *ANSWER_COLUMNS}
    small = load_small_model(bundle).predict_batch(questions)
    for row, prediction in zip(found, small, strict=True):
        assert row["error"] is None
        assert (row["label"], row["confidence"]) == (prediction.label, pytest.approx(prediction.confidence))
        own = recorded([{"role": "user", "content": row["question"]}])
        assert row["answer"] == (prediction.label if row["route"] == "small" else own)
    asked = [row for row in found if row["route"] == "large"]
    assert 0.15 * n < len(asked) < 0.5 * n
    assert server.most_open <= 6
    from langchain_datashunt.call_log import CallFilter, CallLog

    with CallLog(url) as store:
        records = {call.input: call for group in store.iterate(CallFilter(route="large")) for call in group}
    assert {row["question"] for row in asked} <= set(records)
    assert all(records[row["question"]].answer_label == row["answer"] for row in asked)
    repeated = sum(count - 1 for count in server.asked.values())
    assert repeated <= 50, "more than the killed actor's batch was asked again"


def test_stages_two_small_models_and_failures_match_chain_batch(bundle: Path) -> None:
    """The stages run one after the other, as in the actors."""

    def large(text: str) -> str:
        if "fail" in text:
            raise ValueError("no answer to that")
        return f"L:{text}"

    def student(text: str) -> Prediction:
        if "broken" in text:
            raise ValueError("cannot read that")
        p = 0.99 if "lamp" in text else 0.5
        return Prediction.from_probabilities({"damaged_item": p, "promo_code": 1.0 - p})

    labels = load_small_model(bundle).labels
    chain = ShuntRunnable(
        small=BundledSmallModel.from_folder(bundle), student=student, large=large, pruning=None, policy=Threshold(0.98),
        labels=labels,
    )  # fmt: skip
    texts = ["a lamp", "fail please", "broken", "other", None]
    table = arrow.table({"text": arrow.array(texts, "string"), "more": list(range(5))})
    answered = _LargeStage(lambda: chain, "text", 4)(_SmallStage(lambda: chain, "text")(table))
    assert answered.schema.names == ["text", "more", *ANSWER_COLUMNS]
    assert [str(answered.schema.field(name).type) for name in ANSWER_COLUMNS] == list(ANSWER_COLUMNS.values())
    found = answered.to_pylist()
    own = chain.model_copy(update={"return_decision": True}).batch(["" if t is None else t for t in texts],
                                                                   return_exceptions=True)  # fmt: skip
    for row, result in zip(found, own, strict=True):
        if not isinstance(result, Exception):
            assert (row["answer"], row["route"], row["reason"]) == (result.output, result.route, result.reason)
            assert row["confidence"] == pytest.approx(result.prediction.confidence)
    assert found[0]["answer"] == "damaged_item"
    assert found[0]["route"] == "student"
    assert found[1]["answer"] is None
    assert found[1]["error"] == "ValueError: no answer to that"
    assert [found[i]["answer"] for i in (2, 3, 4)] == ["L:broken", "L:other", None]
    assert found[4]["error"].startswith("InputError: The input is blank")
    assert found[2]["label"] in labels


def test_stages_unusual_answers_and_labels_are_written_for_every_row() -> None:
    """Unpaired surrogates, keys that are not JSON and objects are written as text, and errors by name."""

    class Place(BaseModel):
        city: str

    answers = {
        "half": "half \ud83d", "keys": {(1, 2): "x"}, "place": Place(city="Bern"), "in": {"at": Place(city="Bern")},
        "say": AIMessage("said"), "plain": "plain",
    }  # fmt: skip

    def small(text: str) -> Prediction:
        if text == "fails":
            raise OSError("boom")
        return Prediction.from_probabilities({"la\ud83dbel": 0.6, "other": 0.4})

    labels = ("la\ud83dbel", "other")
    chain = ShuntRunnable(small=small, large=answers.get, pruning=None, policy=Threshold(0.9), labels=labels)
    table = arrow.table({"text": [*answers, "fails"]})
    found = _LargeStage(lambda: chain, "text", 4)(_SmallStage(lambda: chain, "text")(table)).to_pylist()
    assert [row["answer"] for row in found] == [
        "half \\ud83d", "{(1, 2): 'x'}", '{"city": "Bern"}', '{"at": {"city": "Bern"}}', "said", "plain", "null",
    ]  # fmt: skip
    assert found[0]["label"] == "la\\ud83dbel"
    assert found[-1]["error"].startswith("OSError: ")


def test_stages_changed_label_order_and_copied_inputs_keep_answers(bundle: Path) -> None:
    """Each row carries its own labels, and copied or pickled inputs are plain strings."""
    sets = [{"b": 0.9, "a": 0.1}, {"a": 0.95, "b": 0.05}]

    def chain(which: int) -> Any:
        def small(text: str) -> Prediction:
            return Prediction.from_probabilities(
                {"a": 0.5, "b": 0.5} if text == "unsure" else sets[which], model_id="m"
            )

        return ShuntRunnable(
            small=small,
            large=lambda text: f"L:{pickle.loads(pickle.dumps(copy.deepcopy(text)))}", pruning=None,
            policy=Threshold(0.5, score=Margin()), labels=("a", "b"),
        )  # fmt: skip

    tables = [_SmallStage(lambda i=i: chain(i), "text")(arrow.table({"text": ["x", "unsure"]})) for i in range(2)]  # type: ignore[misc]
    both = arrow.concat_tables(tables)
    found = _LargeStage(lambda: chain(0), "text", 2)(both).to_pylist()
    assert [row["answer"] for row in found] == ["b", "L:unsure", "a", "L:unsure"]


def test_shunt_dataset_invalid_settings_raise(local_ray: Any, bundle: Path) -> None:
    data = local_ray.from_items([{"text": "a"}])
    chain = ShuntRunnable(small=BundledSmallModel.from_folder(bundle), large=lambda _: "L", pruning=None)
    with pytest.raises(ConfigurationError, match="large_concurrency=1 for 2 large actors"):
        shunt_dataset(data, chain, large_actors=2, large_concurrency=1)
    with pytest.raises(ConfigurationError, match="Expected a number of actors"):
        shunt_dataset(data, chain, small_actors=(3, 2))
    lock = threading.Lock()
    held = ShuntRunnable(small=BundledSmallModel.from_folder(bundle), large=lambda _: str(lock), pruning=None)
    with pytest.raises(ConfigurationError, match="creates the chain in each actor"):
        shunt_dataset(data, held)
    nameless = ShuntRunnable(
        small=lambda _: Prediction.from_probabilities({"a": 1.0}), large=lambda _: "L", pruning=None
    )
    with pytest.raises(ConfigurationError, match="has no labels"):
        shunt_dataset(data, nameless)


def test_stages_invalid_columns_or_chain_raise_on_first_batch(bundle: Path) -> None:
    def large(_: Any) -> str:
        return "L"

    def make() -> Any:
        return ShuntRunnable(small=BundledSmallModel.from_folder(bundle), large=large, pruning=None)

    with pytest.raises(ConfigurationError, match="has no column 'question'"):
        _SmallStage(make, "question")(arrow.table({"text": ["a"]}))
    with pytest.raises(ConfigurationError, match="would overwrite: answer"):
        _SmallStage(make, "text")(arrow.table({"text": ["a"], "answer": ["b"]}))
    with pytest.raises(ConfigurationError, match="are reserved, got datashunt_id"):
        _SmallStage(make, "text")(arrow.table({"text": ["a"], "datashunt_id": ["b"]}))
    with pytest.raises(ConfigurationError, match="Expected a ShuntRunnable from the chain function, got str"):
        _SmallStage(lambda: "chain", "text")(arrow.table({"text": ["a"]}))  # type: ignore[arg-type, return-value]
    with pytest.raises(BundleError):
        _LargeStage(lambda: make().model_copy(update={"small": BundledSmallModel.from_folder("nowhere")}), "text", 1)(
            arrow.table({"text": ["a"]})
        )
