from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("LANGSMITH_TRACING", None)

settings.register_profile("datashunt", deadline=None)  # run times differ between machines
settings.load_profile("datashunt")

DATA_DIR = os.environ.get("DATASHUNT_DATA_DIR")


@pytest.fixture(scope="session")
def banking77() -> Path:
    """Folder of Banking77 with recorded LLM answers. Tests are skipped if it is not available."""
    if not DATA_DIR or not (Path(DATA_DIR) / "banking77_gpt4").is_dir():
        pytest.skip("DATASHUNT_DATA_DIR does not contain banking77_gpt4 (see docs/data.md)")
    return Path(DATA_DIR) / "banking77_gpt4"


@pytest.fixture(scope="session")
def shop_messages() -> tuple[list[str], list[str]]:
    """Texts and labels of four intents of the demo messages, small enough to train on in a second."""
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
