from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import HumanMessage

from langchain_datashunt import (
    EmbeddingClassifier,
    PredictProbaClassifier,
    SmallModel,
    TransformersClassifier,
    load_small_model,
)
from langchain_datashunt.exceptions import (
    BundleError,
    BundleMismatchError,
    BundleTooNewError,
    BundleTruncatedError,
    ConfigurationError,
    DataError,
    InputError,
    PredictionError,
    TruncationWarning,
)
from langchain_datashunt.small_models import (
    BundledSmallModel,
    ContrastiveClassifier,
    EnsembleClassifier,
    LSTMClassifier,
    NeighbourClassifier,
    Scores,
    SentenceEncoder,
    TextCNN,
    TrainingSettings,
    small_model_class,
)
from langchain_datashunt.small_models.bundles import loading as loading_module
from langchain_datashunt.small_models.bundles.bundle import FORMAT, WEIGHTS_FILE
from langchain_datashunt.small_models.engine.tokenization import TextTokenizer
from langchain_datashunt.small_models.kinds.contrastive import contrastive_loss
from langchain_datashunt.small_models.kinds.encoder import shared_encoder
from langchain_datashunt.small_models.scores import softmax
from langchain_datashunt.small_models.training.training import (
    Examples,
    TrainingReport,
    first_copies,
    one_hot,
    seen_in_training,
    soft_cross_entropy,
    split_examples,
    stratified_folds,
)
from tests.support.handlers import RunBook
from tests.support.models import LetterEmbeddings, WordModel

QUIET = TrainingSettings(progress=False)
SHORT = TrainingSettings(progress=False, epochs=2)


def tiny_transformer(folder: Path) -> str:
    """Save a two-layer BERT with random weights, MiniLM's vocabulary and three labels; return its folder."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    from langchain_datashunt.small_models.kinds.encoder import bundled_encoder_path

    set_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
        vocab_size=30522, id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_encoder_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def _few_pairs() -> Iterator[None]:
    """Pair each text only once per epoch in contrastive training, to keep the tests fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("langchain_datashunt.small_models.kinds.contrastive.PAIRS_AN_EPOCH", 1)
        yield


@pytest.fixture(scope="module")
def trained(shop_messages: Any, tmp_path_factory: Any) -> dict[str, SmallModel]:
    """Train one model of every kind."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = shop_messages
    base = tiny_transformer(tmp_path_factory.mktemp("tiny"))
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression(C=20))
    return {
        "embedding": EmbeddingClassifier.train(texts, labels, settings=QUIET),
        "textcnn": TextCNN.train(texts, labels, settings=QUIET),
        "lstm": LSTMClassifier.train(texts, labels, settings=SHORT),
        "transformers": TransformersClassifier.train(texts, labels, settings=SHORT, base=base),
        "predict_proba": PredictProbaClassifier.train(texts, labels, estimator=pipeline, settings=QUIET),
        "neighbours": NeighbourClassifier.train(texts, labels, settings=QUIET),
        "ensemble": EnsembleClassifier.train(
            texts, labels, kinds=("neighbours", "textcnn"), settings=TrainingSettings(epochs=4, progress=False)
        ),
        "contrastive": ContrastiveClassifier.train(texts, labels, settings=SHORT, base=base),
    }


KINDS = ["embedding", "textcnn", "lstm", "transformers", "predict_proba", "neighbours", "ensemble", "contrastive"]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_batch_every_kind_returns_distributions(kind: str, trained: Any, shop_messages: Any) -> None:
    model, (texts, labels) = trained[kind], shop_messages
    batch = model.predict_batch(texts)
    assert batch.sound.all()
    assert batch.labels == tuple(sorted(set(labels)))
    assert np.allclose(batch.probabilities.sum(axis=1), 1.0)
    single = model.invoke(texts[3])
    assert single.label == batch[3].label
    assert np.allclose(single.probabilities, batch.probabilities[3], atol=1e-5)


@pytest.mark.parametrize(("kind", "least"), [("embedding", 0.9), ("textcnn", 0.9), ("predict_proba", 0.9)])
def test_train_separable_labels_fits_training_texts(kind: str, least: float, trained: Any, shop_messages: Any) -> None:
    texts, labels = shop_messages
    found = trained[kind].predict_batch(texts).label_names()
    assert np.mean([a == b for a, b in zip(found, labels, strict=True)]) >= least


@pytest.mark.parametrize("kind", KINDS)
def test_bundle_saved_and_loaded_predicts_identically(
    kind: str, trained: Any, shop_messages: Any, tmp_path: Path
) -> None:
    model, (texts, _) = trained[kind], shop_messages
    saved = model.model_copy(update={"threshold": 0.77, "lineage": {**model.lineage, "note": "mine"}})
    folder = saved.save(tmp_path / "bundle")
    again = load_small_model(folder)
    assert type(again) is type(model)
    assert np.array_equal(again.predict_batch(texts).probabilities, model.predict_batch(texts).probabilities)
    assert (again.threshold, again.lineage["note"], again.model_id) == (0.77, "mine", model.model_id)
    assert type(model).load(folder).labels == model.labels
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".skops"}, "a bundle must not contain pickles"


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_every_kind_predicts_identically(kind: str, trained: Any, shop_messages: Any) -> None:
    model, (texts, _) = trained[kind], shop_messages
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_batch(texts[:5]).probabilities, model.predict_batch(texts[:5]).probabilities)


@pytest.mark.parametrize("kind", ["textcnn", "lstm", "transformers"])
def test_predict_batch_mixed_lengths_matches_single_predictions(kind: str, trained: Any, shop_messages: Any) -> None:
    model, (texts, _) = trained[kind], shop_messages
    mixed = ["short", texts[0] + " " + texts[1] + " " + texts[2], "a b", texts[4]]
    together = model.predict_batch(mixed).probabilities
    alone = np.concatenate([model.predict_batch([text]).probabilities for text in mixed])
    assert np.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "textcnn", "lstm", "transformers", "neighbours", "contrastive"])
def test_train_same_seed_reproduces_predictions(kind: str, shop_messages: Any, tmp_path: Path) -> None:
    texts, labels = shop_messages
    more = {"base": tiny_transformer(tmp_path)} if kind in ("transformers", "contrastive") else {}
    cls: Any = small_model_class(kind)
    one, two = (cls.train(texts[:60], labels[:60], settings=SHORT, **more) for _ in range(2))
    assert np.array_equal(one.predict_batch(texts).probabilities, two.predict_batch(texts).probabilities)
    other = cls.train(texts[:60], labels[:60], settings=TrainingSettings(seed=1, epochs=2, progress=False), **more)
    assert other.lineage["training"]["seed"] == 1


def test_early_stopping_patience_exhausted_keeps_best_weights(shop_messages: Any) -> None:
    texts, labels = shop_messages
    settings = TrainingSettings(progress=False, epochs=60, patience=3)
    model = TextCNN.train(texts[:100], labels[:100], settings=settings, validation=(texts[100:], labels[100:]))
    lineage = model.lineage
    assert lineage["steps"] < 60
    assert lineage["steps"] - lineage["best_step"] == 3
    uncalibrated = model.model_copy(update={"temperature": 1.0}).predict_batch(texts[100:])
    truth = [model.labels.index(label) for label in labels[100:]]
    nll = -np.log(uncalibrated.probabilities[np.arange(len(truth)), truth]).mean()
    assert nll == pytest.approx(lineage["validation_nll"], abs=1e-4)


def test_lineage_after_training_records_counts_seed_and_hashes(trained: Any, shop_messages: Any) -> None:
    lineage = trained["embedding"].lineage
    assert lineage["examples"] + lineage["validation_examples"] == len(shop_messages[0])
    assert lineage["training"]["seed"] == 0
    assert len(lineage["training_text_hashes"]) == len(set(shop_messages[0]))
    assert not any(text in json.dumps(lineage) for text in shop_messages[0]), "the lineage stores hashes, not texts"


# Inputs and the Runnable interface


def test_invoke_text_document_messages_or_mapping_reads_text() -> None:
    model = WordModel()
    for value in ("refund", Document(page_content="refund"), [HumanMessage("refund")], {"input": "refund"}):
        assert model.invoke(value).label == "refund"
    assert WordModel(input_key="q").invoke({"q": "refund"}).label == "refund"
    with pytest.raises(InputError, match="no key 'input'"):
        model.invoke({"text": "refund"})


async def test_runnable_sync_and_async_calls_report_runs() -> None:
    model, book = WordModel(), RunBook()
    config: Any = {"callbacks": [book]}
    assert (await model.ainvoke("refund", config)).label == "refund"
    assert [p.label for p in model.batch(["refund", "status"], config)] == ["refund", "status"]
    assert [p.label for p in await model.abatch(["refund", "status"], config)] == ["refund", "status"]
    mixed = model.batch(["refund", 3, "nan"], config, return_exceptions=True)
    assert mixed[0].label == "refund"
    assert isinstance(mixed[1], InputError)
    assert isinstance(mixed[2], PredictionError)
    with pytest.raises(InputError):
        await model.abatch(["refund", 3], config)
    book.assert_balanced()
    assert model.OutputType.__name__ == "Prediction"
    assert "string" in str(model.get_input_jsonschema())


def test_predict_batch_wrong_score_shape_raises() -> None:
    class Wrong(WordModel):
        def predict_scores(self, texts: Any) -> Scores:
            return Scores(np.zeros((len(texts), 2)))

    with pytest.raises(PredictionError, match=r"shape \[1, 3\] .*, got \[1, 2\]"):
        Wrong().predict_batch(["x"])


def test_temperature_changed_scales_confidence_and_keeps_label() -> None:
    sharp = WordModel(temperature=0.5).invoke("refund")
    flat = WordModel(temperature=5.0).invoke("refund")
    assert sharp.label == flat.label
    assert sharp.confidence > WordModel().invoke("refund").confidence > flat.confidence
    with pytest.raises(ConfigurationError, match="temperature"):
        WordModel(temperature=0.0)


# Truncation


@pytest.mark.parametrize("kind", ["embedding", "transformers", "textcnn"])
def test_predict_long_text_warns_and_marks_truncated(kind: str, trained: Any) -> None:
    long = "my parcel " * 400
    with pytest.warns(TruncationWarning, match="1 of 2 inputs were truncated"):
        batch = trained[kind].predict_batch([long, "short"])
    assert batch.truncated is not None
    assert batch.truncated.tolist() == [True, False]
    assert batch[0].truncated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trained[kind].invoke("short").truncated


# Kinds


def test_transformers_pretrained_model_uses_its_own_labels(tmp_path: Path) -> None:
    path = tiny_transformer(tmp_path)
    model = TransformersClassifier(model=path)
    assert model.labels == ("no", "yes", "maybe")
    assert model.model_id == tmp_path.name
    renamed = TransformersClassifier(model=path, labels=("n", "y", "m"), batch_size=2, max_length=16)
    batch = renamed.predict_batch(["one", "two", "three"])
    assert np.allclose(batch.probabilities, model.predict_batch(["one", "two", "three"]).probabilities, atol=1e-6)
    with pytest.raises(ConfigurationError, match=r"got 2 labels for 3 outputs \(no, yes, maybe\)"):
        TransformersClassifier(model=path, labels=("a", "b"))
    with pytest.raises(ConfigurationError, match="no weights"):
        TransformersClassifier(labels=("a", "b")).predict_batch(["x"])


def test_transformers_mixed_lengths_matches_library_probabilities(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = tiny_transformer(tmp_path)
    texts = ["hello there", "a rather longer text than the other one, with commas", "x"]
    network = AutoModelForSequenceClassification.from_pretrained(path).eval()
    encoded = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = network(**encoded).logits.softmax(-1).numpy()
    found = TransformersClassifier(model=path).predict_batch(texts).probabilities
    assert np.abs(found - expected).max() < 1e-5


def test_transformers_unknown_dtype_or_device_raises(tmp_path: Path) -> None:
    path = tiny_transformer(tmp_path)
    plain = TransformersClassifier(model=path).predict_batch(["hello"]).probabilities
    coarse = TransformersClassifier(model=path, dtype="bfloat16", device="cpu").predict_batch(["hello"]).probabilities
    assert 0 < np.abs(plain - coarse).max() < 0.05
    with pytest.raises(ConfigurationError, match="Unknown dtype"):
        TransformersClassifier(model=path, dtype="int8")
    with pytest.raises(ConfigurationError, match="Expected a torch device"):
        TransformersClassifier(model=path, device="abacus")
    with pytest.raises(ConfigurationError, match="not available on this machine. Use one of: cpu"):
        TransformersClassifier(model=path, device="mps")


def test_sentence_encoder_similar_texts_have_close_unit_vectors() -> None:
    encoder = SentenceEncoder(batch_size=2)
    vectors = np.array(encoder.embed_documents(["my card was stolen", "someone took my card", "nice weather today"]))
    assert vectors.shape == (3, encoder.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert np.allclose(encoder.embed_query("my card was stolen"), vectors[0], atol=1e-5)


def test_embedding_classifier_custom_encoder_is_required_at_load(shop_messages: Any, tmp_path: Path) -> None:
    texts, labels = shop_messages
    model = EmbeddingClassifier.train(texts, labels, embeddings=LetterEmbeddings(), settings=QUIET)
    folder = model.save(tmp_path / "letters")
    with pytest.raises(ConfigurationError, match="LetterEmbeddings, which a bundle cannot store"):
        load_small_model(folder)
    again = load_small_model(folder, embeddings=LetterEmbeddings())
    assert np.array_equal(again.predict_batch(texts).probabilities, model.predict_batch(texts).probabilities)
    with pytest.raises(BundleMismatchError, match="embeds a known sentence differently"):
        load_small_model(folder, embeddings=LetterEmbeddings(shift=3))
    with pytest.raises(BundleMismatchError, match="384 dimensions instead of 26"):
        load_small_model(folder, embeddings=SentenceEncoder())


def test_embedding_classifier_mismatched_parts_raises() -> None:
    good: dict[str, Any] = {
        "labels": ("a", "b"), "embeddings": LetterEmbeddings(), "head": np.zeros((26, 2)), "bias": np.zeros(2),
    }  # fmt: skip
    assert EmbeddingClassifier(**good).invoke("x").confidence == 0.5
    with pytest.raises(ConfigurationError, match=r"Expected `head` of shape \[d, 2\]"):
        EmbeddingClassifier(**{**good, "head": np.zeros((26, 3))})
    with pytest.raises(ConfigurationError, match="Expected a LangChain Embeddings"):
        EmbeddingClassifier(**{**good, "embeddings": str})
    with pytest.raises(ConfigurationError, match="10 dimensions for '', got 26"):
        EmbeddingClassifier(**{**good, "head": np.zeros((10, 2))}).invoke("x")

    class Broken(LetterEmbeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[1.0]]

    with pytest.raises(ConfigurationError, match=r"shape \[1, 1\] for 2 texts"):
        EmbeddingClassifier(**{**good, "embeddings": Broken()}).predict_batch(["x", "y"])


def test_embedding_classifier_large_training_set_uses_one_split(shop_messages: Any, monkeypatch: Any) -> None:
    from langchain_datashunt.small_models.kinds import embedding

    monkeypatch.setattr(embedding, "CROSS_VALIDATE_UP_TO", 50)
    texts, labels = shop_messages
    assert EmbeddingClassifier.train(texts, labels, settings=QUIET).lineage["folds"] == 1
    given = EmbeddingClassifier.train(texts[:90], labels[:90], validation=(texts[90:], labels[90:]), settings=QUIET)
    assert (given.lineage["folds"], given.lineage["validation_given"]) == (1, True)


class Unlike(Embeddings):
    """Embed each text as a random vector, so that a model can only memorise its training texts."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        seeds = [int(hashlib.sha256(text.strip().lower().encode()).hexdigest()[:8], 16) for text in texts]
        return [np.random.default_rng(seed).normal(size=64).tolist() for seed in seeds]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.mark.parametrize("cls", [EmbeddingClassifier, NeighbourClassifier, EnsembleClassifier])
def test_train_duplicated_random_labels_stays_unconfident(cls: Any) -> None:
    """Random labels can be predicted only if a copy of a held-out text leaks into training."""
    lot = np.random.default_rng(0).integers(0, 2, 150)
    texts, labels = [f"text {i}" for i in range(150)], [("heads", "tails")[i] for i in lot]
    copied, more = [*texts, *(f" {text.upper()}" for text in texts)], [*labels, *labels]
    model = cls.train(copied, more, embeddings=Unlike(), settings=QUIET)
    assert model.lineage["validation_nll"] > 0.65, "random guessing has 0.69"
    assert model.predict_batch([f"new {i}" for i in range(200)]).confidence.mean() < 0.65


def test_split_duplicated_texts_keeps_every_label_in_training() -> None:
    """A label's only text may also occur under another label, and one text may be most of the data."""
    texts, truth = ["x", "y", "z", "x", "p", "q"], np.array([0, 0, 0, 1, 2, 2])
    many, one = ["again"] * 1000 + list("abcdefgh"), np.array([0] * 1004 + [1] * 4)
    for seed in range(20):
        chosen = TrainingSettings(progress=False, seed=seed)
        names = np.array(["A", "B", "C"])[truth].tolist()
        split = split_examples(texts, names, validation=None, settings=chosen)
        assert set(split.train.targets.argmax(axis=1)) == {0, 1, 2}
        for fold in stratified_folds(truth, first_copies(texts), 5, seed):
            assert set(np.delete(truth, fold)) == {0, 1, 2}
        split = split_examples(many, [str(label) for label in one], validation=None, settings=chosen)
        assert len(split.validation) < 10 < 1000 < len(split.train)


@pytest.mark.parametrize("texts", [["x"] * 60, ["x"] * 30 + ["y"] * 30, [f"text {i}" for i in range(60)]])
def test_fit_soft_targets_repeated_texts_gives_finite_head(texts: list[str]) -> None:
    small = EmbeddingClassifier(
        labels=("a", "b"), embeddings=LetterEmbeddings(), head=np.zeros((26, 2)), bias=np.zeros(2)
    )
    examples = Examples(texts, one_hot(["a", "b"] * 30, ("a", "b")))
    learnt = small.fit_soft_targets(
        [examples.take(np.arange(40))], examples.take(np.arange(40, 60)), QUIET, soft_cross_entropy
    )
    assert np.isfinite(learnt.head).all()
    assert 0 < learnt.temperature < np.inf


def test_stratified_folds_duplicates_stay_in_one_fold() -> None:
    texts = ["a", "b", "c", "A ", "d", "e", "only", "only", "d", "f"]
    truth, first = np.array([0, 0, 0, 0, 1, 1, 2, 2, 0, 1]), first_copies(texts)
    assert first.tolist() == [0, 1, 2, 0, 4, 5, 6, 6, 4, 9]
    folds = stratified_folds(truth, first, 5, seed=1)
    assert all(len(fold) for fold in folds)
    held = np.concatenate(folds)
    assert sorted(held) == [0, 1, 2, 3, 4, 5, 8, 9], "a label's only text must not be held out"
    for copies in ([0, 3], [4, 8]):
        assert sum(set(copies) <= set(fold.tolist()) for fold in folds) == 1
    alone = stratified_folds(np.array([0, 0, 1, 1]), first_copies(["x", "x", "y", "y"]), 5, seed=1)
    assert [len(fold) for fold in alone] == [2, 2], "copies are split if each label has only one text"


class Coin:
    """An estimator outside scikit-learn with `predict_proba`."""

    classes_ = np.array(["heads", "tails"])

    def predict_proba(self, texts: list[str]) -> Any:
        return np.array([[0.7, 0.3]] * len(texts))


def test_predict_proba_label_without_example_is_never_predicted(tmp_path: Path) -> None:
    """The model keeps the full label set, so that it can be compared and pooled with other models of the task."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [f"{text} {i}" for i in range(30) for text in ("money back", "stop my order")]
    model = PredictProbaClassifier.train(
        texts, ["refund", "cancel"] * 30, label_set=["refund", "status", "cancel"],
        estimator=make_pipeline(TfidfVectorizer(), LogisticRegression()), settings=QUIET,
    )  # fmt: skip
    assert model.labels == ("refund", "status", "cancel")
    again = load_small_model(model.save(tmp_path / "bundle"))
    for one in (model, again):
        batch = one.predict_batch(["money back", "stop my order"])
        assert batch.label_names() == ["refund", "cancel"]
        assert (batch.probabilities[:, 1] < 1e-6).all()
    known = PredictProbaClassifier(estimator=model.estimator)
    assert known.labels == ("cancel", "refund")
    known.temperature = model.temperature
    assert np.allclose(known.predict_batch(["money back"]).probabilities[0, ::-1], batch.probabilities[0, [0, 2]])


def test_predict_proba_estimator_is_wrapped_or_rejected(tmp_path: Path) -> None:
    model = PredictProbaClassifier(estimator=Coin())
    assert model.invoke("x").probabilities.tolist() == pytest.approx([0.7, 0.3])
    assert (model.labels, model.model_id) == (("heads", "tails"), "Coin")
    assert PredictProbaClassifier(estimator=Coin(), labels=("h", "t")).invoke("x").label == "h"
    with pytest.raises(BundleError, match="Coin"):
        model.save(tmp_path / "coin")
    assert not (tmp_path / "coin").exists()
    with pytest.raises(ConfigurationError, match="no predict_proba"):
        PredictProbaClassifier(estimator=object())
    with pytest.raises(ConfigurationError, match="got 3 labels for an estimator with 2"):
        PredictProbaClassifier(estimator=Coin(), labels=("a", "b", "c"))
    turned = PredictProbaClassifier(estimator=Coin(), labels=("tails", "edge", "heads")).invoke("x")
    assert (turned.label, turned.probabilities.tolist()) == ("heads", pytest.approx([0.3, 0.0, 0.7], abs=1e-9))
    unfitted = type("Unfitted", (), {"predict_proba": lambda self, texts: None})()
    with pytest.raises(ConfigurationError, match="no `classes_`"):
        PredictProbaClassifier(estimator=unfitted)
    negative = type("Negative", (Coin,), {"predict_proba": lambda self, texts: np.array([[1.5, -0.5]])})()
    with pytest.raises(PredictionError, match="negative"):
        PredictProbaClassifier(estimator=negative).invoke("x")


# Training data


@pytest.mark.parametrize(
    ("texts", "labels", "words"),
    [
        ([], [], "no training examples"),
        (["a", "b"], ["x"], "2 texts and 1 labels"),
        (["a", "b"], ["x", "x"], "two labels or more"),
        (["a", " "], ["x", "y"], "text 1 is empty"),
        (["a", "b"], ["x", "y"], "only one example"),
    ],
)
def test_train_unusable_data_raises_with_reason(texts: list[str], labels: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        TextCNN.train(texts, labels, settings=QUIET)


def test_train_unknown_label_or_empty_validation_set_raises() -> None:
    with pytest.raises(DataError, match="outside the label set: z"):
        TextCNN.train(["a", "b"], ["x", "z"], label_set=["x", "y"], settings=QUIET)
    with pytest.raises(DataError, match="validation set is empty"):
        TextCNN.train(["a", "b"], ["x", "y"], validation=([], []), settings=QUIET)


# Bundles


@pytest.fixture
def bundle(trained: Any, tmp_path: Path) -> Path:
    return trained["textcnn"].save(tmp_path / "bundle")  # type: ignore[no-any-return]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_load_damaged_bundle_raises_naming_the_file(bundle: Path) -> None:
    weights = bundle / WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(
        BundleTruncatedError, match=f"Expected {len(whole)} bytes in .*{WEIGHTS_FILE}, got {len(whole) - 10}"
    ):
        load_small_model(bundle)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleTruncatedError, match="checksum differs"):
        load_small_model(bundle)
    weights.unlink()
    with pytest.raises(BundleTruncatedError, match=f"lacks the file '{WEIGHTS_FILE}'"):
        load_small_model(bundle)
    (bundle / "config.json").write_text('{"format": 1, "ki')
    with pytest.raises(BundleTruncatedError, match="is truncated or damaged"):
        load_small_model(bundle)
    (bundle / "config.json").unlink()
    with pytest.raises(BundleTruncatedError, match="config.json is missing"):
        load_small_model(bundle)


def test_load_newer_bundle_format_raises(bundle: Path) -> None:
    edit(bundle, format=FORMAT + 1, package_version="9.9", something_new=True)
    with pytest.raises(BundleTooNewError, match=f"format {FORMAT + 1} by version 9.9"):
        load_small_model(bundle)


def test_load_label_count_mismatch_raises_naming_the_weight(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    edit(bundle, labels=[*config["labels"], "one more"])
    with pytest.raises(BundleMismatchError, match="for the weight 'output.weight' of a bundle with 5 labels"):
        load_small_model(bundle)


@pytest.mark.parametrize("kind", ["embedding", "transformers", "predict_proba", "lstm", "neighbours"])
def test_load_label_count_mismatch_every_kind_raises(kind: str, trained: Any, tmp_path: Path) -> None:
    folder = trained[kind].save(tmp_path / "bundle")
    edit(folder, labels=["a", "b"])
    with pytest.raises(BundleMismatchError):
        load_small_model(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "oracle"}, "Unknown kind of small model 'oracle'"),
        ({"labels": []}, "not valid at labels"),
        ({"temperature": -1}, "not valid at temperature"),
        ({"surprise": 1}, "not valid at surprise"),
        ({"files": {"../secret": {"size": 1, "sha256": ""}}}, "outside its folder"),
    ],
)
def test_load_invalid_config_raises_naming_the_field(bundle: Path, changes: Any, words: str) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=words):
        load_small_model(bundle)


def test_load_missing_vocabulary_file_raises(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["files"].pop("vocabulary.json")
    edit(bundle, files=config["files"])
    with pytest.raises(BundleMismatchError, match="no vocabulary.json"):
        load_small_model(bundle)


def test_save_existing_folder_replaces_only_a_bundle(bundle: Path, trained: Any, tmp_path: Path) -> None:
    trained["textcnn"].save(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"], "saving must leave no temporary files"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        trained["textcnn"].save(mine)
    assert (mine / "thesis.txt").exists()


def test_load_wrong_class_raises_naming_the_kind(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="kind 'textcnn', not a LSTMClassifier"):
        LSTMClassifier.load(bundle)


def test_bundled_model_unused_pickles_without_weights(bundle: Path, trained: Any, shop_messages: Any) -> None:
    light = BundledSmallModel.from_folder(bundle, batch_size=8)
    assert light.labels == trained["textcnn"].labels
    assert len(pickle.dumps(light)) < 20_000
    texts = shop_messages[0][:4]
    expected = trained["textcnn"].predict_batch(texts).probabilities
    assert np.array_equal(light.predict_batch(texts).probabilities, expected)
    again = pickle.loads(pickle.dumps(light))
    assert np.array_equal(again.predict_batch(texts).probabilities, expected)
    assert asyncio.run(again.ainvoke(texts[0])).label == light.invoke(texts[0]).label


def test_bundled_model_changed_threshold_is_saved(bundle: Path, tmp_path: Path) -> None:
    light = BundledSmallModel.from_folder(bundle)
    light.threshold = 0.42
    light.save(tmp_path / "copy")
    assert load_small_model(tmp_path / "copy").threshold == 0.42
    with pytest.raises(ConfigurationError, match="path"):
        BundledSmallModel()  # type: ignore[call-arg]


def test_load_pickled_weights_runs_no_code(bundle: Path) -> None:
    """A pickle in place of the weights fails the checksum, and with a forged checksum the weight format."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("code from a bundle was run",))

    data = pickle.dumps(Bomb())
    (bundle / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(BundleTruncatedError):
        load_small_model(bundle)
    import hashlib

    config = json.loads((bundle / "config.json").read_text())
    config["files"][WEIGHTS_FILE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(bundle, files=config["files"])
    with pytest.raises(BundleError):
        load_small_model(bundle)


# Ensembles and neighbours


def test_ensemble_member_error_fails_only_that_input() -> None:
    class Picky(WordModel):
        def predict_scores(self, texts: Sequence[str]) -> Scores:
            errors = {i: ValueError(f"bad {text}") for i, text in enumerate(texts) if text == "odd"}
            return super().predict_scores(texts)._replace(errors=errors)

    ensemble = EnsembleClassifier(labels=WordModel().labels, members=(WordModel(), Picky()), model_id="both")
    outcome = ensemble.predict_batch(["surely refund", "odd"], return_errors=True)
    assert outcome.batch is not None
    assert outcome.batch.label_names() == ["refund"]
    assert str(outcome.errors[1]) == "bad odd"


def test_ensemble_shared_encoder_embeds_once(shop_messages: Any) -> None:
    class Counting(LetterEmbeddings):
        calls = 0

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            Counting.calls += 1
            return super().embed_documents(texts)

    texts, labels = shop_messages
    ensemble = EnsembleClassifier.train(texts, labels, settings=QUIET, embeddings=Counting())
    Counting.calls = 0
    pooled = ensemble.predict_batch(texts[:7])
    assert Counting.calls == 1, "two members with one encoder must embed once"
    assert pooled.sound.all()
    assert sum(ensemble.shares) == pytest.approx(1.0)
    by_hand = sum(
        weight * np.log(member.predict_batch(texts[:7]).probabilities)
        for weight, member in zip(ensemble.shares, ensemble.members, strict=True)
    )
    assert np.allclose(softmax(by_hand, ensemble.temperature), pooled.probabilities, atol=1e-5)
    with pytest.raises(ConfigurationError, match="one non-negative weight for each of the 2 members"):
        ensemble.model_copy(update={}).__class__(labels=ensemble.labels, members=ensemble.members, shares=(1.0,))
    other = NeighbourClassifier.train(["x", "y"] * 2, ["no", "yes"] * 2, settings=QUIET, embeddings=LetterEmbeddings())
    with pytest.raises(ConfigurationError, match="got different labels"):
        EnsembleClassifier(labels=ensemble.labels, members=(ensemble.members[0], other))


def test_train_label_texts_are_used_as_examples() -> None:
    texts, labels = ["aa bb", "aa bc", "zz yy", "zz yx"], ["first", "first", "last", "last"]
    more = {"first": "the letters q and p", "last": "the letters w and v"}
    for cls in (EmbeddingClassifier, NeighbourClassifier):
        model = cls.train(texts, labels, settings=QUIET, embeddings=LetterEmbeddings(), label_texts=more)
        assert model.labels == ("first", "last")
        assert model.predict_batch(["qqpp", "wwvv"]).label_names() == ["first", "last"]


def test_neighbours_fit_soft_targets_stores_new_examples(shop_messages: Any) -> None:
    from langchain_datashunt.small_models.training.training import Examples, one_hot, soft_cross_entropy

    texts, labels = shop_messages
    model = NeighbourClassifier.train(texts, labels, settings=QUIET)
    strange = "my hovercraft is full of eels"
    told = Examples([strange], one_hot(["promo_code"], model.labels))
    learner = model.fit_soft_targets([told], told, QUIET, soft_cross_entropy)
    assert learner.invoke(strange).label == "promo_code"
    assert len(learner.vectors) == len(model.vectors) + 2


# Contrastive fine-tuning


def test_contrastive_loss_random_pairs_matches_published_formula() -> None:
    import torch

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 2, 4))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    labels = np.array([0, 1, 0])
    found = contrastive_loss(torch.from_numpy(vectors), torch.eye(2)[torch.from_numpy(labels)])
    z, y, losses = vectors.reshape(6, 4), labels.repeat(2), []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        total = sum(np.exp(z[i] @ z[j] / 0.1) for j in others)
        same = [j for j in others if y[j] == y[i]]
        losses.append(-np.mean([np.log(np.exp(z[i] @ z[j] / 0.1) / total) for j in same]))
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)


def test_contrastive_train_groups_labels_and_keeps_original_encoder(shop_messages: Any) -> None:
    texts, labels = shop_messages
    before = shared_encoder().encode(texts)[0].copy()
    settings = TrainingSettings(progress=False, epochs=1, batch_size=16)
    model = ContrastiveClassifier.train(
        texts, labels, validation=(texts[:40], labels[:40]), settings=settings, label_texts={labels[0]: "what it means"}
    )
    same = np.array(labels)[:, None] == np.array(labels)

    def gap(vectors: Any) -> float:
        cosine = vectors @ vectors.T
        return float(cosine[same].mean() - cosine[~same].mean())

    assert gap(model.encoder.encode(texts)[0]) > gap(before) + 0.1
    assert np.array_equal(shared_encoder().encode(texts)[0], before)
    assert [member.embeddings is model.encoder for member in model.members] == [False, False, True, True]
    with pytest.raises(DataError, match="outside the label set"):
        ContrastiveClassifier.train(texts, labels, settings=settings, label_texts={"no such label": "?"})


@pytest.mark.parametrize(
    ("kind", "fixed"), [(EmbeddingClassifier, {"strengths": (20.0,)}), (NeighbourClassifier, {"widths": (0.08,)})]
)
def test_train_certain_pseudo_labels_matches_gold_labels(kind: Any, fixed: Any, shop_messages: Any) -> None:
    texts, labels = shop_messages
    given: dict[str, Any] = {"validation": (texts[100:], labels[100:]), "settings": QUIET, **fixed}
    names = tuple(sorted(set(labels)))
    all_labelled = kind.train(texts[:100], labels[:100], label_set=names, **given)
    beside = Examples(list(texts[40:100]), one_hot(labels[40:100], names))
    some = kind.train(texts[:40], labels[:40], label_set=names, pseudo_labelled=beside, **given)
    wanted, found = (model.predict_batch(texts[100:]).probabilities for model in (all_labelled, some))
    assert np.allclose(found, wanted, atol=2e-3)
    for odd in (np.ones((60, len(names) + 1)), one_hot(labels[40:99], names), np.ones((60, len(names)))):
        with pytest.raises(DataError, match="one distribution over the"):
            odd_ones = Examples(list(texts[40:100]), odd)
            kind.train(texts[:40], labels[:40], label_set=names, pseudo_labelled=odd_ones, **given)
    few = kind.train(texts[:40], labels[:40], label_set=names, **given)
    assert not np.allclose(few.predict_batch(texts[100:]).probabilities, wanted, atol=2e-2)


@pytest.mark.parametrize("kind", [EmbeddingClassifier, NeighbourClassifier])
def test_train_wrong_pseudo_labels_are_never_held_out(kind: Any, shop_messages: Any) -> None:
    """Confidently wrong pseudo-labels would raise the held-out loss if they were held out."""
    texts, labels = shop_messages
    names = tuple(sorted(set(labels)))
    wrong = [names[(names.index(label) + 1) % len(names)] for label in labels[100:]]
    beside = Examples([f"zz {i} qq xx" for i in range(len(wrong))], one_hot(wrong, names))
    model = kind.train(texts[:100], labels[:100], label_set=names, pseudo_labelled=beside, settings=QUIET)
    plain = kind.train(texts[:100], labels[:100], label_set=names, settings=QUIET)
    assert model.lineage["examples"] == plain.lineage["examples"]
    assert model.lineage["validation_nll"] < plain.lineage["validation_nll"] + 0.3


def test_contrastive_train_unlabelled_texts_are_learnt_and_saved(shop_messages: Any, tmp_path: Path) -> None:
    texts, labels = shop_messages
    order = np.random.default_rng(1).permutation(len(texts)).tolist()
    few = [i for label in sorted(set(labels)) for i in [j for j in order if labels[j] == label][:3]]
    asked, others = ([i for i in order if i not in few][part] for part in (slice(0, 60), slice(60, None)))
    take = lambda rows: ([texts[i] for i in rows], [labels[i] for i in rows])  # noqa: E731
    held, settings = take(asked[:30]), TrainingSettings(progress=False, epochs=1, batch_size=16)
    unlabelled = [*take(others)[0], take(others)[0][0], take(few)[0][0], held[0][0]]
    plain = ContrastiveClassifier.train(*take(few), validation=held, settings=settings)
    model = ContrastiveClassifier.train(*take(few), validation=held, settings=settings, unlabelled=unlabelled)
    assert (plain.lineage["unlabelled"], model.lineage["unlabelled"]) == (0, len(others)), (
        "duplicates, labelled and validation texts are dropped"
    )
    assert [len(m.vectors) for m in model.members if isinstance(m, NeighbourClassifier)] == [12 + len(others)] * 2
    seen = seen_in_training(model.lineage, take(others)[0])
    assert len(seen) == len(others), "unlabelled texts count as training texts"
    assert not seen_in_training(plain.lineage, take(others)[0])

    def loss(small: SmallModel) -> float:
        new, truth = take(asked[30:])
        p = small.predict_batch(new).probabilities
        return float(-np.log(p[np.arange(len(new)), [small.labels.index(label) for label in truth]]).mean())

    assert loss(model) < loss(plain) + 0.05
    assert not np.allclose(
        model.predict_batch(texts).probabilities, plain.predict_batch(texts).probabilities, atol=0.01
    )
    again = load_small_model(model.save(tmp_path / "bundle"))
    assert np.allclose(again.predict_batch(texts).probabilities, model.predict_batch(texts).probabilities, atol=1e-5)
    with pytest.raises(DataError, match="Unlabelled text 1 is empty"):
        ContrastiveClassifier.train(*take(few), settings=settings, unlabelled=["a", " "])


def test_load_contrastive_bundle_without_encoder_raises(trained: Any, tmp_path: Path) -> None:
    folder = trained["contrastive"].save(tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    assert "encoder/model.safetensors" in config["files"]
    for name in [name for name in config["files"] if name.startswith("encoder/")]:
        (folder / name).unlink()
        del config["files"][name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleMismatchError, match="no encoder/config.json"):
        load_small_model(folder)


# Choosing a kind


def test_train_best_within_time_budget_returns_best_kind(shop_messages: Any) -> None:
    from langchain_datashunt.small_models.training.selection import train_best

    texts, labels = shop_messages
    seen: list[Any] = []
    model, table = train_best(
        texts, labels, settings=QUIET, kinds=("textcnn", "neighbours", "embedding"), time_budget=60,
        on_candidate=seen.append,
    )  # fmt: skip
    assert seen == table
    assert [candidate.kind for candidate in table] == ["textcnn", "neighbours", "embedding"]
    least = min(candidate.nll for candidate in table)
    winner = next(candidate for candidate in table if candidate.kind == type(model).kind())
    assert winner.nll <= least + 0.01
    assert model.labels == tuple(sorted(set(labels)))
    assert model.lineage["examples"] + model.lineage["validation_examples"] == len(texts), (
        "the winner is trained on all texts"
    )
    held = (texts[::4], labels[::4])
    model, table = train_best(
        texts, labels, validation=held, settings=QUIET, kinds=("embedding", "lstm"), time_budget=0.5
    )
    assert type(model).kind() == "embedding"
    assert table[1].note


def test_train_best_validation_texts_are_dropped_from_unlabelled(shop_messages: Any, monkeypatch: Any) -> None:
    from langchain_datashunt.small_models.training.selection import train_best

    texts, labels = shop_messages
    seen: list[list[str]] = []

    def train(*args: Any, unlabelled: Any, **more: Any) -> SmallModel:
        seen.append(list(unlabelled))
        return EmbeddingClassifier.train(*args, **more)

    monkeypatch.setattr(ContrastiveClassifier, "train", train)
    held = (texts[:40], labels[:40])
    train_best(
        texts[40:], labels[40:], validation=held, settings=QUIET, kinds=("contrastive",),
        options={"contrastive": {"unlabelled": texts}},
    )  # fmt: skip
    assert [set(one) & set(held[0]) for one in seen] == [set()]
    assert set(seen[0]) == set(texts) - set(held[0])


def test_train_max_seconds_exceeded_stops_after_one_epoch(shop_messages: Any) -> None:
    texts, labels = shop_messages
    hasty = TextCNN.train(texts, labels, settings=TrainingSettings(progress=False, max_seconds=1e-6))
    assert hasty.lineage["steps"] == 1


def test_save_folder_with_foreign_files_raises(tmp_path: Path) -> None:
    model = EmbeddingClassifier.train(["a", "b"] * 4, ["x", "y"] * 4, embeddings=LetterEmbeddings(), settings=QUIET)
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "config.json").write_text('{"model_type": "bert"}')
    (project / ".git" / "HEAD").write_text("ref")
    (tmp_path / "file").write_text("a file")
    for place in (project, tmp_path / "file"):
        with pytest.raises(BundleError, match="Choose a new or empty folder"):
            model.save(place)
    bundle = model.save(tmp_path / "bundle")
    assert model.save(bundle) == bundle
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="would be removed: notes.txt"):
        model.save(bundle)
    assert (project / ".git" / "HEAD").is_file()
    assert (bundle / "notes.txt").read_text() == "mine"


def test_predict_batch_lone_surrogate_leaves_other_texts_unchanged(shop_messages: Any) -> None:
    texts, labels = shop_messages
    for kind in (EmbeddingClassifier, TextCNN):
        model: SmallModel = kind.train([*texts, "a \ud83d cut"], [*labels, labels[0]], settings=SHORT)
        whole = model.predict_batch(["where is it", "refund me"]).probabilities
        cut = model.predict_batch(["where is it", "half \ud83d", "refund me"]).probabilities
        assert np.allclose(cut[[0, 2]], whole, atol=1e-6)


def test_train_invalid_validation_set_raises() -> None:
    texts, labels = ["a", "b"] * 4, ["x", "y"] * 4
    wrong: list[tuple[Any, str]] = [
        ((["a", "b", "c"], ["x", "y"]), "got 3 texts and 2 labels"),
        ((["a", None], ["x", "y"]), "Validation text 1 is empty"),
        ((["a", "b"], ["x", None]), "Expected a string as the label of validation text 1"),
    ]
    for validation, message in wrong:
        with pytest.raises(DataError, match=message):
            TextCNN.train(texts, labels, validation=validation, settings=SHORT)
    for bad in (None, float("nan"), 3):
        with pytest.raises(DataError, match="the label of training text 1"):
            TextCNN.train(texts, ["x", bad, *labels[2:]], settings=SHORT)  # type: ignore[list-item]


def test_train_diverging_loss_keeps_best_or_raises() -> None:
    report = TrainingReport()
    assert [report.note(loss) for loss in (float("nan"), 0.5, float("nan"), 0.4)] == [False, True, False, True]
    texts, labels = ["good one", "bad one"] * 20, ["x", "y"] * 20
    with pytest.raises(DataError, match="Training diverged"):
        TextCNN.train(texts, labels, settings=SHORT.model_copy(update={"learning_rate": 1e30}))


@pytest.mark.filterwarnings("ignore::langchain_datashunt.exceptions.TruncationWarning")
def test_bundle_encoder_max_length_is_restored(tmp_path: Path, shop_messages: Any) -> None:
    texts, labels = shop_messages
    model = EmbeddingClassifier.train(texts, labels, embeddings=SentenceEncoder(max_length=8), settings=QUIET)
    loaded = load_small_model(model.save(tmp_path / "b"))
    long = " ".join(texts[:10])
    assert np.allclose(loaded.predict_batch([long]).probabilities, model.predict_batch([long]).probabilities, atol=1e-5)


def test_save_concurrent_writers_never_expose_partial_bundle(tmp_path: Path) -> None:
    folder, ends = tmp_path / "model", time.monotonic() + 1.5
    made = {}
    for k in (2, 3):
        labels = tuple("abc"[:k])
        made[labels] = EmbeddingClassifier(
            labels=labels, embeddings=LetterEmbeddings(), head=np.full((26, k), float(k)), bias=np.zeros(k), threshold=k
        )
    next(iter(made.values())).save(folder)

    def save(model: EmbeddingClassifier) -> int:
        n = 0
        while time.monotonic() < ends:
            model.model_copy().save(folder)
            n += 1
        return n

    def read() -> int:
        n = 0
        while time.monotonic() < ends:
            model = load_small_model(folder, embeddings=LetterEmbeddings())
            assert isinstance(model, EmbeddingClassifier)
            assert model.head[0, 0] == model.threshold == len(model.labels)
            assert BundledSmallModel.from_folder(folder).labels in made
            n += 1
        return n

    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(save, model) for model in made.values()]
        reads = [pool.submit(read) for _ in range(2)]
        assert min(one.result() for one in (*saves, *reads)) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "saving must leave no temporary folders"


def test_load_bundle_replaced_during_read_is_read_again(tmp_path: Path, monkeypatch: Any) -> None:
    """A reader retries however long reading takes, and the remains of a killed writer do not delay an error."""
    labels, folder = ("a", "b"), tmp_path / "model"
    shared: dict[str, Any] = {"labels": labels, "embeddings": LetterEmbeddings(), "bias": np.zeros(2)}
    first, second = (EmbeddingClassifier(**shared, head=np.full((26, 2), value)) for value in (1.0, 2.0))
    first.save(folder)
    reads = []
    real = loading_module.read_bundle

    def slow(path: Path) -> Any:
        info, weights = real(path)
        if not reads:
            second.save(folder)
            monkeypatch.setattr("langchain_datashunt._utils.atomic_dir.time.monotonic", lambda: 1e9)
        reads.append(float(weights["head"][0, 0]))
        return info, weights

    monkeypatch.setattr(loading_module, "read_bundle", slow)
    assert load_small_model(folder, embeddings=LetterEmbeddings()).head[0, 0] == 2.0  # type: ignore[attr-defined]
    assert reads == [1.0, 2.0]
    monkeypatch.undo()
    (tmp_path / ".model-old-killed").mkdir()
    (folder / WEIGHTS_FILE).write_bytes(b"")
    started = time.monotonic()
    with pytest.raises(BundleTruncatedError):
        load_small_model(folder)
    assert time.monotonic() - started < 1.0


def test_labels_duplicate_name_raises(tmp_path: Path) -> None:
    once = EmbeddingClassifier(
        labels=("a", "b"), embeddings=LetterEmbeddings(), head=np.zeros((26, 2)), bias=np.zeros(2)
    ).save(tmp_path / "model")
    config = json.loads((once / "config.json").read_text())
    (once / "config.json").write_text(json.dumps({**config, "labels": ["a", "a"]}))
    with pytest.raises(BundleError, match="not valid at labels.*appears more than once.*Train or copy it again"):
        load_small_model(once, embeddings=LetterEmbeddings())
    for cls in (EmbeddingClassifier, NeighbourClassifier, EnsembleClassifier, TextCNN):
        with pytest.raises(DataError, match="label set has 'a' more than once"):
            cls.train(["x", "y", "z"], ["a", "b", "a"], label_set=("a", "b", "a"), settings=QUIET)
    with pytest.raises(ConfigurationError, match="unique `labels`, got 'a' more than once"):
        EmbeddingClassifier(labels=("a", "a"), embeddings=LetterEmbeddings(), head=np.zeros((26, 2)), bias=np.zeros(2))


def test_load_unknown_override_raises(tmp_path: Path, shop_messages: Any) -> None:
    folder = EmbeddingClassifier.train(*shop_messages, settings=QUIET).save(tmp_path / "model")
    for load in (load_small_model, BundledSmallModel.from_folder, EmbeddingClassifier.load):
        with pytest.raises(ConfigurationError, match=r"bundle: threshold, trheads\. Expected some of: device"):
            load(folder, threshold=0.5, trheads=2)
    assert load_small_model(folder, device="cpu", batch_size=4, cache_size=3).cache_size == 3


def test_bundled_model_many_threads_loads_once(tmp_path: Path, monkeypatch: Any) -> None:
    model = TextCNN.train(["a", "b"] * 8, ["x", "y"] * 8, settings=SHORT)
    light, loads = BundledSmallModel.from_folder(model.save(tmp_path / "b")), []
    from langchain_datashunt.small_models.bundles import loading

    load = loading.load_small_model

    def slow(*given: Any, **more: Any) -> Any:
        loads.append(1)
        time.sleep(0.05)
        return load(*given, **more)

    monkeypatch.setattr(loading, "load_small_model", slow)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: light.loaded.model_id, range(8)))) == 1
    assert loads == [1]


def test_transformers_long_text_is_cut_to_network_positions(tmp_path: Path) -> None:
    """RoBERTa's positions start after the padding id; other architectures have no positions, or -1."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification, T5Config, XLNetConfig

    from langchain_datashunt.small_models.engine.tokenization import usable_length
    from langchain_datashunt.small_models.kinds.encoder import bundled_encoder_path

    config = RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=34,
        vocab_size=30522, pad_token_id=1, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bundled_encoder_path())
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    for asked in (None, 500):
        model = TransformersClassifier(model=str(tmp_path), max_length=asked)
        with pytest.warns(TruncationWarning):
            batch = model.predict_batch(["a word " * 100, "short"])
        assert batch.sound.all()
        assert len(model.features(["a word " * 100])[0]) == 32
    assert [usable_length(T5Config(), asked) for asked in (None, 300)] == [512, 300]
    assert usable_length(XLNetConfig()) == 512


@pytest.mark.parametrize(("template", "closing"), [("$A [E]", 1), ("[B] $A [E]", 1), ("[B] $A", 0), ("$A [E] [B]", 2)])
def test_tokenizer_truncated_text_keeps_closing_tokens(template: str, closing: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"[B]": 0, "[E]": 1, "a": 2, "b": 3, "[U]": 4}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("[B]", 0), ("[E]", 1)])
    ids, cut = TextTokenizer(backend, 0, 6)(["a b " * 10])
    whole = backend.encode("a b " * 10).ids
    assert cut.all()
    assert ids[0][6 - closing :] == whole[len(whole) - closing :]
    assert ids[0][: 6 - closing] == whole[: 6 - closing]
