"""KL from a teacher's K likeliest tokens: exact for K = V, a bound below, its gradients, and what it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.topk_kl import linear_top, log1mexp, topk_kl

HEADS = [
    {},
    {"scale": 0.3, "softcap": 2.5, "bias": True},
    {"temperature": 2.0, "bias": True},
]


def case(head, dtype=torch.float64, T=7, H=6, V=23, seed=0):
    """(hidden, weight, the head's options, the teacher's log-probs [T, V])."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    options = dict(head)
    if options.pop("bias", False):
        options["bias"] = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(T, V, generator=g, dtype=torch.float64)).log_softmax(1)
    return hidden, weight, options, teacher


def student_logp(hidden, weight, options):
    """log p [T, V] in float64, by hand."""
    z = options.get("scale", 1.0) * hidden.double() @ weight.double().T
    z = z + options["bias"].double() if "bias" in options else z
    z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
    return (z / options.get("temperature", 1.0)).log_softmax(1)


def kl_of(hidden, weight, options, logq, ids, tail=True):
    lse = linear_logprob(hidden, weight, ids[:, 0], return_lse=True, **options).lse
    return topk_kl(hidden, weight, lse, ids, logq, tail=tail, **options)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", [True, False])
def test_all_tokens_give_the_exact_kl(head, tail):
    for dtype, budget in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        hidden, weight, options, teacher = case(head, dtype)
        logq, ids = teacher.topk(teacher.shape[1], dim=1)
        exact = (teacher.exp() * (teacher - student_logp(hidden, weight, options))).sum(1)
        found = kl_of(hidden, weight, options, logq.to(dtype), ids, tail)
        assert found.dtype == dtype and (found.double() - exact).abs().max() <= budget * exact.max(), dtype


@pytest.mark.parametrize("head", HEADS)
def test_the_tail_form_is_a_bound_that_rises_with_k(head):
    hidden, weight, options, teacher = case(head)
    exact = (teacher.exp() * (teacher - student_logp(hidden, weight, options))).sum(1)
    found = torch.stack([kl_of(hidden, weight, options, *teacher.topk(k, dim=1)) for k in range(1, 24)])
    assert (found.diff(dim=0) >= -1e-14).all() and (found >= 0).all() and (found <= exact + 1e-14).all()
    assert (found[0] < exact - 1e-3).all()  # K = 1 leaves something out


def test_by_hand():
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4): K = 2 merges nothing but the last."""
    p = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    logq, ids = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log(), torch.tensor([[0, 1]])
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert topk_kl(one, p.T.contiguous(), zero, ids, logq).item() == pytest.approx(0.25 * math.log(2), abs=1e-15)
    # renormalised: (2/3, 1/3) against (1/3, 2/3)
    bare = topk_kl(one, p.T.contiguous(), zero, ids, logq, tail=False).item()
    assert bare == pytest.approx(math.log(2) / 3, abs=1e-15)
    first = topk_kl(one, p.T.contiguous(), zero, ids[:, :1], logq[:, :1]).item()  # (1/2, 1/2) against (1/4, 3/4)
    assert first == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-15)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tail", [True, False])
def test_gradients(head, tail):
    hidden, weight, options, teacher = case(head, T=3, H=4, V=9)
    logq, ids = teacher.topk(4, dim=1)
    # not used
    logq = logq.masked_fill(torch.tensor([[0, 0, 0, 1], [0] * 4, [0, 0, 1, 1]], dtype=torch.bool), -math.inf)
    bias = options.pop("bias", None)
    given = [hidden, weight, *([bias] if bias is not None else [])]

    def run(h, w, *b):
        return kl_of(h, w, options | ({"bias": b[0]} if b else {}), logq, ids, tail)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("nothing_left", ["of the teacher", "of the student", "of both"])
def test_a_tail_that_rounding_took_gives_no_nan(nothing_left):
    weight = torch.eye(4, dtype=torch.float32, requires_grad=True)
    sure, open_ = [40.0, 39.0, -80.0, -80.0], [1.0, 0.5, 0.2, 0.0]
    hidden = torch.tensor([open_ if nothing_left == "of the teacher" else sure]).requires_grad_()
    q = torch.tensor([open_ if nothing_left == "of the student" else sure]).log_softmax(1)
    found = kl_of(hidden, weight, {}, *q.topk(2, dim=1))
    found.sum().backward()
    assert found.isfinite().all() and (found >= -1e-6).all()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() < 100


def test_log1mexp_is_exact_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -0.5, -math.log(2), -2.0, -40.0], dtype=torch.float64)
    want = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert log1mexp(x).tolist() == pytest.approx(want, rel=1e-14)


def test_the_likeliest_tokens():
    hidden, weight, options, _ = case(HEADS[1])
    target = torch.arange(7)
    own, ids, top = linear_top(hidden, weight, target, 5, **options)
    logp = student_logp(hidden, weight, options)
    assert (own - logp.gather(1, target[:, None])[:, 0]).abs().max() < 1e-13
    assert torch.equal(ids, logp.topk(5, dim=1).indices) and (top - logp.topk(5, dim=1).values).abs().max() < 1e-13
    assert not own.requires_grad and linear_top(hidden, weight, target, 99, **options)[1].shape == (7, 23)


class Largest(TorchDispatchMode):
    """The most entries of any storage that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.untyped_storage().nbytes() // max(x.element_size(), 1))
        return out


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    from qcrd_fast.ops import chunked
    from qcrd_fast.ops import topk_kl as module

    monkeypatch.setattr(module, "GATHERED_BYTES", 2**14)
    monkeypatch.setattr(module, "LOGITS_BYTES", 2**17)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**16)
    hidden, weight, _, _ = case({}, torch.float32, T=512, H=8, V=2048)
    target = torch.zeros(512, dtype=torch.long)
    with Largest() as seen:
        _, ids, logq = linear_top(hidden, weight, target, 4)
        kl_of(hidden, weight, {}, logq, ids).sum().backward()
    assert seen.entries <= 64 * 1024 < 512 * 2048 / 8  # the online log-sum-exp's chunk is the largest
