"""qcrd-fast VERB: click options -> config -> library. Each verb imports what it needs, so that help is instant."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from qcrd_fast.config import METHODS, TrainConfig
from qcrd_fast.demo.runner import DEFAULTS as DEMO_DEFAULTS
from qcrd_fast.demo.runner import run_demo
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import RunFolder
from qcrd_fast.utils.torchrun import only_process, rank
from qcrd_fast.version import __version__

from . import console
from .active import active
from .bench import bench
from .collect import collect
from .options import (
    CONFIG_PATH,
    FiniteRange,
    Group,
    RareOption,
    Verb,
    bad_row_option,
    config_option,
    device_option,
    dry_run_option,
    given_train_options,
    help_all_option,
    input_options,
    json_option,
    natural,
    positive,
    reading_options,
    reasoning_option,
    split_by_option,
    task_option,
    train_options,
)
from .outputs import check_file, export, report, score
from .score_teacher import score_teacher
from .select import select


def entry(args: list[str] | None = None) -> int:
    """Console command. Returns 0, 1 (failed), 2 (usage or data), 75 (resumable), 130 (SIGINT), 143 (SIGTERM)."""
    return console.run(lambda: cli.main(args, prog_name="qcrd-fast", standalone_mode=False))


@click.group(
    cls=Group,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="qcrd-fast")
def cli() -> None:
    """Distil a teacher's rationales into a small language model: quality-guided contrastive rationale distillation
    (QCRD).

    Results go to stdout, logs to stderr. Exit codes: 0; 1 failed while running; 2 usage, config or data; 75 stopped but
    resumable; 130 interrupted; 143 terminated. In option names, - and _ are the same.
    """


for command in (active, bench, collect, export, report, score, score_teacher, select):
    cli.add_command(command)


@cli.command(cls=Verb)
@train_options(DEMO_DEFAULTS, hidden=("data", "test_data", "student"))
@click.option(
    "--compare", type=click.Choice(METHODS), metavar="METHOD", help="also train by this method, in DIR/compare/METHOD"
)
@config_option
@dry_run_option
@json_option
@help_all_option
@click.pass_context
def demo(ctx: click.Context, dry_run: bool, as_json: bool, compare: str | None, **_: Any) -> None:
    """Train the built-in student on built-in data.

    Minutes on a CPU. Takes train's options but for the data and the student, with defaults of its own.
    """
    from qcrd_fast.demo.comparison import summary_text

    only_process("demo")
    options = given_train_options(ctx)
    output_dir = options.pop("output_dir", None)
    if not output_dir:
        raise InputError("demo needs --output-dir DIR, the run folder to write")
    with console.quiet_stdout():
        results = run_demo(options, output_dir, compare=compare, dry_run=dry_run)
    text = console.lines(results)
    console.show(results, as_json, text if dry_run else f"{text}\n\n{summary_text(results, output_dir)}")


@cli.command(cls=Verb)
@json_option
def doctor(as_json: bool) -> None:
    """Versions, GPU, and which kernels will run and why."""
    from qcrd_fast.doctor import as_text, examine

    with console.quiet_stdout():
        report = examine()
    console.show(report, as_json, as_text(report))


@cli.command(cls=Verb)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", "-o", required=True, metavar="FILE", help="prepared JSONL to write")
@input_options
@split_by_option
@task_option
@bad_row_option
@natural("--seed", default=0, help="seed of ties and splits")
@reading_options
@config_option
@dry_run_option
@json_option
def prepare(
    inputs: tuple[str, ...], output: str, dry_run: bool, as_json: bool, show: int, inspect: str | None, **options: Any
) -> None:
    """Turn a teacher's samples into training rows.

    Pools the samples of each question, votes, and splits them into positives and negatives. INPUT is JSONL, JSON, CSV,
    TSV or parquet, also in gzip; a `datasets` folder or OWNER/NAME of the hub; or a folder of Distilling Step-by-Step.
    Its format is told by its keys and named on the first line.
    """
    from qcrd_fast.data import load
    from qcrd_fast.data.input_report import keys_text
    from qcrd_fast.data.inspection import Inspection
    from qcrd_fast.data.replies import Reader

    check_file(output, "--output", inputs)
    if inspect is not None:
        check_file(inspect, "--inspect", (*inputs, output))
    names = ("thinking", "decimal", "tolerance", "answer_regex", "answer_reader")
    reader = Reader.from_options(**{name: options.pop(name) for name in names})
    inspection = Inspection(reader, show=show, page=inspect is not None)
    try:
        with console.quiet_stdout():
            summary, skipped = load.prepare(
                inputs, output, dry_run=dry_run, reader=reader, watch=inspection.add, **options
            )
        for line in summary.taken:
            click.echo(line, err=as_json)
    except InputError:
        for warning in inspection.warnings:
            click.echo(f"warning: {warning}", err=True)
        raise
    finally:  # also where nothing could be read: then it says why
        if show and inspection.text:
            click.echo(inspection.text, err=as_json)
        if inspect is not None and not dry_run:
            inspection.write(inspect)
    if not summary.positives and summary.samples:
        click.echo(
            "warning: no sample of a majority has a rationale: these rows teach answers, no rationales", err=True
        )
    for warning in (*filter(None, [keys_text(summary.keys_not_read)]), *summary.warnings, *inspection.warnings):
        click.echo(f"warning: {warning}", err=True)
    for row in skipped:
        click.echo(f"set aside {row}", err=True)
    if summary.skipped_rows > len(skipped):
        click.echo(f"set aside {summary.skipped_rows - len(skipped):,} more", err=True)
    console.show(summary.to_dict(), as_json, summary.text())


@cli.command(cls=Verb)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@input_options
@config_option
@click.pass_context
def validate(ctx: click.Context, files: tuple[str, ...], **options: Any) -> None:
    """Print every bad row, as FILE:LINE: REASON.

    What each file was taken for goes to standard error. The exit code is 2 if there is any bad row.
    """
    from qcrd_fast.data import load
    from qcrd_fast.data.input_report import keys_not_read, keys_text

    bad_rows = bad_files = 0
    reports: list[Any] = []
    for path in files:
        try:
            for row in load.validate_file(path, reports=reports, **options):
                bad_rows += 1
                click.echo(str(row))
        except InputError as error:  # the file as a whole; the others are still looked at
            bad_files += 1
            click.echo(f"qcrd-fast: {error}", err=True)
    for line in (*(found.text for found in reports), *filter(None, [keys_text(keys_not_read(reports))])):
        click.echo(line, err=True)
    click.echo(f"bad rows: {bad_rows}; files read: {len(files) - bad_files} of {len(files)}", err=True)
    ctx.exit(2 if bad_rows or bad_files else 0)


@cli.command(cls=Verb)
@train_options()
@click.option("--seeds", metavar="N|A,B,C", help="several runs: N seeds from 0, or these; each in OUTPUT_DIR/seed-S")
@click.option("--methods", metavar="NAMES", help="several runs: each of these methods, in OUTPUT_DIR/METHOD/seed-S")
@positive("--parallel", default=1, help="of several runs, how many at a time", cls=RareOption)
@click.option(
    "--results",
    cls=RareOption,
    metavar="FILE.csv",
    help="CSV that several runs add a row each to; default: bench/results/runs.csv, or OUTPUT_DIR/runs.csv outside a "
    "checkout",
)
@config_option
@dry_run_option
@json_option
@help_all_option
@click.pass_context
def train(
    ctx: click.Context,
    dry_run: bool,
    as_json: bool,
    seeds: str | None,
    methods: str | None,
    parallel: int,
    results: str | None,
    **_: Any,
) -> None:
    """Train a student and write a run folder.

    \b
    qcrd-fast train --data train.jsonl --student NAME_OR_PATH --output-dir runs/one
    qcrd-fast train --config recipes/svamp-smollm2.yaml --methods dss,qcrd --seeds 5

    Several runs: finished ones are skipped and begun ones resumed, so the same command continues after a stop.
    """
    config = TrainConfig.from_dict(given_train_options(ctx))
    if not config.data:
        raise InputError(
            "train needs --data FILE; without data of your own, try `qcrd-fast demo --output-dir runs/demo`"
        )
    if not config.student:
        raise InputError("train needs --student, a local folder or hub id")
    if not config.output_dir:
        raise InputError("train needs --output-dir DIR, the run folder to write")
    if seeds is not None or methods is not None:
        only_process("train --seeds or --methods")
        several(ctx, config, seeds, methods, parallel, results, dry_run, as_json)
        return
    if results or parallel > 1:
        raise InputError(
            f"--{'results' if results else 'parallel'} is for several runs; it goes with --seeds or --methods"
        )
    with console.quiet_stdout():
        from qcrd_fast.train import preflight

        preflight.check_start(
            config, dry_run=dry_run, names=dry_run
        )  # what can be wrong is looked for first, and torch is loaded last
        with contextlib.nullcontext() if dry_run else RunFolder(config) as run:
            from qcrd_fast.train.questions import Data

            data = Data.load(config)
            preflight.check_names(config)
            from qcrd_fast.train.trainer import train

            told = train(config, run, dry_run=dry_run, data=data)
    if rank() == 0:
        console.show(told, as_json, console.plan_lines(told) if dry_run else _results_text(told, config))


def _results_text(results: dict[str, Any], config: TrainConfig) -> str:
    """Format the results of a finished run, and the next commands."""
    from qcrd_fast.train.run_text import summary_text

    return f"{console.lines(results)}\n\n{summary_text(results, config)}"


def several(
    ctx: click.Context,
    config: TrainConfig,
    seeds: str | None,
    methods: str | None,
    parallel: int,
    results: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run `train` with --seeds or --methods; print a line a run and accuracies with intervals."""
    from qcrd_fast.sweep import runner as library
    from qcrd_fast.sweep.results_csv import as_text, check_csv

    if config.resume not in (None, "auto"):
        raise InputError(
            f"--resume {config.resume} is for one run; of several, each continues from its own latest checkpoint"
        )
    for option, one in (("seeds", "seed"), ("methods", "method")):
        if ctx.params[option] and ctx.get_parameter_source(one) is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"--{option} and --{one} are given; one of them says what to run")
    of_seeds = library.parse_seeds(seeds) if seeds is not None else (config.seed,)
    of_methods = library.parse_methods(methods) if methods is not None else (config.method,)
    recipe = library.recipe_name(ctx.meta.get(CONFIG_PATH), config)
    with console.quiet_stdout():
        jobs = library.plan(config, of_seeds, of_methods, recipe)
        if dry_run:
            if results is not None:
                check_csv(Path(results))
            rows = [{"run": str(job.folder), "state": job.state} for job in jobs]
            text = "\n".join(f"{row['run']}  {row['state']}" for row in rows)
        else:
            rows = library.run_jobs(jobs, results or library.default_csv(config), parallel=parallel)
            text = as_text(rows)
    console.show(rows, as_json, text)


@cli.command("eval", cls=Verb)
@click.argument("run_or_model")
@click.option("--data", required=True, metavar="FILE", help="rows to answer")
@click.option(
    "--output",
    metavar="DIR",
    help="folder for predictions.jsonl; default: eval-DATA in the run folder, else this folder",
)
@task_option
@positive("--batch-size", default=64, help="questions of a batch")
@positive("--max-answer-tokens", default=48, help="longest answer [tokens]")
@reasoning_option
@click.option(
    "--zero-shot",
    is_flag=True,
    help="ask the base model of the run, or the model, by its own chat template: the baseline",
)
@device_option
@bad_row_option
@config_option
@dry_run_option
@json_option
def evaluate(run_or_model: str, data: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Answer questions greedily and print the accuracy.

    RUN_OR_MODEL is a run folder, a model folder or a hub id. The answers go to predictions.jsonl; that of the run
    itself, which belongs to its eval_results.json, is left alone.
    """
    with console.quiet_stdout():
        if dry_run:
            from qcrd_fast.evaluate import plan_answers

            wanted = ("output", "task", "on_bad_row", "reasoning", "zero_shot", "device")
            results = plan_answers(run_or_model, data, **{name: options[name] for name in wanted})
        else:
            from qcrd_fast.evaluate import evaluate_run

            results = evaluate_run(run_or_model, data, **options)
    console.show(results, as_json, console.lines(results))


@cli.command(cls=Verb)
@click.argument("run_or_model")
@click.argument("question")
@click.option("--temperature", type=FiniteRange(0), metavar="FLOAT", default=0.0, show_default=True, help="0: greedy")
@positive("--num-samples", default=1, help="rationales to sample")
@natural("--seed", default=0, help="seed of the sampling")
@positive("--max-new-tokens", default=256, help="longest rationale [tokens]")
@click.option("--view", metavar="NAME", help="ask for a rationale of this view, as rows with a `view` do")
@reasoning_option
@device_option
@config_option
@json_option
def generate(run_or_model: str, question: str, as_json: bool, **options: Any) -> None:
    """Print the rationale and the answer to a question.

    RUN_OR_MODEL is a run folder, a model folder or a hub id; QUESTION may be -, for standard input.
    """
    try:
        if question == "-":
            with click.open_file("-", encoding="utf-8") as stdin:
                question = stdin.read().strip()
        question.encode("utf-8")
    except UnicodeError as error:
        raise InputError(f"the question is not UTF-8 text: {error}") from error
    if not question.strip():
        raise InputError("the question is empty")
    from qcrd_fast.evaluate import generate_text

    with console.quiet_stdout():
        samples = generate_text(run_or_model, question, **options)
    console.show(samples, as_json, "\n\n".join(f"Rationale: {s['rationale']}\nAnswer: {s['answer']}" for s in samples))
