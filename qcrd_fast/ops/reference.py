"""The oracle: the loss in plain torch with full logits, Python loops and autograd.

Shape suffixes: T tokens, H hidden, V vocabulary, R rationales. Equation numbers: arXiv 2405.13014.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcrd_fast.ops.selection import SELECTIONS, SOFTMIN_TEMPERATURE, sampling_score


class HeadOptions(NamedTuple):
    """Options of the head: logits = `softcap * tanh(a / softcap) / temperature`, `a = scale * h W^T + bias`."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: Any = 1.0  # a number; for eager and chunks also one for each token, a tensor [T, 1]


class Head(NamedTuple):
    """Hidden states and what makes logits of them."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    options: HeadOptions


class Contrast(NamedTuple):
    """Result of the contrastive ops. `weight_R` includes quality, selection, 1/N and the hinge's gate."""

    loss_pos: Tensor
    loss_neg: Tensor
    nll_R: Tensor
    weight_R: Tensor
    active_R: Tensor
    count_R: Tensor


# ---- log p of each token
# ------------------------------------------------------------------------------------------------


def linear_logprob_eager(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: HeadOptions,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p of the target, log-sum-exp, entropy, whether the target's logit is the largest, sum of p^2), each [T]: the
    first three in nats and differentiated by autograd, all 0 where ignored.
    """
    logits_TV = eager_logits(Head(hidden_TH, weight_VH, bias_V, options))
    logprob_TV = torch.log_softmax(logits_TV, dim=1)
    valid_T = target_T != ignore_index
    picked_T = logprob_TV.gather(1, target_T.where(valid_T, 0)[:, None])[:, 0]
    prob_TV = logprob_TV.exp()
    entropy_T = -(prob_TV * logprob_TV.masked_fill(prob_TV == 0, 0)).sum(1)
    top_T = logits_TV.gather(1, target_T.where(valid_T, 0)[:, None])[:, 0] >= logits_TV.amax(1)
    zero = picked_T.new_zeros(())
    return (
        torch.where(valid_T, picked_T, zero),
        torch.where(valid_T, torch.logsumexp(logits_TV, dim=1), zero),
        torch.where(valid_T, entropy_T, zero),
        top_T & valid_T,
        torch.where(valid_T, prob_TV.detach().square().sum(1), zero),
    )


def eager_logits(head: Head) -> Tensor:
    """[T, V]. Operands are rounded to `hidden_TH`'s type and multiplied in fp32 (float64 stays float64)."""
    hidden_TH, weight_VH, bias_V, options = head
    logits_TV = options.scale * (accumulable(hidden_TH) @ accumulable(weight_VH.to(hidden_TH.dtype)).T)
    if bias_V is not None:
        logits_TV = logits_TV + bias_V.to(logits_TV.dtype)
    if options.softcap:
        logits_TV = options.softcap * torch.tanh(logits_TV / options.softcap)
    return logits_TV / options.temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulable(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


# ---- divergence of two distributions
# ------------------------------------------------------------------------------------


def linear_kl_eager(student: Head, teacher: Head, valid_T: Tensor, beta: float) -> Tensor:
    """The divergence of each token [T] in nats, 0 where not valid, differentiated by autograd in the student alone."""
    logp_TV = torch.log_softmax(eager_logits(student), dim=1)
    logq_TV = torch.log_softmax(eager_logits(teacher), dim=1).detach().to(logp_TV.dtype)

    def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
        masked_TV = a_TV == -torch.inf
        return (a_TV.exp() * (a_TV.masked_fill(masked_TV, 0) - b_TV.masked_fill(masked_TV, 0))).sum(1)

    if beta == 0:
        kl_T = kl(logq_TV, logp_TV)
    elif beta == 1:
        kl_T = kl(logp_TV, logq_TV)
    else:
        logm_TV = torch.logaddexp(logp_TV + math.log(1 - beta), logq_TV + math.log(beta))
        kl_T = beta * kl(logq_TV, logm_TV) + (1 - beta) * kl(logp_TV, logm_TV)
    return kl_T.where(valid_T, 0)


# ---- many-to-one contrastive loss
# ---------------------------------------------------------------------------------------


def contrastive_eager(
    logprob_T: Tensor,
    rationale_T: Tensor,
    valid_T: Tensor | None,
    question_R: Tensor,
    positive_R: Tensor,
    quality_R: Tensor | None,
    key_R: Tensor,
    selects: tuple[str, str],
    delta: float,
    num_questions: Tensor,
    seed: int,
    iteration: int,
) -> Contrast:
    """Eq. 3, 6 and 7 question by question in loops; `loss_pos` and `loss_neg` are differentiable."""
    R = len(question_R)
    valid_T = torch.ones_like(rationale_T, dtype=torch.bool) if valid_T is None else valid_T
    tokens = [(rationale_T == r) & valid_T for r in range(R)]
    count = [int(t.sum()) for t in tokens]
    zero = logprob_T[:0].sum()  # differentiable, so that a batch without candidates has a gradient: 0
    nll = [-logprob_T[t].double().mean().to(zero.dtype) if n else zero for t, n in zip(tokens, count, strict=True)]  # l
    positive, question = positive_R.tolist(), question_R.tolist()
    quality = None if quality_R is None else quality_R.detach().to(logprob_T.dtype)

    loss_pos, loss_neg = zero, zero
    weight_R = torch.zeros(R, dtype=logprob_T.dtype, device=logprob_T.device)
    for i in sorted(set(question)):
        for is_positive, select in ((True, SELECTIONS[selects[0]]), (False, SELECTIONS[selects[1]])):
            members = [r for r in range(R) if question[r] == i and positive[r] == is_positive]
            candidates = [r for r in members if count[r]]
            if select.active_only:
                candidates = [r for r in candidates if not nll[r] >= delta]
            if not candidates:
                continue  # m_i = 0 or k_i = 0: the term is 0
            if quality is None:
                s = {r: zero + 1 for r in candidates}  # weights of 1: s_pos = 1, s_neg = 0
            else:
                s = {r: quality[r] if is_positive else 1 - quality[r] for r in candidates}
            if select.soft:  # weights are constants, and the same whatever is taken off every nll
                rank = {r: select.order * nll[r].detach() for r in candidates}
                s = {r: w * torch.exp((rank[r] - max(rank.values())) / SOFTMIN_TEMPERATURE) for r, w in s.items()}
            if not select.single:
                total = sum(s.values()) if select.by_quality else zero + len(candidates)
                chosen = {r: s[r] / total if total != 0 else zero for r in candidates}
            else:
                if select.random:
                    key = int(key_R[members[0]])
                    score = {
                        r: float(sampling_score(seed, key, iteration, is_positive, members.index(r)))
                        for r in candidates
                    }
                else:
                    score = {r: select.order * float(nll[r].detach()) for r in candidates}
                score = {r: float("inf") if x != x else x for r, x in score.items()}  # a NaN must reach the loss
                best = min(r for r in candidates if score[r] == max(score.values()))
                chosen = {best: s[best]}
            for r, w in chosen.items():
                w = w / num_questions
                if is_positive:
                    loss_pos = loss_pos + w * nll[r]  # Eq. 6
                elif not nll[r] >= delta:
                    loss_neg = loss_neg + w * (nll[r] - delta)  # Eq. 7, h(u) = min(u - delta, 0)
                else:
                    w = zero
                weight_R[r] = w.detach()
    nll_R = torch.stack(nll).detach() if R else logprob_T.new_zeros(0)
    count_R = torch.tensor(count, device=logprob_T.device)
    active_R = ~positive_R & (count_R > 0) & (nll_R < delta)
    return Contrast(loss_pos, loss_neg, nll_R, weight_R, active_R, count_R)
