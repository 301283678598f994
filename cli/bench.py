"""`qcrd-fast bench`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from qcrd_fast.errors import InputError

from . import console
from .options import Verb, config_option, device_option, dry_run_option


def _names(_: click.Context, param: click.Parameter, text: str) -> tuple[Any, ...]:
    """The parts of a list separated by commas; of --tokens, as integers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if param.name != "tokens":
        return tuple(parts)
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected integers, got {text!r}", param=param)
    return tuple(map(int, parts))


@click.command(cls=Verb)
@click.argument("kind", type=click.Choice(("loss",)))
@click.option(
    "--heads", metavar="NAMES", default="", callback=_names, help="t5-base, smollm2-135m, gemma-3-270m, llama-3-8b, tiny"
)
@click.option("--tokens", metavar="INTS", default="", callback=_names, help="tokens of a batch, such as 1024,4096,16384")
@click.option(
    "--candidates", metavar="M+K,...", default="", callback=_names, help="positives+negatives a question, such as 5+2,1+1"
)
@click.option("--logits", metavar="NAMES", default="", callback=_names, help="random, peaked (as after training)")
@click.option("--dtype", "dtypes", metavar="NAMES", default="", callback=_names, help="bf16, fp32")
@click.option("--providers", metavar="NAMES", default="", callback=_names, help="only these; --dry-run lists them")
@click.option("--repeats", type=click.IntRange(1), metavar="INT", help="timings of each; default: 30 on a GPU, 7 on a CPU")
@click.option("--full", is_flag=True, help="the whole grid; the options above cut it down")
@click.option("--append", is_flag=True, help="add the rows to bench/results/loss.csv of this checkout")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="write everything measured as JSON")
@device_option
@config_option
@dry_run_option
def bench(
    kind: str, providers: tuple[str, ...], repeats: int | None, append: bool, json_file: str | None, device: str, dry_run: bool,
    **subset: Any,
) -> None:  # fmt: skip
    """Time the loss against everything installed that does the same work.

    Each is compared with float64 first. Lists are separated by commas. By default, on a GPU: four heads, 16,384 tokens, bf16;
    on a CPU: one tiny head, in under a minute.
    """
    from qcrd_fast.evaluate import resolve_device

    loss = importlib.import_module((__package__ or "cli").removesuffix("cli") + "bench.loss")  # beside us, installed or not
    if json_file and not Path(json_file).resolve().parent.is_dir():
        raise InputError(f"--json: {json_file} is not in a folder that exists")
    with console.quiet_stdout():
        where = resolve_device(device)
        cases = loss.find_cases(where, **subset)
        if dry_run:
            results, text = None, loss.plan_text(loss.plan(cases, where, providers))
        else:
            append_to = loss.RESULTS if append else None
            results = loss.run_bench(cases, where, providers=providers, repeats=repeats, append_to=append_to)
            text = loss.as_text(results)
    click.echo(text)
    if results and json_file:
        Path(json_file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
