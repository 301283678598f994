"""The demo with several methods and seeds, one CSV row a run: python bench/demo.py --methods finetune,dss,qcrd --seeds
0,1,2"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcrd_fast.config import PARTS

RESULTS = Path(__file__).parent / "results" / "demo.csv"
RUN = (
    "import json, sys; from qcrd_fast.demo import run_demo; "
    "print(json.dumps(run_demo(json.loads(sys.argv[1]), sys.argv[2])))"
)


def run(method: str, seed: int, threads: int) -> dict[str, object]:
    """One demo run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        chosen = {} if method == "default" else {"method": method} | (PARTS if method == "qcrd" else {})
        options = json.dumps(chosen | {"seed": seed})
        done = subprocess.run(
            [sys.executable, "-c", RUN, options, f"{folder}/run"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        results = json.loads(done.stdout)
        wall_s = round(time.perf_counter() - started, 1)
    row = {name: results[name] for name in ("accuracy_untrained", "accuracy", "accuracy_validation", "n", "steps")}
    return {"method": method, "seed": seed, **row, "wall_s": wall_s, "threads": threads}


def main() -> None:
    import torch
    import transformers
    from qcrd_fast.bench.record import append

    from qcrd_fast.utils.environment import commit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="finetune,dss,qcrd", help="or default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each run")
    args = parser.parse_args()
    where = {
        "device": f"CPU {platform.machine()} x{os.cpu_count()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    cases = [(method, int(seed)) for method in args.methods.split(",") for seed in args.seeds.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda case: run(*case, args.threads), cases):
            row |= where
            print(row, flush=True)
            append(RESULTS, list(row), [row])


if __name__ == "__main__":
    main()
