"""Active runs on the demo's problems: their files, an oracle of the true steps, a student that reasons, more or
less."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import problems as demo


def solutions(problem: demo.Problem) -> list[list[str]]:
    """The true steps in the demo's four wordings."""
    p, total = problem, problem.a + problem.b
    firsts = [f"First {p.a} + {p.b} = {total}.", f"{p.name} {p.more} {p.b}: {p.a} + {p.b} = {total}.",
              f"Now there are {p.a} + {p.b} = {total}.", f"Add: {p.a} + {p.b} = {total}."]  # fmt: skip
    seconds = [f"Then {total} - {p.c} = {p.answer}.", f"{p.name} {p.less} {p.c}: {total} - {p.c} = {p.answer}.",
               f"So {total} - {p.c} = {p.answer} are left.", f"Subtract: {total} - {p.c} = {p.answer}."]  # fmt: skip
    return [list(pair) for pair in zip(firsts, seconds, strict=True)]


def write_rows(path: Path, problems: Sequence[demo.Problem], name: str) -> Path:
    rows = [
        {"id": f"{name}{i}", "question": p.question, "answer": p.answer, "task": "number"}
        for i, p in enumerate(problems)
    ]
    return write(path, rows)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_files(folder: Path, pool: int = 24, validation: int = 12, test: int = 8) -> dict[str, str]:
    """pool, eval_data, test_data and the oracle's file, as options of `active`."""
    problems = demo.draw_problems(pool + validation + test, random.Random(5))
    ends = (pool, pool + validation)
    oracle = [{"question": p.question, "answer": p.answer, "solutions": solutions(p)} for p in problems]
    return {
        "pool": str(write_rows(folder / "pool.jsonl", problems[: ends[0]], "p")),
        "eval_data": str(write_rows(folder / "dev.jsonl", problems[ends[0] : ends[1]], "d")),
        "test_data": str(write_rows(folder / "test.jsonl", problems[ends[1] :], "t")),
        "teacher": f"oracle:{write(folder / 'oracle.jsonl', oracle)}",
    }


def teach_to_reason(base: Path, out: Path, steps: int = 150, **options: Any) -> str:
    """A run folder: a small student that was trained to reason first, on rows that nothing else uses."""
    from qcrd_fast.config import TrainConfig
    from qcrd_fast.train.trainer import train
    from tests.support.students import sampled_rows

    data = write(out.with_name(f"{out.name}.jsonl"), sampled_rows(200, seed=11))
    config = TrainConfig(
        data=str(data), student=str(base), output_dir=str(out), method="dss", reasoning_task=True,
        validation_fraction=0.0,
        max_steps=steps, learning_rate=5e-3, max_target_length=40, task="number", **options,
    )  # fmt: skip
    train(config)
    return str(out)


def arguments(files: dict[str, str], **options: Any) -> list[str]:
    """`qcrd-fast active` with these options over those of a run of a second."""
    values = {
        "budget_tokens": 20_000, "max_tokens": 64, "by": "random", "top": 4, "rounds": 2, "max_steps": 3,
        "method": "dss",
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_target_length": 40, "flat_rounds": "none",
        "no_fault_share": "none", "save_steps": 2, **files, **options,
    }  # fmt: skip
    args = ["active"]
    for name, value in values.items():
        if value is not None and value is not False:
            args += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return args


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# A folder, to compare

QUIET = {"run.log", "config.resolved.yaml", "active.resolved.yaml"}
UNTIMED = {"time", "seconds", "pid", "tokens_per_s", "step_ms", "sample_wait_ms"}


def contents(run: Path) -> dict[str, object]:
    """What a run is, without clocks: every file, of lines those that are not of a start."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        if not path.is_file() or path.name in QUIET or path.name == ".lock" or "final" in path.parts:
            continue
        name = str(path.relative_to(run))
        if path.name in ("ledger.jsonl", "metrics.jsonl"):
            records = [{k: v for k, v in row.items() if k not in UNTIMED} for row in read(path)]
            found[name] = [row for row in records if row.get("kind") != "start"]
        else:
            found[name] = path.read_bytes()
    return found
