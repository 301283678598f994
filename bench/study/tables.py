"""The study's tables: means over seeds with spread, paired differences with Holm's correction."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcrd_fast.errors import InputError
from qcrd_fast.sweep.intervals import Estimate, compare, crossed_variance

from .runs import from_hex

COLUMNS = (
    "stage", "task", "family", "arm", "seed", "learning_rate", "epochs", "questions", "accuracy", "sound", "faithful",
    "nll_sound", "entropy", "loss_cl", "active_lagged", "active_minority", "steps", "train_cpu_s", "cpu_s", "labels",
    "sounds", "faithfuls", "device", "threads", "torch", "transformers", "commit", "time", "student_tokens",
)  # fmt: skip
METRICS = {"accuracy": "labels", "sound": "sounds"}
MACHINE = ("device", "threads", "torch")  # on others the pretrained student is another, so runs are no pair
COMPARED = ("task", "family", "arm", "against", "metric", "difference", "95% interval", "seeds", "p (Holm)")
LEAST_P = 1e-6  # smaller ones are told as smaller: so far out the t distribution is a guess
TESTED_SEEDS = 5  # at least, for a p-value: the spread between fewer says too little of the spread
Rows = dict[int, dict[str, str]]  # by seed


def read_runs(path: Path, stage: str) -> dict[tuple[str, ...], dict[str, Rows]]:
    """Read rows by (task, family, learning rate, epochs, questions), arm and seed.

    Raises `InputError` without a file.
    """
    if not path.exists():
        raise InputError(f"--results: there is no {path}")
    found: dict[tuple[str, ...], dict[str, Rows]] = defaultdict(lambda: defaultdict(dict))
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["stage"] == stage:
                group = tuple(row[name] for name in ("task", "family", "learning_rate", "epochs", "questions"))
                found[group][row["arm"]][int(row["seed"])] = row
    return found


def bits_of(rows: Rows, metric: str, seeds: Sequence[int]) -> np.ndarray:
    """Right answers, 0 or 1 [S, Q]."""
    return np.array([from_hex(rows[seed][METRICS[metric]]) for seed in seeds], float)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in the given order."""
    order, adjusted, worst = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def p_value(difference_SQ: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0, from the crossed design's standard error and degrees of freedom."""
    variance, freedom = crossed_variance(difference_SQ)
    if not variance:
        return 1.0 if not difference_SQ.mean() else 0.0
    t = abs(float(difference_SQ.mean())) / math.sqrt(variance)
    return _beyond(math.atan(t / math.sqrt(freedom)), freedom) / _beyond(0.0, freedom)


def _beyond(angle: float, freedom: float) -> float:
    """The area beyond t = sqrt(freedom) tan(angle) under a density in proportion to Student's: cos(a)^(freedom-1)."""
    edges = np.linspace(angle, math.pi / 2, 20_001)
    return float((np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)).sum() * (edges[1] - edges[0]))


def paired_seeds(a: Rows, b: Rows) -> list[int]:
    """The seeds that both arms have from one kind of machine, so that both began with the same student."""
    return sorted(seed for seed in set(a) & set(b) if all(a[seed][name] == b[seed][name] for name in MACHINE))


def _head(name: str) -> str:
    """The head of a column."""
    return {"nll_sound": "nll", "cpu_s": "CPU-s", "student_tokens": "student tokens"}.get(name, name)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def make_tables(path: Path, stage: str, baselines: Sequence[str], fewest: int = 1) -> str:
    """Return a Markdown table for each task and family, of the arms with at least `fewest` runs.

    For `confirm`, also all comparisons, of every arm, with Holm's p, if there are enough seeds for one.
    """
    tests: list[tuple[tuple[str, ...], Estimate, float]] = []
    page: list[str] = []
    for (task, family, rate, epochs, questions), runs in read_runs(path, stage).items():
        known = [base for base in baselines if base in runs]
        heads = [f"{metric} - {base}" for base in known for metric in METRICS]
        named = ["faithful", "nll_sound", "entropy", "cpu_s"]
        if all(row.get("student_tokens") for rows in runs.values() for row in rows.values()):
            named.append("student_tokens")  # which no run said at first
        head = ["arm", "seeds", "labels (sd)", "sound (sd)", *map(_head, named), *heads]
        lines = []
        for arm, rows in runs.items():
            if len(rows) < fewest and stage != "confirm":  # whose comparisons all count
                continue
            cells = [arm, str(len(rows))]
            for metric in METRICS:
                values = [float(r[metric]) for r in rows.values()]
                spread = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else "-"
                cells.append(f"{np.mean(values):.3f} ({spread})")
            means = {name: float(np.mean([float(r[name]) for r in rows.values()])) for name in named}
            cells += [f"{m:,.0f}" if name == "student_tokens" else f"{m:.3g}" for name, m in means.items()]
            for base in known:
                seeds = paired_seeds(rows, runs[base])
                for metric in METRICS:
                    if base == arm or not seeds:
                        cells.append("-")
                        continue
                    a, b = bits_of(rows, metric, seeds), bits_of(runs[base], metric, seeds)
                    found = compare(a, b, resamples=1000)
                    cells.append(f"{found.mean:+.3f} ({found.low:+.3f}, {found.high:+.3f})")
                    if arm not in baselines:
                        tests.append(((task, family, arm, base, metric), found, p_value(a - b)))
            if len(rows) >= fewest:
                lines.append(cells)
        if lines:
            page += [
                f"### {stage}: {task}, {family}; learning rate {rate}, {epochs} epochs of {questions} questions",
                _table(head, lines),
            ]
    if stage == "confirm" and tests:
        tested = [found.seeds >= TESTED_SEEDS for _, found, _ in tests]
        adjusted = holm([p if enough else 1.0 for (_, _, p), enough in zip(tests, tested, strict=True)])
        lines = []
        for (names, found, _), p, enough in zip(tests, adjusted, tested, strict=True):
            told = "-" if not enough else f"<{LEAST_P:g}" if p < LEAST_P else f"{p:.2g}"
            interval = f"{found.low:+.3f} to {found.high:+.3f}"
            lines.append([*names, f"{found.mean:+.3f}", interval, str(found.seeds), told])
        page += [
            "### Every comparison, Holm over all of them",
            _table(COMPARED, lines),
            f"Holm over all {len(tests)}; one of fewer than {TESTED_SEEDS} seeds counts as p = 1, and none is printed.",
        ]
    return "\n\n".join(page)


def updated(page: str, stage: str, tables: str) -> str:
    """Return the page with a stage's tables between its two marks, `<!-- STAGE -->` and `<!-- end STAGE -->`.

    Raises:
        InputError: the page lacks them.
    """
    start, end = f"<!-- {stage} -->\n", f"<!-- end {stage} -->"
    if start not in page or end not in page:
        raise InputError(f"--update: the page has no {start.strip()} ... {end}")
    return f"{page[: page.index(start)]}{start}\n{tables}\n\n{page[page.index(end) :]}"
