"""`doctor`: report versions, devices, memory, and which kernels run and why. Never fails."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from qcrd_fast.utils.environment import GIB, PACKAGES, cpu_cores, dotted, list_gpus, package_version
from qcrd_fast.utils.memory import UNKNOWN, free_bytes
from qcrd_fast.version import __version__

VARIABLES = ("QCRD_FAST_IMPL", "QCRD_FAST_GLUON", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def examine() -> dict[str, Any]:
    """Return the report as plain values; None with a reason for what is unknown."""
    (torch, torch_error), free = _import_torch(), free_bytes()
    gpus = list_gpus(torch) if torch else []
    impl, why = kernel_path(torch, gpus) if torch else (None, f"torch cannot be imported: {torch_error}")
    return {
        "kernels": {"impl": impl, "why": why, "hopper": _hopper_kernel() if torch else None},
        "versions": {
            "qcrd-fast": __version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
        "cuda": torch.version.cuda if torch else None,
        "gpus": gpus,
        "cpu": {
            "cores": cpu_cores(),
            "torch_threads": torch.get_num_threads() if torch else None,
            "machine": platform.machine(),
        },
        "memory_free_gib": round(free / GIB, 1) if free < UNKNOWN else None,
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "platform": platform.platform(),
    }


def kernel_path(torch: Any, gpus: list[dict[str, Any]]) -> tuple[str, str]:
    """(implementation that `--impl auto` takes, why): asked of the code that chooses it."""
    from qcrd_fast.ops.dispatch import choose_impl

    device, dtype = ("cuda", torch.bfloat16) if gpus else ("cpu", torch.float32)
    try:
        impl, why = choose_impl("auto", torch.device(device), dtype)
    except ValueError as error:
        return "none", f"{error}; a run would refuse this"
    if impl == "torch" and not gpus and "QCRD_FAST_IMPL" not in os.environ:
        why = "no CUDA GPU"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            why = "an NVIDIA driver is here, but this build of torch has no CUDA: install the CUDA build"
    return impl, why


def _hopper_kernel() -> str | None:
    from qcrd_fast.ops.dispatch import describe_gluon

    return describe_gluon()


def as_text(report: dict[str, Any]) -> str:
    """The report in lines."""
    cpu, kernels = report["cpu"], report["kernels"]
    lines = [f"kernels      {kernels['impl'] or 'unknown'}: {kernels['why']}"]
    if kernels["hopper"]:
        lines.append(f"hopper       {kernels['hopper']}")
    if "TRITON_INTERPRET" in report["environment"]:
        lines.append("             TRITON_INTERPRET is set: kernels run in Triton's interpreter, for tests only")
    lines += [
        f"gpu {i}        {g['name']}, capability {dotted(g)}, {g['memory_free_gib']} of {g['memory_gib']} GiB free, "
        f"bf16 {'yes' if g['bf16'] else 'no'}"
        for i, g in enumerate(report["gpus"])
    ] or ["gpu          none"]
    lines.append(f"cpu          {cpu['cores']} cores, {cpu['torch_threads']} torch threads, {cpu['machine']}")
    lines.append(f"memory       {report['memory_free_gib']} GiB free")
    lines.append(f"disk         {report['disk_free_gib']} GiB free here")
    lines += [f"{name:<12} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append(f"cuda         {report['cuda'] or 'not in this build of torch'}")
    lines += [f"{name}={value}" for name, value in report["environment"].items()]
    return "\n".join(lines)


def _import_torch() -> tuple[Any, str | None]:
    try:
        import torch
    except Exception as error:  # a broken install is a finding, not a failure
        return None, str(error)
    return torch, None
