"""Accuracy against minutes, one point a method with its interval. Imports no torch.

Runs are in one chart only if their minutes and accuracies can be compared: the same questions, the same device, and
time taken in the same way.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.report.run_view import RunView
from qcrd_fast.sweep.intervals import Answers, Estimate, single
from qcrd_fast.sweep.job import KEY, options_text
from qcrd_fast.sweep.results_csv import answers_of, read_csv
from qcrd_fast.utils.config_files import number

OF_STEPS = " of the steps"


class Chart(NamedTuple):
    """What the runs of one chart share."""

    title: str  # of the data
    axis: str  # what the minutes are
    device: str
    questions: str  # digest of their ids, and of their texts where a folder has them


class Outcome(NamedTuple):
    """A finished run: method, distinguishing options, time and correct answers."""

    chart: Chart
    method: str
    switches: tuple[str, ...]
    minutes: float
    answers: Answers
    parallel: int = 1  # runs that shared the machine
    seed: int = 0
    data: str = ""  # its path, for a second run of the same options and seed
    name: str = ""  # of the run, for a second one of the same data too


class Point(NamedTuple):
    """All runs of a method with the same options."""

    label: str
    minutes: Sequence[float]
    accuracy: Estimate  # over seeds and questions
    parallel: int

    @property
    def mean_minutes(self) -> float:
        return statistics.fmean(self.minutes)


def of_view(view: RunView) -> Outcome | None:
    """Return a run folder's outcome; None if unfinished, or without options, time or answers.

    The time is that of all attempts, where several runs were made by one command, or else that of the training steps
    alone: the mean of those logged, times the steps.
    """
    try:
        answers = Answers.of(view.predictions)
        config = TrainConfig.from_dict({k: v for k, v in view.config.items() if hasattr(TrainConfig, k)})
    except (KeyError, TypeError, ValueError):
        return None
    if not view.results or not answers.bits:
        return None
    gpu = bool(view.environment.get("gpu", any(number(r.get("peak_mib")) is not None for r in view.steps)))
    seconds = [s for r in view.attempts if (s := number(r.get("seconds"))) is not None]
    steps, step_ms = view.series("step_ms")
    if seconds:
        minutes, axis = sum(seconds) / 60, "GPU minutes" if gpu else "minutes of training"
    elif steps:
        minutes, axis = statistics.fmean(step_ms) * max(steps) / 6e4, ("GPU minutes" if gpu else "minutes") + OF_STEPS
    else:
        return None
    device = str(view.environment.get("device") or ("GPU" if gpu else "CPU"))
    parallel = max((int(number(r.get("parallel")) or 1) for r in view.attempts), default=1)
    chart = Chart(Path(config.test_data or config.data or "").name, axis, device, _digest(view.predictions))
    named = (("student", config.student), ("--data", config.data), ("--eval-data", config.eval_data))
    files = (f"{option} {Path(path).name}" for option, path in named if path)
    switches = (*files, *_switches(options_text(config)))
    data = str(config.data)
    return Outcome(chart, config.method, switches, minutes, answers, parallel, config.seed, data, view.title)


def _digest(predictions: Iterable[Mapping[str, Any]]) -> str:
    """Of the questions that were answered: ids alone are often those of another file's questions too."""
    asked = {str(record["id"]): str(record.get("question", "")) for record in predictions}
    return hashlib.sha256(repr(sorted(asked.items())).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def of_csv(path: str | Path) -> list[Outcome]:
    """Return the outcomes of a CSV of runs, the latest row of each. Raises `InputError` for another file."""
    if not Path(path).is_file():
        raise InputError(f"--results: {path} does not exist")
    found = []
    try:
        latest = {tuple(row[name] for name in KEY): row for row in read_csv(Path(path))}
        of_recipe: dict[str, set[str]] = {}
        for row in latest.values():
            of_recipe.setdefault(row["recipe"], set()).add(row["data"])
        for row in latest.values():
            if not (row["wall_s"] and row["correct"]):
                continue
            (answers,) = answers_of([row]).values()
            axis = "GPU minutes" if row["gpu_minutes"] else "minutes of training"
            title = f"{row['recipe']}, {row['student']}"
            if len(of_recipe[row["recipe"]]) > 1:  # made again, or changed: the ids may be the same
                title += f", data {row['data'] or 'unknown'}"
            chart = Chart(title, axis, row["device"], answers.questions)
            minutes, parallel = float(row["wall_s"]) / 60, int(row["parallel"] or 1)
            switches, seed = _switches(row["options"]), int(row["seed"])
            found.append(Outcome(chart, row["method"], switches, minutes, answers, parallel, seed))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--results: {path} is not a CSV of runs: {error!r}") from error
    return found


def _switches(options: str) -> tuple[str, ...]:
    return tuple(f"--{part.strip()}" for part in f" {options}".split(" --")[1:])


def points(outcomes: Iterable[Outcome]) -> dict[Chart, list[Point]]:
    """Return each chart's points, cheapest first, without options that all its runs share."""
    charts: dict[Chart, list[Outcome]] = {}
    for outcome in outcomes:
        charts.setdefault(outcome.chart, []).append(outcome)
    return {chart: _points(members) for chart, members in charts.items()}


def _points(members: Sequence[Outcome]) -> list[Point]:
    """A seed may have data of its own; a second run of a seed is no other seed, but a point of its own."""
    labels: dict[str, list[Outcome]] = {}
    for one in members:
        own = [s for s in one.switches if not all(s in other.switches for other in members)]
        labels.setdefault(" ".join([one.method, *own]), []).append(one)
    groups: dict[str, dict[int, Outcome]] = {}
    for name, some in labels.items():
        again = len({one.seed for one in some}) < len(some) and len({one.data for one in some}) > 1
        for one in some:
            label = f"{name} (data: {one.data})" if again else name
            if one.seed in groups.get(label, {}):
                label += f" ({one.name})"
            groups.setdefault(label, {})[one.seed] = one
    found = []
    for label, by_seed in groups.items():
        runs = list(by_seed.values())
        told = single({seed: run.answers for seed, run in by_seed.items()})
        assert told is not None  # a chart's runs have the same questions
        found.append(Point(label, [run.minutes for run in runs], told, max(run.parallel for run in runs)))
    return sorted(found, key=lambda point: (point.mean_minutes, point.label))
