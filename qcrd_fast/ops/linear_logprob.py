"""hidden states x head -> log p of each target as a torch operator: choice of implementation, autograd. No logits are held.

Shape suffixes as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops import chunked, reference
from qcrd_fast.ops.checks import check_head, require
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.reference import HeadOptions


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
    twin: Any = chunked.chunked_forward
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
    twin: Any = chunked.chunked_backward
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
