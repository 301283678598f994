"""Every kernel in every type and option, compiled for each GPU and executed, each compiled kernel also in other orders.

    python -m tests.support.ptx.grid [--capabilities 80,90,120] [--dtypes bf16,fp16,fp32] [--only TEXT] [--orders 5]
                                     [--results FILE [--resume] [--append]]

Prints a line a case; exits with 1 if one is beyond its budget or at fault. `--orders`: the first launch of each kernel
compiled is run again with programs and warps in so many orders drawn at random and has to leave the same bytes; of
sampling the whole op runs so, and has to draw the same tokens. `--results`: a JSON line a case, as it ends; with
`--resume`, what is ok there is not run again. `--append` adds the sums to bench/results/executed.csv.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from bench.record import append, describe_machine
from csrc_triton import linear_logprob, product
from csrc_triton.product import Tile
from qcrd_fast.config import NEGATIVE_SELECT, POSITIVE_SELECT
from tests.support.paths import ROOT
from tests.support.ptx.launch import executing

CPU = torch.device("cpu")
RESULTS = ROOT / "bench" / "results" / "executed.csv"
COLUMNS = ("gpu", "dtype", "cases", "bad", "programs", "kernels_in_other_orders", "orders", "logp_error", "grad_error",
           "tokens_that_differ", "cpu_s", "torch", "triton", "commit", "time")  # fmt: skip
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
    if capability == 90 and dtype != "fp32":  # 128 x 256, operands by the copy engine
        for options in ({}, dict(bias=True), dict(softcap=2.0), dict(extras=True)):
            yield _case("log p", dtype, check_logprob, (150, 1032, 300), options)
        yield _case("loss of known weights", dtype, check_rationale_loss, (150, 1032, 300), {})
    if capability == 90 and dtype != "fp32" and product.gluon_obstacle() is None:
        tile = product.resident_tile(SMALL.H)._replace(num_stages=3)
        for options in ({}, dict(scale=-0.4, temperature=0.7), dict(extras=True), dict(ignored=128)):
            yield _case("log p, hidden resident", dtype, check_logprob, SMALL, options)._replace(tile=tile)
        yield _case("loss of known weights, hidden resident", dtype, check_rationale_loss, SMALL, {})._replace(
            tile=tile
        )
    for shape, options in SAMPLES:
        yield _case("tokens", dtype, check_sample, shape, options)
    if capability >= 90:
        for tile in FP32_DESCRIPTORS if dtype == "fp32" else DESCRIPTORS:
            yield _case("log p", dtype, check_logprob, SMALL, {})._replace(tile=tile)
    if dtype == "fp32":
        for pair in itertools.product(POSITIVE_SELECT, NEGATIVE_SELECT):
            yield _case("selections", dtype, check_selections, SMALL, dict(pairs=[pair]))


def _case(
    name: str, dtype: str, check: Callable[..., Errors], shape: tuple[int, int, int], options: dict[str, Any]
) -> Case:
    return Case(f"{name} {'x'.join(map(str, shape))} {options}", dtype, lambda of: check(of, CPU, *shape, **options))


def judge(errors: Errors, dtype: str) -> bool:
    limits = {"out": OUT, "grad": BUDGETS[dtype], "tokens": 0.0}
    return all(found <= limits[quantity] for quantity, found in errors.items())


def run(case: Case, capability: int, orders: int = 0, compared: set[str] | None = None) -> dict[str, Any]:
    """{"status": ok, or what is wrong; "errors"; "programs" executed; "compared": kernels run in other orders;
    "seconds"}."""
    started, compared = time.process_time(), set() if compared is None else compared
    before = len(compared)
    row: dict[str, Any] = {"status": "ok", "errors": {}}
    with (
        mock.patch.object(product, "forced_tile", case.tile),
        mock.patch.object(linear_logprob, "WORKSPACE_BYTES", 40_000 if case.split else linear_logprob.WORKSPACE_BYTES),
        executing(capability, orders=orders, compared=compared, multiprocessors=100 if case.split else 2) as executed,
    ):
        try:
            row["errors"] = case.run(DTYPES[case.dtype])
            if not judge(row["errors"], case.dtype):
                row["status"] = "beyond its budget"
        except Exception as failure:  # the others still run
            row["status"] = f"{type(failure).__name__}: {failure}"
        if "tokens" in row["errors"]:
            for seed in range(1, orders + 1):  # the op as a whole, since its first kernel may leave other bytes
                executed.shuffle = seed
                if any(case.run(DTYPES[case.dtype]).values()):
                    row["status"] = f"order {seed} draws other tokens"
    row |= {"programs": executed.programs, "compared": len(compared) - before}
    return row | {"seconds": round(time.process_time() - started, 2)}


def sums(rows: list[dict[str, Any]], orders: int) -> Iterator[dict[str, Any]]:
    """A row for each GPU and type, as COLUMNS has them."""
    for capability, dtype in dict.fromkeys((row["capability"], row["dtype"]) for row in rows):
        some = [row for row in rows if (row["capability"], row["dtype"]) == (capability, dtype)]
        errors = {q: [row["errors"][q] for row in some if q in row["errors"]] for q in ("out", "grad", "tokens")}
        yield {
            "gpu": f"sm_{capability}",
            "dtype": dtype,
            "cases": len(some),
            "bad": sum(row["status"] != "ok" for row in some),
            "programs": sum(sum(row["programs"].values()) for row in some),
            "kernels_in_other_orders": sum(row["compared"] for row in some),
            "orders": orders,
            "logp_error": max(errors["out"], default=None),
            "grad_error": max(errors["grad"], default=None),
            "tokens_that_differ": max(errors["tokens"], default=None),
            "cpu_s": sum(row["seconds"] for row in some),
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--capabilities", default="80,90,120")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--orders", type=int, default=5, help="other orders of programs and warps; default: 5")
    parser.add_argument("--results", type=Path, help="file to add a line a case to")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that are ok in --results")
    parser.add_argument("--append", action="store_true", help=f"add the sums to bench/results/{RESULTS.name}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = given.results.read_text(encoding="utf-8").splitlines() if given.resume and given.results.exists() else []
    known = {
        (row["capability"], row["dtype"], row["case"]): row for row in map(json.loads, lines) if row["status"] == "ok"
    }
    rows, compared = list[dict[str, Any]](), set[str]()
    for dtype, capability in itertools.product(given.dtypes.split(","), map(int, given.capabilities.split(","))):
        for case in find_cases(capability, dtype):
            if given.only not in case.name:
                continue
            name = case.name + (f" {tuple(case.tile)}" if case.tile else "")
            row = known.get((capability, dtype, name))
            if row is None:
                row = {"capability": capability, "dtype": dtype, "case": name}
                row |= run(case, capability, given.orders, compared)
                found = " ".join(f"{quantity} {value:.1e}" for quantity, value in row["errors"].items())
                print(f"sm_{capability} {dtype} {name}: {row['status']} {found}  {row['seconds']:.1f} s", flush=True)
                if given.results:
                    with open(given.results, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            rows.append(row)
    found_sums = list(sums(rows, given.orders))
    print(*(" ".join(f"{name} {value}" for name, value in each.items()) for each in found_sums), sep="\n")
    if given.append:
        append(RESULTS, COLUMNS, (describe_machine(CPU) | each for each in found_sums), digits=3)
    bad = [row for row in rows if row["status"] != "ok"]
    print(f"{len(rows)} cases, {len(bad)} bad")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
