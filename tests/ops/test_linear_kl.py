"""The divergence of a student from a teacher against its formula over dense logits in float64; gradients, memory,
arguments."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from bench.timing import peak_mib
from qcrd_fast import linear_kl
from qcrd_fast.ops import chunked
from tests.support.kl_oracle import BETAS, BUDGET, OPTIONS, Pair, dense_kl
from tests.support.loss_oracle import error


@pytest.fixture(params=["one chunk", "chunks"])
def chunk_sizes(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(options, beta, dtype, chunk_sizes):
    """Against float64 on the same rounded operands; rows are ignored, or have no gradient."""
    pair = Pair().to(dtype)
    expected, wanted = pair.run(lambda *a, **k: dense_kl(*a, **k), beta, torch.float64, **options)
    for impl, settings in (("eager", {}), ("torch", {}), ("torch", dict(workspace_bytes=2**22))):
        actual, grads = pair.run(linear_kl, beta, dtype, impl=impl, **settings, **options)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (actual >= 0).all() and (actual[pair.target < 0] == 0).all()
        assert error(actual, expected) < (1e-13 if dtype == torch.float64 else 1e-6)
        for got, want in zip(grads, wanted, strict=True):
            assert got.dtype == dtype and error(got, want) < BUDGET[dtype], impl
            assert got.shape == want.shape


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("impl", ["eager", "torch"])
def test_gradcheck(beta, impl, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "MIN_CHUNK", 8)
    pair = Pair(T=3, H=4, G=5, V=20).to(torch.float64)
    teacher = (pair.teacher_hidden, pair.teacher_weight)
    rest = dict(beta=beta, teacher_bias=pair.teacher_bias, softcap=3.0, temperature=0.8, impl=impl)

    def call(hidden, weight, bias):
        return linear_kl(hidden, weight, *teacher, torch.tensor([0, -100, 0]), bias=bias, **rest)

    assert gradcheck(call, [x.requires_grad_() for x in (pair.hidden, pair.weight, pair.bias)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_heads_are_no_distance_apart(beta, dtype):
    """Exactly 0, also for far logits, and so is the gradient; the same weight may be on both sides."""
    pair = Pair(H=40).to(dtype)
    hidden, weight = (30 * pair.hidden).requires_grad_(), pair.weight.requires_grad_()
    out = linear_kl(hidden, weight, hidden, weight, beta=beta, impl="torch")
    assert out.abs().max() == 0
    assert all(grad.abs().max() < 1e-5 for grad in torch.autograd.grad(out.sum(), (hidden, weight)))


def test_half_a_mixture_is_symmetric():
    pair = Pair().to(torch.float64)
    student, teacher = (pair.hidden, pair.weight), (pair.teacher_hidden, pair.teacher_weight)
    a, b = (linear_kl(*pair_, beta=0.5, impl="torch") for pair_ in ((*student, *teacher), (*teacher, *student)))
    assert error(a, b) < 1e-14 and a.max() < math.log(2)


def test_reverse_is_forward_with_the_roles_swapped():
    pair = Pair().to(torch.float64)
    student, teacher = (pair.hidden, pair.weight), (pair.teacher_hidden, pair.teacher_weight)
    assert torch.equal(linear_kl(*student, *teacher, beta=1.0), linear_kl(*teacher, *student, beta=0.0))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("impl", ["eager", "torch"])
def test_masked_vocabulary_rows(beta, impl, chunk_sizes):
    """Entries that a bias of -inf takes from both are as if they were not there."""
    pair = Pair(V=300).to(torch.float64)
    mask = torch.zeros(300, dtype=torch.float64)
    mask[:200] = -math.inf
    leaves = [x.requires_grad_() for x in (pair.hidden, pair.weight)]
    teacher = (pair.teacher_hidden, pair.teacher_weight)
    out = linear_kl(*leaves, *teacher, beta=beta, bias=mask, teacher_bias=mask, impl=impl)
    want = linear_kl(leaves[0], leaves[1][200:], teacher[0], teacher[1][200:], beta=beta, impl=impl)
    assert error(out, want) < 1e-12
    if impl == "torch":
        for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (out, want)), strict=True):
            assert error(a, b) < 1e-12


def test_what_the_student_cannot_say_is_infinitely_far():
    pair = Pair(V=70).to(torch.float64)
    mask = torch.zeros(70, dtype=torch.float64)
    mask[3] = -math.inf
    head = (pair.hidden, pair.weight, pair.teacher_hidden, pair.teacher_weight)
    assert linear_kl(*head, bias=mask, impl="torch").isinf().all()
    assert linear_kl(*head, bias=mask, beta=0.5, impl="torch").isfinite().all()


def peak(T, V, impl, beta):
    """MiB that forward and backward hold at once, beyond the operands and their gradients."""
    hidden, teacher = torch.randn(T, 8, requires_grad=True), torch.randn(T, 12)
    weight, teacher_weight = torch.randn(V, 8, requires_grad=True), torch.randn(V, 12)

    def step():
        linear_kl(hidden, weight, teacher, teacher_weight, beta=beta, impl=impl).mean().backward()
        hidden.grad = weight.grad = None

    return peak_mib(step, torch.device("cpu")) - (hidden.nbytes + weight.nbytes) / 2**20


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_memory_does_not_grow_with_the_logits(beta, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**20)
    small, long, wide = (peak(T, V, "torch", beta) for T, V in ((512, 2048), (2048, 2048), (512, 8192)))
    assert long < small + 0.5 and wide < small + 0.5 and small < 12


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_quarter_of_eager_s_memory_at_most(beta):
    assert peak(2048, 4096, "torch", beta) < 0.25 * peak(2048, 4096, "eager", beta)


def test_the_teacher_gets_no_gradient():
    pair = Pair().to(torch.float32)
    teacher = [x.requires_grad_() for x in (pair.teacher_hidden, pair.teacher_weight, pair.teacher_bias)]
    for impl in ("eager", "torch"):
        out = linear_kl(pair.hidden, pair.weight, *teacher[:2], teacher_bias=teacher[2], impl=impl)
        assert not out.requires_grad
        out = linear_kl(
            pair.hidden.clone().requires_grad_(), pair.weight, *teacher[:2], teacher_bias=teacher[2], impl=impl
        )
        out.sum().backward()
        assert all(x.grad is None for x in teacher)


def test_a_frozen_head_and_frozen_hidden_states():
    pair = Pair().to(torch.float32)
    teacher = (pair.teacher_hidden, pair.teacher_weight)
    for i in range(2):
        leaves = [pair.hidden.clone(), pair.weight.clone()]
        leaves[i].requires_grad_()
        both = [pair.hidden.clone().requires_grad_(), pair.weight.clone().requires_grad_()]
        one, two = (linear_kl(*heads, *teacher, impl="torch").sum() for heads in (leaves, both))
        assert torch.equal(torch.autograd.grad(one, leaves[i])[0], torch.autograd.grad(two, both[i])[0])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_leading_shapes_and_a_bound_on_rows(beta):
    pair = Pair(T=24).to(torch.float64)
    hidden = pair.hidden.clone().requires_grad_()
    shaped = (hidden.reshape(4, 6, -1), pair.weight, pair.teacher_hidden.reshape(4, 6, -1), pair.teacher_weight)
    flat = linear_kl(
        hidden, pair.weight, pair.teacher_hidden, pair.teacher_weight, pair.target, beta=beta, impl="torch"
    )
    few = torch.arange(24) % 5 == 0
    for bound in (None, 10):
        out = linear_kl(*shaped, pair.target.reshape(4, 6), beta=beta, impl="torch", max_rows=bound)
        assert out.shape == (4, 6) and torch.equal(out.flatten(), flat)
        grad, want = (torch.autograd.grad(x.flatten()[few].sum(), hidden, retain_graph=True)[0] for x in (out, flat))
        assert error(grad, want) < 1e-14
    with pytest.raises(ValueError, match="tokens have a gradient"):
        linear_kl(*shaped, beta=beta, impl="torch", max_rows=3).sum().backward()


def test_no_tokens():
    pair = Pair().to(torch.float32)
    hidden = pair.hidden[:0].clone().requires_grad_()
    out = linear_kl(hidden, pair.weight, pair.teacher_hidden[:0], pair.teacher_weight, impl="torch")
    out.sum().backward()
    assert out.shape == (0,) and hidden.grad.shape == hidden.shape


def test_types_of_their_own_and_autocast():
    """A bf16 teacher of an fp32 student; under autocast both products are bf16's."""
    pair = Pair().to(torch.float32)
    student = (pair.hidden, pair.weight)
    bf16 = (pair.teacher_hidden.bfloat16(), pair.teacher_weight.bfloat16())
    want = linear_kl(*student, *(x.float() for x in bf16), impl="torch")
    assert error(linear_kl(*student, *bf16, impl="torch"), want) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_kl(*student, *bf16, impl="torch")
    assert cast.dtype == torch.float32
    assert torch.equal(cast, linear_kl(student[0].bfloat16(), student[1].bfloat16(), *bf16, impl="torch"))


def test_compiled_whole():
    pair, beta = Pair().to(torch.float64), 0.5

    def loss(hidden, weight):
        return linear_kl(
            hidden, weight, pair.teacher_hidden, pair.teacher_weight, pair.target, beta=beta, impl="torch"
        ).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (pair.hidden, pair.weight)]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(error(a, b) < 1e-14 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(beta=1.5), r"beta must be 0 \(forward KL\) to 1 \(reverse KL\), got 1.5"),
        (dict(beta=torch.tensor(0.5, requires_grad=True)), "beta must be a constant"),
        (
            dict(teacher_hidden=torch.zeros(4, 9)),
            r"teacher_hidden must be \[37, G\] on cpu, .* got \[4, 9\]",
        ),
        (
            dict(teacher_weight=torch.zeros(64, 40)),
            r"teacher_weight must be \[300, G\], .* got \[64, 40\]",
        ),
        (
            dict(teacher_weight=torch.zeros(300, 9)),
            r"teacher_weight must be \[V, 40\] to match teacher_hidden \[37, 40\]",
        ),
        (dict(teacher_bias=torch.zeros(3)), r"teacher_bias must be \[300\] to match teacher_weight, got \[3\]"),
        (dict(teacher_softcap=-1.0), "teacher_softcap must be above 0"),
        (dict(teacher_scale=math.inf), "teacher_scale must be finite"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), r"target must be \[37\] to match hidden"),
        (dict(temperature=torch.ones(37)), "temperature must be a number"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(workspace_bytes=-1), "workspace_bytes must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change, message):
    pair = Pair(V=300).to(torch.float32)
    given = dict(
        hidden=pair.hidden, weight=pair.weight, teacher_hidden=pair.teacher_hidden, teacher_weight=pair.teacher_weight
    )
    with pytest.raises(ValueError, match=message):
        linear_kl(**given | change)
    with pytest.raises(TypeError, match="teacher_hidden must be a tensor, got None"):
        linear_kl(**given | dict(teacher_hidden=None))


def test_forward_mode_is_refused():
    pair = Pair().to(torch.float64)
    teacher = (pair.teacher_hidden, pair.teacher_weight)
    with pytest.raises(ValueError, match="forward-mode AD is not supported"):
        torch.func.jvp(lambda x: linear_kl(x, pair.weight, *teacher, impl="torch"), (pair.hidden,), (pair.hidden,))
