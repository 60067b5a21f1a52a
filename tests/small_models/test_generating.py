from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from pydantic import PrivateAttr

from langchain_datashunt import NoPruning, Prediction, ShuntRunnable, SoftPruning, Threshold, TopHint, load_small_model
from langchain_datashunt.calibration import RiskControl, select_threshold
from langchain_datashunt.call_log import CallRecord
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller
from langchain_datashunt.exceptions import ConfigurationError, DataError, PredictionError, TruncationWarning
from langchain_datashunt.policies import (
    Entropy,
    LengthNormalizedProbability,
    Margin,
    MaxProbability,
    MeanTokenProbability,
    MinTokenProbability,
    TokenQuantile,
)
from langchain_datashunt.prediction import ANSWER_LABELS, PredictionBatch
from langchain_datashunt.small_models import TransformersGenerator
from langchain_datashunt.small_models.kinds.generating import Generated, GeneratingModel, split_answers
from tests.benchmarks.reproduction.caption_model import CaptionModel
from tests.benchmarks.reproduction.local_large import LocalLargeModel
from tests.benchmarks.reproduction.scenes import draw_scenes
from tests.support.dying import killed_after
from tests.support.modalities import (
    ScriptedSmall,
    echoes,
    preprocessor,
    quiet,
    squares,
    tiny_gpt2,
    tiny_t5,
    tiny_vision_pair,
    word_level_tokenizer,
)

LOGS = np.log([0.9, 0.5, 0.2])


class Scripted(GeneratingModel):
    """Echo the input, with the numbers in it as token probabilities."""

    model_id: str = "scripted"
    _calls: list[int] = PrivateAttr(default_factory=list)

    def generate(self, inputs: Sequence[str]) -> list[Generated]:
        self._calls.append(len(inputs))
        made = []
        for text in inputs:
            numbers = [float(part) for part in text.split() if part.replace(".", "").isdigit()]
            answer = "" if "empty" in text else f"said {text}"
            with np.errstate(divide="ignore"):
                made.append(Generated(answer, np.log(numbers), "long" in text))
        return made


def test_token_scores_known_log_probabilities_match_formulas() -> None:
    batch = Prediction.from_answer("x", 0.7, token_logprobs=LOGS).as_batch()
    expected = {
        MeanTokenProbability(): (0.9 + 0.5 + 0.2) / 3,
        MinTokenProbability(): 0.2,
        TokenQuantile(alpha=0.0): 0.2,
        TokenQuantile(alpha=0.5): 0.5,
        LengthNormalizedProbability(): (0.9 * 0.5 * 0.2) ** (1 / 3),
        MaxProbability(): 0.7,
    }
    for score, value in expected.items():
        assert score(batch)[0] == pytest.approx(value), score
        assert score.bounds(2)[1] == 1.0
        assert Threshold(0.3, score=score).evaluate(batch).keep[0] == (value >= 0.3)
    with pytest.raises(PredictionError, match="MeanTokenProbability requires token log-probabilities"):
        MeanTokenProbability()(PredictionBatch.from_arrays(("a", "b"), [[0.5, 0.5]]))
    with pytest.raises(ConfigurationError, match="alpha"):
        TokenQuantile(alpha=2.0)


def test_shunt_answer_without_token_probabilities_defers_alone() -> None:
    sure = Prediction.from_answer("a cat", 0.9, token_logprobs=np.log([0.9]))
    batch = PredictionBatch.stack([sure, Prediction.from_answer("a call", 0.9), sure])
    assert MeanTokenProbability()(batch).tolist() == pytest.approx([0.9, 0.0, 0.9])

    class Drafts(ScriptedSmall):
        def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Prediction:
            return Prediction.from_answer(input, 0.9, token_logprobs=None if input == "call" else np.log([0.9]))

    shunt = ShuntRunnable(
        small=Drafts(), large=RunnableLambda(lambda _: "large"), policy=Threshold(0.5, score=MeanTokenProbability()),
        pruning=NoPruning(),
    )  # fmt: skip
    assert shunt.batch(["a", "call", "b"]) == ["a", "large", "b"]


def test_prediction_from_answer_keeps_answer_and_confidence() -> None:
    unsure = Prediction.from_answer("a cat", 0.1, model_id="m", token_logprobs=LOGS)
    assert (unsure.label, unsure.confidence, unsure.answer) == ("answer", 0.1, "a cat")
    batch = PredictionBatch.stack([unsure, Prediction.from_answer("a dog", 0.8, token_logprobs=LOGS[:1])])
    assert batch.confidence.tolist() == pytest.approx([0.1, 0.8])
    assert batch.best.tolist() == [0, 0]
    assert batch.outputs() == ["a cat", "a dog"]
    assert batch.take(np.array([False, True])).outputs() == ["a dog"]
    assert batch[0] == unsure
    assert batch[1:].answers == ("a dog",)
    assert batch[0].to_dict()["answer"] == "a cat"
    for answer, confidence in ((None, 0.5), ("x", 1.5), ("x", float("nan"))):
        with pytest.raises(PredictionError, match="a confidence in"):
            Prediction.from_answer(answer, confidence)
    with pytest.raises(PredictionError, match="Only some predictions"):
        PredictionBatch.stack([unsure, Prediction.from_probabilities({"answer": 0.5, "other": 0.5})])


def test_policies_generated_answers_reject_label_scores() -> None:
    Threshold(0.3).check(ANSWER_LABELS)  # below 1/2 is useless for two labels, but not for generated answers
    for score in (Margin(), Entropy()):
        with pytest.raises(ConfigurationError, match="generates its answers"):
            ShuntRunnable(small=Scripted(), large=str, pruning=None, policy=Threshold(0.3, score=score))
    with pytest.raises(PredictionError, match="requires token log-probabilities"):
        Threshold(0.5, score=MeanTokenProbability()).evaluate(Prediction.from_answer("x", 0.5).as_batch())


def test_generating_model_confidence_is_the_token_score() -> None:
    model = Scripted()
    batch = model.predict_batch(["0.9 0.5", "1.0"])
    assert batch.confidence.tolist() == pytest.approx([0.7, 1.0], abs=1e-5)
    assert batch.outputs() == ["said 0.9 0.5", "said 1.0"]
    one = model.invoke("0.9 0.5")
    assert one.answer == "said 0.9 0.5"
    assert one.token_logprobs is not None
    np.testing.assert_allclose(one.token_logprobs, np.log([0.9, 0.5]))
    least = Scripted(score=MinTokenProbability()).predict("0.9 0.5")
    assert least.confidence == pytest.approx(0.5)
    with pytest.warns(TruncationWarning):
        assert model.predict("long 0.5").truncated


def test_generating_model_empty_answer_fails_alone_and_defers() -> None:
    found = Scripted().batch(["0.9", "empty 0.9", "no numbers"], return_exceptions=True)
    assert found[0].answer == "said 0.9"
    assert all(isinstance(one, PredictionError) and "empty answer" in str(one) for one in found[1:])
    shunt = ShuntRunnable(small=Scripted(), large=lambda _: "large", pruning=NoPruning(), return_decision=True)
    results = shunt.batch(["0.99", "empty 0.99"])
    assert [(one.output, one.reason) for one in results] == [("said 0.99", "confident"), ("large", "small_error")]
    strange = Scripted().batch(["0.9", "0"], return_exceptions=True)
    assert isinstance(strange[0], Prediction)
    assert strange[1].confidence == pytest.approx(0.0, abs=1e-5)


def test_cache_repeated_input_returns_cached_answer() -> None:
    model = Scripted(cache_size=8)
    first = model.predict_batch(["0.9", "0.5 0.7"])
    again = model.batch(["0.5 0.7", "0.9", "empty 0.3"], return_exceptions=True)
    assert model._calls == [2, 1]
    assert [again[0].answer, again[1].answer] == [first.outputs()[1], first.outputs()[0]]
    assert isinstance(again[2], PredictionError)
    assert isinstance(model.batch(["empty 0.3"], return_exceptions=True)[0], PredictionError)
    assert model._calls == [2, 1, 1]  # failures are not cached


def test_fit_confidence_judged_answers_calibrates_confidence() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.3, 0.99, 400)
    right = rng.uniform(size=400) < 1 / (1 + np.exp(-(3 * np.log(scores / (1 - scores)) - 4)))
    inputs = [f"{score:.6f}" for score in scores]
    fitted = Scripted().fit_confidence(inputs, right.tolist())
    assert fitted.slope == pytest.approx(3.0, abs=0.8)
    assert fitted.intercept == pytest.approx(-4.0, abs=1.2)
    p = fitted.predict_batch(inputs).confidence
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        some = (p >= low) & (p < high)
        assert p[some].mean() == pytest.approx(right[some].mean(), abs=0.08)
    for wrong in ([True] * 400, [True], [False] * 400):
        with pytest.raises(DataError, match="one judgement for each input"):
            Scripted().fit_confidence(inputs, wrong)


def test_risk_control_generated_answers_bounds_selective_risk() -> None:
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.5, 1.0, 600)
    right = rng.uniform(size=600) < scores**2
    batch = Scripted().predict_batch([f"{score:.6f}" for score in scores])
    choice = select_threshold(
        batch, ["answer" if one else "other" for one in right], objective=RiskControl(alpha=0.2, confidence=0.95)
    )
    kept = batch.confidence >= choice.threshold
    assert choice.proven
    assert 0.05 < kept.mean() < 0.9
    assert 1 - right[kept].mean() <= 0.2


def test_prompt_pruning_generated_answer_is_in_the_prompt() -> None:
    seen: list[Any] = []
    prompt = ChatPromptTemplate.from_messages([("human", "{input} | {candidate_probabilities} | {small_label}")])
    large = prompt | RunnableLambda(lambda value: seen.append(value.to_string()) or "L") | StrOutputParser()
    shunt = ShuntRunnable(small=ScriptedSmall(), large=large, policy=Threshold(0.9))
    assert shunt.invoke("surely x") == "short: surely x"
    assert shunt.invoke("perhaps") == "L"
    assert "- short: perhaps with probability 0.2 | short: perhaps" in seen[0]
    (told,) = TopHint().prepare(Prediction.from_answer("x", 0.456).as_batch())
    assert (told["small_label"], told["small_confidence"]) == ("x", 0.46)
    (told,) = NoPruning().prepare(Prediction.from_answer("x", 0.456).as_batch(), ANSWER_LABELS)
    assert not told["candidate_probabilities"]
    assert not told["candidates"]
    assert shunt.invoke("fail") == "L"


@pytest.mark.parametrize("score", [MeanTokenProbability(), TokenQuantile(alpha=0.2)])
def test_bundle_generator_restores_score_and_fitted_confidence(tmp_path: Path, score: Any) -> None:
    model = TransformersGenerator(
        model=tiny_gpt2(tmp_path / "gpt"), max_new_tokens=3, score=score, slope=2.0, intercept=-1.0,
        template="say {input} twice ?", stop=("owl",),
    )  # fmt: skip
    model.policy = Threshold(0.4, score=score)
    loaded = load_small_model(model.save(tmp_path / "bundle"))
    assert isinstance(loaded, TransformersGenerator)
    names = ("score", "slope", "intercept", "template", "stop", "max_new_tokens", "form", "policy")
    assert [getattr(loaded, name) for name in names] == [getattr(model, name) for name in names]
    texts = ["cat red", "owl"]
    first, again = (one.batch(texts, return_exceptions=True) for one in (model, loaded))
    assert [str(one) for one in first] == [str(one) for one in again]


# transformers


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5])
def test_generator_trained_reports_the_networks_probabilities(make: Any, tmp_path: Path) -> None:
    questions, answers = echoes()
    base = TransformersGenerator(model=make(tmp_path / "base"), max_new_tokens=5, model_id="tiny")
    before = [str(state) for state in base.weights().values()]
    rate = 1e-2 if make is tiny_gpt2 else 3e-3
    model = base.train(questions, answers, settings=quiet(90, learning_rate=rate, patience=90))
    assert [str(state) for state in base.weights().values()] == before
    batch = model.predict_batch(questions)
    assert np.mean([a == b for a, b in zip(batch.outputs(), answers, strict=True)]) > 0.8
    for text in questions[:3]:  # the recorded probabilities equal those of a forward pass over the answer
        one = model.predict(text)
        ids = model._tokenizer(text, return_tensors="pt")["input_ids"]
        said = model._tokenizer(one.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            if model.form == "causal":
                logits = model._network(torch.cat([ids, said], 1)).logits[0, ids.shape[1] - 1 : -1]
            else:
                started = torch.cat([torch.zeros(1, 1, dtype=torch.long), said[:, :-1]], 1)
                logits = model._network(input_ids=ids, decoder_input_ids=started).logits[0]
        expected = logits.log_softmax(-1).gather(1, said[0][:, None])[:, 0].numpy()
        assert one.token_logprobs is not None
        np.testing.assert_allclose(one.token_logprobs, expected, atol=1e-4)
        assert one.confidence == pytest.approx(np.exp(expected).mean(), abs=1e-4)
    together, alone = batch.token_logprobs, [model.predict(text).token_logprobs for text in questions]
    assert together is not None
    for one, other in zip(together, alone, strict=True):  # padding must not change probabilities
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_generator_stop_text_ends_the_answer(tmp_path: Path) -> None:
    questions, answers = echoes()
    base = TransformersGenerator(model=tiny_gpt2(tmp_path / "base"), max_new_tokens=5)
    model = base.train(questions, answers, settings=quiet(60, learning_rate=1e-2, patience=60))
    whole = model.predict(questions[0])
    assert whole.answer == answers[0] == "cat cat"
    stopped = model.model_copy(update={"stop": (" cat",)}).predict(questions[0])
    assert stopped.answer == "cat"
    assert whole.token_logprobs is not None
    assert stopped.token_logprobs is not None
    assert stopped.token_logprobs.tolist() == pytest.approx(whole.token_logprobs[:1].tolist())
    with pytest.warns(TruncationWarning):
        assert model.predict(" ".join(["cat"] * 50)).truncated


def test_generator_image_to_text_models_train_or_reject_training(tmp_path: Path) -> None:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        BlipConfig,
        BlipForConditionalGeneration,
        set_seed,
    )

    images, labels = squares(40)
    pair = TransformersGenerator(model=tiny_vision_pair(tmp_path / "pair"), max_new_tokens=3)
    assert pair.form == "image"
    learnt = pair.train(images, labels, settings=quiet(40, learning_rate=5e-3, patience=40))
    assert np.mean([a == b for a, b in zip(learnt.predict_batch(images).outputs(), labels, strict=True)]) > 0.8
    loaded = load_small_model(learnt.save(tmp_path / "bundle"))
    assert loaded.predict_batch(images).outputs() == learnt.predict_batch(images).outputs()
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"image_size": 16, "patch_size": 8}
    for name in ("blip", "blip-2"):
        folder = tmp_path / name
        n = word_level_tokenizer(folder, ["cat", "dog", "owl"])
        set_seed(0)
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if name == "blip":
            text |= {"vocab_size": n, "intermediate_size": 64, "sep_token_id": 2, "encoder_hidden_size": 32}
            model = BlipForConditionalGeneration(
                BlipConfig(text_config={**text, "projection_dim": 16}, vision_config={**vision, "projection_dim": 16},
                           projection_dim=16)
            )  # fmt: skip
        else:
            text |= {"model_type": "opt", "vocab_size": n + 1, "ffn_dim": 64, "word_embed_proj_dim": 32}
            former = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
            former |= {"encoder_hidden_size": 32, "vocab_size": n}
            model = Blip2ForConditionalGeneration(
                Blip2Config(vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=2,
                            image_token_index=n)
            )  # fmt: skip
        model.save_pretrained(folder)
        preprocessor(folder)
        captioner = TransformersGenerator(model=str(folder), max_new_tokens=4)
        made = captioner.generate([captioner.reader.read(image) for image in images[:3]])
        assert [len(one.logprobs) <= 4 for one in made] == [True] * 3
        assert all(np.isfinite(one.logprobs).all() for one in made)
        with pytest.raises(ConfigurationError, match="cannot be trained"):
            captioner.train(images, labels)


def test_generator_invalid_settings_raises(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path / "gpt")
    with pytest.raises(ConfigurationError, match=r"to contain \{input\}"):
        TransformersGenerator(model=folder, template="hello")
    with pytest.raises(ConfigurationError, match="no room for a prompt"):
        TransformersGenerator(model=folder, max_new_tokens=40).invoke("cat")
    with pytest.raises(ConfigurationError, match="no chat template"):
        TransformersGenerator(model=folder, chat=True).invoke("cat")
    with pytest.raises(ConfigurationError, match="no weights"):
        TransformersGenerator().invoke("cat")
    with pytest.raises(ConfigurationError, match="4bit"):
        TransformersGenerator(model=folder, quantization="4bit", device="cpu")
    for inputs, answers in ((["a"], ["b"]), (["a", "b"], ["x"]), (["a", "b"], ["x", " "]), (["a", "a"], ["x", "y"])):
        with pytest.raises(DataError):
            split_answers(inputs, answers, quiet(1))


def test_generator_chat_template_is_applied_unless_disabled(tmp_path: Path) -> None:
    model = TransformersGenerator(model=tiny_gpt2(tmp_path / "gpt"), max_new_tokens=2)
    model._tokenizer.chat_template = "{% for m in messages %}say {{ m.content }} {% endfor %}twice ?"
    assert model._prompt("cat") == "say cat twice ?"
    assert model.model_copy(update={"chat": False})._prompt("cat") == "cat"


# Caption model


@pytest.fixture(scope="module")
def captioner() -> CaptionModel:
    scenes = draw_scenes(200, seed=1)
    captions = [[f"a {scene.first.colour} {scene.first.shape}", f"the {scene.first.colour} one"] for scene in scenes]
    return CaptionModel.train(
        [scene.pixels for scene in scenes], captions, settings=quiet(20, learning_rate=5e-3, patience=20),
        size=(24, 24), depth=8, width=8, embedding_size=32, hidden_size=48, dropout=0.0, max_words=8,
    )  # fmt: skip


def test_caption_model_trained_names_the_colours(captioner: CaptionModel, tmp_path: Path) -> None:
    scenes = draw_scenes(60, seed=2)
    images = [scene.pixels for scene in scenes]
    batch = captioner.predict_batch(images)
    colours = np.array([scene.first.colour in str(said) for said, scene in zip(batch.outputs(), scenes, strict=True)])
    assert colours.mean() > 0.6
    assert all(
        len(logs) == len(str(said).split())
        for said, logs in zip(batch.outputs(), batch.token_logprobs or (), strict=True)
    )
    assert batch.confidence.tolist() == pytest.approx(
        [np.exp(logs).mean() for logs in batch.token_logprobs or ()], abs=1e-4
    )
    loaded = load_small_model(captioner.save(tmp_path / "bundle"))
    np.testing.assert_allclose(loaded.predict_batch(images).confidence, batch.confidence, atol=1e-6)
    assert loaded.predict_batch(images).outputs() == batch.outputs()


def test_caption_model_beam_search_is_at_least_as_likely_as_greedy(captioner: CaptionModel) -> None:
    images = [scene.pixels for scene in draw_scenes(40, seed=5)]
    greedy = captioner.predict_batch(images)
    beams = captioner.model_copy(update={"beams": 4}).predict_batch(images)
    one = captioner.model_copy(update={"beams": 1}).predict_batch(images)
    assert one.outputs() == greedy.outputs()

    def likely(batch: PredictionBatch) -> Any:
        return np.array([logs.mean() for logs in batch.token_logprobs or ()])

    assert likely(beams).mean() >= likely(greedy).mean() - 1e-6
    picture = captioner.reader.read(images[0])
    with torch.inference_mode():
        tensor = captioner._tensor([captioner._pixels(picture)])
        ids, logs = captioner._network.beam(tensor, 8, 1)
        ids_greedy, logs_greedy = captioner._network.greedy(tensor, 8)
    assert ids.tolist() == ids_greedy.tolist()
    torch.testing.assert_close(logs, logs_greedy)


def test_image_encoder_resnet_101_has_100_convolutions(tmp_path: Path) -> None:
    from tests.benchmarks.reproduction.caption_model import RESNET_101
    from tests.benchmarks.reproduction.caption_modules import Eye

    eye = Eye({"kind": "resnet", "config": RESNET_101})
    assert eye.size == 2048
    convolutions = [m for n, m in eye.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(convolutions) == 100  # the classification layer, which is not used here, is the 101st
    with torch.inference_mode():
        assert eye(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 2048)


def test_caption_model_pretrained_image_encoder_is_restored_from_bundle(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic")
    begun = ResNetModel(config)
    begun.save_pretrained(tmp_path / "eye")
    preprocessor(tmp_path / "eye", 32)
    scenes = draw_scenes(12)
    images, captions = [scene.pixels for scene in scenes], [scene.captions()[0] for scene in scenes]
    model = CaptionModel.train(images, captions, base=str(tmp_path / "eye"), settings=quiet(1), hidden_size=16)
    assert model.eye["kind"] == "resnet"
    again = load_small_model(model.save(tmp_path / "bundle"))
    assert again.predict_batch(images).outputs() == model.predict_batch(images).outputs()


def test_caption_model_invalid_training_data_raises() -> None:
    images = [scene.pixels for scene in draw_scenes(3)]
    with pytest.raises(DataError, match="3 images and 2 captions"):
        CaptionModel.train(images, ["a", "b"])
    with pytest.raises(DataError, match="Image 1 cannot be used"):
        CaptionModel.train([images[0], b"x"], ["a", "b"])
    with pytest.raises(DataError, match="Expected captioned images"):
        CaptionModel.train([], [])
    with pytest.raises(ConfigurationError, match="vocabulary"):
        CaptionModel()
    with pytest.raises(ConfigurationError, match="6 n"):
        CaptionModel.train(images, ["a", "b", "c"], depth=7)


# Distillation (2CD)


def call(text: str, said: str | None, **more: Any) -> CallRecord:
    given = {"large_model": "gpt", "answer_label": said, "answer": said} if said is not None else {}
    return CallRecord(input=text, labels=ANSWER_LABELS, **{**given, **more})


def test_distillation_generated_answers_are_sorted_into_stages() -> None:
    learnt: list[Any] = []

    class Learning(Scripted):
        def learn_answers(self, stages: Any, held_out: Any, settings: Any) -> Any:
            learnt.extend([stages, held_out])
            return self.model_copy()

    records = [call(f"{i / 100:.2f}", "large said") for i in range(30, 60)]
    records += [call(f"0.9{i}", None, route="small", reason="confident") for i in range(10)]
    records += [call("0.31", "not sure", large_confidence=0.1), call("0.32", " "), call("0.33", None)]
    records += [call("0.34", "wrong", gold="right", gold_source="user"), call("empty 0.99", "taught")]
    distilled = TwoStageDistiller(DistillationSettings(threshold=0.8)).distill(
        Learning(), records, labelled=(["x"], ["y"])
    )
    report = distilled.report
    assert (report.stage_a, report.stage_b, report.gold, report.unparsable) == (31, 10, 2, 1)
    assert report.unsure == 2
    stages, held_out = learnt
    everything = {(a, b) for part in (*stages, held_out) for a, b in zip(part.texts, part.answers, strict=True)}
    assert ("0.34", "right") in everything
    assert ("x", "y") in everything
    assert ("empty 0.99", "taught") in everything
    assert ("0.95", "said 0.95") in everything
    assert len(held_out) >= 3
    with pytest.raises(DataError, match="Expected at least 20 training pairs"):
        TwoStageDistiller().distill(Learning(), records[:5])
    with pytest.raises(ConfigurationError, match="cannot be trained on answers"):
        TwoStageDistiller(DistillationSettings(threshold=0.8)).distill(Scripted(), records)


def test_distillation_killed_resumes_identically_with_a_longer_log(tmp_path: Path) -> None:
    small = TransformersGenerator(model=tiny_gpt2(tmp_path / "tiny"), max_new_tokens=4)
    records = [call(f"{text} {i}", answer) for i, (text, answer) in enumerate(zip(*echoes(), strict=True))][:40]

    def distill(calls: list[CallRecord], checkpoint: Path | None) -> Any:
        settings = quiet(3, batch_size=8, checkpoint=checkpoint, checkpoint_every=2)
        return TwoStageDistiller(DistillationSettings(threshold=0.99, training=settings)).distill(small, calls)

    wanted, folder = distill(records, None), tmp_path / "checkpoint"
    with killed_after(5):
        distill(records, folder)
    resumed = distill([*records, *(call(f"new {i}", "new") for i in range(20))], folder)
    mine, theirs = wanted.model.weights(), resumed.model.weights()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert vars(wanted.report) == vars(resumed.report)
    assert not list(folder.iterdir())


# Local large model


def test_local_large_model_uses_candidates_and_probabilities() -> None:
    from tests.support.models import WordModel

    large = LocalLargeModel(model=WordModel())
    assert large.invoke("surely refund") == "refund"
    told = SoftPruning(top_k=None).prepare(
        PredictionBatch.from_arrays(("cancel", "refund", "status"), [[0.98, 0.01, 0.01]])
    )[0]
    asked = {"input": "refund", **told}
    assert large.invoke(asked) == "cancel"
    assert LocalLargeModel(model=WordModel(), opinion="ignore").invoke(asked) == "refund"
    narrow = {"input": "surely refund", "candidates": ("cancel", "status")}
    assert large.invoke(narrow) in ("cancel", "status")
    found = large.batch([{"input": "surely refund", "candidates": ("x",)}, asked, {"input": 3}], return_exceptions=True)
    assert "None of the candidates x" in str(found[0])
    assert found[1] == "cancel"
    assert isinstance(found[2], Exception)
    assert LocalLargeModel(model=Scripted()).invoke({"input": "0.9"}) == "said 0.9"


async def test_local_large_model_async_calls_return_answers() -> None:
    from tests.support.models import WordModel

    large = LocalLargeModel(model=WordModel())
    assert await large.ainvoke("surely refund") == "refund"
    assert await large.abatch(["surely refund", "surely cancel"]) == ["refund", "cancel"]


def test_image_text_model_uses_candidates_and_probabilities(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, set_seed

    from langchain_datashunt.exceptions import InputError
    from tests.benchmarks.reproduction.image_text import ImageTextModel

    folder = tmp_path / "clip"
    words = ["This", "is", "a", "photo", "of", "red", "blue", "with", "probability", ".", "0", "1", "9"]
    n = word_level_tokenizer(folder, words)
    set_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = {"projection_dim": 16}
    vision = {**text, "image_size": 16, "patch_size": 8}
    ids = {"vocab_size": n, "max_position_embeddings": 24, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    CLIPModel(
        CLIPConfig(text_config={**text, **ids, **both}, vision_config={**vision, **both}, **both)
    ).save_pretrained(folder)
    preprocessor(folder)
    model = ImageTextModel(model=str(folder), labels=("red", "blue"))
    images, _ = squares(4)
    plain = model.predict(images[0])
    assert plain.label in ("red", "blue")
    assert model.invoke({"input": images[0], "candidates": ("blue",)}) == "blue"
    told = model.predict({"input": images[0], "candidate_probabilities": {"red": 0.9, "blue": 0.1}})
    assert told.probabilities.tolist() != plain.probabilities.tolist()
    assert model._prompt("red", 0.9) == "This is a photo of a red with probability 0.9."
    found = model.batch([images[0], "no image", {"input": images[1], "candidates": ("green",)}], return_exceptions=True)
    assert found[0] == plain.label
    assert isinstance(found[1], InputError)
    assert isinstance(found[2], ConfigurationError)
    with pytest.raises(ConfigurationError, match=r"\{label\} in `template`"):
        ImageTextModel(model=str(folder), labels=("red",), template="x")
    assert json.loads(json.dumps(plain.to_dict()))["label"] == plain.label


def test_generator_empty_text_in_a_batch_matches_single_generation(tmp_path: Path) -> None:
    model = TransformersGenerator(model=tiny_gpt2(tmp_path / "gpt"), max_new_tokens=3)
    texts = ["cat red", "", "dog"]
    together = model.generate(texts)
    alone = [model.generate([text])[0] for text in texts]
    assert [one.answer for one in together] == [one.answer for one in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_generator_published_generation_config_keeps_confidence(tmp_path: Path) -> None:
    questions, answers = echoes()
    base = TransformersGenerator(model=tiny_gpt2(tmp_path / "base"), max_new_tokens=5)
    model = base.train(questions, answers, settings=quiet(60, learning_rate=1e-2, patience=60))
    plain = model.predict(questions[0])
    published = {
        "do_sample": True, "temperature": 0.3, "num_beams": 3, "repetition_penalty": 1.3,
        "return_dict_in_generate": True, "prompt_lookup_num_tokens": 2, "no_repeat_ngram_size": 1,
    }  # fmt: skip
    for name, value in published.items():
        folder = tmp_path / name
        model._network.save_pretrained(folder)
        model._tokenizer.save_pretrained(folder)
        told = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**told, name: value}))
        again = TransformersGenerator(model=str(folder), max_new_tokens=5).predict(questions[0])
        assert (again.answer, again.confidence) == (plain.answer, pytest.approx(plain.confidence, abs=1e-6)), name


def test_load_tokenizer_with_custom_code_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_datashunt.small_models.bundles.bundle import FileStamp, read_info

    model = TransformersGenerator(model=tiny_gpt2(tmp_path / "gpt"), max_new_tokens=3)
    folder = model.save(tmp_path / "bundle")
    told = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(told.read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings["tokenizer_class"] = "Evil"
    told.write_text(json.dumps(settings))
    marker = tmp_path / "ran"
    (folder / "tokenizer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    info = read_info(folder)
    import hashlib

    stamps = {
        path.relative_to(folder).as_posix(): FileStamp(
            size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.json"
    }
    (folder / "config.json").write_text(info.model_copy(update={"files": stamps}).model_dump_json())
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    loaded = load_small_model(folder)
    assert isinstance(loaded, TransformersGenerator)
    assert loaded.predict("cat").answer == model.predict("cat").answer
    assert not marker.exists()


def test_distillation_unreadable_records_are_counted_and_skipped(captioner: CaptionModel) -> None:
    scenes = draw_scenes(30, seed=9)
    records = [
        call(captioner.reader.write(scene.pixels), f"a {scene.first.colour} {scene.first.shape}") for scene in scenes
    ]
    records.append(call('"/tmp/gone.png"', "a cat"))
    settings = DistillationSettings(threshold=1.0, training=quiet(1))
    report = TwoStageDistiller(settings).distill(captioner, records).report
    assert (report.records, report.unreadable, report.stage_a) == (30, 1, 30)
