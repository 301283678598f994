"""Judges give a rationale its quality s in [0, 1] (Eq. 6 and 7): the interface and `--quality`'s names.

A new judge is a class with `scores` and a row of `JUDGES`. `train(config, judges=...)` takes any object with `scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from qcrd_fast.data.schema import Question
from qcrd_fast.quality.cases import Case
from qcrd_fast.quality.checks import ChecksJudge
from qcrd_fast.quality.text import TextJudge
from qcrd_fast.quality.votes import VoteJudge


class Judge(Protocol):
    """Scores rationales.

    `scores` must be a pure function of the cases and the judge, so that a resumed run repeats the uninterrupted one. A
    case's question holds its other rationales.
    """

    def scores(self, cases: Sequence[Case]) -> Sequence[float]:
        """s of each case, in [0, 1]: a positive weighs s, a negative 1 - s."""
        ...


JUDGES: dict[str, Callable[[Sequence[Question]], Judge]] = {"vote": VoteJudge, "text": TextJudge, "checks": ChecksJudge}


def make_judge(name: str, questions: Sequence[Question]) -> Judge:
    """The judge of that name, for (or learnt from) the rationales of `questions`."""
    return JUDGES[name](questions)
