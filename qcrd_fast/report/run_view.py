"""Read a run folder for a report in any state; writes, locks and raises nothing.

A run may be empty, cut off in the middle of a line, or still being written: what can be read is read, the rest is left
out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcrd_fast.config import LEGACY, METHODS, TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import CONFIG, LOCK, METRICS, NEGATIVES, OWN, PREDICTIONS, RESULTS
from qcrd_fast.sweep.job import ATTEMPTS, WHERE
from qcrd_fast.sweep.rationale_checks import RATIONALES
from qcrd_fast.utils.config_files import is_plain, number, read_object, read_options
from qcrd_fast.utils.files import read_records

QUALITY_SCORES = "quality_scores.jsonl"
MAX_LINE = 1 << 20  # bytes; a longer line is passed over
MAX_RECORDS = 1_000_000
MEASURES = {  # of eval_results.json, where a run's reasoning was judged; NAME_untrained: of the student before
    "accuracy": "answers at once",
    "accuracy_reasoned": "answers after reasoning",
    "sound_reasoning": "sound reasoning",
}


@dataclasses.dataclass
class RunView:
    """A run as found: name, state, options, logged steps, validations, results and texts."""

    name: str
    path: Path
    state: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    results: dict[str, Any]
    scores: list[dict[str, Any]]  # quality_scores.jsonl
    predictions: list[dict[str, Any]]
    attempts: list[dict[str, Any]]  # attempts.jsonl, where one command made several runs
    environment: dict[str, Any]  # and environment.json
    title: str = ""  # what the page calls it; the name, where no other run has it

    def __post_init__(self) -> None:
        self.title = self.title or self.name

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a number in metrics.jsonl, where it is one."""
        records = self.validations if name == "eval_accuracy" else self.steps
        points = [(r["step"], v) for r in records if (v := number(r.get(name))) is not None]
        return [float(s) for s, _ in points], [v for _, v in points]

    @property
    def rationales(self) -> dict[str, str]:
        """Return the student's greedy rationales of test questions by id: those judged, else the few stored."""
        found = [*self.predictions, *read_objects(self.path / RATIONALES)]
        return {str(r["id"]): r["rationale"] for r in found if "id" in r and isinstance(r.get("rationale"), str)}

    def option(self, name: str) -> Any:
        return self.config.get(name, getattr(TrainConfig, name, None))

    def switches(self) -> list[str]:
        """Options of the method that are not at their defaults, as on a command line."""
        found, method = [], self.config.get("method")
        defaults = TrainConfig(method=method if method in METHODS else "qcrd").resolved()
        idle = {} if method == "qcrd" else LEGACY  # what other methods have no use for
        for field in dataclasses.fields(TrainConfig):
            value = self.config.get(field.name, field.default)
            of_method = field.metadata["group"] in GROUPS or field.name in SWITCHES
            usual = (field.default, getattr(defaults, field.name), idle.get(field.name, field.default))
            if of_method and value not in usual and field.name not in ("method", "scheme", "impl"):
                text = os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
                found.append(f"--{field.name.replace('_', '-')} {text}")
        return found


GROUPS = ("Method", "Negatives", "Quality", "Discriminator", "Teacher")
SWITCHES = ("label", "num_positives", "reasoning_task", "domain_weights")


def read_run(path: str | Path) -> RunView:
    """A run folder as a `RunView`. Raises `InputError` if there is no such folder, or what is in it is no run's."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: no such run folder")
    there = {found.name for found in folder.iterdir()}
    if there and not there & set(OWN):
        raise InputError(f"{path}: no run folder: it has no {CONFIG}, {METRICS} or {RESULTS}")
    records = [r for r in read_objects(folder / METRICS) if number(r.get("step")) is not None]
    validations = [r for r in records if "eval_accuracy" in r]
    results = read_object(folder / RESULTS)
    steps = [r for r in records if "eval_accuracy" not in r]
    return RunView(
        name=folder.resolve().name or str(folder),
        path=folder,
        state=_state(folder, results, steps),
        config=read_options(folder / CONFIG),
        steps=steps,
        validations=validations,
        results=results,
        scores=[r for r in read_objects(folder / QUALITY_SCORES) if _is_score(r)],
        predictions=list(itertools.islice(read_objects(folder / PREDICTIONS), 100_000)),
        attempts=list(read_objects(folder / ATTEMPTS)),
        environment=read_object(folder / WHERE),
    )


def negatives(folder: Path) -> tuple[int, dict[str, str]]:
    """Return (iteration, {question id: text}) of the latest iteration with negatives."""
    for path in sorted((folder / NEGATIVES).glob("iteration-*.jsonl"), reverse=True):
        said = {
            r["id"]: r["text"]
            for r in read_objects(path)
            if isinstance(r.get("id"), str) and isinstance(r.get("text"), str)
        }
        digits = path.stem.removeprefix("iteration-")
        if said and digits.isdecimal():
            return int(digits), said
    return 0, {}


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects in a file of lines; skip other values and an unterminated line."""
    if not is_plain(path):
        return
    with contextlib.suppress(OSError):
        yield from itertools.islice(read_records(path, "skip", longest=MAX_LINE), MAX_RECORDS)


def _is_score(record: dict[str, Any]) -> bool:
    score = number(record.get("score"))
    return score is not None and 0 <= score <= 1 and isinstance(record.get("kind"), str)


def _state(folder: Path, results: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    if results:
        return "finished"
    last = f"step {int(steps[-1]['step'])}" if steps else "no step logged"
    return f"running, {last}" if _is_locked(folder / LOCK) else f"not finished, {last}"


def _is_locked(path: Path) -> bool:
    """Whether a living process of this machine holds the lock, without touching it."""
    try:
        pid, inode = int(path.read_text()), path.stat().st_ino
        if os.path.exists("/proc/locks"):
            locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            return any("FLOCK" in lock and any(part.endswith(f":{inode}") for part in lock) for lock in locks)
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
