"""Instructions that touch memory or wait: loads, stores, asynchronous copies and their barriers, branches."""

from __future__ import annotations

import numpy as np

from tests.support.ptx.machine import Arrive, Block, Descriptor, Gang, Jump, MBarrier, Signal, Step, Warp
from tests.support.ptx.operands import address, makes, mask_of, put_into, register_width, source
from tests.support.ptx.program import Instruction, elements, split
from tests.support.ptx.values import SIGNED, UNSIGNED, Fault, NotModelled, width_of


def _widened(word: np.ndarray, kind: str, width: int) -> np.ndarray:
    """As many bits as the register has: a signed number keeps its sign."""
    if kind[0] == "s" and width > width_of(kind):
        return word.view(SIGNED[width_of(kind)]).astype(SIGNED[width]).view(UNSIGNED[width])
    return word.astype(UNSIGNED[width])


@makes("ld")
def load(instruction: Instruction) -> Step:
    if instruction.parts[1] == "param":
        return _load_parameter(instruction)
    kind, text, mask, at = instruction.kind, instruction.text, mask_of(instruction), address(instruction.operands[1])
    targets = elements(instruction.operands[0])
    width = width_of(kind)
    shared = _is_shared(instruction)
    puts = [put_into(instruction, target) for target in targets]

    def step(gang: Gang) -> None:
        size, where, lanes = (
            width // 8 * len(targets),
            gang.spread(at(gang)).reshape(-1),
            gang.spread(mask(gang)).reshape(-1),
        )
        if shared:
            found = gang.block.load(np.repeat(gang.rows, 32), where, size, lanes, text)
        else:
            found = gang.block.memory.load(where, size, lanes, text)
        words = found.view(UNSIGNED[width])
        for i, (put, target) in enumerate(zip(puts, targets, strict=True)):
            put(gang, _widened(words[:, i].reshape(-1, 32), kind, max(width, register_width(target))))

    return step


def _is_shared(instruction: Instruction) -> bool:
    spaces = [part.split("::")[0] for part in instruction.parts]
    if not {"global", "shared"} & set(spaces):
        raise NotModelled(instruction.text)
    return "shared" in spaces


def _load_parameter(instruction: Instruction) -> Step:
    kind, target = instruction.kind, instruction.operands[0]
    put, width, name = put_into(instruction, target), register_width(target), instruction.operands[1].strip("[] ")

    def step(gang: Gang) -> None:
        value = gang.block.parameters[name] & ((1 << width_of(kind)) - 1)
        if kind[0] == "s" and value >> (width_of(kind) - 1):
            value -= 1 << width_of(kind)
        put(gang, np.full(32, value & ((1 << width) - 1), UNSIGNED[width]))

    return step


@makes("st")
def store(instruction: Instruction) -> Step:
    kind, text, mask, at = instruction.kind, instruction.text, mask_of(instruction), address(instruction.operands[0])
    words = [source(x, width_of(kind)) for x in elements(instruction.operands[1])]
    shared = _is_shared(instruction)

    def step(gang: Gang) -> None:
        data = np.stack([gang.spread(get(gang)).astype(UNSIGNED[width_of(kind)], copy=False) for get in words], -1)
        data = data.reshape(-1, len(words)).view(np.uint8)
        where, lanes = gang.spread(at(gang)).reshape(-1), gang.spread(mask(gang)).reshape(-1)
        if shared:
            gang.block.store(np.repeat(gang.rows, 32), where, data, lanes, text)
        else:
            gang.block.memory.store(where, data, lanes, text)

    return step


@makes("ldmatrix", "stmatrix", each=True)
def matrix_rows(instruction: Instruction) -> Step:
    """Matrices of 8 x 8 numbers of 16 bits: a lane names each row, and holds two neighbours of it."""
    loads, text = instruction.name == "ldmatrix", instruction.text
    count = next(int(part[1:]) for part in instruction.parts if part in ("x1", "x2", "x4"))
    registers, at = instruction.operands if loads else instruction.operands[::-1]
    names, where, transposed = elements(registers), address(at), "trans" in instruction.parts

    def step(warp: Warp) -> None:
        rows, every = where(warp)[: 8 * count], np.ones(8 * count, bool)
        if loads:
            matrices = (
                warp.block.load(np.full(8 * count, warp.index), rows, 16, every, text)
                .view(np.uint16)
                .reshape(count, 8, 8)
            )
            for name, matrix in zip(names, matrices, strict=True):
                warp.registers[name] = (
                    np.ascontiguousarray(matrix.T if transposed else matrix).reshape(-1).view(np.uint32).copy()
                )
            return
        matrices = np.stack([warp.registers[name].view(np.uint16).reshape(8, 8) for name in names])
        matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1) if transposed else matrices)
        warp.block.store(
            np.full(8 * count, warp.index), rows, matrices.reshape(8 * count, 8).view(np.uint8), every, text
        )

    return step


# ---- asynchronous copies ----


@makes("cp")
def copy(instruction: Instruction) -> Step:
    """What is copied lands when its group is waited for, as late as can be."""
    parts, operands, text = instruction.parts, instruction.operands, instruction.text
    if "commit_group" in parts:

        def commit(gang: Gang) -> None:
            for warp in gang.warps:
                warp.copy_groups.append(warp.copies)
                warp.copies = []

        return commit
    if "wait_group" in parts or "wait_all" in parts:
        left = int(operands[0]) if operands else 0

        def wait(gang: Gang) -> None:
            for warp in gang.warps:
                while len(warp.copy_groups) > left:
                    for places, data in warp.copy_groups.pop(0):
                        gang.block.land(warp.index, places, data)

        return wait
    if "bulk" in parts:
        return _bulk_copy(instruction)
    to, of, size, mask = address(operands[0]), address(operands[1]), int(operands[2], 0), mask_of(instruction)
    wanted = source(operands[3], 32) if len(operands) > 3 else lambda warp: np.full(32, size, np.uint32)

    def step(gang: Gang) -> None:
        lanes, take = gang.spread(mask(gang)).reshape(-1), gang.spread(wanted(gang)).reshape(-1)
        if not ((take[lanes] == 0) | (take[lanes] == size)).all():
            raise NotModelled(f"part of a copy: {text}")
        if not lanes.any():
            return
        data = gang.block.memory.load(gang.spread(of(gang)).reshape(-1), size, lanes & (take > 0), text)[lanes].reshape(
            -1
        )
        owners = np.repeat(gang.rows, 32)
        places, owners = gang.block.promise(owners, gang.spread(to(gang)).reshape(-1), size, lanes, text), owners[lanes]
        for warp in gang.warps:
            own = np.repeat(owners == warp.index, size)
            warp.copies.append((places[own], data[own]))

    return step


def _bulk_copy(instruction: Instruction) -> Step:
    """The copy engine: a box of a tensor, zeros beyond its edges, swizzled; an mbarrier counts its bytes."""
    if not {"tensor", "mbarrier::complete_tx::bytes"} <= set(instruction.parts):
        raise NotModelled(instruction.text)
    to, bar, mask = address(instruction.operands[0]), address(instruction.operands[2]), mask_of(instruction)
    descriptor, corner = split(instruction.operands[1].strip("[] "))
    which, corners = source(descriptor, 64), [source(x, 32) for x in elements(corner)]

    def step(gang: Gang) -> None:
        for warp in gang.warps:
            for lane in np.flatnonzero(mask(warp)):
                first = [int(get(warp).view(np.int32)[lane]) for get in corners]
                tensor = warp.block.descriptors[int(which(warp)[lane])]
                _bring(warp, tensor, int(to(warp)[lane]), first, int(bar(warp)[lane]), instruction.text)

    return step


def swizzled(at: np.ndarray, bits: int) -> np.ndarray:
    """Where a byte of shared memory is under a swizzle of so many rows: address bits 4 to 6 are mixed with 7 to 9."""
    return at ^ ((at >> 7 & bits) << 4)


def _bring(warp: Warp, tensor: Descriptor, to: int, first: list[int], bar: int, text: str) -> None:
    block, (rows, columns) = warp.block, tensor.box
    if to % 128:
        raise Fault(f"a box is misaligned in shared memory: {text}")
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    r, c = row + first[1], column + first[0]
    inside = (r >= 0) & (r < tensor.shape[0]) & (c >= 0) & (c < tensor.shape[1])
    start = np.where(inside, r * tensor.pitch + c * tensor.element, 0)
    data = tensor.tensor[start[:, :, None] + np.arange(tensor.element)]
    data[~inside] = 0
    at = to + (row * columns + column) * tensor.element
    at = swizzled(at, (0, 1, 3, 7)[tensor.swizzle]).reshape(-1).astype(np.int64)
    places = block.places(at, tensor.element, np.ones(at.size, bool), text)
    block.check_write(np.full(len(places), warp.index), places, text)
    block.land(warp.index, places, data.reshape(-1))
    barrier = _mbarrier(block, bar, text)
    _publish(warp, barrier)
    barrier.bytes -= rows * columns * tensor.element
    barrier.settle()


def _mbarrier(block: Block, at: int, text: str) -> MBarrier:
    if at not in block.mbarriers:
        raise Fault(f"no mbarrier was made at {at}: {text}")
    return block.mbarriers[at]


def _publish(warp: Warp, barrier: MBarrier) -> None:
    """Who waits for this phase knows all that the warp has done until now, and nothing later."""
    np.maximum(barrier.next, warp.clock, out=barrier.next)
    warp.clock[warp.index] += 1


@makes("mbarrier", each=True)
def mbarrier(instruction: Instruction) -> Step:
    verb, operands, mask, text = instruction.parts[1], instruction.operands, mask_of(instruction), instruction.text
    if verb in ("init", "inval"):
        at, count = address(operands[0]), source(operands[1], 32) if verb == "init" else None

        def make(warp: Warp) -> None:
            for lane in np.flatnonzero(mask(warp)):
                if count is None:
                    del warp.block.mbarriers[int(at(warp)[lane])]
                else:
                    n, zero = int(count(warp)[lane]), np.zeros(warp.block.warp_count, np.int64)
                    warp.block.mbarriers[int(at(warp)[lane])] = MBarrier(n, zero, zero.copy(), pending=n)

        return make
    if verb == "arrive":
        at, expects = address(operands[1]), "expect_tx" in instruction.parts
        amount = source(operands[2], 32) if len(operands) > 2 else lambda warp: np.ones(32, np.uint32)

        def arrive(warp: Warp) -> None:
            for lane in np.flatnonzero(mask(warp)):
                barrier, number = _mbarrier(warp.block, int(at(warp)[lane]), text), int(amount(warp)[lane])
                _publish(warp, barrier)
                barrier.bytes += number if expects else 0
                barrier.pending -= 1 if expects else number
                barrier.settle()

        return arrive
    if verb in ("try_wait", "test_wait"):
        at, parity, put = address(operands[1]), source(operands[2], 32), put_into(instruction, operands[0])

        def wait(warp: Warp) -> Signal | None:
            barrier = _mbarrier(warp.block, int(at(warp)[0]), text)
            done = (barrier.phase & 1) != (int(parity(warp)[0]) & 1)
            if done:
                np.maximum(warp.clock, barrier.clock, out=warp.clock)
            put(warp, np.full(32, done))
            return None if done else Signal.YIELD

        return wait
    raise NotModelled(text)


# ---- control ----


@makes("bar", "barrier", each=True)
def barrier(instruction: Instruction) -> Step:
    if "sync" not in instruction.parts:
        raise NotModelled(instruction.text)
    which = source(instruction.operands[0], 32)
    threads = int(instruction.operands[1]) if len(instruction.operands) > 1 else None
    return lambda warp: Arrive(int(which(warp)[0]), threads)


@makes("bra", each=True)
def branch(instruction: Instruction) -> Step:
    """All lanes of a warp go the same way: Triton's code has no other branches."""
    mask, jump = mask_of(instruction), Jump(instruction.operands[0])

    def step(warp: Warp) -> Jump | None:
        taken = mask(warp)
        if taken.any() and not taken.all():
            raise NotModelled(f"a warp divides: {instruction.text}")
        return jump if taken.all() else None

    return step


@makes("ret", "exit", each=True)
def leave(instruction: Instruction) -> Step:
    return lambda warp: Signal.EXIT


@makes("fence", "setmaxnreg", "membar", "griddepcontrol", "prefetch", "nanosleep", "pragma")
def nothing(instruction: Instruction) -> Step:
    """Orders what is in order here anyway, or has no result."""
    return lambda warp: None
