"""Judge by checks: the vote times fixed factors for a rationale's equations. Nothing is learnt.

The vote is one for all of a question's positives; these factors tell them apart. They follow from real chains of an
answer that won the vote: of T5-large's on svamp 95% are right where all equations hold, 81% where there is none, 62%
where one is false.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.quality.cases import Case
from qcrd_fast.quality.equations import find_equations, numbers_in
from qcrd_fast.quality.votes import VoteJudge

TASKS = ("number", "equation")  # whose rationales can be checked; the others have the vote alone
FALSE, NO_EQUATION, UNTRACED = 0.05, 0.5, 0.3  # a false equation; none at all; a number from nowhere


class ChecksJudge:
    """s = the vote's s times a factor for the rationale's equations.

    `FALSE` if an equation does not hold, else `NO_EQUATION` without any, else `UNTRACED` if an equation starts from a
    number that neither the question nor an earlier equation gives.
    """

    name = "the checks"

    def __init__(self, questions: Sequence[Question] = ()):
        self.vote = VoteJudge()

    def scores(self, cases: Sequence[Case]) -> list[float]:
        return [self.vote.score(case) * factor(case) for case in cases]


def factor(case: Case) -> float:
    """Return the factor for a rationale's equations, in (0, 1]; 1 for tasks without equations."""
    if (case.question.task or "text") not in TASKS:
        return 1.0
    return _factor(question_text(case.question), case.rationale.text)


@functools.lru_cache(maxsize=1 << 17)  # a run scores a teacher's rationale at each of its steps
def _factor(question: str, rationale: str) -> float:
    found = find_equations(rationale)
    if not found:
        return NO_EQUATION
    if not all(equation.holds for equation in found):
        return FALSE
    known = set(numbers_in(question))
    for equation in found:
        if not known.issuperset(equation.operands):
            return UNTRACED
        known.add(equation.result)
    return 1.0
