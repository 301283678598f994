"""Judges of rationales by votes, equations, the question's other chains or, for oracles, everything.

A rule is a function of a prepared question and one of its texts with its answer, to s in 0..1. Only an oracle looks at
gold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qcrd_fast.data.schema import Question
from qcrd_fast.demo.problems import OPERATIONS, Problem, is_faithful, is_sound, stated_steps
from qcrd_fast.quality.cases import Case
from qcrd_fast.quality.checks import ChecksJudge
from qcrd_fast.quality.judges import Judge
from qcrd_fast.quality.votes import vote_score

Rule = Callable[[Question, str, "str | None"], float]


class RuleJudge:
    """A rule as a judge for `train`; each text is scored once."""

    def __init__(self, rule: Rule):
        self.rule, self._known = rule, dict[tuple[str, str], float]()

    def scores(self, cases: Sequence[Case]) -> list[float]:
        found = []
        for case in cases:
            key = case.question.id, case.rationale.text
            if key not in self._known:
                self._known[key] = self.rule(case.question, case.rationale.text, case.rationale.answer)
            found.append(self._known[key])
        return found


def vote(question: Question, text: str, answer: str | None) -> float:
    return vote_score(question.votes.get(answer or "", 0), sum(question.votes.values()))


def checks(question: Question, text: str) -> tuple[bool, bool]:
    """Return (there are equations and all hold, every number comes from the question or a result before)."""
    steps = stated_steps(text)
    known = {int(word) for word in question.question.replace(".", " ").replace(",", " ").split() if word.isdigit()}
    traced = True
    for left, _, right, stated in steps:
        traced = traced and {left, right} <= known
        known.add(stated)
    return bool(steps) and all(OPERATIONS[o](a, b) == c for a, o, b, c in steps), traced


def text(question: Question, text: str, answer: str | None) -> float:
    """The vote's logit, -1 where an equation is false, +0.5 where all hold."""
    s = vote(question, text, answer)
    return _sigmoid(math.log(s / (1 - s)) + (0.5 if checks(question, text)[0] else -1.0))


def equations(question: Question, text: str, answer: str | None) -> float:
    """1 where every equation holds, else 0.05."""
    return 1.0 if checks(question, text)[0] else 0.05


def traced(question: Question, text: str, answer: str | None) -> float:
    """1 if every equation holds and every number has an origin in question or results, else 0.05."""
    return 1.0 if all(checks(question, text)) else 0.05


def consensus(question: Question, text: str, answer: str | None) -> float:
    """How many of the question's other chains have this chain's intermediate results, smoothed mean."""
    mine = _results(text)
    others = [r.text for r in (*question.positives, *question.negatives) if r.text != text]
    if not mine or not others:
        return 0.5
    told = [set(_all_results(other)) for other in others]
    shares = [(sum(value in results for results in told) + 0.5) / (len(told) + 1) for value in mine]
    return sum(shares) / len(shares)


def _results(chain: str) -> list[int]:
    """Intermediate results; of a chain with one step, the numbers that it starts from."""
    steps = stated_steps(chain)
    if len(steps) > 1:
        return [stated for *_, stated in steps[:-1]]
    return [number for left, _, right, _ in steps for number in (left, right)]


def _all_results(chain: str) -> list[int]:
    return [number for left, _, right, stated in stated_steps(chain) for number in (left, right, stated)]


def power(judge: Rule, exponent: float) -> Rule:
    return lambda question, text, answer: judge(question, text, answer) ** exponent


def product(*judges: Rule) -> Rule:
    return lambda question, text, answer: math.prod(judge(question, text, answer) for judge in judges)


def oracle(problems: dict[str, Problem], faithful: bool = False) -> Rule:
    """1 for a sound chain by the gold answer, else 0.02.

    `faithful`: also by the problem's own computation.
    """

    def judge(question: Question, text: str, answer: str | None) -> float:
        problem = problems[question.id]
        good = is_faithful(text, problem) if faithful else is_sound(text, problem.text, str(problem.answer))
        return 1.0 if good else 0.02

    return judge


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


JUDGES: dict[str, Rule] = {
    "vote": vote,
    "text": text,
    "equations": equations,
    "traced": traced,
    "consensus": consensus,
    "consensus2": power(consensus, 2),
    "consensus4": power(consensus, 4),
    "vote*consensus2": product(vote, power(consensus, 2)),
    "equations*consensus2": product(equations, power(consensus, 2)),
    "traced*consensus2": product(traced, power(consensus, 2)),
    "traced*consensus4": product(traced, power(consensus, 4)),
}


def find_judge(name: str, problems: dict[str, Problem]) -> Judge | None:
    if name == "none":
        return None
    if name == "checks":  # one of the product's
        return ChecksJudge()
    if name in ("oracle", "faithful"):
        return RuleJudge(oracle(problems, faithful=name == "faithful"))
    return RuleJudge(JUDGES[name])
