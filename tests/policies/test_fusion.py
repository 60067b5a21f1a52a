from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate

from langchain_datashunt import (
    AlwaysLarge,
    ConfidenceRouterChain,
    ConformalPruning,
    NoPruning,
    Prediction,
    ShuntRunnable,
    SoftPruning,
    Threshold,
    load_small_model,
)
from langchain_datashunt.exceptions import BundleError, ConfigurationError, DataError
from langchain_datashunt.policies.fusion import AnswerFusion
from langchain_datashunt.policies.thresholds import ValueOfInformation
from langchain_datashunt.prediction import PredictionBatch
from tests.support.models import LABELS, WordModel

NAMES = ("a", "b", "c")


def fitted(accuracy: float = 0.8, n: int = 600, seed: int = 0) -> AnswerFusion:
    rng = np.random.default_rng(seed)
    truth = rng.choice(NAMES, n).tolist()
    large = [t if rng.random() < accuracy else str(rng.choice(NAMES)) for t in truth]
    return AnswerFusion.fit(NAMES, truth, large)


def test_fusion_posterior_follows_bayes_rule() -> None:
    fusion = AnswerFusion.fit(NAMES, ["a", "a", "b", "c"], ["a", "b", "b", None], strength=2.0)
    p, likelihood = np.array([[0.5, 0.3, 0.2]]), fusion.likelihood
    assert likelihood.shape == (3, 4)
    assert likelihood.sum(axis=1) == pytest.approx(1.0)
    wanted = p[0] * likelihood[:, 1]
    assert fusion.posterior(p, np.array([1]))[0] == pytest.approx(wanted / wanted.sum())
    silent = p[0] * likelihood[:, 3]
    assert fusion.posterior(p, fusion.columns([None]))[0] == pytest.approx(silent / silent.sum())
    assert fusion.columns(["c", "nonsense", None]).tolist() == [2, 3, 3]


def test_fusion_confident_small_model_outweighs_large_answer() -> None:
    fusion = fitted()
    assert fusion.fuse(Prediction.from_probabilities({"a": 0.99, "b": 0.005, "c": 0.005}), "b") == "a"
    assert fusion.fuse(Prediction.from_probabilities({"a": 0.4, "b": 0.35, "c": 0.25}), "b") == "b"
    assert fusion.fuse(Prediction.from_probabilities({"b": 0.35, "c": 0.25, "a": 0.4}), None) == "a", (
        "other label order, abstained answer"
    )


def test_fusion_cross_fitted_leaves_each_example_out() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=30)
    large = np.where(rng.random(30) < 0.7, truth, (truth + 1) % 3)
    p = rng.dirichlet(np.ones(3), 30)
    names = lambda rows: [NAMES[i] for i in rows]  # noqa: E731
    fusion = AnswerFusion.fit(NAMES, names(truth), names(large))
    found = fusion.cross_fitted(p, truth, large)
    for i in range(30):
        rest = np.arange(30) != i
        prior = fusion._prior  # the prior is that of the whole data, as documented
        counts = np.zeros((3, 4))
        np.add.at(counts, (truth[rest], large[rest]), 1)
        rows = counts + fusion.strength * prior
        likelihood = rows / rows.sum(axis=1, keepdims=True)
        assert found[i] == (p[i] * likelihood[:, large[i]]).argmax()


def test_value_of_asking_is_never_negative_and_large_if_uncertain() -> None:
    fusion = fitted(0.9)
    value = fusion.value_of_asking(np.array([[0.34, 0.33, 0.33], [0.999, 0.0005, 0.0005]]))
    assert (value >= 0).all()
    assert value[0] > 0.4
    assert value[1] == pytest.approx(0.0, abs=1e-6)
    brute = sum((np.array([0.34, 0.33, 0.33]) * fusion.likelihood[:, a]).max() for a in range(4)) - 0.34
    assert value[0] == pytest.approx(brute)


def test_value_of_information_defers_rows_above_price() -> None:
    policy = ValueOfInformation(fusion=fitted(0.9), price=0.05)
    batch = PredictionBatch.from_arrays(NAMES, [[0.34, 0.33, 0.33], [0.98, 0.01, 0.01]])
    verdict = policy.evaluate(batch)
    assert verdict.keep.tolist() == [False, True]
    assert (verdict.threshold == -0.05).all()
    assert policy.evaluate(batch, np.array([-1.0, np.nan])).keep.tolist() == [True, True]
    with pytest.raises(ConfigurationError, match="not the small model's"):
        policy.check(("x", "y"))
    assert not policy.evaluate(batch.take([0])).keep[0]


def test_fusion_uniform_spreads_errors_evenly() -> None:
    fusion = AnswerFusion.uniform(NAMES, 0.7)
    assert fusion.likelihood[0, 0] == pytest.approx(0.7, abs=1e-3)
    assert fusion.likelihood[0, 1] == pytest.approx(0.3 * 0.99 / 2, abs=1e-3)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        AnswerFusion.uniform(NAMES, 1.0)


def test_fusion_invalid_data_raises() -> None:
    with pytest.raises(DataError, match="Pass one answer for each"):
        AnswerFusion.fit(NAMES, ["a"], [])
    with pytest.raises(DataError, match="outside the label set: z"):
        AnswerFusion.fit(NAMES, ["z"], ["a"])
    with pytest.raises(ConfigurationError, match="counts of shape"):
        AnswerFusion(labels=NAMES, counts=((1.0,),))
    with pytest.raises(ConfigurationError, match="Fit it again"):
        fitted().fuse(Prediction.from_probabilities({"x": 0.5, "y": 0.5}), "x")


# Shunts with fusion


def word_fusion() -> AnswerFusion:
    """Return a fusion over the word model's labels whose large model answers "refund" for 3 of 4 "status" inputs."""
    truth = ["cancel"] * 40 + ["refund"] * 40 + ["status"] * 40
    large = ["cancel"] * 40 + ["refund"] * 40 + ["status", "refund", "refund", "refund"] * 10
    return AnswerFusion.fit(LABELS, truth, large)


def chain(answer: str, **settings: Any) -> ConfidenceRouterChain:
    model = FakeListChatModel(responses=[answer])
    return ConfidenceRouterChain.from_models(
        WordModel(), model, fusion=word_fusion(), policy=AlwaysLarge(), answer_format="text", **settings
    )


def test_shunt_fuses_answer_in_every_sync_call() -> None:
    shunt = chain("refund", return_decision=True)
    result = shunt.invoke("my status please")  # "status" is more probable, and the large model often errs on it
    assert (result.output, result.large_output, result.route) == ("status", "refund", "large")
    assert shunt.batch(["my status please"])[0].output == "status"
    assert [chunk.output for chunk in shunt.stream("my status please")] == ["status"]
    assert [output.output for _, output in shunt.batch_as_completed(["my status please"])] == ["status"]
    assert shunt.invoke("what is this").output == "refund", "a uniform prediction leaves the LLM's answer"


async def test_shunt_fuses_answer_in_every_async_call() -> None:
    shunt = chain("refund")
    assert await shunt.ainvoke("my status please") == "status"
    assert await shunt.abatch(["my status please"]) == ["status"]
    assert [chunk async for chunk in shunt.astream("my status please")] == ["status"]


def test_shunt_unparsable_answer_counts_as_abstained() -> None:
    shunt = chain("no idea at all", max_reasks=0, return_decision=True)
    result = shunt.invoke("my status please")
    assert (result.output, result.large_output, result.decision.error) == ("status", "no idea at all", None)


@pytest.mark.heavy
def test_shunt_records_large_answer_before_fusion(tmp_path: Any) -> None:
    from langchain_datashunt.call_log import CallLog, Recorder

    with Recorder(tmp_path / "calls.db") as recorder:
        assert chain("refund", recorder=recorder).invoke("my status please") == "status"
    with CallLog(tmp_path / "calls.db") as store:
        (call,) = next(store.iterate())
    assert (call.answer_label, call.answer) == ("refund", "refund")


def test_shunt_fusion_with_probabilities_in_prompt_raises() -> None:
    with pytest.raises(ConfigurationError, match="count a second time"):
        chain("refund", pruning=SoftPruning())
    prompt = ChatPromptTemplate.from_template("{input} {candidates} {small_label}")
    with pytest.raises(ConfigurationError, match="small_label"):
        from langchain_datashunt import HardPruning

        ShuntRunnable(
            small=WordModel(), large=prompt | FakeListChatModel(responses=["x"]), fusion=word_fusion(),
            pruning=HardPruning(proficient=("cancel",)),
        )  # fmt: skip
    assert isinstance(chain("refund").pruning, NoPruning), "default with fusion"
    narrowed = ConformalPruning(alpha=0.1, quantile=0.5, n_calibration=100)
    with pytest.raises(ConfigurationError, match=r"probabilities \(candidates\)"):
        chain("refund", pruning=narrowed)


def test_value_of_asking_is_zero_if_no_answer_changes_the_label() -> None:
    fusion = AnswerFusion.uniform(tuple("abcdefghij"), 0.8)
    p = np.full((200, 10), 0.0005)
    p[:, 0] = np.linspace(0.9955, 0.99999, 200)
    p /= p.sum(axis=1, keepdims=True)
    assert (fusion.value_of_asking(p) == 0.0).all()


def test_shunt_fusion_over_other_labels_raises() -> None:
    with pytest.raises(ConfigurationError, match="the 3 labels of WordModel"):
        ShuntRunnable(small=WordModel(), large=lambda _: "cancel", pruning=None, fusion=fitted())


def test_shunt_fusion_of_dict_answer_raises() -> None:
    shunt = ShuntRunnable(
        small=WordModel(), large=lambda _: {"label": "refund"}, pruning=None, fusion=word_fusion(), policy=AlwaysLarge()
    )
    with pytest.raises(ConfigurationError, match="got dict"):
        shunt.invoke("my status please")


# Saved bundles


@pytest.mark.heavy
def test_bundle_save_and_load_keeps_policy_and_fusion(tmp_path: Any) -> None:
    from langchain_datashunt.small_models import BundledSmallModel, TextCNN, TrainingSettings

    texts = [f"please {label} {i}" for label in LABELS for i in range(4)]
    names = [label for label in LABELS for _ in range(4)]
    small = TextCNN.train(texts, names, settings=TrainingSettings(epochs=1, progress=False))
    small.policy = ValueOfInformation(fusion=word_fusion(), price=0.02) & Threshold(0.4)
    small.fusion = word_fusion()
    small.save(tmp_path / "bundle")
    for back in (load_small_model(tmp_path / "bundle"), BundledSmallModel.from_folder(tmp_path / "bundle")):
        assert back.policy == small.policy
        assert back.fusion == small.fusion
        shunt = ShuntRunnable(small=back, large=lambda _: "cancel", pruning=None)
        assert shunt.policy_in_service == small.policy
    config = tmp_path / "bundle" / "config.json"
    config.write_text(config.read_text().replace('"is": "AllOf"', '"is": "Popen"'))
    with pytest.raises(BundleError, match="Unknown class 'Popen'"):
        load_small_model(tmp_path / "bundle")
