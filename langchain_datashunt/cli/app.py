"""Typer application: the options of each command, with errors printed as one line and exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from langchain_datashunt.cli.log import AsJson, JsonOut, log_app
from langchain_datashunt.cli.output import errors, report, say_json, write_json

app = typer.Typer(
    name="datashunt",
    help="Route each request to a small local classifier when it is confident, and to an LLM when it is not.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(log_app, name="log")

DataFile = Annotated[Path, typer.Option("--data", help="CSV, JSONL or Parquet file.")]
TextColumn = Annotated[str, typer.Option("--text", help="Column with the text.")]
OBJECTIVES = "max-accuracy, match-large[=MARGIN], deferral=RATE, cost=USD_PER_1000 or risk=ALPHA."
MODELS = (
    "Kind of small model: auto, embedding, neighbours, ensemble, contrastive[:PATH_OR_ID], textcnn, lstm, or "
    "transformers[:PATH_OR_ID]."
)
Precision = Annotated[
    str | None, typer.Option(help="Precision of matrix products in network training: float32 or bfloat16.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder for training checkpoints, from which training resumes.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Training steps between two checkpoints.")]
Device = Annotated[
    str | None, typer.Option(help="Device of the small model: cuda, mps or cpu. Default: the first available.")
]
Dtype = Annotated[str | None, typer.Option(help="Precision: float32, bfloat16 or float16. Default: the bundle's own.")]
Engine = Annotated[str | None, typer.Option(help="Inference engine: auto, padding-free, plain, onnx or onnx-int8.")]
Log = Annotated[Path | None, typer.Option(help="Folder for metrics.json and TensorBoard events.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Handle the options that precede a command."""
    if version:
        from langchain_datashunt._version import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def train(
    data: DataFile,
    text: TextColumn,
    label: Annotated[str, typer.Option(help="Column with the label, read as a string.")],
    model: Annotated[str, typer.Option(help=MODELS)],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    per_label: Annotated[int | None, typer.Option(min=2, help="Maximum training examples per label.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, splits and initial weights.")] = 0,
    validation: Annotated[
        Path | None, typer.Option(help="Labelled file for early stopping. Default: a held-out part of the data.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Maximum passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate of network training.")] = None,
    device: Annotated[str | None, typer.Option(help="Device: cuda, mps or cpu. Default: chosen automatically.")] = None,
    time_budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds for --model auto, which tries all kinds.")
    ] = 300.0,
    label_names_as_examples: Annotated[
        bool, typer.Option("--label-names-as-examples", help="Also train on each label's name.")
    ] = False,
    unlabelled: Annotated[
        Path | None, typer.Option(help="File with additional texts without labels, for --model contrastive.")
    ] = None,
    precision: Precision = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = 200,
    log: Log = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Train a small model on labelled texts, and save it as a bundle."""
    from langchain_datashunt.cli.train import train_bundle

    with errors():
        summary = train_bundle(
            data, text, label, model, out,
            per_label=per_label, validation=validation, device=device, label_names_as_examples=label_names_as_examples,
            unlabelled=unlabelled, time_budget=time_budget,
            settings={
                "seed": seed, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
                "precision": precision, "checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "log": log,
            },
        )  # fmt: skip
        report(
            summary, as_json, json_out, f"Trained {summary['kind']} on {summary['examples']} examples. Bundle: {out}"
        )


@app.command()
def init(
    labels: Annotated[Path, typer.Option(help="File with the task's labels, one per line.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    first: Annotated[str, typer.Option(help="Kind of the first small model, which `datashunt distill` trains.")] = (
        "embedding"
    ),
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Create a bundle for a task without a small model.

    `datashunt run` defers every request with it, and logs the answers if --store is given.
    """
    from langchain_datashunt.cli.init import cold_start_bundle

    with errors():
        summary = cold_start_bundle(labels, out, first)
        report(summary, as_json, json_out, f"Cold-start bundle for {summary['labels']} labels: {out}")


LargeLabel = Annotated[str | None, typer.Option("--large-label", help="Column with the large model's answer.")]
LargeCost = Annotated[
    str | None, typer.Option("--large-cost", help="Column with the USD cost of an LLM call, or a number.")
]


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model. The calibration is saved in it.")],
    data: DataFile,
    text: TextColumn,
    label: Annotated[str, typer.Option(help="Column with the true label.")],
    objective: Annotated[str, typer.Option(help=OBJECTIVES)],
    large_label: LargeLabel = None,
    large_cost: LargeCost = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Confidence level of a guarantee.")] = 0.95,
    fusion: Annotated[bool, typer.Option("--fusion", help="Combine the predictions of both models.")] = False,
    unknown_labels: Annotated[
        str, typer.Option(help="True labels that the model lacks: raise an error, or count them as wrong.")
    ] = "raise",
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Choose the temperature and the policy on labelled examples.

    Exits with status 1 if a guarantee cannot be shown.
    """
    from langchain_datashunt.cli.calibrate import LabelledFile, calibrate_bundle

    with errors():
        file = LabelledFile(data, text, label, large_label, large_cost)
        summary = calibrate_bundle(
            bundle, file, objective, confidence=confidence, fusion=fusion, unknown_labels=unknown_labels
        )
        line = f"{summary['policy']} defers {100 * summary['deferral_rate']:.1f}%. {summary['guarantee']}"
        report(summary, as_json, json_out, line)
    if not summary["proven"]:
        raise typer.Exit(1)


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model.")],
    data: DataFile,
    text: TextColumn,
    label: Annotated[str, typer.Option(help="Column with the true label.")],
    large_label: LargeLabel = None,
    large_cost: LargeCost = None,
    threshold: Annotated[
        float | None, typer.Option(help="Confidence threshold. Default: the bundle's own policy.")
    ] = None,
    small_cost: Annotated[float, typer.Option(min=0.0, help="USD per input of the small model.")] = 0.0,
    as_json: AsJson = False,
    json_out: JsonOut = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write an HTML report to this file.")] = None,
    texts: Annotated[bool, typer.Option(help="Show example texts in the report.")] = True,
) -> None:
    """Evaluate a bundle's policy on recorded answers, without LLM calls."""
    from langchain_datashunt.cli.calibrate import LabelledFile, evaluate_bundle

    with errors():
        file = LabelledFile(data, text, label, large_label, large_cost)
        found, read = evaluate_bundle(bundle, file, threshold=threshold, small_cost=small_cost)
        figures = found.to_dict()
        if report_file is not None:
            from langchain_datashunt.evaluation.report import write_report

            write_report(report_file, found, title=f"{bundle.name} on {data.name}", texts=read if texts else None)
        report(figures, as_json, json_out, f"{found.n} examples, policy {found.policy}")


@app.command("compare-engines")
def compare_engines(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model.")],
    data: DataFile,
    text: TextColumn,
    engine: Engine = None,
    dtype: Dtype = None,
    device: Device = None,
    threshold: Annotated[
        float | None, typer.Option(help="Confidence threshold. Default: the bundle's own policy, or 0.9.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of texts.")] = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Compare a bundle's answers in another precision or engine with those of Transformers in float32."""
    from langchain_datashunt.cli.compare_engines import compare_bundle

    given = {"device": device, "dtype": dtype, "engine": engine}
    computed = {name: value for name, value in given.items() if value is not None}
    with errors():
        found = compare_bundle(bundle, data, text, threshold=threshold, computed=computed, limit=limit)
        line = (
            f"{found['n']} texts: same label for {100 * found['same_label']:.2f}%, "
            f"same route for {100 * found['same_route']:.2f}%, {found['times_as_fast']:.1f} times as fast."
        )
        report(found, as_json, json_out, line)


@app.command("run")
def run_command(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model.")],
    large: Annotated[str, typer.Option(help="openai:MODEL, or replay:FILE with recorded answers.")],
    data: DataFile,
    text: TextColumn,
    out: Annotated[Path, typer.Option(help="Answers, .jsonl or .csv. An unfinished file is resumed.")],
    threshold: Annotated[
        float | None, typer.Option(help="Confidence threshold. Default: the bundle's own policy, or 0.9.")
    ] = None,
    pruning: Annotated[str, typer.Option(help="Prompt Pruning strategy: soft, top or none.")] = "soft",
    on_large_error: Annotated[
        str, typer.Option(help="If the LLM call fails: raise (error in the row) or small (local answer).")
    ] = "raise",
    concurrency: Annotated[int, typer.Option(min=1, help="Maximum concurrent LLM calls.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 512,
    store: Annotated[
        str | None, typer.Option(help="Call log (URL or file) to record calls in for distillation.")
    ] = None,
    task: Annotated[str, typer.Option(help="Task name of the recorded calls.")] = "default",
    retry_failed: Annotated[bool, typer.Option(help="Retry the rows of OUT that have an error and no answer.")] = False,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Maximum consecutive LLM failures before the run stops; 0 means unlimited.")
    ] = 100,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Answer every row of a file.

    Exits with status 1 if some rows could not be answered.
    """
    from langchain_datashunt.cli.run import run_file

    given = {"device": device, "dtype": dtype, "engine": engine}
    with errors():
        summary = run_file(
            bundle, large, data, text, out,
            threshold=threshold, pruning=pruning, on_large_error=on_large_error,
            concurrency=concurrency, chunk=chunk, store=store, task=task,
            retry_failed=retry_failed, max_failures=max_failures,
            computed={name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
        report(summary, as_json, json_out, f"{summary['rows']} rows in total. Answers: {out}")
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    as_json: AsJson = False,
    json_out: JsonOut = None,
    download: Annotated[
        bool, typer.Option(help="Download Banking77 with recorded GPT-4 answers first (1 MB).")
    ] = False,
    large: Annotated[str | None, typer.Option(help="openai:MODEL to call a real LLM (costs money).")] = None,
    per_label: Annotated[int, typer.Option(min=2, help="Training examples per label.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the training sample.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=20, help="Maximum test texts. Default: all, or 200 for a real LLM.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundle and the call log.")] = Path("demo-output"),
) -> None:
    """Train a small model on a few examples, route test questions over HTTP, and print accuracy and cost."""
    from langchain_datashunt.cli.demo.command import run_demo
    from langchain_datashunt.cli.demo.table import print_figures

    with errors():
        figures = run_demo(large=large, per_label=per_label, seed=seed, limit=limit, out=out, download=download)
        if as_json:
            say_json(figures)
        else:
            print_figures(figures)
        write_json(json_out, figures)


@app.command()
def distill(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model S1.")],
    store: Annotated[str, typer.Option(help="URL or file of the call log.")],
    holdout: Annotated[Path, typer.Option(help="Labelled file for the promotion gate, never trained on.")],
    out: Annotated[Path, typer.Option(help="Folder of the model registry, created if missing.")],
    text: TextColumn = "text",
    label: Annotated[str, typer.Option(help="Column with the true label.")] = "label",
    large_label: Annotated[
        str | None,
        typer.Option(help="Column of HOLDOUT with the large model's answer, compared with the logged answers."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only records of this task.")] = None,
    mode: Annotated[str, typer.Option(help="Training target of stage A: posterior, teacher or paper.")] = "posterior",
    watch: Annotated[bool, typer.Option(help="Keep running, and distil after --every new answers.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Number of new answers that makes a round due.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of splits and of the order of examples.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Maximum passes over the records.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate of network training.")] = None,
    precision: Precision = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = 200,
    log: Log = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Distil a new small model from the call log, and promote it if it passes the gate.

    Exits with status 1 if the gate rejects it. With `accelerate launch -m langchain_datashunt distill ...` or torchrun,
    training runs on all processes.
    """
    from langchain_datashunt.cli.distill import DistillTask, distill_bundle, watch_store
    from langchain_datashunt.small_models.training.processes import processes

    training = {
        "seed": seed, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "precision": precision, "checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "log": log,
    }  # fmt: skip
    asked = DistillTask(bundle, store, holdout, out, text, label, task, mode, training, large_label)
    if watch:
        with errors():
            watch_store(asked, every)
        return
    with errors():
        summary = distill_bundle(asked)
        if processes().first:
            promoted = "promoted" if summary["promoted"] else "rejected"
            report(summary, as_json, json_out, f"Version {summary['version']}: {promoted}")
    if not summary["promoted"]:
        raise typer.Exit(1)
