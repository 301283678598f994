"""Benchmark of active distillation: accuracy against teacher tokens on the study's word problems.

Arms differ in which questions they ask about, and how; the teacher is a script that knows the true steps.

Arms are paired by seed: the same pool, student, first round, tokens a round and optimizer steps. One CSV row a round.

python -m qcrd_fast.bench.active --seeds 0-3
python -m qcrd_fast.bench.active --table
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qcrd_fast.active.loop import run_active
from qcrd_fast.active.options import ActiveConfig
from qcrd_fast.demo.problems import WORDINGS, Problem, draw_problems, result, write_sentences
from qcrd_fast.demo.students import student_folder
from qcrd_fast.errors import InputError
from qcrd_fast.sweep.intervals import compare, estimate
from qcrd_fast.utils.files import read_records, write_lines

from .record import append, describe_machine
from .study.runs import RECIPES, from_hex, seed_ranges, to_hex

RESULTS = Path(__file__).parent / "results" / "active.csv"
TEST_QUESTIONS = 500
PARTS = ("pool", "test", "oracle")
COLUMNS = (
    *(
        "seed",
        "arm",
        "by",
        "revise",
        "show",
        "round",
        "tokens",
        "asked",
        "positives",
        "no_fault",
        "kept",
        "accuracy",
        "labels",
    ),
    *(
        "mean_nll_kept",
        "mean_nll_explanation",
        "pool",
        "first_steps",
        "max_steps",
        "batch_size",
        "round_tokens",
        "learning_rate",
        "cpu_s",
    ),
    *("device", "threads", "torch", "transformers", "commit", "time"),
)
log = logging.getLogger("qcrd_fast.bench")


class Arm(NamedTuple):
    by: str
    revise: str
    show: str = "all"


ARMS = {
    "random": Arm("random", "repair"),
    "step-uncertainty": Arm("step-uncertainty", "repair"),
    "answer-entropy": Arm("answer-entropy", "repair"),
    "ifd": Arm("ifd", "repair"),
    "known": Arm("known", "repair"),
    "random rewrite": Arm("random", "rewrite"),
    "random new": Arm("random", "new"),
    "answer-entropy new": Arm("answer-entropy", "new"),
    "known new": Arm("known", "new"),
    "random one by one": Arm("random", "repair", "one"),
}
BASE = "random"


class Settings(NamedTuple):
    """Settings shared by all arms. Tokens and steps are per round; each continues from the last student."""

    pool: int = 400
    rounds: int = 3
    round_tokens: int = 6000
    first_steps: int = 200
    max_steps: int = 80
    batch_size: int = 8
    learning_rate: float = 2e-3


def write_files(folder: Path, seed: int, settings: Settings) -> dict[str, str]:
    """Write the pool, the oracle and the validation questions of a seed.

    Accuracy is counted on the validation questions, which are the same for all seeds.
    """
    taken: set[str] = set()
    tests = draw_problems("mix", TEST_QUESTIONS, random.Random("mix active test"), taken)
    pool = draw_problems("mix", settings.pool, random.Random(f"mix active {seed}"), taken)

    def rows(problems: Sequence[Problem], name: str) -> list[dict[str, Any]]:
        return [
            {"id": f"{name}{i}", "question": p.text, "answer": str(p.answer), "task": "number"}
            for i, p in enumerate(problems)
        ]

    oracle = [
        {
            "question": p.text,
            "answer": str(p.answer),
            "solutions": [write_sentences([(s, result(s)) for s in p.steps], style) for style in range(WORDINGS)],
        }
        for p in pool
    ]
    write_lines(folder / "pool.jsonl", rows(pool, "p"))
    write_lines(folder / "test.jsonl", rows(tests, "t"))
    write_lines(folder / "oracle.jsonl", oracle)
    return {name: str(folder / f"{name}.jsonl") for name in PARTS}


def first_round(seed: int, settings: Settings, cache: Path, folder: Path) -> Path:
    """Return a seed's first round, shared by all arms: random questions, fresh rationales."""
    run = folder / f"first-{seed}"
    if not run.exists():
        files = write_files(folder, seed, settings)
        _run_active(
            seed, Arm("random", "new"), settings._replace(rounds=1, max_steps=settings.first_steps), cache, files, run
        )
    return run


def run_arm(seed: int, name: str, settings: Settings, cache: Path, folder: Path) -> list[dict[str, Any]]:
    """Continue from the seed's first round by this arm; return its CSV rows, one per round."""
    first, arm = first_round(seed, settings, cache, folder), ARMS[name]
    started = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        for part in ("round-000", "round-001"):
            shutil.copytree(first / part, run / part, symlinks=True)
        shutil.copy(first / "ledger.jsonl", run / "ledger.jsonl")
        files = {part: str(folder / f"{part}.jsonl") for part in PARTS}
        _run_active(seed, arm, settings, cache, files, run)
        rows = []
        for number in range(settings.rounds + 1):
            record = json.loads((run / f"round-{number:03d}" / "round.json").read_text())
            answers = read_records(run / f"round-{number:03d}" / "predictions.jsonl", "raise")
            labels = [answer["correct"] for answer in answers]
            found = record.get("results", {})
            own = {
                "no_fault": found.get("no fault", 0),
                "kept": found.get("kept", 0),
                "cpu_s": time.process_time() - started,
            }
            own |= {"accuracy": float(np.mean(labels)), "labels": to_hex(labels), "show": arm.show}
            rows.append({"seed": seed, "arm": name, **settings._asdict(), **record, **own})
    return rows


def _run_active(seed: int, arm: Arm, settings: Settings, cache: Path, files: dict[str, str], run: Path) -> None:
    config = ActiveConfig(
        pool=files["pool"], teacher=f"oracle:{files['oracle']}", by=arm.by, revise=arm.revise, show=arm.show,
        top=settings.pool, rounds=settings.rounds, budget_tokens=(settings.rounds + 1) * settings.round_tokens,
        round_tokens=settings.round_tokens, max_tokens=64, flat_rounds=None, no_fault_share=None, num_samples=4,
        num_continuations=2, continue_student=True,
    )  # fmt: skip
    options = dict(
        student=str(student_folder(RECIPES["decoder"], cache)), eval_data=files["test"], output_dir=str(run),
        resume="auto", seed=seed, task="number", method="sft-all",
        max_steps=settings.max_steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, warmup_ratio=0.05, max_source_length=96, max_target_length=48,
        save_steps=100_000, logging_steps=100, eval_batch_size=512,
    )  # fmt: skip
    run_active(config, options)


def read_rows(path: Path) -> dict[str, dict[int, dict[int, dict[str, str]]]]:
    """Read the rows by arm, seed and round, of complete arms only. Raises `InputError` without a file."""
    if not path.exists():
        raise InputError(f"--results: there is no {path}")
    found: dict[str, dict[int, dict[int, dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["arm"]][int(row["seed"])][int(row["round"])] = row
    return found


def bits(rows: dict[int, dict[int, dict[str, str]]], seeds: Sequence[int], number: int) -> np.ndarray:
    """Right answers after a round, 0 or 1 [S, Q]."""
    return np.array([from_hex(rows[seed][number]["labels"], TEST_QUESTIONS) for seed in seeds], float)


def needed_share(own: Sequence[float], tokens: Sequence[float], target: float) -> float | None:
    """Fraction of the last round's tokens at which the accuracy curve first reaches `target`.

    The curve is linear between its points; None if it never does.
    """
    for i in range(1, len(own)):
        if own[i] >= target:
            low, high = own[i - 1], own[i]
            part = 0.0 if low >= target or high == low else (target - low) / (high - low)
            return (tokens[i - 1] + part * (tokens[i] - tokens[i - 1])) / tokens[-1]
    return None


def print_table(path: Path, against: str = BASE) -> None:
    """Print accuracy after each round with its interval over seeds and questions.

    The last columns compare with the arm `against`: the paired difference at the end, and the share of its own tokens
    at which an arm reaches what `against` reaches at the end.
    """
    found = read_rows(path)
    base = found.get(against, {})
    rounds = sorted({number for arm in found.values() for seeds in arm.values() for number in seeds})
    numbers = [n for n in rounds if n]
    heads = [f"round {n}" for n in numbers]
    print("| arm | seeds | " + " | ".join(heads) + f" | last - {against} | tokens for {against}'s last |")
    print("|---" * (4 + len(heads)) + "|")
    for name, arm in found.items():
        seeds = sorted(seed for seed, of in arm.items() if len(of) == len(rounds))
        if not seeds:
            continue
        cells = []
        for number in numbers:
            told = estimate(bits(arm, seeds, number), resamples=1000)
            asked = np.mean([float(arm[s][number]["asked"]) for s in seeds])
            tokens = np.mean([float(arm[s][number]["tokens"]) for s in seeds])
            cells.append(f"{told.mean:.3f} ({told.low:.3f}, {told.high:.3f}); {asked:.0f} asked, {tokens / 1000:.1f}k")
        both = sorted(set(seeds) & {seed for seed, of in base.items() if len(of) == len(rounds)})
        difference, share = "-", "-"
        if name != against and both:
            last = numbers[-1]
            gap = compare(bits(arm, both, last), bits(base, both, last), resamples=1000)
            difference = f"{gap.mean:+.3f} ({gap.low:+.3f}, {gap.high:+.3f})"
        if both:
            target = float(bits(base, both, numbers[-1]).mean())
            own = [float(bits(arm, both, n).mean()) for n in rounds]
            tokens_of = [float(np.mean([float(arm[s][n]["tokens"]) for s in both])) for n in rounds]
            needed = needed_share(own, tokens_of, target)
            share = f"{needed:.0%}" if needed is not None else "not reached"
        print(f"| {name} | {len(seeds)} | " + " | ".join(cells) + f" | {difference} | {share} |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qcrd_fast.bench.active",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="of: %(default)s")
    parser.add_argument("--seeds", default="0-3", help="such as 0-7 or 0,3,5; default: %(default)s")
    for name, value in Settings._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    parser.add_argument("--budget-minutes", type=float, help="start no run after so many minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file; what it has is not run again")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "qcrd-fast" / "study", help="of pretrained students"
    )
    parser.add_argument("--table", action="store_true", help="print what the CSV holds, and run nothing")
    parser.add_argument("--against", default=BASE, choices=ARMS, help="the arm that --table compares with")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print_table(options.results, options.against)
            return 0
        return _run(options)
    except InputError as error:
        print(f"active: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("qcrd_fast").setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    arms = [name.strip() for name in options.arms.split(",")]
    for name in arms:
        if name not in ARMS:
            raise InputError(f"--arms: {name!r} is none of {', '.join(ARMS)}")
    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    done = {
        (arm, seed)
        for arm, seeds in (read_rows(options.results) if options.results.exists() else {}).items()
        for seed in seeds
    }
    began = time.monotonic()
    for seed in seed_ranges(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name in arms:
                if (name, seed) in done:
                    continue
                if options.budget_minutes and time.monotonic() - began > 60 * options.budget_minutes:
                    log.info("the budget of %g minutes is spent", options.budget_minutes)
                    return 75
                rows = run_arm(seed, name, settings, options.cache, Path(folder))
                append(
                    options.results, COLUMNS, [describe_machine(torch.device("cpu")) | row for row in rows], digits=4
                )
                curve = ", ".join(f"{row['tokens']}: {row['accuracy']:.3f}" for row in rows)
                log.info("seed %d, %s: %s; %.0f CPU-s", seed, name, curve, rows[-1]["cpu_s"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
