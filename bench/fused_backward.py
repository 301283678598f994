"""The backward pass without a workspace, for comparison: kernels that compute a tile of d loss / d a again and multiply it.

A program holds a slice of H of one result in fp32 and walks over the other dimension, so every slice computes the logits anew:
with slices of 256 columns that is 2U ceil(H / 256) for each gradient beside the 2U of its product; at H = 768, 16U in all
against the 6U of a workspace. S rows, V vocabulary, H hidden; a plain head with a scale, bf16, fp16 or fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.linear_logprob import LOG2_E
from csrc_triton.product import operands, product_tile

BLOCK, SLICE = 64, 256


@triton.jit
def _da(
    hidden_ptr, weight_ptr, target_ptr, lse_ptr, g_ptr, first_s, first_v, S, V, H, slope,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """g (onehot - p) of a tile [BLOCK, BLOCK] in the operands' type; g is d loss / d log p."""
    rows_s, cols_v = first_s + tl.arange(0, BLOCK), first_v + tl.arange(0, BLOCK)
    u_sv = product_tile(
        hidden_ptr, weight_ptr, None, first_s, first_v, S, V, H, 1.0, 0.0,
        BLOCK, BLOCK, BLOCK_H, False, False, False, EVEN_H, False, False,
    )  # fmt: skip
    in_s = rows_s < S
    lse_s = tl.load(lse_ptr + rows_s, mask=in_s, other=0.0)
    g_s = tl.load(g_ptr + rows_s, mask=in_s, other=0.0)
    target_s = tl.load(target_ptr + rows_s, mask=in_s, other=-1)
    p_sv = tl.exp2(u_sv * (slope * LOG2_E) - (lse_s * LOG2_E)[:, None])
    da_sv = g_s[:, None] * (tl.where(cols_v[None, :] == target_s[:, None], 1.0, 0.0) - p_sv)
    return da_sv.to(hidden_ptr.dtype.element_ty)


@triton.jit
def dhidden_kernel(
    hidden_ptr, weight_ptr, target_ptr, lse_ptr, g_ptr, out_ptr, S, V, H, slope,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, SLICE: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows and SLICE columns of dHidden [S, H]."""
    first_s, depth_c = tl.program_id(0) * BLOCK, tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    acc_sc = tl.zeros((BLOCK, SLICE), dtype=tl.float32)
    for first_v in range(0, V, BLOCK):
        da_sv = _da(
            hidden_ptr, weight_ptr, target_ptr, lse_ptr, g_ptr, first_s, first_v, S, V, H, slope, BLOCK, BLOCK_H, EVEN_H
        )
        cols_v = first_v + tl.arange(0, BLOCK)
        keep_vc = (cols_v < V)[:, None] & (depth_c < H)[None, :]
        w_vc = tl.load(weight_ptr + cols_v.to(tl.int64)[:, None] * H + depth_c[None, :], mask=keep_vc, other=0.0)
        acc_sc = tl.dot(da_sv, w_vc, acc_sc, input_precision="ieee")
    rows_s = first_s + tl.arange(0, BLOCK)
    out_sc = out_ptr + rows_s.to(tl.int64)[:, None] * H + depth_c[None, :]
    tl.store(out_sc, (acc_sc * slope).to(out_ptr.dtype.element_ty), mask=(rows_s < S)[:, None] & (depth_c < H)[None, :])


@triton.jit
def dweight_kernel(
    hidden_ptr, weight_ptr, target_ptr, lse_ptr, g_ptr, out_ptr, S, V, H, slope,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, SLICE: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows and SLICE columns of dWeight [V, H]."""
    first_v, depth_c = tl.program_id(0) * BLOCK, tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    acc_vc = tl.zeros((BLOCK, SLICE), dtype=tl.float32)
    for first_s in range(0, S, BLOCK):
        da_sv = _da(
            hidden_ptr, weight_ptr, target_ptr, lse_ptr, g_ptr, first_s, first_v, S, V, H, slope, BLOCK, BLOCK_H, EVEN_H
        )
        rows_s = first_s + tl.arange(0, BLOCK)
        keep_sc = (rows_s < S)[:, None] & (depth_c < H)[None, :]
        h_sc = tl.load(hidden_ptr + rows_s.to(tl.int64)[:, None] * H + depth_c[None, :], mask=keep_sc, other=0.0)
        acc_vc = tl.dot(da_sv.T, h_sc, acc_vc, input_precision="ieee")
    rows_v = first_v + tl.arange(0, BLOCK)
    out_vc = out_ptr + rows_v.to(tl.int64)[:, None] * H + depth_c[None, :]
    tl.store(out_vc, (acc_vc * slope).to(out_ptr.dtype.element_ty), mask=(rows_v < V)[:, None] & (depth_c < H)[None, :])


def fused_backward(
    hidden_SH: Tensor, weight_VH: Tensor, target_S: Tensor, lse_S: Tensor, dlogprob_S: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(dHidden [S, H] fp32, dWeight [V, H]) of log p weighted by `dlogprob_S`; `scale` above 0."""
    hidden_SH, weight_VH, _ = operands(hidden_SH, weight_VH, None)
    (S, H), V = hidden_SH.shape, len(weight_VH)
    block_h = 32 if hidden_SH.dtype == torch.float32 else 64
    dhidden_SH, dweight_VH = torch.empty_like(hidden_SH, dtype=torch.float32), torch.empty_like(weight_VH)
    arguments = (hidden_SH, weight_VH, target_S, lse_S, dlogprob_S)
    shape = dict(BLOCK=BLOCK, BLOCK_H=block_h, SLICE=SLICE, EVEN_H=H % block_h == 0, num_warps=8, num_stages=2)
    slices = triton.cdiv(H, SLICE)
    dhidden_kernel[(triton.cdiv(S, BLOCK), slices)](*arguments, dhidden_SH, S, V, H, scale, **shape)
    dweight_kernel[(triton.cdiv(V, BLOCK), slices)](*arguments, dweight_VH, S, V, H, scale, **shape)
    return dhidden_SH, dweight_VH
