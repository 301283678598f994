"""Predict the forward kernel's fraction of an H100's peak from counted instructions.

This is no measurement.

    python -m qcrd_fast.bench.model [--only DESIGN] [--json FILE] [--update docs/kernels.md]

Prints the table of docs/kernels.md, or brings it up to date there. A multiprocessor is simulated step by step: its
programs take turns at the L2 cache, the tensor cores and the units of the epilogue. What the kernels cost in
instructions is counted (`sass`); what the hardware does in a clock is in `MACHINE`. Needs no GPU. The H200 has the
H100's multiprocessors.

T rows, V columns and H hidden of a tile; a step is one pass over a tile's depth BLOCK_H.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from csrc_triton import linear_logprob, product
from csrc_triton.product import Tile
from qcrd_fast.utils.files import write_json, write_text

from . import sass
from .cases import HEADS
from .tuning import way_name


class Machine(NamedTuple):
    """An H100 SXM. Rates are of one multiprocessor, a clock.

    `tensor_fma`, `mufu`, `schedulers`: NVIDIA's H100 whitepaper and the CUDA programming guide's table of throughputs
    (9.0). 989.4 dense bf16 TFLOP/s are 132 x 2,048 multiply-adds at 1.83 GHz; 16 exponentials; 4 schedulers of an
    instruction a warp. `l2_bytes`, low and high: an assumption. At full rate 128 x 256 tiles take 48 bytes; products of
    such tiles that share nothing between multiprocessors would reach 70 to 81% of the peak. `latency`: assumed too, of
    a load from the L2 cache until a product can start on it. `drain`: of the shuffles and barriers in a tile's
    reductions.
    `cap`: cuBLAS's own rate, which power and clocks limit: 716 to 795 TFLOP/s (README of pranjalssh/fast.cu) are 72 to
    80%.
    """

    multiprocessors: int = 132
    clock_ghz: float = 1.83
    tensor_fma: int = 2048
    mufu: int = 16
    schedulers: int = 4
    l2_bytes: tuple[float, float] = (33.5, 38.8)
    latency: float = 700.0
    drain: float = 60.0
    cap: float = 0.80

    @property
    def peak_tflops(self) -> float:
        return 2e-3 * self.multiprocessors * self.clock_ghz * self.tensor_fma


MACHINE = Machine()
ORDER = ("smollm2-135m", "gemma-3-270m", "t5-base", "llama-3-8b")  # heads, by their H
TILES = 60  # simulated, of a program; the first are left out of the rate
REFUTED_ABOVE = 0.62  # of the peak, at 128 x 128


class Work(NamedTuple):
    """Cost of a tile in clocks of a multiprocessor: counted instructions over the units that execute them."""

    tile: Tile
    programs: int  # that share a multiprocessor
    step_bytes: float  # from the L2 cache
    serial: float  # of the epilogue, before the exponentials
    shared: float  # exponentials and the multiply-adds beside them: the programs take turns
    refills: bool  # the ring of operands is empty after a tile, for no load was issued ahead of the epilogue
    shares_ring: bool = (
        False  # the programs are warpgroups of one, with rows of their own; a stage is free when all gave it back
    )

    @property
    def step_clocks(self) -> float:
        rows = self.tile.block_t // (self.programs if self.shares_ring else 1)
        return rows * self.tile.block_v * self.tile.block_h / MACHINE.tensor_fma


def work_of(tile: Tile, threads: int, programs: int, counts: sass.Counts) -> Work:
    """Compute the cost from a warp's instructions of a tile.

    All but exponentials and multiply-adds come first, one after another. With resident hidden states, a warpgroup has
    half of the tile, and only the head is fetched, once for both.
    """
    _, units = counts.by_pipe()
    step_bytes = 2.0 * (tile.block_t + tile.block_v) * tile.block_h
    if tile.resident:
        threads, programs = 128, 2
        step_bytes = 2.0 * tile.block_v * tile.block_h
    warps, mufu, fma = threads // 32, units["mufu"], units["fma"]
    issue = warps / MACHINE.schedulers
    return Work(
        tile,
        programs,
        step_bytes,
        serial=(units.total() - mufu - fma) * issue + MACHINE.drain,
        shared=max(mufu * warps * 32 / MACHINE.mufu, (mufu + fma) * issue),
        refills=units["copy"] > 0,
        shares_ring=tile.resident,
    )


def simulate(work: Work, H: int, l2_bytes: float) -> float:
    """Share of the tensor cores' peak, 0..1, with so many bytes a clock from the L2 cache.

    Each program: step g asks for the operands of step g + stages - 1, waits for its own and issues its product; the
    product before it must have ended. After a tile's last product comes the epilogue. L2, tensor cores and exponentials
    serve in order.
    """
    if work.shares_ring:
        return simulate_ring(work, H, l2_bytes)
    steps, ahead = -(-H // work.tile.block_h), work.tile.num_stages - 1
    load, matrix = work.step_bytes / l2_bytes, work.step_clocks
    l2_free = tensor_free = shared_free = 0.0
    landed: list[dict[int, float]] = [{} for _ in range(work.programs)]
    ended = [0.0] * work.programs  # of each one's latest product
    finished: list[float] = []  # tiles of the first program; the others are alike

    def ask(program: int, step: int, now: float) -> None:
        nonlocal l2_free
        l2_free = max(l2_free, now) + load
        landed[program][step] = l2_free + MACHINE.latency

    events = [(0.0, program, 0, "step") for program in range(work.programs)]
    for _, program, _, _ in events:
        for step in range(ahead):
            ask(program, step, 0.0)
    while len(finished) < TILES:
        now, program, step, what = heapq.heappop(events)
        if what == "step":
            last_of_tile = steps - 1 - step % steps
            if not work.refills or last_of_tile >= ahead:
                ask(program, step + ahead, now)
            heapq.heappush(events, (max(now, landed[program].pop(step)), program, step, "product"))
        elif what == "product":
            start = max(now, tensor_free)
            tensor_free = start + matrix
            before, ended[program] = ended[program], tensor_free
            done = (step + 1) % steps == 0
            following = (
                (tensor_free, program, step, "serial") if done else (max(start, before), program, step + 1, "step")
            )
            heapq.heappush(events, following)
        elif what == "serial":
            heapq.heappush(events, (now + work.serial, program, step, "shared"))
        else:
            shared_free = max(shared_free, now) + work.shared
            if program == 0:
                finished.append(shared_free)
            if work.refills:
                for i in range(ahead):
                    ask(program, step + 1 + i, shared_free)
            heapq.heappush(events, (shared_free, program, step + 1, "step"))
    warm = TILES // 4
    return work.programs * (TILES - 1 - warm) * steps * matrix / (finished[-1] - finished[warm])


def simulate_ring(work: Work, H: int, l2_bytes: float) -> float:
    """As `simulate`, of warpgroups that share a ring: a warp of its own asks for step g + stages once all gave back
    step g. A warpgroup does so when it notices that the product has ended: behind the issue of its next one, or at a
    tile's end."""
    steps, groups = -(-H // work.tile.block_h), range(work.programs)
    load, matrix = work.step_bytes / l2_bytes, work.step_clocks
    l2_free = tensor_free = shared_free = 0.0
    landed: list[float] = []  # when the operands of each step are there
    waiting: dict[int, list[int]] = {}  # warpgroups, by the step that they wait for
    given_back, ended = [0] * work.programs, [0.0] * work.programs  # steps; the end of each one's latest product
    finished: list[float] = []  # tiles of the first warpgroup
    events = [(0.0, group, 0, "step") for group in groups]

    def ask(now: float) -> None:
        nonlocal l2_free
        while len(landed) < min(given_back) + work.tile.num_stages:
            l2_free = max(l2_free, now) + load
            landed.append(l2_free + MACHINE.latency)
            for group in waiting.pop(len(landed) - 1, ()):
                heapq.heappush(events, (landed[-1], group, len(landed) - 1, "product"))

    ask(0.0)
    while len(finished) < TILES:
        now, group, step, what = heapq.heappop(events)
        done = (step + 1) % steps == 0
        if what == "step":
            if step < len(landed):
                heapq.heappush(events, (max(now, landed[step]), group, step, "product"))
            else:
                waiting.setdefault(step, []).append(group)
        elif what == "product":
            tensor_free = max(now, tensor_free) + matrix
            before, ended[group] = ended[group], tensor_free
            if step % steps:
                heapq.heappush(events, (max(now, before), group, step - 1, "free"))
            if done:
                heapq.heappush(events, (tensor_free, group, step, "free"))
            heapq.heappush(
                events, (tensor_free, group, step, "serial") if done else (max(now, before), group, step + 1, "step")
            )
        elif what == "free":
            given_back[group] = step + 1
            ask(now)
        elif what == "serial":
            heapq.heappush(events, (now + work.serial, group, step, "shared"))
        else:
            shared_free = max(shared_free, now) + work.shared
            if group == 0:
                finished.append(shared_free)
            heapq.heappush(events, (shared_free, group, step + 1, "step"))
    warm = TILES // 4
    return work.programs * (TILES - 1 - warm) * steps * matrix / (finished[-1] - finished[warm])


class Design(NamedTuple):
    """A variant of `sass.VARIANTS` at a tile; None: the tile that it is launched with at that H."""

    name: str
    tile: Tile | None
    variant: str = "plain"
    limited: bool = True  # in registers, as it is launched
    hypothetical: str = ""  # what is supposed of a design that is not written

    def change(self, work: Work) -> Work:
        """Return the counted work with the design's changes."""
        t, v, h = work.tile[:3]
        if self.hypothetical == MULTICAST:
            return work._replace(step_bytes=2.0 * (t + v / 2) * h)
        if self.hypothetical == ONE_PROGRAM:
            return work._replace(programs=1)
        return work

    def fits(self, H: int) -> bool:
        """Whether a resident hidden tile leaves room for at least two stages of the head."""
        return not self.variant.startswith("hidden resident") or product.resident_tile(H).num_stages > 1


MULTICAST = "two row blocks of a cluster share the head's loads"
ONE_PROGRAM = "one program a multiprocessor"
DEFAULT, WIDE, WIDE_TMA = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3, descriptors=True)
DESIGNS = [
    Design("as launched", None),
    Design("128 x 128, cp.async", DEFAULT),
    Design("128 x 128, cp.async", DEFAULT, hypothetical=ONE_PROGRAM),
    Design("as launched, bias", None, "bias"),
    Design("128 x 128, cp.async, bias, registers without a limit", DEFAULT, "bias", limited=False),
    Design("as launched, keeps the exponentials", None, "keeps the exponentials"),
    Design(
        "128 x 128, cp.async, keeps the exponentials, registers without a limit",
        DEFAULT,
        "keeps the exponentials",
        False,
    ),
    Design("as launched, softcap", None, "softcap"),
    Design("as launched, entropy", None, "entropy"),
    Design("128 x 256, cp.async", WIDE),
    Design("128 x 256, descriptors", WIDE_TMA),
    Design("128 x 256, descriptors", WIDE_TMA, hypothetical=MULTICAST),
    Design("128 x 128, hidden resident", None, "hidden resident"),
    Design("128 x 128, hidden resident, keeps the exponentials", None, "hidden resident, keeps the exponentials"),
    Design("128 x 128, hidden resident, entropy, a ragged V", None, "hidden resident, entropy, ragged V"),
]


_codes: dict[str, tuple[sass.Code, sass.Counts | None]] = {}  # by a compiled kernel's hash


@cache
def counted(variant: str, tile: Tile | None, limited: bool, head: str) -> tuple[Work, sass.Code]:
    """Count instructions of the forward kernel as it is launched on an H100."""
    H, V, _ = HEADS[head]
    found = next(v for v in sass.VARIANTS if v.name == variant)
    asked = found._replace(H=H, V=V + found.V % 128, kernels=found.kernels[:1])
    shape_of, tiles = linear_logprob.shape_of, list[Tile]()

    def recorded(tile: Tile, *sizes: Any) -> dict[str, Any]:
        tiles.append(tile)
        shape = shape_of(tile, *sizes)
        return shape if limited else {**shape, "maxnreg": None}

    with mock.patch.object(product, "forced_tile", tile), mock.patch.object(linear_logprob, "shape_of", recorded):
        ((_, launch),) = sass.compile_variants(90, [asked])
    if launch.kernel.hash not in _codes:  # most heads share one
        code = sass.read(launch)
        _codes[launch.kernel.hash] = code, sass.count(code)
    code, counts = _codes[launch.kernel.hash]
    assert counts is not None
    return work_of(tiles[0] if tiles else product.resident_tile(H), code.threads, code.programs, counts), code


def predict(design: Design, head: str) -> tuple[float, float] | None:
    """Return (low, high) fraction of the peak before `MACHINE.cap`; None if the design does not fit."""
    H = HEADS[head].H
    if not design.fits(H):
        return None
    work = design.change(counted(design.variant, design.tile, design.limited, head)[0])
    low, high = (simulate(work, H, rate) for rate in MACHINE.l2_bytes)
    return low, high


def rows(only: str = "") -> Iterator[dict[str, Any]]:
    """Return a row for each design, or those of a name, with the values that differ by head."""
    for design in (design for design in DESIGNS if design.name == (only or design.name)):
        row: dict[str, Any] = {"design": design.name, "supposed": design.hypothetical, "variant": design.variant}
        row["limited"] = design.limited
        for head in ORDER:
            if not design.fits(HEADS[head].H):
                row.setdefault("shares", {})[head] = None
                continue
            counted_work, code = counted(design.variant, design.tile, design.limited, head)
            work = design.change(counted_work)
            found = {
                "tile": way_name(counted_work.tile),
                "registers": code.registers,
                "spills": code.spills,
                "programs": 1 if work.shares_ring else work.programs,
                "epilogue_clocks": round(work.serial + work.shared),
                "shares": predict(design, head),
            }
            for name, value in found.items():
                row.setdefault(name, {})[head] = value
        yield row


def show(shares: tuple[float, float] | None) -> str:
    """Format percent, low to high; "cap" where the chip's power limits it."""
    if shares is None:
        return "no room"
    low, high = (f"{100 * share:.0f}" if share <= MACHINE.cap else "cap" for share in shares)
    return low if low == high else f"{low} to {high}"


def markdown(only: str = "") -> str:
    """Format the table of docs/kernels.md."""
    head = [
        "design",
        "registers",
        "programs a multiprocessor",
        "epilogue, clocks",
        *(f"H = {HEADS[h].H:,}" for h in ORDER),
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows(only):
        name = f"*{row['design']}; supposed: {row['supposed']}*" if row["supposed"] else row["design"]
        cells = [
            " / ".join(dict.fromkeys(f"{n:,}" for n in row[of].values()))
            for of in ("registers", "programs", "epilogue_clocks")
        ]
        lines.append([name, *cells, *map(show, row["shares"].values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def updated(page: str, table: str) -> str:
    """Replace the table with the same header in the page. Raises `ValueError` if there is none."""
    head = table.partition("\n")[0] + "\n"
    start = page.index(head)
    end = page.find("\n\n", start)
    return page[:start] + table + page[end + 1 if end >= 0 else len(page) :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", default="", choices=["", *dict.fromkeys(d.name for d in DESIGNS)], metavar="DESIGN")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--update", type=Path, help="Markdown file whose table is to be this one")
    given = parser.parse_args(arguments)
    if missing := sass.missing_tools():
        parser.error(f"this triton brings no {' and no '.join(missing)}")
    if given.update and given.only:
        parser.error("--update: the docs have every design; leave --only out")
    table = markdown(given.only)
    print(f"Predicted share of {MACHINE.peak_tflops:.0f} TFLOP/s, percent\n\n{table}", end="")
    if given.update:
        write_text(given.update, updated(given.update.read_text(encoding="utf-8"), table))
    if given.json:
        write_json(given.json, {"prediction": True, "machine": MACHINE._asdict(), "rows": list(rows(given.only))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
