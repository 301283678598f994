"""`qcrd-fast bench loss|kl|sampler|step`."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qcrd_fast.errors import RunError
from qcrd_fast.utils.files import write_text

from . import console
from .options import Group, Verb, config_option, device_option, dry_run_option, natural, positive
from .outputs import check_file


def _names(_: click.Context, param: click.Parameter, text: str) -> tuple[Any, ...]:
    """The parts of a list separated by commas; of --tokens and --prompts, as integers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if param.name == "beta":
        try:
            return tuple(map(float, parts))
        except ValueError as error:
            raise click.BadParameter(f"expected numbers, got {text!r}", param=param) from error
    if param.name not in ("tokens", "prompts"):
        return tuple(parts)
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"expected integers, got {text!r}", param=param)
    return tuple(map(int, parts))


names = functools.partial(click.option, metavar="NAMES", default="", callback=_names)
ints = functools.partial(click.option, metavar="INTS", default="", callback=_names)


def measured(csv: str, repeats: str) -> Callable[[Any], Any]:
    """Decorator: the options of every benchmark. Lists are separated by commas."""
    options = (
        names("--providers", help="only these; --dry-run lists them"),
        click.option("--repeats", type=click.IntRange(1), metavar="INT", help=f"timings of each; default: {repeats}"),
        click.option("--append", is_flag=True, help=f"add the rows to bench/results/{csv} of this checkout"),
        click.option(
            "--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="write all of it as JSON"
        ),
        device_option,
        config_option,
        dry_run_option,
    )

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(cls=Group, subcommand_metavar="WHAT [ARGS]...")
def bench() -> None:
    """Time the loss, the sampler or a whole training step against everything installed that does the same work."""


@bench.command("loss", cls=Verb)
@names("--heads", help="t5-base, smollm2-135m, gemma-3-270m, llama-3-8b, tiny")
@ints("--tokens", help="tokens of a batch, such as 1024,4096,16384")
@names("--candidates", metavar="M+K,...", help="positives+negatives a question, such as 5+2,1+1")
@names("--logits", help="random, peaked (as after training)")
@names("--dtype", "dtypes", help="bf16, fp32")
@click.option("--full", is_flag=True, help="the whole grid; the options above cut it down")
@measured("loss.csv", "30 on a GPU, 7 on a CPU")
def bench_loss(**options: Any) -> None:
    """The loss, forward and backward.

    Each is compared with float64 first. Lists are separated by commas. By default, on a GPU: four heads, 16,384 tokens,
    bf16; on a CPU: one tiny head, in under a minute.
    """
    _run("loss", **options)


@bench.command("kl", cls=Verb)
@names("--heads", help="smollm2, t5-base: the student's, with a teacher of a larger hidden size")
@ints("--tokens", help="tokens of a batch; default: 2048")
@names("--beta", help="0 (forward KL) to 1 (reverse KL), such as 0,0.5; default: 0")
@names("--dtype", "dtypes", help="bf16, fp32")
@measured("kl.csv", "30 on a GPU, 3 on a CPU")
def bench_kl(**options: Any) -> None:
    """The divergence of a student from a teacher, forward and backward.

    Each is compared with float64 first: plain torch, the formula of Liger's fused JSD, and linear_kl.
    """
    _run("kl", **options)


@bench.command("sampler", cls=Verb)
@names("--shapes", help="t5-base, t5-small, smollm2-135m, tiny-t5, tiny-llama; random weights")
@ints("--prompts", help="prompts of a draw, such as 64,256")
@names("--lengths", help="fixed, ragged")
@positive(
    "--new-tokens", default=None, show_default=False, help="longest continuation; default: 128 on a GPU, 32 on a CPU"
)
@natural("--top-k", default=50, help="0: the whole softmax")
@measured("sampler.csv", "7 on a GPU, 3 on a CPU")
def bench_sampler(**options: Any) -> None:
    """Sampling: tokens a second, ours and generate's (dynamic, static and compiled cache, continuous batching).

    The same prompts, batch, temperature, top-k and lengths for all. By default, on a GPU: T5-base and SmolLM2-135M, 64
    and 256 prompts, 128 new tokens, bf16; on a CPU: two tiny models.
    """
    _run("sampler", **options)


@bench.command("step", cls=Verb)
@names("--shapes", help="t5-base, t5-small, smollm2-135m, tiny-t5, tiny-llama; random weights")
@positive("--questions", default=None, show_default=False, help="of a step; default: 64 on a GPU, 4 on a CPU")
@positive("--positives", default=None, show_default=False, help="of a question; default: 5 on a GPU, 3 on a CPU")
@positive(
    "--new-tokens", default=None, show_default=False, help="of a sampled negative; default: 128 on a GPU, 24 on a CPU"
)
@click.option(
    "--lengths", metavar="NAME", default="uniform", show_default=True,
    help="of prompts and rationales: uniform, or svamp: as three teachers' are under SmolLM2's tokenizer",
)  # fmt: skip
@measured("step.csv", "5 on a GPU, 3 on a CPU, of 8 and 1 steps")
def bench_step(**options: Any) -> None:
    """A training step with its negatives: ours in every arm of --overlap, and plain Hugging Face code with generate.

    By default, on a GPU: T5-base and SmolLM2-135M, 64 questions a step; on a CPU: a tiny T5.
    """
    _run("step", **options)


def _run(
    name: str, *, providers: tuple[str, ...], repeats: int | None, append: bool, json_file: str | None, device: str,
    dry_run: bool, **subset: Any,
) -> None:  # fmt: skip
    """One of the modules of the package beside us, installed or not."""
    from qcrd_fast.utils.device import resolve_device

    if json_file:
        check_file(json_file, "--json")
    with console.quiet_stdout():
        module = importlib.import_module((__package__ or "cli").removesuffix("cli") + f"bench.{name}")
        where = resolve_device(device)
        cases, results = module.find_cases(where, **subset), None
        if dry_run:
            text = module.plan_text(cases, where, providers)
        else:
            append_to = module.RESULTS if append else None
            results = module.run_bench(cases, where, providers=providers, repeats=repeats, append_to=append_to)
            text = module.as_text(results)
    click.echo(text)
    if results and json_file:
        try:
            write_text(Path(json_file), json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {json_file}: {error.strerror or error}") from error
