from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("LANGSMITH_TRACING", None)

settings.register_profile("datashunt", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("datashunt")

DATA_DIR = os.environ.get("DATASHUNT_DATA_DIR")


@pytest.fixture(scope="session")
def banking77() -> Path:
    """The folder of Banking77 with recorded answers; skips where the environment has none."""
    if not DATA_DIR or not (Path(DATA_DIR) / "banking77_gpt4").is_dir():
        pytest.skip("DATASHUNT_DATA_DIR names no folder with banking77_gpt4 (see docs/data.md)")
    return Path(DATA_DIR) / "banking77_gpt4"


@pytest.fixture(scope="session")
def shop_messages() -> tuple[list[str], list[str]]:
    """Four intents of the shipped messages: texts and labels, enough to train on in a second."""
    from langchain_datashunt.cli.demo.benchmark_task import load_messages

    task = load_messages()
    wanted = {"account_access", "damaged_item", "product_question", "promo_code"}
    pairs = [
        (text, label)
        for part in (task.train, task.dev, task.test)
        for text, label in zip(part.texts, part.labels, strict=True)
        if label in wanted
    ]
    return [text for text, _ in pairs], [label for _, label in pairs]
