"""Contrastive loss: log p per token -> mean per rationale, selection, weights, hinge, terms of Eq. 3.

T tokens, R rationales. Two launches forward (the means; then one program a question), one backward. Sampling is the
choice of the largest `score`, which the caller hashes, so that every selection is an extremum, a mean or a weighted
mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.product import LAUNCH

NO_ONE = tl.constexpr(2**31 - 1)
SOFTMIN_RATE = tl.constexpr(5.0)  # 1 / selection.SOFTMIN_TEMPERATURE


@triton.jit
def mean_kernel(
    logprob_ptr, valid_ptr, offset_ptr, nll_ptr, count_ptr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one rationale. logprob, valid [T], offset [R + 1] -> mean -log p and number of valid tokens [R]."""
    r = tl.program_id(0)
    begin, stop = tl.load(offset_ptr + r), tl.load(offset_ptr + r + 1)
    lane = tl.arange(0, BLOCK)
    sum_b = tl.zeros((BLOCK,), dtype=tl.float64)  # so that the same tokens in another order tie
    count_b = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(begin, stop, BLOCK):
        at_b = first + lane
        keep_b = at_b < stop
        if HAS_VALID:
            keep_b = keep_b & (tl.load(valid_ptr + at_b, mask=keep_b, other=0) != 0)
        sum_b += tl.load(logprob_ptr + at_b, mask=keep_b, other=0.0).to(tl.float64)
        count_b += keep_b.to(tl.int32)
    count = tl.sum(count_b, 0)
    tl.store(nll_ptr + r, (-tl.sum(sum_b, 0) / tl.maximum(count, 1)).to(tl.float32))
    tl.store(count_ptr + r, count.to(tl.int64))


@triton.jit
def _rank(nll_b, score_ptr, r_b, mask_b, SELECT: tl.constexpr):
    """Return the key whose maximum is selected. NaN ranks first, so that it reaches the loss."""
    if SELECT == "sampling":
        rank_b = tl.load(score_ptr + r_b, mask=mask_b, other=0.0)
    elif SELECT == "min" or SELECT == "softmin":
        rank_b = -nll_b
    else:
        rank_b = nll_b
    return tl.where(rank_b != rank_b, float("inf"), rank_b)


@triton.jit
def _leader(rank_b, candidate_b, r_b, best, winner):
    """(best, winner) after one more block; ties stay with the lowest index, which comes first."""
    block_best = tl.max(tl.where(candidate_b, rank_b, float("-inf")), 0)
    block_winner = tl.min(tl.where(candidate_b & (rank_b == block_best), r_b, NO_ONE), 0)
    better = (block_winner != NO_ONE) & ((block_best > best) | (winner == NO_ONE))
    return tl.where(better, block_best, best), tl.where(better, block_winner, winner)


@triton.jit
def _softened(s_b, rank_b, best, SELECT: tl.constexpr):
    """Return s; under softmin s exp((best - l) / temperature), with `best` the smallest -log p so far."""
    if SELECT == "softmin":
        s_b = s_b * tl.exp((rank_b - best) * SOFTMIN_RATE)
    return s_b


@triton.jit
def _share(s_b, r_b, winner, members, total, SELECT: tl.constexpr):
    """The part of the term that each rationale carries, before 1/N."""
    if SELECT == "mean":
        share_b = s_b / tl.maximum(members, 1.0)
    elif SELECT == "wmean" or SELECT == "softmin":
        share_b = tl.where(total == 0, 0.0, s_b / tl.where(total == 0, 1.0, total))
    else:
        share_b = tl.where(r_b == winner, s_b, 0.0)
    return share_b


@triton.jit
def _candidates(
    at_b, end, order_ptr, positive_ptr, quality_ptr, nll_ptr, count_ptr, delta,
    HAS_QUALITY: tl.constexpr, ACTIVE_ONLY: tl.constexpr,
):  # fmt: skip
    """(mask, rationale, positive, candidate, nll, s) of a block of a question's rationales."""
    mask_b = at_b < end
    r_b = tl.load(order_ptr + at_b, mask=mask_b, other=0).to(tl.int32)
    positive_b = tl.load(positive_ptr + r_b, mask=mask_b, other=0) != 0
    nll_b = tl.load(nll_ptr + r_b, mask=mask_b, other=0.0)
    candidate_b = mask_b & (tl.load(count_ptr + r_b, mask=mask_b, other=0) > 0)
    if ACTIVE_ONLY:
        candidate_b = candidate_b & (positive_b | ((nll_b >= delta) == 0))
    s_b = tl.full(nll_b.shape, 1.0, dtype=tl.float32)
    if HAS_QUALITY:
        quality_b = tl.load(quality_ptr + r_b, mask=mask_b, other=0.0).to(tl.float32)
        s_b = tl.where(positive_b, quality_b, 1 - quality_b)
    return mask_b, r_b, positive_b, candidate_b, nll_b, s_b


@triton.jit
def question_kernel(
    question_ptr, order_ptr, end_ptr, positive_ptr, quality_ptr, score_ptr, nll_ptr, count_ptr, num_questions_ptr,
    delta,
    weight_ptr, active_ptr, loss_pos_ptr, loss_neg_ptr,
    POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, HAS_QUALITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one question. Runs for each place of the list sorted by question; only a question's first place
    works.

    order [R]: rationales sorted by question; question, end [R]: in that order, the question and where it ends;
    positive, quality, score, nll, count [R]: by rationale. Out: weight, active [R] by rationale; loss_pos, loss_neg
    [R]: its terms.
    """
    place = tl.program_id(0)
    question = tl.load(question_ptr + place)
    before = tl.load(question_ptr + place - 1, mask=place > 0, other=-1)
    end = tl.where(question != before, tl.load(end_ptr + place).to(tl.int32), place)
    lane = tl.arange(0, BLOCK)
    ACTIVE_ONLY: tl.constexpr = NEGATIVE == "max-active"
    pos_best, neg_best = float("-inf"), float("-inf")
    pos_winner, neg_winner = NO_ONE, NO_ONE
    pos_members, neg_members = 0.0, 0.0
    pos_total, neg_total = 0.0, 0.0
    for first in range(place, end, BLOCK):
        mask_b, r_b, positive_b, candidate_b, nll_b, s_b = _candidates(
            first + lane, end, order_ptr, positive_ptr, quality_ptr, nll_ptr, count_ptr, delta, HAS_QUALITY, ACTIVE_ONLY
        )
        is_pos_b, is_neg_b = candidate_b & positive_b, candidate_b & (positive_b == 0)
        pos_rank_b = _rank(nll_b, score_ptr, r_b, mask_b, POSITIVE)
        neg_rank_b = _rank(nll_b, score_ptr, r_b, mask_b, NEGATIVE)
        before_best = pos_best
        pos_best, pos_winner = _leader(pos_rank_b, is_pos_b, r_b, pos_best, pos_winner)
        neg_best, neg_winner = _leader(neg_rank_b, is_neg_b, r_b, neg_best, neg_winner)
        pos_members += tl.sum(is_pos_b.to(tl.float32), 0)
        neg_members += tl.sum(is_neg_b.to(tl.float32), 0)
        if POSITIVE == "softmin":  # what was added up for a larger -log p
            pos_total *= tl.where(before_best == pos_best, 1.0, tl.exp((before_best - pos_best) * SOFTMIN_RATE))
        pos_total += tl.sum(tl.where(is_pos_b, _softened(s_b, pos_rank_b, pos_best, POSITIVE), 0.0), 0)
        neg_total += tl.sum(tl.where(is_neg_b, s_b, 0.0), 0)

    num_questions = tl.load(num_questions_ptr)
    loss_pos_b = tl.zeros((BLOCK,), dtype=tl.float32)
    loss_neg_b = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(place, end, BLOCK):
        mask_b, r_b, positive_b, candidate_b, nll_b, s_b = _candidates(
            first + lane, end, order_ptr, positive_ptr, quality_ptr, nll_ptr, count_ptr, delta, HAS_QUALITY, ACTIVE_ONLY
        )
        pos_rank_b = _rank(nll_b, score_ptr, r_b, mask_b, POSITIVE)
        pos_share_b = _share(
            _softened(s_b, pos_rank_b, pos_best, POSITIVE), r_b, pos_winner, pos_members, pos_total, POSITIVE
        )
        neg_share_b = _share(s_b, r_b, neg_winner, neg_members, neg_total, NEGATIVE)
        weight_b = tl.where(positive_b, pos_share_b, neg_share_b) / num_questions
        inactive_b = (positive_b == 0) & (nll_b >= delta)
        weight_b = tl.where(candidate_b & (inactive_b == 0), weight_b, 0.0)
        hinge_b = tl.where(positive_b, nll_b, nll_b - delta)  # Eq. 7: h(u) = min(u - delta, 0), gated by the weight
        term_b = tl.where(weight_b == 0, 0.0, weight_b * hinge_b)
        loss_pos_b += tl.where(positive_b, term_b, 0.0)  # Eq. 6
        loss_neg_b += tl.where(positive_b, 0.0, term_b)
        tl.store(weight_ptr + r_b, weight_b, mask=mask_b)
        counted_b = tl.load(count_ptr + r_b, mask=mask_b, other=0) > 0
        tl.store(active_ptr + r_b, (counted_b & (positive_b == 0) & (nll_b < delta)).to(tl.int8), mask=mask_b)
    tl.store(loss_pos_ptr + place, tl.sum(loss_pos_b, 0))
    tl.store(loss_neg_ptr + place, tl.sum(loss_neg_b, 0))


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dloss_pos_ptr, dloss_neg_ptr, rationale_ptr, valid_ptr, positive_ptr, weight_ptr, count_ptr, dlogprob_ptr, T,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens. d log p [T] = -weight/count * d term.

    rationale, valid [T]; positive, weight, count [R].
    """
    at_b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_b = at_b < T
    r_b = tl.load(rationale_ptr + at_b, mask=in_b, other=0)
    positive_b = tl.load(positive_ptr + r_b, mask=in_b, other=0) != 0
    weight_b = tl.load(weight_ptr + r_b, mask=in_b, other=0.0)
    count_b = tl.maximum(tl.load(count_ptr + r_b, mask=in_b, other=1), 1).to(tl.float32)
    dterm_b = tl.where(positive_b, tl.load(dloss_pos_ptr), tl.load(dloss_neg_ptr))
    dlogprob_b = -weight_b * dterm_b / count_b
    if HAS_VALID:
        dlogprob_b = tl.where(tl.load(valid_ptr + at_b, mask=in_b, other=0) != 0, dlogprob_b, 0.0)
    tl.store(dlogprob_ptr + at_b, dlogprob_b, mask=in_b)


def means(logprob_T: Tensor, rationale_T: Tensor, valid_T: Tensor | None, R: int) -> tuple[Tensor, Tensor]:
    """(mean -log p [R] fp32, valid tokens [R] int64) of each rationale; 0 where there are none."""
    nll_R, count_R = logprob_T.new_empty(R), rationale_T.new_empty(R)
    if R:
        offset = torch.searchsorted(rationale_T.contiguous(), torch.arange(R + 1, device=rationale_T.device))
        # Triton has no bool pointers: they are read as bytes.
        valid_T = None if valid_T is None else valid_T.contiguous().view(torch.int8)
        mean_kernel[(R,)](
            logprob_T.contiguous(), valid_T, offset, nll_R, count_R, HAS_VALID=valid_T is not None, BLOCK=512, **LAUNCH
        )
    return nll_R, count_R


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss_pos, loss_neg, nll_R, weight_R, active_R, count_R), fp32. `num_questions`: N of Eq. 3, on the
    device."""
    R = len(question_R)
    nll_R, count_R = means(logprob_T, rationale_T, valid_T, R)
    weight_R, loss_pos_R, loss_neg_R = (logprob_T.new_empty(R) for _ in range(3))
    active_R = torch.empty_like(positive_R)
    if R:
        order_R = torch.argsort(question_R, stable=True)
        sorted_R = question_R[order_R]
        end_R = torch.searchsorted(sorted_R, sorted_R, right=True)
        positive_R = positive_R.contiguous().view(torch.int8)
        quality_R, score_R = (None if x is None else x.contiguous() for x in (quality_R, score_R))
        question_kernel[(R,)](
            sorted_R, order_R, end_R, positive_R, quality_R, score_R, nll_R, count_R, num_questions, delta,
            weight_R, active_R.view(torch.int8), loss_pos_R, loss_neg_R,
            POSITIVE=selects[0], NEGATIVE=selects[1], HAS_QUALITY=quality_R is not None, BLOCK=32, num_warps=1,
            **LAUNCH,
        )  # fmt: skip
    return loss_pos_R.sum(), loss_neg_R.sum(), nll_R, weight_R, active_R, count_R


def backward(
    dloss_pos: Tensor,
    dloss_neg: Tensor,
    rationale_T: Tensor,
    valid_T: Tensor | None,
    positive_R: Tensor,
    weight_R: Tensor,
    count_R: Tensor,
) -> Tensor:
    """d log p [T], fp32."""
    T = len(rationale_T)
    dlogprob_T = weight_R.new_empty(T)
    if T:
        backward_kernel[(triton.cdiv(T, 1024),)](
            dloss_pos.contiguous(), dloss_neg.contiguous(), rationale_T.contiguous(),
            None if valid_T is None else valid_T.contiguous().view(torch.int8),
            positive_R.contiguous().view(torch.int8), weight_R, count_R, dlogprob_T, T,
            HAS_VALID=valid_T is not None, BLOCK=1024, **LAUNCH,
        )  # fmt: skip
    return dlogprob_T
