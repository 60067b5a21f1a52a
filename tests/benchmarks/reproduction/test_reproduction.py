"""Smoke tests of the commands in docs/reproduction.md. Their small runs check the code, not the figures."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from langchain_datashunt.small_models.kinds.image_inputs import PREPROCESSOR_FILE
from tests.benchmarks.reproduction import __main__ as command
from tests.benchmarks.reproduction.images import digits_with_a_long_tail
from tests.benchmarks.reproduction.text import amazon
from tests.support.modalities import preprocessor, squares, word_level_tokenizer

ROOT = Path(__file__).parents[3]


def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["reproduction", *arguments, "--small-run", "--json", str(file)])
    command.main()
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_digits_parts_are_long_tailed_and_disjoint() -> None:
    material = digits_with_a_long_tail(3)
    assert sorted(material.counts.values(), reverse=True) == [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
    assert [len(material.parts[part]) for part in ("all", "head", "medium", "tail")] == [10, 3, 3, 4]
    seen = [
        image.tobytes()
        for part in ("small", "large", "held_out", "stream", "test")
        for image in getattr(material, part)[0]
    ]
    assert len(seen) - len(set(seen)) <= 4  # scikit-learn's digits contain few duplicates
    assert {name: material.test[1].count(name) for name in material.counts} == dict.fromkeys(material.counts, 40)


def test_tables_2_and_4_run_on_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = ran(monkeypatch, tmp_path, "--table", "2")
    assert found["small"]["asked"]["mean"] == 0.0
    assert found["large"]["asked"]["mean"] == 1.0
    assert 0.0 < found["DS"]["asked"]["mean"] <= 1.0
    found = ran(monkeypatch, tmp_path, "--table", "4")
    assert {"DS", "DS-2CD", "DS-PP-2CD"} <= set(found)


def test_table_2_runs_on_cifar_with_image_text_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, set_seed

    rng = np.random.default_rng(0)
    rows = []
    for label in (1, 3, 5, 7, 9):
        for _ in range(180):
            out = io.BytesIO()
            pixels = np.clip(rng.normal(25 * label, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(out, format="PNG")
            rows.append({"img": {"bytes": out.getvalue(), "path": None}, "fine_label": label})
    (tmp_path / "cifar").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "cifar" / "train.parquet")
    clip = tmp_path / "clip"
    n = word_level_tokenizer(
        clip, ["This", "is", "a", "photo", "of", "1", "3", "5", "7", "9", "with", "probability", ".", "0"]
    )
    set_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": n, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**part, **text}, vision_config={**part, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    network = CLIPModel(config)
    with torch.no_grad():  # amplifies the image content over the bias shared by all images
        network.vision_model.embeddings.patch_embedding.weight.mul_(100.0)
    network.save_pretrained(clip)
    preprocessor(clip)
    assert (clip / PREPROCESSOR_FILE).is_file()
    found = ran(monkeypatch, tmp_path, "--table", "2", "--cifar", str(tmp_path / "cifar"), "--clip", str(clip))
    assert {"large (image-text model)", "DS-PP-2CD (image-text model)"} <= set(found)
    with pytest.raises(SystemExit, match="no Parquet file"):
        ran(monkeypatch, tmp_path, "--table", "2", "--cifar", str(clip))


def test_table_3_writes_table_and_standalone_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "reproduction.md").write_text((ROOT / "docs" / "reproduction.md").read_text())
    found = ran(monkeypatch, tmp_path, "--table", "3", "--docs", str(docs))
    assert {"bleu1", "bleu2", "bleu3", "bleu4", "asked"} == set(found["DS"])
    page = (docs / "reproduction.md").read_text()
    table = page.split("<!-- 3: made by the command above -->")[1].split("<!-- 3: end -->")[0]
    assert f"{100 * found['large']['bleu1']:.1f}" in table
    svg = (docs / "reproduction" / "captions.svg").read_text()
    assert svg.startswith("<svg xmlns=")
    assert "<style>" in svg


def test_amazon_reviews_give_two_sentiment_labels(tmp_path: Path) -> None:
    reviews = [
        {"reviewText": f"I like it {i}" if i % 3 else f"bad thing {i}", "overall": 5.0 if i % 3 else 1.0}
        for i in range(120)
    ]
    reviews.append({"reviewText": "so so", "overall": 3.0})
    file = tmp_path / "reviews.json"
    file.write_text("\n".join(map(json.dumps, reviews)))
    task = amazon(file, 0, True)
    assert set(task.train[1]) == {"positive", "negative"}
    assert "so so" not in task.train[0] + list(task.test.texts)
    assert len(task.test_said) == len(task.test.texts) == 60
    right = [a == b for a, b in zip(task.test_said, task.test.labels, strict=True)]
    assert np.mean(right) > 0.9


def test_squares_have_labelled_colour() -> None:
    images, labels = squares(20)
    assert all(
        (image[..., 0].mean() > image[..., 2].mean()) == (label == "red")
        for image, label in zip(images, labels, strict=True)
    )
