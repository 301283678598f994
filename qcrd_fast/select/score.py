"""Scores of rows, a block at a time in the order of (length, id): what is computed together never depends on the rows'
order.

A score is a function of the checkpoint and the row, to the bit for the same set of rows: after a kill, in another
order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.registry import SELECTORS
from qcrd_fast.utils.oom import explaining_oom

if TYPE_CHECKING:
    from qcrd_fast.models.student import Student

Row = Question


@dataclasses.dataclass(frozen=True)
class RowScores:
    """Of one row: a value for each name, that of a score of rationales being the mean over its positives, and, for
    those, the values of the positives."""

    row: dict[str, float | None]
    positives: dict[str, list[float | None]]

    def of_positives(self, kept: Sequence[int]) -> RowScores:
        """The scores of the row with some of its positives alone."""
        left = {name: [values[i] for i in kept] for name, values in self.positives.items()}
        return RowScores(self.row | {name: mean_score(values) for name, values in left.items()}, left)


def mean_score(values: Iterable[float | None]) -> float | None:
    """The mean of the scores that are not None, None of none; of equal ones that score to the bit, so that they tie."""
    known = [s for s in values if s is not None]
    return statistics.mean(known) if known else None


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows that are scored together, and what several scores of them share."""

    rows: Sequence[Question]
    student: Student | None
    options: SelectOptions

    @functools.cached_property
    def answers(self) -> list[list[str | None]]:
        """The M sampled answers of each row."""
        from qcrd_fast.select.asking import sampled_answers

        assert self.student is not None
        return sampled_answers(self.student, self.rows, self.options)


def score_rows(
    rows: Sequence[Row],
    names: Sequence[str],
    student: Student | None = None,
    options: SelectOptions | None = None,
    *,
    finished: Mapping[str, RowScores] | None = None,
    on_block: Callable[[dict[str, RowScores]], None] | None = None,
) -> list[dict[str, float | None]]:
    """{name: score} of each row; see `score_all`."""
    return [found.row for found in score_all(rows, names, student, options, finished=finished, on_block=on_block)]


def score_all(
    rows: Sequence[Row],
    names: Sequence[str],
    student: Student | None = None,
    options: SelectOptions | None = None,
    *,
    finished: Mapping[str, RowScores] | None = None,
    on_block: Callable[[dict[str, RowScores]], None] | None = None,
) -> list[RowScores]:
    """The scores of each row, by the names of `SELECTORS`.

    finished: scores by id of an earlier call on the same rows, whose whole blocks are not computed again. on_block:
    told of each block that was computed, {id: scores}. An exception of it, such as for a stop, passes through.

    Raises:
        InputError: two rows have one id, or a name needs a student and there is none.
        RunError: a score is not finite.
    """
    options, finished = options or SelectOptions(), finished or {}
    if again := [id for id, n in Counter(row.id for row in rows).items() if n > 1]:
        raise InputError(f"two rows have the same id, {again[0]!r}")
    for name in names:
        if SELECTORS[name].needs_student and student is None:
            raise InputError(f"--by {name} needs --student")
    order = sorted(rows, key=lambda row: (len(question_text(row)), row.id))
    found: dict[str, RowScores] = {}
    for at in range(0, len(order), options.block_size):
        some = order[at : at + options.block_size]
        if all(row.id in finished for row in some):
            found |= {row.id: finished[row.id] for row in some}
            continue
        with explaining_oom(f"--block-size {max(options.block_size // 2, 1)}, or fewer --max-new-tokens", "scoring"):
            scored = dict(zip((row.id for row in some), _score(Block(some, student, options), names), strict=True))
        if on_block:
            on_block(scored)
        found |= scored
    return [found[row.id] for row in rows]


def _score(block: Block, names: Sequence[str]) -> list[RowScores]:
    scores = [RowScores({}, {}) for _ in block.rows]
    for name in names:
        selector = SELECTORS[name]
        for row, found, value in zip(block.rows, scores, selector.score(block), strict=True):
            if selector.per == "rationale":
                found.positives[name] = list(value)
                found.row[name] = mean_score(_finite(name, row, value))
            else:
                (found.row[name],) = _finite(name, row, [value])
    return scores


def _finite(name: str, row: Row, values: Sequence[float | None]) -> Sequence[float | None]:
    if wrong := [s for s in values if s is not None and not math.isfinite(s)]:
        raise RunError(f"--by {name} gave a score that is not finite, {wrong[0]}; question {row.id}")
    return values
