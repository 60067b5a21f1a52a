"""Accuracy gained by distillation from a small model (S1) to its student (S2).

    python -m tests.benchmarks.distillation [--json F] [--seeds N]

The data are Banking77 with GPT-4's recorded answers. S1 is trained on 3 examples per label of train.csv. A random half
of test.csv is routed. GPT-4's answer is recorded if S1 is not confident, and no true label is used. S2 is distilled
from that log. Both are scored on the other half with the same rule: answer locally if the calibrated probability is at
least 0.7. Compared are plain fine-tuning on GPT-4's answers, the paper's 2CD (bare answers, 7 epochs, 1e-4), and ours.

The second part tests the promotion gate. S1 is trained on 10 examples per label, and 0, 10 or 50% of GPT-4's answers
are replaced before training. Either each one gets a random label, or all answers of some labels become another label,
as after an error in the prompt or a change of the large model. Each candidate is tested on dev.csv, against S1 and
against the S2 of the unchanged answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from langchain_datashunt._utils.table_files import sample_per_label
from langchain_datashunt.call_log import CallRecord
from langchain_datashunt.cli.demo.benchmark_task import BenchmarkTask, banking77_folder, load_banking77
from langchain_datashunt.distillation import DistillationSettings, PromotionGate, TeacherCheck, TwoStageDistiller
from langchain_datashunt.evaluation import mean_interval
from langchain_datashunt.small_models import EmbeddingClassifier, SmallModel, TrainingSettings
from langchain_datashunt.small_models.kinds.encoder import PrecomputedEmbeddings, shared_encoder

THRESHOLD = 0.7
PER_LABEL = 3
GATE_PER_LABEL = 10
QUIET = TrainingSettings(progress=False)


def records_of(small: SmallModel, texts: list[str], answers: list[str]) -> list[CallRecord]:
    """Return the records of a shunt, with the large model's answer only if the small model is not confident."""
    predictions = small.predict_batch(texts)
    calls = []
    for text, answer, prediction in zip(texts, answers, predictions, strict=True):
        sure = prediction.confidence >= THRESHOLD
        asked = {} if sure else {"large_model": "gpt-4", "answer_label": answer, "answer": answer}
        calls.append(
            CallRecord(
                input=text,
                labels=prediction.labels,
                probabilities=tuple(prediction.probabilities.tolist()),
                threshold=THRESHOLD,
                route="small" if sure else "large",
                reason="confident" if sure else "deferred",
                **asked,
            )
        )
    return calls


def plain_fine_tuning(small: EmbeddingClassifier, records: list[CallRecord]) -> SmallModel:
    """Train the head further with Adam on GPT-4's answers alone, as the baseline."""
    import torch

    asked = [call for call in records if call.answer_label is not None]
    vectors = torch.tensor(np.array(small.embeddings.embed_documents([call.input for call in asked])))
    truth = torch.tensor([small.labels.index(str(call.answer_label)) for call in asked])
    torch.manual_seed(0)
    head = torch.tensor(small.head, requires_grad=True)
    bias = torch.tensor(small.bias, requires_grad=True)
    optimizer = torch.optim.Adam([head, bias], lr=0.02)
    for _ in range(30):
        for rows in torch.randperm(len(truth)).split(64):
            loss = torch.nn.functional.cross_entropy(vectors[rows] @ head + bias, truth[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return small.model_copy(update={"head": head.detach().numpy(), "bias": bias.detach().numpy()})


def paper_2cd(small: EmbeddingClassifier, records: list[CallRecord]) -> SmallModel:
    """Train the head as in the paper: bare answers of both teachers, alternating batches of 64, 7 epochs, Adam 1e-4."""
    import torch

    sure = [call for call in records if call.answer_label is None]
    asked = [call for call in records if call.answer_label is not None]
    stages = []
    for calls in (asked, sure):
        vectors = torch.tensor(np.array(small.embeddings.embed_documents([call.input for call in calls])))
        names = [call.answer_label if call.answer_label is not None else call.small_label for call in calls]
        stages.append((vectors, torch.tensor([small.labels.index(str(name)) for name in names])))
    torch.manual_seed(0)
    head = torch.tensor(small.head, requires_grad=True)
    bias = torch.tensor(small.bias, requires_grad=True)
    optimizer = torch.optim.Adam([head, bias], lr=1e-4)
    for _ in range(7):
        batches = [torch.randperm(len(truth)).split(64) for _, truth in stages]
        for i in range(max(map(len, batches))):
            for (vectors, truth), mine in zip(stages, batches, strict=True):
                rows = mine[i % len(mine)]
                loss = torch.nn.functional.cross_entropy(vectors[rows] @ head + bias, truth[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return small.model_copy(update={"head": head.detach().numpy(), "bias": bias.detach().numpy()})


def scored(model: SmallModel, texts: list[str], labels: list[str], answers: list[str]) -> dict[str, Any]:
    """Return the accuracy, the deferral rate, the accuracy of the shunt, and the correctness of each text."""
    predictions = model.predict_batch(texts)
    right = np.array([a == b for a, b in zip(predictions.label_names(), labels, strict=True)])
    large = np.array([a == b for a, b in zip(answers, labels, strict=True)])
    keep = predictions.confidence >= THRESHOLD
    return {"right": right, "asked": ~keep, "shunt": np.where(keep, right, large)}


def one_seed(task: BenchmarkTask, encoder: PrecomputedEmbeddings, seed: int) -> dict[str, dict[str, Any]]:
    texts, labels = sample_per_label(task.train.texts, task.train.labels, PER_LABEL, seed)
    s1 = EmbeddingClassifier.train(texts, labels, settings=QUIET, embeddings=encoder)
    order = np.random.default_rng(seed).permutation(len(task.test))
    first, second = order[: len(order) // 2].tolist(), order[len(order) // 2 :].tolist()
    records = records_of(s1, [task.test.texts[i] for i in first], [task.test.large[i] for i in first])
    ours = TwoStageDistiller(DistillationSettings(training=QUIET))
    models: dict[str, SmallModel] = {
        "S1": s1,
        "plain fine-tuning on GPT-4's answers": plain_fine_tuning(s1, records),
        "2CD as in the paper": paper_2cd(s1, records),
        "our 2CD": ours.distill(s1, records).model,
        "our 2CD, with S1's training examples": ours.distill(s1, records, labelled=(texts, labels)).model,
    }
    test = [[column[i] for i in second] for column in (task.test.texts, task.test.labels, task.test.large)]
    found = {name: scored(model, *test) for name, model in models.items()}
    truth = np.array(test[1])
    good = [label for label in set(test[1]) if found["S1"]["right"][truth == label].mean() >= 0.9]
    among = np.isin(truth, good)
    for result in found.values():
        result["proficient"] = result["right"][among]
    return found


def summary(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return means over seeds, and paired bootstrap intervals of the gains over S1 on all test texts."""
    rows = {}
    for name in runs[0]:
        pooled = {key: np.concatenate([run[name][key] for run in runs]) for key in runs[0][name]}
        base = {key: np.concatenate([run["S1"][key] for run in runs]) for key in runs[0]["S1"]}
        gain = {key: mean_interval(pooled[key].astype(float) - base[key]) for key in ("right", "asked", "shunt")}
        forgetting = mean_interval(base["proficient"].astype(float) - pooled["proficient"])
        rows[name] = {
            "accuracy": float(pooled["right"].mean()),
            "deferral_rate": float(pooled["asked"].mean()),
            "shunt_accuracy": float(pooled["shunt"].mean()),
            "accuracy_gain": list(gain["right"]),
            "deferral_rate_change": list(gain["asked"]),
            "shunt_gain": list(gain["shunt"]),
            "forgetting": list(forgetting),
        }
    s1, s2 = rows["S1"], rows["our 2CD, with S1's training examples"]
    return {
        "s1_accuracy": s1["accuracy"],
        "s2_accuracy": s2["accuracy"],
        "s1_deferral_rate": s1["deferral_rate"],
        "s2_deferral_rate": s2["deferral_rate"],
        "shunt_accuracy_before": s1["shunt_accuracy"],
        "shunt_accuracy_after": s2["shunt_accuracy"],
        "forgetting": s2["forgetting"][0],
        "accuracy_gain_interval": s2["accuracy_gain"][1:],
        "deferral_rate_change_interval": s2["deferral_rate_change"][1:],
        "shunt_gain_interval": s2["shunt_gain"][1:],
        "forgetting_interval": s2["forgetting"][1:],
        "rows": rows,
    }


FLIPPED = (("none", 0.0), ("random", 0.1), ("random", 0.5), ("by label", 0.1), ("by label", 0.5))


def flipped(answers: list[str], asked: list[str], how: str, share: float, rng: np.random.Generator) -> list[str]:
    """Return answers with a share of the deferred ones replaced, each by a random label, or label by label."""
    names = sorted(set(asked))
    if how == "random":
        return [str(rng.choice(names)) if rng.random() < share else answer for answer in answers]
    instead: dict[str, str] = {}
    order = rng.permutation(names).tolist()
    for label, other in zip(order, order[1:] + order[:1], strict=True):
        if sum(asked.count(one) for one in instead) >= share * len(asked):
            break
        instead[label] = other
    return [instead.get(answer, answer) for answer in answers]


def gate_seed(task: BenchmarkTask, encoder: PrecomputedEmbeddings, seed: int) -> list[dict[str, Any]]:
    """Return the gate's decisions about candidates trained on partly replaced answers."""
    texts, labels = sample_per_label(task.train.texts, task.train.labels, GATE_PER_LABEL, seed)
    s1 = EmbeddingClassifier.train(texts, labels, settings=QUIET, embeddings=encoder)
    rng, found = np.random.default_rng(seed), []
    rows = rng.permutation(len(task.test))[: len(task.test) // 2].tolist()
    in_service: dict[str, SmallModel] = {"S1": s1}
    ours = TwoStageDistiller(DistillationSettings(training=QUIET))
    credulous = TwoStageDistiller(DistillationSettings(training=QUIET, mode="teacher", large_accuracy=0.99))
    texts_seen, own = [task.test.texts[i] for i in rows], [task.test.large[i] for i in rows]
    asked = [call.answer_label for call in records_of(s1, texts_seen, own) if call.answer_label is not None]
    for how, share in FLIPPED:
        records = records_of(s1, texts_seen, flipped(own, asked, how, share, rng))
        candidates: dict[str, SmallModel] = {
            "our 2CD": ours.distill(s1, records, labelled=(texts, labels)).model,
            "2CD that believes every answer": credulous.distill(s1, records, labelled=(texts, labels)).model,
            "plain fine-tuning": plain_fine_tuning(s1, records),
        }
        teacher = TeacherCheck().test(s1, records, task.dev.texts, task.dev.large)
        for old_name, old in in_service.items():
            for name, candidate in candidates.items():
                verdict = PromotionGate().test(old, candidate, task.dev.texts, task.dev.labels)
                found.append(
                    {
                        "candidate": name,
                        "how": how,
                        "flipped": share,
                        "in_service": old_name,
                        "gain": verdict.new_accuracy - verdict.old_accuracy,
                        "promoted_by_accuracy": verdict.passed,
                        "promoted": verdict.passed and teacher.passed,
                        "surprising": teacher.surprising,
                        "expected": teacher.expected,
                    }
                )
        if share == 0.0:
            in_service["S2"] = candidates["our 2CD"]
    return found


def gate_summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean gain and the number of promotions over the seeds."""
    return [
        {
            "candidate": same[0]["candidate"],
            "how": same[0]["how"],
            "flipped": same[0]["flipped"],
            "in_service": same[0]["in_service"],
            **{name: float(np.mean([run[name] for run in same])) for name in ("gain", "surprising", "expected")},
            "promoted_by_accuracy": sum(run["promoted_by_accuracy"] for run in same),
            "promoted": sum(run["promoted"] for run in same),
            "seeds": len(same),
        }
        for same in zip(*runs, strict=True)
    ]


def compared(task: BenchmarkTask, encoder: PrecomputedEmbeddings, seeds: int) -> dict[str, int]:
    """Count the logs that the teacher check rejects, unchanged and with 10% of the answers replaced at random."""
    refused, ours = {"logs": 0, "untouched": 0, "replaced": 0}, TwoStageDistiller(DistillationSettings(training=QUIET))
    for seed in range(seeds):
        for per_label in (PER_LABEL, GATE_PER_LABEL):
            texts, labels = sample_per_label(task.train.texts, task.train.labels, per_label, seed)
            small: SmallModel = EmbeddingClassifier.train(texts, labels, settings=QUIET, embeddings=encoder)
            rng = np.random.default_rng(seed)
            for half in np.array_split(rng.permutation(len(task.test)), 2):
                seen, own = ([column[i] for i in half.tolist()] for column in (task.test.texts, task.test.large))
                records = records_of(small, seen, own)
                asked = [call.answer_label for call in records if call.answer_label is not None]
                replaced = records_of(small, seen, flipped(own, asked, "random", 0.1, rng))
                for name, log in (("untouched", records), ("replaced", replaced)):
                    refused[name] += not TeacherCheck().test(small, log, task.dev.texts, task.dev.large).passed
                refused["logs"] += 1
                small = ours.distill(small, records, labelled=(texts, labels)).model
    return refused


def table(result: dict[str, Any]) -> str:
    lines = [
        "| model | accuracy alone | share asked | shunt | lost where S1 was good (points) |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        low, high = row["forgetting"][1:]
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f}% | {100 * row['deferral_rate']:.1f}% | "
            f"{100 * row['shunt_accuracy']:.1f}% | "
            f"{100 * row['forgetting'][0]:.1f} [{100 * low:.1f}, {100 * high:.1f}] |"
        )
    lines += [
        "",
        "| candidate | answers replaced | surprising | in service | gain (points) | by accuracy | promoted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["gate"]:
        replaced = f"{100 * row['flipped']:.0f}%, {row['how']}" if row["flipped"] else "none"
        lines.append(
            f"| {row['candidate']} | {replaced} | {100 * row['surprising']:.0f}% | {row['in_service']} | "
            f"{100 * row['gain']:+.1f} | {row['promoted_by_accuracy']} | {row['promoted']} of {row['seeds']} |"
        )
    told = result["compared"]
    lines += ["", f"Comparing answers: of {told['logs']} logs {told['untouched']} untouched ones are refused,"]
    lines += [f"and {told['replaced']} with 10% of the answers replaced."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    folder = banking77_folder()
    if folder is None:
        raise SystemExit("DATASHUNT_DATA_DIR does not contain banking77_gpt4. See docs/data.md.")
    task = load_banking77(folder)
    samples = [
        sample_per_label(task.train.texts, task.train.labels, count, seed)[0]
        for seed in range(options.seeds)
        for count in (PER_LABEL, GATE_PER_LABEL)
    ]
    known = [*task.test.texts, *task.dev.texts, *(text for sample in samples for text in sample)]
    encoder = PrecomputedEmbeddings(shared_encoder(), known)
    runs = [one_seed(task, encoder, seed) for seed in range(options.seeds)]
    gate = gate_summary([gate_seed(task, encoder, seed) for seed in range(options.seeds)])
    result = {"seeds": options.seeds, "data": task.source, **summary(runs), "gate": gate}
    result["compared"] = compared(task, encoder, options.seeds)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
