"""Accuracy against minutes, one point a method with its interval. Imports no torch.

Runs are in one chart only if their minutes and accuracies can be compared: the same questions, the same device, and
time taken in the same way.
"""

from __future__ import annotations

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
    questions: str  # digest of their ids


class Outcome(NamedTuple):
    """A finished run: method, distinguishing options, time and correct answers."""

    chart: Chart
    method: str
    switches: tuple[str, ...]
    minutes: float
    answers: Answers
    parallel: int = 1  # runs that shared the machine


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
    chart = Chart(Path(config.test_data or config.data or "").name, axis, device, answers.questions)
    switches = (f"student {Path(str(config.student)).name}", *_switches(options_text(config)))
    return Outcome(chart, config.method, switches, minutes, answers, parallel)


def of_csv(path: str | Path) -> list[Outcome]:
    """Return the outcomes of a CSV of runs, the latest row of each. Raises `InputError` for another file."""
    if not Path(path).is_file():
        raise InputError(f"--results: {path} does not exist")
    found = []
    try:
        latest = {tuple(row[name] for name in KEY): row for row in read_csv(Path(path))}
        for row in latest.values():
            if not (row["wall_s"] and row["correct"]):
                continue
            (answers,) = answers_of([row]).values()
            axis = "GPU minutes" if row["gpu_minutes"] else "minutes of training"
            chart = Chart(f"{row['recipe']}, {row['student']}", axis, row["device"], answers.questions)
            minutes, parallel = float(row["wall_s"]) / 60, int(row["parallel"] or 1)
            found.append(Outcome(chart, row["method"], _switches(row["options"]), minutes, answers, parallel))
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
    groups: dict[str, list[Outcome]] = {}
    for one in members:
        own = [s for s in one.switches if not all(s in other.switches for other in members)]
        groups.setdefault(" ".join([one.method, *own]), []).append(one)
    found = []
    for label, runs in groups.items():
        answers: Mapping[int, Any] = dict(enumerate(run.answers for run in runs))
        told = single(answers)
        assert told is not None  # a chart's runs have the same questions
        found.append(Point(label, [run.minutes for run in runs], told, max(run.parallel for run in runs)))
    return sorted(found, key=lambda point: (point.mean_minutes, point.label))
