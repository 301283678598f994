"""`qcrd-fast collect`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qcrd_fast.collect.credentials import read_pairs
from qcrd_fast.collect.prompts import TEMPLATES
from qcrd_fast.data.thinking import THINKING
from qcrd_fast.errors import InputError
from qcrd_fast.utils.redact import redact

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
    "max_requests", "extra_body", "header", "query", "allow_plain_http", "teacher_model",
)  # fmt: skip
_LOCAL_ONLY = ("device", "seed", "batch_size")
_LOGPROBS = ("top_logprobs", "student")
_SAMPLING = ("temperature", "max_tokens", "api", "system_prompt")

_seconds = partial(click.option, type=click.FloatRange(0, min_open=True), metavar="SECONDS", show_default=True)
_amount = partial(click.option, type=click.FloatRange(0), metavar="FLOAT", show_default=True)


@click.command(cls=Verb)
@click.option("--questions", required=True, metavar="FILE", help="questions: JSONL, or whatever prepare reads")
@click.option(
    "--output", "-o", required=True, metavar="FILE", help="samples to write; FILE.ledger.jsonl stands beside it"
)
@click.option("--teacher", required=True, metavar="URL|PATH|HUB_ID|replay:FILE", help="who answers")
@click.option(
    "--teacher-model", default="", metavar="NAME", help="model of the endpoint; default: the one that it offers"
)
@click.option(
    "--api",
    type=click.Choice(("chat", "completions")),
    help="how to ask; default: chat, where a local model has a template",
)
@positive("--num-samples", default=5, help="samples of each question")
@_amount("--temperature", default=0.7, help="of the sampling")
@positive(
    "--max-tokens", default=512, help="longest sample, its reasoning included [tokens]; a higher one continues, too"
)
@click.option(
    "--template",
    default="auto",
    show_default=True,
    metavar="NAME|FILE",
    help=f"auto, {', '.join(TEMPLATES)}, or a text file with {{question}}",
)
@click.option("--system-prompt", default="", metavar="TEXT|@FILE", help="first message of the chat")
@click.option(
    "--thinking",
    type=click.Choice(THINKING),
    default="auto",
    show_default=True,
    help="reasoning of a teacher that thinks: auto: the rationale where the reply has none of its own; only, keep: it "
    "is, or "
    "begins, the rationale; drop: left out",
)
@task_option
@click.option("--split", metavar="NAME", help="only this split of the questions, such as train or test")
@bad_row_option
@positive("--concurrency", default=8, help="requests at a time")
@_seconds("--timeout", "timeout_s", help="of one request as a whole; default: 180, or 0.1 a token of --max-tokens")
@_seconds("--deadline", "deadline_s", help="of one request with all its retries; default: 600, or 3 times --timeout")
@_seconds("--grace", "grace_s", default=30.0, help="that requests in flight get when the collector is stopped")
@positive("--max-failures", default=10, help="questions given up, or replies cut, in a row before all stops")
@_amount("--price-input", help="of a million prompt tokens")
@_amount("--price-output", help="of a million completion tokens")
@_amount("--max-cost", help="of this output over all runs; exit code 75 when reached")
@natural("--max-requests", default=None, help="of this output over all runs; exit code 75 when reached")
@click.option("--extra-body", metavar="JSON", help='more of a request, such as {"top_p": 0.9}; null takes a field out')
@click.option(
    "--header",
    multiple=True,
    metavar="NAME: VALUE",
    help="header of each request, such as 'api-key: ${MY_KEY}' (environment)",
)
@click.option(
    "--query", multiple=True, metavar="NAME=VALUE", help="query of each request, such as api-version=2024-10-21"
)
@click.option("--allow-plain-http", is_flag=True, help="send the key unencrypted to another machine")
@natural(
    "--top-logprobs", default=0, help="K: keep log-probs of the K likeliest tokens too, in OUTPUT.logprobs; 0: none"
)
@click.option(
    "--student",
    metavar="NAME_OR_PATH",
    help="with --top-logprobs of an endpoint: the student, whose tokens the teacher's are",
)
@natural("--seed", default=0, help="of a local model's samples")
@positive("--batch-size", default=16, help="samples that a local model draws at a time")
@device_option
@config_option
@dry_run_option
@json_option
@click.pass_context
def collect(ctx: click.Context, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Sample a teacher: an OpenAI-compatible endpoint, a local model, or a file of earlier samples.

    The same command again goes on where it was stopped or killed. The key is read from OPENAI_API_KEY, or is a --header
    of its own. The exit code is 0 when every question had its turn, also where samples are missing; the summary counts
    them.
    """
    from qcrd_fast.collect.collection import CollectSettings
    from qcrd_fast.collect.collector import collect as run

    options["extra_body"] = _extra_body(options["extra_body"])
    options["api"] = options["api"] or ""
    options["timeout_s"] = options["timeout_s"] or max(180.0, 0.1 * options["max_tokens"])
    options["deadline_s"] = options["deadline_s"] or max(600.0, 3 * options["timeout_s"])
    options["system_prompt"] = _system_prompt(options["system_prompt"])
    for name in ("header", "query"):
        options[name] = read_pairs(f"--{name}", options[name])
    settings = CollectSettings(**options)
    refused: tuple[str, ...]
    if settings.is_url:
        kind, refused = "an endpoint", _LOCAL_ONLY
    elif settings.is_replay:
        kind, refused = "a replay", (*_ENDPOINT_ONLY, *_LOCAL_ONLY, *_SAMPLING, *_LOGPROBS)
    else:
        kind, refused = "a local model", _ENDPOINT_ONLY
    for param in ctx.command.params:
        name = str(param.name)
        if name in refused and ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            teacher = redact(settings.teacher.partition("?")[0])  # a query may hold a key
            raise InputError(f"{param.opts[0]} has no meaning for {kind} ({teacher})")
    if settings.student and not settings.top_logprobs:
        raise InputError("--student says whose tokens log-probs are of; it goes with --top-logprobs")
    with console.quiet_stdout():
        if settings.top_logprobs and not dry_run:
            from qcrd_fast.teacher_signal.collecting import keeping

            with keeping(settings) as keep:
                result, why = run(settings, keep=keep)
        else:
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


def _system_prompt(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--system-prompt: {text[1:]!r} is no readable UTF-8 file") from error


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
    asked = ""
    if "url" in result:
        headers = "".join(f"{name}: {value}\n" for name, value in result.get("headers", {}).items())
        asked = f"POST {result['url']}\n{headers}{json.dumps(result['request'], ensure_ascii=False)}\n\n"
    return f"{result['prompt']}\n---\n{asked}{_prediction(result['prediction'])}"


def _prediction(found: dict[str, Any]) -> str:
    """A table: what is expected, and what it is at most."""
    rows = [
        ("questions", found["questions"], None),
        ("samples", found["samples"], None),
        ("requests", found.get("requests"), found.get("requests_if_n_is_ignored")),
        ("prompt tokens", found.get("prompt_tokens"), found.get("prompt_tokens_if_n_is_ignored")),
        ("completion tokens", found.get("completion_tokens"), found.get("completion_tokens_at_most")),
        ("cost", found.get("cost"), found.get("cost_at_most")),
    ]
    lines = [f"{'still to collect':<20}{'expected':>14}{'at most':>14}"]
    lines += [
        f"{name:<20}{_cell(expected)}{_cell(most)}".rstrip() for name, expected, most in rows if expected is not None
    ]
    if "tokens_a_sample" in found:
        lines.append(
            f"\nexpected: {found['tokens_a_sample']} tokens a sample, a guess until samples came; a teacher that"
        )
        lines.append(
            "thinks uses many times that. At most: each sample --max-tokens long, one a request where n is ignored."
        )
    if "requests" in found and "cost" not in found:
        lines.append("The cost is not known: --price-input and --price-output are the prices of a million tokens.")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'' if value is None else f'{value:,}' if isinstance(value, int) else f'{value:.4f}':>14}"
