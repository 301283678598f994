"""The training pass as one node: the same loss and gradients as log p and the loss over it, made in forward."""

import math

import pytest
import torch

from qcrd_fast import linear_logprob
from qcrd_fast.losses import weighted_rationale_loss
from qcrd_fast.ops import rationale_loss
from qcrd_fast.ops.rationale_loss import linear_rationale_loss
from tests.support.loss_oracle import BETA, DELTA, error, random_batch
from tests.support.rationale_losses import OPTIONS, both, weights_of


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed-again"])
@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize("delta", [DELTA, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_autograd_through_logits(options, delta, impl, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(rationale_loss, "KEPT_BYTES", 0)
    for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        got, want = both(random_batch().to(dtype), impl, delta, **options)
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < budget
    batch = random_batch()
    hinges = weighted_rationale_loss(linear_logprob(batch.hidden, batch.weight, batch.target), batch.rationale,
        batch.positive,
                                     weights_of(batch), beta=BETA, delta=DELTA,
                                     valid_T=batch.target != -100)[3]  # fmt: skip
    assert ((hinges < DELTA) & ~batch.positive).any() and ((hinges >= DELTA) & ~batch.positive).any()


def test_bf16_operands():
    got, want = both(random_batch().to(torch.bfloat16), "torch")
    assert got[0].dtype == torch.float32 and error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a.dtype == torch.bfloat16 and error(a, b) < 1e-2


@pytest.mark.parametrize("dtype, factor", [(torch.float16, 2.0**16), (torch.float16, 1.0), (torch.bfloat16, 1 / 3)])
def test_the_upstream_gradient_is_not_rounded_to_half_precision(dtype, factor):
    """2^16 is a GradScaler's first scale and more than fp16 holds; it is there for gradients that fp16 would flush to
    0."""
    batch = random_batch().to(torch.float32)
    shrunk = weights_of(batch) / (4e5 if factor > 1 else 1)
    with torch.autocast("cpu", dtype):
        head = (batch.hidden, batch.weight, batch.target, batch.rationale, batch.positive, shrunk)
        loss, _ = linear_rationale_loss(*head, beta=BETA, delta=DELTA, impl="torch")
    got = torch.autograd.grad(factor * loss, [batch.hidden, batch.weight])
    doubles = [x.detach().to(dtype).double().requires_grad_() for x in (batch.hidden, batch.weight)]
    logprob_T = linear_logprob(*doubles, batch.target, impl="eager")
    valid = batch.target != -100
    terms = (batch.rationale, batch.positive, shrunk)
    want = weighted_rationale_loss(logprob_T, *terms, beta=BETA, delta=DELTA, valid_T=valid)[0]
    for a, b, budget in zip(
        got, torch.autograd.grad(factor * want, doubles), (torch.finfo(dtype).eps / 2, 1e-6), strict=True
    ):
        assert a.dtype == torch.float32 and error(a, b) < budget


def test_small_gradients_of_fp16_take_the_losss_scale_before_they_are_rounded():
    """A weight of 1e-6 under GradScaler's first scale: rounded first, d loss / d logit would be 0 in fp16."""
    batch = random_batch().to(torch.float16)
    weight_R = torch.full((len(batch.positive),), 1e-6)
    call = (batch.target, batch.rationale, batch.positive, weight_R)
    loss, _ = linear_rationale_loss(batch.hidden, batch.weight, *call, beta=BETA, delta=DELTA, impl="torch")
    got = torch.autograd.grad(65536 * loss, (batch.hidden, batch.weight))
    doubles = [x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight)]
    loss, _ = linear_rationale_loss(*doubles, *call, beta=BETA, delta=DELTA, impl="eager")
    for a, b in zip(got, torch.autograd.grad(65536 * loss, doubles), strict=True):
        assert error(a, b) < 4e-3


def test_what_is_frozen_gets_no_gradient_and_costs_none():
    batch = random_batch().to(torch.float32)
    call = (batch.target, batch.rationale, batch.positive, weights_of(batch))
    terms = dict(beta=BETA, delta=DELTA, impl="torch")
    for hidden, weight in ((batch.hidden, batch.weight.detach()), (batch.hidden.detach(), batch.weight)):
        loss, _ = linear_rationale_loss(hidden, weight, *call, **terms)
        loss.backward()
    assert batch.hidden.grad is not None and batch.weight.grad is not None
    loss, _ = linear_rationale_loss(batch.hidden.detach(), batch.weight.detach(), *call, **terms)
    assert not loss.requires_grad
    with torch.no_grad():
        assert not linear_rationale_loss(batch.hidden, batch.weight, *call, **terms)[0].requires_grad


def test_a_second_backward_is_refused_rather_than_wrong():
    batch = random_batch().to(torch.float32)
    head = (batch.hidden, batch.weight, batch.target, batch.rationale, batch.positive, weights_of(batch))
    loss, _ = linear_rationale_loss(*head, beta=BETA, delta=DELTA, impl="torch")
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_valid_and_nothing_at_all():
    weight = torch.randn(7, 4, requires_grad=True)
    for T, R in ((0, 0), (3, 2)):
        hidden = torch.randn(T, 4, requires_grad=True)
        target, rationale = torch.full((T,), -100), torch.arange(T).clamp(max=1)
        loss, nll_R = linear_rationale_loss(
            hidden, weight, target, rationale, torch.ones(R).bool(), torch.ones(R), beta=BETA, delta=DELTA, impl="torch"
        )
        loss.backward()
        assert loss == 0 and nll_R.tolist() == [0.0] * R and not hidden.grad.any() and not weight.grad.any()


def test_a_nan_reaches_the_loss():
    batch = random_batch().to(torch.float32)
    hidden = batch.hidden.detach().clone()
    hidden[int((batch.target != -100).nonzero()[0])] = math.nan
    head = (hidden, batch.weight, batch.target, batch.rationale, batch.positive, weights_of(batch) + 1)
    assert linear_rationale_loss(*head, beta=BETA, delta=DELTA, impl="torch")[0].isnan()


def test_operator_contract_and_compile():
    batch = random_batch().to(torch.float32)
    valid = (
        batch.hidden,
        batch.weight,
        batch.target,
        batch.bias,
        batch.rationale,
        batch.positive,
        weights_of(batch).float(),
    )
    arguments = (*valid, BETA, DELTA, 1.0, 0.0, 1.0, -100, False, 2**20, [True, True, True])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(rationale_loss._rationale_loss, arguments, test_utils=checks)

    rest = (batch.target, batch.rationale, batch.positive, weights_of(batch))

    def call(hidden, weight):
        head = (hidden, weight, *rest)
        return linear_rationale_loss(*head, beta=BETA, delta=DELTA, impl="torch")[0]

    leaves = (batch.hidden, batch.weight)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(call(*leaves), leaves), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rationale=torch.tensor([0, 1, 0])), "rationale must be non-decreasing"),
        (dict(rationale=torch.tensor([0, 1, 2])), r"lie in \[0, 2\)"),
        (dict(rationale=torch.tensor([0, 1])), r"rationale must be \[3\]"),
        (dict(rationale_weight=torch.ones(3)), r"must be \[R\]"),
        (dict(target=torch.tensor([0, 1, 9])), r"target must lie in \[0, 5\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(
        hidden=torch.zeros(3, 4), weight=torch.zeros(5, 4), target=torch.zeros(3).long(),
        rationale=torch.tensor([0, 1, 1]),
        positive=torch.ones(2).bool(), rationale_weight=torch.ones(2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_rationale_loss(**{**arguments, **change}, beta=BETA, delta=DELTA)
