"""`qcrd-fast select`."""

from __future__ import annotations

from typing import Any

import click

from qcrd_fast.select.options import ASK, IFD_FORMS, JUDGES, SelectOptions
from qcrd_fast.select.registry import SELECTORS, parse_names

from . import console
from .options import (
    FiniteRange,
    RareOption,
    Verb,
    bad_row_option,
    config_option,
    device_option,
    dry_run_option,
    format_option,
    help_all_option,
    json_option,
    natural,
    positive,
    task_option,
)
from .outputs import check_file

DEFAULTS = SelectOptions()


def score_options(command: Any) -> Any:
    """Decorator: the options of `SelectOptions`, for the verbs that score rows."""
    for option in reversed(
        (
            positive("--num-samples", default=DEFAULTS.num_samples, help="M: answers a question, of answer-entropy "
            "and known"),
            natural(
                "--num-continuations", default=DEFAULTS.num_continuations,
                help="of each prefix of an explanation, of step-uncertainty; 0: its intra part alone",
            ),
            click.option(
                "--inter-weight", type=FiniteRange(0), metavar="FLOAT", default=DEFAULTS.inter_weight,
                show_default=True,
                help="lambda: what the inter part of step-uncertainty is multiplied by",
            ),
            click.option(
                "--ifd-form", type=click.Choice(IFD_FORMS), default=DEFAULTS.ifd_form, show_default=True,
                help="ratio of losses (Cherry_LLM) or of perplexities (Superfiltering)",
            ),
            positive("--window", default=DEFAULTS.window, help="tokens before a step, of local-naturalness"),
            click.option(
                "--ask", type=click.Choice(ASK), default=DEFAULTS.ask, show_default=True,
                help="how the student is asked; auto: as it was trained; a plain model by its chat template, in words",
            ),
            click.option(
                "--quality", type=click.Choice(JUDGES), default=DEFAULTS.quality, show_default=True, help="the judge "
                "of quality"
            ),
            click.option(
                "--temperature", type=FiniteRange(0, min_open=True), metavar="FLOAT", default=DEFAULTS.temperature,
                show_default=True, help="of the samples", cls=RareOption,
            ),
            natural("--top-k", default=DEFAULTS.top_k, help="sample among the k likeliest tokens; 0: all",
            cls=RareOption),
            positive("--max-new-tokens", default=DEFAULTS.max_new_tokens, help="longest sample [tokens]",
            cls=RareOption),
            positive("--block-size", default=DEFAULTS.block_size, help="questions that are scored together",
            cls=RareOption),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=Verb)
@click.option("--data", required=True, metavar="FILE", help="rows to score")
@click.option(
    "--by", required=True, metavar="NAME,NAME", help="; ".join(f"{s.name}: {s.about}" for s in SELECTORS.values())
)
@click.option(
    "--student", metavar="NAME_OR_PATH", help="a run, a model folder or a hub id; not for random, agree and quality"
)
@positive("--top", help="keep the B rows to choose first", default=None, show_default=False)
@click.option("--drop-above", type=float, metavar="T", help="drop what scores above T: rationales, or questions")
@click.option(
    "--weight", is_flag=True, help="write a weight of mean 1 for each row, by its rank, that training multiplies by"
)
@click.option("--reverse", is_flag=True, help="with --top or --weight: the other end of the scores first")
@click.option("--output", "-o", required=True, metavar="FILE", help="JSONL to write")
@click.option(
    "--views",
    metavar="FILE",
    help="YAML table `view: text` of what a prompt says, as train's --views; a run brings its own",
    cls=RareOption,
)
@score_options
@format_option
@task_option
@bad_row_option
@natural("--seed", default=0, help="seed of everything random")
@device_option
@config_option
@dry_run_option
@json_option
@help_all_option
def select(
    data: str, by: str, student: str | None, top: int | None, drop_above: float | None, weight: bool, reverse: bool,
    output: str, views: str | None, format: str, task: str | None, on_bad_row: str, device: str, dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Score rows by what a student has to learn from them, and choose among them.

    \b
    qcrd-fast select --data train.jsonl --student runs/one --by step-uncertainty --top 100 --output chosen.jsonl
    qcrd-fast select --data train.jsonl --student runs/one --by ifd,known --output scored.jsonl

    Each row gets `scores: {NAME: number}`, each positive those that are of rationales. --top takes the highest scores
    first; of known, agree and the naturalness scores the lowest, of ifd none above 1. The same command goes on after a
    kill.
    """
    check_file(output, "--output", [data])
    settings = SelectOptions(**options)
    with console.quiet_stdout():
        from qcrd_fast.select.selection import Policy
        from qcrd_fast.select.selection import select as run

        policy = Policy(parse_names(by), top, drop_above, weight, reverse)
        summary = run(
            data, output, policy, settings, student=student, device=device, task=task, format=format,
            on_bad_row=on_bad_row, views=views,
            dry_run=dry_run,
        )  # fmt: skip
    console.show(summary, as_json, console.lines(summary))
