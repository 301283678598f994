"""Train dss, sft-all and the default method on SVAMP: the last part of `bench.gpu`.

Writes rows of a CSV.

    python -m qcrd_fast.bench.gpu_training --data DIR --student DIR --output-dir DIR [--seeds 5] [--json FILE]

As many runs at once as the predicted memory of the largest allows. Stopped and called again, it goes on.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.sweep.results_csv import read_csv
from qcrd_fast.sweep.runner import plan, read_recipe, run_jobs
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.files import write_json

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
METHODS = ("dss", "sft-all", TrainConfig.method)
MAIN, TEST = "svamp_3_train.json", "svamp_test.json"
MENTORS = ("aug/t5_large/svamp_rand3_aug3.json", "aug/flan-t5_large/svamp_rand3_aug3.json")  # in Mentor-KD's repository
FLAT = ("svamp_aug_t5_large.json", "svamp_aug_flan-t5_large.json")  # the same, in one folder
CONTEXT_BYTES = 2**30  # of a process on a GPU: CUDA's context, cuBLAS, fragments
REHEARSAL = dict(max_steps=4, eval_steps=4, save_steps=4, iteration_steps=2, max_new_tokens=8,
    discriminator_pretrain_steps=1,
                 discriminator_update_batches=1, per_device_train_batch_size=8)  # fmt: skip


def find_file(folder: Path, name: str) -> Path | None:
    """Find the file whose path ends in this, at any depth."""
    return next((path for path in sorted(folder.rglob(Path(name).name)) if path.as_posix().endswith("/" + name)), None)


def find_data(folder: Path) -> tuple[str, list[Path], Path]:
    """Return (recipe, training files, test file), with the mentors' rows if present.

    Raises `InputError` if SVAMP is missing.
    """
    main = find_file(folder, MAIN)
    if main is None or not main.with_name(TEST).is_file():  # others have a file of that name too
        raise InputError(
            f"--data: there is no {MAIN} beside a {TEST} in {folder}; docs/recipes.md says where they are published"
        )
    for names in (MENTORS, FLAT):
        mentors = [path for name in names if (path := find_file(folder, name))]
        if len(mentors) == len(names):
            return "svamp-mentors-smollm2", [main, *mentors], main.with_name(TEST)
    return "svamp-smollm2", [main], main.with_name(TEST)


def prepare(inputs: list[Path], output: Path) -> None:
    """Run `qcrd-fast prepare`. Raises `RunError` if it fails."""
    cli = importlib.import_module((__package__ or "bench").removesuffix("bench") + "cli.main")
    if code := cli.entry(["prepare", *map(str, inputs), "--output", str(output)]):
        raise RunError(f"prepare ended with {code}")


def count_that_fit(config: TrainConfig, runs: int) -> int:
    """Return how many runs fit at once: the GPU's free memory over the largest, at most one per two cores.

    On a CPU: 1.
    """
    if not torch.cuda.is_available():
        return 1
    peak = train(config, None, dry_run=True)["memory"].get("peak")
    if not isinstance(peak, int | float):
        return 1
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(runs, int(0.9 * free / (peak + CONTEXT_BYTES)), (os.cpu_count() or 2) // 2))


def run(data: Path, student: str, output: Path, seeds: int, rehearse: bool) -> None:
    """Run all jobs and write their rows to OUTPUT/runs.csv. Raises what `run_jobs` raises."""
    values: dict[str, Any]
    if rehearse:
        from qcrd_fast.demo.runner import write_demo
        from qcrd_fast.demo.students import Recipe

        if not (output / "demo" / "student").is_dir():
            write_demo(output / "demo", 0, Recipe("decoder", (("symbol_pairs", 5, 0),), 8))
        recipe, values = (
            "ci",
            read_recipe(RECIPES / "ci.yaml") | REHEARSAL | {"data": str(output / "demo" / "train.jsonl")},
        )
        values |= {"test_data": str(output / "demo" / "test.jsonl"), "student": str(output / "demo" / "student")}
    else:
        recipe, inputs, test = find_data(data)
        files = [output / "data" / "train.jsonl", output / "data" / "test.jsonl"]
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for paths, file in ((inputs, files[0]), ([test], files[1])):
            if not file.exists():
                prepare(paths, file)
        values = read_recipe(RECIPES / f"{recipe}.yaml") | {
            "data": str(files[0]),
            "test_data": str(files[1]),
            "student": student,
        }
    config = TrainConfig.from_dict(values | {"output_dir": str(output / "runs")}, recipe)
    jobs = plan(config, range(seeds), METHODS[:1] if rehearse else METHODS, recipe)
    largest = next(job.config for job in reversed(jobs))
    parallel = count_that_fit(largest, len(jobs))
    print(f"{len(jobs)} runs of {recipe}, {parallel} at a time", flush=True)
    run_jobs(jobs, output / "runs.csv", parallel=parallel, keep=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the published files, at any depth")
    parser.add_argument("--student", help="Hugging Face folder, or hub id")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rehearse", action="store_true", help="four steps of the demo's student instead")
    parser.add_argument("--json", type=Path, help="file to write at the end")
    given = parser.parse_args(arguments)
    if not given.rehearse and not (given.data and given.student):
        parser.error("--data and --student are needed")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("qcrd_fast").setLevel(logging.INFO)
    code = 0
    given.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        run(given.data, given.student, given.output_dir, given.seeds, given.rehearse)
    except (InputError, RunError, Stopped) as error:
        print(f"gpu_training: {error}", file=sys.stderr)
        code = error.exit_code
    rows = read_csv(given.output_dir / "runs.csv")
    for row in rows:
        print(row["method"], "seed", row["seed"], "accuracy", row["accuracy"], "after", row["wall_s"], "s", flush=True)
    if given.json:
        write_json(given.json, {"rows": rows})
    return code


if __name__ == "__main__":
    sys.exit(main())
