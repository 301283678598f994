"""The training pass as one autograd node: weights are known, so gradients are computed in forward.

`linear_rationale_loss` costs 6U (U = T V H) where all logits (the kernels: their exponentials) fit a workspace; those
beyond it (the kernels: all) are computed twice, which is 8U at most, as `linear_logprob` and its backward pass would.
Suffixes: T tokens, H hidden, V vocabulary, R rationales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops import chunked, reference
from qcrd_fast.ops.checks import check_head, require, require_no_tangent, require_tensors
from qcrd_fast.ops.chunked import backward_kept, forward_keeping
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.linear_logprob import empty_gradient, linear_logprob
from qcrd_fast.ops.reference import HeadOptions

KEPT_BYTES = 64 * 2**20  # of exponentials (the torch twin: logits) that a forward pass keeps to make its own gradients


def linear_rationale_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rationale: Tensor,
    positive: Tensor,
    rationale_weight: Tensor,
    *,
    beta: float,
    delta: float | None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    return_logprob: bool = False,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """(loss, nll_R [detached]): loss = sum over positives of w l - beta * sum over negatives of w h(l), l the mean -log
    p of a rationale's tokens in nats, h(u) = min(u - delta, 0), or h(u) = u where `delta` is None. With
    `return_logprob` also log p of each token [T], detached.

    hidden [..., H], weight [V, H], bias [V], target [...], rationale [...]: as in `QCRDLoss`; positive [R] bool;
    rationale_weight [R], without gradient: as `ContrastiveOutput.weight_R` gives it. The numbers are those of
    `weighted_rationale_loss` over `linear_logprob`; what differs is when the gradients are made, so a graph can be
    differentiated once only. `workspace_bytes`: of logits, or their exponentials, kept between the products
    (default: 64 MiB).

    Raises `ValueError` naming what was expected and what came, `TypeError` for an argument that is no tensor.
    """
    hidden_TH, target_T, options = check_head(hidden, weight, target, bias, scale, softcap, temperature, ignore_index)
    require_tensors(rationale=rationale, positive=positive, rationale_weight=rationale_weight)
    rationale_T = rationale.reshape(-1).long()
    require(
        rationale.shape == target.shape,
        lambda: f"rationale must be {list(target.shape)} to match target, got {list(rationale.shape)}",
    )
    require(
        positive.dim() == 1 and positive.shape == rationale_weight.shape,
        lambda: (
            f"positive and rationale_weight must be [R], got {list(positive.shape)} and {list(rationale_weight.shape)}"
        ),
    )
    require(
        ((rationale_T[1:] >= rationale_T[:-1]).all() & (rationale_T >= 0).all() & (rationale_T < len(positive)).all()),
        lambda: f"rationale must be non-decreasing and lie in [0, {len(positive)}), as in [0, 0, 1, 2, 2]",
    )
    chosen = choose_impl(impl, hidden.device, hidden_TH.dtype)[0]
    margin, weight_R = None if delta is None else float(delta), rationale_weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        # fp16: its small gradients need the loss's scale before rounding
        if chosen == "eager" or hidden_TH.dtype == torch.float16 or isinstance(options.temperature, Tensor):
            logprob_T = linear_logprob(
                hidden_TH, weight, target_T, bias=bias, scale=scale, softcap=softcap, impl=impl,
                ignore_index=ignore_index,
                temperature=options.temperature[:, 0] if isinstance(options.temperature,
                Tensor) else options.temperature,
            )  # fmt: skip
            valid_T = target_T != ignore_index
            nll_R, _ = chunked.rationale_mean(logprob_T, rationale_T, valid_T, len(positive))
            loss = loss_terms(nll_R, positive, weight_R.to(nll_R.dtype), beta, margin)[0]
            return (loss, nll_R.detach(), logprob_T.detach())[: 2 + return_logprob]
        require_no_tangent(hidden, weight, bias)
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        head = (hidden_TH, weight, target_T, bias)
        numbers = (float(beta), margin, *options, ignore_index)
        kept_bytes = KEPT_BYTES if workspace_bytes is None else workspace_bytes
        arguments = (rationale_T, positive, weight_R, *numbers, chosen == "triton", kept_bytes, needs)
        return _rationale_loss(*head, *arguments)[: 2 + return_logprob]


def loss_terms(
    nll_R: Tensor, positive_R: Tensor, weight_R: Tensor, beta: float, delta: float | None
) -> tuple[Tensor, Tensor]:
    """Return (loss, d loss / d nll [R]) of rationales with known weights; `delta` None: no margin."""
    signed_R = torch.where(positive_R, weight_R, -beta * weight_R)
    term_R, signed_R = chunked.hinge_terms(nll_R, positive_R, signed_R, delta)
    return term_R.sum(), signed_R


@torch.library.custom_op("qcrd_fast::rationale_loss", mutates_args=())
def _rationale_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    rationale_T: Tensor,
    positive_R: Tensor,
    weight_R: Tensor,
    beta: float,
    delta: float | None,
    scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    triton: bool,
    kept_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, nll_R, log p [T], dHidden in their type, dWeight, dBias), the gradients [0] where not needed."""
    options, valid_T, R = HeadOptions(scale, softcap, temperature), target_T != ignore_index, len(positive_R)
    forward: Any = forward_keeping
    backward: Any = backward_kept
    means: Any = chunked.rationale_mean
    again: tuple[Any, Any] = (chunked.chunked_forward, chunked.chunked_backward)
    if triton:
        from csrc_triton import contrastive, linear_logprob

        forward, backward, means = linear_logprob.forward_keeping, linear_logprob.backward_kept, contrastive.means
        again = (linear_logprob.forward, linear_logprob.backward)
    head = (hidden_TH, weight_VH, target_T, bias_V)
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        found = forward(*head, options, ignore_index, kept_bytes) if any(needs) else None
        logprob_T, lse_T = found[:2] if found else again[0](*head, options, ignore_index, False)[:2]
        nll_R, count_R = means(logprob_T, rationale_T, valid_T, R)
        loss, dnll_R = loss_terms(nll_R, positive_R, weight_R.to(nll_R.dtype), beta, delta)
        dlogprob_T = torch.where(valid_T, (-dnll_R / count_R.clamp(min=1))[rationale_T], 0)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if found:
            grads = backward(found[2], *head, lse_T, dlogprob_T, options, tuple(needs))
        elif any(needs):
            grads = again[1](*head, lse_T, (dlogprob_T, -dlogprob_T, None), options, tuple(needs))
    empty = hidden_TH.new_empty(0)
    dhidden, dweight, dbias = (empty.clone() if grad is None else grad for grad in grads)
    return loss, nll_R, logprob_T, dhidden.to(nll_R.dtype), dweight, dbias


@_rationale_loss.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    positive_R, needs = rest[1], rest[-1]
    nll_R = hidden_TH.new_empty(positive_R.shape, dtype=reference.accumulation_dtype(hidden_TH.dtype))
    grads = [empty_gradient(x, need, hidden_TH) for x, need in zip((hidden_TH, weight_VH, bias_V), needs, strict=True)]
    logprob_T = nll_R.new_empty(len(hidden_TH))
    return nll_R.new_empty(()), nll_R, logprob_T, grads[0].to(nll_R.dtype), *grads[1:]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.needs, ctx.dtype = inputs[-1], inputs[0].dtype


def _scale(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Multiply the gradients from forward by the loss's own gradient, in place: a copy of the head's would be the
    largest tensor.

    A scalar would be rounded to their type first, in which a loss scale of 2^16 may be infinite; [1] is not.
    """
    dhidden, dweight, dbias = None, None, None
    if dloss is not None:
        saved = zip(ctx.saved_tensors, ctx.needs, strict=True)
        dhidden, dweight, dbias = (grad.mul_(dloss.reshape(1)) if need else None for grad, need in saved)
    return None if dhidden is None else dhidden.to(ctx.dtype), dweight, None, dbias, *[None] * 12


_rationale_loss.register_autograd(_scale, setup_context=_save)
