"""QCRD (arXiv 2405.13014): quality-guided contrastive rationale distillation, with a loss that never holds the logits.

The names below load on first use, so that `import qcrd_fast` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcrd_fast.version import __version__

if TYPE_CHECKING:
    from qcrd_fast.discriminator.model import Discriminator as Discriminator
    from qcrd_fast.integrations.attach import attach as attach
    from qcrd_fast.integrations.attach import detach as detach
    from qcrd_fast.integrations.batch_loss import score_then_train as score_then_train
    from qcrd_fast.integrations.collator import RationaleCollator as RationaleCollator
    from qcrd_fast.integrations.compute_loss import make_compute_loss_func as make_compute_loss_func
    from qcrd_fast.losses import QCRDLoss as QCRDLoss
    from qcrd_fast.losses import contrastive_loss as contrastive_loss
    from qcrd_fast.ops.linear_kl import linear_kl as linear_kl
    from qcrd_fast.ops.linear_logprob import LogProbOutput as LogProbOutput
    from qcrd_fast.ops.linear_logprob import linear_logprob as linear_logprob

__all__ = [
    "Discriminator",
    "LogProbOutput",
    "QCRDLoss",
    "RationaleCollator",
    "__version__",
    "attach",
    "contrastive_loss",
    "detach",
    "linear_kl",
    "linear_logprob",
    "make_compute_loss_func",
    "score_then_train",
]

_HOME = {
    "Discriminator": "discriminator.model",
    "LogProbOutput": "ops.linear_logprob",
    "QCRDLoss": "losses",
    "RationaleCollator": "integrations.collator",
    "attach": "integrations.attach",
    "contrastive_loss": "losses",
    "detach": "integrations.attach",
    "linear_kl": "ops.linear_kl",
    "linear_logprob": "ops.linear_logprob",
    "make_compute_loss_func": "integrations.compute_loss",
    "score_then_train": "integrations.batch_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
