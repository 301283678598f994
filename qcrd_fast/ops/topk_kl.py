"""KL(teacher || student) at each token from the teacher's K likeliest tokens: [T, V] is held by neither side.

The student's logits at the K tokens are products with K gathered rows of its head, a block of tokens at a time; its
log-sum-exp is `linear_logprob`'s. Suffixes: T tokens, H hidden, V vocabulary, K likeliest tokens, C a block of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops.checks import product_type
from qcrd_fast.ops.chunked import chunk_logits, operand
from qcrd_fast.ops.reference import HeadOptions, accumulation_dtype

LOGITS_BYTES = 64 * 2**20  # of one block of logits [C, V] from which the likeliest tokens are taken
GATHERED_BYTES = 64 * 2**20  # of the head's rows [C, K, H] that are held at once


def topk_kl(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    lse_T: Tensor,
    ids_TK: Tensor,
    logq_TK: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tail: bool = True,
) -> Tensor:
    """KL [T] in nats, differentiable in hidden states, head and log-sum-exp.

    ids_TK: distinct tokens; logq_TK: the teacher's log-probs of them, -inf in places that are not used. lse_T: the
    student's log-sum-exp of logits / temperature.

    With `tail`: sum_k q_k log(q_k / p_k) + q_o log(q_o / p_o), q_o = 1 - sum_k q_k and p_o alike: the KL of the
    distributions with all other tokens merged into one, so at most the whole KL, which it is for K = V. It grows with
    K. Without: the KL of both distributions renormalised over the K tokens.
    """
    hidden_TH = hidden_TH.to(product_type(hidden_TH))
    dtype = accumulation_dtype(hidden_TH.dtype)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        logits_TK = _PickedLogits.apply(hidden_TH, weight_VH, bias, ids_TK, scale, softcap, temperature)
        logq_TK = logq_TK.to(dtype)
        used_TK = logq_TK > -math.inf
        logq_TK = logq_TK.where(used_TK, -math.inf)
        if not tail:
            logq_TK = logq_TK.log_softmax(1)
            logp_TK = logits_TK.where(used_TK, -math.inf).log_softmax(1)
        else:
            logp_TK = logits_TK - lse_T.to(dtype)[:, None]
        difference_TK = (logq_TK - logp_TK).where(used_TK, 0)
        kl_T = (logq_TK.exp() * difference_TK).sum(1)
        if tail and ids_TK.shape[1] < len(weight_VH):
            kl_T = kl_T + _tail(logq_TK, logp_TK.where(used_TK, -math.inf), dtype)
    return kl_T


@torch.no_grad()
def linear_top(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p [T] of the targets, the k likeliest tokens [T, K], their log p [T, K] in falling order) in nats,
    detached."""
    hidden_TH = hidden_TH.to(product_type(hidden_TH))
    options, V = HeadOptions(scale, float(softcap or 0), temperature), len(weight_VH)
    rows, parts = max(1, LOGITS_BYTES // (8 * V)), []
    with torch.autocast(hidden_TH.device.type, enabled=False):
        weight_VH = operand(weight_VH.to(hidden_TH.dtype))
        for hidden_CH, target_C in zip(operand(hidden_TH).split(rows), target_T.split(rows), strict=True):
            logp_CV = chunk_logits(hidden_CH, weight_VH, bias, options)[0].log_softmax(1)
            best = logp_CV.topk(min(k, V), dim=1)
            parts.append((logp_CV.gather(1, target_C[:, None])[:, 0], best.indices, best.values))
    logprob_T, ids_TK, logprob_TK = (torch.cat(each) for each in zip(*parts, strict=True))
    return logprob_T, ids_TK, logprob_TK


def _tail(logq_TK: Tensor, logp_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """q_o log(q_o / p_o) of what K tokens leave; 0 where q_o is no more than rounding, below which p_o is not taken
    either."""
    floor = 16 * torch.finfo(dtype).eps
    most = math.log1p(-floor)
    logQ_T, logP_T = logq_TK.logsumexp(1), logp_TK.logsumexp(1).clamp(max=most)
    some_T = logQ_T < most
    logqo_T, logpo_T = log1mexp(logQ_T.clamp(max=most)), log1mexp(logP_T)
    return (logqo_T.exp() * (logqo_T - logpo_T)).where(some_T, 0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, to rounding: by expm1 near 0, by log1p below -log 2."""
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(x.where(near, -1))).log(), torch.log1p(-x.where(~near, -1).exp()))


class _PickedLogits(torch.autograd.Function):
    """softcap(scale h W^T + bias) / temperature at some tokens [T, K], fp32 (float64 for float64)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_TK: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> Tensor:
        dtype, parts = accumulation_dtype(hidden_TH.dtype), []
        for hidden_CH, ids_CK in _blocks(hidden_TH, ids_TK):
            rows_CKH = weight_VH[ids_CK].to(hidden_TH.dtype).to(dtype)
            parts.append((rows_CKH @ hidden_CH.to(dtype)[:, :, None])[:, :, 0])
        raw_TK = torch.cat(parts) if parts else hidden_TH.new_zeros(ids_TK.shape, dtype=dtype)
        raw_TK = raw_TK * scale
        if bias_V is not None:
            raw_TK = raw_TK + bias_V[ids_TK].to(dtype)
        tanh_TK = torch.tanh(raw_TK / softcap) if softcap else None
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, ids_TK, tanh_TK)
        ctx.numbers = scale, temperature
        return (raw_TK if tanh_TK is None or not softcap else softcap * tanh_TK) / temperature

    @staticmethod
    def backward(ctx: Any, dlogits_TK: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, weight_VH, bias_V, ids_TK, tanh_TK = ctx.saved_tensors
        scale, temperature = ctx.numbers
        needs, dtype = ctx.needs_input_grad, dlogits_TK.dtype
        draw_TK = dlogits_TK / temperature
        if tanh_TK is not None:
            draw_TK = draw_TK * (1 - tanh_TK.square())
        dbias_V = None
        if bias_V is not None and needs[2]:
            dbias_V = (
                torch.zeros_like(bias_V, dtype=dtype).index_add(0, ids_TK.flatten(), draw_TK.flatten()).to(bias_V.dtype)
            )
        draw_TK, parts = draw_TK * scale, []
        dweight_VH = torch.zeros_like(weight_VH, dtype=dtype) if needs[1] else None
        for hidden_CH, ids_CK, draw_CK in _blocks(hidden_TH, ids_TK, draw_TK):
            if needs[0]:
                parts.append((draw_CK[:, None, :] @ weight_VH[ids_CK].to(hidden_TH.dtype).to(dtype))[:, 0])
            if dweight_VH is not None:
                each_CKH = draw_CK[:, :, None] * hidden_CH.to(dtype)[:, None, :]
                dweight_VH.index_add_(0, ids_CK.flatten(), each_CKH.flatten(0, 1))
        dhidden_TH = torch.cat(parts).to(hidden_TH.dtype) if parts else None
        dweight = None if dweight_VH is None else dweight_VH.to(weight_VH.dtype)
        return dhidden_TH, dweight, dbias_V, None, None, None, None


def _blocks(hidden_TH: Tensor, ids_TK: Tensor, *others: Tensor) -> Any:
    """The same rows of each, so many that their gathered rows of the head take at most `GATHERED_BYTES`."""
    rows = max(
        1, GATHERED_BYTES // (accumulation_dtype(hidden_TH.dtype).itemsize * ids_TK.shape[1] * hidden_TH.shape[1])
    )
    return zip(*(x.split(rows) for x in (hidden_TH, ids_TK, *others)), strict=True)
