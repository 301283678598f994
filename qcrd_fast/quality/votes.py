"""Judge by votes: a rationale is as good as the share of samples that give its answer."""

from __future__ import annotations

from collections.abc import Sequence

from qcrd_fast.data.schema import Question
from qcrd_fast.quality.cases import Case


def vote_score(n: int, K: int) -> float:
    """s = (n + 1/2)^e / ((n + 1/2)^e + (K - n + 1/2)^e): the sigmoid of e times the logit of the smoothed share n/K.

    e is 2; for K = 1, where a vote says little, 1.
    """
    e = 1 if K == 1 else 2
    here, elsewhere = (n + 0.5) ** e, (K - n + 0.5) ** e
    return here / (here + elsewhere)


class VoteJudge:
    """Scores by n of K votes (`vote_score`). Nothing is trained, and no gold answer is read.

    Without votes: 1 for a positive, 0 for any other. A student's sample that gives an answer of no other sample has n =
    0; one without a conclusion has its expected agreement; one whose answer cannot be compared (task `text`) 0.
    """

    name = "the vote"

    def __init__(self, questions: Sequence[Question] = ()):
        pass

    def scores(self, cases: Sequence[Case]) -> list[float]:
        return [self.score(case) for case in cases]

    def score(self, case: Case) -> float:
        if case.expected is not None and case.question.votes:
            return case.expected
        if case.votes is None:
            return float(case.positive)
        return vote_score(case.votes, case.samples)
