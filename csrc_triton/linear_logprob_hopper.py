"""`linear_logprob.forward_kernel` for sm_90, in Gluon: 128 rows of hidden states stay in shared memory, the head
streams past.

One warp fetches the head through the copy engine (TMA) into a ring of stages, BLOCK_V x BLOCK_H each; two warpgroups of
64 rows multiply. Each waits for a stage by itself and gives it back when its own product has ended, so that one may be
ahead of the other by as many stages as there are, and one's exponentials run under the other's products.

T rows, H hidden, V vocabulary; s steps along the hidden dimension, r stages of the ring. u, slope: see `product`.
"""

from __future__ import annotations

import inspect

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
def multiply(
    shared, numbers, outputs,
    WHICH: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_V: gl.constexpr,
    HAS_SCALE: gl.constexpr, EVEN_V: gl.constexpr, WANT_ENTROPY: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Warpgroup 0 or 1 (WHICH): its 64 rows against the head's columns [begin, stop), with an online log-sum-exp."""
    hidden_sth, ring_rvh, hidden_full, full_r, empty_r = shared
    first_t, begin, stop, T, V, part, pitch, scale, slope = numbers
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
        mbarrier.wait(hidden_full, 0)
    stage = 0
    phase = 0
    for first_v in range(begin, stop, BLOCK_V):
        u_tv = gl.zeros([HALF, BLOCK_V], gl.float32, layout)
        for step in range(STEPS):
            h_th = hidden_sth.index(step).slice(WHICH * HALF, HALF)
            mbarrier.wait(full_r.index(stage), phase)
            u_tv = warpgroup_mma(h_th, ring_rvh.index(stage).permute((1, 0)), u_tv, use_acc=step > 0, is_async=True)
            u_tv = warpgroup_mma_wait(1, deps=[u_tv])  # the product of the step before has ended: its stage is free
            mbarrier.arrive(empty_r.index(gl.where(stage > 0, stage, STAGES) - 1), pred=step > 0)
            stage, phase = next_place(stage, phase, STAGES)
        u_tv = warpgroup_mma_wait(0, deps=[u_tv])
        mbarrier.arrive(empty_r.index(gl.where(stage > 0, stage, STAGES) - 1))
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
    shared = (hidden_sth, ring_rvh, hidden_full, full_r, empty_r)
    numbers = (first_t, begin, stop, T, V, part, pitch, scale, slope)
    outputs = (max_ptr, sum_ptr, plogp_ptr, kept_ptr, kept_max_ptr)
    gl.warp_specialize(
        [
            (multiply, (shared, numbers, outputs, 0, STEPS, STAGES, BLOCK_V, HAS_SCALE, EVEN_V, WANT_ENTROPY, KEEP)),
            (multiply, (shared, numbers, outputs, 1, STEPS, STAGES, BLOCK_V, HAS_SCALE, EVEN_V, WANT_ENTROPY, KEEP)),
            (fetch, (hidden_desc, weight_desc, shared, first_t, begin, stop, STEPS, STAGES, BLOCK_V, BLOCK_H)),
        ],
        [4, 1],
        [240, 24],
    )


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
    one of `product.resident_tile`. Raises `ValueError` for a tile that leaves no room for two stages of the head."""
    if tile.num_stages < 2:
        raise ValueError(
            f"shared memory has no room for 128 rows of H = {hidden_TH.shape[1]} and two stages of the head"
        )
    (T, H), (parts, _), V = hidden_TH.shape, partial_PT[0].shape, len(weight_VH)
    (scale, _, slope), has_scale = scalar_args(None, options), flags_of(None, options)["HAS_SCALE"]
    blocks = [tile.block_t, tile.block_h], [tile.block_v, tile.block_h]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[hidden_TH.dtype]
    descriptors = [
        TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))
        for x, block in zip((hidden_TH, weight_VH), blocks, strict=True)
    ]
    resident_kernel[(-(-T // tile.block_t), parts)](
        *descriptors, target_T, *partial_PT, *(kept or partial_PT[:2]), T, V, part_size, pitch, scale, slope,
        ignore_index,
        STEPS=-(-H // tile.block_h), STAGES=tile.num_stages, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h,
        HAS_SCALE=has_scale, EVEN_V=V % tile.block_v == 0, WANT_ENTROPY=want_entropy, KEEP=kept is not None,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
