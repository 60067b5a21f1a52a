"""Shortlisting of an agent's 199 tools by a small model.

    python -m tests.benchmarks.tools [--json F] [--epochs N] [--limit N] [--agent N] [--bundle DIR]

The data are the questions of MetaTool's ToolE with one correct tool each. They are split by seed: 68% for training, 6%
for early stopping and weights, 6% for the conformal set, and 20% for testing. Questions with the same words are in one
part. The small model pools a fine-tuned MiniLM, a linear head and neighbours on frozen MiniLM embeddings, and logistic
regression on n-grams. The tool list of a prompt is counted in WordPiece tokens of the tools' OpenAI schemas. Finally, a
real agent (`create_agent`, `ChatOpenAI` on a local server) gets some of the test questions, and the tools in its
requests are counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from langchain_datashunt import (
    EmbeddingClassifier,
    PredictProbaClassifier,
    SmallModel,
    TransformersClassifier,
    load_small_model,
)
from langchain_datashunt.agents import ShuntToolRouterMiddleware, ToolRouter
from langchain_datashunt.cli.demo.benchmark_task import DATA_DIR_VARIABLE, Labelled
from langchain_datashunt.evaluation import mean_interval
from langchain_datashunt.small_models import EnsembleClassifier, NeighbourClassifier, TrainingSettings
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, shared_encoder
from tests.support.scripted_server import ScriptedServer

ALPHA = 0.05
PARTS = {"train": 0.68, "stop": 0.06, "calibrate": 0.06, "test": 0.2}


def load_questions(folder: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return (question, tool) pairs and the description of each tool."""
    with (folder / "all_clean_data.csv").open(encoding="utf-8", newline="") as stream:
        rows = [(row["Query"], row["Tool"]) for row in csv.DictReader(stream)]
    descriptions: dict[str, str] = json.loads((folder / "plugin_des.json").read_text(encoding="utf-8"))
    return rows, descriptions


def split(rows: list[tuple[str, str]], seed: int) -> dict[str, Labelled]:
    """Split the questions by seed, keeping questions with the same words in one part."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for question, tool in rows:
        groups.setdefault(" ".join(question.lower().split()), []).append((question, tool))
    keys = [sorted(groups)[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    bounds = np.cumsum([round(share * len(keys)) for share in PARTS.values()])[:-1]
    parts = {}
    for name, own in zip(PARTS, np.split(np.array(keys, dtype=object), bounds), strict=True):
        pairs = [pair for key in own for pair in groups[key]]
        parts[name] = Labelled([question for question, _ in pairs], [tool for _, tool in pairs])
    return parts


def train(parts: dict[str, Labelled], epochs: int) -> SmallModel:
    labels = sorted({label for part in parts.values() for label in part.labels})
    learn, stop = parts["train"], (parts["stop"].texts, parts["stop"].labels)
    tuning = TrainingSettings(
        epochs=epochs, batch_size=64, learning_rate=2e-4, patience=2, precision="bfloat16", progress=False
    )
    quiet = TrainingSettings(progress=False)
    encoder = PrecomputedEmbeddings(shared_encoder(), [*learn.texts, *stop[0]])
    given: dict[str, Any] = {"validation": stop, "label_set": labels}
    members: list[SmallModel] = [
        EmbeddingClassifier.train(learn.texts, learn.labels, settings=quiet, embeddings=encoder, **given),
        NeighbourClassifier.train(learn.texts, learn.labels, settings=quiet, embeddings=encoder, **given),
    ]
    members = [member.model_copy(update={"embeddings": shared_encoder()}) for member in members]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, min_df=5)
    pipeline = make_pipeline(make_union(words, letters), LogisticRegression(C=30, max_iter=60))
    members.append(PredictProbaClassifier.train(learn.texts, learn.labels, estimator=pipeline, settings=quiet, **given))
    members.append(TransformersClassifier.train(learn.texts, learn.labels, settings=tuning, max_length=64, **given))
    for member in members:
        batch = member.predict_batch(stop[0])
        right = np.mean([a == b for a, b in zip(batch.label_names(), stop[1], strict=True)])
        print(f"{member.kind()}: {right:.4f} on the part to stop on", file=sys.stderr, flush=True)
    return EnsembleClassifier.from_members(members, stop, model_id="tools")


def tool_of(name: str, description: str) -> BaseTool:
    def run(question: str) -> str:
        return f"{name} was asked: {question}"

    return StructuredTool.from_function(run, name=name, description=description)


def measure(router: ToolRouter, test: Labelled, tools: dict[str, BaseTool]) -> dict[str, Any]:
    tokenizer = shared_encoder().tokenizer
    schemas = [json.dumps(convert_to_openai_tool(tool)) for tool in tools.values()]
    lengths = [len(ids) for ids in tokenizer.backend.encode_batch(schemas)]
    tokens = dict(zip(tools, lengths, strict=True))
    whole = sum(tokens.values())
    router.rank_batch(test.texts[:64])
    started = time.perf_counter()
    rankings = router.rank_batch(test.texts)
    seconds = time.perf_counter() - started
    single = []
    for text in test.texts[:200]:
        began = time.perf_counter()
        router.rank_batch([text])
        single.append(time.perf_counter() - began)
    top1 = np.array([ranking.best == tool for ranking, tool in zip(rankings, test.labels, strict=True)])
    top5 = np.array([tool in ranking.tools[:5] for ranking, tool in zip(rankings, test.labels, strict=True)])
    kept = np.array([tool in ranking.shortlist for ranking, tool in zip(rankings, test.labels, strict=True)])
    sizes = np.array([len(ranking.shortlist) for ranking in rankings])
    sent = np.array([sum(tokens[name] for name in ranking.shortlist) for ranking in rankings])
    return {
        "n": len(test),
        "top1": float(top1.mean()),
        "top1_interval": list(mean_interval(top1)),
        "top5": float(top5.mean()),
        "coverage": float(kept.mean()),
        "coverage_interval": list(mean_interval(kept)),
        "mean_set_size": float(sizes.mean()),
        "sets_of_one": float((sizes == 1).mean()),
        "largest_set": int(sizes.max()),
        "tool_tokens_before": whole,
        "tool_tokens_after": float(sent.mean()),
        "prompt_cut": float(1.0 - sent.mean() / whole),
        "decisions_per_second": len(test) / seconds,
        "single_decision_ms": float(np.median(single) * 1e3),
    }


def ask_agent(router: ToolRouter, test: Labelled, tools: dict[str, BaseTool], n: int) -> dict[str, Any]:
    """Run a real agent on the first `n` questions, and return figures of its requests."""
    found, sizes, characters = [], [], []
    whole = len(json.dumps([convert_to_openai_tool(tool) for tool in tools.values()]))
    with ScriptedServer() as server:
        agent = create_agent(server.chat_model(), list(tools.values()), middleware=[ShuntToolRouterMiddleware(router)])
        for question, tool in zip(test.texts[:n], test.labels[:n], strict=True):
            server.bodies.clear()
            agent.invoke({"messages": [HumanMessage(question)]})
            offered = [each["function"]["name"] for each in server.bodies[0]["tools"]]
            found.append(tool in offered)
            sizes.append(len(offered))
            characters.append(len(json.dumps(server.bodies[0]["tools"])))
    return {
        "agent_questions": n,
        "agent_coverage": float(np.mean(found)),
        "agent_mean_tools": float(np.mean(sizes)),
        "agent_characters_cut": float(1.0 - np.mean(characters) / whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="maximum number of questions")
    parser.add_argument("--agent", type=int, default=200, help="questions for the real agent")
    parser.add_argument(
        "--bundle", type=Path, help="folder to save the trained model to, or to load it from if it exists"
    )
    options = parser.parse_args()
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, "")) / "toole"
    if not (folder / "all_clean_data.csv").is_file():
        raise SystemExit(f"{DATA_DIR_VARIABLE} does not contain toole/all_clean_data.csv. See docs/data.md.")
    rows, descriptions = load_questions(folder)
    parts = split(rows[:: max(1, len(rows) // options.limit)] if options.limit else rows, options.seed)
    started = time.perf_counter()
    if options.bundle is not None and options.bundle.is_dir():
        model = load_small_model(options.bundle)
    else:
        model = train(parts, options.epochs)
        if options.bundle is not None:
            model.save(options.bundle)
    trained = time.perf_counter() - started
    print(f"trained in {trained:.0f} s", file=sys.stderr, flush=True)
    router = ToolRouter(classifier=model).calibrate(parts["calibrate"].texts, parts["calibrate"].labels, alpha=ALPHA)
    tools = {name: tool_of(name, descriptions[name]) for name in model.labels}
    result = {"questions": {name: len(part) for name, part in parts.items()}, "train_seconds": trained}
    result |= measure(router, parts["test"], tools)
    result |= ask_agent(router, parts["test"], tools, options.agent)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
