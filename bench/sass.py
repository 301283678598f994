"""Compile the kernels for NVIDIA GPUs that are not present and read their machine code.

Counts registers, spills, shared memory, and instructions by pipe.

    python -m qcrd_fast.bench.sass [--capabilities 80,86,89,90,100,120] [--only TEXT] [--json FILE]

Compiles the launchers' own launches (`compiling`) and reads the machine code (SASS) with the `nvdisasm` and `cuobjdump`
that triton brings. Prints a table; needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from csrc_triton import contrastive, linear_kl, linear_logprob, linear_sample, product
from csrc_triton.product import Tile
from qcrd_fast.utils.files import write_json

from .compiling import Launch, compiling

GPUS = {80: "A100", 86: "RTX 30", 89: "L4, RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # of a multiprocessor
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # of a multiprocessor
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory (sm_100)
MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
PIPES = {  # by the beginning of an opcode, the first that fits
    "mma": ("HGMMA", "HMMA", "UTCHMMA"),
    "mufu": ("MUFU",),
    "fma": ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "IMAD"),
    "convert": ("F2F", "I2F", "F2I", "F2FP"),
    "spill": ("LDL", "STL"),
    "shared": ("LDSM", "LDS", "STSM", "STS", "LDTM", "STTM"),
    "copy": ("LDGSTS", "UTMA", "UBLKCP"),
    "global": ("LDG", "STG", "LD.", "ST."),
    "shuffle": ("SHFL", "REDUX"),
    "wait": (
        "BAR",
        "SYNCS",
        "DEPBAR",
        "LDGDEPBAR",
        "WARPSYNC",
        "WARPGROUP",
        "FENCE",
        "MEMBAR",
        "ERRBAR",
        "UTCBAR",
        "NANOSLEEP",
        "ELECT",
    ),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "NOP", "BREAK", "YIELD"),
    "uniform": ("U", "R2UR", "S2UR"),
}


class Code(NamedTuple):
    """Machine code of a kernel. `labels`: the index of the instruction after each label."""

    kernel: str
    capability: int
    threads: int
    registers: int
    spills: int  # bytes a thread
    shared: int  # bytes
    tensor_columns: int
    matrix: tuple[str, ...]  # kinds of matrix instructions in the PTX
    copy_engine: bool
    instructions: tuple[str, ...] = ()
    labels: dict[str, int] = {}  # noqa: RUF012  # never written to

    @property
    def programs(self) -> int:
        """Return how many programs fit on a multiprocessor.

        Registers are allocated in units of 8 per thread, and 1 KiB of shared memory per program is the driver's.
        """
        by_registers = 65536 // (self.threads * ((self.registers + 7) // 8 * 8))
        by_shared = SHARED_KIB[self.capability] * 1024 // (self.shared + 1024)
        by_tensor = TENSOR_COLUMNS // self.tensor_columns if self.tensor_columns else by_shared
        return min(by_registers, by_shared, by_tensor, THREADS[self.capability] // self.threads, 32)


def missing_tools() -> list[str]:
    return [name for name in ("cuobjdump", "nvdisasm") if not (TOOLS / name).exists()]


def read(launch: Launch, instructions: bool = True) -> Code:
    """Read the machine code of a launched kernel; without `instructions` it is not disassembled, which is slow."""
    kernel = launch.kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _ask("cuobjdump", "--dump-resource-usage", file.name)
        listing = _ask("nvdisasm", "-c", file.name) if instructions else ""
    used = dict(item.split(":") for item in usage.split() if item.count(":") == 1 and item[-1] != ":")
    ptx = kernel.asm["ptx"]
    found, labels = read_listing(listing)
    return Code(
        kernel=kernel.metadata.name,
        capability=kernel.metadata.target.arch,
        threads=32 * kernel.metadata.num_warps,
        registers=int(used["REG"]),
        spills=int(used["STACK"]) + int(used["LOCAL"]),
        shared=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        matrix=tuple(kind for kind in MATRIX if kind in ptx),
        copy_engine="cp.async.bulk.tensor" in ptx,
        instructions=found,
        labels=labels,
    )


def read_listing(listing: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """(instructions, the place behind each label) of nvdisasm's output."""
    instructions, labels = list[str](), dict[str, int]()
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return tuple(instructions), labels


def _ask(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


# ---- counting
# --------------------------------------------------------------------------------------------------------------


def opcode(instruction: str) -> str:
    """Return the opcode without predicate and operands."""
    return re.sub(r"^@!?\w+\s+", "", instruction).split()[0]


def pipe(instruction: str) -> str:
    """Return the unit that executes it; "alu" if none of `PIPES` does."""
    name = opcode(instruction)
    return next((unit for unit, starts in PIPES.items() if name.startswith(starts)), "alu")


def successors(code: Code) -> list[list[int]]:
    """Return the instructions that can follow each instruction."""
    found: list[list[int]] = []
    for at, instruction in enumerate(code.instructions):
        name, always = opcode(instruction), instruction[0] != "@"
        target = re.search(r"`\((\.L_\w+)\)", instruction) if name.startswith("BRA") else None
        if target:
            always = always and not name.startswith(("BRA.U", "BRA.DIV", "BRA.CONV"))
        ends = always and (target is not None or name in ("EXIT", "RET"))
        ways = [code.labels[target[1]]] if target else []
        found.append(ways + ([] if ends or at + 1 == len(code.instructions) else [at + 1]))
    return found


def _reach(starts: Iterable[int], edges: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return {reachable instruction: its predecessor on a shortest path, -1 for a start}."""
    before = dict.fromkeys(starts, -1)
    queue = deque(before)
    while queue:
        at = queue.popleft()
        for to in edges[at]:
            if to not in before:
                before[to] = at
                queue.append(to)
    return before


class Counts(NamedTuple):
    """Instructions of one warp: per step along the hidden dimension, and per tile beside its steps."""

    step: list[str]
    tile: list[str]

    def by_pipe(self) -> tuple[Counter[str], Counter[str]]:
        return Counter(map(pipe, self.step)), Counter(map(pipe, self.tile))


def count(code: Code) -> Counts | None:
    """Count the instructions of a step and of a tile; None without products.

    The step is the shortest cycle through a product. A tile's other instructions (address, mask, exponentials) are the
    rest of the loop over tiles or, in a program with a single tile, of the program. If several groups of warps have a
    loop each, the shortest counts.
    """
    after = successors(code)
    before: list[list[int]] = [[] for _ in after]
    for at, ways in enumerate(after):
        for to in ways:
            before[to].append(at)
    best: tuple[tuple[int, int], list[int], set[int]] | None = None
    seen: set[int] = set()
    for at, instruction in enumerate(code.instructions):
        if not opcode(instruction).startswith(("HGMMA", "HMMA", "UTCHMMA")) or at in seen:
            continue
        found = _reach(after[at], after)
        if at not in found:
            continue  # in no loop: a first step ahead of it
        way, here = [at], found[at]
        while here != -1:
            way.append(here)
            here = found[here]
        seen.update(way)
        around = _reach([at], after).keys() & _reach([at], before).keys()
        if best is None or (len(around), len(way)) < best[0]:
            best = (len(around), len(way)), way, set(around)
    if best is None:
        return None
    _, step, loop = best
    if code.kernel in ("dlogits_kernel", "kl_da_kernel"):
        loop = set(_reach([0], after))
    rest = sorted(loop - set(step))
    return Counts([code.instructions[i] for i in sorted(step)], [code.instructions[i] for i in rest])


# ---- what is launched
# ------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """Arguments of a launcher that select another program of a kernel; sizes of SmolLM2's head."""

    name: str
    kernels: tuple[str, ...]  # those of its launches that are meant
    rows: int = 4096
    H: int = 576
    V: int = 49152
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    options: tuple[float, float, float] = (1.0, 0.0, 1.0)
    entropy: bool = False
    keep: bool = False
    top_k: int = 0
    teacher_H: int = 0  # of a divergence
    beta: float = 0.0
    resident: bool = False  # at `product.resident_tile`


KL, MIXTURE = ("kl_kernel", "kl_combine_kernel", "kl_da_kernel"), ("mixture_kernel", "kl_da_kernel")
FORWARD, BOTH, RESIDENT = ("forward_kernel",), ("forward_kernel", "dlogits_kernel"), ("resident_kernel",)
BOTH_RESIDENT = ("resident_kernel", "resident_da_kernel")
EVERY: dict[str, Any] = dict(bias=True, options=(0.3, 30.0, 1.4))
WIDE: dict[str, Any] = dict(H=4096, V=128256)
VARIANTS = [
    Variant("plain", BOTH),
    Variant("bias", BOTH, bias=True),
    Variant("softcap", BOTH, options=(1.0, 30.0, 1.0)),
    Variant("entropy", BOTH, entropy=True),
    Variant("keeps the exponentials", FORWARD, keep=True),
    Variant("keeps the exponentials, bias", FORWARD, keep=True, bias=True),
    Variant("every option, ragged H and V", BOTH, H=592, V=50257, **EVERY),
    Variant("plain, 32 rows", BOTH, rows=32),
    Variant("plain, fp16", BOTH, dtype=torch.float16),
    Variant("plain, fp32", BOTH, dtype=torch.float32),
    Variant("H = 4096, plain", BOTH, **WIDE),
    Variant("H = 4096, bias", BOTH, bias=True, **WIDE),
    Variant("H = 4096, softcap", BOTH, options=(1.0, 30.0, 1.0), **WIDE),
    Variant("H = 4096, entropy", BOTH, entropy=True, **WIDE),
    Variant("H = 4096, keeps the exponentials", FORWARD, keep=True, **WIDE),
    Variant("KL", KL, teacher_H=896),
    Variant("KL, mixture", MIXTURE, teacher_H=896, beta=0.5),
    Variant("KL, every option, ragged H and V", KL, H=592, V=50257, teacher_H=904, beta=1.0, **EVERY),
    Variant("KL, mixture, every option, ragged H and V", MIXTURE, H=592, V=50257, teacher_H=904, beta=0.5, **EVERY),
    Variant("KL, 32 rows", KL, rows=32, teacher_H=896),
    Variant("KL, fp32", KL, dtype=torch.float32, teacher_H=896),
    Variant("hidden resident", BOTH_RESIDENT, resident=True),
    Variant("hidden resident, H = 640, fp16", RESIDENT, H=640, V=262144, dtype=torch.float16, resident=True),
    Variant("hidden resident, H = 768", RESIDENT, H=768, V=32128, resident=True),
    Variant("hidden resident, entropy, ragged V", BOTH_RESIDENT, V=50257, entropy=True, resident=True),
    Variant("hidden resident, keeps the exponentials", RESIDENT, keep=True, resident=True),
    Variant("noise, no top-k", ("product_kernel",), rows=256),
    Variant("greedy", ("product_kernel",), rows=256, options=(1.0, 0.0, 0.0)),
    Variant("top-k", ("product_kernel", "select_kernel", "gather_kernel", "pick_kernel"), rows=256, top_k=50),
    Variant("top-k, 262144 entries", ("select_kernel",), rows=256, top_k=50, V=262144),
]
LAID_OUT = ("forward_kernel", "product_kernel", "resident_kernel", "kl_kernel", "mixture_kernel")
CHUNKED = ("dlogits_kernel", "resident_da_kernel", "kl_da_kernel")  # of the backward pass, which is launched last
SMALL_KERNELS = ("combine_kernel", "dlogits_from_saved", "mean_kernel", "question_kernel", "backward_kernel")


def launch_variant(variant: Variant) -> None:
    """Launch a variant within `compiling`. Operands are never read."""
    if variant.resident:
        with mock.patch.object(product, "forced_tile", product.resident_tile(variant.H)):
            return launch_variant(variant._replace(resident=False))
    T, H, V, dtype = variant.rows, variant.H, variant.V, variant.dtype
    hidden, weight = torch.empty(T, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
    bias, options = torch.empty(V, dtype=dtype) if variant.bias else None, variant.options
    if variant.kernels[0] in ("product_kernel", "select_kernel"):
        key, counter = (torch.empty(T, n, dtype=torch.int64) for n in (2, 3))
        linear_sample.sample(hidden, weight, key, counter, bias, options, variant.top_k)
        return
    target, of_rows = torch.empty(T, dtype=torch.int64), torch.empty(T)
    if variant.teacher_H:
        teacher_hidden, teacher_weight = (torch.empty(n, variant.teacher_H, dtype=dtype) for n in (T, V))
        student = linear_kl.Head(hidden, weight, bias, options)
        teacher = linear_kl.Head(teacher_hidden, teacher_weight, bias, options)
        linear_kl.forward(student, teacher, torch.ones(T, dtype=torch.bool), variant.beta)
        linear_kl.backward(student, teacher, variant.beta, of_rows, of_rows, of_rows, of_rows, (False, False, False))
        return
    if variant.keep:
        linear_logprob.forward_keeping(hidden, weight, target, bias, options, -100, 2**62)
        return
    linear_logprob.forward(hidden, weight, target, bias, options, -100, variant.entropy)
    if variant.kernels == RESIDENT:
        return
    coefficients = (of_rows, of_rows, of_rows if variant.entropy else None)
    linear_logprob.backward(hidden, weight, target, bias, of_rows, coefficients, options, (False, False, False))


def launch_small() -> None:
    """Launch the kernels without products, those of few programs, within `compiling`."""
    every = Variant("", BOTH, rows=64, H=128, V=1024, **EVERY, entropy=True)
    launch_variant(every)
    launch_variant(every._replace(entropy=False))
    hidden, weight, bias = torch.empty(64, 128), torch.empty(1024, 128), torch.empty(1024)
    target, of_rows, options = torch.zeros(64, dtype=torch.int64), torch.empty(64), (0.3, 0.0, 1.4)
    kept = linear_logprob.forward_keeping(hidden, weight, target, bias, options, -100, 2**62)
    assert kept is not None
    operands = (hidden, weight, target, bias, kept[1], of_rows)
    linear_logprob.backward_kept(kept[2], *operands, options, (False, False, False))
    R, positive = torch.arange(8), torch.ones(8, dtype=torch.bool)
    valid, quality, count_ = torch.ones(64, dtype=torch.bool), torch.empty(8), torch.ones(8, dtype=torch.int64)
    for selects in (("min", "max"), ("softmin", "max"), ("wmean", "max-active"), ("sampling", "mean")):
        contrastive.forward(of_rows, target, valid, R, positive, quality, quality, selects, 3.0, torch.tensor(8.0))
    contrastive.backward(quality[0], quality[0], target, valid, positive, quality, count_)


def compile_variants(
    capability: int, variants: Iterable[Variant] = tuple(VARIANTS)
) -> Iterator[tuple[Variant, Launch]]:
    """Compile each launch of a variant, at the tile that `product.forced_tile` names if it does."""
    for variant in variants:
        with compiling(capability, kernels=variant.kernels) as launched:
            launch_variant(variant)
        yield from ((variant, launch) for launch in _distinct(launched))


def _distinct(launched: list[Launch]) -> Iterator[Launch]:
    """Drop repeated programs: a backward pass is many launches of one program."""
    yield from {launch.kernel.hash: launch for launch in launched}.values()


def compile_small(capability: int) -> Iterator[Launch]:
    with compiling(capability, kernels=SMALL_KERNELS) as launched:
        launch_small()
    yield from _distinct(launched)


def describe(name: str, launch: Launch, counting: bool = True) -> dict[str, Any]:
    """Return a row of the table. `step` and `tile`: a warp's instructions by pipe, if `counting`."""
    code = read(launch, counting)
    row: dict[str, Any] = {"variant": name, **code._asdict(), "programs": code.programs}
    del row["instructions"], row["labels"]
    row["maxnreg"] = launch.kernel.metadata.maxnreg
    counts = count(code)
    if counts:
        row["step"], row["tile"] = (dict(counter) for counter in counts.by_pipe())
    return row


def rows_of(
    capability: int,
    only: str = "",
    names: Collection[str] | None = None,
    counting: Callable[[str, str], bool] = lambda variant, kernel: True,
) -> Iterator[dict[str, Any]]:
    """Return the rows of kernels. `counted`: programs per multiprocessor that `product.layout` assumed.

    counting: (variant, kernel) -> whether its instructions are counted.
    """
    for variant in VARIANTS:
        if only in variant.name and (names is None or variant.name in names):
            counted = list[int]()

            def count_on(tile: Tile, device: torch.device, heavy: bool, counted: list[int] = counted) -> int:
                counted.append(product.programs_at_once(tile, capability, heavy))
                return counted[-1] * 132

            if variant.resident and (capability != 90 or product.gluon_obstacle()):
                continue
            with contextlib.ExitStack() as stack:
                for module in (product, linear_logprob, linear_kl):
                    stack.enter_context(mock.patch.object(module, "slots_of", count_on))
                launches = list(compile_variants(capability, [variant]))
            for _, launch in launches:
                row = describe(variant.name, launch, counting(variant.name, launch.kernel.metadata.name))
                if row["kernel"] in LAID_OUT:
                    row["counted"] = counted[0]
                elif row["kernel"] in CHUNKED:
                    row["counted"] = counted[-1]
                yield row
    if capability == 90 and only in "small" and names is None:
        for launch in compile_small(capability):
            yield describe("small", launch)


HEADINGS = (
    "GPU",
    "kernel",
    "variant",
    "registers",
    "spills",
    "shared KiB",
    "programs a multiprocessor",
    "step",
    "tile",
)


def line(row: dict[str, Any]) -> str:
    """Format a row: instructions of a step, then of a tile beside its steps, and exponentials (MUFU)."""
    step, tile = row.get("step", {}), row.get("tile", {})
    counts = (sum(step.values()), f"{sum(tile.values())}, {tile.get('mufu', 0)} MUFU") if step else ("", "")
    cells = (f"sm_{row['capability']} {GPUS[row['capability']]}", f"`{row['kernel']}`", row["variant"],
        row["registers"],
             row["spills"], row["shared"] // 1024, row["programs"], *counts)  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--capabilities", default=",".join(map(str, GPUS)))
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name has this text")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args(arguments)
    if missing := missing_tools():
        parser.error(f"this triton brings no {' and no '.join(missing)}")
    print("| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|", sep="\n")
    rows = []
    for capability in map(int, given.capabilities.split(",")):
        for row in rows_of(capability, given.only):
            rows.append(row)
            print(line(row), flush=True)
    if given.json:
        write_json(given.json, {"triton": triton.__version__, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
