"""`--deterministic`: the same bits from the same GPU and versions, whatever ran before.

Our kernels need nothing: each result is written once, nothing is added atomically, tiles follow from shapes and are not timed.
torch's own choice of algorithm does, and an operation that has no deterministic one raises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch is deterministic if `wanted`; afterwards it is as it was."""
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS reads it at its first use, which must not have been
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills, cudnn = filling.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing reads what was not written; filling costs time
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        filling.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = cudnn
