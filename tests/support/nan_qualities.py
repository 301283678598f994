"""Cases with one quality that is NaN, and what the equations make of them, in plain Python; used under the interpreter
too."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from qcrd_fast import contrastive_loss
from qcrd_fast.config import SCHEMES

DELTA, BETA = 3.0, 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """Two tokens a rationale; question 0 has two positives and three negatives, question 1 one of each."""

    where: int  # the rationale whose quality is NaN
    nll: tuple[float, ...] = (1.0, 2.0, 0.5, 2.5, 4.0, 1.5, 1.25)
    positive: tuple[bool, ...] = (True, True, False, False, False, True, False)
    question: tuple[int, ...] = (0, 0, 0, 0, 0, 1, 1)

    @property
    def quality(self) -> list[float]:
        return [math.nan if r == self.where else 0.2 + 0.1 * r for r in range(7)]

    def run(self, scheme: str, impl: str) -> tuple[Tensor, ...]:
        """(loss, weights, selected, gradient of log p)."""
        leaf = (-torch.tensor(self.nll)).repeat_interleave(2).requires_grad_()
        head = (torch.arange(7).repeat_interleave(2), torch.tensor(self.question), torch.tensor(self.positive))
        out = contrastive_loss(
            leaf, *head, torch.tensor(self.quality), scheme=scheme, beta=BETA, delta=DELTA, impl=impl
        )
        out.loss.backward()
        return out.loss.detach(), out.weight_R, out.selected_R, leaf.grad


CASES = [Case(where) for where in range(7)]


def expected(case: Case, scheme: str) -> tuple[Tensor, ...]:
    """What `Case.run` gives. What `sampling` picks is taken from a call without qualities."""
    sampled = contrastive_loss(
        torch.zeros(14), torch.arange(7).repeat_interleave(2), torch.tensor(case.question), torch.tensor(case.positive),
        positive_select="sampling", negative_select="sampling", delta=1e9, impl="eager",
    ).selected_R.tolist()  # fmt: skip
    loss, weight = 0.0, [0.0] * 7
    for q in (0, 1):
        for kind, select in zip((True, False), SCHEMES[scheme], strict=True):
            members = [r for r in range(7) if case.question[r] == q and case.positive[r] == kind]
            s = {r: case.quality[r] if kind else 1 - case.quality[r] for r in members}
            if select == "mean":
                share = {r: s[r] / len(members) for r in members}
            elif select == "wmean":
                share = {r: s[r] / sum(s.values()) for r in members}
            else:
                order = {
                    "min": lambda r: case.nll[r],
                    "max": lambda r: -case.nll[r],
                    "sampling": lambda r: not sampled[r],
                }
                best = min(members, key=order[select])
                share = {best: s[best]}
            for r, w in share.items():
                if kind or case.nll[r] < DELTA:
                    weight[r] = w / 2
                    loss += weight[r] * case.nll[r] if kind else -BETA * weight[r] * (case.nll[r] - DELTA)
    signs = [1.0 if kind else -BETA for kind in case.positive]
    grad = [-w * sign / 2 for w, sign in zip(weight, signs, strict=True) for _ in range(2)]
    weight_R = torch.tensor(weight)
    return torch.tensor(loss), weight_R, weight_R != 0, torch.tensor(grad)
