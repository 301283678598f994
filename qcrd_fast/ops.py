"""The two ops of the loss as torch operators: checks, choice of implementation, autograd.

`linear_logprob`: hidden states x head -> log p of each target, never holding the logits. `contrastive`: log p of each token ->
mean per rationale, selection per question, weights, hinge, the two terms of Eq. 3. Shape suffixes as in `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast import reference
from qcrd_fast.dispatch import choose_impl, require, require_tensors
from qcrd_fast.linear_sample import linear_sample as linear_sample
from qcrd_fast.reference import Contrast, HeadOptions

# ---- log p of each token ------------------------------------------------------------------------------------------------


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    impl: str = "auto",
    max_rows: int | None = None,
) -> Any:
    """log p(target) in nats [...], fp32 (float64 for float64 operands), never above 0; 0 and no gradient where ignored.

    hidden [..., H]; weight [V, H]; target [...] int64, already shifted; bias [V].
    logits = softcap * tanh(a / softcap) / temperature, a = scale * hidden weight^T + bias.

    With `return_lse` / `return_entropy` a tuple: log p, then log-sum-exp, then entropy, in nats and differentiable too.
    The product is taken in hidden's type (under autocast, autocast's) and accumulated in fp32. The backward pass visits only
    rows whose gradient is not 0; `max_rows`, a bound on their number, saves it one host sync on a GPU.

    Raises `ValueError` naming what was expected and what came, `TypeError` for an argument that is no tensor.
    """
    require(max_rows is None or max_rows >= 0, lambda: f"max_rows must be at least 0 or None, got {max_rows}")
    hidden_TH, target_T, options = check_head(hidden, weight, target, bias, scale, softcap, temperature, ignore_index)
    chosen = choose_impl(impl, hidden.device, hidden_TH.dtype)[0]
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "eager":
            out = reference.linear_logprob_eager(hidden_TH, weight, target_T, bias, options, ignore_index)
        else:
            head = (hidden_TH, weight, target_T, bias, *options)
            out = _linear_logprob(*head, ignore_index, return_entropy, chosen == "triton", max_rows)
    logprob, lse, entropy = (x.reshape(target.shape) if x.numel() == target.numel() else x for x in out)
    extras = (lse,) * return_lse + (entropy,) * return_entropy
    return (logprob, *extras) if extras else logprob


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, HeadOptions]:
    """(hidden [T, H] in the type it is multiplied in, target [T] int64, options). `ValueError` for what does not fit."""
    require_tensors(hidden=hidden, weight=weight, target=target, **({} if bias is None else {"bias": bias}))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            require_whole(name, x)
    H, V = hidden.shape[-1], weight.shape[0]
    require(hidden.is_floating_point(), lambda: f"hidden must be floating point, got {hidden.dtype}")
    require(weight.is_floating_point(), lambda: f"weight must be floating point, got {weight.dtype}")
    require(
        weight.dim() == 2 and weight.shape[1] == H,
        lambda: f"weight must be [V, {H}] to match hidden {list(hidden.shape)}, got {list(weight.shape)}",
    )
    require(
        target.shape == hidden.shape[:-1],
        lambda: f"target must be {list(hidden.shape[:-1])} to match hidden, got {list(target.shape)}",
    )
    require(target.dtype in (torch.int64, torch.int32), lambda: f"target must be int64 or int32, got {target.dtype}")
    require(
        bias is None or bias.shape == (V,),
        lambda: f"bias must be [{V}] to match weight, got {list(bias.shape) if bias is not None else None}",
    )
    require(
        all(x is None or x.device == hidden.device for x in (weight, target, bias)),
        lambda: f"weight, target and bias must be on {hidden.device} with hidden",
    )
    require(math.isfinite(scale), lambda: f"scale must be finite, got {scale}")
    require(0 < temperature < math.inf, lambda: f"temperature must be above 0 and finite, got {temperature}")
    require(softcap is None or 0 < softcap < math.inf, lambda: f"softcap must be above 0 and finite, or None, got {softcap}")
    hidden_TH, target_T = hidden.reshape(-1, H), target.reshape(-1).long()
    require(
        ((target_T == ignore_index) | ((target_T >= 0) & (target_T < V))).all(),
        lambda: (
            f"target must lie in [0, {V}) or be ignore_index {ignore_index}, got {int(target.min())} to {int(target.max())}"
        ),
    )
    return hidden_TH.to(product_type(hidden)), target_T, HeadOptions(float(scale), float(softcap or 0), float(temperature))


def product_type(hidden: Tensor) -> torch.dtype:
    """The type in which hidden states are multiplied with the head: their own, or autocast's."""
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype


def require_whole(name: str, x: Tensor) -> None:
    """`ValueError` for a shard (FSDP2's DTensor), and for the empty tensor that FSDP and ZeRO-3 leave outside of a forward."""
    if hasattr(x, "full_tensor") or x.numel() == 0:
        kind = (
            "a DTensor, one rank's shard" if hasattr(x, "full_tensor") else "empty, as FSDP and ZeRO-3 leave it between calls"
        )
        raise ValueError(
            f"{name} is {kind}; it is whole only inside the model's own forward, where qcrd_fast.attach runs the loss"
        )


@torch.library.custom_op("qcrd_fast::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    want_entropy: bool,
    triton: bool,
    max_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log-sum-exp, entropy or [0])."""
    options = HeadOptions(scale, softcap, temperature)
    twin: Any = reference.chunked_forward
    if triton:
        from csrc_triton.linear_logprob import forward as twin  # type: ignore[no-redef]
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        return twin(hidden_TH, weight_VH, target_T, bias_V, options, ignore_index, want_entropy)


@_linear_logprob.register_fake
def _(hidden_TH: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, want_entropy, _triton, _max_rows = rest
    out_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=reference.accumulation_dtype(hidden_TH.dtype))
    return out_T, torch.empty_like(out_T), torch.empty_like(out_T) if want_entropy else out_T.new_empty(0)


@torch.library.custom_op("qcrd_fast::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    lse_T: Tensor,
    onehot_T: Tensor,
    prob_T: Tensor,
    probz_T: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    triton: bool,
    max_rows: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dHidden, dWeight, dBias), each [0] where not needed; the three coefficients are those of `chunked_backward`."""
    options = HeadOptions(scale, softcap, temperature)
    twin: Any = reference.chunked_backward
    if triton:
        from csrc_triton.linear_logprob import backward as twin  # type: ignore[no-redef]
    T = len(target_T)
    wanted_T = (onehot_T != 0) | (prob_T != 0)
    if probz_T is not None:
        wanted_T = wanted_T | (probz_T != 0)
    rows_S, real_S = compact(wanted_T, max_rows)

    def take(x_T: Tensor) -> Tensor:
        return x_T[rows_S] if real_S is None else x_T[rows_S].where(real_S, 0)

    coefficients = (take(onehot_T), take(prob_T), None if probz_T is None else take(probz_T))
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        dhidden_SH, dweight_VH, dbias_V = twin(
            hidden_TH[rows_S], weight_VH, target_T[rows_S], bias_V, lse_T[rows_S], coefficients, options, tuple(needs)
        )
    dhidden_TH, empty = None, hidden_TH.new_empty(0)
    if dhidden_SH is not None:
        # One row more than there are tokens takes what the padding of `rows_S` writes.
        dhidden_TH = hidden_TH.new_zeros((T + 1, hidden_TH.shape[1]))
        slots_S = rows_S if real_S is None else rows_S.where(real_S, T)
        dhidden_TH[slots_S] = dhidden_SH.to(hidden_TH.dtype)
        dhidden_TH = dhidden_TH[:T]
    grads = (dhidden_TH, dweight_VH, dbias_V)
    return tuple(empty.clone() if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_linear_logprob_backward.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return tuple(empty_gradient(x, need, hidden_TH) for x, need in zip((hidden_TH, weight_VH, bias_V), needs, strict=True))


def empty_gradient(x: Tensor | None, need: bool, other: Tensor) -> Tensor:
    """What an operator returns as the gradient of `x`, without its values; [0] where not needed."""
    return torch.empty_like(x).contiguous() if need and x is not None else other.new_empty(0)


def compact(wanted_T: Tensor, max_rows: int | None) -> tuple[Tensor, Tensor | None]:
    """(indices of the true entries, which of them are real). With `max_rows`: exactly that many, padded, and no host sync."""
    if max_rows is None:
        return wanted_T.nonzero()[:, 0], None
    T = len(wanted_T)
    S = min(max_rows, T)
    count = wanted_T.sum()
    require(count <= S, lambda: f"max_selected_tokens is {max_rows}, but {int(count)} tokens have a gradient")
    slot_T = torch.where(wanted_T, wanted_T.cumsum(0) - 1, S).clamp(max=S)
    index_T = torch.arange(T, device=wanted_T.device)
    rows_S = torch.zeros(S + 1, dtype=torch.int64, device=wanted_T.device).scatter(0, slot_T, index_T)[:S]
    return rows_S, torch.arange(S, device=wanted_T.device) < count


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_TH, weight_VH, target_T, bias_V, scale, softcap, temperature, ignore_index, _, triton, max_rows = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TH, weight_VH, target_T, bias_V, output[1], output[2])
    ctx.settings = (scale, softcap, temperature, triton, max_rows)
    ctx.ignore_index = ignore_index


def _linear_backward(ctx: Any, dlogprob_T: Tensor | None, dlse_T: Tensor | None, dentropy_T: Tensor | None) -> tuple[Any, ...]:
    hidden_TH, weight_VH, target_T, bias_V, lse_T, entropy_T = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    # With z a row's logits and H its entropy: d log p_t / dz_j = [j = t] - p_j; d lse / dz_j = p_j;
    # d H / dz_j = -p_j (z_j - lse + H).
    zero_T = torch.zeros_like(lse_T)
    onehot_T = zero_T if dlogprob_T is None else dlogprob_T
    prob_T = -onehot_T if dlse_T is None else dlse_T - onehot_T
    probz_T = None
    if dentropy_T is not None and len(entropy_T) == len(lse_T):
        prob_T = prob_T + dentropy_T * (lse_T - entropy_T)
        probz_T = -dentropy_T
    valid_T = target_T != ctx.ignore_index
    onehot_T, prob_T = onehot_T.where(valid_T, 0), prob_T.where(valid_T, 0)
    probz_T = None if probz_T is None else probz_T.where(valid_T, 0)
    scale, softcap, temperature, triton, max_rows = ctx.settings
    head = (hidden_TH, weight_VH, target_T, bias_V, lse_T)
    grads = _linear_logprob_backward(*head, onehot_T, prob_T, probz_T, scale, softcap, temperature, triton, max_rows, needs)
    dhidden, dweight, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 7


_linear_logprob.register_autograd(_linear_backward, setup_context=_save_linear)


# ---- many-to-one contrastive loss ---------------------------------------------------------------------------------------


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
    """The two terms of Eq. 3 and what was selected, from fp32 or float64 log p. Arguments are already checked."""
    chosen = choose_impl(impl, logprob_T.device, logprob_T.dtype)[0]
    segments = (logprob_T, rationale_T, valid_T, question_R, positive_R, quality_R)
    if chosen == "eager":
        return reference.contrastive_eager(*segments, key_R, selects, delta, num_questions, seed, iteration)
    score_R = None
    if "sampling" in selects:
        score_R = reference.sampling_scores(seed, key_R, iteration, question_R, positive_R)
    return Contrast(*_contrastive(*segments, score_R, *selects, delta, num_questions, chosen == "triton"))


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
    twin: Any = reference.contrastive_torch
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
    dloss_pos: Tensor, dloss_neg: Tensor, rationale_T: Tensor, valid_T: Any, positive_R: Any, weight_R: Tensor, *rest: Any
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
