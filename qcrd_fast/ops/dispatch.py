"""Which implementation of an op runs, and checks of its arguments that cost no host sync."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from qcrd_fast.config import IMPLS
from qcrd_fast.errors import InputError


def choose_impl(impl: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return (eager | torch | triton, reason). QCRD_FAST_IMPL overrides `impl`; `ValueError` if it cannot run."""
    forced = os.environ.get("QCRD_FAST_IMPL")
    asked = forced or impl
    origin = f"QCRD_FAST_IMPL={forced}" if forced else f"impl={impl!r}"
    if asked not in IMPLS:
        raise ValueError(f"{origin}: expected one of {', '.join(IMPLS)}")
    obstacle = _triton_obstacle(device, dtype)
    if asked == "auto":
        return ("torch", obstacle) if obstacle else ("triton", f"a CUDA GPU and {dtype}")
    if asked == "triton" and obstacle and not (device.type == "cpu" and _interpreting() and dtype != torch.float64):
        raise ValueError(f"{origin} cannot run: {obstacle}")
    return asked, origin


def require_impl(impl: str, device: torch.device) -> None:
    """Raises `InputError` where `--impl`, or QCRD_FAST_IMPL, is none or cannot run on the device."""
    try:
        choose_impl(impl, device, torch.float32)
    except ValueError as error:
        raise InputError(f"--impl: {error}") from error


def describe_gluon() -> str | None:
    """What follows from QCRD_FAST_GLUON, the kernel of `csrc_triton.linear_logprob_hopper`; None where it is not asked
    for."""
    if os.environ.get("QCRD_FAST_GLUON", "0") == "0" or _triton_import_error():
        return None
    from csrc_triton.product import gluon_obstacle, gluon_wanted

    try:
        gluon_wanted()
    except ValueError as error:
        return f"{error}; a run would refuse this"
    if obstacle := gluon_obstacle():
        return f"no: {obstacle}; the Triton kernel runs"
    return "QCRD_FAST_GLUON=1: the Gluon kernel on an H100 or H200, up to H = 768, without bias and softcap"


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not run by themselves, or None."""
    if dtype == torch.float64:
        return "the kernels have no float64"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels need a CUDA GPU (or TRITON_INTERPRET=1, for tests)"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else _triton_import_error()


@functools.cache
def _triton_import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported: {error}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
