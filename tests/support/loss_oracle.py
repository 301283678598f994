"""An independent evaluation of the loss in float64, from dense logits and plain loops, and ragged batches to ask it
about."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from qcrd_fast.ops.selection import SOFTMIN_TEMPERATURE, sampling_score

# the margin lies amid the losses of the random batches, so that some hinges are active and some are not
DELTA, BETA = 8.6, 0.2


@dataclasses.dataclass
class Batch:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    rationale: Tensor
    question: Tensor
    positive: Tensor
    quality: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Batch:
        """A copy whose floating-point leaves (not quality) are of `dtype` and require gradients."""
        values = {field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)}
        for name in ("hidden", "weight", "bias"):
            values[name] = values[name].detach().to(dtype).requires_grad_()
        return Batch(**values)

    @property
    def call(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.target, self.rationale, self.question, self.positive, self.quality

    def grads(self, loss: Tensor) -> list[Tensor]:
        leaves = (self.hidden, self.weight, self.bias)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def random_batch(seed: int = 0, H: int = 24, V: int = 203, spread: float = 0.5) -> Batch:
    """Ragged in every way: 1 to 13 tokens, ignored tokens, an empty rationale, questions out of order, one without
    positives, one without negatives, one (number 4) without anything. V is prime-like so that no chunk or tile divides
    it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 1, 13, 7, 2, 4, 9, 3, 1, 6, 8]
    question = torch.tensor([2, 0, 0, 2, 1, 0, 5, 2, 0, 3, 2])
    positive = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1]).bool()  # question 1, 5: no negatives; 3: no positives
    rationale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    T = len(rationale)
    target = torch.randint(0, V, (T,), generator=generator)
    target[torch.rand(T, generator=generator) < 0.15] = -100
    target[rationale == 7] = -100  # a rationale without a valid token
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    weight = spread * torch.randn(V, H, generator=generator, dtype=torch.float64)
    quality = torch.rand(len(lengths), generator=generator)
    return Batch(
        hidden, weight, target, rationale, question, positive, quality, torch.randn(V, generator=generator).double()
    )


def dense_logprob(batch: Batch, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    """log p of each target from dense logits, 0 where ignored."""
    logits = scale * batch.hidden @ batch.weight.T + batch.bias
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logprob = torch.log_softmax(logits / temperature, -1)
    valid = batch.target >= 0
    return logprob[torch.arange(len(valid)), batch.target.clamp(min=0)] * valid


def expected_terms(
    batch: Batch, logprob: Tensor, selects: tuple[str, str], quality: bool = True, N: int | None = None
) -> dict[str, Tensor]:
    """loss, loss_pos, loss_neg and the list of selected rationales, written from the formulas and nothing else."""
    terms: dict[str, list[Tensor]] = {"pos": [], "neg": []}
    selected, zero = [], torch.zeros((), dtype=torch.float64)
    for i in range(int(batch.question.max()) + 1):
        for name, select in zip(("pos", "neg"), selects, strict=True):
            members, values, weights = [], [], []
            ranked = [
                r for r in range(len(batch.question)) if batch.question[r] == i and batch.positive[r] == (name == "pos")
            ]
            for r in ranked:
                tokens = (batch.rationale == r) & (batch.target >= 0)
                if not tokens.any():
                    continue
                nll = -logprob[tokens].sum() / tokens.sum()
                s = float(batch.quality[r]) if quality else (1.0 if name == "pos" else 0.0)
                value = nll if name == "pos" else torch.clamp(nll - DELTA, max=0)
                members.append((r, float(nll.detach())))
                values.append(value)
                weights.append(s if name == "pos" else 1 - s)
            active = [name == "pos" or nll < DELTA for _, nll in members]
            if select == "max-active":
                if not any(active):
                    continue
                winner = max((nll, -j) for j, (_, nll) in enumerate(members) if active[j])
                keep = {-winner[1]: 1.0}
            elif not members:
                continue
            elif select in ("min", "max"):
                best = (min if select == "min" else max)(nll for _, nll in members)
                keep = {[nll for _, nll in members].index(best): 1.0}
            elif select == "sampling":
                scores = [sampling_score(0, i, 0, name == "pos", ranked.index(r)) for r, _ in members]
                keep = {scores.index(max(scores)): 1.0}
            elif select == "softmin":
                soft = [math.exp((min(nll for _, nll in members) - nll) / SOFTMIN_TEMPERATURE) for _, nll in members]
                total = sum(w * x for w, x in zip(weights, soft, strict=True))
                keep = {j: x / total for j, x in enumerate(soft)}
            else:
                total = len(members) if select == "mean" else sum(weights)
                keep = {j: 1 / total for j in range(len(members))}
            for j, factor in keep.items():
                terms[name].append(factor * weights[j] * values[j])
                if active[j]:
                    selected.append(members[j][0])
    N = N or int(batch.question.max()) + 1
    loss_pos, loss_neg = sum(terms["pos"], zero) / N, sum(terms["neg"], zero) / N
    return {
        "loss": loss_pos - BETA * loss_neg,
        "loss_pos": loss_pos,
        "loss_neg": loss_neg,
        "selected": sorted(selected),
    }


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; the plain norm where the expectation is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm or 1.0)
