"""A multiprocessor with one block of threads: warps, shared memory, barriers, and the search for races.

Every access to global memory is checked for bounds and alignment: each tensor has an address of its own, far from the
others. Races in shared memory are found by vector clocks: of each byte is known which warp wrote it last and when, and
when each warp last read it; an access that no barrier puts after those is a fault, whatever order the warps happened to
run in. Shared memory begins as NaNs, and what an asynchronous copy will write is NaNs until it has been waited for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx.program import Program
from tests.support.ptx.values import LANES, Fault, NotModelled

SHARED_BASE = 1024  # address of the first byte of shared memory
DESCRIPTORS = 0xDD000  # address of the first parameter, for those that are descriptors of tensors
NOT_YET = 1 << 40  # a time after all others: a copy or product in flight
MBARRIERS = 64  # of a block, at most
SPINS = 1000  # rounds without progress until the block counts as stuck


class Signal(enum.Enum):
    EXIT = "the warp ends"
    YIELD = "the warp waits for memory: others first"
    RETRY = "the same, and then the same instruction again"


class Jump(NamedTuple):
    label: str


class Arrive(NamedTuple):
    """At a barrier that so many threads wait for; None: all of the block."""

    barrier: int
    threads: int | None


Step = Callable[["Any"], "Signal | Jump | Arrive | None"]


class Code(NamedTuple):
    """What an instruction does: to all warps that are there at once (registers [warps, 32]), or to one after another
    ([32])."""

    step: Step
    each: bool


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
            raise Fault(
                f"out of bounds of argument {which}, {len(self.tensors[which])} bytes: at {offset[bad][0]}: {text}"
            )
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
    """A barrier in shared memory, with a phase; `clock` is what a thread knows that has waited for the last one.

    Copies that count here are the writes of a thread of their own, `engine`: only who waits here knows that they
    landed, and knowing what the warp did that asked for them is not enough."""

    count: int
    clock: np.ndarray
    next: np.ndarray
    engine: int
    maker: int  # the warp that made it, and when
    made_at: int
    landed: int = 0  # copies
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    coming: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)  # in flight: places, bytes

    def deliver(self, block: Block) -> None:
        """The copies in flight land."""
        while self.coming:
            places, data = self.coming.pop(0)
            self.landed += 1
            block.shared[places], block.writer[places], block.written_at[places] = data, self.engine, self.landed
            self.next[self.engine] = self.landed
            self.bytes -= len(data)
            self.settle()

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


class Registers:
    """Those of one warp, or of some: rows of the block's arrays [warps, 32]. An array is never changed in place, so
    that two registers may share one."""

    def __init__(self, file: dict[str, np.ndarray], count: int, rows: int | list[int]):
        self.file, self.count = file, count
        self.whole = rows == list(range(count))
        self.rows = rows

    def __getitem__(self, name: str) -> np.ndarray:
        return self.file[name] if self.whole else self.file[name][self.rows]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        if self.whole:
            if value.ndim == 1:
                value, constant = np.empty((self.count, 32), value.dtype), value
                value[:] = constant
            self.file[name] = value
            return
        before = self.file.get(name)
        array = np.zeros((self.count, 32), value.dtype) if before is None else before.copy()
        assert array.dtype == value.dtype, f"{name} is {array.dtype}, not {value.dtype}"
        array[self.rows] = value
        self.file[name] = array

    def get(self, name: str, default: np.ndarray) -> np.ndarray:
        return self[name] if name in self.file else default


class Gang:
    """Warps at the same place of the program, which take its instructions together."""

    def __init__(self, block: Block, warps: list[Warp]):
        self.block, self.warps, self.at = block, warps, warps[0].at
        self.rows = np.array(sorted(warp.index for warp in warps))
        self.registers = Registers(block.registers, block.warp_count, self.rows.tolist())

    def special(self, name: str) -> np.ndarray:
        return np.stack([self.block.warps[row].special(name) for row in self.rows])

    def spread(self, value: np.ndarray) -> np.ndarray:
        """[warps, 32]."""
        return value if value.ndim == 2 else np.broadcast_to(value, (len(self.rows), 32))


class Warp:
    """32 threads. A register is an array of 32 words, a predicate of 32 bools."""

    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.registers = Registers(block.registers, block.warp_count, index)
        self.at = 0
        self.state = "runs"  # waits | done
        self.register_count = block.program.registers or 0  # a thread's
        self.clock = block.clocks[index]
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
        code: list[Code],
        memory: GlobalMemory,
        id: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, int],
        shared_bytes: int,
        descriptors: dict[int, Descriptor],
    ):
        self.program, self.code, self.memory, self.id, self.grid = program, code, memory, id, grid
        self.parameters, self.descriptors = parameters, descriptors
        self.warp_count = program.threads // 32
        self.registers: dict[str, np.ndarray] = {}
        # what each warp knows of the others' times, and of the copies that count at each mbarrier
        self.clocks = np.zeros((self.warp_count, self.warp_count + MBARRIERS), np.int64)
        self.size = shared_bytes
        self.shared = np.full(max(shared_bytes, 16), 0xFF, np.uint8)
        self.writer = np.zeros(len(self.shared), np.int16)
        self.written_at = np.zeros(len(self.shared), np.int64)
        self.read_at = np.zeros((self.warp_count, len(self.shared)), np.int64)
        self.mbarriers: dict[int, MBarrier] = {}
        self.mbarriers_made = 0
        self.free_registers = 0  # a thread's, that warps gave back (setmaxnreg)
        self.random: np.random.Generator | None = None
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

    def wrote(self, place: int) -> str:
        writer = self.writer[place]
        return f"warp {writer} wrote" if writer < self.warp_count else "a copy of the copy engine brought"

    def check_read(self, warps: int | np.ndarray, places: np.ndarray, text: str) -> None:
        """Raises `Fault` unless the last writer of each byte is before the warp that reads it."""
        late = self.written_at[places] > self.clocks[warps, self.writer[places]]
        if late.any():
            place, reader = places[late][0], np.broadcast_to(warps, late.shape)[late][0]
            raise Fault(f"race: warp {reader} reads shared byte {place} that {self.wrote(place)}: {text}")

    def check_write(self, warps: np.ndarray, places: np.ndarray, text: str, data: np.ndarray | None = None) -> None:
        """Raises `Fault` unless the last writer and every reader of each byte is before the warp that writes it. The
        same value may be written twice: warps that hold copies of one number all store it."""
        late = self.written_at[places] > self.clocks[warps, self.writer[places]]
        if data is not None:
            late &= self.shared[places] != data
        if late.any():
            place, warp = places[late][0], warps[late][0]
            raise Fault(f"race: warp {warp} writes shared byte {place} that {self.wrote(place)}: {text}")
        if (late := self.read_at[:, places] > self.clocks[warps, : self.warp_count].T).any():
            reader, which = np.argwhere(late)[0]
            raise Fault(
                f"race: warp {warps[which]} writes shared byte {places[which]} that warp {reader} reads: {text}"
            )

    def load(self, warps: np.ndarray, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """Bytes [lanes, size], 0 where masked off; `warps`: whose lane each is."""
        found = np.zeros((len(at), size), np.uint8)
        if mask.any():
            places, readers = self.places(at, size, mask, text), np.repeat(warps[mask], size)
            self.check_read(readers, places, text)
            self.read_at[readers, places] = self.clocks[readers, readers]
            found[mask] = self.shared[places].reshape(-1, size)
        return found

    def store(self, warps: np.ndarray, at: np.ndarray, data: np.ndarray, mask: np.ndarray, text: str) -> None:
        """Bytes [lanes, size]; `warps`: whose lane each is."""
        if mask.any():
            places, writers = self.places(at, data.shape[1], mask, text), np.repeat(warps[mask], data.shape[1])
            data = data[mask].reshape(-1)
            self.check_write(writers, places, text, data)
            self.land(writers, places, data)
            # Of a warp's own lanes the last one wins: with fused multiply-adds their sums may differ in the last bit.
            if (late := (self.shared[places] != data) & (self.writer[places] != writers)).any():
                raise Fault(f"race: two warps write other values to shared byte {places[late][0]}: {text}")

    def promise(self, warps: np.ndarray, at: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """The places of copies in flight, which nobody may touch until `land`."""
        places, writers = self.places(at, size, mask, text), np.repeat(warps[mask], size)
        self.check_write(writers, places, text)
        self.writer[places], self.written_at[places], self.shared[places] = writers, NOT_YET, 0xFF
        if (differs := self.writer[places] != writers).any():
            raise Fault(f"race: two warps copy to shared byte {places[differs][0]}: {text}")
        return places

    def land(self, warps: int | np.ndarray, places: np.ndarray, data: np.ndarray) -> None:
        self.shared[places] = data
        self.writer[places], self.written_at[places] = warps, self.clocks[warps, warps]

    def make_mbarrier(self, warp: Warp, place: int, count: int) -> None:
        self.mbarriers_made += 1
        if self.mbarriers_made > MBARRIERS:
            raise NotModelled(f"more than {MBARRIERS} mbarriers")
        clock, engine, now = (
            np.zeros_like(warp.clock),
            self.warp_count + self.mbarriers_made - 1,
            int(warp.clock[warp.index]),
        )
        self.mbarriers[place] = MBarrier(count, clock, clock.copy(), engine, warp.index, now, pending=count)

    # ---- the run ----

    def run(self, random: np.random.Generator | None) -> None:
        """Until every warp has ended; with `random`, in another order each round."""
        idle_rounds, self.random = 0, random
        while any(warp.state != "done" for warp in self.warps):
            moved = [self._advance(gang) for gang in self._gangs(random)]
            idle_rounds = 0 if any(moved) else idle_rounds + 1
            if idle_rounds > SPINS or not moved:
                live = [warp for warp in self.warps if warp.state != "done"]
                raise Fault(f"deadlock: {[(warp.index, warp.state, self.program.code[warp.at].text) for warp in live]}")
        if any(barrier.coming for barrier in self.mbarriers.values()):
            raise Fault("the block ends with copies in flight")

    def _gangs(self, random: np.random.Generator | None) -> list[Gang]:
        """The warps that can run, by their place; with `random` in two parts, of which the first runs as far as it
        can."""
        ready = [warp for warp in self.warps if warp.state == "runs"]
        parts = [ready]
        if random is not None:
            ready = [ready[i] for i in random.permutation(len(ready))]
            cut = random.integers(len(ready) + 1)
            parts = [ready[:cut], ready[cut:]]
        found = []
        for part in parts:
            for at in dict.fromkeys(warp.at for warp in part):
                found.append(Gang(self, [warp for warp in part if warp.at == at]))
        return found

    def _advance(self, gang: Gang) -> bool:
        """Run a gang until a warp of it waits, ends or goes another way; whether any got on. A branch back to a wait
        does not count."""
        began = at = gang.at
        code, labels = self.code, self.program.labels
        while at < len(code):
            step, each = code[at]
            if not each:
                step(gang)
                at += 1
                continue
            signals = [step(warp) for warp in gang.warps]
            if any(signal != signals[0] for signal in signals) or not (
                signals[0] is None or isinstance(signals[0], Jump)
            ):
                break
            at = at + 1 if signals[0] is None else labels[signals[0].label]
        else:
            signals = [Signal.EXIT] * len(gang.warps)
        moved = []
        for warp, signal in zip(gang.warps, signals, strict=True):
            warp.at = at
            moved.append(self._settle(warp, signal, began))
        return any(moved)

    def _settle(self, warp: Warp, signal: Signal | Jump | Arrive | None, began: int) -> bool:
        """Whether the warp got on from where its gang began."""
        if isinstance(signal, Arrive):
            self._arrive(warp, signal)
        elif isinstance(signal, Jump):
            warp.at = self.program.labels[signal.label]
        elif signal is Signal.RETRY:
            return warp.at != began
        elif signal is Signal.EXIT:
            warp.state = "done"
            if not warp.is_idle():
                raise Fault("a warp ends with copies or products in flight")
        else:
            warp.at += 1
            return signal is None or warp.at != began
        return True

    def _arrive(self, warp: Warp, signal: Arrive) -> None:
        """Wait, or go on with all that are there."""
        waiting = self.barriers.setdefault(signal.barrier, [])
        waiting.append(warp)
        warp.state = "waits"
        if len(waiting) < (signal.threads or 32 * self.warp_count) // 32:
            return
        known = np.max([each.clock for each in waiting], 0)
        for each in waiting:
            each.clock[:] = known
            each.clock[each.index] += 1
            each.state = "runs"
            each.at += 1
        self.barriers[signal.barrier] = []
