"""The experimental objective: one pass over all rationales, weighted by the study's rules.

What `train` offers is left to `qcrd_fast.train.objective`; here is what had to be tried before it may become an option
there.
Suffixes: R rationales, T tokens, Q questions.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.train.examples import Candidate, Example
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective

SELECTS = ("mean", "wmean", "min", "max", "softmin", "sampling")
GATES = ("all", "different", "first")


@dataclasses.dataclass(frozen=True)
class Rules:
    """positives: how a question's positives share its weight; softmin: s exp(-l / temperature), normalised.
    positive_judge, negative_judge: names of `judges`. negatives: none, minority, lagged, both.
    negative_select: max, max-active, mean. agreeing: weigh or drop samples with the majority's answer.
    gate: which of a negative's tokens are pushed down: all; those that no positive holds; the first where it leaves
    them all.
    relative: the margin is delta above the question's mean nll of positives. warmup: share of the steps without
    negatives.
    """

    positives: str = "mean"
    temperature: float = 0.2
    positive_judge: str = "none"
    negatives: str = "none"
    negative_judge: str = "none"
    negative_select: str = "mean"
    agreeing: str = "weigh"
    gate: str = "all"
    relative: bool = False
    warmup: float = 0.0


class StudyObjective(Objective):
    """`Objective` with `Rules`, for a run of that many steps; its judges are those of `train`."""

    def __init__(self, *args: Any, rules: Rules, total_steps: int, **options: Any):
        super().__init__(*args, **options)
        self.rules, self.total_steps = rules, total_steps

    def step(self, micro: MicroBatch) -> tuple[dict[str, Tensor], Counter[str]]:
        stats, batch = Counter[str](), micro.examples
        sources, targets, source_of, label_weights = self.label_targets(micro)
        labels, members = len(targets), []
        for example in batch:
            chosen = self._candidates(example, micro.lagged, micro.step)
            members.append(chosen)
            if chosen:
                sources.append(example.explain)
                targets += [c.tokens for c in chosen]
                source_of += [len(sources) - 1] * len(chosen)
        packed, logprob_T = self.score(sources, targets, source_of)
        stats["body_tokens"] += packed.body_tokens
        count_R = torch.bincount(packed.segment, minlength=len(targets))
        nll_R = -torch.zeros(len(targets)).index_add(0, packed.segment, logprob_T.float()) / count_R
        loss_pred = (nll_R[:labels] * torch.tensor(label_weights)).sum()
        loss_cl, at = torch.zeros(()), labels
        start_R = (count_R.cumsum(0) - count_R).tolist()
        for example, chosen in zip(batch, members, strict=True):
            positives = [(at + i, c) for i, c in enumerate(chosen) if c.positive]
            negatives = [(at + i, c) for i, c in enumerate(chosen) if not c.positive]
            at += len(chosen)
            loss_cl = loss_cl + self._pull(example, positives, nll_R, micro.iteration, stats)
            if negatives:
                loss_cl = loss_cl + self._push(example, positives, negatives, nll_R, logprob_T, start_R, stats)
        loss_cl = loss_cl / micro.num_questions
        loss = self.config.alpha_pred * loss_pred + self.config.alpha_cl * loss_cl
        (loss * micro.weight).backward()
        stats["tokens"] += len(logprob_T)
        return {"loss": loss.detach(), "loss_pred": loss_pred.detach(), "loss_cl": loss_cl.detach()}, stats

    def _candidates(self, example: Example, lagged: Mapping[str, Negative], step: int) -> list[Candidate]:
        rules = self.rules
        found = list(example.positives)
        if rules.negatives == "none" or step < rules.warmup * self.total_steps:
            return found
        if rules.negatives in ("minority", "both"):
            found += example.minority
        if rules.negatives in ("lagged", "both"):
            for candidate in example.candidates(lagged):
                if candidate.source == "lagged" and not (rules.agreeing == "drop" and _agrees(candidate)):
                    found.append(candidate)
        return found

    def _weights(self, example: Example, candidates: list[Candidate]) -> list[float]:
        """Return s for each positive and 1 - s for each negative."""
        quality_R = self.quality([example], candidates, [0] * len(candidates))
        if quality_R is None:
            return [1.0] * len(candidates)
        return [s if c.positive else 1 - s for s, c in zip(quality_R.tolist(), candidates, strict=True)]

    def _pull(
        self,
        example: Example,
        positives: list[tuple[int, Candidate]],
        nll_R: Tensor,
        iteration: int,
        stats: Counter[str],
    ) -> Tensor:
        if not positives:
            return torch.zeros(())
        rows = [r for r, _ in positives]
        nll_J, s_J = nll_R[rows], torch.tensor(self._weights(example, [c for _, c in positives]))
        known_J = nll_J.detach()
        stats["num_positive"] += len(rows)
        stats["quality_positive"] += float(s_J.sum())  # type: ignore[assignment]
        stats["weighed"] += len(rows)
        stats["weight"] += float(s_J.sum())  # type: ignore[assignment]
        select = self.rules.positives
        if select == "mean":
            weight_J = s_J / len(rows)
        elif select == "wmean":
            weight_J = s_J / s_J.sum()
        elif select == "softmin":
            weight_J = torch.softmax(s_J.clamp(min=1e-6).log() - known_J / self.rules.temperature, 0)
        elif select == "sampling":
            generator = torch.Generator().manual_seed((example.key ^ iteration) % 2**63)
            weight_J = torch.zeros(len(rows))
            weight_J[torch.multinomial(s_J.clamp(min=1e-6), 1, generator=generator)] = 1.0
        else:
            best = int(known_J.argmin() if select == "min" else known_J.argmax())
            weight_J = torch.zeros(len(rows))
            weight_J[best] = s_J[best]
        return (weight_J * nll_J).sum()

    def _push(
        self,
        example: Example,
        positives: list[tuple[int, Candidate]],
        negatives: list[tuple[int, Candidate]],
        nll_R: Tensor,
        logprob_T: Tensor,
        start_R: list[int],
        stats: Counter[str],
    ) -> Tensor:
        rules, config = self.rules, self.config
        delta = config.delta
        if rules.relative and positives:
            delta += float(nll_R[[r for r, _ in positives]].detach().mean())
        values, weights = [], []
        judged = self._weights(example, [c for _, c in negatives])
        for (r, candidate), weight in zip(negatives, judged, strict=True):
            tokens = gated(candidate.tokens, [c.tokens for _, c in positives], rules.gate)
            value = (
                -logprob_T[[start_R[r] + t for t in tokens]].sum() / len(candidate.tokens)
                if tokens
                else torch.zeros(())
            )
            if rules.gate != "all":  # over the tokens that are pushed: few of a rationale's
                value = value * len(candidate.tokens) / max(len(tokens), 1)
            active = bool(tokens) and float(value.detach()) < delta
            stats[candidate.source] += 1
            stats[f"{candidate.source}_active"] += active
            values.append(value)
            weights.append(weight * active)
        stats["num_negative"] += len(values)
        if rules.negative_select == "mean":
            pushed = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(())) / len(values)
        else:
            rows = [i for i, w in enumerate(weights) if w or rules.negative_select == "max"]
            if not rows:
                return torch.zeros(())
            best = max(rows, key=lambda i: float(values[i].detach()))
            pushed = weights[best] * values[best]
        return -config.beta * pushed


class Spent(Exception):
    """A run has trained on the tokens that it may; holds its student."""


class LimitedObjective(Objective):
    """`Objective` that raises `Spent` in place of the first step that begins with `tokens` trained on."""

    def __init__(self, *args: Any, tokens: float, **options: Any):
        super().__init__(*args, **options)
        self.left = tokens

    def step(self, micro: MicroBatch) -> tuple[dict[str, Tensor], Counter[str]]:
        if self.left <= 0:
            raise Spent(self.student)
        losses, stats = super().step(micro)
        self.left -= stats["tokens"]
        return losses, stats


def _agrees(candidate: Candidate) -> bool:
    return candidate.case is not None and bool(candidate.case.agrees)


def gated(tokens: Sequence[int], positives: Sequence[Sequence[int]], gate: str) -> list[int]:
    """Return the positions of a negative's tokens that are pushed down."""
    if gate == "all" or not positives:
        return list(range(len(tokens)))
    if gate == "different":
        known = {token for positive in positives for token in positive}
        return [t for t, token in enumerate(tokens) if token not in known]
    for t in range(len(tokens)):
        if not any(list(p[: t + 1]) == list(tokens[: t + 1]) for p in positives):
            return [t]
    return []
