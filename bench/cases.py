"""Inputs of the loss benchmark: heads, random or trained-like logits, and the float64 truth.

T tokens, H hidden, V vocabulary, R rationales, S selected tokens, C rows of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

BETA = 0.2
DELTA = 1e3  # above every loss, so that each question has one positive and one negative selected: s = 2 / (m + k)
TOKENS_A_RATIONALE = 96
STEP = 0.3  # nats a token between candidates of a question, so that no selection hangs on rounding
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOGITS = ("random", "peaked")
EVERY = ("every", "every-kept")  # modes whose loss is the mean -log p of all tokens


class Head(NamedTuple):
    H: int
    V: int
    scale: float = 1.0


HEADS = {
    "t5-base": Head(768, 32_128, 768**-0.5),
    "smollm2-135m": Head(576, 49_152),
    "gemma-3-270m": Head(640, 262_144),
    "llama-3-8b": Head(4_096, 128_256),
    "tiny": Head(256, 8_192),
    "rehearsal": Head(40, 300),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A head, T tokens of questions with m positives and k negatives, and the operands' logits and dtype."""

    head: str
    tokens: int
    positives: int = 5
    negatives: int = 2
    logits: str = "random"
    dtype: str = "bf16"

    @property
    def unit(self) -> float:
        """U = T V H; a product of hidden states and head costs 2U floating-point operations."""
        return float(self.tokens) * HEADS[self.head].H * HEADS[self.head].V

    def __str__(self) -> str:
        H, V, _ = HEADS[self.head]
        shape = f"T={self.tokens} H={H} V={V} m={self.positives} k={self.negatives}"
        return f"{self.head} {shape} {self.dtype} {self.logits} logits"


class Batch(NamedTuple):
    """Operands of one step; `hidden_TH` and `weight_VH` are leaves that require gradients."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    rationale_T: Tensor
    question_R: Tensor
    positive_R: Tensor
    quality_R: Tensor
    scale: float

    @property
    def segments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rationale_T, self.question_R, self.positive_R, self.quality_R


class Truth(NamedTuple):
    """Loss, gradients and selection in float64, from the rounded operands."""

    loss: float
    dhidden_TH: Tensor
    dweight_VH: Tensor
    selected_R: Tensor
    selected_share: float  # s, of the tokens


def make_batch(case: Case, device: torch.device, seed: int = 0) -> Batch:
    """Draw a batch of rationales of 72 to 120 tokens.

    `random` logits are normal; `peaked` ones are wider and favour the target by 0 to twice the margin that it needs to
    win. Candidates of a question differ by `STEP` per token, in a random order.
    """
    H, V, scale = HEADS[case.head]
    T, n = case.tokens, case.positives + case.negatives
    generator = torch.Generator().manual_seed(seed)
    questions = max(1, round(T / (TOKENS_A_RATIONALE * n)))
    R = questions * n
    share_R = 0.75 + 0.5 * torch.rand(R, generator=generator, dtype=torch.float64)
    stop_R = (share_R.cumsum(0) / share_R.sum() * T).round().long()
    rationale_T = torch.searchsorted(stop_R, torch.arange(T), right=True)
    rank_R = torch.cat([torch.randperm(n, generator=generator) for _ in range(questions)])
    positive_R = (torch.arange(R) % n) < case.positives
    quality_R = 0.25 + 0.5 * torch.rand(R, generator=generator)
    target_T = torch.randint(0, V, (T,), generator=generator)

    on_device = torch.Generator(device).manual_seed(seed)
    weight_VH = torch.randn(V, H, generator=on_device, device=device) / (scale * math.sqrt(H))
    spread = 3.0 if case.logits == "peaked" else 1.0
    hidden_TH = spread * torch.randn(T, H, generator=on_device, device=device)
    boost_T = STEP * rank_R[rationale_T].float()
    if case.logits == "peaked":
        boost_T = boost_T + 2 * (math.log(V) + spread**2 / 2) * torch.rand(T, generator=generator)
    # |scale * w|^2 is about 1, so this raises the target's logit by its boost, and the others by next to nothing.
    hidden_TH += (scale * boost_T.to(device))[:, None] * weight_VH[target_T.to(device)]
    dtype = DTYPES[case.dtype]
    question_R = torch.arange(R) // n
    return Batch(
        hidden_TH.to(dtype).requires_grad_(),
        weight_VH.to(dtype).requires_grad_(),
        target_T.to(device),
        rationale_T.to(device),
        question_R.to(device),
        positive_R.to(device),
        quality_R.to(device),
        scale,
    )


@torch.no_grad()
def find_truth(batch: Batch, chunk: int | None = None, every: bool = False) -> Truth:
    """Compute the truth from the formulas, without the library, `chunk` rows of logits at a time (1 GiB).

    Eq. 3, 6 and 7; in mode `every`, the mean -log p of all tokens.
    """
    hidden_TH, weight_VH = batch.hidden_TH.double(), batch.weight_VH.double()
    T, R = len(hidden_TH), len(batch.question_R)
    chunk = chunk or max(1, 2**27 // len(weight_VH))

    def log_softmax(rows: Tensor) -> Tensor:
        return torch.log_softmax(batch.scale * hidden_TH[rows] @ weight_VH.T, 1)

    every_T = torch.arange(T, device=hidden_TH.device)
    nll_T = torch.cat(
        [-log_softmax(rows).gather(1, batch.target_T[rows][:, None])[:, 0] for rows in every_T.split(chunk)]
    )
    count_R = torch.bincount(batch.rationale_T, minlength=R)
    nll_R = (torch.bincount(batch.rationale_T, nll_T, minlength=R) / count_R).tolist()
    positive, question, quality = (
        batch.positive_R.tolist(),
        batch.question_R.tolist(),
        batch.quality_R.double().tolist(),
    )
    N = max(question) + 1
    loss, slope = 0.0, [0.0] * R  # d loss / d nll of each rationale
    for q in range(N):
        members = [r for r in range(R) if question[r] == q]
        best = min((r for r in members if positive[r]), key=lambda r: nll_R[r])
        worst = max((r for r in members if not positive[r]), key=lambda r: nll_R[r])
        loss += (quality[best] * nll_R[best] - BETA * (1 - quality[worst]) * min(nll_R[worst] - DELTA, 0)) / N
        slope[best] = quality[best] / N
        slope[worst] = -BETA * (1 - quality[worst]) / N
    slope_R = torch.tensor(slope, dtype=torch.float64, device=hidden_TH.device)
    slope_T = (slope_R / count_R)[batch.rationale_T]
    if every:
        loss, slope_T, slope_R = float(nll_T.mean()), torch.full_like(nll_T, 1 / T), torch.ones_like(slope_R)
    dhidden_TH, dweight_VH = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)
    selected_T = slope_T != 0
    for rows in selected_T.nonzero()[:, 0].split(chunk):
        dz_CV = log_softmax(rows).exp_()
        dz_CV[torch.arange(len(rows), device=rows.device), batch.target_T[rows]] -= 1
        dz_CV *= (batch.scale * slope_T[rows])[:, None]
        dhidden_TH[rows] = dz_CV @ weight_VH
        dweight_VH += dz_CV.T @ hidden_TH[rows]
    return Truth(loss, dhidden_TH, dweight_VH, slope_R != 0, float(selected_T.double().mean()))
