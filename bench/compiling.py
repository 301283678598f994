"""Compile kernel launches for NVIDIA GPUs that are not present, by Triton's own launch path up to the launch.

    with compiling(90) as launched:
        linear_logprob.forward(hidden, weight, target, None, (1.0, 0.0, 1.0), -100, False)
    launched[0].kernel.asm["cubin"]

Nothing is executed, so operands may be `torch.empty` of any size. Needs a process in which TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from csrc_triton import product

Grid = tuple[int, int, int]


class Launch(NamedTuple):
    """A compiled kernel and its grid; `arguments` are (type, value), constants excluded."""

    kernel: CompiledKernel
    grid: Grid
    arguments: list[tuple[str, Any]]


class Driver:
    """A stand-in for the driver: answers what Triton asks before a launch."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what Triton has compiled is kept by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


@contextlib.contextmanager
def compiling(
    capability: int,
    run: Callable[[Launch], None] | None = None,
    *,
    multiprocessors: int = 132,
    kernels: Collection[str] | None = None,
) -> Iterator[list[Launch]]:
    """Compile kernels called with CPU tensors for this compute capability (90 is 9.0).

    The launchers see a GPU with that many multiprocessors. Each launch is passed to `run`, or collected without one.
    kernels: names of those to compile; launches of others do nothing.
    """
    launched: list[Launch] = []
    take = run or launched.append

    def launch(kernel: CompiledKernel, x: int, y: int, z: int, *rest: Any) -> None:
        arguments = rest[6:]  # behind stream, function, packed metadata, launch metadata and two hooks
        kinds = kernel.src.signature.values()
        given = [(kind, value) for kind, value in zip(kinds, arguments, strict=False) if kind != "constexpr"]
        take(Launch(kernel, (x, y, z), given))

    launch_meant = JITFunction.run

    def run_meant(self: Any, *arguments: Any, **options: Any) -> Any:
        if kernels is None or self.__name__ in kernels:
            return launch_meant(self, *arguments, **options)

    before = driver._active
    with (
        mock.patch.object(JITFunction, "run", run_meant),
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "launch_metadata", lambda self, *_: None),
        mock.patch.object(CompiledKernel, "run", property(lambda self: functools.partial(launch, self))),
        mock.patch.object(product, "architecture", lambda device: capability),
        mock.patch.object(product, "multiprocessors", lambda device: multiprocessors),
        # the default of Triton 3.10: a launch has to ask for it
        mock.patch.dict(os.environ, {"TRITON_DEFAULT_FP_FUSION": "0"}),
    ):
        driver.set_active(Driver(GPUTarget("cuda", capability, 32)))
        try:
            yield launched
        finally:
            driver._active = before
