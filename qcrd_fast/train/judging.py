"""The judges of a run: they give positives and negatives their quality scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.discriminator.cross_fit import CrossFitted
from qcrd_fast.quality.cases import Case
from qcrd_fast.quality.judges import Judge, make_judge
from qcrd_fast.train.examples import Candidate

log = logging.getLogger(__name__)

# Kinds of candidates whose mean weight is logged: the teacher's majority and minority; the student's samples that agree
# with the majority, those that do not, those without an answer to compare.
WEIGHT_KINDS = ("majority", "minority", "lagged_agrees", "lagged_differs", "lagged_unknown")


class Judges(NamedTuple):
    """Of positives and of negatives; None: quality 1 and 0, so that every weight is 1."""

    positive: Judge | None = None
    negative: Judge | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return " or ".join(
            dict.fromkeys(getattr(judge, "name", type(judge).__name__) for judge in self if judge is not None)
        )


class DiscriminatorJudge:
    """The discriminator's score, as it is at the moment."""

    name = "the discriminator"

    def __init__(self, discriminator: CrossFitted):
        self.discriminator = discriminator

    def scores(self, cases: Sequence[Case]) -> list[float]:
        found: list[float] = self.discriminator.score(
            [(question_text(c.question), c.rationale.text) for c in cases]
        ).tolist()
        return found


def make_judges(config: TrainConfig, questions: Sequence[Question], discriminator: CrossFitted | None) -> Judges:
    """The judges of `--quality`, `--positive-quality` and `--negative-quality`; one of a name serves both.

    Where the discriminator was refused, and is None, the vote is in its place.
    """
    made: dict[str, Any] = {"none": None}
    names = ["vote" if name == "discriminator" and discriminator is None else name for name in config.qualities]
    for name in names:
        if name == "discriminator" and discriminator is not None:
            made.setdefault(name, DiscriminatorJudge(discriminator))
        elif name not in made:
            made[name] = make_judge(name, questions)
            idle = name != names[0] and config.effective("negative_source") == "none"
            if not idle and (without := sum(not q.votes for q in questions)):
                log.warning(
                    "--quality %s: %d of %d questions have no votes; their positives weigh 1, as do their negatives "
                    "(`qcrd-fast prepare` keeps the votes in its rows)",
                    name, without, len(questions),
                )  # fmt: skip
    return Judges(*(made[name] for name in names))


def weight_kind(candidate: Candidate) -> str:
    """Its kind of `WEIGHT_KINDS`."""
    if candidate.source != "lagged":
        return "majority" if candidate.positive else "minority"
    agrees = candidate.case.agrees if candidate.case else None
    return "lagged_unknown" if agrees is None else "lagged_agrees" if agrees else "lagged_differs"
