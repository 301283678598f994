"""Audited passes over made-up tensors."""

from __future__ import annotations

import torch

from qcrd_fast import linear_logprob
from qcrd_fast.models.lm_head import Head
from qcrd_fast.ops.rationale_loss import linear_rationale_loss, loss_terms
from qcrd_fast.train.audit import Audit
from tests.support.loss_oracle import BETA, DELTA
from tests.support.rationale_losses import weights_of


def head_of(batch, **options):
    return Head(batch.weight, batch.bias, options.get("scale", 1.0), options.get("softcap"))


def audited(batch, impl="torch", harm=lambda logprob_T: logprob_T, **options) -> dict[str, float]:
    """What an audit says of `linear_logprob` and its gradients."""
    audit, head = Audit(7, 3), head_of(batch, **options)
    logprob_T = harm(linear_logprob(batch.hidden, batch.weight, batch.target, impl=impl, **head.options))
    audit.watch(batch.hidden, head, batch.target, logprob_T)
    weight_T = torch.rand(len(logprob_T), generator=torch.Generator().manual_seed(1)).to(logprob_T.device)
    (logprob_T * weight_T).sum().backward()
    return audit.read()


def audited_training(batch, impl="torch", **options) -> dict[str, float]:
    """What an audit says of the training pass, whose gradients are made in forward."""
    audit, head, weight_R = Audit(7, 3), head_of(batch, **options), weights_of(batch).float()
    loss, nll_R, logprob_T = linear_rationale_loss(
        batch.hidden, batch.weight, batch.target, batch.rationale, batch.positive, weight_R,
        beta=BETA, delta=DELTA, impl=impl, return_logprob=True, **head.options,
    )  # fmt: skip
    count_R = torch.bincount(batch.rationale[batch.target >= 0], minlength=len(nll_R)).clamp(min=1)
    dlogprob_T = (-loss_terms(nll_R, batch.positive, weight_R, BETA, DELTA)[1] / count_R)[batch.rationale]
    audit.watch(batch.hidden, head, batch.target, logprob_T, loss, dlogprob_T)
    (3 * loss).backward()
    return audit.read()
