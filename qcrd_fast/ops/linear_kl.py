"""Hidden states x head of a student and of a teacher -> how far apart their distributions are, as a torch operator:
choice of implementation, autograd. No logits are held.

Shape suffixes: T tokens, S rows with a gradient, H the student's hidden size, G the teacher's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops import chunked, chunked_kl, reference
from qcrd_fast.ops.checks import check_head, require, require_constants, require_no_tangent, require_tensors
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.linear_logprob import compact, empty_gradient, scatter_rows
from qcrd_fast.ops.reference import Head, HeadOptions


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    beta: float = 0.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    teacher_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    max_rows: int | None = None,
    workspace_bytes: int = 0,
) -> Tensor:
    """Divergence of the student from the teacher over the whole vocabulary, a token each [...], in nats; never below 0.

    hidden [..., H], weight [V, H], bias [V]: the student's; teacher_hidden [..., G], teacher_weight [V, G],
    teacher_bias [V]: the teacher's, of the same tokens and the same vocabulary. With p the student's distribution and q
    the teacher's:

        beta = 0      KL(q || p) = sum of q log(q / p): forward, covers all that the teacher does
        beta = 1      KL(p || q): reverse, keeps to where the teacher is likely
        0 < beta < 1  beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q: generalised Jensen-Shannon,
        GKD
                      (arXiv 2306.13649) as TRL has it; it goes to 0 at both ends, so that 0 and 1 are no limits of it

    Logits are those of `linear_logprob`, softcap * tanh(a / softcap) / temperature with a = scale * hidden weight^T +
    bias, for each with its own scale and softcap; `temperature` is of both, and the result is not multiplied by its
    square.

    target [...] int64: only whether it is `ignore_index` counts, where the result is 0 without gradient; None: none is
    ignored. Gradients go to hidden, weight and bias; the teacher is a constant, even where its tensors require grad.

    Results are fp32 (float64 for float64 hidden states). A product is taken in the type of its hidden states (under
    autocast, autocast's) and accumulated in fp32. No logits are held beyond a chunk: one pass reads both heads, two
    where 0 < beta < 1, and the backward pass reads them once more, for rows alone whose gradient is not 0; `max_rows`,
    a bound on their number, saves it one host sync on a GPU. `workspace_bytes`: how many bytes of logits `torch` may
    keep for the later passes (8 T V for all in fp32), which then are not computed again; the kernels always compute
    them.

    Where two tokenizers of a family pad their heads to different lengths, pass the rows that both have: `weight[:n]`.

    Raises `ValueError` naming what was expected and what came, also under forward-mode AD and for a scale, softcap,
    temperature or beta that requires grad; `TypeError` for an argument that is no tensor.
    """
    require_constants(beta=beta)
    require(0 <= beta <= 1, lambda: f"beta must be 0 (forward KL) to 1 (reverse KL), got {beta}")
    require(max_rows is None or max_rows >= 0, lambda: f"max_rows must be at least 0 or None, got {max_rows}")
    require(workspace_bytes >= 0, lambda: f"workspace_bytes must be at least 0, got {workspace_bytes}")
    require_tensors(hidden=hidden, teacher_hidden=teacher_hidden)
    require(
        not isinstance(temperature, Tensor) or temperature.dim() == 0,
        lambda: "temperature must be a number: one for each token is not supported here",
    )
    require(
        teacher_hidden.shape[:-1] == hidden.shape[:-1] and teacher_hidden.device == hidden.device,
        lambda: (
            f"teacher_hidden must be [{', '.join(map(str, (*hidden.shape[:-1], 'G')))}] on {hidden.device}, of the "
            f"tokens of hidden, got {list(teacher_hidden.shape)} on {teacher_hidden.device}"
        ),
    )
    if target is None:
        target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    rest = (temperature, ignore_index)
    hidden_TH, target_T, options = check_head(hidden, weight, target, bias, scale, softcap, *rest)
    require(
        teacher_weight.dim() == 2 and len(teacher_weight) == len(weight),
        lambda: (
            f"teacher_weight must be [{len(weight)}, G], one row a token of weight, got {list(teacher_weight.shape)}; "
            "pass the rows that both vocabularies have"
        ),
    )
    theirs = (teacher_hidden, teacher_weight, target, teacher_bias, teacher_scale, teacher_softcap)
    teacher_TG, _, teacher_options = check_head(*theirs, *rest, of="teacher_")
    valid_T = target_T != ignore_index
    double = torch.float64 in (hidden_TH.dtype, teacher_TG.dtype)
    chosen = choose_impl(impl, hidden.device, torch.float64 if double else hidden_TH.dtype)[0]
    teacher_args = (
        teacher_TG.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "eager":
            student, teacher = Head(hidden_TH, weight, bias, options), Head(*teacher_args, teacher_options)
            kl_T = reference.linear_kl_eager(student, teacher, valid_T, float(beta))
        else:
            require_no_tangent(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
            triton = chosen == "triton"
            differentiated = torch.is_grad_enabled() and any(
                x is not None and x.requires_grad for x in (hidden, weight, bias)
            )
            numbers = (float(beta), *options, *teacher_options[:2])
            kept_bytes = workspace_bytes if (differentiated or 0 < beta < 1) and not triton else 0
            kl_T = _linear_kl(hidden_TH, weight, bias, *teacher_args, valid_T, *numbers, triton, max_rows, kept_bytes)[
                0
            ]
    return kl_T.reshape(target.shape)


def _heads(tensors: Sequence[Any], numbers: Sequence[float]) -> tuple[Head, Head, float]:
    """(student, teacher, beta) of an operator's arguments."""
    beta, scale, softcap, temperature, teacher_scale, teacher_softcap = numbers
    hidden_TH, weight_VH, bias_V, teacher_TG, teacher_weight_VG, teacher_bias_V = tensors
    student = Head(hidden_TH, weight_VH, bias_V, HeadOptions(scale, softcap, temperature))
    options = HeadOptions(teacher_scale, teacher_softcap, temperature)
    return student, Head(teacher_TG, teacher_weight_VG, teacher_bias_V, options), beta


@torch.library.custom_op("qcrd_fast::linear_kl", mutates_args=())
def _linear_kl(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    teacher_TG: Tensor,
    teacher_weight_VG: Tensor,
    teacher_bias_V: Tensor | None,
    valid_T: Tensor,
    beta: float,
    scale: float,
    softcap: float,
    temperature: float,
    teacher_scale: float,
    teacher_softcap: float,
    triton: bool,
    max_rows: int | None,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(divergence, log-sum-exp of student and of teacher, mean, logits kept of both), as `chunked_kl` gives them."""
    tensors = (hidden_TH, weight_VH, bias_V, teacher_TG, teacher_weight_VG, teacher_bias_V)
    student, teacher, beta = _heads(tensors, (beta, scale, softcap, temperature, teacher_scale, teacher_softcap))
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        if triton:
            from csrc_triton import linear_kl as kernels

            of_rows: Any = kernels.forward(kernels.Head(*student), kernels.Head(*teacher), valid_T, beta)
            kept: Any = [hidden_TH.new_empty(0, dtype=torch.float32) for _ in range(2)]
        else:
            *of_rows, kept, teacher_kept = chunked_kl.chunked_kl(student, teacher, valid_T, beta, kept_bytes)
            kept = (kept, teacher_kept)
    return *(x_T.clone() for x_T in of_rows), *kept  # type: ignore[return-value]  # outputs may share no memory


@_linear_kl.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, T = reference.accumulation_dtype(hidden_TH.dtype), hidden_TH.shape[0]
    columns = chunked.kept_columns(len(weight_VH), T, dtype, rest[-1] // 2) if rest[-1] else 0
    return tuple(hidden_TH.new_empty(n, dtype=dtype) for n in (T, T, T, T, T * columns, T * columns))


@torch.library.custom_op("qcrd_fast::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    teacher_TG: Tensor,
    teacher_weight_VG: Tensor,
    teacher_bias_V: Tensor | None,
    lse_T: Tensor,
    teacher_lse_T: Tensor,
    mean_T: Tensor,
    dkl_T: Tensor,
    kept: Tensor,
    teacher_kept: Tensor,
    beta: float,
    scale: float,
    softcap: float,
    temperature: float,
    teacher_scale: float,
    teacher_softcap: float,
    triton: bool,
    max_rows: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dHidden, dWeight, dBias) of the student, each [0] where not needed."""
    T = len(hidden_TH)
    rows_S, real_S = compact(dkl_T != 0, max_rows)
    dkl_S = dkl_T[rows_S] if real_S is None else dkl_T[rows_S].where(real_S, 0)
    tensors = (hidden_TH[rows_S], weight_VH, bias_V, teacher_TG[rows_S], teacher_weight_VG, teacher_bias_V)
    student, teacher, beta = _heads(tensors, (beta, scale, softcap, temperature, teacher_scale, teacher_softcap))
    twin: Any = chunked_kl.chunked_kl_backward
    arguments = (student, teacher, beta, lse_T[rows_S], teacher_lse_T[rows_S], mean_T[rows_S], dkl_S, tuple(needs))
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        if triton:
            from csrc_triton.linear_kl import backward as twin
        of_kept = ((kept, teacher_kept, T, rows_S),) if len(kept) else ()
        dhidden_SH, dweight_VH, dbias_V = twin(*arguments, *of_kept)
    dhidden_TH = None if dhidden_SH is None else scatter_rows(dhidden_SH.to(hidden_TH.dtype), rows_S, real_S, T)
    grads, empty = (dhidden_TH, dweight_VH, dbias_V), hidden_TH.new_empty(0)
    return tuple(empty.clone() if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_linear_kl_backward.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        empty_gradient(x, need, hidden_TH) for x, need in zip((hidden_TH, weight_VH, bias_V), rest[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.numbers, ctx.settings = inputs[7:13], inputs[13:15]


def _backward(ctx: Any, dkl_T: Tensor | None, *_: None) -> tuple[Any, ...]:
    *tensors, valid_T, lse_T, teacher_lse_T, mean_T, kept, teacher_kept = ctx.saved_tensors
    if dkl_T is None:
        return (None,) * 16
    needs = [ctx.needs_input_grad[i] for i in range(3)]
    of_rows = (lse_T, teacher_lse_T, mean_T, dkl_T.where(valid_T, 0))
    grads = _linear_kl_backward(*tensors, *of_rows, kept, teacher_kept, *ctx.numbers, *ctx.settings, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 13


_linear_kl.register_autograd(_backward, setup_context=_save)
