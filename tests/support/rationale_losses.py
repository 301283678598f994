"""The loss of known weights, fused and in two steps."""

from __future__ import annotations

import torch

from qcrd_fast import linear_logprob
from qcrd_fast.losses import weighted_rationale_loss
from qcrd_fast.ops.rationale_loss import linear_rationale_loss
from tests.support.loss_oracle import BETA, DELTA

OPTIONS = [
    dict(),
    dict(scale=0.4),
    dict(scale=-0.3, temperature=0.7),
    dict(softcap=2.0),
    dict(scale=0.3, softcap=1.5, temperature=1.4),
]


def weights_of(batch):
    """Some rationales weigh nothing, and some negatives are beyond the margin."""
    weight_R = torch.rand(len(batch.positive), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight_R[::4] = 0
    return weight_R.to(batch.hidden.device)


def both(batch, impl, delta=DELTA, with_bias=True, **options):
    """(loss, nll, gradients) of the node under test, and of autograd through float64 logits."""
    weight_R, bias = weights_of(batch), batch.bias if with_bias else None
    loss, nll_R = linear_rationale_loss(
        batch.hidden, batch.weight, batch.target, batch.rationale, batch.positive, weight_R,
        beta=BETA, delta=delta, bias=bias, impl=impl, **options,
    )  # fmt: skip
    leaves = [batch.hidden, batch.weight] + [batch.bias] * with_bias
    got = [loss, nll_R, *torch.autograd.grad(3 * loss, leaves)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    logprob_T = linear_logprob(
        *doubles[:2], batch.target, bias=doubles[2] if with_bias else None, impl="eager", **options
    )
    valid = batch.target != -100
    want = weighted_rationale_loss(
        logprob_T, batch.rationale, batch.positive, weight_R, beta=BETA, delta=delta, valid_T=valid
    )
    return got, [want[0], want[3], *torch.autograd.grad(3 * want[0], doubles)]
