"""Every kernel in every type and option, compiled for each GPU and executed: about half an hour on one core.

    python -m tests.support.ptx.grid [--capabilities 80,90,120] [--dtypes bf16,fp16,fp32] [--only TEXT] [--shuffle SEED]

Prints a line a case; exits with 1 if one is beyond its budget or at fault. `--shuffle`: programs and warps in another order.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.kernel_checks import (
    DTYPES,
    SMALL,
    Errors,
    check_logprob,
    check_rationale_loss,
    check_sample,
    check_selections,
    find_checks,
)
from csrc_triton import linear_logprob, product
from csrc_triton.product import Tile
from qcrd_fast.config import NEGATIVE_SELECT, POSITIVE_SELECT
from tests.support.ptx.launch import executing

CPU = torch.device("cpu")
BUDGETS = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}  # of gradients; log p and the loss: OUT
OUT = 1e-6
SHAPES = [(1, 8, 1), (1, 64, 257), (40, 72, 300), (65, 17, 5), (64, 33, 259), (129, 16, 128), (2, 1, 3)]
OPTIONS: list[dict[str, Any]] = [
    dict(scale=0.2),
    dict(scale=-0.4),
    dict(bias=True, temperature=0.7),
    dict(bias=True, scale=0.3, softcap=1.5, temperature=1.4),
]
SAMPLES: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
    ((1, 8, 5), {}),
    ((70, 24, 1003), dict(temperature=1.5)),
    ((5, 32, 1024), dict(temperature=0.7, top_k=50, softcap=3.0, scale=0.5)),
    ((4, 16, 2000), dict(top_k=256)),
    ((4, 16, 50), dict(top_k=1)),
]
DESCRIPTORS = [
    Tile(64, 128, 64, 4, 3, True),
    Tile(128, 128, 64, 8, 3, True),
    Tile(128, 256, 64, 8, 3, True),
    Tile(128, 256, 64, 8, 3),
]
FP32_DESCRIPTORS = [Tile(32, 64, 16, 4, 2, True)]


class Case(NamedTuple):
    name: str
    dtype: str
    run: Callable[[torch.dtype], Errors]
    tile: Tile | None = None
    split: bool = False  # the vocabulary in several parts and chunks


def find_cases(capability: int, dtype: str) -> Iterator[Case]:
    for check in find_checks(SMALL):
        if dtype in check.dtypes:
            yield Case(check.name, dtype, lambda of, check=check: check.run(of, CPU))
    for options in OPTIONS:
        yield _case("log p", dtype, check_logprob, SMALL, options)
        yield _case("log p and entropy", dtype, check_logprob, SMALL, options | dict(extras=True))
        if "softcap" not in options:
            yield _case("loss of known weights", dtype, check_rationale_loss, SMALL, options)
    for shape in SHAPES:
        yield _case("log p", dtype, check_logprob, shape, {})
    for options in ({}, dict(bias=True), dict(extras=True)):
        yield _case("log p, in parts", dtype, check_logprob, (150, 72, 1003), options)._replace(split=True)
    for shape, options in SAMPLES:
        yield _case("tokens", dtype, check_sample, shape, options)
    if capability >= 90:
        for tile in FP32_DESCRIPTORS if dtype == "fp32" else DESCRIPTORS:
            yield _case("log p", dtype, check_logprob, SMALL, {})._replace(tile=tile)
    if dtype == "fp32":
        for pair in itertools.product(POSITIVE_SELECT, NEGATIVE_SELECT):
            yield _case("selections", dtype, check_selections, SMALL, dict(pairs=[pair]))


def _case(name: str, dtype: str, check: Callable[..., Errors], shape: tuple[int, int, int], options: dict[str, Any]) -> Case:
    return Case(f"{name} {'x'.join(map(str, shape))} {options}", dtype, lambda of: check(of, CPU, *shape, **options))


def judge(errors: Errors, dtype: str) -> bool:
    limits = {"out": OUT, "grad": BUDGETS[dtype], "tokens": 0.0}
    return all(found <= limits[quantity] for quantity, found in errors.items())


def run(case: Case, capability: int, shuffle: int | None) -> tuple[bool, str]:
    """(whether all is well, what to say)."""
    with (
        mock.patch.object(product, "forced_tile", case.tile),
        mock.patch.object(linear_logprob, "WORKSPACE_BYTES", 40_000 if case.split else linear_logprob.WORKSPACE_BYTES),
        executing(capability, shuffle=shuffle, multiprocessors=100 if case.split else 2),
    ):
        try:
            errors = case.run(DTYPES[case.dtype])
        except Exception as failure:  # the others still run
            return False, f"{type(failure).__name__}: {failure}"
    return judge(errors, case.dtype), " ".join(f"{name} {found:.1e}" for name, found in errors.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--capabilities", default="80,90,120")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--shuffle", type=int, metavar="SEED")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    count, bad = 0, 0
    for capability, dtype in itertools.product(map(int, given.capabilities.split(",")), given.dtypes.split(",")):
        for case in find_cases(capability, dtype):
            if given.only in case.name:
                started = time.perf_counter()
                well, said = run(case, capability, given.shuffle)
                count, bad = count + 1, bad + (not well)
                tile = f" {tuple(case.tile)}" if case.tile else ""
                seconds = time.perf_counter() - started
                print(
                    f"{'ok  ' if well else 'BAD '} sm_{capability} {dtype} {case.name}{tile}: {said}  {seconds:.1f} s",
                    flush=True,
                )
    print(f"{count} cases, {bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
