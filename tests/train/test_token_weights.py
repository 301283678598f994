"""Weights of single tokens: against the formulas they come from, and w = 1 as no weight at all."""

from __future__ import annotations

import math

import pytest
import torch

from qcrd_fast.losses import weighted_rationale_loss
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.train.token_weights import TokenScores, advantage, log_ratio, preference, probability
from tests.support.draws import draws

SEGMENT = torch.tensor([0, 0, 0, 1, 1, 2])
POSITIVE = torch.tensor([True, False, False])


def scores_of(logprob, other=None, b=0.1):
    return TokenScores(logprob.detach(), torch.zeros_like(logprob) if other is None else other, SEGMENT, POSITIVE, b)


def some(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (-3 * torch.rand(6, generator=g, dtype=torch.float64)).requires_grad_()


def loss_of(logprob, token_weight=None, beta=0.2, **options):
    weight = torch.tensor([0.5, 0.25, 0.25], dtype=logprob.dtype)
    return weighted_rationale_loss(
        logprob, SEGMENT, POSITIVE, weight, beta=beta, delta=None, token_weight_T=token_weight, **options
    )[0]


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def test_sampled_tokens_give_the_gradient_of_the_reverse_kl():
    """V = 50: the mean over 1e5 tokens of our own sampler of -a grad log pi_S, within 3 standard errors of the exact
    gradient of KL(pi_S || pi_T), in each of the 50 logits and along the exact gradient."""
    V, count = 50, 100_000
    g = torch.Generator().manual_seed(5)
    student, teacher = (2 * torch.randn(V, generator=g, dtype=torch.float64) for _ in range(2))
    logits = student.clone().requires_grad_()
    logp, logq = logits.log_softmax(0), teacher.log_softmax(0)
    exact = gradient((logp.exp() * (logp - logq)).sum(), logits)

    key, counter = draws(count)
    hidden = torch.ones(count, 1, dtype=torch.float64)
    token = linear_sample(hidden, student[:, None].contiguous(), key, counter)
    logprob = logp.detach()[token]
    weight = advantage(TokenScores(logprob, logq[token], torch.zeros_like(token), torch.ones(1, dtype=torch.bool)))
    each = -weight[:, None] * (torch.nn.functional.one_hot(token, V) - logp.detach().exp())  # grad of -a log p_token
    error = (each.mean(0) - exact).abs() / (each.std(0) / math.sqrt(count))
    along = each @ exact / exact.norm()
    assert error.max() < 3.5 and (error < 3).double().mean() >= 0.96  # of 50, one beyond 3 is chance
    assert abs(along.mean() - exact.norm()) < 3 * along.std() / math.sqrt(count)
    assert abs(along.mean()) > 30 * along.std() / math.sqrt(count)  # the test can fail

    # and the same numbers through the loss itself
    one = token[:6]
    got = gradient(loss_of(logits.log_softmax(0)[one], weight[:6], beta=0.0), logits)
    by_hand = sum(0.5 / 3 * each[i] for i in range(3))
    assert (got - by_hand).abs().max() < 1e-14


def test_a_teacher_that_is_the_student_gives_exactly_nothing():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 8, generator=g).requires_grad_(), torch.randn(40, 8, generator=g)
    target = torch.arange(6)
    logprob = linear_logprob(hidden, head, target)
    weight = advantage(scores_of(logprob, linear_logprob(hidden.detach(), head, target)))
    loss = loss_of(logprob, weight)
    assert loss.item() == 0 and not gradient(loss, hidden).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_of_one_changes_no_bit(dtype):
    logprob = some().detach().to(dtype).requires_grad_()
    plain, weighted = loss_of(logprob), loss_of(logprob, torch.ones(6))
    assert torch.equal(plain, weighted) and torch.equal(gradient(plain, logprob), gradient(weighted, logprob))
    assert not torch.equal(plain, loss_of(logprob, torch.full((6,), 0.5)))


def test_dft_weighs_by_probability():
    logprob = some()
    got = gradient(loss_of(logprob, probability(scores_of(logprob)), beta=0.0), logprob)
    want = -0.5 / 3 * logprob.detach().exp() * (SEGMENT == 0)
    assert (got - want).abs().max() < 1e-15


@pytest.mark.parametrize("b", [0.1, 1.0])
def test_npo_has_the_gradient_of_its_formula(b):
    """(2 / b) log(1 + (pi / pi_ref)^b) of a negative over its tokens, beside a plain positive."""
    logprob, reference = some(), some(1).detach()
    token_weight = preference(scores_of(logprob, reference, b))
    assert (token_weight[:3] == 1).all()
    got = gradient(loss_of(logprob, token_weight), logprob)
    ratio = logprob - reference
    npo = [2 / b * torch.nn.functional.softplus(b * ratio[r == SEGMENT].sum()) / (r == SEGMENT).sum() for r in (1, 2)]
    want = gradient(-0.5 * logprob[:3].mean() + 0.2 * 0.25 * (npo[0] + npo[1]), logprob)
    assert (got - want).abs().max() < 1e-15
    assert log_ratio(scores_of(logprob, reference))[1].item() == pytest.approx(ratio[3:5].sum().item(), abs=1e-14)


def test_weights_are_detached():
    logprob = some()
    doubled = gradient(loss_of(logprob, logprob.exp()), logprob)
    assert torch.equal(doubled, gradient(loss_of(logprob, logprob.detach().exp()), logprob))
