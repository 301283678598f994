"""hidden [T, H] x head [V, H] -> log p of each target, and the gradients of selected rows, without T x V logits in memory.

T tokens, H hidden, V vocabulary, S rows with a gradient, C columns of a chunk of the vocabulary; P parts into which the
vocabulary is split so that few rows still fill the GPU. A row's logits are z = softcap * tanh(a / softcap) / temperature with
a = scale * h W^T + bias. `options` everywhere is (scale, softcap or 0, temperature). Everything is accumulated in fp32.

The kernels hold u, a tile of the product h W^T after whatever cannot wait, such that z = u * slope with one positive number
`slope`; then the largest u gives the largest z, and exp(z - m) is one multiply-add and one exp2 for each logit.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WORKSPACE_BYTES = 24 * 2**20  # of one chunk's gradient; stays in the L2 cache of an A100, H100 or B200
LOWEST = tl.constexpr(-1e30)  # below every finite logit; -inf would make NaNs where all of a tile is masked
LOG2_E = tl.constexpr(1 / math.log(2))


class Tile(NamedTuple):
    """Rows, columns and depth of a block of the product. Operands in flight stay within 99 KiB of shared memory."""

    block_t: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype, rows: int) -> Tile:
    if dtype == torch.float32:
        return Tile(128, 64, 16, 8, 2)
    return Tile(128, 128, 64, 8, 3) if rows > 64 else Tile(64, 128, 64, 4, 3)


def choose_parts(blocks: int, tiles: int, slots: int) -> int:
    """Parts of the vocabulary for `blocks` of rows, so that the programs fill `slots` places in the fewest whole rounds.

    A part has four tiles or more, else its start would show, and there are at most four rounds.
    """
    most = max(1, min(tiles // 4, 4 * slots // blocks))
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(blocks * parts, slots) / parts)


@triton.jit
def _bend(acc, bias, scale, inverse_softcap, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """u of a product: scaled and biased unless the slope does it, tanh of it under a softcap."""
    if HAS_SCALE:
        acc = acc * scale
    if HAS_BIAS:
        acc = acc + bias
    if HAS_SOFTCAP:
        acc = 2 * tl.sigmoid(2 * inverse_softcap * acc) - 1
    return acc


@triton.jit
def _tile(
    hidden_ptr, weight_ptr, bias_ptr, rows_t, cols_v, T, V, H, scale, inverse_softcap,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """u [BLOCK_T, BLOCK_V] of these rows and columns, -inf beyond V. hidden [T, H], weight [V, H], bias [V].

    Rows beyond T and columns beyond V read the last one instead: no load of the inner loop needs a mask.
    """
    acc_tv = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    depth_h = tl.arange(0, BLOCK_H)
    in_v = cols_v < V
    cols_v = cols_v if EVEN_V else tl.minimum(cols_v, V - 1)
    hidden_th = hidden_ptr + tl.minimum(rows_t, T - 1).to(tl.int64)[:, None] * H + depth_h[None, :]
    weight_hv = weight_ptr + cols_v.to(tl.int64)[None, :] * H + depth_h[:, None]
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            h_th, w_hv = tl.load(hidden_th + start), tl.load(weight_hv + start)
        else:
            in_h = depth_h + start < H
            h_th = tl.load(hidden_th + start, mask=in_h[None, :], other=0.0)
            w_hv = tl.load(weight_hv + start, mask=in_h[:, None], other=0.0)
        acc_tv = tl.dot(h_th, w_hv, acc_tv, input_precision="ieee")
    bias = tl.load(bias_ptr + cols_v).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    u_tv = _bend(acc_tv, bias, scale, inverse_softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)
    return u_tv if EVEN_V else tl.where(in_v[None, :], u_tv, float("-inf"))


@triton.jit
def forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, max_ptr, sum_ptr, plogp_ptr,
    T, V, H, part_size, scale, inverse_softcap, slope, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows against one part of the vocabulary, with an online log-sum-exp.

    hidden [T, H], weight [V, H], bias [V], target [T] int64; out, each [P, T] fp32: the largest u, m; sum e with
    e = exp(slope (u - m)); and sum e (u - m), for the entropy.
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
    for first in range(begin, stop, BLOCK_V):
        u_tv = _tile(
            hidden_ptr, weight_ptr, bias_ptr, rows_t, first + tl.arange(0, BLOCK_V), T, V, H, scale, inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_H, EVEN_V,
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

    out_t = part * T + rows_t  # there are parts only while T is small
    tl.store(max_ptr + out_t, max_t, mask=in_t)
    tl.store(sum_ptr + out_t, sum_t, mask=in_t)
    if WANT_ENTROPY:
        tl.store(plogp_ptr + out_t, plogp_t, mask=in_t)


@triton.jit
def combine_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, max_ptr, sum_ptr, plogp_ptr, logprob_ptr, lse_ptr, entropy_ptr,
    T, H, P, scale, inverse_softcap, slope, ignore_index,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows: all parts of `forward_kernel` [P, T] and the target's own logit, which is one row of the head
    a token and so cheaper here than a comparison for each logit there -> log p, log-sum-exp, entropy [T] in nats.
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
    picked_t = slope * _bend(acc_t, bias_t, scale, inverse_softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)

    log_sum_t = tl.log(sum_t)
    lse_t = max_t * slope + log_sum_t
    logprob_t = picked_t - lse_t
    logprob_t = tl.where(logprob_t > 0, 0.0, logprob_t)  # rounding can leave it a little above 0; a NaN passes
    tl.store(logprob_ptr + rows_t, tl.where(valid_t, logprob_t, 0.0), mask=in_t)
    tl.store(lse_ptr + rows_t, tl.where(valid_t, lse_t, 0.0), mask=in_t)
    if WANT_ENTROPY:
        tl.store(entropy_ptr + rows_t, tl.where(valid_t, log_sum_t - slope * plogp_t / sum_t, 0.0), mask=in_t)


@triton.jit
def da_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, lse_ptr, onehot_ptr, prob_ptr, probz_ptr, da_ptr,
    S, V, H, first_col, last_col, pitch, scale, inverse_softcap, slope,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, HAS_PROBZ: tl.constexpr,
):  # fmt: skip
    """One program: d loss / d a of BLOCK_T rows and BLOCK_V columns of the chunk [first_col, last_col).

    hidden [S, H], weight [V, H], bias [V], target, lse [S]; da [S, pitch] in the operands' type. The gradient of a row's logits
    is onehot [j = target] + p_j (prob + probz z_j); onehot, prob and probz [S] come divided by the temperature.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    local_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cols_v = first_col + local_v
    in_t = rows_t < S
    u_tv = _tile(
        hidden_ptr, weight_ptr, bias_ptr, rows_t, cols_v, S, V, H, scale, inverse_softcap,
        BLOCK_T, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_H, EVEN_V,
    )  # fmt: skip
    lse_t = tl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    target_t = tl.load(target_ptr + rows_t, mask=in_t, other=-1).to(tl.int32)
    onehot_t = tl.load(onehot_ptr + rows_t, mask=in_t, other=0.0)
    prob_t = tl.load(prob_ptr + rows_t, mask=in_t, other=0.0)
    p_tv = tl.exp2(u_tv * (slope * LOG2_E) - (lse_t * LOG2_E)[:, None])
    if HAS_PROBZ:
        probz_t = tl.load(probz_ptr + rows_t, mask=in_t, other=0.0) * slope
        da_tv = p_tv * (prob_t[:, None] + tl.where(p_tv > 0, probz_t[:, None] * u_tv, 0.0))
    else:
        da_tv = p_tv * prob_t[:, None]
    da_tv += tl.where(cols_v[None, :] == target_t[:, None], onehot_t[:, None], 0.0)
    if HAS_SOFTCAP:
        da_tv = da_tv * (1 - u_tv * u_tv)
    out_tv = da_ptr + rows_t.to(tl.int64)[:, None] * pitch + local_v[None, :]
    tl.store(out_tv, da_tv.to(da_ptr.dtype.element_ty), mask=in_t[:, None] & (cols_v < last_col)[None, :])


def forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    options: tuple[float, float, float],
    ignore_index: int,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log-sum-exp, entropy or [0]) of each token [T], fp32 nats; 0 where the target is `ignore_index`."""
    hidden_TH, weight_VH = _operands(hidden_TH, weight_VH)
    (T, H), V = hidden_TH.shape, len(weight_VH)
    logprob_T, lse_T, entropy_T = (hidden_TH.new_empty(n, dtype=torch.float32) for n in (T, T, T if want_entropy else 0))
    if T == 0:
        return logprob_T, lse_T, entropy_T
    tile = choose_tile(hidden_TH.dtype, T)
    tiles = triton.cdiv(V, tile.block_v)
    blocks = triton.cdiv(T, tile.block_t)
    parts = choose_parts(blocks, tiles, 2 * _multiprocessors(hidden_TH.device))
    part_size = triton.cdiv(tiles, parts) * tile.block_v
    parts = triton.cdiv(V, part_size)
    head, flags = (hidden_TH, weight_VH, bias_V, target_T.contiguous()), _flags(bias_V, options)
    partial_PT = [hidden_TH.new_empty((parts, T if i < 2 or want_entropy else 0), dtype=torch.float32) for i in range(3)]
    forward_kernel[(blocks, parts)](
        *head, *partial_PT,
        T, V, H, part_size, *_numbers(bias_V, options), ignore_index,
        **flags, **_shape(tile, V, H), WANT_ENTROPY=want_entropy,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(T, 16),)](
        *head, *partial_PT, logprob_T, lse_T, entropy_T,
        T, H, parts, *_numbers(bias_V, options), ignore_index,
        **flags, BLOCK_T=16, BLOCK_H=128, WANT_ENTROPY=want_entropy,
    )  # fmt: skip
    return logprob_T, lse_T, entropy_T


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
    """(dHidden [S, H] fp32, dWeight [V, H] in the weight's type, dBias [V]), None where `needs` says no.

    A chunk of the vocabulary at a time: d loss / d a into a workspace, then two products that accumulate in fp32. Each row of
    dWeight is written once; nothing is added atomically, so the result does not change from run to run.
    """
    need_hidden, need_weight, need_bias = needs
    dweight_VH = torch.empty_like(weight_VH, memory_format=torch.contiguous_format) if need_weight else None
    dbias_V = torch.empty_like(bias_V) if need_bias and bias_V is not None else None
    hidden_SH, weight_VH = _operands(hidden_SH, weight_VH)
    (S, H), V, (scale, _, temperature) = hidden_SH.shape, len(weight_VH), options
    dhidden_SH = hidden_SH.new_zeros((S, H), dtype=torch.float32) if need_hidden else None
    rows = (target_S.contiguous(), lse_S.contiguous(), *(None if x is None else x / temperature for x in coefficients))
    tile = choose_tile(hidden_SH.dtype, S)
    columns = WORKSPACE_BYTES // (max(S, 1) * hidden_SH.element_size())
    C = min(max(columns // tile.block_v, 1), triton.cdiv(V, tile.block_v)) * tile.block_v
    da_SC = hidden_SH.new_empty((S, C))
    for first in range(0, V, C):
        last = min(first + C, V)
        if S:
            da_kernel[(triton.cdiv(S, tile.block_t), triton.cdiv(last - first, tile.block_v))](
                hidden_SH, weight_VH, bias_V, *rows, da_SC,
                S, V, H, first, last, C, *_numbers(bias_V, options),
                **_flags(bias_V, options), **_shape(tile, V, H), HAS_PROBZ=coefficients[2] is not None,
            )  # fmt: skip
        chunk_SC = da_SC[:, : last - first]
        if dbias_V is not None:
            dbias_V[first:last] = chunk_SC.sum(0, dtype=torch.float32)
        if dhidden_SH is not None:
            dhidden_SH.add_(_matmul(chunk_SC, weight_VH[first:last]), alpha=scale)
        if dweight_VH is not None:
            torch.mul(_matmul(chunk_SC.T, hidden_SH), scale, out=dweight_VH[first:last])
    return dhidden_SH, dweight_VH, dbias_V


def _folds(bias_V: Tensor | None, options: tuple[float, float, float]) -> bool:
    """Whether the slope can take the scale: nothing comes between them, and the slope stays positive."""
    return bias_V is None and not options[1] and options[0] > 0


def _numbers(bias_V: Tensor | None, options: tuple[float, float, float]) -> tuple[float, float, float]:
    """(scale, 1 / softcap, slope) as the kernels take them."""
    scale, softcap, temperature = options
    slope = (scale if _folds(bias_V, options) else softcap or 1.0) / temperature
    return scale, 1 / softcap if softcap else 0.0, slope


def _flags(bias_V: Tensor | None, options: tuple[float, float, float]) -> dict[str, bool]:
    has_scale = options[0] != 1 and not _folds(bias_V, options)
    return dict(HAS_BIAS=bias_V is not None, HAS_SCALE=has_scale, HAS_SOFTCAP=options[1] != 0)


def _shape(tile: Tile, V: int, H: int) -> dict[str, Any]:
    return dict(
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_H=tile.block_h,
        EVEN_H=H % tile.block_h == 0,
        EVEN_V=V % tile.block_v == 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and in hidden's type. Triton's interpreter multiplies bf16 bit patterns, so there they become fp32."""
    weight = weight.to(hidden.dtype)
    if hidden.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        hidden, weight = hidden.float(), weight.float()
    return hidden.contiguous(), weight.contiguous()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
