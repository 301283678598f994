"""`--deterministic`: the same bits from the same GPU and versions, whatever ran before.

Our kernels need nothing: each result is written once, nothing is added atomically, tiles follow from shapes and are not
timed. torch's own choice of algorithm does, and an operation that has no deterministic one raises.
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
    """Inside, torch takes deterministic algorithms alone, or any; afterwards it is as it was."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch is deterministic if `wanted`; afterwards it is as it was."""
    if not wanted:
        yield
        return
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


def deterministic_already() -> contextlib.AbstractContextManager[None]:
    """Inside, torch takes its usual algorithms: for work whose indices are unique and whose sums are in order, where
    those that `deterministic` makes it take wait for the device, which a graph cannot hold."""
    return _algorithms(deterministic=False)


def require_deterministic(config: TrainConfig, device: torch.device, samples: bool) -> None:
    """Raises `InputError` for options that `--deterministic` cannot be kept with on this device.

    samples: the run draws negatives from its student.
    """
    if config.deterministic and samples and config.negative_top_p < 1 and device.type == "cuda":
        raise InputError(
            f"--deterministic: --negative-top-p {config.negative_top_p:g} adds probabilities up in no fixed order on "
            "a GPU; leave it at 1 and use --negative-top-k"
        )
