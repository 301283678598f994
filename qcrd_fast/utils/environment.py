"""Versions, devices and commit of this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
GIB = 1024**3


def commit() -> str:
    """The checkout that this code is in, `-dirty` with changes not committed; unknown where it is in none."""
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def list_gpus(torch: Any) -> list[dict[str, Any]]:
    found = []
    with contextlib.suppress(Exception):
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            found.append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "capability": list(capability),
                    "memory_gib": round(total / GIB, 1),
                    "memory_free_gib": round(free / GIB, 1),
                    "bf16": capability >= (8, 0),
                }
            )
    return found


def dotted(gpu: dict[str, Any]) -> str:
    return ".".join(map(str, gpu["capability"]))


def package_version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def cpu_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
