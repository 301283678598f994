"""`linear_logprob`'s `forward_kernel` and `dlogits_kernel` for sm_90, in Gluon: 128 rows of hidden states stay in
shared memory, the head streams past.

One warp fetches the head through the copy engine (TMA) into a ring of stages, BLOCK_V x BLOCK_H each; two warpgroups of
64 rows multiply. Each waits for a stage by itself and gives it back when its own product has ended, so that one may be
ahead of the other by as many stages as there are, and one's exponentials run under the other's products.

T rows, H hidden, V vocabulary; s steps along the hidden dimension, r stages of the ring. u, slope: see `product`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_triton.product import LAUNCH, LOG2_E, LOWEST, Tile, flags_of, scalar_args

if "functions_and_args" not in inspect.signature(gl.warp_specialize).parameters:  # before Triton 3.6
    raise ImportError("gluon.language.warp_specialize takes other arguments")
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.6
HALF = gl.constexpr(64)  # rows of a warpgroup


@gluon.jit
def next_place(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and the parity of its barriers' phase, which turns with each round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def prepare(
    hidden_desc, weight_desc,
    STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """Shared memory: hidden states, the ring, and the mbarriers: hidden states are there, a stage is full, a stage is
    empty."""
    hidden_sth = gl.allocate_shared_memory(hidden_desc.dtype, [STEPS, 2 * HALF, BLOCK_H], hidden_desc.layout)
    ring_rvh = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_V, BLOCK_H], weight_desc.layout)
    hidden_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_r = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_r = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(hidden_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_r.index(stage), count=1)
        mbarrier.init(empty_r.index(stage), count=2)  # both warpgroups
    fence_async_shared()  # the copy engine sees them
    return hidden_sth, ring_rvh, hidden_full, full_r, empty_r


@gluon.jit
def fetch(
    hidden_desc, weight_desc, shared, first_t, begin, stop,
    STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """One warp: the hidden states once, then columns [begin, stop) of the head, a stage when both warpgroups gave it
    back."""
    hidden_sth, ring_rvh, hidden_full, full_r, empty_r = shared
    if begin < stop:
        mbarrier.expect(hidden_full, STEPS * 2 * HALF * BLOCK_H * 2)
        for step in range(STEPS):
            async_load(hidden_desc, [first_t, step * BLOCK_H], hidden_full, hidden_sth.index(step))
    stage = 0
    phase = 1  # as if an earlier round had given back every stage
    for first_v in range(begin, stop, BLOCK_V):
        for step in range(STEPS):
            mbarrier.wait(empty_r.index(stage), phase)
            mbarrier.expect(full_r.index(stage), BLOCK_V * BLOCK_H * 2)
            async_load(weight_desc, [first_v, step * BLOCK_H], full_r.index(stage), ring_rvh.index(stage))
            stage, phase = next_place(stage, phase, STAGES)


@gluon.jit
def product(
    shared, stage, phase, WHICH: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """(a tile of the product [64, BLOCK_V], where the ring then is), of warpgroup WHICH."""
    hidden_sth, ring_rvh, _, full_r, empty_r = shared
    acc_tv = gl.zeros([HALF, BLOCK_V], gl.float32, LAYOUT)
    for step in range(STEPS):
        h_th = hidden_sth.index(step).slice(WHICH * HALF, HALF)
        mbarrier.wait(full_r.index(stage), phase)
        acc_tv = warpgroup_mma(h_th, ring_rvh.index(stage).permute((1, 0)), acc_tv, use_acc=step > 0, is_async=True)
        acc_tv = warpgroup_mma_wait(1, deps=[acc_tv])  # the product of the step before has ended: its stage is free
        mbarrier.arrive(empty_r.index(gl.where(stage > 0, stage, STAGES) - 1), pred=step > 0)
        stage, phase = next_place(stage, phase, STAGES)
    acc_tv = warpgroup_mma_wait(0, deps=[acc_tv])
    mbarrier.arrive(empty_r.index(gl.where(stage > 0, stage, STAGES) - 1))
    return acc_tv, stage, phase


@gluon.jit
def multiply(
    shared, scalars, outputs,
    WHICH: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr,
    HAS_SCALE: gl.constexpr, EVEN_V: gl.constexpr, WANT_ENTROPY: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0 or 1 (WHICH): its 64 rows against the head's columns [begin, stop), with an online log-sum-exp."""
    first_t, begin, stop, T, V, part, pitch, scale, slope = scalars
    max_ptr, sum_ptr, plogp_ptr, kept_ptr, kept_max_ptr = outputs
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    rows_t = first_t + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    cols_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, layout))
    in_t = rows_t < T
    slope_2 = slope * LOG2_E
    max_t = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    sum_t = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, layout))
    plogp_t = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, layout))
    if begin < stop:
        mbarrier.wait(shared[2], 0)
    stage = 0
    phase = 0
    for first_v in range(begin, stop, BLOCK_V):
        u_tv, stage, phase = product(shared, stage, phase, WHICH, STEPS, STAGES, BLOCK_V, layout)
        if HAS_SCALE:
            u_tv = u_tv * scale
        if not EVEN_V:
            u_tv = gl.where((first_v + cols_v < V)[None, :], u_tv, float("-inf"))
        new_max_t = gl.maximum(max_t, gl.max(u_tv, 1))
        decay_t = gl.exp2((max_t - new_max_t) * slope_2)
        exp_tv = gl.exp2(u_tv * slope_2 - (new_max_t * slope_2)[:, None])
        if WANT_ENTROPY:
            moved_t = gl.where(sum_t > 0, (max_t - new_max_t) * sum_t, 0.0)
            below_tv = gl.where(exp_tv > 0, exp_tv * (u_tv - new_max_t[:, None]), 0.0)
            plogp_t = decay_t * (plogp_t + moved_t) + gl.sum(below_tv, 1)
        sum_t = sum_t * decay_t + gl.sum(exp_tv, 1)
        max_t = new_max_t
        if KEEP:  # columns from V to the pitch take zeros
            kept_tv = kept_ptr + rows_t.to(gl.int64)[:, None] * pitch + (first_v + cols_v)[None, :]
            gl.store(
                kept_tv, exp_tv.to(kept_ptr.dtype.element_ty), mask=in_t[:, None] & (first_v + cols_v < pitch)[None, :]
            )
            gl.store(kept_max_ptr + (first_v // BLOCK_V) * T + rows_t, new_max_t, mask=in_t)

    out_t = part * T + rows_t
    gl.store(max_ptr + out_t, max_t, mask=in_t)
    gl.store(sum_ptr + out_t, sum_t, mask=in_t)
    if WANT_ENTROPY:
        gl.store(plogp_ptr + out_t, plogp_t, mask=in_t)


@gluon.jit(do_not_specialize=["T"])
def resident_kernel(
    hidden_desc, weight_desc, target_ptr, max_ptr, sum_ptr, plogp_ptr, kept_ptr, kept_max_ptr,
    T, V, part_size, pitch, scale, slope, ignore_index,
    STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_H: gl.constexpr,
    HAS_SCALE: gl.constexpr, EVEN_V: gl.constexpr, WANT_ENTROPY: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows against one part of the vocabulary. What it reads and writes: as
    `linear_logprob.forward_kernel`, the operands through descriptors of blocks [128, BLOCK_H] and [BLOCK_V,
    BLOCK_H]."""
    first_t = gl.program_id(0) * (2 * HALF)
    part = gl.program_id(1)
    rows_t = first_t + gl.arange(0, 2 * HALF, gl.BlockedLayout([4], [32], [4], [0]))  # all of them in each warp
    target_t = gl.load(target_ptr + rows_t, mask=rows_t < T, other=ignore_index)
    begin = part * part_size
    stop = gl.minimum(begin + part_size, V)
    stop = gl.where(gl.max((target_t != ignore_index).to(gl.int32), 0) > 0, stop, begin)  # all ignored: nothing to do

    shared = prepare(hidden_desc, weight_desc, STEPS, STAGES, BLOCK_V, BLOCK_H)
    scalars = (first_t, begin, stop, T, V, part, pitch, scale, slope)
    outputs = (max_ptr, sum_ptr, plogp_ptr, kept_ptr, kept_max_ptr)
    gl.warp_specialize(
        [
            (multiply, (shared, scalars, outputs, 0, STEPS, STAGES, BLOCK_V, HAS_SCALE, EVEN_V, WANT_ENTROPY, KEEP)),
            (multiply, (shared, scalars, outputs, 1, STEPS, STAGES, BLOCK_V, HAS_SCALE, EVEN_V, WANT_ENTROPY, KEEP)),
            (fetch, (hidden_desc, weight_desc, shared, first_t, begin, stop, STEPS, STAGES, BLOCK_V, BLOCK_H)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def differentiate(
    shared, scalars, rows,
    WHICH: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_PROBLOG: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0 or 1 (WHICH): d loss / d a of its 64 rows and columns [begin, stop)."""
    first_t, begin, stop, first_col, S, pitch, scale, slope = scalars
    target_ptr, lse_ptr, onehot_ptr, prob_ptr, problog_ptr, da_ptr = rows
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    rows_t = first_t + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    cols_v = gl.arange(0, BLOCK_V, gl.SliceLayout(0, layout))
    in_t = rows_t < S
    lse_t = gl.load(lse_ptr + rows_t, mask=in_t, other=0.0)
    target_t = gl.load(target_ptr + rows_t, mask=in_t, other=-1).to(gl.int32)
    onehot_t = gl.load(onehot_ptr + rows_t, mask=in_t, other=0.0)
    prob_t = gl.load(prob_ptr + rows_t, mask=in_t, other=0.0)
    out_t = da_ptr + rows_t.to(gl.int64) * pitch - first_col
    mbarrier.wait(shared[2], 0)
    stage = 0
    phase = 0
    for first_v in range(begin, stop, BLOCK_V):
        u_tv, stage, phase = product(shared, stage, phase, WHICH, STEPS, STAGES, BLOCK_V, layout)
        if HAS_SCALE:
            u_tv = u_tv * scale
        if HAS_PROBLOG:
            problog_t = gl.load(problog_ptr + rows_t, mask=in_t, other=0.0)
            logp_tv = u_tv * slope - lse_t[:, None]
            # where p is 0, its product with log p is too; a NaN stays
            logp_tv = gl.where(logp_tv < -200.0, -200.0, logp_tv)
            da_tv = gl.exp2(logp_tv * LOG2_E) * (prob_t[:, None] + problog_t[:, None] * logp_tv)
        else:
            da_tv = gl.exp2(u_tv * (slope * LOG2_E) - (lse_t * LOG2_E)[:, None]) * prob_t[:, None]
        da_tv += gl.where((first_v + cols_v)[None, :] == target_t[:, None], onehot_t[:, None], 0.0)
        gl.store(out_t[:, None] + (first_v + cols_v)[None, :], da_tv.to(da_ptr.dtype.element_ty), mask=in_t[:, None])


@gluon.jit(do_not_specialize=["S"])
def resident_da_kernel(
    hidden_desc, weight_desc, target_ptr, lse_ptr, onehot_ptr, prob_ptr, problog_ptr, da_ptr,
    S, first_col, last_col, part_size, pitch, scale, slope,
    STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_H: gl.constexpr,
    HAS_SCALE: gl.constexpr, HAS_PROBLOG: gl.constexpr,
):  # fmt: skip
    """One program: d loss / d a of 128 rows and one part of the chunk [first_col, last_col), as
    `linear_logprob.dlogits_kernel`; it writes whole tiles, beyond last_col too, for which the pitch has room."""
    first_t = gl.program_id(0) * (2 * HALF)
    begin = first_col + gl.program_id(1) * part_size
    stop = gl.minimum(begin + part_size, last_col)
    shared = prepare(hidden_desc, weight_desc, STEPS, STAGES, BLOCK_V, BLOCK_H)
    scalars = (first_t, begin, stop, first_col, S, pitch, scale, slope)
    rows = (target_ptr, lse_ptr, onehot_ptr, prob_ptr, problog_ptr, da_ptr)
    gl.warp_specialize(
        [
            (differentiate, (shared, scalars, rows, 0, STEPS, STAGES, BLOCK_V, HAS_SCALE, HAS_PROBLOG)),
            (differentiate, (shared, scalars, rows, 1, STEPS, STAGES, BLOCK_V, HAS_SCALE, HAS_PROBLOG)),
            (fetch, (hidden_desc, weight_desc, shared, first_t, begin, stop, STEPS, STAGES, BLOCK_V, BLOCK_H)),
        ],
        [4, 1],
        [240, 24],
    )


def launch_settings(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple[list[TensorDescriptor], dict[str, Any]]:
    """(descriptors of the operands' blocks, a launch's settings). Raises `ValueError` for a tile that leaves no room
    for two stages of the head."""
    H = hidden.shape[1]
    if tile.num_stages < 2:
        raise ValueError(f"shared memory has no room for 128 rows of H = {H} and two stages of the head")
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[hidden.dtype]
    blocks = [tile.block_t, tile.block_h], [tile.block_v, tile.block_h]
    descriptors = [
        TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
        for x, block in zip((hidden, weight), blocks, strict=True)
    ]
    shape = dict(STEPS=-(-H // tile.block_h), STAGES=tile.num_stages, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h)
    return descriptors, dict(**shape, num_warps=4, **LAUNCH)


def forward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    partial_PT: list[Tensor],
    kept: tuple[Tensor, Tensor] | None,
    tile: Tile,
    part_size: int,
    pitch: int,
    options: tuple[float, float, float],
    ignore_index: int,
    want_entropy: bool,
) -> None:
    """A launch, in place of `linear_logprob.forward_kernel`'s, which says what `partial_PT` and `kept` take. `tile` is
    one of `product.resident_tile`."""
    (parts, T), V = partial_PT[0].shape, len(weight_VH)
    descriptors, settings = launch_settings(hidden_TH, weight_VH, tile)
    scale, _, slope = scalar_args(None, options)
    resident_kernel[(-(-T // tile.block_t), parts)](
        *descriptors, target_T, *partial_PT, *(kept or partial_PT[:2]), T, V, part_size, pitch, scale, slope,
        ignore_index,
        HAS_SCALE=flags_of(None, options)["HAS_SCALE"], EVEN_V=V % tile.block_v == 0,
        WANT_ENTROPY=want_entropy, KEEP=kept is not None, **settings,
    )  # fmt: skip


def dlogits(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    rows: tuple[Tensor | None, ...],
    da_SC: Tensor,
    tile: Tile,
    parts: int,
    chunk: tuple[int, int],
    options: tuple[float, float, float],
) -> None:
    """A launch, in place of `linear_logprob.dlogits_kernel`'s. `rows`: target, log-sum-exp and the three coefficients
    [S], of which the last may be None; `chunk`: [first column, last column), split into so many parts."""
    (S, C), (first, last) = da_SC.shape, chunk
    descriptors, settings = launch_settings(hidden_SH, weight_VH, tile)
    part_size = -(-(last - first) // (parts * tile.block_v)) * tile.block_v
    scale, _, slope = scalar_args(None, options)
    has_scale, problog_S = flags_of(None, options)["HAS_SCALE"], rows[4]
    resident_da_kernel[(-(-S // tile.block_t), -(-(last - first) // part_size))](
        *descriptors, *rows[:4], rows[3] if problog_S is None else problog_S, da_SC,
        S, first, last, part_size, C, scale, slope, HAS_SCALE=has_scale, HAS_PROBLOG=problog_S is not None, **settings,
    )  # fmt: skip
