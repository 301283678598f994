"""Checks of the kernels of `linear_kl` under Triton's interpreter, run as `interpreted_kernels.py` is."""

import math

import pytest
import torch

from csrc_triton import linear_logprob as kernels
from csrc_triton import product
from qcrd_fast import linear_kl
from tests.support.kl_oracle import BETAS, BUDGET, OPTIONS, Pair, dense_kl
from tests.support.loss_oracle import error

torch.set_num_threads(1)


@pytest.fixture
def split(monkeypatch):
    """The vocabulary in several parts and chunks, the last of them partial."""
    monkeypatch.setattr(product, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 40_000)


def check(pair, beta, dtype, options):
    expected, wanted = pair.run(dense_kl, beta, torch.float64, **options)
    actual, grads = pair.run(linear_kl, beta, dtype, impl="triton", **options)
    assert actual.dtype == torch.float32 and error(actual, expected) < 1e-6
    assert (actual >= 0).all() and (actual[pair.target < 0] == 0).all()
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == dtype and error(got, want) < BUDGET[dtype]


@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(beta):
    check(Pair(V=150).to(torch.float32), beta, torch.float32, OPTIONS[3])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_halves(beta):
    check(Pair(V=150).to(torch.float16), beta, torch.float16, OPTIONS[1])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_parts_and_chunks(beta, split):
    check(Pair(T=67, V=530).to(torch.float32), beta, torch.float32, OPTIONS[2])


@pytest.mark.parametrize("T, H, G, V", [(1, 8, 16, 1), (130, 64, 17, 256), (129, 17, 64, 5)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_shapes(T, H, G, V, beta):
    """One token; one word; tiles that divide everything and tiles that divide nothing."""
    pair = Pair(T, H, G, V).to(torch.float32)
    (out, grads), (expected, wanted) = (
        pair.run(linear_kl, beta, torch.float32, impl="triton"),
        pair.run(dense_kl, beta, torch.float64),
    )
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_equal_heads_masked_entries_and_ignored_tiles(beta, split):
    pair = Pair(T=140, V=280).to(torch.float32)
    mask = torch.zeros(280)
    mask[:200] = -math.inf
    pair.target[:130] = -100
    hidden, weight = 30 * pair.hidden, pair.weight
    same = linear_kl(
        hidden, weight, hidden, weight, pair.target, beta=beta, bias=mask, teacher_bias=mask, impl="triton"
    )
    assert same.abs().max() == 0
    leaves, teacher = (
        [pair.hidden.requires_grad_(), weight.requires_grad_()],
        (pair.teacher_hidden, pair.teacher_weight),
    )
    out = linear_kl(*leaves, *teacher, pair.target, beta=beta, bias=mask, teacher_bias=mask, impl="triton")
    truth = [x.detach().double() for x in (pair.hidden, weight[200:], teacher[0], teacher[1][200:])]
    assert error(out, linear_kl(*truth, pair.target, beta=beta, impl="eager")) < 1e-6
    dhidden, dweight = torch.autograd.grad(out.sum(), leaves)
    assert dhidden.isfinite().all() and (dweight[:200] == 0).all() and (dhidden[:130] == 0).all()


def test_a_teacher_of_another_type():
    """An fp32 teacher of an fp16 student: each is multiplied in its own."""
    pair = Pair(V=200).to(torch.float32)
    half = [x.half() for x in (pair.hidden, pair.weight)]
    out = linear_kl(*half, pair.teacher_hidden, pair.teacher_weight, impl="triton")
    truth = [x.double() for x in (*half, pair.teacher_hidden, pair.teacher_weight)]
    assert error(out, linear_kl(*truth, impl="eager")) < 1e-6
