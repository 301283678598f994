"""Matrix instructions: mma.sync of a warp, wgmma of four warps with operands in shared memory.

Products of 16-bit numbers are summed in float64 and rounded to float32 once an instruction; the hardware truncates a
little.
"""

from __future__ import annotations

import re

import numpy as np

from tests.support.ptx.machine import NOT_YET, Gang, Step, Warp
from tests.support.ptx.memory import swizzled
from tests.support.ptx.operands import makes, predicate, source
from tests.support.ptx.program import Instruction, elements
from tests.support.ptx.values import LANES, NotModelled, from_bits, halves, to_bits

GROUP, PAIR = LANES // 4, LANES % 4 * 2  # of a lane: its row of 8, and the first of its two columns


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[..., 16, 16] of four registers [..., 32]."""
    matrix = np.empty((*registers[0].shape[:-1], 16, 16))
    for i, register in enumerate(registers):
        rows, columns = GROUP + 8 * (i % 2), PAIR + 8 * (i // 2)
        matrix[..., rows, columns], matrix[..., rows, columns + 1] = halves(register, kind)
    return matrix


def fragment_b(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[..., 16, 8] of two registers [..., 32]."""
    matrix = np.empty((*registers[0].shape[:-1], 16, 8))
    for i, register in enumerate(registers):
        matrix[..., PAIR + 8 * i, GROUP], matrix[..., PAIR + 8 * i + 1, GROUP] = halves(register, kind)
    return matrix


@makes("mma")
def warp_product(instruction: Instruction) -> Step:
    """d = a b + c, 16 x 8 x 16."""
    shape = re.search(r"m16n8k16\.row\.col\.f32\.(b?f16)\.b?f16\.f32", ".".join(instruction.parts))
    if shape is None:
        raise NotModelled(instruction.text)
    kind = shape[1]
    d, a, b, c = map(elements, instruction.operands)
    added = [source(x, 32) for x in c]

    def step(gang: Gang) -> None:
        product = fragment_a([gang.registers[x] for x in a], kind) @ fragment_b([gang.registers[x] for x in b], kind)
        sums = [from_bits(get(gang), "f32").astype(np.float64) for get in added]
        for i, (name, before) in enumerate(zip(d, sums, strict=True)):
            part = product[..., GROUP + 8 * (i // 2), PAIR + i % 2]
            gang.registers[name] = to_bits((part + before).astype(np.float32), 32)

    return step


@makes("wgmma")
def group_product(instruction: Instruction) -> Step:
    """d = a b + d, 64 x N x 16: a warp's own 16 rows. The operands may not be written until the product was waited
    for."""
    verb, text = instruction.parts[1], instruction.text
    if verb == "fence":
        return lambda gang: None
    if verb == "commit_group":

        def commit(gang: Gang) -> None:
            for warp in gang.warps:
                warp.operand_groups.append(warp.operands)
                warp.operands = []

        return commit
    if verb == "wait_group":
        left = int(re.search(r"aligned\s+(\d+)", text)[1])  # type: ignore[index]

        def wait(gang: Gang) -> None:
            for warp in gang.warps:
                while len(warp.operand_groups) > left:
                    for places in warp.operand_groups.pop(0):
                        gang.block.read_at[warp.index, places] = warp.clock[warp.index]

        return wait
    shape = re.search(r"m64n(\d+)k16\.f32\.(b?f16)\.b?f16", ".".join(instruction.parts))
    if shape is None:
        raise NotModelled(text)
    columns, kind = int(shape[1]), shape[2]
    d, a, b, adds, *flags = instruction.operands
    names, in_registers = elements(d), a.startswith("{")
    if flags[:2] != ["1", "1"] or set(flags[2:]) != {"0"}:
        raise NotModelled(f"a negated or transposed operand: {text}")
    keeps, b_descriptor = predicate(adds), source(b, 64)
    a_names, a_descriptor = elements(a), None if in_registers else source(a, 64)

    def step(gang: Gang) -> None:
        parts = []
        for group in np.unique(gang.rows // 4):  # four warps are a group: the same operands, 16 rows each
            warps = [gang.block.warps[row] for row in gang.rows[gang.rows // 4 == group]]
            if a_descriptor is None:
                left = np.concatenate([fragment_a([warp.registers[x] for x in a_names], kind) for warp in warps])
            else:
                left = np.concatenate([
                    _operand([warp], int(a_descriptor(warp)[0]), np.arange(16) + 16 * (warp.index % 4), kind, text)
                    for warp in warps
                ])  # fmt: skip
            right = int(b_descriptor(warps[0])[0])
            product = left @ _operand(warps, right, np.arange(columns), kind, text).T
            parts.append(product.reshape(len(warps), 16, columns))
        product, adds_up = np.concatenate(parts), gang.spread(keeps(gang))[:, :1]
        for i, name in enumerate(names):
            part = product[:, GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + PAIR + i % 2]
            if adds_up.any():
                part = part + np.where(adds_up, from_bits(gang.registers[name], "f32"), 0)
            gang.registers[name] = to_bits(part.astype(np.float32), 32)

    return step


def _operand(warps: list[Warp], descriptor: int, rows: np.ndarray, kind: str, text: str) -> np.ndarray:
    """[rows, 16] from swizzled shared memory: 8 rows of a pitch to a group, groups at the descriptor's stride. These
    warps read it until they have waited for the product."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62 & 3
    if mode == 0:
        raise NotModelled(f"an operand without swizzle: {text}")
    pitch, bits = {1: (128, 7), 2: (64, 3), 3: (32, 1)}[mode]
    at = start + (rows // 8 * stride + rows % 8 * pitch)[:, None] + np.arange(0, 32, 2)
    at = swizzled(at, bits).reshape(-1).astype(np.int64)
    block = warps[0].block
    places = block.places(at, 2, np.ones(len(at), bool), text)
    for warp in warps:
        block.check_read(warp.index, places, text)
        block.read_at[warp.index, places] = NOT_YET
        warp.operands.append(places)
    return from_bits(block.shared[places].view(np.uint16), kind).astype(np.float64).reshape(len(rows), 16)
