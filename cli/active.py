"""`qcrd-fast active`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from qcrd_fast.active.options import REFUSED, TRAIN_DEFAULTS, ActiveConfig
from qcrd_fast.config import TrainConfig

from . import console
from .options import (
    Verb,
    config_option,
    config_options,
    dry_run_option,
    given_options,
    given_train_options,
    help_all_option,
    json_option,
    train_options,
)  # fmt: skip

# --teacher is whom active asks, not what `train` learns from
OWN = {field.name for field in dataclasses.fields(ActiveConfig)}
TRAINED = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name not in (*OWN, "teacher_logprobs"))

HIDDEN = ("reasoning_task", "validation_fraction", *REFUSED)
HELP = {
    "eval_data": "validation rows, needed: they say which round is the best, and when to stop",
    "test_data": "test rows, read once, at the end, for the best round",
    "method": "training objective of a round; opd, mentor-kd and gkd are not for active, whose teacher writes text",
    "resume": "auto: continue where the run was",
}


@click.command(cls=Verb)
@config_options(ActiveConfig)
@train_options(TRAIN_DEFAULTS, hidden=HIDDEN, only=TRAINED, help=HELP)
@config_option
@dry_run_option
@json_option
@help_all_option
@click.pass_context
def active(ctx: click.Context, dry_run: bool, as_json: bool, **_: Any) -> None:
    """Ask a teacher about the questions that pay most, train, and repeat.

    \b
    qcrd-fast active --pool pool.jsonl --student NAME_OR_PATH --teacher http://127.0.0.1:8000/v1 --teacher-model NAME \\
      --budget-tokens 200000 --eval-data dev.jsonl --test-data test.jsonl --max-steps 300 --output-dir runs/active

    Each round scores the questions that were not asked yet, has the teacher revise the student's explanations of the
    best ones, trains on all that was kept so far, and validates; --max-steps and the other options of train are those
    of a round. It ends, and says why, at the budget, when the teacher finds no fault, when validation is flat, or after
    --rounds.
    """
    from qcrd_fast.utils.torchrun import only_process

    only_process("active")
    config = ActiveConfig(**given_options(ctx, ActiveConfig))
    options = given_train_options(ctx)
    with console.quiet_stdout():
        from qcrd_fast.active.loop import run_active

        results = run_active(config, options, dry_run=dry_run)
    console.show(results, as_json, f"{results['prompt']}\n---\n{_lines(results)}" if dry_run else _lines(results))


def _lines(results: dict[str, Any]) -> str:
    return console.lines({name: value for name, value in results.items() if name != "prompt"})
