"""`qcrd-fast score-teacher`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import require_writable

from . import console
from .options import (
    Verb,
    bad_row_option,
    config_option,
    device_option,
    dry_run_option,
    json_option,
    positive,
    task_option,
)

_above_0 = partial(click.option, type=click.FloatRange(0, min_open=True), metavar="FLOAT", show_default=True)


@click.command("score-teacher", cls=Verb)
@click.option("--data", required=True, metavar="FILE", help="rows whose labels and positive rationales are scored")
@click.option(
    "--teacher", required=True, metavar="PATH|HUB_ID|URL", help="a model, a run, or a server that scores prompts"
)
@click.option(
    "--teacher-model", default="", metavar="NAME", help="model of the server; default: the one that it offers"
)
@positive("--top-logprobs", default=16, help="K: likeliest tokens that are kept at each place")
@click.option(
    "--output", "-o", required=True, metavar="DIR", help="folder to write; train reads it as --teacher-logprobs"
)
@click.option(
    "--student",
    metavar="NAME_OR_PATH",
    help="whose tokens are scored: needed with a URL; with a model it is checked that both have the same tokens",
)
@_above_0("--temperature", default=1.0, help="of the distribution that is kept, as train's --kd-temperature")
@click.option(
    "--prompt-template",
    default="raw",
    show_default=True,
    metavar="raw|chat|FILE",
    help="how the teacher is prompted; a run of qcrd-fast by the prompts of its training",
)
@click.option("--system-prompt", metavar="TEXT|FILE", help="system message of the chat template")
@click.option("--views", metavar="FILE", help="YAML table `view: text` of what a prompt says, as train's --views")
@positive("--max-source-length", default=1024, help="tokens kept of a prompt: the last ones")
@positive("--max-target-length", default=256, help="tokens kept of a rationale or label; as in the training")
@click.option(
    "--label",
    type=click.Choice(("gold", "majority")),
    help="which label is scored; default: gold where known, else majority",
)
@task_option
@bad_row_option
@positive("--batch-size", default=16, help="texts that are scored at a time")
@positive("--concurrency", default=8, help="requests at a time, of a server")
@device_option
@config_option
@dry_run_option
@json_option
def score_teacher(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Keep a teacher's log-probs of rows that one already has: at each token the K likeliest, for
    `train --method mentor-kd`.

    \b
    qcrd-fast score-teacher --data train.jsonl --teacher runs/mentor --top-logprobs 16 --output train.logprobs
    qcrd-fast train --data train.jsonl --student NAME --method mentor-kd --teacher-logprobs train.logprobs --output-dir
    runs/kd

    The same command again goes on where it was stopped or killed.
    """
    from pathlib import Path

    output = Path(options["output"])
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; name a folder")
    require_writable(output, "--output")
    with console.quiet_stdout():
        from qcrd_fast.teacher_signal.score import ScoreSettings
        from qcrd_fast.teacher_signal.score import score_teacher as run

        result, why = run(ScoreSettings(**options), dry_run=dry_run)
    console.show(result, as_json, console.lines(result))
    if why is not None:
        raise why
