"""The torch twin of `linear_kl`, which `--impl torch` runs: a chunk of the vocabulary of both heads at a time.

Shape suffixes: T tokens, H hidden, V vocabulary, C chunk of the vocabulary, S rows with a gradient. p is the student's
distribution, q the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcrd_fast.ops.chunked import (
    HeadGradients,
    chunk_logits,
    chunks,
    chunks_of_kept,
    kept_columns,
    operand,
    softcap_slope,
    tempered,
)
from qcrd_fast.ops.reference import Head, accumulation_dtype


def chunked_kl(
    student: Head, teacher: Head, valid_T: Tensor, beta: float, kept_bytes: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(divergence, log-sum-exp of student and of teacher, `mean_S` of `chunked_kl_backward`), each [T], 0 where not
    valid; then the logits of the first chunks of the student and of the teacher, as many as `kept_bytes` hold, as
    `chunked_forward`.

    One pass over the vocabulary with online log-sum-exps where beta is 0 or 1; else a second one, that needs both.
    """
    dtype = accumulation_dtype(student.hidden_TH.dtype)
    T, V = len(student.hidden_TH), len(student.weight_VH)
    columns = kept_columns(V, T, dtype, kept_bytes // 2)
    kept = [student.hidden_TH.new_empty(T * columns, dtype=dtype) for _ in range(2)]
    max_2T = torch.full((2, T), torch.finfo(dtype).min, dtype=dtype, device=valid_T.device)
    sum_2T = torch.zeros_like(max_2T)
    # sum of e (x_a - x_b), x_a and x_b each row's logits less the largest, e = exp(x_a)
    ratio_T = torch.zeros_like(max_2T[0])
    a, b = (0, 1) if beta == 1 else (1, 0)  # KL(a || b)
    masks = student.bias_V is not None or teacher.bias_V is not None  # with -inf
    for start, stop, pair, _, _ in _logits_of_both(student, teacher, chunks(V, T)):
        if stop <= columns:
            for of, logits_TC in zip(kept, pair, strict=True):
                of[T * start : T * stop].view_as(logits_TC).copy_(logits_TC)
        new_2T = torch.maximum(max_2T, torch.stack([logits_TC.amax(1) for logits_TC in pair]))
        moved_2T, max_2T = max_2T - new_2T, new_2T
        for logits_TC, max_T in zip(pair, max_2T, strict=True):
            logits_TC -= max_T[:, None]
        ratio_TC = pair[a] - pair[b] if beta in (0, 1) else None
        for logits_TC in pair:
            logits_TC.exp_()
        decay_2T = moved_2T.exp()
        if ratio_TC is not None:
            if masks:
                ratio_TC.masked_fill_(pair[a] == 0, 0)
            ratio_T += (moved_2T[a] - moved_2T[b]).where(sum_2T[a] > 0, 0) * sum_2T[a]
            ratio_T = decay_2T[a] * ratio_T + ratio_TC.mul_(pair[a]).sum(1)
        sum_2T = sum_2T * decay_2T + torch.stack([exp_TC.sum(1) for exp_TC in pair])
    log_sum_2T = sum_2T.log()
    lse_T, teacher_lse_T = (max_2T + log_sum_2T).where(valid_T, 0)
    if beta in (0, 1):
        mean_T = kl_T = ratio_T / sum_2T[a] + (log_sum_2T[b] - log_sum_2T[a])
    else:
        kl_T, mean_T = torch.zeros_like(lse_T), torch.zeros_like(lse_T)
        rows = chunks_of_kept(V, T, T, columns)
        for _, _, (logp_TC, logq_TC), _, _ in _logits_of_both(student, teacher, rows, (kept[0], kept[1], T, None)):
            ratio_TC, mixture_TC = _mixture(logp_TC.sub_(lse_T[:, None]), logq_TC.sub_(teacher_lse_T[:, None]), beta)
            kl_T += beta * logq_TC.exp_().mul_(ratio_TC.sub_(mixture_TC)).sum(1)
            mean_T -= logp_TC.exp_().mul_(mixture_TC).sum(1)
        kl_T = kl_T + (1 - beta) * mean_T
    valid = [x.where(valid_T, 0) for x in (kl_T.clamp(min=0), mean_T)]  # rounding can leave it a little below 0
    return valid[0], lse_T, teacher_lse_T, valid[1], *kept  # type: ignore[return-value]


def chunked_kl_backward(
    student: Head,
    teacher: Head,
    beta: float,
    lse_S: Tensor,
    teacher_lse_S: Tensor,
    mean_S: Tensor,
    dkl_S: Tensor,
    needs: tuple[bool, bool, bool],
    kept: tuple[Tensor, Tensor, int, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dHidden [S, H] fp32, dWeight [V, H], dBias [V]) of the student's rows given, None where `needs` says no, from
    d loss / d divergence [S].

    The gradient of a row's logits is p - q of KL(q || p), else p (r - mean), r = log(p / q) of KL(p || q) and
    (1 - beta) log(p / m) of a mixture m, mean = sum p r. `kept`: the logits that `chunked_kl` kept of both, over how
    many rows, and which of those these are (None: all).
    """
    options, (S, V) = student.options, (len(student.hidden_TH), len(student.weight_VH))
    out = HeadGradients(student.hidden_TH, student.weight_VH, student.bias_V, options.scale, needs)
    grad_S1 = dkl_S[:, None] * (1 if beta in (0, 1) else 1 - beta)
    T = kept[2] if kept else S
    ranges = chunks_of_kept(V, T, S, len(kept[0]) // max(T, 1) if kept else 0)
    for start, stop, (logp_SC, logq_SC), weight_CH, slope_SC in _logits_of_both(
        student, teacher, ranges, kept, slopes=True
    ):
        logp_SC.sub_(lse_S[:, None])
        logq_SC.sub_(teacher_lse_S[:, None])
        if beta == 0:
            da_SC = logp_SC.exp_().sub_(logq_SC.exp_())
        elif beta == 1:
            p_SC = logp_SC.exp()
            da_SC = logp_SC.sub_(logq_SC).masked_fill_(p_SC == 0, 0).sub_(mean_S[:, None]).mul_(p_SC)
        else:
            mixture_SC = _mixture(logp_SC, logq_SC, beta)[1]
            da_SC = mixture_SC.add_(mean_S[:, None]).neg_().mul_(logp_SC.exp_())
        da_SC *= grad_S1
        if slope_SC is not None or tempered(options):
            da_SC *= 1 / options.temperature if slope_SC is None else slope_SC
        raw_CH = student.weight_VH[start:stop].to(student.hidden_TH.dtype)
        if weight_CH is None and not out.narrow and needs[0]:
            weight_CH = operand(raw_CH)
        out.add(start, stop, da_SC, raw_CH, raw_CH if weight_CH is None else weight_CH)
    return out.dhidden_SH, out.dweight_VH, out.dbias_V


def _logits_of_both(
    student: Head,
    teacher: Head,
    ranges: list[tuple[int, int]],
    kept: tuple[Tensor, Tensor, int, Tensor | None] | None = None,
    slopes: bool = False,
) -> Iterator[tuple[int, int, tuple[Tensor, Tensor], Tensor | None, Tensor | None]]:
    """(start, stop, logits of student and teacher [T, C], the student's rows of the head as `operand` or None where its
    logits were kept, d logits / d a of a softcap or None) of each chunk of the vocabulary."""
    dtype = accumulation_dtype(student.hidden_TH.dtype)
    operands = [operand(head.hidden_TH) for head in (student, teacher)]
    for start, stop in ranges:
        if kept and kept[2] * stop <= len(kept[0]):
            rows_TC = [of[kept[2] * start : kept[2] * stop].view(kept[2], stop - start) for of in kept[:2]]
            z_TC, teacher_TC = (x.clone() if kept[3] is None else x[kept[3]] for x in rows_TC)
            options = student.options
            bent = slopes and options.softcap
            slope_TC = softcap_slope(z_TC * options.temperature / options.softcap, options) if bent else None
            yield start, stop, (z_TC, teacher_TC), None, slope_TC
            continue
        logits, weights, slope_TC = [], [], None
        for hidden_TH, head, want in zip(operands, (student, teacher), (slopes, False), strict=True):
            weights.append(operand(head.weight_VH[start:stop].to(head.hidden_TH.dtype)))
            bias_C = None if head.bias_V is None else head.bias_V[start:stop]
            logits_TC, slope = chunk_logits(hidden_TH, weights[-1], bias_C, head.options, want)
            logits.append(logits_TC.to(dtype))
            slope_TC = slope if want else slope_TC
        yield start, stop, (logits[0], logits[1]), weights[0], slope_TC


def _mixture(logp_TC: Tensor, logq_TC: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log(q / p), log(m / p)), m = (1 - beta) p + beta q. Logs below -200, whose exponentials are 0, are raised in
    place."""
    ratio_TC = logq_TC.clamp_(min=-200) - logp_TC.clamp_(min=-200)
    weight_TC = (ratio_TC > 0).to(ratio_TC.dtype).mul_(1 - 2 * beta).add_(beta)  # of the smaller of p and q
    log_TC = weight_TC.mul_(torch.expm1(-ratio_TC.abs())).log1p_()
    return ratio_TC, log_TC.add_(ratio_TC.clamp(min=0))
