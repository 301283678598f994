"""Active runs in a report: accuracy against teacher tokens by strategy, what the rounds came to, revisions side by
side.

Read from the folder alone, finished or not; what is damaged is left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcrd_fast.report.run_view import read_objects
from qcrd_fast.runs.folder import PREDICTIONS, RESULTS
from qcrd_fast.sweep.intervals import Answers, single
from qcrd_fast.utils.config_files import number, read_object, read_options

CONFIG, ROUND, REVISIONS, PICKED = "active.resolved.yaml", "round.json", "revisions.jsonl", "picked.json"
# of `train` and `active`: what differs between seeds of one strategy, or changes nothing of what comes out
OF_A_RUN = {
    *("pool", "teacher", "data", "student", "eval_data", "test_data", "output_dir", "run_name", "prompts", "seed"),
    *("device", "concurrency", "timeout", "deadline", "eval_batch_size", "impl", "resume", "report_to", "ddp_timeout"),
}
MAX_ROUNDS, REVISED = 1000, 200  # rounds read; revisions read of each


@dataclasses.dataclass
class Round:
    """One round as it is found: its record, right answers of validation, and revisions."""

    record: dict[str, Any]
    answers: Answers | None
    revisions: list[dict[str, Any]]


@dataclasses.dataclass
class ActiveView:
    """An active run: name, strategy in words, settings, rounds from 0 on, and results where it ended."""

    name: str
    path: Path
    config: dict[str, Any]
    train: dict[str, Any]
    rounds: list[Round]
    results: dict[str, Any]

    @property
    def strategy(self) -> str:
        shown = (
            ", one step a request" if self.config.get("show") == "one" and self.config.get("revise") != "new" else ""
        )
        return f"{self.config.get('by')}, {self.config.get('revise')}{shown}"

    @property
    def state(self) -> str:
        """Finished, and why; or how far it is."""
        if stopped := self.results.get("stopped"):
            return f"finished, {stopped}"
        return f"not finished, round {len(self.rounds) - 1}" if self.rounds else "no round yet"

    @property
    def seed(self) -> int:
        return int(number(self.train.get("seed")) or 0)


@dataclasses.dataclass(frozen=True)
class Point:
    """Accuracy (0..1) of a strategy after so many rounds, with its 95% interval, and teacher tokens: mean, fewest,
    most."""

    round: int
    tokens: tuple[float, float, float]
    accuracy: tuple[float, float, float]
    seeds: int


def is_active(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_active(path: str | Path) -> ActiveView:
    """The view of an active run's folder."""
    folder = Path(path)
    options = read_options(folder / CONFIG)
    config, train = (part if isinstance(part := options.get(name), dict) else {} for name in ("active", "train"))
    rounds = []
    for at in range(MAX_ROUNDS):
        within = folder / f"round-{at:03d}"
        record = read_object(within / ROUND)
        if number(record.get("accuracy_validation")) is None or number(record.get("tokens")) is None:
            break
        answers = [r for r in read_objects(within / PREDICTIONS) if "id" in r and "correct" in r]
        revisions = list(itertools.islice(read_objects(within / REVISIONS), REVISED))
        rounds.append(Round(record, Answers.of(answers) if answers else None, revisions))
    return ActiveView(
        folder.resolve().name or str(folder), folder, config, train, rounds, read_object(folder / RESULTS)
    )


def settings_of(view: ActiveView) -> dict[str, Any]:
    """What runs of one strategy have in common: its options without files, folders and the seed."""
    return {name: value for name, value in {**view.train, **view.config}.items() if name not in OF_A_RUN}


def curves(views: Sequence[ActiveView]) -> dict[str, list[Point]]:
    """The points of each strategy, round by round: means over its runs, one a seed, with intervals over seeds and
    questions. Runs with other settings are another strategy, named by them; so is a second run of one seed, by its
    name."""
    runs: dict[str, dict[int, ActiveView]] = defaultdict(dict)
    settings = [settings_of(view) for view in views]
    for view, own in zip(views, settings, strict=True):
        alike = [s for other, s in zip(views, settings, strict=True) if other.strategy == view.strategy]
        differ = sorted({name for s in alike for name in own.keys() | s.keys() if own.get(name) != s.get(name)})
        label = ", ".join([view.strategy, *(f"{name.replace('_', '-')} {own.get(name)}" for name in differ)])
        runs[label if view.seed not in runs[label] else f"{label} ({view.name})"].setdefault(view.seed, view)
    runs = {label: found for label, found in runs.items() if found}
    found: dict[str, list[Point]] = {}
    for strategy, by_seed in runs.items():
        points = []
        for at in range(max(len(view.rounds) for view in by_seed.values())):
            some = {seed: view.rounds[at] for seed, view in by_seed.items() if len(view.rounds) > at}
            answers = {seed: r.answers for seed, r in some.items() if r.answers is not None}
            told = single(answers) if len(answers) == len(some) else None
            if told is None:
                continue
            tokens = [float(r.record["tokens"]) for r in some.values()]
            span = (float(np.mean(tokens)), min(tokens), max(tokens))
            points.append(Point(at, span, (told.mean, told.low, told.high), len(some)))
        if points:
            found[strategy] = points
    return found
