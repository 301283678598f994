"""What is done with scores: the best B rows, rationales above a threshold dropped, weights. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.select.registry import SELECTORS, Selector

Scores = Mapping[str, float | None]  # of one row, by name


def top(rows: Sequence[Question], scores: Sequence[Scores], name: str, B: int, *, reverse: bool = False) -> list[int]:
    """Indices of the B rows to choose first, best first, ties broken by id. Rows without a score, and rows above the
    score's `at_most`, are never among them, so that there may be fewer. `reverse`: the other end first."""
    selector = SELECTORS[name]
    sign = -1 if selector.higher_is_chosen != reverse else 1
    found = [(sign * s, rows[i].id, i) for i, s in enumerate(_of(scores, name)) if s is not None and _may(selector, s)]
    return [i for *_, i in sorted(found)[:B]]


def drop_above(rows: Sequence[Question], scores: Sequence[Scores], name: str, threshold: float) -> list[int]:
    """Indices of the rows whose score is at most `threshold`, in their order. Rows without a score stay."""
    return [i for i, s in enumerate(_of(scores, name)) if s is None or s <= threshold]


def drop_rationales_above(
    rationales: Sequence[Rationale], scores: Sequence[float | None], threshold: float
) -> list[int]:
    """Indices of the rationales whose score is at most `threshold`. Rationales without a score stay."""
    return [i for i in range(len(rationales)) if (s := scores[i]) is None or s <= threshold]


def weights(rows: Sequence[Question], scores: Sequence[Scores], name: str, *, reverse: bool = False) -> list[float]:
    """A weight a row, 0 or more, of mean 1: the share of rows that would be chosen after it, so that it does not depend
    on the unit of the score. Rows without a score weigh 1; rows above the score's `at_most` share the last place; ties
    share the mean of their places."""
    selector, found = SELECTORS[name], _of(scores, name)
    sign = 1 if selector.higher_is_chosen != reverse else -1
    values = [None if s is None else sign * s if _may(selector, s) else -math.inf for s in found]
    ranked = sorted(i for i in range(len(rows)) if values[i] is not None)
    ranked.sort(key=lambda i: values[i])  # type: ignore[arg-type, return-value]
    weight = [1.0] * len(rows)
    at = 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and values[ranked[end]] == values[ranked[at]]:
            end += 1
        for i in ranked[at:end]:
            weight[i] = (at + end) / len(ranked)  # twice the mean place, over their number
        at = end
    return weight


def _of(scores: Sequence[Scores], name: str) -> list[float | None]:
    found = [row[name] for row in scores]
    assert all(s is None or math.isfinite(s) for s in found)
    return found


def _may(selector: Selector, score: float) -> bool:
    return selector.at_most is None or score <= selector.at_most


def keep_positives(row: Question, kept: Sequence[int]) -> Question:
    """The row with some of its positives alone."""
    return dataclasses.replace(row, positives=tuple(row.positives[i] for i in kept))
