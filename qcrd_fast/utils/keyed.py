"""Numbers and random streams that depend on a key alone, never on call order. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def own_randomness(device: torch.device, *key: Any) -> Iterator[None]:
    """Seed torch from `key` on the CPU and on `device`; restore its generators afterwards."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(keyed(*key))  # torch.manual_seed would reseed every other GPU too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(keyed(*key))
        yield


def keyed(*key: Any) -> int:
    """63 bits that depend on the key alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seed_from(*key: int) -> int:
    """63 bits that depend on the key alone: the seed of a micro-batch's dropout."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
