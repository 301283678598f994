"""The product tile hidden [T, H] x head [V, H] shared by the vocabulary kernels, and its launch settings.

T rows, H hidden, V vocabulary. A row's logits are z = softcap * tanh(a / softcap) / temperature with a = scale * h W^T
+ bias. `options` everywhere is (scale, softcap or 0, temperature). The product is accumulated in fp32.

The kernels hold u, a tile of the product after whatever cannot wait, such that z = u * slope with one positive number
`slope`; then the largest u gives the largest z, and exp(z - m) is one multiply-add and one exp2 for each logit.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# multiply-adds in one instruction: of every kernel, whatever Triton's default becomes
LAUNCH = dict(enable_fp_fusion=True)
LOG2_E = tl.constexpr(1 / math.log(2))
LOWEST = tl.constexpr(-1e30)  # below every finite logit; -inf would make NaNs where all of a tile is masked


class Tile(NamedTuple):
    """Rows, columns and depth of a block of the product.

    With 128 columns, operands in flight take at most 99 KiB of shared memory, which every GPU has; with 256 they take
    144 KiB of an H100's 227.
    """

    block_t: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # operands are fetched by the copy engine of sm_90 and newer (TMA)
    products: int = 1  # as many registers' worth of sums a program holds at once
    resident: bool = False  # all of a row's hidden states stay in shared memory; stages are of the head alone (sm_90)


RESIDENT_BYTES = 227 * 1024 - 1024  # of an H100's shared memory: all but the barriers
forced_tile: Tile | None = None  # what a benchmark wants every launch to take


def plain_tile(dtype: torch.dtype, rows: int) -> Tile:
    """Return the tile that every GPU supports."""
    if dtype == torch.float32:
        return Tile(128, 64, 16, 8, 2)
    return Tile(128, 128, 64, 8, 3) if rows > 64 else Tile(64, 128, 64, 4, 3)


def choose_tile(hidden: Tensor, weight: Tensor, heavy: bool = False, wide: bool = True, resident: bool = False) -> Tile:
    """The tile of a product of these operands. On an H100, where the copy engine can fetch them, 256 columns from H =
    1024 on: each byte that comes from the L2 cache is used more often. `heavy`: an epilogue whose registers leave two
    programs room there only if the copy engine keeps the addresses. `wide`: whether 256 columns' worth of the epilogue
    fits in registers.
    `resident`: whether there is a kernel that holds hidden in shared memory."""
    if forced_tile is not None and (resident or not forced_tile.resident):
        return forced_tile
    H, tile = hidden.shape[1], plain_tile(hidden.dtype, len(hidden))
    if tile.block_t < 128 or architecture(hidden.device) // 10 != 9 or not fetchable(hidden, weight):
        return tile
    if resident and gluon_wanted() and resident_tile(H).num_stages >= 4 and gluon_obstacle() is None:
        return resident_tile(H)
    if wide and H >= 1024:
        return Tile(128, 256, 64, 8, 3, True)
    return tile._replace(descriptors=heavy)


def resident_tile(H: int) -> Tile:
    """128 rows of hidden states of 16 bits in shared memory, and in what is left as many stages of the head, 8 at most.

    A stage is 64 deep, or 32 where there would be fewer than 4: the copy engine fetches one when it was given back, and
    idles where few are large. Beyond H = 832 there is no room for 2; `num_stages` is then less.
    """

    def made(block_h: int) -> Tile:
        hidden, stage = 2 * 128 * -(-H // block_h) * block_h, 2 * 128 * block_h
        return Tile(128, 128, block_h, 8, min(8, (RESIDENT_BYTES - hidden) // stage), True, resident=True)

    return made(64) if made(64).num_stages >= 4 else made(32)


def gluon_wanted() -> bool:
    """Whether QCRD_FAST_GLUON=1 asks for the kernel of `linear_logprob_hopper`, which no GPU has timed yet. It is not
    for Triton's interpreter."""
    value = os.environ.get("QCRD_FAST_GLUON", "0")
    if value not in ("0", "1"):
        raise ValueError(f"QCRD_FAST_GLUON={value}: expected 0 or 1")
    return value == "1" and os.environ.get("TRITON_INTERPRET") != "1"


@functools.cache
def gluon_obstacle() -> str | None:
    """Why this Triton cannot compile `linear_logprob_hopper`, or None."""
    try:
        importlib.import_module(f"{__package__}.linear_logprob_hopper")
    except Exception as error:  # Gluon is experimental: names come and go between versions of Triton
        return f"triton {triton.__version__} lacks what linear_logprob_hopper needs: {error}"
    return None


def fetchable(*operands: Tensor) -> bool:
    """Return whether an H100's or B200's copy engine can load these: 16-bit, rows aligned to 16 bytes."""
    fits = all(x.element_size() == 2 and x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 for x in operands)
    return fits and architecture(operands[0].device) // 10 in (9, 10)


def choose_parts(blocks: int, tiles: int, slots: int) -> int:
    """Return the number of vocabulary parts so that the programs fill `slots` places in the fewest whole rounds.

    A part has four tiles or more, else its start would show, and there are at most four rounds.
    """
    most = max(1, min(tiles // 4, 4 * slots // blocks))
    return min(range(1, most + 1), key=lambda parts: triton.cdiv(blocks * parts, slots) / parts)


def choose_chunk(tile: Tile, S: int, V: int, H: int, most: int, slots: int) -> int:
    """Return the tiles of a vocabulary chunk of the backward pass, from `most` / 2 to `most`.

    Minimises whole rounds of `slots` programs. d loss / d a is S x C of depth H, in this kernel's tiles; a chunk of
    dWeight is C x H of depth S, in tiles of about 128 x 128. The tiles of dHidden do not depend on C.
    """
    blocks, tiles = -(-S // tile.block_t), -(-V // tile.block_v)
    if most >= tiles:
        return tiles

    def cost(chunk: int) -> int:
        of_weight = -(-chunk * tile.block_v // 128) * -(-H // 128)
        return -(-blocks * chunk // slots) * H * tile.block_v + -(-of_weight // slots) * S * 128

    def total(chunk: int) -> int:
        whole, rest = divmod(tiles, chunk)
        return whole * cost(chunk) + (cost(rest) if rest else 0)

    return min(range(most, most // 2, -max(1, most // 32)), key=total)  # of equal ones the largest


def programs_at_once(tile: Tile, capability: int, heavy: bool = False) -> int:
    """Return the programs per multiprocessor that registers and shared memory allow, as compiled.

    On an H100 `shape_of` makes the compiler keep to it. With matrix instructions of a warp (Ampere, Ada, Blackwell
    workstation GPUs) the registers of 8 warps allow one; on a B200 those of a `heavy` epilogue do.
    """
    family = capability // 10
    if tile.resident:
        return 1
    if tile.block_t * tile.block_v * tile.products > 64 * 32 * tile.num_warps:  # more than 64 sums a thread
        return 1
    fp32 = tile.block_h == 16 and capability != 80  # no matrix instructions; sm_80 takes one register too many
    if tile.num_warps == 8 and not fp32 and (family in (8, 12) or (heavy and family == 10)):
        return 1
    return 3 if tile.num_warps == 4 and (family == 9 or (capability == 80 and tile.block_h == 32)) else 2


def slots_of(tile: Tile, device: torch.device, heavy: bool) -> int:
    """Return the number of programs that a GPU runs at once."""
    return programs_at_once(tile, architecture(device), heavy) * multiprocessors(device)


def layout(tile: Tile, rows: int, V: int, device: torch.device, heavy: bool = False) -> tuple[int, int, int, int]:
    """Return (row blocks, vocabulary tiles, vocabulary parts, columns of a part)."""
    blocks, tiles = triton.cdiv(rows, tile.block_t), triton.cdiv(V, tile.block_v)
    parts = choose_parts(blocks, tiles, slots_of(tile, device, heavy))
    part_size = triton.cdiv(tiles, parts) * tile.block_v
    return blocks, tiles, triton.cdiv(V, part_size), part_size


@triton.jit
def scale_bias_cap(
    acc, bias, scale, inverse_softcap, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return u of a product: scale (unless in the slope), bias, and tanh under a softcap."""
    if HAS_SCALE:
        acc = acc * scale
    if HAS_BIAS:
        acc = acc + bias
    if HAS_SOFTCAP:
        acc = 2 / (1 + tl.exp2(acc * (-2 * LOG2_E * inverse_softcap))) - 1  # tanh(acc / softcap)
    return acc


@triton.jit
def product_tile(
    hidden_ptr, weight_ptr, bias_ptr, first_t, first_v, T, V, H, scale, inverse_softcap,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_V: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return u [BLOCK_T, BLOCK_V] from row `first_t` and column `first_v`, -inf beyond V.

    hidden [T, H], weight [V, H], bias [V].

    Rows beyond T and columns beyond V read the last one instead, and descriptors read zeros: no load of the inner loop
    needs a mask.
    """
    acc_tv = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    depth_h = tl.arange(0, BLOCK_H)
    cols_v = first_v + tl.arange(0, BLOCK_V)
    in_v = cols_v < V
    cols_v = cols_v if EVEN_V else tl.minimum(cols_v, V - 1)
    if DESCRIPTORS:
        for start in range(0, H, BLOCK_H):
            h_th, w_vh = hidden_ptr.load([first_t, start]), weight_ptr.load([first_v, start])
            acc_tv = tl.dot(h_th, w_vh.T, acc_tv, input_precision="ieee")
    else:
        rows_t = tl.minimum(first_t + tl.arange(0, BLOCK_T), T - 1)
        hidden_th = hidden_ptr + rows_t.to(tl.int64)[:, None] * H + depth_h[None, :]
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
    u_tv = scale_bias_cap(acc_tv, bias, scale, inverse_softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP)
    return u_tv if EVEN_V else tl.where(in_v[None, :], u_tv, float("-inf"))


def operand_args(hidden_TH: Tensor, weight_VH: Tensor, tile: Tile) -> tuple[Any, Any]:
    """Return the kernel arguments of the operands: the tensors, or their tensor descriptors."""
    if not tile.descriptors:
        return hidden_TH, weight_VH
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden_TH, [tile.block_t, tile.block_h]),
        TensorDescriptor.from_tensor(weight_VH, [tile.block_v, tile.block_h]),
    )


def scale_in_slope(bias_V: Tensor | None, options: tuple[float, float, float]) -> bool:
    """Return whether the slope can include the scale: no bias or softcap between them, and a positive slope."""
    return bias_V is None and not options[1] and options[0] > 0


def scalar_args(bias_V: Tensor | None, options: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return (scale, 1 / softcap, slope), the scalar kernel arguments."""
    scale, softcap, temperature = options
    slope = (scale if scale_in_slope(bias_V, options) else softcap or 1.0) / temperature
    return scale, 1 / softcap if softcap else 0.0, slope


def flags_of(bias_V: Tensor | None, options: tuple[float, float, float]) -> dict[str, bool]:
    has_scale = options[0] != 1 and not scale_in_slope(bias_V, options)
    return dict(HAS_BIAS=bias_V is not None, HAS_SCALE=has_scale, HAS_SOFTCAP=options[1] != 0)


def is_heavy(flags: dict[str, bool], V: int, H: int, entropy: bool) -> bool:
    """Return whether the epilogue does more than one thing besides exponentials."""
    return flags["HAS_BIAS"] + flags["HAS_SOFTCAP"] + entropy + (V % 128 != 0) + (H % 64 != 0) > 1


def shape_of(tile: Tile, V: int, H: int, device: torch.device) -> dict[str, Any]:
    capability = architecture(device)
    registers = 65536 // (32 * tile.num_warps * programs_at_once(tile, capability)) // 8 * 8
    return dict(
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_H=tile.block_h,
        EVEN_H=H % tile.block_h == 0,
        EVEN_V=V % tile.block_v == 0,
        DESCRIPTORS=tile.descriptors,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=registers if capability // 10 == 9 and registers < 256 else None,
        **LAUNCH,
    )


def operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return contiguous tensors, hidden and weight in hidden's type.

    Triton's interpreter multiplies bf16 bit patterns, so under it bf16 becomes fp32.
    """
    weight = weight.to(hidden.dtype)
    if hidden.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        hidden, weight = hidden.float(), weight.float()
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def add_matmul(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha a @ b with out in fp32; one launch if torch supports it."""
    if a.dtype == torch.float32:
        out.addmm_(a, b, alpha=alpha)
    elif adds_to_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)
    else:
        out.add_(matmul(a, b), alpha=alpha)


@functools.cache
def adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds a product of 16-bit operands to an fp32 sum here: 2.13 on CUDA, no CPU."""
    few, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, few, few, out_dtype=torch.float32, alpha=0.5, out=out)
    except (TypeError, RuntimeError):
        return False
    return True


@functools.cache
def architecture(device: torch.device) -> int:
    """Return compute capability x 10 (80-89: Ampere, Ada; 90: Hopper; 100, 120: Blackwell); 90 without a GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
