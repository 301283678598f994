"""Verbs on a finished run: `score`, `report`, `export`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import require_not_of_run
from qcrd_fast.utils.files import require_place, require_writable

from . import console
from .options import (
    FiniteRange,
    Verb,
    bad_row_option,
    config_option,
    device_option,
    dry_run_option,
    format_option,
    given_train_options,
    json_option,
    natural,
    split_by_option,
    task_option,
    train_options,
)

TRAINED_ALONE = ("loss", "augment", "folds", "calibration", "learning_rate", "batch_size", "pretrain_steps")


@click.command(cls=Verb)
@click.argument("run", required=False)
@click.option("--data", required=True, metavar="FILE", help="rows whose rationales are scored")
@click.option(
    "--quality",
    type=click.Choice(("vote", "text", "checks", "discriminator")),
    help="what scores: the votes of the rows, the votes and the text, both without a RUN, or a run's discriminator; "
    "default: "
    "discriminator",
)
@click.option(
    "--samples",
    metavar="FILE",
    help="with --quality vote or text: score these samples of a student against the votes of --data; any format that "
    "prepare "
    "reads, or a run's negatives/iteration-N.jsonl",
)
@click.option("--output", "-o", metavar="FILE", help="JSONL to write; default: standard output")
@click.option(
    "--sample-student",
    metavar="T,T",
    help="also score what the run's student says at these temperatures, such as 1.5,2.0, and keep the scores in the "
    "run "
    "folder, where report looks for them",
)
@click.option("--train", metavar="DIR", help="train a discriminator alone on --data, keep it in DIR, and score with it")
@click.option(
    "--held-out",
    type=FiniteRange(0, 0.9),
    metavar="FLOAT",
    default=0.2,
    show_default=True,
    help="with --train: share of the questions kept apart, which the AUC is of",
)
@train_options(only=["discriminator", *(f"discriminator_{name}" for name in TRAINED_ALONE)])
@split_by_option
@format_option
@task_option
@bad_row_option
@natural("--seed", default=0, help="seed of the training and the sampling")
@device_option
@config_option
@dry_run_option
@json_option
@click.pass_context
def score(
    ctx: click.Context,
    run: str | None,
    data: str,
    quality: str | None,
    samples: str | None,
    output: str | None,
    sample_student: str | None,
    train: str | None,
    held_out: float,
    seed: int,
    device: str,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score rationales: by the votes for their answers, or with a run's discriminator.

    \b
    qcrd-fast score --quality vote --data train.jsonl --json
    qcrd-fast score runs/one --data train.jsonl

    Each rationale of --data gets a "score" in (0, 1) beside it; AUC (95% interval over questions) and calibration of
    right against wrong ones, by the gold answer, are printed. The rows go to --output, else to standard output and the
    summary to standard error; with --json the summary alone goes to standard output.

    RUN is a run folder, a checkpoint, or a folder that --train wrote. With --train it is the student, a run or model,
    whose encoder (T5) or vocabulary the discriminator takes.
    """
    given = given_train_options(ctx)
    by_votes = quality in ("vote", "text", "checks")
    if not by_votes and run is None:
        raise InputError("score needs a RUN, whose discriminator scores, or --quality vote or text, which need none")
    if by_votes and (train or (run is not None and not sample_student) or (run is None and sample_student)):
        extra = "--train" if train else "a RUN without --sample-student" if run else "--sample-student without a RUN"
        raise InputError(f"--quality {quality} reads the votes of --data alone; it does not go with {extra}")
    if samples and not by_votes:
        raise InputError("--samples goes with --quality vote or text; of a run's own student: --sample-student")
    if given and not train:
        raise InputError(
            f"--{next(iter(given)).replace('_', '-')} is for --train; a run's discriminator is trained already"
        )
    if not train and ctx.get_parameter_source("held_out") is not click.core.ParameterSource.DEFAULT:
        raise InputError("--held-out is for --train, which trains a discriminator on the other questions")
    if train and sample_student:
        raise InputError("--sample-student needs a run; it does not go with --train")
    config = TrainConfig.from_dict({"discriminator_pretrain_steps": 500} | given | {"seed": seed, "device": device})
    temperatures = _temperatures(sample_student)
    if output:
        check_file(output, "--output", [data])
    for folder, option in ((train, "--train"), (run if temperatures else None, "--sample-student")):
        if folder:
            require_writable(Path(folder), option)
    options = {name: value for name, value in options.items() if not name.startswith("discriminator")}
    with console.quiet_stdout():
        from qcrd_fast import score as library
        from qcrd_fast.data import load as rows

        questions, skipped = library.load_rationales(data, seed=seed, **options)
        for bad in skipped:
            click.echo(f"set aside {bad}", err=True)
        scored: Sequence[Any] = ()
        summary: dict[str, Any]
        if dry_run:
            summary = library.plan(None if by_votes else run, questions, train, device)
        elif by_votes and not temperatures:
            scored, summary = library.score_by_votes(str(quality), questions, samples)
        elif train:
            summary = library.train_alone(str(run), questions, config, train, held_out)
            scored = library.score_questions(library.load_discriminator(train, device)[0], questions)
        else:
            scored, summary = library.score_run(
                str(run),
                questions,
                temperatures=temperatures,
                seed=seed,
                device=device,
                quality=quality or "discriminator",
            )
        if output and not dry_run:
            rows.write_prepared(output, scored)
    if dry_run or output or as_json:
        console.show(summary, as_json, summary_text(summary))
    else:
        for question in scored:
            row = question if isinstance(question, dict) else rows.to_row(question)
            click.echo(json.dumps(row, ensure_ascii=False))
        click.echo(summary_text(summary), err=True)


@click.command(cls=Verb)
@click.argument("runs", nargs=-1, metavar="RUN...")
@click.option("--output", "-o", required=True, metavar="FILE.html", help="page to write")
@click.option("--results", metavar="FILE.csv", help="also accuracy and time of the runs in this file")
@config_option
@dry_run_option
@json_option
def report(runs: tuple[str, ...], output: str, results: str | None, dry_run: bool, as_json: bool) -> None:
    """Write one HTML page about one or more runs.

    Losses, accuracy, accuracy against minutes, active hinges, throughput, quality-score densities, rationales side by
    side and a table of the runs, in a file that needs no network. Runs are only read, finished or not. The densities
    come from `score RUN --sample-student`; --results takes a CSV that `train --seeds` wrote, such as
    bench/results/runs.csv.
    """
    with console.quiet_stdout():
        from qcrd_fast.report.page import write_report

        summary = write_report(runs, output, results=results, dry_run=dry_run)
    lines = [f"{run['name']}: {run['state']}, {run['scores']} scores" for run in summary["runs"]]
    lines += [f"{results}: {summary['rows']} finished runs"] if results else []
    console.show(summary, as_json, "\n".join([*lines, f"{'would write' if dry_run else 'wrote'} {output}"]))


@click.command(cls=Verb)
@click.argument("run")
@click.option("--output", "-o", required=True, metavar="DIR", help="new folder for the model")
@click.option(
    "--checkpoint", metavar="NAME", help="such as checkpoint-100; default: the run's final one, else its latest"
)
@click.option(
    "--adapter", is_flag=True, help="of a run with --use-peft: the LoRA adapter alone, without its base model"
)
@click.option(
    "--push-to-hub",
    metavar="NAME",
    help="also upload it to this repository of the hub, OWNER/NAME or NAME; private, if it is new",
)
@click.option("--public", is_flag=True, help="with --push-to-hub: a repository that everybody can read")
@config_option
@dry_run_option
@json_option
def export(run: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write a run's model as a Hugging Face folder with a model card.

    The folder has weights, tokenizer, greedy generation settings, a chat template that sends the prompt of training,
    and a README.md with method, data, settings, figures and how to serve it. A LoRA adapter is merged.

    The token for the hub is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another server.
    """
    with console.quiet_stdout():
        from qcrd_fast.export import export_run

        summary = export_run(run, dry_run=dry_run, **options)
    console.show(summary, as_json, console.lines(summary))


def summary_text(summary: dict[str, Any]) -> str:
    """The figures of a summary, one a line, and the reliability table."""
    text = console.lines(summary)
    if table := summary.get("reliability"):
        text += "\nscore bin   n  mean score  share positive"
        for row in table:
            text += f"\n{row['low']:.1f}-{row['high']:.1f} {row['n']:6d}  {row['score']:10.3f}"
            text += f"  {row['share_positive']:14.3f}"
    return text


def _temperatures(text: str | None) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1.0]
    if any(not 0 < value < float("inf") for value in values):
        raise InputError(f"--sample-student expects temperatures above 0, such as 1.5,2.0; got {text!r}")
    return list(dict.fromkeys(values))


def check_file(output: str, option: str, inputs: Sequence[str] = ()) -> None:
    """Raises `InputError` naming `option` unless `output` can be a new file in a folder that exists."""
    require_place(Path(output), option)
    require_not_of_run(Path(output), option)
    if Path(output).resolve() in {Path(name).resolve() for name in inputs}:
        raise InputError(f"{option}: {output} is also an input; choose another name")
