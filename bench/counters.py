"""Counters of the forward pass by Nsight Compute at two tiles.

They tell whether the L2 cache or the tensor cores limit it.

    python -m qcrd_fast.bench.counters [--head llama-3-8b] [--tokens 4096] [--json FILE]

Runs `ncu` on itself (`--launch TILE`), one launch a tile. `model` predicts both: at 128 x 128 the L2 cache's bandwidth
ends it, and more than 62% of the peak would refute that.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from csrc_triton import linear_logprob
from csrc_triton.product import Tile
from qcrd_fast.ops.reference import HeadOptions
from qcrd_fast.utils.files import write_json

from .cases import HEADS, Case, make_batch
from .record import describe_machine
from .tuning import forced, way_name

TILES = {"128x128": Tile(128, 128, 64, 8, 3), "128x256": Tile(128, 256, 64, 8, 3, True)}
METRICS = ("gpu__time_duration.sum", "lts__t_bytes.sum.per_second", "sm__inst_executed_pipe_tensor.sum")


def find_ncu() -> str | None:
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def launch(tile: str, head: str, tokens: int) -> None:
    """Run the forward pass twice, so that the second launch compiles nothing."""
    device = torch.device("cuda")
    batch = make_batch(Case(head, tokens), device)
    with forced(TILES[tile]):
        for _ in range(2):
            linear_logprob.forward(
                batch.hidden_TH.detach(),
                batch.weight_VH.detach(),
                batch.target_T,
                None,
                HeadOptions(batch.scale),
                -100,
                False,
            )
    torch.cuda.synchronize()


def read_counters(text: str) -> dict[str, float]:
    """Parse ncu's CSV, which is mixed with the program's own output, to {metric: value in its base unit}."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    return {
        row["Metric Name"]: float(row["Metric Value"].replace(",", ""))
        for row in rows
        if row["Metric Value"][:1].isdigit()
    }


def count(ncu: str, tile: str, head: str, tokens: int) -> dict[str, Any]:
    """Return the counters of a tile and its rate, or ncu's message if it counted nothing."""
    command = [ncu, "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "forward_kernel", "--launch-skip", "1", "--launch-count", "1"]
    own = [sys.executable, "-m", f"{__package__}.counters", "--launch", tile, "--head", head, "--tokens", str(tokens)]
    done = subprocess.run([*command, *own], capture_output=True, text=True)
    found: dict[str, Any] = read_counters(done.stdout)
    row = {"tile": tile, "way": way_name(TILES[tile]), "head": head, "tokens": tokens, "status": "ok", **found}
    if METRICS[0] in found:
        row["tflops"] = 2 * Case(head, tokens).unit / found[METRICS[0]] / 1e3  # operations a nanosecond are gigaflops
    else:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line] or [
            "it counted nothing"
        ]
        row["status"] = f"failed: ncu: {said[0].removeprefix('==ERROR==').strip()}"
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--head", choices=tuple(HEADS), default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--launch", choices=tuple(TILES), help="what ncu watches: the forward pass at this tile")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args(arguments)
    if given.launch:
        launch(given.launch, given.head, given.tokens)
        return 0
    ncu = find_ncu()
    if not ncu:
        parser.error("ncu (Nsight Compute) is not installed")
    rows: list[dict[str, Any]] = []
    for tile in TILES:
        rows.append(count(ncu, tile, given.head, given.tokens))
        print(rows[-1], flush=True)
        if given.json:
            write_json(given.json, {"where": describe_machine(torch.device("cuda")), "rows": rows})
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
