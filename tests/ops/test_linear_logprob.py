"""What `linear_logprob` returns beside log p, and what it accepts and refuses; `tests/test_losses.py` has its
numbers."""

import copy
import math
import pickle
import shutil

import pytest
import torch
import torch._inductor.config

from qcrd_fast import LogProbOutput, QCRDLoss, contrastive_loss, linear_logprob
from qcrd_fast.ops import chunked
from qcrd_fast.ops.cpu_products import product
from qcrd_fast.ops.rationale_loss import linear_rationale_loss
from tests.support.loss_oracle import error

ALL = dict(return_lse=True, return_entropy=True, return_top1=True, return_sum_p2=True)
RATIONALES = (torch.arange(9) // 3, torch.tensor([0, 0, 1]), torch.tensor([True, False, True]))


@pytest.fixture
def head():
    """(hidden [9, 5], weight [70, 5], target [9], the last one ignored), float64."""
    noise = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=noise, dtype=torch.float64).requires_grad_() for n in (9, 70))
    target = torch.randint(0, 70, (9,), generator=noise)
    target[0] = (hidden[0] @ weight.T).argmax()
    target[-1] = -100
    return hidden, weight, target


@pytest.mark.parametrize("impl", ["eager", "torch"])
def test_extras_by_name_and_by_place(head, impl):
    """Each extra is right; those that were not asked for are None and take no place."""
    hidden, weight, target = head
    out = linear_logprob(*head, impl=impl, **ALL)
    logits, valid = hidden @ weight.T, target >= 0
    p = logits.softmax(1)
    assert error(out.lse, logits.logsumexp(1) * valid) < 1e-12
    assert error(out.entropy, -(p * p.log()).sum(1) * valid) < 1e-12
    assert error(out.sum_p2, p.square().sum(1) * valid) < 1e-12 and not out.sum_p2.requires_grad
    assert out.is_top1.tolist() == ((logits.argmax(1) == target) & valid).tolist() and out.is_top1[0]
    assert len(out) == 5 and out[4] is out.sum_p2
    plain = linear_logprob(*head, impl=impl)
    assert torch.equal(plain, out.logprob)
    for asked in (["lse"], ["entropy"], ["lse", "entropy"], ["is_top1", "sum_p2"]):
        flags = {f"return_{'top1' if name == 'is_top1' else name}": True for name in asked}
        some = linear_logprob(*head, impl=impl, **flags)
        assert isinstance(some, LogProbOutput) and isinstance(some, tuple) and len(some) == 1 + len(asked)
        _logprob, *extras = some
        for name, extra in zip(asked, extras, strict=True):
            assert extra is getattr(some, name) and torch.equal(extra, getattr(out, name))
        assert all(getattr(some, name) is None for name in ("lse", "entropy", "is_top1", "sum_p2") if name not in asked)


def test_the_output_is_pickled_copied_and_mapped_as_it_is(head):
    with torch.no_grad():
        out = linear_logprob(*head, impl="torch", return_entropy=True)
    mapped = torch.utils._pytree.tree_map(lambda x: x, out)
    for other in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), mapped):
        assert isinstance(other, LogProbOutput) and other.lse is None and torch.equal(other.entropy, out.entropy)


@pytest.mark.parametrize("impl", ["eager", "torch"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.7}], ids=["plain", "softcap"])
def test_a_temperature_for_each_token(head, impl, options):
    """Tokens of [3, 3] with a temperature each are as if computed one by one; so are their gradients."""
    hidden, weight, target = head
    temperature, bias = torch.linspace(0.5, 2.0, 9, dtype=torch.float64), torch.linspace(-1, 1, 70, dtype=torch.float64)
    options = dict(bias=bias, return_entropy=True, impl=impl, **options)
    shaped = (hidden.reshape(3, 3, 5), weight, target.reshape(3, 3))
    out = linear_logprob(*shaped, temperature=temperature.reshape(3, 3), **options)
    ones = [
        linear_logprob(hidden[[i]], weight, target[[i]], temperature=float(temperature[i]), **options) for i in range(9)
    ]
    for got, want in ((out.logprob, [x.logprob for x in ones]), (out.entropy, [x.entropy for x in ones])):
        assert got.shape == (3, 3) and error(got.flatten(), torch.cat(want)) < 1e-12
        grads, expected = (
            torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (got.sum(), torch.cat(want).sum())
        )
        assert all(error(a, b) < 1e-12 for a, b in zip(grads, expected, strict=True))
    assert linear_logprob(*head, temperature=temperature, max_rows=4, impl=impl)[::2].sum().backward() is None


def test_a_temperature_for_each_token_of_the_training_pass(head):
    arguments = (*head, *RATIONALES[:1], RATIONALES[2], torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64))
    options = dict(beta=0.2, delta=3.0)
    each = torch.full((9,), 0.7, dtype=torch.float64)
    a, b = (linear_rationale_loss(*arguments, temperature=t, **options)[0] for t in (each, 0.7))
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


@pytest.mark.parametrize(
    "temperature, message",
    [
        (torch.ones(8), r"temperature must be a number or \[9\] to match target, got \[8\]"),
        (torch.tensor([1.0] * 8 + [0.0]), "temperature must be above 0 and finite, got 0 to 1"),
        (torch.tensor([1.0] * 8 + [math.inf]), "temperature must be above 0 and finite"),
    ],
)
def test_wrong_temperatures_are_refused(head, temperature, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(*head, temperature=temperature)


def test_constants_that_require_grad_are_refused(head):
    """Their gradient would be dropped without a word."""
    learnt = torch.tensor(1.0, requires_grad=True)
    for name in ("scale", "softcap", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be a constant: it requires grad"):
            linear_logprob(*head, **{name: learnt})
    with pytest.raises(ValueError, match="temperature must be a constant"):
        linear_logprob(*head, temperature=torch.ones(9, requires_grad=True))
    for name in ("beta", "delta"):
        with pytest.raises(ValueError, match=f"{name} must be a constant"):
            contrastive_loss(torch.zeros(9), *RATIONALES, **{name: learnt})
        with pytest.raises(ValueError, match=f"{name} must be a constant"):
            QCRDLoss(**{name: learnt})
    assert linear_logprob(*head, scale=torch.tensor(0.5)).equal(linear_logprob(*head, scale=0.5))


def test_forward_mode_is_refused(head):
    """A custom operator would give tangents of 0; the eager one gives the right ones."""
    hidden, weight, target = (x.detach() for x in head)
    ones = torch.ones_like(hidden)

    def tangent(loss):
        return torch.func.jvp(loss, (hidden,), (ones,))[1]

    def loss(impl):
        return lambda x: linear_logprob(x, weight, target, impl=impl).sum()

    step = 1e-6
    expected = (loss("eager")(hidden + step * ones) - loss("eager")(hidden - step * ones)) / (2 * step)
    assert tangent(loss("eager")).item() == pytest.approx(expected.item(), rel=1e-6)
    weights = torch.ones(3)
    for wrong in (
        loss("torch"),
        lambda x: contrastive_loss(x.sum(1), *RATIONALES, impl="torch").loss,
        lambda x: linear_rationale_loss(
            x, weight, target, *RATIONALES[::2], weights, beta=0.2, delta=3.0, impl="torch"
        )[0],
    ):
        with pytest.raises(ValueError, match="forward-mode AD is not supported"):
            tangent(wrong)


def test_the_gradient_of_the_entropy_does_not_cancel():
    """Far logits: fp32 is as near to float64 as autograd's is, not off by the size of the logits.

    The operands are small whole numbers over a power of 2, so that every processor's product is exact, also when
    repeated.
    """
    generator = torch.Generator().manual_seed(0)
    far = 64.0 * torch.randint(-2, 3, (1, 24), generator=generator)  # in all logits of a row alike
    weight_VH = far + torch.randint(-3, 4, (53, 24), generator=generator) / 16
    hidden_TH = torch.randint(-4, 5, (13, 24), generator=generator)
    target_T = torch.randint(0, 53, (13,), generator=generator)
    errors, truth = [], None
    for dtype, impl in ((torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "torch")):
        hidden = hidden_TH.to(dtype).requires_grad_()
        out = linear_logprob(hidden, weight_VH.to(dtype), target_T, return_entropy=True, impl=impl)
        out.entropy.sum().backward()
        truth = hidden.grad if truth is None else truth
        errors.append(float((hidden.grad.double() - truth).norm() / truth.norm()))
    assert errors[2] < 3 * errors[1]


def test_a_bound_below_the_rows_names_itself(head):
    with pytest.raises(
        ValueError, match=r"max_selected_tokens is 3 \(linear_logprob: max_rows\), but 8 tokens have a gradient"
    ):
        linear_logprob(*head, max_rows=3, impl="torch").sum().backward()


def test_a_head_between_forwards_names_its_state(head):
    hidden, weight, target = head
    with pytest.raises(ValueError, match=r"weight is on the meta device, as offloading.*qcrd_fast.attach"):
        linear_logprob(hidden, weight.to("meta"), target)


# ---- torch.compile
# ------------------------------------------------------------------------------------------------------


def assert_traced(function, *calls, dynamic=True, backend="aot_eager"):
    """One graph, without a break, gives what plain Python gives for every call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for call in calls:
        torch.testing.assert_close(compiled(*call), function(*call))
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", ["scale", "softcap", "temperature"])
def test_dynamic_floats_of_log_prob(head, name, dynamic):
    hidden, weight, target = (x.detach() for x in head)

    def loss(hidden, value):
        out = linear_logprob(hidden, weight, target, impl="torch", **{name: value}, **ALL)
        return out.logprob.sum() + out.entropy.sum() + out.sum_p2.sum() + out.is_top1.sum()

    assert_traced(loss, (hidden, 1.0), (hidden, 0.5), (hidden, 0.7), dynamic=dynamic)


@pytest.mark.parametrize("scheme", ["minmax", "wmean", "sampling"])
def test_dynamic_floats_of_the_losses(head, scheme):
    hidden, weight, target = (x.detach() for x in head)

    def contrast(logprob, beta, delta, num_questions, iteration):
        options = dict(
            beta=beta, delta=delta, num_questions=num_questions, iteration=iteration, scheme=scheme, impl="torch"
        )
        return contrastive_loss(logprob, *RATIONALES, **options).loss

    logprob = -hidden.sum(1).abs()
    assert_traced(contrast, (logprob, 0.2, 3.0, 2, 0), (logprob, 0.3, 2.5, 3, 1), (logprob, 0.4, 0.5, 5, 7))

    def whole(hidden, scale, beta, iteration):
        loss_fn = QCRDLoss(beta, 3.0, scheme, scale=scale, impl="torch")
        return loss_fn(hidden, weight, target, *RATIONALES, iteration=iteration).loss

    assert_traced(whole, (hidden, 1.0, 0.2, 0), (hidden, 0.5, 0.3, 4))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@torch._inductor.config.patch({"cpp.simdlen": 1})  # its vector code does not compile where torch runs without vectors
def test_sampling_under_inductor():
    """The hash is no part of the graph, so a new iteration compiles nothing that overflows; large seeds work too."""
    logprob = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2**64 - 3):

        def sample(logprob, iteration, seed=seed):
            options = dict(scheme="sampling", seed=seed, iteration=iteration, impl="torch")
            return contrastive_loss(logprob, *RATIONALES, **options).loss

        assert_traced(sample, *((logprob, i) for i in range(3)), dynamic=None, backend="inductor")


@pytest.mark.parametrize("columns", [0, 20, 64, 70, 1000])
@pytest.mark.parametrize("options", [dict(), dict(softcap=2.0, temperature=0.7), dict(scale=0.4)], ids=str)
@pytest.mark.parametrize("extras", [dict(), dict(return_lse=True, return_entropy=True)], ids=["logprob", "entropy"])
@pytest.mark.parametrize("max_rows", [None, 7])
def test_logits_kept_for_the_backward_pass(head, columns, options, extras, max_rows, monkeypatch):
    """All, some, or none of the chunks kept; a backward pass over some of the rows; twice over one graph."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "MIN_CHUNK", 10)
    hidden, weight, target = head
    bias = torch.linspace(-1, 1, 70, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.0, 1, -2, 0, 0.5, 3, 0, 1, 1], dtype=torch.float64)

    def gradients(twice=False, **settings):
        out = linear_logprob(hidden, weight, target, bias=bias, **options, **extras, **settings)
        parts = out if extras else [out]
        loss = sum((weights * part).sum() * (i + 1) for i, part in enumerate(parts))
        if twice:
            torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
        return torch.autograd.grad(loss, (hidden, weight, bias))

    kept = []
    forward = chunked.chunked_forward
    monkeypatch.setattr(chunked, "chunked_forward", lambda *args: kept.append(forward(*args)) or kept[-1])
    got = gradients(twice=True, impl="torch", max_rows=max_rows, workspace_bytes=8 * 9 * columns)
    assert len(kept[0][6]) == 9 * min(columns // 10 * 10, 70)
    for a, b in zip(got, gradients(impl="eager"), strict=True):
        assert error(a, b) < 1e-12


def test_nothing_is_kept_where_nothing_is_differentiated(head, monkeypatch):
    kept = []
    forward = chunked.chunked_forward
    monkeypatch.setattr(chunked, "chunked_forward", lambda *args: kept.append(forward(*args)[6]) or forward(*args))
    with torch.no_grad():
        linear_logprob(*head, workspace_bytes=2**20, impl="torch")
    linear_logprob(*(x.detach() for x in head), workspace_bytes=2**20, impl="torch")
    assert [len(x) for x in kept] == [0, 0]
    with pytest.raises(ValueError, match="workspace_bytes must be at least 0, got -1"):
        linear_logprob(*head, workspace_bytes=-1)


def test_bf16_gradients_by_the_processors_own_products(monkeypatch):
    """Those of operands rounded to bf16, within what rounding the logits' gradient once and each chunk's dHidden
    allows."""
    noise = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 48, generator=noise).bfloat16().requires_grad_() for n in (130, 900))
    target, weights = torch.randint(0, 900, (130,), generator=noise), torch.rand(130, generator=noise)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 130 * 100)

    def gradients(*leaves, **settings):
        return torch.autograd.grad((weights * linear_logprob(*leaves, target, **settings)).sum(), leaves)

    want = gradients(*(x.detach().double().requires_grad_() for x in (hidden, weight)), impl="eager")
    for narrow in (True, False):
        monkeypatch.setattr(chunked, "has_bf16_products", lambda device, narrow=narrow: narrow)
        for a, b in zip(gradients(hidden, weight, impl="torch"), want, strict=True):
            assert a.dtype == torch.bfloat16 and error(a, b) < 5e-3


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_products_of_any_layout(layout):
    """Whatever library takes them, fp32 products are those of float64 within rounding, also of views and of nothing."""
    noise = torch.Generator().manual_seed(2)
    a, b = torch.randn(70, 90, generator=noise), torch.randn(90, 110, generator=noise)
    if layout == "columns":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    if layout == "strided":
        a, b = a.repeat_interleave(2, 1)[:, ::2], b.repeat_interleave(3, 0)[::3]
    assert error(product(a, b), a.double() @ b.double()) < 1e-6
    assert product(a[:0], b).shape == (0, 110) and not product(a[:, :0], b[:0]).any()
    assert error(product(a[:1], b), a[:1].double() @ b.double()) < 1e-6
