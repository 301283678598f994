"""Judge by text: the vote, corrected by a rationale's equations and numbers. numpy only.

Counts of a rationale (`features`) go through a logistic regression that is learnt from the vote, never from a gold
answer: is this a rationale of the majority? Each question is scored by a regression that was learnt from other
questions.

Shapes: R rationales, F features.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcrd_fast.data.answers import read_value
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.quality.cases import Case, teacher_cases
from qcrd_fast.quality.equations import find_equations, numbers_in
from qcrd_fast.quality.votes import VoteJudge

log = logging.getLogger(__name__)
Floats = NDArray[np.float64]
TASKS = ("number", "equation")  # whose rationales can be checked; the others have the vote alone
FOLDS = 5
FEWEST = 20  # rationales of either side that a regression needs
HALF = 0.5  # of the text's logit is added: it knows the vote already, from which it was learnt
RIDGE = 1.0  # on standardised features
FEATURES = (
    "has an equation", "equations", "false equations", "a false one", "all hold", "share that hold", "ends in its "
    "answer",
    "last number is its answer", "a result is its answer", "answer is in the question", "share of operands known",
    "unknown operands", "an unknown operand", "share of the question's numbers used", "numbers unused", "words",
    "sentences",
    "numbers", "equations said twice", "answer is whole", "answer is negative", "answer over the largest number",
)  # fmt: skip


def features(question: str, rationale: str, answer: str | None, task: str = "number") -> list[float]:
    """The values of `FEATURES` for a rationale [F]."""
    equations, said, given = find_equations(rationale), numbers_in(rationale), numbers_in(question)
    value = read_value(answer, task) if answer is not None else None
    number = value.number.value if value is not None and value.number is not None else None
    known, unknown, operands = set(given), 0, 0
    for equation in equations:
        operands += len(equation.operands)
        unknown += sum(operand not in known for operand in equation.operands)
        known.add(equation.result)
    false = sum(not equation.holds for equation in equations)
    results = [equation.result for equation in equations]
    used = set(said) | {operand for equation in equations for operand in equation.operands}
    unused = len(set(given) - used)
    largest = max(map(abs, given), default=0)
    size = abs(float(number)) / float(largest) if number is not None and largest else 0.0
    return [
        float(bool(equations)),
        math.log1p(len(equations)),
        float(min(false, 3)),
        float(false > 0),
        float(bool(equations) and not false),
        1 - false / len(equations) if equations else 0.5,
        float(bool(results) and results[-1] == number),
        float(bool(said) and said[-1] == number),
        float(number in results),
        float(number in given),
        1 - unknown / operands if operands else 0.5,
        float(min(unknown, 4)),
        float(unknown > 0),
        1 - unused / len(set(given)) if given else 0.5,
        float(min(unused, 4)),
        math.log1p(len(rationale.split())),
        math.log1p(len(re.findall(r"[.!?\n]+", rationale))),
        math.log1p(len(said)),
        float(len(equations) - len({equation.text for equation in equations})),
        float(number is not None and number.denominator == 1),
        float(number is not None and number < 0),
        math.log1p(min(size, 1e6)),
    ]


def fit_logistic(x_RF: Floats, y_R: Floats, ridge: float = RIDGE, steps: int = 50) -> Floats:
    """Fit a logistic regression with an L2 penalty; return weights [F + 1], the intercept last and unpenalised.

    Newton's method with halved steps, until the gradient is below 1e-9 a rationale.
    """
    design = np.column_stack([x_RF, np.ones(len(x_RF))])
    penalty = np.r_[np.full(x_RF.shape[1], ridge), 1e-9]
    w = np.zeros(design.shape[1])

    def loss(w: Floats) -> float:
        z = design @ w
        return float((np.logaddexp(0, z) - y_R * z).sum() + 0.5 * (penalty * w * w).sum())

    for _ in range(steps):
        p = sigmoid(design @ w)
        gradient = design.T @ (p - y_R) + penalty * w
        if np.abs(gradient).max() < 1e-9 * len(design):
            break
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty)
        step, size, before = np.linalg.solve(hessian, gradient), 1.0, loss(w)
        while size > 1e-4 and loss(w - size * step) > before:
            size /= 2
        w = w - size * step
    return w


def sigmoid(z: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(z)))


def fold_of(question_id: str) -> int:
    return hashlib.sha256(question_id.encode("utf-8", "surrogatepass")).digest()[0] % FOLDS


class TextJudge:
    """logit s = logit of the vote's s + half of (the text's logit - the log odds of a majority rationale).

    For questions of other tasks than `TASKS`, for samples without a conclusion, and where too few rationales differ to
    learn from, s is the vote's.
    """

    name = "the text"

    def __init__(self, questions: Sequence[Question]):
        self.vote = VoteJudge()
        cases = [case for q in questions if self._applies(q) for case in teacher_cases(q) if case.agrees is not None]
        x_RF = np.array([_features(case) for case in cases]).reshape(len(cases), len(FEATURES))
        y_R = np.array([float(bool(case.agrees)) for case in cases])
        fold_R = np.array([fold_of(case.question.id) for case in cases], dtype=int)
        self.weights = [_learn(x_RF[fold_R != fold], y_R[fold_R != fold]) for fold in range(FOLDS)]
        if cases and any(w is None for w in self.weights):
            log.warning(
                "--quality text: %d rationales, %d of them of minorities, are too few to learn from: the vote alone "
                "weighs",
                len(cases), len(cases) - int(y_R.sum()),
            )  # fmt: skip

    def scores(self, cases: Sequence[Case]) -> list[float]:
        return [self.score(case) for case in cases]

    def score(self, case: Case) -> float:
        voted = self.vote.score(case)
        w = self.weights[fold_of(case.question.id)]
        if w is None or case.votes is None or not self._applies(case.question) or not 0 < voted < 1:
            return voted
        logit = math.log(voted / (1 - voted)) + HALF * float(np.array(_features(case)) @ w[:-1] + w[-1])
        return float(sigmoid(logit))

    @staticmethod
    def _applies(question: Question) -> bool:
        return (question.task or "text") in TASKS and bool(question.votes)


def _learn(x_RF: Floats, y_R: Floats) -> Floats | None:
    """Fit weights [F + 1] of the text's logit relative to the vote's; None with too little data."""
    right, wrong = int(y_R.sum()), int(len(y_R) - y_R.sum())
    if min(right, wrong) < FEWEST:
        return None
    center, scale = x_RF.mean(0), x_RF.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    w = fit_logistic((x_RF - center) / scale, y_R)
    slopes = w[:-1] / scale
    return np.r_[slopes, w[-1] - center @ slopes - math.log(right / wrong)]


def _features(case: Case) -> tuple[float, ...]:
    answer = case.rationale.answer
    if answer is None and case.positive:
        answer = case.question.majority
    return _kept_features(question_text(case.question), case.rationale.text, answer, case.question.task or "text")


@functools.lru_cache(maxsize=1 << 17)  # a run scores a teacher's rationale once an iteration
def _kept_features(*key: Any) -> tuple[float, ...]:
    return tuple(features(*key))
