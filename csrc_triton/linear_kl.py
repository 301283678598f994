"""Student and teacher, hidden states x head each -> a divergence of each token and the gradients of the student's side,
without logits in memory.

T tokens, H the student's hidden size, G the teacher's, V vocabulary, S rows with a gradient, C columns of a chunk of
the vocabulary; P parts into which the vocabulary is split so that few rows still fill the GPU. u, z, slope and
`options`: see `product`. p is the student's distribution, q the teacher's; a tile holds the logits of both.

beta 0: KL(q || p). beta 1: KL(p || q). Between them beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q,
whose forward pass reads both heads twice, since m needs both log-sum-exps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import linear_logprob, product
from csrc_triton.product import (
    LAUNCH,
    LOG2_E,
    LOWEST,
    Tile,
    add_matmul,
    choose_chunk,
    flags_of,
    layout,
    matmul,
    operand_args,
    operands,
    plain_tile,
    product_tile,
    scalar_args,
    shape_of,
    slots_of,
)

FORWARD, REVERSE, MIXTURE = 0, 1, 2  # KIND of a gradient


@triton.jit(do_not_specialize=["T"])
def kl_kernel(
    a_hidden_ptr, a_weight_ptr, a_bias_ptr, b_hidden_ptr, b_weight_ptr, b_bias_ptr, target_ptr, out_ptr,
    T, V, A_H, B_H, part_size, a_scale, a_inverse_softcap, a_slope, b_scale, b_inverse_softcap, b_slope,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    A_BIAS: tl.constexpr, A_SCALE: tl.constexpr, A_SOFTCAP: tl.constexpr, A_EVEN_H: tl.constexpr,
    B_BIAS: tl.constexpr, B_SCALE: tl.constexpr, B_SOFTCAP: tl.constexpr, B_EVEN_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows against one part of the vocabulary: what KL(a || b) needs, with online log-sum-exps.

    hidden [T, A_H] and [T, B_H], weight [V, A_H] and [V, B_H], bias [V], target [T] int64, negative where ignored;
    out [5, P, T] fp32: the largest u of a; sum e with e = exp(its z - the largest); the two of b; and
    sum e (x_a - x_b) of a's e, x_a and x_b each row's z less its largest.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    in_t = rows_t < T
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1)
    begin = part * part_size
    stop = tl.minimum(begin + part_size, V)
    stop = tl.where(tl.max((target_t >= 0).to(tl.int32), 0) > 0, stop, begin)  # all ignored: nothing to do

    a_slope_2, b_slope_2 = a_slope * LOG2_E, b_slope * LOG2_E
    a_max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    b_max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    a_sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    ratio_t = tl.zeros((BLOCK_T,), dtype=tl.float32)  # in bits
    for first in tl.range(begin, stop, BLOCK_V):
        a_tv = product_tile(
            a_hidden_ptr, a_weight_ptr, a_bias_ptr, tl.program_id(0) * BLOCK_T, first, T, V, A_H, a_scale,
            a_inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, A_BIAS, A_SCALE, A_SOFTCAP, A_EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        b_tv = product_tile(
            b_hidden_ptr, b_weight_ptr, b_bias_ptr, tl.program_id(0) * BLOCK_T, first, T, V, B_H, b_scale,
            b_inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, B_BIAS, B_SCALE, B_SOFTCAP, B_EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        a_new_t, b_new_t = tl.maximum(a_max_t, tl.max(a_tv, 1)), tl.maximum(b_max_t, tl.max(b_tv, 1))
        a_moved_t, b_moved_t = (a_max_t - a_new_t) * a_slope_2, (b_max_t - b_new_t) * b_slope_2
        a_decay_t = tl.exp2(a_moved_t)
        a_tv = a_tv * a_slope_2 - (a_new_t * a_slope_2)[:, None]
        b_tv = b_tv * b_slope_2 - (b_new_t * b_slope_2)[:, None]
        exp_tv = tl.exp2(a_tv)
        moved_t = tl.where(a_sum_t > 0, (a_moved_t - b_moved_t) * a_sum_t, 0.0)
        ratio_tv = tl.where(exp_tv > 0, exp_tv * (a_tv - b_tv), 0.0)  # where both are masked, no NaN
        ratio_t = a_decay_t * (ratio_t + moved_t) + tl.sum(ratio_tv, 1)
        a_sum_t = a_sum_t * a_decay_t + tl.sum(exp_tv, 1)
        b_sum_t = b_sum_t * tl.exp2(b_moved_t) + tl.sum(tl.exp2(b_tv), 1)
        a_max_t, b_max_t = a_new_t, b_new_t

    out_t = out_ptr + part * T + rows_t  # there are parts only while T is small
    pitch = tl.num_programs(1) * T
    tl.store(out_t, a_max_t, mask=in_t)
    tl.store(out_t + pitch, a_sum_t, mask=in_t)
    tl.store(out_t + 2 * pitch, b_max_t, mask=in_t)
    tl.store(out_t + 3 * pitch, b_sum_t, mask=in_t)
    tl.store(out_t + 4 * pitch, ratio_t / LOG2_E, mask=in_t)


@triton.jit(do_not_specialize=["T", "P"])
def kl_combine_kernel(target_ptr, part_ptr, out_ptr, T, P, a_slope, b_slope, BLOCK_T: tl.constexpr):
    """One program: BLOCK_T rows: all parts of `kl_kernel` [5, P, T] -> KL, log-sum-exp of a and of b, out [3, T] in
    nats."""
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = rows_t < T
    valid_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1) >= 0
    a_max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    b_max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    a_sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    ratio_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for part in range(0, P):
        at_t = part_ptr + part * T + rows_t
        a_part_t = tl.load(at_t, mask=in_t, other=0.0)
        a_part_sum_t = tl.load(at_t + P * T, mask=in_t, other=1.0)
        b_part_t = tl.load(at_t + 2 * P * T, mask=in_t, other=0.0)
        b_part_sum_t = tl.load(at_t + 3 * P * T, mask=in_t, other=1.0)
        part_ratio_t = tl.load(at_t + 4 * P * T, mask=in_t, other=0.0)
        a_new_t, b_new_t = tl.maximum(a_max_t, a_part_t), tl.maximum(b_max_t, b_part_t)
        a_moved_t, b_moved_t = (a_max_t - a_new_t) * a_slope, (b_max_t - b_new_t) * b_slope
        a_part_moved_t, b_part_moved_t = (a_part_t - a_new_t) * a_slope, (b_part_t - b_new_t) * b_slope
        a_decay_t, a_part_decay_t = tl.exp(a_moved_t), tl.exp(a_part_moved_t)
        moved_t = tl.where(a_sum_t > 0, (a_moved_t - b_moved_t) * a_sum_t, 0.0)
        part_moved_t = tl.where(a_part_sum_t > 0, (a_part_moved_t - b_part_moved_t) * a_part_sum_t, 0.0)
        ratio_t = a_decay_t * (ratio_t + moved_t) + a_part_decay_t * (part_ratio_t + part_moved_t)
        a_sum_t = a_sum_t * a_decay_t + a_part_sum_t * a_part_decay_t
        b_sum_t = b_sum_t * tl.exp(b_moved_t) + b_part_sum_t * tl.exp(b_part_moved_t)
        a_max_t, b_max_t = a_new_t, b_new_t
    a_log_t, b_log_t = tl.log(a_sum_t), tl.log(b_sum_t)
    kl_t = ratio_t / a_sum_t + (b_log_t - a_log_t)
    kl_t = tl.where(kl_t < 0, 0.0, kl_t)  # rounding can leave it a little below 0; a NaN passes
    tl.store(out_ptr + rows_t, tl.where(valid_t, kl_t, 0.0), mask=in_t)
    tl.store(out_ptr + T + rows_t, tl.where(valid_t, a_max_t * a_slope + a_log_t, 0.0), mask=in_t)
    tl.store(out_ptr + 2 * T + rows_t, tl.where(valid_t, b_max_t * b_slope + b_log_t, 0.0), mask=in_t)


@triton.jit
def log_mixture(log_ratio, beta):
    """log(m / p) of log(q / p), m = (1 - beta) p + beta q: exactly 0 where they are equal."""
    weight = tl.where(log_ratio > 0, 1 - beta, beta)  # of the smaller of the two
    return tl.maximum(log_ratio, 0.0, tl.PropagateNan.ALL) + tl.log(1 + weight * (tl.exp(-tl.abs(log_ratio)) - 1))


@triton.jit
def log_prob(u, slope, lse):
    """log p, at least -200, where p is 0 in fp32 and so is its product with log p."""
    return tl.maximum(u * slope - lse[:, None], -200.0, tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["T"])
def mixture_kernel(
    hidden_ptr, weight_ptr, bias_ptr, teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr,
    target_ptr, lse_ptr, teacher_lse_ptr, out_ptr,
    T, V, H, G, part_size, scale, inverse_softcap, slope, teacher_scale, teacher_inverse_softcap, teacher_slope, beta,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    A_BIAS: tl.constexpr, A_SCALE: tl.constexpr, A_SOFTCAP: tl.constexpr, A_EVEN_H: tl.constexpr,
    B_BIAS: tl.constexpr, B_SCALE: tl.constexpr, B_SOFTCAP: tl.constexpr, B_EVEN_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows against one part of the vocabulary: its share of KL(q || m) and KL(p || m), out [2, P,
    T] fp32.

    lse, teacher_lse [T] fp32; the rest as in `kl_kernel`. A is the student, B the teacher.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    in_t = rows_t < T
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1)
    lse_t = tl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    teacher_lse_t = tl.load(teacher_lse_ptr + rows_t, mask=in_t, other=0.0)
    begin = part * part_size
    stop = tl.minimum(begin + part_size, V)
    stop = tl.where(tl.max((target_t >= 0).to(tl.int32), 0) > 0, stop, begin)
    student_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    teacher_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in tl.range(begin, stop, BLOCK_V):
        p_tv = product_tile(
            hidden_ptr, weight_ptr, bias_ptr, tl.program_id(0) * BLOCK_T, first, T, V, H, scale, inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, A_BIAS, A_SCALE, A_SOFTCAP, A_EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        q_tv = product_tile(
            teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr, tl.program_id(0) * BLOCK_T, first,
            T, V, G, teacher_scale, teacher_inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, B_BIAS, B_SCALE, B_SOFTCAP, B_EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        p_tv, q_tv = log_prob(p_tv, slope, lse_t), log_prob(q_tv, teacher_slope, teacher_lse_t)
        ratio_tv = q_tv - p_tv
        mixture_tv = log_mixture(ratio_tv, beta)
        teacher_t += tl.sum(tl.exp2(q_tv * LOG2_E) * (ratio_tv - mixture_tv), 1)
        student_t -= tl.sum(tl.exp2(p_tv * LOG2_E) * mixture_tv, 1)
    out_t = out_ptr + part * T + rows_t
    tl.store(out_t, teacher_t, mask=in_t)
    tl.store(out_t + tl.num_programs(1) * T, student_t, mask=in_t)


@triton.jit(do_not_specialize=["S"])
def kl_da_kernel(
    hidden_ptr, weight_ptr, bias_ptr, teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr,
    lse_ptr, teacher_lse_ptr, mean_ptr, grad_ptr, da_ptr,
    S, V, H, G, first_col, last_col, pitch,
    scale, inverse_softcap, slope, teacher_scale, teacher_inverse_softcap, teacher_slope, beta,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    A_BIAS: tl.constexpr, A_SCALE: tl.constexpr, A_SOFTCAP: tl.constexpr, A_EVEN_H: tl.constexpr,
    B_BIAS: tl.constexpr, B_SCALE: tl.constexpr, B_SOFTCAP: tl.constexpr, B_EVEN_H: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: d loss / d a of the student, of BLOCK_T rows and BLOCK_V columns of the chunk [first_col, last_col).

    lse, teacher_lse, mean, grad [S] fp32; da [S, pitch] in the student's type. The gradient of a row's logits is grad
    (p - q) of KL(q || p), else grad p (r - mean): r = log(p / q), or log(p / m) of a mixture, and mean = sum p r. grad
    comes divided by the temperature.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols_v = first_col + local_v
    in_t = rows_t < S
    first_v = first_col + tl.program_id(1) * BLOCK_V
    q_tv = product_tile(
        teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr, tl.program_id(0) * BLOCK_T, first_v,
        S, V, G, teacher_scale, teacher_inverse_softcap,
        BLOCK_T, BLOCK_V, BLOCK_H, B_BIAS, B_SCALE, B_SOFTCAP, B_EVEN_H, EVEN_V, DESCRIPTORS,
    )  # fmt: skip
    u_tv = product_tile(
        hidden_ptr, weight_ptr, bias_ptr, tl.program_id(0) * BLOCK_T, first_v, S, V, H, scale, inverse_softcap,
        BLOCK_T, BLOCK_V, BLOCK_H, A_BIAS, A_SCALE, A_SOFTCAP, A_EVEN_H, EVEN_V, DESCRIPTORS,
    )  # fmt: skip
    lse_t = tl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    teacher_lse_t = tl.load(teacher_lse_ptr + rows_t, mask=in_t, other=0.0)
    grad_t = tl.load(grad_ptr + rows_t, mask=in_t, other=0.0)
    if KIND == 0:
        p_tv = tl.exp2(u_tv * (slope * LOG2_E) - (lse_t * LOG2_E)[:, None])
        da_tv = p_tv - tl.exp2(q_tv * (teacher_slope * LOG2_E) - (teacher_lse_t * LOG2_E)[:, None])
        da_tv = da_tv * grad_t[:, None]
    else:
        mean_t = tl.load(mean_ptr + rows_t, mask=in_t, other=0.0)
        if KIND == 1:
            logp_tv = u_tv * slope - lse_t[:, None]
            p_tv = tl.exp2(logp_tv * LOG2_E)
            ratio_tv = tl.where(p_tv > 0, logp_tv - (q_tv * teacher_slope - teacher_lse_t[:, None]), 0.0)
        else:
            logp_tv = log_prob(u_tv, slope, lse_t)
            p_tv = tl.exp2(logp_tv * LOG2_E)
            ratio_tv = -log_mixture(log_prob(q_tv, teacher_slope, teacher_lse_t) - logp_tv, beta)
        da_tv = p_tv * grad_t[:, None] * (ratio_tv - mean_t[:, None])
    if A_SOFTCAP:
        da_tv = da_tv * (1 - u_tv * u_tv)
    out_tv = da_ptr + rows_t.to(tl.int64)[:, None] * pitch + local_v[None, :]
    in_tv = in_t[:, None] if EVEN_V else in_t[:, None] & (cols_v < last_col)[None, :]
    tl.store(out_tv, da_tv.to(da_ptr.dtype.element_ty), mask=in_tv)


class Head(NamedTuple):
    """Hidden states, a head, and its options, as `product` has them."""

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    options: Any


def choose_tile(student: Head, teacher: Head, gradient: bool, mixture: bool) -> Tile:
    """The tile of two products at once: 128 columns where their sums and the epilogue fit in registers, else 64, which
    fit everywhere. On an H100 operands come by the copy engine where it can fetch them, which keeps their addresses for
    itself."""
    if product.forced_tile is not None:
        return product.forced_tile._replace(products=2)
    tile = plain_tile(
        max(student.hidden_TH.dtype, teacher.hidden_TH.dtype, key=lambda x: x.itemsize), len(student.hidden_TH)
    )
    hopper = product.architecture(student.hidden_TH.device) // 10 == 9
    of_both = (student.hidden_TH, student.weight_VH, teacher.hidden_TH, teacher.weight_VH)
    if tile.block_t == 128 and hopper and product.fetchable(*of_both):
        tile = tile._replace(descriptors=True)
    options = any(
        head.bias_V is not None
        or head.options[1] != 0
        or len(head.weight_VH) % 128 != 0
        or head.hidden_TH.shape[1] % 64 != 0
        for head in (student, teacher)
    )
    wide = not mixture and not options and tile.block_v == 128 and (gradient or tile.descriptors)
    return tile._replace(products=2) if wide else tile._replace(block_v=64, products=3)


def ready(head: Head) -> Head:
    return Head(*operands(head.hidden_TH, head.weight_VH, head.bias_V), head.options)


def pair_shape(tile: Tile, a: Head, b: Head) -> dict[str, Any]:
    """The constants of a launch over two heads."""
    V, device = len(a.weight_VH), a.hidden_TH.device
    shape = shape_of(tile, V, a.hidden_TH.shape[1], device)
    even_h = {"A_EVEN_H": shape.pop("EVEN_H"), "B_EVEN_H": shape_of(tile, V, b.hidden_TH.shape[1], device)["EVEN_H"]}
    flags = {
        name.replace("HAS", letter): flag
        for letter, head in (("A", a), ("B", b))
        for name, flag in flags_of(head.bias_V, head.options).items()
    }
    return shape | even_h | flags


def forward(student: Head, teacher: Head, valid_T: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, log-sum-exp of student and of teacher, mean of `kl_da_kernel`), each [T] fp32 in nats, 0 where
    ignored."""
    student, teacher = ready(student), ready(teacher)
    T, V = len(student.hidden_TH), len(student.weight_VH)
    if T == 0:
        return tuple(student.hidden_TH.new_empty((4, 0), dtype=torch.float32))  # type: ignore[return-value]
    tile = choose_tile(student, teacher, False, 0 < beta < 1)
    blocks, _, parts, part_size = layout(tile, T, V, student.hidden_TH.device)
    grid, target_T = (blocks, parts), valid_T.long() - 1  # -1 where ignored

    def new(*shape: int) -> Tensor:
        return student.hidden_TH.new_empty(shape, dtype=torch.float32)

    if beta in (0, 1):
        a, b = (student, teacher) if beta else (teacher, student)
        part_5PT, out_3T = new(5, parts, T), new(3, T)
        a_numbers, b_numbers = scalar_args(a.bias_V, a.options), scalar_args(b.bias_V, b.options)
        kl_kernel[grid](
            *operand_args(a.hidden_TH, a.weight_VH, tile), a.bias_V, *operand_args(b.hidden_TH, b.weight_VH, tile),
            b.bias_V,
            target_T, part_5PT,
            T, V, a.hidden_TH.shape[1], b.hidden_TH.shape[1], part_size, *a_numbers, *b_numbers,
            **pair_shape(tile, a, b),
        )  # fmt: skip
        kl_combine_kernel[(triton.cdiv(T, 128),)](
            target_T, part_5PT, out_3T, T, parts, a_numbers[2], b_numbers[2], BLOCK_T=128, **LAUNCH
        )
        kl_T, a_lse_T, b_lse_T = out_3T
        return (kl_T, a_lse_T, b_lse_T, kl_T) if beta else (kl_T, b_lse_T, a_lse_T, kl_T)
    lse_T, teacher_lse_T = (
        linear_logprob.forward(head.hidden_TH, head.weight_VH, target_T, head.bias_V, head.options, -1, False)[1]
        for head in (student, teacher)
    )
    part_2PT = new(2, parts, T)
    mixture_kernel[grid](
        *operand_args(student.hidden_TH, student.weight_VH, tile), student.bias_V,
        *operand_args(teacher.hidden_TH, teacher.weight_VH, tile), teacher.bias_V, target_T, lse_T, teacher_lse_T,
        part_2PT,
        T, V, student.hidden_TH.shape[1], teacher.hidden_TH.shape[1], part_size,
        *scalar_args(student.bias_V, student.options), *scalar_args(teacher.bias_V, teacher.options), beta,
        **pair_shape(tile, student, teacher),
    )  # fmt: skip
    teacher_T, student_T = part_2PT.sum(1).where(target_T >= 0, 0)
    return (beta * teacher_T + (1 - beta) * student_T).clamp_(min=0), lse_T, teacher_lse_T, student_T


def backward(
    student: Head,
    teacher: Head,
    beta: float,
    lse_S: Tensor,
    teacher_lse_S: Tensor,
    mean_S: Tensor,
    dkl_S: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dHidden [S, H] fp32, dWeight [V, H] in the weight's type, dBias [V]) of the student, None where `needs` says no,
    from d loss / d divergence [S]. A chunk of the vocabulary at a time, as `linear_logprob.backward`."""
    need_hidden, need_weight, need_bias = needs
    dweight_VH = torch.empty_like(student.weight_VH, memory_format=torch.contiguous_format) if need_weight else None
    dbias_V = torch.empty_like(student.bias_V) if need_bias and student.bias_V is not None else None
    student, teacher = ready(student), ready(teacher)
    (S, H), V, (scale, _, temperature) = student.hidden_TH.shape, len(student.weight_VH), student.options
    dhidden_SH = student.hidden_TH.new_zeros((S, H), dtype=torch.float32) if need_hidden else None
    kind = FORWARD if beta == 0 else REVERSE if beta == 1 else MIXTURE
    grad_S = dkl_S * ((1 - beta if kind == MIXTURE else 1) / temperature)
    tile = choose_tile(student, teacher, True, kind == MIXTURE)
    most = max(linear_logprob.most_columns(S, H, student.hidden_TH.element_size()) // tile.block_v, 1)
    C = choose_chunk(tile, S, V, H, most, slots_of(tile, student.hidden_TH.device, heavy=True)) * tile.block_v
    da_SC = student.hidden_TH.new_empty((S, C))
    for first in range(0, V, C):
        last = min(first + C, V)
        if S:
            kl_da_kernel[(triton.cdiv(S, tile.block_t), triton.cdiv(last - first, tile.block_v))](
                *operand_args(student.hidden_TH, student.weight_VH, tile), student.bias_V,
                *operand_args(teacher.hidden_TH, teacher.weight_VH, tile), teacher.bias_V,
                lse_S, teacher_lse_S, mean_S, grad_S, da_SC,
                S, V, H, teacher.hidden_TH.shape[1], first, last, C,
                *scalar_args(student.bias_V, student.options), *scalar_args(teacher.bias_V, teacher.options), beta,
                **pair_shape(tile, student, teacher), KIND=kind,
            )  # fmt: skip
        chunk_SC = da_SC[:, : last - first]
        if dbias_V is not None:
            dbias_V[first:last] = chunk_SC.sum(0, dtype=torch.float32)
        if dhidden_SH is not None:
            add_matmul(dhidden_SH, chunk_SC, student.weight_VH[first:last], scale)
        if dweight_VH is not None:
            torch.mul(matmul(chunk_SC.T, student.hidden_TH), scale, out=dweight_VH[first:last])
    return dhidden_SH, dweight_VH, dbias_V
