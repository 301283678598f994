"""Training: `from qcrd_fast.train import train`. Lazy, so that importing another module of it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcrd_fast.train.trainer import train as train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qcrd_fast.train.trainer import train

    return train
