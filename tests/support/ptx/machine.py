"""A multiprocessor with one block of threads: warps, shared memory, barriers, and the search for races.

Every access to global memory is checked for bounds and alignment: each tensor has an address of its own, far from the others.
Races in shared memory are found by vector clocks: of each byte is known which warp wrote it last and when, and when each warp
last read it; an access that no barrier puts after those is a fault, whatever order the warps happened to run in. Shared memory
begins as NaNs, and what an asynchronous copy will write is NaNs until it has been waited for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx.program import Program
from tests.support.ptx.values import LANES, Fault

SHARED_BASE = 1024  # address of the first byte of shared memory
DESCRIPTORS = 0xDD000  # address of the first parameter, for those that are descriptors of tensors
NOT_YET = 1 << 40  # a time after all others: a copy or product in flight
SPINS = 1000  # rounds without progress until the block counts as stuck


class Signal(enum.Enum):
    EXIT = "the warp ends"
    YIELD = "the warp waits for memory: others first"


class Jump(NamedTuple):
    label: str


class Arrive(NamedTuple):
    """At a barrier that so many threads wait for; None: all of the block."""

    barrier: int
    threads: int | None


Step = Callable[["Warp"], "Signal | Jump | Arrive | None"]


class GlobalMemory:
    """The tensors that a launch was given, as bytes."""

    def __init__(self) -> None:
        self.tensors: list[np.ndarray] = []
        self.bases: list[int] = []

    def map(self, tensor: np.ndarray, low_bits: int) -> int:
        """The address of these bytes; `low_bits`: its remainder by 16."""
        self.tensors.append(tensor)
        self.bases.append(len(self.tensors) << 40 | low_bits)
        return self.bases[-1]

    def _find(self, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
        which = int(at[mask][0] >> 40) - 1
        if not 0 <= which < len(self.tensors):
            raise Fault(f"wild address {at[mask][0]:#x}: {text}")
        offset = at - self.bases[which]
        bad = mask & ((offset < 0) | (offset + size > len(self.tensors[which])))
        if bad.any():
            raise Fault(f"out of bounds of argument {which}, {len(self.tensors[which])} bytes: at {offset[bad][0]}: {text}")
        if (at[mask] % size).any():
            raise Fault(f"misaligned for {size} bytes: {text}")
        return self.tensors[which], offset[mask][:, None] + np.arange(size)

    def load(self, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """Bytes [lanes, size], 0 where masked off."""
        found = np.zeros((len(at), size), np.uint8)
        if mask.any():
            tensor, where = self._find(at, size, mask, text)
            found[mask] = tensor[where]
        return found

    def store(self, at: np.ndarray, data: np.ndarray, mask: np.ndarray, text: str) -> None:
        if mask.any():
            tensor, where = self._find(at, data.shape[1], mask, text)
            tensor[where] = data[mask]


@dataclasses.dataclass
class MBarrier:
    """A barrier in shared memory, with a phase; `clock` is what a thread knows that has waited for the last one."""

    count: int
    clock: np.ndarray
    next: np.ndarray
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise Fault("too many arrivals at an mbarrier")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.clock, self.next = np.maximum(self.clock, self.next), np.zeros_like(self.next)


class Descriptor(NamedTuple):
    """A tensor as the copy engine sees it, with the box that one copy brings."""

    tensor: np.ndarray
    shape: tuple[int, int]
    pitch: int  # bytes from row to row
    element: int  # bytes
    box: tuple[int, int]
    swizzle: int  # 0 to 3: none, 32, 64, 128 bytes


class Warp:
    """32 threads at one place of the program. Registers are arrays of 32 words; predicates of 32 bools."""

    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.registers: dict[str, np.ndarray] = {}
        self.at = 0
        self.state = "runs"  # waits | done
        self.clock = np.zeros(block.warp_count, np.int64)
        self.clock[index] = 1
        self.copies: list[Any] = []  # cp.async not yet in a group, and the groups not yet waited for
        self.copy_groups: list[list[Any]] = []
        self.operands: list[np.ndarray] = []  # bytes that a wgmma reads, likewise
        self.operand_groups: list[list[np.ndarray]] = []

    def special(self, name: str) -> np.ndarray:
        block = self.block
        places = {"ctaid": block.id, "nctaid": block.grid}
        axes: dict[str, Any] = {f"%{name}.{'xyz'[i]}": of[i] for name, of in places.items() for i in range(3)}
        axes |= {"%tid.x": LANES + 32 * self.index, "%tid.y": 0, "%tid.z": 0, "%ntid.x": 32 * block.warp_count}
        axes |= {"%laneid": LANES, "%warpid": self.index, "%clusterid.x": block.id[0], "%cluster_ctarank": 0}
        return np.broadcast_to(np.asarray(axes[name], np.uint32), (32,)).copy()

    def is_idle(self) -> bool:
        """Nothing asynchronous is in flight."""
        return not (self.copies or self.operands or any(self.copy_groups) or any(self.operand_groups))


class Block:
    """One block of a grid."""

    def __init__(
        self,
        program: Program,
        steps: list[Step],
        memory: GlobalMemory,
        id: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, int],
        shared_bytes: int,
        descriptors: dict[int, Descriptor],
    ):
        self.program, self.steps, self.memory, self.id, self.grid = program, steps, memory, id, grid
        self.parameters, self.descriptors = parameters, descriptors
        self.warp_count = program.threads // 32
        self.size = shared_bytes
        self.shared = np.full(max(shared_bytes, 16), 0xFF, np.uint8)
        self.writer = np.zeros(len(self.shared), np.int16)
        self.written_at = np.zeros(len(self.shared), np.int64)
        self.read_at = np.zeros((self.warp_count, len(self.shared)), np.int64)
        self.mbarriers: dict[int, MBarrier] = {}
        self.barriers: dict[int, list[Warp]] = {}
        self.warps = [Warp(self, i) for i in range(self.warp_count)]

    # ---- shared memory ----

    def places(self, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """Indices of the bytes of each lane's access."""
        offset = at[mask] - SHARED_BASE
        if len(offset) and (offset.min() < 0 or offset.max() + size > self.size):
            raise Fault(f"out of shared memory, {self.size} bytes: at {offset.min()} to {offset.max()}: {text}")
        if (at[mask] % min(size, 16)).any():
            raise Fault(f"misaligned in shared memory: {text}")
        return (offset[:, None] + np.arange(size)).reshape(-1)

    def check(self, warp: Warp, places: np.ndarray, text: str, *, writes: bool, data: np.ndarray | None = None) -> None:
        """Raises `Fault` unless the last writer, for a write also every reader, is before this warp. The same value may be
        written twice: warps that hold copies of one number all store it."""
        late = self.written_at[places] > warp.clock[self.writer[places]]
        if data is not None:
            late &= self.shared[places] != data
        if late.any():
            place = places[late][0]
            verb = "writes" if writes else "reads"
            raise Fault(f"race: warp {warp.index} {verb} shared byte {place} that warp {self.writer[place]} wrote: {text}")
        if writes and (late := self.read_at[:, places] > warp.clock[:, None]).any():
            reader, which = np.argwhere(late)[0]
            raise Fault(f"race: warp {warp.index} writes shared byte {places[which]} that warp {reader} reads: {text}")

    def load(self, warp: Warp, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        found = np.zeros((len(at), size), np.uint8)
        if mask.any():
            places = self.places(at, size, mask, text)
            self.check(warp, places, text, writes=False)
            self.read_at[warp.index, places] = warp.clock[warp.index]
            found[mask] = self.shared[places].reshape(-1, size)
        return found

    def store(self, warp: Warp, at: np.ndarray, data: np.ndarray, mask: np.ndarray, text: str) -> None:
        if mask.any():
            places, data = self.places(at, data.shape[1], mask, text), data[mask].reshape(-1)
            self.check(warp, places, text, writes=True, data=data)
            self.land(warp, places, data)

    def promise(self, warp: Warp, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """The places of a copy in flight, which nobody may touch until `land`."""
        places = self.places(at, size, mask, text)
        self.check(warp, places, text, writes=True)
        self.writer[places], self.written_at[places], self.shared[places] = warp.index, NOT_YET, 0xFF
        return places

    def land(self, warp: Warp, places: np.ndarray, data: np.ndarray) -> None:
        self.shared[places] = data
        self.writer[places], self.written_at[places] = warp.index, warp.clock[warp.index]

    # ---- the run ----

    def run(self, random: np.random.Generator | None) -> None:
        """Until every warp has ended; with `random`, in another order each round."""
        idle_rounds = 0
        while live := [warp for warp in self.warps if warp.state != "done"]:
            order = live if random is None else [live[i] for i in random.permutation(len(live))]
            moved = [self._advance(warp) for warp in order if warp.state == "runs"]
            idle_rounds = 0 if any(moved) else idle_rounds + 1
            if idle_rounds > SPINS or not moved:
                raise Fault(f"deadlock: {[(warp.index, warp.state, self.program.code[warp.at].text) for warp in live]}")

    def _advance(self, warp: Warp) -> bool:
        """Run a warp until it waits or ends; whether it got on. A branch back to a wait does not count."""
        began = warp.at
        while True:
            signal = self.steps[warp.at](warp) if warp.at < len(self.steps) else Signal.EXIT
            if signal is None:
                warp.at += 1
            elif isinstance(signal, Jump):
                warp.at = self.program.labels[signal.label]
            elif signal is Signal.YIELD:
                warp.at += 1
                return warp.at != began
            elif signal is Signal.EXIT:
                warp.state = "done"
                if not warp.is_idle():
                    raise Fault("a warp ends with copies or products in flight")
                return True
            else:
                assert isinstance(signal, Arrive)
                if not self._arrive(warp, signal):
                    return True

    def _arrive(self, warp: Warp, signal: Arrive) -> bool:
        """Whether all are there, and go on."""
        waiting = self.barriers.setdefault(signal.barrier, [])
        waiting.append(warp)
        warp.state = "waits"
        if len(waiting) < (signal.threads or 32 * self.warp_count) // 32:
            return False
        known = np.max([each.clock for each in waiting], 0)
        for each in waiting:
            each.clock = known.copy()
            each.clock[each.index] += 1
            each.state = "runs"
            each.at += 1
        self.barriers[signal.barrier] = []
        return True
