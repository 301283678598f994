"""`--deterministic`: identical bits on the same GPU and versions.

The project's kernels are deterministic: each result is written once, nothing is added atomically, tiles follow from
shapes, not from timing. torch has to be told, and raises for an operation without a deterministic algorithm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """Allow only deterministic algorithms of torch, or any; restore the setting afterwards."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch deterministic if `wanted`; restore the setting afterwards."""
    if not wanted:
        yield
        return
    set_here = WORKSPACE not in os.environ
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS reads it at its first use, which must not have been
    filling: Any = torch.utils.deterministic
    fills, cudnn = filling.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    with _algorithms(deterministic=True):
        filling.fill_uninitialized_memory = False  # nothing reads what was not written; filling costs time
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            filling.fill_uninitialized_memory = fills
            torch.backends.cudnn.benchmark = cudnn
            if set_here:
                os.environ.pop(WORKSPACE, None)


def deterministic_already() -> contextlib.AbstractContextManager[None]:
    """Temporarily allow nondeterministic kernels: the deterministic ones synchronise, which CUDA graphs cannot capture.

    Only for work whose indices are unique and whose sums have a fixed order.
    """
    return _algorithms(deterministic=False)


def require_deterministic(config: TrainConfig, device: torch.device, samples: bool) -> None:
    """Raise `InputError` for options that cannot be deterministic on this device.

    samples: the run draws negatives from its student.
    """
    if config.deterministic and samples and config.negative_top_p < 1 and device.type == "cuda":
        raise InputError(
            f"--deterministic: --negative-top-p {config.negative_top_p:g} adds probabilities up in no fixed order on "
            "a GPU; leave it at 1 and use --negative-top-k"
        )
