"""The contrastive loss as a torch operator: mean per rationale, selection, weights, hinge, the terms of Eq. 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops import chunked, reference, selection
from qcrd_fast.ops.checks import require_no_tangent
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.reference import Contrast


def contrastive(
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
    impl: str,
) -> Contrast:
    """Return the two terms of Eq. 3 and what was selected, from fp32 or float64 log p. Arguments are checked
    already."""
    chosen = choose_impl(impl, logprob_T.device, logprob_T.dtype)[0]
    segments = (logprob_T, rationale_T, valid_T, question_R, positive_R, quality_R)
    if chosen == "eager":
        return reference.contrastive_eager(*segments, key_R, selects, delta, num_questions, seed, iteration)
    require_no_tangent(logprob_T)
    score_R = None
    if any(selection.SELECTIONS[select].random for select in selects):
        score_R = selection.sampling_scores(seed, key_R, iteration, question_R, positive_R)
    triton = chosen == "triton" and all(selection.SELECTIONS[select].kernel for select in selects)
    return Contrast(*_contrastive(*segments, score_R, *selects, delta, num_questions, triton))


@torch.library.custom_op("qcrd_fast::contrastive", mutates_args=())
def _contrastive(
    logprob_T: Tensor,
    rationale_T: Tensor,
    valid_T: Tensor | None,
    question_R: Tensor,
    positive_R: Tensor,
    quality_R: Tensor | None,
    score_R: Tensor | None,
    positive_select: str,
    negative_select: str,
    delta: float,
    num_questions: Tensor,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Contrast`."""
    twin: Any = chunked.contrastive_torch
    if triton:
        from csrc_triton.contrastive import forward as twin  # type: ignore[no-redef]
    segments = (logprob_T, rationale_T, valid_T, question_R, positive_R, quality_R, score_R)
    with torch.cuda.device_of(logprob_T):
        return tuple(twin(*segments, (positive_select, negative_select), delta, num_questions))  # type: ignore[return-value]


@_contrastive.register_fake
def _(
    logprob_T: Tensor, rationale_T: Tensor, valid_T: Tensor | None, question_R: Tensor, positive_R: Tensor, *rest: Any
) -> Any:
    nll_R, term = logprob_T.new_empty(question_R.shape), logprob_T.new_empty(())
    count_R = torch.empty_like(question_R)
    return term, torch.empty_like(term), nll_R, torch.empty_like(nll_R), torch.empty_like(positive_R), count_R


@torch.library.custom_op("qcrd_fast::contrastive_backward", mutates_args=())
def _contrastive_backward(
    dloss_pos: Tensor,
    dloss_neg: Tensor,
    rationale_T: Tensor,
    valid_T: Tensor | None,
    positive_R: Tensor,
    weight_R: Tensor,
    count_R: Tensor,
    triton: bool,
) -> Tensor:
    """d log p [T]: each token of a rationale takes -weight / count of its term's gradient."""
    if triton:
        from csrc_triton.contrastive import backward

        with torch.cuda.device_of(weight_R):
            return backward(dloss_pos, dloss_neg, rationale_T, valid_T, positive_R, weight_R, count_R)
    dmean_R = -weight_R * torch.where(positive_R, dloss_pos, dloss_neg) / count_R.clamp(min=1)
    dlogprob_T = dmean_R[rationale_T]
    return dlogprob_T if valid_T is None else dlogprob_T.where(valid_T, 0)


@_contrastive_backward.register_fake
def _(
    dloss_pos: Tensor,
    dloss_neg: Tensor,
    rationale_T: Tensor,
    valid_T: Any,
    positive_R: Any,
    weight_R: Tensor,
    *rest: Any,
) -> Tensor:
    return weight_R.new_empty(rationale_T.shape)


def _save_contrastive(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rationale_T, valid_T, _, positive_R, *_, triton = inputs
    weight_R, count_R = output[3], output[5]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(rationale_T, valid_T, positive_R, weight_R, count_R)
    ctx.triton = triton


def _contrastive_gradient(ctx: Any, dloss_pos: Tensor, dloss_neg: Tensor, *_: Any) -> tuple[Any, ...]:
    dlogprob_T = _contrastive_backward(dloss_pos, dloss_neg, *ctx.saved_tensors, ctx.triton)
    return dlogprob_T, *[None] * 11


_contrastive.register_autograd(_contrastive_gradient, setup_context=_save_contrastive)
