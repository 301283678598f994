"""Registers hold bits; these are the numbers they stand for. A warp's register is an array of 32 unsigned words."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
LANES = np.arange(32)
EVERY_LANE = np.ones(32, bool)
SMALLEST_NORMAL = np.float32(2.0**-126)


class Fault(Exception):
    """The program did what a GPU would punish, or hide: a race, an access out of bounds, a deadlock."""


class NotModelled(Exception):
    """An instruction that this executor does not know."""


@functools.cache
def width_of(kind: str) -> int:
    """Bits of a PTX type such as s32, bf16x2 or b64."""
    number, _, count = re.sub(r"^[a-z]+", "", kind).partition("x")
    return int(number) * int(count or 1)


@functools.cache
def _types(kind: str) -> tuple[Any, Any]:
    """numpy's for the bits and for the numbers of a PTX type."""
    width = width_of(kind)
    bits = UNSIGNED[width]
    return np.dtype(bits), np.dtype(SIGNED[width] if kind[0] == "s" else FLOATS[width] if kind[0] == "f" else bits)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of a PTX type; bf16 as float32."""
    if kind == "bf16":
        return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    unsigned, numbers = _types(kind)
    if bits.dtype is not unsigned:
        bits = bits.astype(unsigned)
    return bits.view(numbers)


def to_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    return numbers.view(UNSIGNED[width])


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


def flushed(numbers: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros (`.ftz`)."""
    return np.where(np.abs(numbers) < SMALLEST_NORMAL, np.copysign(np.float32(0), numbers), numbers).astype(np.float32)


def halves(register: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers of 16 bits in each word, float64."""
    both = (
        from_bits(np.ascontiguousarray(register).view(np.uint16), kind).astype(np.float64).reshape(*register.shape, 2)
    )
    return both[..., 0], both[..., 1]


def number(token: str, width: int) -> int:
    """An immediate as bits."""
    if token[:2].lower() in ("0f", "0d"):
        value = int(token[2:], 16)
    elif token in ("true", "false"):
        value = int(token == "true")
    else:
        value = int(token, 0)
    return value & ((1 << width) - 1)
