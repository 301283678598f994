"""Instructions that stay within a warp's registers: arithmetic, comparison, conversion, shuffles."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.ptx.machine import Gang, Step
from tests.support.ptx.operands import computes, makes, predicate, put_into, source
from tests.support.ptx.program import Instruction, elements
from tests.support.ptx.values import (
    FLOATS,
    LANES,
    SIGNED,
    UNSIGNED,
    NotModelled,
    flushed,
    from_bits,
    to_bf16,
    to_bits,
    width_of,
)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c; of float32 rounded once, for which float64 has room but for rare ties."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


FLOAT = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "fma": fused,
    "neg": operator.neg, "abs": np.abs, "min": np.fmin, "max": np.fmax,
}  # fmt: skip
INTEGER = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "mad": lambda a, b, c: a * b + c,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}  # fmt: skip
REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@makes("add", "sub", "mul", "div", "mad", "fma", "neg", "abs", "min", "max", "rem")
def arithmetic(instruction: Instruction) -> Step:
    name, parts, kind, operands = instruction.name, instruction.parts, instruction.kind, instruction.operands[1:]
    width = width_of(kind)
    if kind == "bf16x2" and name == "neg":
        return computes(instruction, lambda x: x ^ np.uint32(0x80008000), source(operands[0], 32))
    if kind in ("bf16", "f16") and parts[-2] == "f32":
        return _mixed(instruction)
    if kind[0] == "f":
        return _of_floats(instruction)
    if "wide" in parts:
        return _wide(instruction)
    if "hi" in parts:
        return computes(instruction, lambda a, b: _high(a, b, kind), *(source(x, width) for x in operands))
    sources = [source(x, width) for x in operands]
    if name == "neg":
        return computes(instruction, lambda a: to_bits(-from_bits(a, "s" + kind[1:]), width), *sources)
    if name in ("div", "rem"):
        divide = _quotient if name == "div" else _remainder
        return computes(
            instruction, lambda a, b: to_bits(divide(from_bits(a, kind), from_bits(b, kind)), width), *sources
        )
    if name not in INTEGER:
        raise NotModelled(instruction.text)
    function = INTEGER[name]
    return computes(instruction, lambda *xs: to_bits(function(*(from_bits(x, kind) for x in xs)), width), *sources)


def _high(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """The upper half of a product; of 64 bits in Python's integers."""
    width = width_of(kind)
    wide: Any = (SIGNED if kind[0] == "s" else UNSIGNED)[64] if width < 64 else object
    product = from_bits(a, kind).astype(wide) * from_bits(b, kind).astype(wide)
    return ((product >> width) & ((1 << width) - 1)).astype(UNSIGNED[width])


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards 0, as C has it."""
    signs = np.sign(a) * np.sign(b) if a.dtype.kind == "i" else 1
    return (np.abs(a) // np.abs(b) * signs).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _quotient(a, b) * b


def _of_floats(instruction: Instruction) -> Step:
    """Also two float32 to a register (f32x2, sm_100 and newer), and the largest of three."""
    kind, parts = instruction.kind, instruction.parts
    width, paired = width_of(kind), kind == "f32x2"
    function: Callable[..., np.ndarray] = FLOAT[instruction.name]
    if instruction.name == "max" and "NaN" in parts:
        function = np.maximum
    if instruction.name in ("min", "max") and len(instruction.operands) == 4:
        of_two = function
        function = lambda a, b, c: of_two(of_two(a, b), c)  # noqa: E731
    flush = flushed if "ftz" in parts else lambda x: x

    def read(bits: np.ndarray) -> np.ndarray:
        return flush(np.ascontiguousarray(bits).view(np.float32) if paired else from_bits(bits, kind))

    sources = [source(x, width) for x in instruction.operands[1:]]
    return computes(instruction, lambda *xs: to_bits(flush(function(*map(read, xs))), width), *sources)


def _mixed(instruction: Instruction) -> Step:
    """A 16-bit operand and an fp32 one (sm_100 and newer)."""
    kind, operands = instruction.kind, instruction.operands[1:]
    widths = (16, 16, 32) if instruction.name == "fma" else (16, 32)

    def compute(*bits: np.ndarray) -> np.ndarray:
        *narrow, last = bits
        function = FLOAT[instruction.name]
        return to_bits(function(*(from_bits(x, kind).astype(np.float32) for x in narrow), from_bits(last, "f32")), 32)

    return computes(instruction, compute, *(source(x, w) for x, w in zip(operands, widths, strict=True)))


def _wide(instruction: Instruction) -> Step:
    """A product of twice the width, and with `mad` a sum of that width."""
    kind, width, operands = instruction.kind, width_of(instruction.kind), instruction.operands[1:]
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width]

    def compute(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        product = to_bits(from_bits(a, kind).astype(wide) * from_bits(b, kind).astype(wide), 2 * width)
        return product + c[0] if c else product

    sources = [source(x, width) for x in operands[:2]] + [source(x, 2 * width) for x in operands[2:]]
    return computes(instruction, compute, *sources)


@makes("and", "or", "xor", "not")
def logic(instruction: Instruction) -> Step:
    if instruction.kind == "pred":
        return computes(instruction, LOGICAL[instruction.name], *map(predicate, instruction.operands[1:]))
    width = width_of(instruction.kind)
    return computes(instruction, BITWISE[instruction.name], *(source(x, width) for x in instruction.operands[1:]))


@makes("shl", "shr")
def shift(instruction: Instruction) -> Step:
    """By as many bits as there are or more, nothing of the number is left, or its sign."""
    kind, width = instruction.kind, width_of(instruction.kind)

    def compute(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        some = np.minimum(count, width - 1)
        if kind[0] == "s":
            return to_bits(from_bits(a, kind) >> some.astype(SIGNED[width]), width)
        some = some.astype(UNSIGNED[width])
        return np.where(count >= width, UNSIGNED[width](0), a << some if instruction.name == "shl" else a >> some)

    return computes(instruction, compute, source(instruction.operands[1], width), source(instruction.operands[2], 32))


@makes("shf")
def funnel_shift(instruction: Instruction) -> Step:
    """32 bits out of 64."""
    left, wrap = "l" in instruction.parts, "wrap" in instruction.parts

    def compute(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return computes(instruction, compute, *(source(x, 32) for x in instruction.operands[1:]))


@makes("lop3")
def three_way_logic(instruction: Instruction) -> Step:
    """Bit by bit what a table of eight says of three bits."""
    table = int(instruction.operands[4], 0)

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        found = np.zeros_like(a & b & c)
        for i in range(8):
            if table >> i & 1:
                found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return found

    return computes(instruction, compute, *(source(x, 32) for x in instruction.operands[1:4]))


@makes("bfe")
def extract_bits(instruction: Instruction) -> Step:
    kind, width = instruction.kind, width_of(instruction.kind)

    def compute(a: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
        first, count = (first & 0xFF).astype(np.uint64), (count & 0xFF).astype(np.uint64)
        bits = (a.astype(np.uint64) >> first) & ((np.uint64(1) << count) - np.uint64(1))
        if kind[0] == "s":
            above = np.uint64(64) - count
            return (
                ((bits << above).view(np.int64) >> above.astype(np.int64)).astype(SIGNED[width]).view(UNSIGNED[width])
            )
        return bits.astype(UNSIGNED[width])

    of = instruction.operands
    return computes(instruction, compute, source(of[1], width), source(of[2], 32), source(of[3], 32))


@makes("popc")
def count_bits(instruction: Instruction) -> Step:
    def compute(a: np.ndarray) -> np.ndarray:
        return np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)

    return computes(instruction, compute, source(instruction.operands[1], 32))


@makes("prmt")
def permute_bytes(instruction: Instruction) -> Step:
    """Four of the eight bytes of two words, or the sign of one."""

    def compute(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
        a, b, choice = np.broadcast_arrays(a, b, choice)
        given = np.stack([(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)])
        found = np.zeros_like(a)
        for i in range(4):
            which = (choice >> np.uint32(4 * i)) & np.uint32(15)
            byte = np.take_along_axis(given, (which & 7)[None].astype(np.int64), 0)[0]
            sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
            found |= np.where(which & 8, sign, byte) << np.uint32(8 * i)
        return found

    return computes(instruction, compute, *(source(x, 32) for x in instruction.operands[1:]))


@makes("setp")
def compare(instruction: Instruction) -> Step:
    """Of floats: `eq` and its like are false with a NaN, `equ` and its like true."""
    how, kind, width = instruction.parts[1], instruction.kind, width_of(instruction.kind)

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = from_bits(a, kind), from_bits(b, kind)
        if kind[0] != "f":
            return COMPARE[UNSIGNED_COMPARE.get(how, how)](a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if how in ("nan", "num"):
            return unordered if how == "nan" else ~unordered
        return COMPARE[how](a, b) & ~unordered if how in COMPARE else COMPARE[how[:-1]](a, b) | unordered

    return computes(instruction, compute, *(source(x, width) for x in instruction.operands[1:]))


@makes("selp")
def select(instruction: Instruction) -> Step:
    width, (_, a, b, which) = width_of(instruction.kind), instruction.operands
    return computes(
        instruction, lambda x, y, p: np.where(p, x, y), source(a, width), source(b, width), predicate(which)
    )


@makes("mov")
def move(instruction: Instruction) -> Step:
    """Also {a, b} from one register, and one from {a, b}."""
    to, of = instruction.operands
    if instruction.kind == "pred":
        return computes(instruction, lambda x: x, predicate(of))
    width = width_of(instruction.kind)
    targets, origins = elements(to), elements(of)
    if len(targets) > 1:
        part, get = width // len(targets), source(of, width)
        puts = [put_into(instruction, target) for target in targets]

        def unpack(gang: Gang) -> None:
            bits = get(gang)
            for i, put in enumerate(puts):
                put(gang, (bits >> UNSIGNED[width](i * part)).astype(UNSIGNED[part]))

        return unpack
    if len(origins) > 1:
        part = width // len(origins)

        def pack(*words: np.ndarray) -> np.ndarray:
            bits = words[0].astype(UNSIGNED[width])
            for i, word in enumerate(words[1:], 1):
                bits = bits | word.astype(UNSIGNED[width]) << UNSIGNED[width](i * part)
            return bits

        return computes(instruction, pack, *(source(x, part) for x in origins))
    return computes(instruction, lambda x: x, source(of, width))


@makes("cvta")
def convert_address(instruction: Instruction) -> Step:
    return computes(instruction, lambda x: x, source(instruction.operands[1], 64))


@makes("cvt")
def convert(instruction: Instruction) -> Step:
    to, of = instruction.parts[-2:]
    if to in ("bf16x2", "f16x2"):

        def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            return _narrow(low, to).astype(np.uint32) | _narrow(high, to).astype(np.uint32) << np.uint32(16)

        return computes(instruction, pack, *(source(x, 32) for x in instruction.operands[1:]))
    width = width_of(to)
    whole = (SIGNED if to[0] == "s" else UNSIGNED)[width]

    def compute(bits: np.ndarray) -> np.ndarray:
        value = from_bits(bits, of)
        if to == "bf16":
            return to_bf16(value)
        if to[0] == "f":
            return to_bits(value.astype(FLOATS[width]), width)
        if value.dtype.kind == "f":
            rounding = np.rint if "rni" in instruction.parts else np.floor if "rmi" in instruction.parts else np.trunc
            limits = np.iinfo(whole)
            value = np.clip(np.nan_to_num(rounding(value)), limits.min, limits.max)
        return to_bits(value.astype(whole), width)

    return computes(instruction, compute, source(instruction.operands[1], width_of(of)))


def _narrow(bits: np.ndarray, to: str) -> np.ndarray:
    """float32 as 16 bits."""
    value = bits.view(np.float32)
    return to_bf16(value) if to[0] == "b" else value.astype(np.float16).view(np.uint16)


@makes(*FUNCTIONS)
def special_function(instruction: Instruction) -> Step:
    """Exact to float32, where the hardware's `.approx` is off by an ulp or two."""
    function, flush = FUNCTIONS[instruction.name], flushed if "ftz" in instruction.parts else lambda x: x

    def compute(bits: np.ndarray) -> np.ndarray:
        return to_bits(flush(function(flush(bits.view(np.float32)).astype(np.float64)).astype(np.float32)), 32)

    return computes(instruction, compute, source(instruction.operands[1], 32))


@makes("shfl")
def shuffle(instruction: Instruction) -> Step:
    """Another lane's word; a lane out of range keeps its own."""
    how = instruction.parts[2]
    target, _, valid = instruction.operands[0].partition("|")
    get, other, limits = (source(x, 32) for x in instruction.operands[1:4])
    put, put_valid = put_into(instruction, target), put_into(instruction, valid or "_")

    def step(gang: Gang) -> None:
        by, limit = other(gang).astype(np.int64) & 31, limits(gang).astype(np.int64)
        segment, clamp = (limit >> 8) & 31, limit & 31
        low = LANES & segment
        last = low | (clamp & ~segment & 31)
        lane = {"bfly": LANES ^ by, "up": LANES - by, "down": LANES + by, "idx": low | (by & ~segment & 31)}[how]
        inside = lane >= last if how == "up" else lane <= last
        put(gang, np.take_along_axis(gang.spread(get(gang)), gang.spread(np.where(inside, lane, LANES)), -1))
        put_valid(gang, inside)

    return step


@makes("redux")
def reduce_warp(instruction: Instruction) -> Step:
    function, kind = REDUCE[instruction.parts[2]], instruction.kind

    def compute(bits: np.ndarray) -> np.ndarray:
        value = from_bits(bits, kind)
        return to_bits(np.repeat(function.reduce(value, -1, keepdims=True), 32, -1).astype(value.dtype), 32)

    return computes(instruction, compute, source(instruction.operands[1], 32))


@makes("vote")
def vote(instruction: Instruction) -> Step:
    def compute(p: np.ndarray) -> np.ndarray:
        if instruction.parts[2] == "ballot":
            found = (p.astype(np.uint32) << LANES.astype(np.uint32)).sum(-1, keepdims=True, dtype=np.uint32)
        else:
            found = (np.all if instruction.parts[2] == "all" else np.any)(p, -1, keepdims=True)
        return np.repeat(found, 32, -1)

    return computes(instruction, compute, predicate(instruction.operands[1]))


@makes("elect")
def elect(instruction: Instruction) -> Step:
    word, chosen = instruction.operands[0].split("|")

    def step(gang: Gang) -> None:
        gang.registers[word] = np.zeros(32, np.uint32)
        gang.registers[chosen] = LANES == 0

    return step
