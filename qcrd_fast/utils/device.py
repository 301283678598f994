"""Device, autocast and CPU threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from qcrd_fast.errors import InputError

Autocast = Callable[[], torch.autocast]
ONE_THREAD = 5_000_000  # parameters of a student below which a second thread brings next to nothing


def resolve_device(name: str) -> torch.device:
    """`--device`: auto is the GPU where there is one. Raises `InputError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: {name!r} is not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device: {name} is not available on this machine")
    return device


def make_autocast(device: torch.device, bf16: bool | None) -> Autocast:
    """A maker of autocast contexts. bf16 None: where the GPU has it."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported() if bf16 is None else bf16
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def choose_threads(device: torch.device, parameters: int) -> None:
    """Run a small student on one CPU thread, unless OMP_NUM_THREADS is set.

    Threads synchronise after each of its short operations; beside another busy process that costs ten times what they
    save.
    """
    if device.type == "cpu" and parameters < ONE_THREAD and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
