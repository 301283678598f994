"""The verb `select`: rows with scores, and the rows that a policy chooses by them."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qcrd_fast.data.load import load_questions, to_row, write_prepared
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import with_views
from qcrd_fast.models.views import read_views
from qcrd_fast.select import policy
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.progress import Progress, identity
from qcrd_fast.select.registry import SELECTORS, unused
from qcrd_fast.select.score import RowScores, score_all

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do with the scores: at most one of the best `top` rows, what is above `drop_above` dropped, or a weight a
    row.

    `reverse`: the other end of the scores is chosen first. Raises `InputError` for more than one, or for several names.
    """

    names: Sequence[str]
    top: int | None = None
    drop_above: float | None = None
    weight: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("top", "drop_above", "weight") if getattr(self, name) not in (None, False)]
        flags = ["--" + name.replace("_", "-") for name in given]
        if len(given) > 1:
            raise InputError(f"{' and '.join(flags)} are given; choose by one of them")
        if given and len(self.names) > 1:
            raise InputError(f"{flags[0]} needs one score to choose by; --by names {', '.join(self.names)}")
        if self.reverse and (not given or self.drop_above is not None):
            raise InputError("--reverse goes with --top or --weight")
        if self.drop_above is not None and not math.isfinite(self.drop_above):
            raise InputError(f"--drop-above must be finite, got {self.drop_above}")

    def choose(self, rows: Sequence[Question], found: Sequence[RowScores]) -> list[tuple[Question, RowScores]]:
        """The rows that are left, in their order, with their scores.

        It chooses among the rows to train on, those of split train or none; where there are such, all others are left
        as they are.
        """
        mine = ids_to_train_on(rows)
        pairs = list(zip(rows, found, strict=True))
        others = [pair for pair in pairs if pair[0].id not in mine]
        chosen = self._choose(*zip(*(pair for pair in pairs if pair[0].id in mine), strict=True))
        place = {row.id: n for n, row in enumerate(rows)}
        return sorted(chosen + others, key=lambda pair: place[pair[0].id])

    def _choose(self, rows: Sequence[Question], found: Sequence[RowScores]) -> list[tuple[Question, RowScores]]:
        scores, name = [scores.row for scores in found], self.names[0]
        pairs = list(zip(rows, found, strict=True))
        if self.top is not None:
            if (limit := SELECTORS[name].at_most) is not None:
                pairs = [_drop(row, of_row, name, limit) for row, of_row in pairs]
                scores = [of_row.row for _, of_row in pairs]
            return [pairs[i] for i in sorted(policy.top(rows, scores, name, self.top, reverse=self.reverse))]
        if self.drop_above is not None and SELECTORS[name].per == "rationale":
            left = [_drop(row, of_row, name, self.drop_above) for row, of_row in pairs]
            return [
                after for (row, _), after in zip(pairs, left, strict=True) if after[0].positives or not row.positives
            ]
        if self.drop_above is not None:
            return [pairs[i] for i in policy.drop_above(rows, scores, name, self.drop_above)]
        if self.weight:
            if count := sum(row.weight is not None for row in rows):
                log.warning("--weight takes the place of the weight that %d rows have", count)
            weights = policy.weights(rows, scores, name, reverse=self.reverse)
            return [
                (dataclasses.replace(row, weight=w), of_row) for (row, of_row), w in zip(pairs, weights, strict=True)
            ]
        return pairs


def ids_to_train_on(rows: Sequence[Question]) -> set[str]:
    """The ids of the rows of split train or none; where there are no such rows, of all."""
    return {row.id for row in rows if row.split in (None, "train")} or {row.id for row in rows}


def _drop(row: Question, scores: RowScores, name: str, threshold: float) -> tuple[Question, RowScores]:
    """The row without the positives above the threshold, and their scores."""
    kept = policy.drop_rationales_above(row.positives, scores.positives[name], threshold)
    return policy.keep_positives(row, kept), scores.of_positives(kept)


def select(
    data: str,
    output: str,
    chosen: Policy,
    options: SelectOptions,
    *,
    student: str | None = None,
    device: str = "auto",
    task: str | None = None,
    format: str = "auto",
    on_bad_row: str = "error",
    views: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Score the rows of `data` by the names of the policy, choose, and write them to `output`. Returns the summary.

    What is done is kept in a file beside the output until the output is there, so that the same command goes on after a
    kill.

    Raises `InputError` for rows, options or a student at fault, `RunError` where the output cannot be written.
    """
    needy = [name for name in chosen.names if SELECTORS[name].needs_student]
    if needy and student is None:
        raise InputError(f"--by {needy[0]} needs --student, a run, a model folder or a hub id")
    if student is not None and not needy:
        raise InputError(f"--student is given, but --by {', '.join(chosen.names)} asks nothing of it; leave it out")
    changed = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default]
    changed += [name for name, is_set in (("views", views), ("device", device != "auto")) if is_set]
    if idle := unused(chosen.names, changed):
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        log.warning("--by %s has no use for %s", ", ".join(chosen.names), flags)
    loaded = load_questions(data, format=format, task=task, on_bad_row=on_bad_row, seed=options.seed)
    log.info("%s", loaded.taken_for)
    for bad in loaded.skipped:
        log.warning("set aside %s", bad)
    rows, table = loaded.questions, read_views(views)
    named = None
    if needy:
        from qcrd_fast.runs.load import check_student, find_model

        named = find_model(str(student))
        if dry_run:
            check_student(named, device)
    if dry_run:
        return {"would_score": len(rows), "by": ", ".join(chosen.names), "student": named, "output": output}
    started = time.perf_counter()
    with Progress(output, identity(rows, chosen.names, named, options, table)) as progress:
        if progress.finished:
            log.info("%d of %d rows are scored already", len(progress.finished), len(rows))
        found = _score(rows, chosen.names, named, options, device, progress, table)
        kept = chosen.choose(rows, found)
        write_prepared(output, (with_scores(*pair) for pair in kept))
        progress.done()
    mine = ids_to_train_on(rows)
    left = [row for row, _ in kept if row.id in mine]
    if not left:
        log.warning("none of %d rows to train on is left", len(mine))
    summary: dict[str, Any] = {"rows": len(mine), "chosen": len(left)}
    if others := len(rows) - len(mine):
        summary["of_other_splits"] = others  # which are written too
    summary["positives"] = sum(len(row.positives) for row in left)
    of_mine = [scores for row, scores in zip(rows, found, strict=True) if row.id in mine]
    for name in chosen.names:
        summary |= describe(name, [scores.row[name] for scores in of_mine])
    return summary | {"seconds": round(time.perf_counter() - started, 3), "output": output}


def _score(
    rows: Sequence[Question],
    names: Sequence[str],
    student: str | None,
    options: SelectOptions,
    device: str,
    progress: Progress,
    views: Mapping[str, str],
) -> list[RowScores]:
    loaded = None
    if student is not None and len(progress.finished) < len(rows):
        from qcrd_fast.runs.load import load_student
        from qcrd_fast.select.asking import choose_ask
        from qcrd_fast.utils.device import choose_threads

        loaded, state = load_student(student, device)
        loaded.prompts = with_views(loaded.prompts, views)
        choose_threads(loaded.device, sum(p.numel() for p in loaded.model.parameters()))
        options = dataclasses.replace(options, ask=choose_ask(options.ask, loaded, state))
        log.info("the student is asked by `%s`", options.ask)
        if options.ask == "predict" and "step-uncertainty" in names:
            raise InputError(
                "--by step-uncertainty needs a student that reasons before it answers: train it with --reasoning-task"
            )
    done = len(progress.finished)

    def keep(scores: dict[str, RowScores]) -> None:
        nonlocal done
        progress.add(scores)
        done += len(scores)
        log.info("%d of %d rows scored", done, len(rows))

    if student is not None and loaded is None:  # all are finished
        return [progress.finished[row.id] for row in rows]
    return score_all(rows, names, loaded, options, finished=progress.finished, on_block=keep)


def with_scores(row: Question, scores: RowScores) -> dict[str, Any]:
    """The row as it is written: `scores` by name, and in each positive those that are of rationales."""
    written = to_row(row)
    for i, positive in enumerate(written["positives"]):
        if of_it := {name: values[i] for name, values in scores.positives.items()}:
            positive["scores"] = of_it
    return written | {"scores": scores.row}


def describe(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """{NAME_mean, NAME_min, NAME_median, NAME_max, NAME_without}: the last counts rows without a score."""
    known = sorted(v for v in values if v is not None)
    key = name.replace("-", "_")
    figures: dict[str, Any] = {f"{key}_without": len(values) - len(known)}
    if known:
        mean = math.fsum(known) / len(known)
        named = (("mean", mean), ("min", known[0]), ("median", statistics.median(known)), ("max", known[-1]))
        figures = {f"{key}_{what}": float(v) for what, v in named} | figures
    return figures
