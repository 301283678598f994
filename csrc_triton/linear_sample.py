"""hidden [B, H] x head [V, H] -> one token a row by Gumbel-max, without B x V logits in memory.

B rows, H hidden, V vocabulary, P parts of the vocabulary, G groups of GROUP neighbouring entries, K entries kept by
top-k. Logits and `options` are those of `product`; a temperature of 0 means the largest logit. The noise is that of
`ops.philox`: Philox4x32-10 with the key of a row, and counter (entry // 4, position, index, iteration), word entry % 4.

Without top-k, one pass: noise is added to a tile of the product and its largest entry kept (FlashSampling, arXiv
2603.15854). With top-k, the pass keeps the largest logit of every group. The k largest entries lie in the k groups with
the largest maxima, equal ones taken in order of their entries: whatever precedes a group's maximum by (value, entry)
precedes all of the group. So only the entries of k groups are computed again, the k largest of them found, and the
noise added to those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.product import (
    LAUNCH,
    LOWEST,
    Tile,
    fetchable,
    flags_of,
    layout,
    operand_args,
    operands,
    plain_tile,
    product_tile,
    scalar_args,
    scale_bias_cap,
    shape_of,
)

GROUP = 32
MOST_TOP_K = 256  # 8,192 entries of 256 groups are held by one program


@triton.jit
def _gumbel(word):
    """Return Gumbel noise of 32 random bits: -log(-log(1 - u)), u = (word + 1/2) / 2^32.

    u and 1 - u are exact where small; -log(1 - u) is a series for small u, as the hardware's logarithm is inexact near
    1.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(rest)))


@triton.jit
def _most_gumbel(word):
    """Return an upper bound of `_gumbel`, at most 0.07 above -log(u): a float's bits bound its logarithm from below.

    -log(1 - u) is at least u. The thousandth is for the rounding of both.
    """
    return 110.212 - (word.to(tl.float32).to(tl.int32, bitcast=True)).to(tl.float32) * 8.262958e-8


@triton.jit
def _words(key_ptr, counter_ptr, rows, quad):
    """Return the four Philox words of rows and quads of entries (broadcast). key [B, 2], counter [B, 3] int64."""
    seed = tl.load(key_ptr + rows * 2) | (tl.load(key_ptr + rows * 2 + 1) << 32)
    position = tl.load(counter_ptr + rows * 3).to(tl.uint32)
    index = tl.load(counter_ptr + rows * 3 + 1).to(tl.uint32)
    iteration = tl.load(counter_ptr + rows * 3 + 2).to(tl.uint32)
    return tl.philox(seed, quad.to(tl.uint32), position, index, iteration)


@triton.jit
def _among_largest(x_n, k, N: tl.constexpr, BITS: tl.constexpr):
    """Which of `x_n` [N <= 2^BITS] are its k largest, equal ones from the front.

    Each is an integer in the order of the floats above its place from the back; the k-th largest is found by bisection.
    """
    bits_n = (x_n + 0.0).to(tl.int32, bitcast=True)  # adding 0 turns -0 into 0, which it equals
    ordered_n = (bits_n ^ ((bits_n >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    key_n = (ordered_n << BITS) | (N - 1 - tl.arange(0, N))
    bound = tl.zeros((), tl.int64)
    for bit in range(31 + BITS, -1, -1):
        higher = bound | (tl.full((), 1, tl.int64) << bit)
        bound = tl.where(tl.sum((key_n >= higher).to(tl.int32), 0) >= k, higher, bound)
    return key_n >= bound


@triton.jit(do_not_specialize=["B"])
def product_kernel(
    hidden_ptr, weight_ptr, bias_ptr, key_ptr, counter_ptr, best_ptr, entry_ptr, top_ptr, floor_ptr,
    B, V, H, G, part_size, scale, inverse_softcap, slope,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, DESCRIPTORS: tl.constexpr,
    NOISY: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows against one part of the vocabulary.

    hidden [B, H], weight [V, H], bias [V]. Out: GROUPED, the largest u of each group, top [B, G] fp32; else the largest
    logit, with noise if NOISY, and its entry: best [P, B] fp32, entry [P, B] int64.

    Most of the noise's cost is its logarithms, and a tile goes without them where none of its entries can win. floor
    [B] fp32, at first LOWEST, is what some part has found for a row: the noisy logit of one of its entries, so the
    largest of the row is no less. Left out are tiles in which logit plus `_most_gumbel` is less than that for every
    entry. Rounding keeps the order of the two sums, so none of these entries is the largest or ties with it: the token
    is the same, whatever the parts read and write there in which order.
    """
    rows_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    in_t = rows_t < B
    begin = part * part_size
    stop = tl.minimum(begin + part_size, V)
    best_t = tl.full((BLOCK_T,), LOWEST, dtype=tl.float32)
    entry_t = tl.zeros((BLOCK_T,), dtype=tl.int32) + begin
    for first in tl.range(begin, stop, BLOCK_V, flatten=not GROUPED):  # flat: the next tile is fetched meanwhile
        u_tv = product_tile(
            hidden_ptr, weight_ptr, bias_ptr, tl.program_id(0) * BLOCK_T, first, B, V, H, scale, inverse_softcap,
            BLOCK_T, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, EVEN_H, EVEN_V, DESCRIPTORS,
        )  # fmt: skip
        if GROUPED:
            top_tg = tl.max(tl.reshape(u_tv, (BLOCK_T, BLOCK_V // GROUP, GROUP)), 2)
            groups_g = first // GROUP + tl.arange(0, BLOCK_V // GROUP)
            out_tg = top_ptr + rows_t.to(tl.int64)[:, None] * G + groups_g[None, :]
            tl.store(out_tg, top_tg, mask=in_t[:, None] & (groups_g < G)[None, :])
        elif NOISY:
            floor_t = tl.load(floor_ptr + rows_t, mask=in_t, other=float("inf"), volatile=True)
            quad_q = first // 4 + tl.arange(0, BLOCK_V // 4)
            w0, w1, w2, w3 = _words(key_ptr, counter_ptr, tl.minimum(rows_t, B - 1)[:, None], quad_q[None, :])
            word_tv = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_T, BLOCK_V))
            most_tv = tl.fma(u_tv, slope, _most_gumbel(word_tv))
            if tl.max(tl.max((most_tv >= floor_t[:, None]).to(tl.int32), 1), 0) > 0:
                top_t, at_t = tl.max(tl.fma(u_tv, slope, _gumbel(word_tv)), 1, return_indices=True)
                entry_t = tl.where(top_t > best_t, first + at_t, entry_t)
                best_t = tl.maximum(top_t, best_t)
                tl.store(floor_ptr + rows_t, best_t, mask=in_t & (best_t > floor_t))
        else:
            top_t, at_t = tl.max(u_tv, 1, return_indices=True)
            entry_t = tl.where(top_t > best_t, first + at_t, entry_t)
            best_t = tl.maximum(top_t, best_t)
    if not GROUPED:
        out_t = part * B + rows_t
        tl.store(best_ptr + out_t, best_t, mask=in_t)
        tl.store(entry_ptr + out_t, entry_t.to(tl.int64), mask=in_t)


@triton.jit
def select_kernel(top_ptr, group_ptr, G, K, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """One program: the K groups of a row with the largest maxima. top [B, G] fp32 -> group [B, K] int32, ascending."""
    row = tl.program_id(0).to(tl.int64)
    group_n = tl.arange(0, BLOCK)
    top_n = tl.load(top_ptr + row * G + group_n, mask=group_n < G, other=float("-inf"))
    keep_n = _among_largest(top_n, K, BLOCK, BITS)
    place_n = tl.cumsum(keep_n.to(tl.int32), 0) - 1
    tl.store(group_ptr + row * K + place_n, group_n, mask=keep_n)


@triton.jit
def gather_kernel(
    hidden_ptr, weight_ptr, bias_ptr, group_ptr, u_ptr, V, H, K, scale, inverse_softcap,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program: u of the entries of one group of a row. group [B, K] -> u [B, K, GROUP] fp32, -inf beyond V."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry_g = tl.load(group_ptr + row * K + place) * GROUP + tl.arange(0, GROUP)
    read_g = tl.minimum(entry_g, V - 1)
    acc_g = tl.zeros((GROUP,), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        depth_h = start + tl.arange(0, BLOCK_H)
        in_h = depth_h < H
        h_h = tl.load(hidden_ptr + row * H + depth_h, mask=in_h, other=0.0).to(tl.float32)
        w_gh = tl.load(weight_ptr + read_g.to(tl.int64)[:, None] * H + depth_h[None, :], mask=in_h[None, :], other=0.0)
        acc_g += tl.sum(w_gh.to(tl.float32) * h_h[None, :], 1)
    bias_g = tl.load(bias_ptr + read_g).to(tl.float32) if HAS_BIAS else 0.0
    u_g = scale_bias_cap(acc_g, bias_g, scale, inverse_softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)
    tl.store(u_ptr + (row * K + place) * GROUP + tl.arange(0, GROUP), tl.where(entry_g < V, u_g, float("-inf")))


@triton.jit
def pick_kernel(
    u_ptr,
    group_ptr,
    key_ptr,
    counter_ptr,
    token_ptr,
    K,
    top_k,
    slope,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """One program: draws a row's token among the top_k largest of its u [K * GROUP]. group [B, K] -> token [B]
    int64."""
    row = tl.program_id(0).to(tl.int64)
    place_n = tl.arange(0, BLOCK)
    in_n = place_n < K * GROUP
    u_n = tl.load(u_ptr + row * K * GROUP + place_n, mask=in_n, other=float("-inf"))
    group_n = tl.load(group_ptr + row * K + place_n // GROUP, mask=in_n, other=0)
    entry_n = group_n * GROUP + place_n % GROUP
    keep_n = _among_largest(u_n, top_k, BLOCK, BITS) & (u_n > float("-inf"))
    w0, w1, w2, w3 = _words(key_ptr, counter_ptr, row, entry_n // 4)
    word_n = tl.where(entry_n % 4 < 2, tl.where(entry_n % 4 == 0, w0, w1), tl.where(entry_n % 4 == 2, w2, w3))
    noisy_n = tl.where(keep_n, u_n * slope + _gumbel(word_n), float("-inf"))
    _, best = tl.max(noisy_n, 0, return_indices=True)
    tl.store(token_ptr + row, tl.sum(tl.where(place_n == best, entry_n, 0), 0).to(tl.int64))


def choose_sample_tile(hidden: Tensor, weight: Tensor, grouped: bool) -> Tile:
    """Choose a smaller tile than the loss's, so that noise and the search for the largest do not spill.

    On an H100 or B200 that takes the copy engine, which keeps the addresses.
    """
    if grouped:
        return plain_tile(hidden.dtype, len(hidden))
    return Tile(64, 64, 32 if hidden.dtype == torch.float32 else 64, 8, 3, fetchable(hidden, weight))


def sample(
    hidden_BH: Tensor,
    weight_VH: Tensor,
    key_B2: Tensor,
    counter_B3: Tensor,
    bias_V: Tensor | None,
    options: tuple[float, float, float],
    top_k: int,
) -> Tensor:
    """Sample a token of each row [B], int64. `top_k`: at most MOST_TOP_K; 0, or V or more: the whole softmax."""
    hidden_BH, weight_VH, bias_V = operands(hidden_BH, weight_VH, bias_V)
    (B, H), V = hidden_BH.shape, len(weight_VH)
    noisy = options[2] > 0
    grouped = noisy and 0 < top_k < V
    options = (*options[:2], options[2] or 1.0)
    if B == 0:
        return hidden_BH.new_empty(0, dtype=torch.int64)
    tile = choose_sample_tile(hidden_BH, weight_VH, grouped)
    blocks, _, parts, part_size = layout(tile, B, V, hidden_BH.device)
    G = triton.cdiv(V, GROUP)
    head, flags = (hidden_BH, weight_VH, bias_V), flags_of(bias_V, options)
    scale, inverse_softcap, slope = scalar_args(bias_V, options)
    key_B2, counter_B3 = key_B2.contiguous(), counter_B3.contiguous()
    best_PB = hidden_BH.new_empty((0 if grouped else parts, B), dtype=torch.float32)
    entry_PB = torch.empty_like(best_PB, dtype=torch.int64)
    top_BG = hidden_BH.new_empty((B, G if grouped else 0), dtype=torch.float32)
    floor_B = hidden_BH.new_full((B if noisy and not grouped else 0,), LOWEST.value, dtype=torch.float32)
    product_kernel[(blocks, parts)](
        *operand_args(hidden_BH, weight_VH, tile), bias_V, key_B2, counter_B3, best_PB, entry_PB, top_BG, floor_B,
        B, V, H, G, part_size, scale, inverse_softcap, slope,
        **flags, **shape_of(tile, V, H, hidden_BH.device), GROUP=GROUP, NOISY=noisy, GROUPED=grouped,
    )  # fmt: skip
    if not grouped:
        return entry_PB.gather(0, best_PB.argmax(0, keepdim=True))[0]
    K = min(top_k, G)  # fewer groups than that: all of them
    group_BK = torch.empty((B, K), dtype=torch.int32, device=hidden_BH.device)
    u_BKG = hidden_BH.new_empty((B, K, GROUP), dtype=torch.float32)
    select_kernel[(B,)](top_BG, group_BK, G, K, **_block(G), **LAUNCH)
    gather_kernel[(B, K)](
        *head, group_BK, u_BKG, V, H, K, scale, inverse_softcap, GROUP=GROUP, BLOCK_H=128, **flags, **LAUNCH
    )
    token_B = torch.empty(B, dtype=torch.int64, device=hidden_BH.device)
    pick_kernel[(B,)](
        u_BKG, group_BK, key_B2, counter_B3, token_B, K, top_k, slope, GROUP=GROUP, **_block(K * GROUP), **LAUNCH
    )
    return token_B


def _block(n: int) -> dict[str, int]:
    """The block of a kernel that holds n values at once."""
    block = triton.next_power_of_2(n)
    return dict(BLOCK=block, BITS=max(block.bit_length() - 1, 1), num_warps=8 if block > 2048 else 4)
