"""Device and autocast selection."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcrd_fast.errors import InputError

Autocast = Callable[[], torch.autocast]


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
