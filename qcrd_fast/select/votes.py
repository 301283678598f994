"""Scores that need no student: a random number, the teacher's agreement with itself, the quality of its rationales."""

from __future__ import annotations

from collections.abc import Sequence

from qcrd_fast.quality.cases import POSITIVE, teacher_case
from qcrd_fast.quality.judges import make_judge
from qcrd_fast.select.score import Block
from qcrd_fast.utils.keyed import keyed


def random(block: Block) -> list[float]:
    """A number in [0, 1) that depends on the seed and the id alone."""
    return [(keyed("select", block.options.seed, row.id) >> 10) * 2.0**-53 for row in block.rows]


def agree(block: Block) -> list[float | None]:
    """max_a n_a / K: the largest share of the K votes; None without votes."""
    return [max(row.votes.values()) / total if (total := sum(row.votes.values())) else None for row in block.rows]


def quality(block: Block) -> list[Sequence[float]]:
    """s of each positive, as `--quality vote` or `checks` gives it in training."""
    judge = make_judge(block.options.quality, [])
    return [judge.scores([teacher_case(row, r, POSITIVE) for r in row.positives]) for row in block.rows]
