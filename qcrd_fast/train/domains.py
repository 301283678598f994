"""Weights of domains by how far the student is behind its teacher in each (DDK, arXiv 2407.16154). Imports no torch.

r0 = softmax(l_S / l_T); every K steps psi_i = r_i exp(l_S,i / l_T,i), clamped, and r = alpha psi / sum psi + (1 -
alpha) / N.
l_S: the student's loss in each of N domains; l_T: its teacher's; where that is not known it is 1 and the rule
`ddk-like`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError
from qcrd_fast.quality.cases import same

ALPHA = 0.5
CLAMP = 10.0  # how far below the largest exponent another may be


def first_weights(student: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """r0 of each domain, of the losses l_S and l_T; they add up to 1."""
    return _shares({domain: loss / teacher[domain] for domain, loss in student.items()})


def next_weights(
    weights: Mapping[str, float], student: Mapping[str, float], teacher: Mapping[str, float], alpha: float = ALPHA
) -> dict[str, float]:
    """r after K more steps. No exponent is clamped unless it is more than `CLAMP` below the largest; a factor that all
    psi have in common cancels, so that none overflows."""
    ratios = {domain: student[domain] / teacher[domain] for domain in weights}
    shares = _shares(ratios, weights)
    return {domain: alpha * share + (1 - alpha) / len(weights) for domain, share in shares.items()}


def _shares(ratios: Mapping[str, float], weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """psi_i / sum psi of psi_i = weight_i exp(ratio_i)."""
    most = max(ratios.values())
    psi = {d: (weights[d] if weights else 1.0) * math.exp(max(ratio - most, -CLAMP)) for d, ratio in ratios.items()}
    total = math.fsum(psi.values())
    return {domain: value / total for domain, value in psi.items()}


def teacher_losses(rows: Sequence[Question]) -> dict[str, float]:
    """l_T,i = -log(1 - e_i) [nats] with e_i = (wrong + 1/2) / (n + 1), of the n questions of domain i with a gold
    answer and a majority, `wrong` of them with another majority than the gold answer.

    Raises `InputError` where a domain has none.
    """
    counts: dict[str, list[int]] = {}
    for row in rows:
        wrong, n = counts.setdefault(domain_of(row), [0, 0])
        if row.gold is not None and row.majority is not None:
            counts[domain_of(row)] = [wrong + (not same(row, row.majority, row.gold)), n + 1]
    if bare := [domain for domain, (_, n) in counts.items() if not n]:
        raise InputError(
            f"--domain-weights ddk needs rows with a gold answer and votes, to know the teacher's error; domain "
            f"{bare[0]!r} "
            "has none (ddk-like takes every teacher's loss as 1)"
        )
    return {domain: -math.log(1 - (wrong + 0.5) / (n + 1)) for domain, (wrong, n) in counts.items()}


def domain_of(row: Question) -> str:
    """The row's domain; rows without one are a domain of their own."""
    return row.domain or "(none)"


def factors(weights: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """What a question of each domain counts: r_i over the domain's share of the questions, so that the mean is 1."""
    total = sum(counts.values())
    return {domain: weight * total / counts[domain] for domain, weight in weights.items()}


class DomainWeights:
    """r of the domains of a run, brought up to date every `every` steps; a function of the steps and the student alone.

    losses: l_S of each domain as the student stands, {domain: nats}.
    """

    def __init__(
        self,
        rows: Sequence[Question],
        rule: str,
        every: int,
        losses: Callable[[], Mapping[str, float]],
        alpha: float = ALPHA,
    ):
        self.counts, self.every, self.losses, self.alpha = Counter(map(domain_of, rows)), every, losses, alpha
        if len(self.counts) < 2:
            raise InputError(f"--domain-weights {rule}: the rows have one domain, {next(iter(self.counts))!r}")
        self.teacher = teacher_losses(rows) if rule == "ddk" else dict.fromkeys(self.counts, 1.0)
        self.weights: dict[str, float] | None = None
        self.step = -1  # that the weights are of

    def factors(self, step: int) -> dict[str, float]:
        """What a question of each domain counts in a step."""
        if self.weights is None:
            self.weights, self.step = first_weights(self._ordered(), self.teacher), step
        elif step % self.every == 0 and step > self.step:
            self.weights, self.step = next_weights(self.weights, self._ordered(), self.teacher, self.alpha), step
        return factors(self.weights, self.counts)

    def _ordered(self) -> dict[str, float]:
        losses = self.losses()
        return {domain: losses[domain] for domain in sorted(self.counts)}

    def state(self) -> dict[str, object]:
        return {"weights": self.weights, "step": self.step}

    def restore(self, state: Mapping[str, object] | None) -> None:
        """Continue from `state`."""
        if state:
            self.weights, self.step = state["weights"], state["step"]  # type: ignore[assignment]


def few_of_each(rows: Sequence[Question], count: int) -> dict[str, list[Question]]:
    """Up to `count` questions of each domain, those whose ids hash lowest."""
    found: dict[str, list[Question]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(row.id.encode("utf-8", "surrogatepass")).digest()):
        some = found.setdefault(domain_of(row), [])
        if len(some) < count:
            some.append(row)
    return found
