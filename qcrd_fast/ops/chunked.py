"""Vectorised torch implementation of the ops (`--impl torch`): chunks of the vocabulary, explicit gradients.

Shape suffixes: T tokens, H hidden, V vocabulary, C chunk of the vocabulary, R rationales, S rows with a gradient, B
rows, K entries kept by top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcrd_fast.ops.cpu_products import has_bf16_products, product
from qcrd_fast.ops.philox import gumbel
from qcrd_fast.ops.reference import Contrast, HeadOptions, accumulable, accumulation_dtype
from qcrd_fast.ops.selection import SELECTIONS, SOFTMIN_TEMPERATURE, Selection

CHUNK_BYTES = 8 * 2**20  # largest block of logits that the chunked twin holds; what stays in a cache is fastest
MIN_CHUNK = 64  # vocabulary rows, however many tokens there are


def chunked_forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: HeadOptions,
    ignore_index: int,
    want_entropy: bool,
    want_sum_p2: bool = False,
    kept_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_logprob_eager` over chunks of the vocabulary with an online log-sum-exp. Unwanted outputs are [0].

    The last two: [T] with the entropy, what rounding left of the log-sum-exp, which the entropy's gradient needs; and
    the logits of the first chunks, as many as `kept_bytes` hold, [T, C] of each chunk in turn, for `chunked_backward`.
    """
    dtype = accumulation_dtype(hidden_TH.dtype)
    (T, _), V = hidden_TH.shape, len(weight_VH)
    # The smallest finite number, not -inf, so that a chunk of logits that are all -inf (masked by the bias) gives no
    # NaN.
    max_T = torch.full((T,), torch.finfo(dtype).min, dtype=dtype, device=hidden_TH.device)
    sum_T, picked_T = torch.zeros_like(max_T), torch.zeros_like(max_T)
    plogp_T = torch.zeros_like(max_T) if want_entropy else max_T.new_empty(0)  # sum of e log e, e = exp(logit - max)
    sum_e2_T = torch.zeros_like(max_T) if want_sum_p2 else max_T.new_empty(0)
    kept = max_T.new_empty(T * kept_columns(V, T, dtype, kept_bytes))
    compute_dtype, hidden_TH = hidden_TH.dtype, operand(hidden_TH)
    for start, stop in chunks(V, T):
        weight_CH = operand(weight_VH[start:stop].to(compute_dtype))
        logits_TC = chunk_logits(hidden_TH, weight_CH, None if bias_V is None else bias_V[start:stop], options)[0]
        local_T, hit_T = local_target(target_T, start, stop)
        picked_T += logits_TC.gather(1, local_T[:, None])[:, 0].where(hit_T, 0)
        if T * stop <= len(kept):
            kept[T * start : T * stop].view_as(logits_TC).copy_(logits_TC)
        new_max_T = torch.maximum(max_T, logits_TC.amax(1))
        shift_T = max_T - new_max_T
        decay_T = shift_T.exp()
        exp_TC = logits_TC.sub_(new_max_T[:, None]).exp_()
        if want_entropy:
            plogp_T = decay_T * (plogp_T + shift_T.where(sum_T > 0, 0) * sum_T) - torch.special.entr(exp_TC).sum(1)
        sum_T = sum_T * decay_T + exp_TC.sum(1)
        if want_sum_p2:
            sum_e2_T = sum_e2_T * decay_T.square() + exp_TC.square_().sum(1)
        max_T = new_max_T
    valid_T = target_T != ignore_index
    log_sum_T = sum_T.log()
    lse_T = max_T + log_sum_T
    logprob_T = (picked_T - lse_T).clamp(max=0)  # rounding can leave it a little above 0
    entropy_T = rest_T = plogp_T
    if want_entropy:
        entropy_T = (log_sum_T - plogp_T / sum_T).where(valid_T, 0)
        rest_T = log_sum_T - (lse_T - max_T)
    sum_p2_T = (sum_e2_T / sum_T.square()).where(valid_T, 0) if want_sum_p2 else sum_e2_T
    top_T = (picked_T >= max_T) & valid_T
    return logprob_T.where(valid_T, 0), lse_T.where(valid_T, 0), entropy_T, top_T, sum_p2_T, rest_T.clone(), kept


def chunked_backward(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    target_S: Tensor,
    bias_V: Tensor | None,
    lse_S: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    options: HeadOptions,
    needs: tuple[bool, bool, bool],
    kept: Tensor | None = None,
    rows_S: Tensor | None = None,
    num_rows: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dHidden [S, H] fp32, dWeight [V, H], dBias [V]) of the given rows; None where `needs` is False.

    `coefficients` (onehot_S, prob_S, problog_S) make the gradient of a row's logits z:
    onehot * [j = target] + p_j * (prob + problog * log p_j), which covers log p, log-sum-exp and entropy.
    `kept`: the logits that a forward pass over `num_rows` rows kept, of which these are `rows_S` (None: all, in order);
    the rest is computed again.

    Where the processor multiplies bf16, the two products of bf16 operands with the logits' gradient, rounded to bf16,
    are its own: summed in fp32 and rounded once, chunk by chunk for dHidden.
    """
    onehot_S, prob_S, problog_S = coefficients
    S, V = len(hidden_SH), len(weight_VH)
    out = HeadGradients(hidden_SH, weight_VH, bias_V, options.scale, needs)
    compute_dtype, hidden_SH = hidden_SH.dtype, out.hidden_SH
    T = num_rows or S
    K = 0 if kept is None else len(kept) // max(T, 1)
    for start, stop in chunks_of_kept(V, T, S, K):
        raw_CH = weight_VH[start:stop].to(compute_dtype)
        bias_C = None if bias_V is None else bias_V[start:stop]
        if kept is not None and stop <= K:
            kept_TC = kept[T * start : T * stop].view(T, stop - start)
            logits_SC = kept_TC.clone() if rows_S is None else kept_TC[rows_S]
            weight_CH = raw_CH if out.narrow or not needs[0] else operand(raw_CH)
            slope_SC = (
                softcap_slope(logits_SC * options.temperature / options.softcap, options) if options.softcap else None
            )
        else:
            weight_CH = operand(raw_CH)
            logits_SC, slope_SC = chunk_logits(hidden_SH, weight_CH, bias_C, options, want_slope=True)
        logp_SC = logits_SC.sub_(lse_S[:, None])
        if problog_S is None:
            dz_SC = logp_SC.exp_().mul_(prob_S[:, None])
        else:
            p_SC = logp_SC.exp()
            dz_SC = p_SC * (prob_S[:, None] + problog_S[:, None] * logp_SC.masked_fill_(p_SC == 0, 0))
        local_S, hit_S = local_target(target_S, start, stop)
        dz_SC.scatter_add_(1, local_S[:, None], onehot_S.where(hit_S, 0)[:, None])
        if slope_SC is not None or tempered(options):
            dz_SC *= 1 / options.temperature if slope_SC is None else slope_SC
        out.add(start, stop, dz_SC, raw_CH, weight_CH)
    return out.dhidden_SH, out.dweight_VH, out.dbias_V


class HeadGradients:
    """(dHidden [S, H] fp32, dWeight [V, H], dBias [V]) of a head, added up chunk by chunk; None where `needs` says no.

    Where the processor multiplies bf16 (`narrow`), the products of bf16 operands with the logits' gradient are its own.
    """

    def __init__(
        self, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, needs: tuple[bool, bool, bool]
    ):
        dtype, dense = accumulation_dtype(hidden_SH.dtype), torch.contiguous_format
        self.dhidden_SH = hidden_SH.new_zeros(hidden_SH.shape, dtype=dtype) if needs[0] else None
        self.dweight_VH = torch.empty_like(weight_VH, memory_format=dense) if needs[1] else None
        self.dbias_V = torch.empty_like(bias_V) if needs[2] and bias_V is not None else None
        bf16 = hidden_SH.dtype == torch.bfloat16 and has_bf16_products(hidden_SH.device)
        self.narrow = torch.bfloat16 if bf16 else None
        self.narrow_SH, self.hidden_SH, self.scale = hidden_SH, operand(hidden_SH), scale

    def add(self, start: int, stop: int, da_SC: Tensor, raw_CH: Tensor, weight_CH: Tensor) -> None:
        """Of a chunk: d loss / d a, which is overwritten, the head's rows in the hidden states' type, and as
        `operand`."""
        if self.dbias_V is not None:
            self.dbias_V[start:stop] = da_SC.sum(0)
        if self.scale != 1:
            da_SC *= self.scale
        narrow_SC = da_SC.to(self.narrow or self.hidden_SH.dtype)
        if self.dhidden_SH is not None:
            self.dhidden_SH += matmul(narrow_SC, raw_CH if self.narrow else weight_CH)
        if self.dweight_VH is not None:
            half = self.narrow and self.dweight_VH.dtype == self.narrow
            rounded_SC = narrow_SC if half else da_SC.to(self.hidden_SH.dtype)
            self.dweight_VH[start:stop] = matmul(rounded_SC.T, self.narrow_SH if half else self.hidden_SH)


def chunks_of_kept(V: int, T: int, S: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks for S rows, those of the first `columns` as they were for T rows, whose logits were
    kept."""
    return [
        *(c for c in chunks(V, T) if c[1] <= columns),
        *((columns + a, columns + b) for a, b in chunks(V - columns, S)),
    ]


def kept_columns(V: int, T: int, dtype: torch.dtype, kept_bytes: int) -> int:
    """Return the number of columns in the first whole chunks whose logits for T rows fit `kept_bytes`."""
    return max((stop for _, stop in chunks(V, T) if T * stop * dtype.itemsize <= kept_bytes), default=0)


def chunk_logits(
    hidden_TH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, options: HeadOptions, want_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(logits, d logits / d a where a softcap bends them), both [T, C]."""
    logits_TC = matmul(hidden_TH, weight_CH.T)
    if options.scale != 1:
        logits_TC *= options.scale
    if bias_C is not None:
        logits_TC += bias_C
    slope_TC = None
    if options.softcap:
        logits_TC.div_(options.softcap).tanh_()
        if want_slope:
            slope_TC = softcap_slope(logits_TC, options)
        logits_TC *= options.softcap
    if tempered(options):
        logits_TC /= options.temperature
    return logits_TC, slope_TC


def softcap_slope(tanh_TC: Tensor, options: HeadOptions) -> Tensor:
    """d logits / d a of `softcap * tanh(a / softcap) / temperature`, from the tanh."""
    return (1 - tanh_TC.square()) / options.temperature


def tempered(options: HeadOptions) -> bool:
    """Whether logits are divided by a temperature: a number, or one for each token [T, 1]."""
    return isinstance(options.temperature, Tensor) or options.temperature != 1


def chunks(V: int, T: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of the vocabulary for T rows."""
    step = max(MIN_CHUNK, CHUNK_BYTES // 4 // max(T, 1))
    return [(start, min(start + step, V)) for start in range(0, V, step)]


def local_target(target_T: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(the target's column in the chunk, clamped into it; whether it lies there)."""
    local_T = target_T - start
    return local_T.clamp(0, stop - start - 1), (local_T >= 0) & (local_T < stop - start)


def operand(x: Tensor) -> Tensor:
    """Convert `x` for `matmul`: half types stay on a GPU and are widened elsewhere, where the product would be
    rounded."""
    return x if x.is_cuda else accumulable(x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated in fp32 (float64 for float64) and, but for bf16 on a CPU, returned so."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return product(a, b)


def contrastive_torch(
    logprob_T: Tensor,
    rationale_T: Tensor,
    valid_T: Tensor | None,
    question_R: Tensor,
    positive_R: Tensor,
    quality_R: Tensor | None,
    score_R: Tensor | None,
    selects: tuple[str, str],
    delta: float,
    num_questions: Tensor,
) -> Contrast:
    """`contrastive_eager`, vectorised and without autograd. `score_R` decides sampled selections."""
    R, dtype = len(question_R), logprob_T.dtype
    nll_R, count_R = rationale_mean(logprob_T, rationale_T, valid_T, R)
    # One group for each question and class. Numbering by first appearance needs no host sync for the number of
    # questions.
    order_R = torch.argsort(question_R, stable=True)
    sorted_R = question_R[order_R]
    index_R = torch.arange(R, device=question_R.device)
    new_R = torch.zeros_like(order_R)
    new_R[1:] = sorted_R[1:] != sorted_R[:-1]
    group_R = torch.empty_like(order_R)
    group_R[order_R] = new_R.cumsum(0)
    group_R = 2 * group_R + ~positive_R

    def pick(values_R: Tensor | float, negatives_R: Tensor | float) -> Tensor:
        return torch.where(positive_R, values_R, negatives_R)

    candidate_R = count_R > 0
    if SELECTIONS[selects[1]].active_only:
        candidate_R = candidate_R & (positive_R | ~(nll_R >= delta))
    s_R = torch.ones_like(nll_R) if quality_R is None else pick(quality_R.to(dtype), 1 - quality_R.to(dtype))

    # Selection: the largest rank of the group, ties to the lowest index.
    positive, negative = SELECTIONS[selects[0]], SELECTIONS[selects[1]]

    def rank(selection: Selection) -> Tensor:
        return score_R.to(dtype) if selection.random and score_R is not None else selection.order * nll_R

    rank_R = pick(rank(positive), rank(negative))
    rank_R = torch.where(rank_R.isnan(), torch.inf, rank_R)  # a NaN must reach the loss
    best_R = torch.full((2 * R,), -torch.inf, dtype=dtype, device=nll_R.device)
    best_R = best_R.scatter_reduce(0, group_R, rank_R.where(candidate_R, -torch.inf), "amax")
    first_R = torch.full_like(best_R, R, dtype=torch.int64)
    top_R = candidate_R & (rank_R == best_R[group_R])
    first_R = first_R.scatter_reduce(0, group_R, index_R.where(top_R, R), "amin")
    chosen_R = s_R.where(first_R[group_R] == index_R, 0)  # a quality that is not selected adds nothing, not even a NaN

    # Means over all candidates, weighted or not.
    zeros = torch.zeros(2 * R, dtype=torch.float64, device=nll_R.device)
    in_R = s_R.where(candidate_R, 0)

    def weights(selection: Selection) -> Tensor:
        if selection.single:
            return chosen_R
        part_R = in_R
        if selection.soft:
            gap_R = (selection.order * nll_R - best_R[group_R]) / SOFTMIN_TEMPERATURE
            part_R = in_R * torch.exp(gap_R.where(candidate_R, 0))
        total_R = part_R if selection.by_quality else candidate_R
        total_R = zeros.scatter_add(0, group_R, total_R.double())[group_R].to(dtype)
        return torch.where(total_R == 0, 0, part_R / total_R)

    weight_R = pick(weights(positive), weights(negative)) / num_questions

    term_R, weight_R = hinge_terms(nll_R, positive_R, weight_R, delta)
    loss_pos = term_R.where(positive_R, 0).sum()  # Eq. 6
    loss_neg = term_R.where(~positive_R, 0).sum()
    active_R = ~positive_R & (count_R > 0) & (nll_R < delta)
    return Contrast(loss_pos, loss_neg, nll_R, weight_R, active_R, count_R)


def hinge_terms(nll_R: Tensor, positive_R: Tensor, weight_R: Tensor, delta: float | None) -> tuple[Tensor, Tensor]:
    """Return w l of positives and w h(l) of negatives, and w (0 for an inactive hinge), each [R]. Differentiable in l.

    Eq. 7: h(u) = min(u - delta, 0), or h(u) = u where `delta` is None. What weighs nothing adds nothing, not even a
    NaN.
    """
    value_R = nll_R
    if delta is not None:
        value_R = torch.where(positive_R, nll_R, nll_R - delta)
        weight_R = weight_R.masked_fill(~positive_R & (nll_R >= delta), 0)
    return torch.where(weight_R == 0, 0, weight_R * value_R), weight_R


def rationale_mean(logprob_T: Tensor, rationale_T: Tensor, valid_T: Tensor | None, R: int) -> tuple[Tensor, Tensor]:
    """Return mean -log p [R] and number [R] int64 of valid tokens; 0 without any. Differentiable; sums in float64."""
    valid_T = torch.ones_like(rationale_T, dtype=torch.bool) if valid_T is None else valid_T
    count_R = torch.zeros(R, dtype=torch.int64, device=logprob_T.device).scatter_add(0, rationale_T, valid_T.long())
    sums_R = torch.zeros(R, dtype=torch.float64, device=logprob_T.device)
    sums_R = sums_R.scatter_add(0, rationale_T, logprob_T.where(valid_T, 0).double())
    return (-sums_R / count_R.clamp(min=1)).to(logprob_T.dtype), count_R


def forward_keeping(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: HeadOptions,
    ignore_index: int,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log-sum-exp, the logits kept for `backward_kept`)."""
    out = chunked_forward(hidden_TH, weight_VH, target_T, bias_V, options, ignore_index, False, kept_bytes=kept_bytes)
    return out[0], out[1], out[6]


def backward_kept(
    kept: Tensor,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    lse_T: Tensor,
    dlogprob_T: Tensor,
    options: HeadOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dHidden, dWeight, dBias), None where `needs` is False, from d loss / d log p [T] (0 where ignored)."""
    head = (hidden_TH, weight_VH, target_T, bias_V, lse_T)
    return chunked_backward(*head, (dlogprob_T, -dlogprob_T, None), options, needs, kept)


def head_logits(hidden_BH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: HeadOptions) -> Tensor:
    """Logits [B, V], fp32 (float64 for float64 operands); at temperature 0, those of temperature 1."""
    weight_VH = weight_VH.to(hidden_BH.dtype)
    logits_BV = options.scale * (accumulable(hidden_BH) @ accumulable(weight_VH).T)
    if bias_V is not None:
        logits_BV += bias_V
    if options.softcap:
        logits_BV = options.softcap * torch.tanh(logits_BV / options.softcap)
    return logits_BV / (options.temperature or 1.0)


def pick_tokens(
    logits_BV: Tensor,
    key_B2: Tensor,
    counter_B3: Tensor,
    top_k: int = 0,
    *,
    noisy: bool = True,
    warp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The token [B] that `linear_sample` draws from these logits, already divided by the temperature.

    warp: what is done to the logits [B, V] after top-k, which leaves -inf, and before the noise: a nucleus, say.
    """
    V = logits_BV.shape[1]
    if not noisy:
        return logits_BV.argmax(1)
    if not 0 < top_k < V:
        logits_BV = warp(logits_BV) if warp else logits_BV
        return (logits_BV.double() + gumbel(key_B2, counter_B3, size=V)).argmax(1)
    kept_BK, vocab_BK = largest(logits_BV, top_k)
    if warp:
        kept_BK = warp(torch.full_like(logits_BV, -torch.inf).scatter(1, vocab_BK, kept_BK)).gather(1, vocab_BK)
    best_B1 = (kept_BK.double() + gumbel(key_B2, counter_B3, vocab_BK)).argmax(1, keepdim=True)
    return vocab_BK.gather(1, best_B1)[:, 0]


def largest(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values [B, k], entries [B, k]) of the k largest, ties to the lowest entry. They are ranked as fp32."""
    V = logits_BV.shape[1]
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32)  # adding 0 turns -0 into 0, which it equals
    ordered_BV = (bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    rank_BV = (ordered_BV << 32) + torch.arange(V - 1, -1, -1, device=logits_BV.device)
    vocab_BK = V - 1 - (rank_BV.topk(k, dim=1).values & 0xFFFFFFFF)
    return logits_BV.gather(1, vocab_BK), vocab_BK
