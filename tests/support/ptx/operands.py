"""Operands of an instruction as functions of a warp, and the table of what makes an instruction executable."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.support.ptx.machine import DESCRIPTORS, SHARED_BASE, Code, Gang, Step, Warp
from tests.support.ptx.program import Instruction, Program
from tests.support.ptx.values import EVERY_LANE, UNSIGNED, NotModelled, number

Source = Callable[[Warp | Gang], np.ndarray]  # [32] of a warp, [warps, 32] of a gang; constants are [32] for either
Put = Callable[[Warp | Gang, np.ndarray], None]
# by the first word of the opcode; and whether warp by warp
MAKERS: dict[str, tuple[Callable[[Instruction], Step], bool]] = {}


def makes(*names: str, each: bool = False) -> Callable[[Callable[[Instruction], Step]], Callable[[Instruction], Step]]:
    """Decorator: the function turns such instructions into steps: of a gang, or of `each` warp."""

    def register(maker: Callable[[Instruction], Step]) -> Callable[[Instruction], Step]:
        MAKERS.update(dict.fromkeys(names, (maker, each)))
        return maker

    return register


def compile_program(program: Program) -> list[Code]:
    """Raises `NotModelled` for an instruction that is not."""
    code = []
    for instruction in program.code:
        if instruction.name not in MAKERS:
            raise NotModelled(instruction.text)
        maker, each = MAKERS[instruction.name]
        code.append(Code(maker(instruction), each))
    return code


def source(token: str, width: int) -> Source:
    """32 words of so many bits."""
    if token[0] in "-0123456789":
        constant = np.full(32, number(token, width), UNSIGNED[width])
    elif token == "global_smem":
        constant = np.full(32, SHARED_BASE, UNSIGNED[width])
    elif match := re.fullmatch(r"\w+_param_(\d+)", token):
        constant = np.full(32, DESCRIPTORS + int(match[1]), UNSIGNED[width])
    elif "." in token or token in ("%laneid", "%warpid"):
        return lambda warp: warp.special(token)
    else:
        return lambda warp: warp.registers[token]
    return lambda warp: constant


def predicate(token: str) -> Source:
    """32 bools."""
    if token in ("-1", "1", "true", "0", "false"):
        constant = np.full(32, token not in ("0", "false"))
        return lambda warp: constant
    if token[0] == "!":
        return lambda warp: ~warp.registers[token[1:]]
    return lambda warp: warp.registers[token]


def address(token: str) -> Source:
    """[base + offset] as int64."""
    base, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", token).groups()  # type: ignore[union-attr]
    distance = int(offset or 0)
    if base == "global_smem":
        constant = np.full(32, SHARED_BASE + distance, np.int64)
        return lambda warp: constant
    return lambda warp: warp.registers[base].astype(np.int64) + distance


def mask_of(instruction: Instruction) -> Source:
    """The lanes that an instruction's predicate lets through."""
    name = instruction.predicate
    if name is None:
        return lambda warp: EVERY_LANE
    if instruction.negated:
        return lambda warp: ~warp.registers[name]
    return lambda warp: warp.registers[name]


def put_into(instruction: Instruction, token: str) -> Put:
    """Writes a register in the lanes that the predicate lets through."""
    if token == "_":
        return lambda warp, value: None
    if instruction.predicate is None:
        return lambda warp, value: warp.registers.__setitem__(token, value)
    mask = mask_of(instruction)

    def put(warp: Warp, value: np.ndarray) -> None:
        warp.registers[token] = np.where(mask(warp), value, warp.registers.get(token, value))

    return put


def register_width(token: str) -> int:
    """By the names that LLVM gives: %rd, %rs, %r."""
    return 64 if token.startswith("%rd") else 16 if token.startswith("%rs") else 32


def computes(instruction: Instruction, function: Callable[..., np.ndarray], *sources: Source) -> Step:
    """The first operand becomes `function` of the sources."""
    put = put_into(instruction, instruction.operands[0])

    if len(sources) == 1:
        (only,) = sources
        return lambda gang: put(gang, function(only(gang)))
    if len(sources) == 2:
        first, second = sources
        return lambda gang: put(gang, function(first(gang), second(gang)))
    return lambda gang: put(gang, function(*(get(gang) for get in sources)))
