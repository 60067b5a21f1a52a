"""The Typer application: options of each command, and errors as one line with exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from langchain_datashunt.cli.log import AsJson, JsonOut, log_app
from langchain_datashunt.cli.output import errors, report, say_json, write_json

app = typer.Typer(
    name="datashunt",
    help="A small local model answers what it is sure of; a large model answers the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(log_app, name="log")

DataFile = Annotated[Path, typer.Option("--data", help="CSV, JSONL or Parquet file.")]
TextColumn = Annotated[str, typer.Option("--text", help="Column with the text.")]
OBJECTIVES = "max-accuracy, match-large[=MARGIN], deferral=RATE, cost=USD_PER_1000 or risk=ALPHA."
MODELS = "auto, embedding, neighbours, ensemble, contrastive[:PATH_OR_ID], textcnn, lstm, or transformers[:PATH_OR_ID]."
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16, for a network's products in training.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder to save training in, and to go on from after a kill.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu for the small model; the first there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the bundle's own.")]
Engine = Annotated[str | None, typer.Option(help="auto, padding-free, plain, onnx or onnx-int8.")]
Log = Annotated[Path | None, typer.Option(help="Folder for metrics.json and TensorBoard's events.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options that stand before a command."""
    if version:
        from langchain_datashunt._version import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def train(
    data: DataFile,
    text: TextColumn,
    label: Annotated[str, typer.Option(help="Column with the label; labels are strings.")],
    model: Annotated[str, typer.Option(help=MODELS)],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    per_label: Annotated[int | None, typer.Option(min=2, help="Use so many examples a label at the most.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, splits and initial weights.")] = 0,
    validation: Annotated[Path | None, typer.Option(help="File to stop on; else a part is held out.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data at the most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of a network's training.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; chosen where not given.")] = None,
    time_budget: Annotated[
        float, typer.Option(min=1.0, help="Seconds for --model auto, which tries all kinds.")
    ] = 300.0,
    label_names_as_examples: Annotated[
        bool, typer.Option("--label-names-as-examples", help="Learn each label's own name, too.")
    ] = False,
    unlabelled: Annotated[
        Path | None, typer.Option(help="File with more texts of the kind, whose labels nobody knows; for contrastive.")
    ] = None,
    precision: Precision = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = 200,
    log: Log = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Train a small model on labelled texts and save it as a bundle."""
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
            summary, as_json, json_out, f"Trained {summary['kind']} on {summary['examples']} examples; bundle: {out}"
        )


@app.command()
def init(
    labels: Annotated[Path, typer.Option(help="File with the task's labels, one a line.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    first: Annotated[str, typer.Option(help="Kind of the first small model, which `datashunt distill` trains.")] = (
        "embedding"
    ),
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Make the bundle of a task that has no small model yet: with it everything is asked, and recorded by --store."""
    from langchain_datashunt.cli.init import cold_start_bundle

    with errors():
        summary = cold_start_bundle(labels, out, first)
        report(summary, as_json, json_out, f"{summary['labels']} labels and no model yet; bundle: {out}")


LargeLabel = Annotated[str | None, typer.Option("--large-label", help="Column with the large model's answer.")]
LargeCost = Annotated[str | None, typer.Option("--large-cost", help="Column with USD of asking, or a number.")]


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model; calibration is written into it.")],
    data: DataFile,
    text: TextColumn,
    label: Annotated[str, typer.Option(help="Column with the true label.")],
    objective: Annotated[str, typer.Option(help=OBJECTIVES)],
    large_label: LargeLabel = None,
    large_cost: LargeCost = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of a guarantee.")] = 0.95,
    fusion: Annotated[bool, typer.Option("--fusion", help="Answer with what both models say together.")] = False,
    unknown_labels: Annotated[
        str, typer.Option(help="True labels that the model lacks: raise, or count as wrong.")
    ] = "raise",
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Choose temperature and policy on labelled examples; exit status 1 where a guarantee cannot be shown."""
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
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own policy.")] = None,
    small_cost: Annotated[float, typer.Option(min=0.0, help="USD of one input on the small model.")] = 0.0,
    as_json: AsJson = False,
    json_out: JsonOut = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write an HTML report to this file.")] = None,
    texts: Annotated[bool, typer.Option(help="Show example texts in the report.")] = True,
) -> None:
    """Score a bundle's policy on recorded answers, without a call."""
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
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own policy, or 0.9.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Texts at the most.")] = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Compare a bundle's answers in a number format, or by an engine, with transformers' own in float32."""
    from langchain_datashunt.cli.compare_engines import compare_bundle

    given = {"device": device, "dtype": dtype, "engine": engine}
    computed = {name: value for name, value in given.items() if value is not None}
    with errors():
        found = compare_bundle(bundle, data, text, threshold=threshold, computed=computed, limit=limit)
        line = (
            f"{found['n']} texts: {100 * found['same_label']:.2f}% the same label, "
            f"{100 * found['same_route']:.2f}% the same route, {found['times_as_fast']:.1f} times as fast."
        )
        report(found, as_json, json_out, line)


@app.command("run")
def run_command(
    bundle: Annotated[Path, typer.Option(help="Folder of the small model.")],
    large: Annotated[str, typer.Option(help="openai:MODEL, or replay:FILE with recorded answers.")],
    data: DataFile,
    text: TextColumn,
    out: Annotated[Path, typer.Option(help="Answers, .jsonl or .csv; an unfinished one is continued.")],
    threshold: Annotated[float | None, typer.Option(help="Instead of the bundle's own, or 0.9.")] = None,
    pruning: Annotated[str, typer.Option(help="soft, top or none: what the prompt says of the small model.")] = "soft",
    on_large_error: Annotated[str, typer.Option(help="raise (the row gets an error) or small.")] = "raise",
    concurrency: Annotated[int, typer.Option(min=1, help="Large calls at once.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 512,
    store: Annotated[str | None, typer.Option(help="Record calls here (URL or file), to distil from.")] = None,
    task: Annotated[str, typer.Option(help="Name under which calls are recorded.")] = "default",
    retry_failed: Annotated[bool, typer.Option(help="Ask rows of OUT again that have an error and no answer.")] = False,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Stop when so many large calls failed one after the other; 0 never does.")
    ] = 100,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Answer every row of a file; exit status 1 where some rows could not be answered."""
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
        report(summary, as_json, json_out, f"{summary['rows']} rows; answers: {out}")
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
def demo(
    as_json: AsJson = False,
    json_out: JsonOut = None,
    download: Annotated[bool, typer.Option(help="Download Banking77 with GPT-4's answers first (1 MB).")] = False,
    large: Annotated[str | None, typer.Option(help="openai:MODEL to ask a real model (costs money).")] = None,
    per_label: Annotated[int, typer.Option(min=2, help="Training examples a label.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the training sample.")] = 0,
    limit: Annotated[int | None, typer.Option(min=20, help="Test texts at the most (200 for a real model).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("demo-output"),
) -> None:
    """Train a small model on a few labels, route real questions over real HTTP, and print what was gained."""
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
    store: Annotated[str, typer.Option(help="URL or file of the store of routed calls.")],
    holdout: Annotated[Path, typer.Option(help="Labelled file that nobody learns from: the gate's test.")],
    out: Annotated[Path, typer.Option(help="Folder of the model registry; made where it is not there.")],
    text: TextColumn = "text",
    label: Annotated[str, typer.Option(help="Column with the true label.")] = "label",
    large_label: Annotated[
        str | None,
        typer.Option(help="Column of HOLDOUT with the large model's answer: the log's answers are compared with it."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only records of this task.")] = None,
    mode: Annotated[str, typer.Option(help="posterior, teacher or paper.")] = "posterior",
    watch: Annotated[bool, typer.Option(help="Go on: distil whenever --every new answers are there.")] = False,
    every: Annotated[int, typer.Option(min=1, help="New answers after which a round is due.")] = 500,
    seed: Annotated[int, typer.Option(help="Of splits and the order of examples.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the records at the most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Of a network's training.")] = None,
    precision: Precision = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = 200,
    log: Log = None,
    as_json: AsJson = False,
    json_out: JsonOut = None,
) -> None:
    """Distil a new small model from the store; it is promoted where it passes the gate (exit status 1 where not).

    Run by `accelerate launch -m langchain_datashunt distill ...` or torchrun it trains on all their processes.
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
