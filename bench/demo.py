"""The demo over seeds, one CSV row a student: python -m qcrd_fast.bench.demo --seeds 0-7

Each seed is one `qcrd-fast demo --compare METHOD` in a process of its own; its times are on each of its rows. The
student is pretrained once, for all of them, and has a row of its own: a user waits for both, and on later days for the
first. Beside busy processes (`load`, of the last minute) wall times say little, and `cpu_s` (user and system) is what
to read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .record import append, describe_machine

RESULTS = Path(__file__).parent / "results" / "demo.csv"
COLUMNS = (
    "student", "seed", "accuracy", "accuracy_reasoned", "sound_reasoning", "n", "wall_s", "cpu_s", "load", "cores",
    "device",
    "torch", "transformers", "commit", "time",
)  # fmt: skip
SPENT = "import resource; u = resource.getrusage(resource.RUSAGE_SELF); spent = u.ru_utime + u.ru_stime"
RUN = (
    "from qcrd_fast.demo.runner import run_demo; "
    "found = run_demo(json.loads(sys.argv[1]), sys.argv[2], compare=sys.argv[3])"
)
PRETRAIN = (
    "from pathlib import Path; from qcrd_fast.demo.runner import write_student as w; found = w(Path(sys.argv[1]))"
)


def call(code: str, arguments: list[str], cache: str) -> tuple[Any, float, float]:
    """Run code in a new process; return (its variable `found`, wall seconds, CPU seconds).

    The process chooses its number of threads from the student's size.
    """
    code = f"import json, sys; {code}; {SPENT}; print(json.dumps([found, spent]))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment | {"XDG_CACHE_HOME": cache},
    )
    found, spent = json.loads(done.stdout)
    return found, time.perf_counter() - started, spent


def run(seed: int, compare: str, cache: str) -> list[dict[str, Any]]:
    """Run one seed; return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        results, wall_s, cpu_s = call(RUN, [json.dumps({"seed": seed}), f"{folder}/run", compare], cache)
    told = {"seed": seed, "n": results["n"], "wall_s": wall_s, "cpu_s": cpu_s, "load": os.getloadavg()[0]}
    return [told | row for row in results["comparison"]]


def pretrain(cache: str) -> list[dict[str, Any]]:
    """Pretrain the student and return its row; no row if `cache` already holds it."""
    if (Path(cache) / "qcrd-fast").is_dir():
        return []
    with tempfile.TemporaryDirectory() as folder:
        _, wall_s, cpu_s = call(PRETRAIN, [f"{folder}/student"], cache)
    return [{"student": "(pretraining)", "wall_s": wall_s, "cpu_s": cpu_s, "load": os.getloadavg()[0]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", default="dss")
    parser.add_argument("--seeds", default="0-7", help="such as 0-7 or 0,3,5; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cache", help="folder that keeps the pretrained student; default: a new one")
    args = parser.parse_args()
    seeds = [
        seed
        for part in args.seeds.split(",")
        for seed in range(int(part.partition("-")[0]), int(part.partition("-")[2] or part) + 1)
    ]
    where = describe_machine(torch.device("cpu")) | {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.jobs) as pool:
        cache = args.cache or temporary
        found = itertools.chain([pretrain(cache)], pool.map(lambda seed: run(seed, args.compare, cache), seeds))
        for rows in found:
            for row in rows:
                print({name: row[name] for name in COLUMNS if name in row}, flush=True)
            append(RESULTS, COLUMNS, [where | row for row in rows], digits=4)


if __name__ == "__main__":
    main()
