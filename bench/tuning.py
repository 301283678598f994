"""Time alternatives to the kernels' fixed choices: tiles, and ways through the backward pass.

    python -m qcrd_fast.bench.tuning [--heads t5-base,...] [--tokens 16384] [--dtype bf16] [--repeats 20] [--short]
    [--append]

Needs a GPU. Forward: every tile of SHAPES, through pointers and through tensor descriptors (sm_90 and newer), against
`torch.mm` of the same shape. Backward, of the selected 2/7 of the tokens and of 1/32 of them: workspaces of several
sizes, chunked torch, and the training pass whose gradients are made in forward, against three products of that shape.
Each is compared with fp32 torch before it is timed; the fastest is marked. `--short`: the few ways that a first look
needs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csrc_triton import linear_logprob, product
from csrc_triton.product import Tile
from qcrd_fast.ops import chunked
from qcrd_fast.ops.rationale_loss import KEPT_BYTES
from qcrd_fast.ops.reference import HeadOptions
from qcrd_fast.utils.files import write_json

from . import timing
from .cases import DTYPES, HEADS, Case, make_batch
from .loss import FOUR_HEADS
from .peers import one_line
from .record import append, describe_machine

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
COLUMNS = ("head", "tokens", "dtype", "pass", "way", "status", "ms", "ms_p20", "ms_p80", "of_products", "error",
    "repeats",
           "device", "torch", "triton", "commit", "time")  # fmt: skip
SHAPES = {
    torch.bfloat16: [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3),
    (64, 256, 64, 8, 3),
                     (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 128, 8, 2),
                     (64, 128, 32, 4, 4)],
    torch.float32: [(128, 64, 16, 8, 2), (64, 64, 32, 4, 2), (128, 128, 16, 8, 2)],
}  # fmt: skip
SHORT = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 128, 32, 4, 4)]
WORKSPACES_MIB, SHORT_MIB = (8, 16, 24, 32, 48, 96), (24, 64)
Grads = tuple[Tensor, Tensor]  # dHidden [S, H], dWeight [V, H]


def way_name(tile: Tile) -> str:
    return (
        f"{'x'.join(map(str, tile[:3]))} w{tile.num_warps} s{tile.num_stages}"
        + " descriptors" * tile.descriptors
        + " resident" * tile.resident
    )


def tiles(dtype: torch.dtype, H: int, short: bool = False) -> dict[str, Tile]:
    found: dict[str, Tile] = {}
    for shape in SHORT if short and dtype != torch.float32 else SHAPES[dtype]:
        found |= {way_name(tile): tile for tile in (Tile(*shape), Tile(*shape, descriptors=True))}
    if dtype != torch.float32 and (tile := product.resident_tile(H)).num_stages > 1:
        found[way_name(tile)] = tile
    return found


@contextlib.contextmanager
def forced(tile: Tile | None = None, workspace_mib: int | None = None) -> Iterator[None]:
    """Force this tile, or this workspace, on every launch."""
    before = product.forced_tile, linear_logprob.WORKSPACE_BYTES, linear_logprob.LARGE_H_WORKSPACE_BYTES
    product.forced_tile = tile
    if workspace_mib:
        linear_logprob.WORKSPACE_BYTES = linear_logprob.LARGE_H_WORKSPACE_BYTES = workspace_mib * 2**20
    try:
        yield
    finally:
        product.forced_tile, linear_logprob.WORKSPACE_BYTES, linear_logprob.LARGE_H_WORKSPACE_BYTES = before


def forward_ways(
    case: Case, device: torch.device, short: bool = False
) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], float]]:
    """Return (ways by name, `products` first; a function that gives the error of a result)."""
    batch = make_batch(case, device)
    head = (batch.hidden_TH.detach(), batch.weight_VH.detach(), batch.target_T, None)
    options = HeadOptions(batch.scale)
    truth_T = chunked.chunked_forward(*head, options, -100, False)[0]

    def call(tile: Tile | None) -> Tensor:
        with forced(tile):
            return linear_logprob.forward(*head, options, -100, False)[0]

    def products() -> None:
        for rows_CH in head[0].split(4096):  # no more than that is written at once
            torch.mm(rows_CH, head[1].T)

    ways: dict[str, Callable[[], Any]] = {"products": products, "default": functools.partial(call, None)}
    ways |= {
        name: functools.partial(call, tile)
        for name, tile in tiles(DTYPES[case.dtype], HEADS[case.head].H, short).items()
    }
    return ways, lambda out: float((out - truth_T).norm() / truth_T.norm())


def backward_ways(
    case: Case, device: torch.device, short: bool = False
) -> tuple[dict[str, Callable[[], Any]], Callable[[Any], float]]:
    batch = make_batch(case, device)
    hidden_SH, target_S, weight_VH = batch.hidden_TH.detach(), batch.target_T, batch.weight_VH.detach()
    options, needs = HeadOptions(batch.scale), (True, True, False)
    g_S = torch.rand(len(target_S), device=device)
    coefficients = (g_S, -g_S, None)
    lse_S = linear_logprob.forward(hidden_SH, weight_VH, target_S, None, options, -100, False)[1]
    arguments = (hidden_SH, weight_VH, target_S, None, lse_S, coefficients, options, needs)
    operands = (hidden_SH.float(), weight_VH.float(), target_S, None, lse_S)
    truth = chunked.chunked_backward(*operands, coefficients, options, needs)[:2]

    def workspace(mib: int) -> Grads:
        with forced(workspace_mib=mib):
            return linear_logprob.backward(*arguments)[:2]  # type: ignore[return-value]

    def in_forward() -> Grads | None:
        kept = linear_logprob.forward_keeping(hidden_SH, weight_VH, target_S, None, options, -100, KEPT_BYTES)
        if kept is None:
            raise ValueError("the exponentials are larger than KEPT_BYTES")
        return linear_logprob.backward_kept(kept[2], *arguments[:4], kept[1], g_S, options, needs)[:2]  # type: ignore[return-value]

    def products() -> None:
        for rows_CH in hidden_SH.split(4096):
            logits_CV = torch.mm(rows_CH, weight_VH.T)
            torch.mm(logits_CV, weight_VH)
            torch.mm(logits_CV.T, rows_CH)

    ways: dict[str, Callable[[], Any]] = {"products": products}
    ways |= {
        f"workspace {mib} MiB": functools.partial(workspace, mib) for mib in (SHORT_MIB if short else WORKSPACES_MIB)
    }
    ways["chunked torch"] = lambda: chunked.chunked_backward(*arguments)[:2]
    ways["forward included, kept"] = in_forward

    def error(grads: Any) -> float:
        pairs = [(got.float(), want) for got, want in zip(grads, truth, strict=True) if want is not None]
        return max(float((got - want).norm() / want.norm()) for got, want in pairs)

    return ways, error


def measure(
    ways: dict[str, Callable[[], Any]], error: Callable[[Any], float], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each way; one that fails or is wrong is marked and not timed."""
    rows: list[dict[str, Any]] = []
    for name, call in ways.items():
        row: dict[str, Any] = {"way": name, "status": "ok"}
        try:
            out = call()
            if out is not None:
                row["error"] = error(out)
                if not row["error"] < 2e-2:
                    row["status"] = "wrong"
        except Exception as failure:  # a tile that this GPU or this Triton cannot run
            row["status"] = f"failed: {one_line(failure)}"
        rows.append(row)
    alive = [row for row in rows if row["status"] == "ok"]
    times = timing.rounds([ways[row["way"]] for row in alive], repeats, device)
    for row, ms in zip(alive, times, strict=True):  # the first are the products
        row |= {"ms": timing.quantile(ms, 0.5), "ms_p20": timing.quantile(ms, 0.2), "ms_p80": timing.quantile(ms, 0.8)}
        row["of_products"] = timing.quantile([x / y for x, y in zip(ms, times[0], strict=True)], 0.5)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    timed = [row for row in rows if "ms" in row and row["way"] != "products"]
    best = min(timed, key=lambda row: row["ms"], default=None)
    lines = []
    for row in rows:
        if "ms" in row:
            mark = "  <- fastest" if row is best else ""
            lines.append(f"  {row['way']:36} {row['ms']:9.4g} ms  {row['of_products']:6.2f} of the products{mark}")
        else:
            lines.append(f"  {row['way']:36} {row['status']}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--heads", default=",".join(FOUR_HEADS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="four tiles and two workspaces instead of all")
    parser.add_argument("--append", action="store_true", help=f"add the rows to {RESULTS.name}")
    parser.add_argument("--json", type=Path, help="file to write, again after each pass")
    given = parser.parse_args(arguments)
    unknown = [head for head in given.heads.split(",") if head not in HEADS]
    if unknown:
        parser.error(f"no head {unknown[0]!r}; there are {', '.join(HEADS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # under the interpreter it is a rehearsal
        parser.error("no CUDA GPU here, and these figures mean nothing without one")
    where, every = describe_machine(device), list[dict[str, Any]]()
    print(f"{where['device']}; torch {where['torch']}, triton {where.get('triton')}; commit {where['commit']}")
    for head in given.heads.split(","):
        passes = (
            ("forward", functools.partial(forward_ways, short=given.short), 1.0),
            ("backward", functools.partial(backward_ways, short=given.short), 2 / 7),
            ("small", functools.partial(backward_ways, short=given.short), 1 / 32),
        )
        for name, find, share in passes:
            case = Case(head, max(64, int(given.tokens * share)), dtype=given.dtype)
            rows = measure(*find(case, device), given.repeats, device)
            print(f"\n{head} {name}, {case.tokens} rows, {given.dtype}", *table(rows), sep="\n", flush=True)
            torch.cuda.empty_cache()
            common = {"head": head, "tokens": case.tokens, "dtype": given.dtype, "pass": name, "repeats": given.repeats}
            every += [common | row for row in rows]
            if given.append:
                append(RESULTS, COLUMNS, (where | common | row for row in rows))
            if given.json:
                write_json(given.json, {"where": where, "rows": every})
    return 0


if __name__ == "__main__":
    sys.exit(main())
