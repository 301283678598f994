"""The shadow check: healthy implementations pass it, broken ones do not, and neither the weights nor a resume notice
it."""

from __future__ import annotations

import math

import pytest
import torch

from qcrd_fast import linear_logprob
from qcrd_fast.models.lm_head import Head
from qcrd_fast.train import audit as audits
from qcrd_fast.train.audit import Audit, recompute
from tests.support.audits import audited, audited_training, head_of
from tests.support.loss_oracle import random_batch
from tests.support.rationale_losses import OPTIONS

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("options", [o for o in OPTIONS if "temperature" not in o], ids=str)
@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_healthy_stays_far_within_its_budget(dtype, impl, options):
    found = audited(random_batch().to(dtype), impl, **options)
    assert 0 < found["audit_budget_used"] < 0.5 and found["audit_max_err"] < 1e-5
    assert 0 < found["audit_grad_err"] < audits.GRADIENT_BUDGET[dtype] / 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("impl", ["torch", "eager"])
def test_the_training_pass_is_audited_too(dtype, impl):
    found = audited_training(random_batch().to(dtype), impl)
    assert 0 < found["audit_grad_err"] < audits.GRADIENT_BUDGET[dtype] / 2 and 0 < found["audit_budget_used"] < 0.5


@pytest.mark.parametrize("options", [o for o in OPTIONS if "temperature" not in o], ids=str)
def test_what_it_recomputes_is_autograd_through_float64_logits(options):
    batch = random_batch().to(torch.float64)
    head, target_T = head_of(batch, **options), batch.target
    logprob_T, slope_TH, size_T, reach_T = recompute(batch.hidden.detach(), head, target_T)
    expected_T = linear_logprob(batch.hidden, batch.weight, target_T, impl="eager", **head.options)
    expected_TH = torch.autograd.grad(expected_T.sum(), batch.hidden)[0]
    torch.testing.assert_close(logprob_T, expected_T.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope_TH, expected_TH, rtol=1e-10, atol=1e-12)
    assert (size_T > 1).all() and (reach_T > 0).all()


def test_in_small_pieces_it_recomputes_the_same(monkeypatch):
    batch = random_batch().to(torch.float32)
    whole = recompute(batch.hidden.detach(), head_of(batch), batch.target)
    monkeypatch.setattr(audits, "HEAD_BYTES", 7 * 8 * 24)  # seven of its rows
    for a, b in zip(whole, recompute(batch.hidden.detach(), head_of(batch), batch.target), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "harm",
    [
        lambda x_T: x_T + 1e-2 * (torch.arange(len(x_T)) % 5 == 0),  # some rows
        lambda x_T: x_T + 1e-2,
        lambda x_T: x_T.bfloat16().float(),  # rounded as torch's own fused op returns it
        lambda x_T: torch.where(torch.arange(len(x_T)) == 11, math.nan, x_T),
        lambda x_T: torch.where(torch.arange(len(x_T)) == 11, -math.inf, x_T),
    ],
    ids=["some-rows", "all-rows", "bf16", "nan", "inf"],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_wrong_log_probs_are_found(dtype, harm):
    batch = random_batch().to(dtype)
    batch.target[11] = 5  # not ignored
    assert audited(batch, harm=harm)["audit_budget_used"] > 10


@pytest.mark.parametrize("factor", [0.9, -1.0, math.nan])
@pytest.mark.parametrize("dtype", FLOATS)
def test_wrong_gradients_are_found(dtype, factor):
    """The values are right; what flows back is not."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    batch, audit = random_batch().to(dtype), Audit(0, 0)
    logprob_T = linear_logprob(Wrong.apply(batch.hidden), batch.weight, batch.target, bias=batch.bias)
    audit.watch(batch.hidden, head_of(batch), batch.target, logprob_T)
    logprob_T.sum().backward()
    found = audit.read()
    assert found["audit_budget_used"] > 5 and found["audit_max_err"] < 1e-5


def test_hidden_states_that_are_not_numbers_are_not_the_implementations_fault():
    """The loss is NaN as well, which names the step and its questions."""
    batch = random_batch().to(torch.float32)
    with torch.no_grad():
        batch.hidden[2] = math.nan
    batch.target[2] = 4
    assert audited(batch)["audit_budget_used"] < 0.5


def test_rows_belong_to_the_seed_the_step_the_rank_and_the_pass():
    def rows(*key, skip=0, count=1000):
        audit = Audit(*key)
        for _ in range(skip):
            audit._rows(count)
        return audit._rows(count)

    first = rows(0, 5)
    assert first.shape == (64,) and first.unique().numel() > 50 and first.min() >= 0 and first.max() < 1000
    state = torch.random.get_rng_state()
    assert torch.equal(rows(0, 5), first) and torch.equal(torch.random.get_rng_state(), state)
    others = [rows(1, 5), rows(0, 6), rows(0, 5, 1), rows(0, 5, skip=1)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(rows(0, 5, count=64), torch.arange(64)) and not len(rows(0, 5, count=0))


def test_autocast_is_audited_in_its_own_type():
    batch = random_batch().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = audited(batch)
    assert found["audit_budget_used"] < 0.5 and found["audit_grad_err"] > 1e-5  # the budget of bf16, not that of fp32


def test_nothing_to_audit_is_no_failure():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(7, 4)
    audit, target = Audit(0, 0), torch.zeros(0).long()
    audit.watch(hidden, Head(weight), target, linear_logprob(hidden, weight, target))
    assert audit.read() == {}


def test_where_memory_is_short_it_is_left_out_and_said(monkeypatch, caplog):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(audits, "recompute", fails)
    assert audited(random_batch().to(torch.float32)) == {} and "step 4: not all of it was audited" in caplog.text


def test_small_logits_and_empty_rows_of_the_head_are_no_failure():
    """Rounding a tanh costs as much of the softcap however small the logit; a target whose row is 0 has no term of its
    own."""
    batch = random_batch().to(torch.float32)
    with torch.no_grad():
        batch.hidden /= 1000
        batch.weight[:100] = 0
        batch.target[batch.target > 0] %= 100
    assert audited(batch, softcap=30.0)["audit_budget_used"] < 0.5
