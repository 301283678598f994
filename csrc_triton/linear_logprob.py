"""log p of targets from hidden [T, H] x head [V, H], and its gradients, without T x V logits in memory.

T tokens, H hidden, V vocabulary, S rows with a gradient, C columns of a chunk of the vocabulary; P parts into which the
vocabulary is split so that few rows still fill the GPU. u, z, slope and `options`: see `product`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.product import (
    LAUNCH,
    LOG2_E,
    LOWEST,
    add_matmul,
    choose_chunk,
    choose_parts,
    choose_tile,
    flags_of,
    is_heavy,
    layout,
    matmul,
    operand_args,
    operands,
    product_tile,
    scalar_args,
    scale_bias_cap,
    shape_of,
    slots_of,
)

# of one chunk of the backward pass: d loss / d a, and dWeight in fp32
WORKSPACE_BYTES = 64 * 2**20  # up to H = 1024, where smaller chunks leave multiprocessors idle and the CPU behind
LARGE_H_WORKSPACE_BYTES = 24 * 2**20  # d loss / d a alone: stays in the L2 cache of an A100, H100 or B200


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, max_ptr, sum_ptr, plogp_ptr, kept_ptr, kept_max_ptr,
    T, V, H, part_size, pitch, scale, inverse_softcap, slope, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows against one part of the vocabulary, with an online log-sum-exp.

    hidden [T, H], weight [V, H], bias [V], target [T] int64; out, each [P, T] fp32: the largest u, m; sum e with
    e = exp(slope (u - m)); and sum e (u - m), for the entropy. KEEP: also every e, kept [T, pitch] in the operands'
    type, and the m of each tile, kept_max [tiles, T] fp32.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    in_t = rows_t < T
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=ignore_index)
    begin = part * part_size
    stop = tl.minimum(begin + part_size, V)
    stop = tl.where(tl.max((target_t != ignore_index).to(tl.int32), 0) > 0, stop, begin)  # all ignored: nothing to do

    slope_2 = slope * LOG2_E
    max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    plogp_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for first in tl.range(begin, stop, BLOCK_V, flatten=not KEEP):  # flat: the next tile is fetched meanwhile
        u_tv = product_tile(
            hidden_ptr, weight_ptr, bias_ptr, tl.program_id(0) * BLOCK_T, first, T, V, H, scale, inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        new_max_t = tl.maximum(max_t, tl.max(u_tv, 1))
        decay_t = tl.exp2((max_t - new_max_t) * slope_2)
        exp_tv = tl.exp2(u_tv * slope_2 - (new_max_t * slope_2)[:, None])
        if WANT_ENTROPY:
            moved_t = tl.where(sum_t > 0, (max_t - new_max_t) * sum_t, 0.0)
            below_tv = tl.where(exp_tv > 0, exp_tv * (u_tv - new_max_t[:, None]), 0.0)
            plogp_t = decay_t * (plogp_t + moved_t) + tl.sum(below_tv, 1)
        sum_t = sum_t * decay_t + tl.sum(exp_tv, 1)
        max_t = new_max_t
        if KEEP:
            cols_v = first + tl.arange(0, BLOCK_V)
            kept_tv = kept_ptr + rows_t.to(tl.int64)[:, None] * pitch + cols_v[None, :]
            in_tv = in_t[:, None] if EVEN_V else in_t[:, None] & (cols_v < V)[None, :]
            tl.store(kept_tv, exp_tv.to(kept_ptr.dtype.element_ty), mask=in_tv)
            tl.store(kept_max_ptr + (first // BLOCK_V) * T + rows_t, new_max_t, mask=in_t)

    out_t = part * T + rows_t  # there are parts only while T is small
    tl.store(max_ptr + out_t, max_t, mask=in_t)
    tl.store(sum_ptr + out_t, sum_t, mask=in_t)
    if WANT_ENTROPY:
        tl.store(plogp_ptr + out_t, plogp_t, mask=in_t)


@triton.jit(do_not_specialize=["T", "P"])
def combine_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, max_ptr, sum_ptr, plogp_ptr, logprob_ptr, lse_ptr, entropy_ptr,
    rest_ptr,
    T, H, P, scale, inverse_softcap, slope, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows: all parts of `forward_kernel` [P, T] and the target's own logit, which is one row of
    the head a token and so cheaper here than a comparison for each logit there -> log p, log-sum-exp, entropy [T] in
    nats, and with the entropy what rounding left of the log-sum-exp, rest [T].
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = rows_t < T
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=ignore_index)
    valid_t = target_t != ignore_index
    max_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    sum_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    plogp_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for part in range(0, P):
        at_t = part * T + rows_t
        part_max_t = tl.load(max_ptr + at_t, mask=in_t, other=0.0)
        part_sum_t = tl.load(sum_ptr + at_t, mask=in_t, other=1.0)
        new_max_t = tl.maximum(max_t, part_max_t)
        decay_t, part_decay_t = tl.exp((max_t - new_max_t) * slope), tl.exp((part_max_t - new_max_t) * slope)
        if WANT_ENTROPY:
            moved_t = tl.where(sum_t > 0, (max_t - new_max_t) * sum_t, 0.0)
            part_moved_t = tl.where(part_sum_t > 0, (part_max_t - new_max_t) * part_sum_t, 0.0)
            part_plogp_t = tl.load(plogp_ptr + at_t, mask=in_t, other=0.0)
            plogp_t = decay_t * (plogp_t + moved_t) + part_decay_t * (part_plogp_t + part_moved_t)
        sum_t = sum_t * decay_t + part_sum_t * part_decay_t
        max_t = new_max_t

    acc_t = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        depth_h = start + tl.arange(0, BLOCK_H)
        keep_th = valid_t[:, None] & (depth_h < H)[None, :]
        h_th = tl.load(hidden_ptr + rows_t.to(tl.int64)[:, None] * H + depth_h[None, :], mask=keep_th, other=0.0)
        w_th = tl.load(weight_ptr + target_t[:, None] * H + depth_h[None, :], mask=keep_th, other=0.0)
        acc_t += tl.sum(h_th.to(tl.float32) * w_th.to(tl.float32), 1)
    bias_t = tl.load(bias_ptr + target_t, mask=valid_t, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    picked_t = slope * scale_bias_cap(acc_t, bias_t, scale, inverse_softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)

    log_sum_t = tl.log(sum_t)
    lse_t = max_t * slope + log_sum_t
    logprob_t = picked_t - lse_t
    logprob_t = tl.where(logprob_t > 0, 0.0, logprob_t)  # rounding can leave it a little above 0; a NaN passes
    tl.store(logprob_ptr + rows_t, tl.where(valid_t, logprob_t, 0.0), mask=in_t)
    tl.store(lse_ptr + rows_t, tl.where(valid_t, lse_t, 0.0), mask=in_t)
    if WANT_ENTROPY:
        tl.store(entropy_ptr + rows_t, tl.where(valid_t, log_sum_t - slope * plogp_t / sum_t, 0.0), mask=in_t)
        tl.store(rest_ptr + rows_t, log_sum_t - (lse_t - max_t * slope), mask=in_t)


@triton.jit(do_not_specialize=["S"])
def dlogits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, onehot_ptr, prob_ptr, problog_ptr, da_ptr,
    S, V, H, first_col, last_col, pitch, scale, inverse_softcap, slope,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, DESCRIPTORS: tl.constexpr, HAS_PROBLOG: tl.constexpr,
):  # fmt: skip
    """One program: d loss / d a of BLOCK_T rows and BLOCK_V columns of the chunk [first_col, last_col).

    hidden [S, H], weight [V, H], bias [V], target, lse [S]; da [S, pitch] in the operands' type. The gradient of a
    row's logits is onehot [j = target] + p_j (prob + problog log p_j); onehot, prob and problog [S] come divided by the
    temperature.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols_v = first_col + local_v
    in_t = rows_t < S
    u_tv = product_tile(
        hidden_ptr, weight_ptr, bias_ptr, tl.program_id(0) * BLOCK_T, first_col + tl.program_id(1) * BLOCK_V,
        S, V, H, scale, inverse_softcap,
        BLOCK_T, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_H, EVEN_V, DESCRIPTORS,
    )  # fmt: skip
    lse_t = tl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1).to(tl.int32)
    onehot_t = tl.load(onehot_ptr + rows_t, mask=in_t, other=0.0)
    prob_t = tl.load(prob_ptr + rows_t, mask=in_t, other=0.0)
    if HAS_PROBLOG:
        problog_t = tl.load(problog_ptr + rows_t, mask=in_t, other=0.0)
        logp_tv = tl.maximum(
            u_tv * slope - lse_t[:, None], -200.0, tl.PropagateNan.ALL
        )  # where p is 0, its product with log p is too
        da_tv = tl.exp2(logp_tv * LOG2_E) * (prob_t[:, None] + problog_t[:, None] * logp_tv)
    else:
        da_tv = tl.exp2(u_tv * (slope * LOG2_E) - (lse_t * LOG2_E)[:, None]) * prob_t[:, None]
    da_tv += tl.where(cols_v[None, :] == target_t[:, None], onehot_t[:, None], 0.0)
    if HAS_SOFTCAP:
        da_tv = da_tv * (1 - u_tv * u_tv)
    out_tv = da_ptr + rows_t.to(tl.int64)[:, None] * pitch + local_v[None, :]
    in_tv = in_t[:, None] if EVEN_V else in_t[:, None] & (cols_v < last_col)[None, :]
    tl.store(out_tv, da_tv.to(da_ptr.dtype.element_ty), mask=in_tv)


@triton.jit(do_not_specialize=["T"])
def dlogits_from_saved(
    kept_ptr, kept_max_ptr, target_ptr, lse_ptr, onehot_ptr, prob_ptr, T, V, pitch, slope,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows and a tile. Turns what `forward_kernel` saved into d loss / d a, in place."""
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tile = tl.program_id(1)
    cols_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_t = rows_t < T
    max_t = tl.load(kept_max_ptr + tile * T + rows_t, mask=in_t, other=0.0)
    lse_t = tl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1)
    onehot_t = tl.load(onehot_ptr + rows_t, mask=in_t, other=0.0)
    prob_t = tl.load(prob_ptr + rows_t, mask=in_t, other=0.0)
    factor_t = tl.where(prob_t != 0, tl.exp(max_t * slope - lse_t) * prob_t, 0.0)
    at_tv = kept_ptr + rows_t.to(tl.int64)[:, None] * pitch + cols_v[None, :]
    in_tv = in_t[:, None] & (cols_v < V)[None, :]
    kept_tv = tl.load(at_tv, mask=in_tv, other=0.0).to(tl.float32)
    da_tv = tl.where(factor_t[:, None] != 0, kept_tv * factor_t[:, None], 0.0)
    da_tv += tl.where(cols_v[None, :] == target_t[:, None], onehot_t[:, None], 0.0)
    tl.store(at_tv, da_tv.to(kept_ptr.dtype.element_ty), mask=in_tv)


class Kept(NamedTuple):
    """Tensors that a forward pass keeps for its gradients."""

    exp_TV: Tensor  # exp(slope (u - max)), a row of it every `pitch` columns, in the operands' type
    max_NT: Tensor  # for each of N tiles
    block_v: int


def forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: tuple[float, float, float],
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (log p, log-sum-exp, entropy or [0]) per token [T], fp32 nats; 0 for ignored targets.

    The last value is the rounding error of the log-sum-exp [T], or [0] without the entropy.
    """
    head = operands(hidden_TH, weight_VH, bias_V)
    return _forward(*head, target_T, options, ignore_index, want_entropy)[:4]


def _forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_T: Tensor,
    options: tuple[float, float, float],
    ignore_index: int,
    want_entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Kept | None]:
    (T, H), V = hidden_TH.shape, len(weight_VH)
    E = T if want_entropy else 0
    logprob_T, lse_T, entropy_T, rest_T = (hidden_TH.new_empty(n, dtype=torch.float32) for n in (T, T, E, E))
    if T == 0:
        return logprob_T, lse_T, entropy_T, rest_T, None
    head, flags = (hidden_TH, weight_VH, bias_V, target_T.contiguous()), flags_of(bias_V, options)
    heavy = keep or is_heavy(flags, V, H, want_entropy)
    tile = choose_tile(hidden_TH, weight_VH, heavy, resident=bias_V is None and not options[1])
    blocks, tiles, parts, part_size = layout(tile, T, V, hidden_TH.device, heavy)
    partial_PT = [
        hidden_TH.new_empty((parts, T if i < 2 or want_entropy else 0), dtype=torch.float32) for i in range(3)
    ]
    pitch = triton.cdiv(V, 16) * 16
    kept = None
    if keep:
        kept = Kept(hidden_TH.new_empty((T, pitch)), hidden_TH.new_empty((tiles, T), dtype=torch.float32), tile.block_v)
    if tile.resident:
        from csrc_triton import linear_logprob_hopper

        linear_logprob_hopper.forward(
            hidden_TH, weight_VH, head[3], partial_PT, kept[:2] if kept else None,
            tile, part_size, pitch, options, ignore_index, want_entropy,
        )  # fmt: skip
    else:
        forward_kernel[(blocks, parts)](
            *operand_args(hidden_TH, weight_VH, tile), *head[2:], *partial_PT, *(kept[:2] if kept else (None, None)),
            T, V, H, part_size, pitch, *scalar_args(bias_V, options), ignore_index,
            **flags, **shape_of(tile, V, H, hidden_TH.device), WANT_ENTROPY=want_entropy, KEEP=keep,
        )  # fmt: skip
    combine_kernel[(triton.cdiv(T, 16),)](
        *head, *partial_PT, logprob_T, lse_T, entropy_T, rest_T,
        T, H, parts, *scalar_args(bias_V, options), ignore_index,
        **flags, BLOCK_T=16, BLOCK_H=128, WANT_ENTROPY=want_entropy, **LAUNCH,
    )  # fmt: skip
    return logprob_T, lse_T, entropy_T, rest_T, kept


def forward_keeping(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: tuple[float, float, float],
    ignore_index: int,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Kept | None] | None:
    """Return (log p, log-sum-exp, saved tensors for `backward_kept`).

    None if these exceed `kept_bytes`, or under a softcap, whose slope cannot be recovered from them.
    """
    if options[1] or len(target_T) * (len(weight_VH) + 15) * hidden_TH.element_size() > kept_bytes:
        return None
    logprob_T, lse_T, *_, kept = _forward(
        *operands(hidden_TH, weight_VH, bias_V), target_T, options, ignore_index, keep=True
    )
    return logprob_T, lse_T, kept


def backward_kept(
    kept: Kept | None,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    lse_T: Tensor,
    dlogprob_T: Tensor,
    options: tuple[float, float, float],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `backward`, of all rows, from d loss / d log p [T] (0 where ignored). `kept` is overwritten."""
    need_hidden, need_weight, need_bias = needs
    dweight_VH = torch.empty_like(weight_VH, memory_format=torch.contiguous_format) if need_weight else None
    hidden_TH, weight_VH, bias_V = operands(hidden_TH, weight_VH, bias_V)
    T, V, (scale, _, temperature) = len(hidden_TH), len(weight_VH), options
    if kept is None:  # no rows
        da_TV = hidden_TH.new_empty((0, V))
    else:
        onehot_T = dlogprob_T / temperature
        dlogits_from_saved[(triton.cdiv(T, 32), len(kept.max_NT))](
            kept.exp_TV, kept.max_NT, target_T.contiguous(), lse_T, onehot_T, -onehot_T,
            T, V, kept.exp_TV.shape[1], scalar_args(bias_V, options)[2], BLOCK_T=32, BLOCK_V=kept.block_v, **LAUNCH,
        )  # fmt: skip
        da_TV = kept.exp_TV[:, :V]
    dbias_V = da_TV.sum(0, dtype=torch.float32).to(bias_V.dtype) if need_bias and bias_V is not None else None
    dhidden_TH = matmul(da_TV, weight_VH).mul_(scale) if need_hidden else None
    if dweight_VH is not None:
        torch.mul(matmul(da_TV.T, hidden_TH), scale, out=dweight_VH)
    return dhidden_TH, dweight_VH, dbias_V


def most_columns(S: int, H: int, element_size: int) -> int:
    """Of a chunk of the backward pass."""
    a_column = max(S, 1) * element_size
    return max(WORKSPACE_BYTES // (a_column + 4 * H) if H <= 1024 else LARGE_H_WORKSPACE_BYTES // a_column, 1)


def workspace_bytes(S: int, V: int, H: int, element_size: int) -> int:
    """Return the peak bytes of a backward pass beside its gradients: d loss / d a and dWeight of a chunk."""
    return min(most_columns(S, H, element_size), V) * (S * element_size + 4 * H)


def backward(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    target_S: Tensor,
    bias_V: Tensor | None,
    lse_S: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[float, float, float],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dHidden [S, H] fp32, dWeight [V, H] in the weight's type, dBias [V]), None where `needs` is False.

    A chunk of the vocabulary at a time: d loss / d a into a workspace, then two products that accumulate in fp32. Each
    row of dWeight is written once; nothing is added atomically, so the result does not change from run to run.
    """
    need_hidden, need_weight, need_bias = needs
    dweight_VH = torch.empty_like(weight_VH, memory_format=torch.contiguous_format) if need_weight else None
    dbias_V = torch.empty_like(bias_V) if need_bias and bias_V is not None else None
    hidden_SH, weight_VH, bias_V = operands(hidden_SH, weight_VH, bias_V)
    (S, H), V, (scale, _, temperature) = hidden_SH.shape, len(weight_VH), options
    dhidden_SH = hidden_SH.new_zeros((S, H), dtype=torch.float32) if need_hidden else None
    rows = (target_S.contiguous(), lse_S.contiguous(), *(None if x is None else x / temperature for x in coefficients))
    flags = flags_of(bias_V, options)
    heavy = is_heavy(flags, V, H, coefficients[2] is not None)
    plain = bias_V is None and not options[1]
    tile = choose_tile(hidden_SH, weight_VH, heavy, wide=not heavy and not flags["HAS_SOFTCAP"], resident=plain)
    most = max(most_columns(S, H, hidden_SH.element_size()) // tile.block_v, 1)
    slots = slots_of(tile, hidden_SH.device, heavy=True)
    C = choose_chunk(tile, S, V, H, most, slots) * tile.block_v
    da_SC = hidden_SH.new_empty((S, C))
    for first in range(0, V, C):
        last = min(first + C, V)
        if S and tile.resident:
            from csrc_triton import linear_logprob_hopper

            parts = choose_parts(triton.cdiv(S, tile.block_t), triton.cdiv(last - first, tile.block_v), slots)
            linear_logprob_hopper.dlogits(hidden_SH, weight_VH, rows, da_SC, tile, parts, (first, last), options)
        elif S:
            dlogits_kernel[(triton.cdiv(S, tile.block_t), triton.cdiv(last - first, tile.block_v))](
                *operand_args(hidden_SH, weight_VH, tile), bias_V, *rows, da_SC,
                S, V, H, first, last, C, *scalar_args(bias_V, options),
                **flags, **shape_of(tile, V, H, hidden_SH.device), HAS_PROBLOG=coefficients[2] is not None,
            )  # fmt: skip
        chunk_SC = da_SC[:, : last - first]
        if dbias_V is not None:
            dbias_V[first:last] = chunk_SC.sum(0, dtype=torch.float32)
        if dhidden_SH is not None:
            add_matmul(dhidden_SH, chunk_SC, weight_VH[first:last], scale)
        if dweight_VH is not None:
            torch.mul(matmul(chunk_SC.T, hidden_SH), scale, out=dweight_VH[first:last])
    return dhidden_SH, dweight_VH, dbias_V
