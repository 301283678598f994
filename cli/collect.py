"""`qcrd-fast collect`."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from qcrd_fast.collect.prompts import TEMPLATES
from qcrd_fast.errors import InputError

from . import console
from .options import (
    Verb,
    bad_row_option,
    config_option,
    device_option,
    dry_run_option,
    json_option,
    natural,
    positive,
    task_option,
)

_ENDPOINT_ONLY = (
    "concurrency", "timeout_s", "deadline_s", "grace_s", "max_failures", "price_input", "price_output", "max_cost",
    "max_requests", "extra_body", "allow_plain_http", "teacher_model",
)  # fmt: skip
_LOCAL_ONLY = ("device", "seed", "batch_size")
_SAMPLING = ("temperature", "max_tokens", "api")

_seconds = partial(click.option, type=click.FloatRange(0, min_open=True), metavar="SECONDS", show_default=True)
_amount = partial(click.option, type=click.FloatRange(0), metavar="FLOAT", show_default=True)


@click.command(cls=Verb)
@click.option("--questions", required=True, metavar="FILE", help="questions: JSONL, or whatever prepare reads")
@click.option("--output", "-o", required=True, metavar="FILE", help="samples to write; FILE.ledger.jsonl stands beside it")
@click.option("--teacher", required=True, metavar="URL|PATH|HUB_ID|replay:FILE", help="who answers")
@click.option("--teacher-model", default="", metavar="NAME", help="model of the endpoint; default: the one that it offers")
@click.option(
    "--api", type=click.Choice(("chat", "completions")), help="how to ask; default: chat, where a local model has a template"
)
@positive("--num-samples", default=5, help="samples of each question")
@_amount("--temperature", default=0.7, help="of the sampling")
@positive("--max-tokens", default=512, help="longest sample [tokens]")
@click.option(
    "--template",
    default="auto",
    show_default=True,
    metavar="NAME|FILE",
    help=f"auto, {', '.join(TEMPLATES)}, or a text file with {{question}}",
)
@task_option
@click.option("--split", metavar="NAME", help="only this split of the questions, such as train or test")
@bad_row_option
@positive("--concurrency", default=8, help="requests at a time")
@_seconds("--timeout", "timeout_s", default=180.0, help="of one request as a whole")
@_seconds("--deadline", "deadline_s", default=600.0, help="of one request with all its retries")
@_seconds("--grace", "grace_s", default=30.0, help="that requests in flight get when the collector is stopped")
@positive("--max-failures", default=10, help="questions given up in a row before all stops")
@_amount("--price-input", help="of a million prompt tokens")
@_amount("--price-output", help="of a million completion tokens")
@_amount("--max-cost", help="of this output over all runs; exit code 75 when reached")
@natural("--max-requests", default=None, help="of this output over all runs; exit code 75 when reached")
@click.option("--extra-body", metavar="JSON", help='more of a request, such as {"top_p": 0.9}; null takes a field out')
@click.option("--allow-plain-http", is_flag=True, help="send the key unencrypted to another machine")
@natural("--seed", default=0, help="of a local model's samples")
@positive("--batch-size", default=16, help="samples that a local model draws at a time")
@device_option
@config_option
@dry_run_option
@json_option
@click.pass_context
def collect(ctx: click.Context, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Sample a teacher: an OpenAI-compatible endpoint, a local model, or a file of earlier samples.

    The same command again goes on where it was stopped or killed. The key is read from OPENAI_API_KEY alone. The exit code
    is 0 when every question had its turn, also where samples are missing; the summary counts them.
    """
    from qcrd_fast.collect.collection import CollectSettings
    from qcrd_fast.collect.collector import collect as run

    options["extra_body"] = _extra_body(options["extra_body"])
    options["api"] = options["api"] or ""
    settings = CollectSettings(**options)
    refused: tuple[str, ...]
    if settings.is_url:
        kind, refused = "an endpoint", _LOCAL_ONLY
    elif settings.is_replay:
        kind, refused = "a replay", (*_ENDPOINT_ONLY, *_LOCAL_ONLY, *_SAMPLING)
    else:
        kind, refused = "a local model", _ENDPOINT_ONLY
    for param in ctx.command.params:
        name = str(param.name)
        if name in refused and ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            raise InputError(f"{param.opts[0]} has no meaning for {kind} ({options['teacher']})")
    with console.quiet_stdout():
        result, why = run(settings, dry_run=dry_run)
    console.show(result, as_json, _dry_run_text(result) if dry_run else _text(result))
    if why is not None:
        raise why


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_number) if text is not None else {}
    except ValueError as error:
        raise InputError(f"--extra-body: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError("--extra-body: a JSON object is expected")
    return value


def _text(result: dict[str, Any]) -> str:
    """One `name: value` line each; counted reasons side by side."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{reason} {count:,}" for reason, count in sorted(value.items())) or "none"
        elif isinstance(value, int):
            value = f"{value:,}"
        if value is not None:
            lines.append(f"{name.replace('_', ' ') + ':':<24}{value}")
    return "\n".join(lines)


def _dry_run_text(result: dict[str, Any]) -> str:
    asked = f"POST {result['url']}: {json.dumps(result['request'], ensure_ascii=False)}\n\n" if "url" in result else ""
    return f"{result['prompt']}\n---\n{asked}{_text(result['prediction'])}"
