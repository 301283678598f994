"""A run's row in the CSV of runs: options, results, machine. Imports no torch."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import METRICS, RESULTS
from qcrd_fast.sweep.intervals import Answers, Estimate, pair, single
from qcrd_fast.sweep.job import ATTEMPTS, JUDGED, KEY, WHERE, Job, key
from qcrd_fast.utils.config_files import read_object
from qcrd_fast.utils.files import append_whole, open_locked, read_records, require_place

log = logging.getLogger(__name__)

MEANS = (
    "active_hinge_lagged",
    "active_hinge_minority",
    "masked_minority_share",
    "quality_positive",
    "quality_negative",
)
JUDGEMENTS = ("arithmetic_checked", "arithmetic_right", "ends_in_gold", "ends_in_answer")
COLUMNS = (
    "recipe", "student", "method", "options", "seed", "accuracy", "accuracy_validation", "accuracy_untrained", "n",
    "evaluated_on", "steps", "best_step", "train_questions", "wall_s", "gpu_minutes", "parallel", *MEANS, *JUDGEMENTS,
    "device",
    "threads", "version", "torch", "triton", "transformers", "commit", "time", "data", "questions", "correct",
)  # fmt: skip


def row(job: Job) -> dict[str, Any]:
    """Return a finished run's folder as a row of the CSV."""
    read = {name: read_object(job.folder / name) for name in (RESULTS, WHERE, JUDGED)}
    results, where, judged = read[RESULTS], read[WHERE], read[JUDGED]
    # none where `train` alone was called
    attempts = [a for a in read_records(job.folder / ATTEMPTS) if isinstance(a.get("seconds"), int | float)]
    wall_s = round(sum(a["seconds"] for a in attempts), 1) or None
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {k: v for source in (results, where, judged) for k, v in source.items() if k in found}
    found |= key(job)
    found |= {
        "wall_s": wall_s,
        "parallel": max((a.get("parallel", 1) for a in attempts), default=None),
        **_means(job.folder),
    }
    if where.get("gpu") and wall_s:
        found["gpu_minutes"] = round(wall_s / 60, 2)
    if results.get("n"):
        answers = Answers.read(job.folder)
        found |= {"questions": answers.questions, "correct": answers.to_hex()}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}


def check_csv(path: Path) -> None:
    """Raises `InputError` when rows cannot be added to `path`."""
    require_place(path, "--results")
    if path.is_file():
        try:
            with open(path, "r+b") as file:
                first = file.readline()
        except OSError as error:
            raise InputError(f"--results: cannot write to {path}: {error.strerror}; choose another file") from error
        if first and _fields(first) != list(COLUMNS):
            raise InputError(f"--results: {path} has other columns; choose another file")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows as mappings of text; empty without a file. Malformed lines are skipped with a warning."""
    return _rows(path, path.read_bytes()) if path.is_file() else []


def _rows(path: Path, data: bytes) -> list[dict[str, str]]:
    """Parse the rows in `data`."""
    first, *lines = data.split(b"\n")
    names, found = _fields(first), []
    for number, line in enumerate(lines, 2):
        if (one := _parse(names, line)) is not None:
            found.append(one)
        elif line.strip():
            log.warning("%s:%d: passed over: no row of this file's columns", path, number)
    return found


def _fields(line: bytes) -> list[str]:
    """Parse one CSV line; empty if malformed. Rows never span lines, so damage stays in its line."""
    try:
        text = line.rstrip(b"\r\n").decode("utf-8")
        return next(csv.reader([text], strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        return []


def _parse(names: Sequence[str], line: bytes) -> dict[str, str] | None:
    """A whole row of these columns, or None."""
    fields = _fields(line)
    if not fields or len(fields) != len(names):
        return None
    found = dict(zip(names, fields, strict=True))
    try:  # the last column, where a row is cut
        if found.get("correct"):
            Answers.from_hex(found["correct"], int(found["n"]), found["questions"])
    except (ValueError, KeyError):
        return None
    return found


def append_row(path: Path, found: dict[str, Any]) -> bool:
    """Append the row unless it is there; return whether it was added.

    First removes a partial row of a killed writer. On a full disk (`OSError`) the file is unchanged.
    """
    descriptor = open_locked(path, os.O_APPEND, wait=True)
    try:
        held = path.read_bytes()
        whole = held.rfind(b"\n") + 1
        tail = held[whole:]
        if tail and _parse(COLUMNS, tail) is None and _fields(tail) != list(COLUMNS):
            log.warning("%s: truncated after the last intact row", path)
            os.ftruncate(descriptor, whole)
            held, tail = held[:whole], b""
        same = [*KEY, "accuracy", "questions", "correct", "device"]
        wanted = {name: "" if found[name] is None else str(found[name]) for name in same}
        if any(all(line.get(name) == wanted[name] for name in same) for line in _rows(path, held)):
            return False
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not held:
            writer.writeheader()
        writer.writerow({k: " ".join(v.splitlines()) if isinstance(v, str) else v for k, v in found.items()})
        append_whole(descriptor, b"\n" * bool(tail) + text.getvalue().encode())
        return True
    finally:
        os.close(descriptor)


def _means(folder: Path) -> dict[str, float]:
    """Return means over the logged steps of what shows whether negatives taught anything."""
    steps = [r for r in read_records(folder / METRICS) if "loss" in r]
    values = {name: [r[name] for r in steps if r.get(name) is not None] for name in MEANS}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Format a line a run, then a line a method: accuracy with interval, difference from the first method."""
    lines = [f"{r['method']} seed {r['seed']}: accuracy {r['accuracy']}, n {r['n']}, {r['wall_s']} s" for r in rows]
    answers = {m: answers_of([r for r in rows if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in rows)}
    first = next(iter(answers))
    for method, found in answers.items():
        if (told := single(found)) is not None:
            line = f"{method}: {shares(told)} %, seeds: {told.seeds}"
            if method != first and (against := pair(found, answers[first])) is not None:
                line += f"; against {first}: {signed(against)}"
            lines.append(line)
        elif found:
            lines.append(f"{method}: no mean, no difference: each seed answered other questions")
    return "\n".join(lines)


def shares(told: Estimate) -> str:
    """A share in percent with its interval, which ends at 0 and 100."""
    return f"{100 * told.mean:.1f} ({100 * max(told.low, 0):.1f} to {100 * min(told.high, 1):.1f})"


def signed(told: Estimate) -> str:
    """A difference in points with its interval."""
    return f"{100 * told.mean:+.1f} ({100 * told.low:+.1f} to {100 * told.high:+.1f})"


def answers_of(rows: Sequence[Mapping[str, Any]]) -> dict[int, Answers]:
    """Return {seed: answers} of CSV rows, or of `row`; later rows of a seed replace earlier ones."""
    found = {}
    for r in rows:
        if r["correct"]:
            found[int(r["seed"])] = Answers.from_hex(r["correct"], int(r["n"]), r["questions"])
    return found
