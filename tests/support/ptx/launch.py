"""Puts the executor under Triton: its own launches compile for an NVIDIA GPU that is not there, and run here on CPU
tensors.

    with executing(90) as launched:
        linear_logprob(hidden, weight, target, impl="triton")

Needs a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.compiling import Launch, compiling
from qcrd_fast.ops import dispatch
from tests.support.ptx import arithmetic, matrix, memory  # noqa: F401  # they say how instructions run
from tests.support.ptx.machine import DESCRIPTORS, Block, Code, Descriptor, GlobalMemory
from tests.support.ptx.operands import compile_program
from tests.support.ptx.program import Program
from tests.support.ptx.values import Fault


@dataclasses.dataclass
class Execution:
    """How kernels run, and what ran: programs of each. `shuffle`: a seed for the order of programs and warps.
    `change`: (kernel's name, PTX) -> the PTX that is run. `orders`: the first launch of each kernel runs in so many
    other orders as well, each from the same memory, and has to leave the same bytes; `compared` counts those
    kernels."""

    shuffle: int | None = None
    change: Callable[[str, str], str] | None = None
    orders: int = 0
    compared: set[str] = dataclasses.field(default_factory=set)  # hashes of kernels
    programs: dict[str, int] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # Triton's, of each kernel

    def run(self, launch: Launch) -> None:
        kernel, grid, arguments = launch
        ptx = kernel.asm["ptx"]
        program, code = prepare(self.change(kernel.metadata.name, ptx) if self.change else ptx)
        tensors, words, descriptors = bind(arguments, list(getattr(kernel.metadata, "tensordesc_meta", None) or []))
        words += [0] * (len(program.parameters) - len(words))  # scratch space, which no kernel of ours takes
        parameters = dict(zip(program.parameters, words, strict=True))

        def execute(seed: int | None) -> None:
            ids = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
            random = None if seed is None else np.random.default_rng(seed)
            for i in random.permutation(len(ids)) if random else range(len(ids)):
                Block(program, code, tensors, ids[i], grid, parameters, kernel.metadata.shared, descriptors).run(random)

        compares = self.orders and kernel.hash not in self.compared and kernel.metadata.name not in UNORDERED
        before = [tensor.copy() for tensor in tensors.tensors] if compares else None
        with np.errstate(all="ignore"):
            execute(self.shuffle)
            if before:
                self.compared.add(kernel.hash)
                compare_orders(kernel.metadata.name, tensors.tensors, before, self.orders, execute)
        name = kernel.metadata.name
        self.metadata[name] = kernel.metadata
        self.programs[name] = self.programs.get(name, 0) + math.prod(grid)


# Programs of it tell each other how good an entry must be, and leave out what cannot win: which, the order decides. The
# tokens are the same, which is compared where the whole op runs in other orders (`shuffle`).
UNORDERED = ("product_kernel",)


def compare_orders(
    name: str, tensors: list[np.ndarray], before: list[np.ndarray], orders: int, execute: Callable[[int], None]
) -> None:
    """Execute again from the memory that was there before. Raises `Fault` where another order leaves other bytes."""
    after = [tensor.copy() for tensor in tensors]
    for seed in range(1, orders + 1):
        for tensor, bytes in zip(tensors, before, strict=True):
            tensor[:] = bytes
        execute(seed)
        for i, (tensor, bytes) in enumerate(zip(tensors, after, strict=True)):
            if not np.array_equal(tensor, bytes):
                raise Fault(f"{name}: order {seed} leaves other bytes in argument {i}")


@functools.lru_cache(64)
def prepare(ptx: str) -> tuple[Program, list[Code]]:
    program = Program(ptx)
    return program, compile_program(program)


def bind(
    arguments: list[tuple[str, Any]], boxes: list[dict[str, Any]]
) -> tuple[GlobalMemory, list[int], dict[int, Descriptor]]:
    """(memory, a word a parameter, descriptors by address) of a launch's arguments."""
    tensors, words, descriptors = GlobalMemory(), list[int](), dict[int, Descriptor]()
    for kind, value in arguments:
        if kind.startswith("tensordesc"):
            box, element = boxes.pop(0), value.base.element_size()
            pitch, size = value.strides[0] * element, tuple(box["block_size"])
            found = Descriptor(bytes_of(value.base), tuple(value.shape), pitch, element, size, box["swizzle"])
            descriptors[DESCRIPTORS + len(words)] = found
            words += [0, *value.shape, *value.strides]
        elif kind[0] == "*":
            words.append(0 if value is None else tensors.map(bytes_of(value), value.data_ptr() % 16))
        elif kind == "fp32":
            words.append(struct.unpack("<I", struct.pack("<f", value))[0])
        else:
            words.append(int(value))
    return tensors, words, descriptors


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory from its first to its last element, not a copy."""
    if tensor.numel() == 0:
        return np.zeros(0, np.uint8)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))


@contextlib.contextmanager
def executing(
    capability: int,
    *,
    shuffle: int | None = None,
    change: Callable[[str, str], str] | None = None,
    multiprocessors: int = 2,
    orders: int = 0,
    compared: set[str] | None = None,
) -> Iterator[Execution]:
    """Within it kernels with CPU tensors are compiled for this compute capability and executed. Where there are few
    multiprocessors, the launchers split the vocabulary into few parts, and there are few programs to execute.
    `compared`: kernels that earlier calls ran in other orders."""
    execution = Execution(shuffle, change, orders, set() if compared is None else compared)
    with (
        mock.patch.object(dispatch, "_interpreting", lambda: True),
        compiling(capability, execution.run, multiprocessors=multiprocessors),
    ):
        yield execution
