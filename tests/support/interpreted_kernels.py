"""Checks of the kernels under Triton's interpreter. `ops/test_kernels.py` runs this file in a process of its own, since
a kernel imported under TRITON_INTERPRET=1 cannot be compiled afterwards. The interpreter multiplies bf16 wrongly: fp32
and fp16 here.
"""

import math

import pytest
import torch

from bench import cases as bench_cases
from bench import tuning as bench_tuning
from bench.cases import Case
from csrc_triton import linear_logprob as kernels
from csrc_triton import product
from csrc_triton.product import Tile
from qcrd_fast import QCRDLoss, contrastive_loss, linear_logprob
from qcrd_fast.config import NEGATIVE_SELECT, POSITIVE_SELECT, SCHEMES
from qcrd_fast.ops import rationale_loss
from qcrd_fast.ops.chunked import head_logits
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.ops.reference import HeadOptions
from tests.support.audits import audited, audited_training
from tests.support.loss_oracle import BETA, DELTA, Batch, dense_logprob, error, expected_terms, random_batch
from tests.support.nan_qualities import CASES, expected
from tests.support.rationale_losses import both

torch.set_num_threads(1)
BUDGET = {torch.float32: 2e-6, torch.float16: 2e-3}
OPTIONS = [  # (whether there is a bias, options)
    (False, dict()),
    (False, dict(scale=24**-0.5)),
    (False, dict(scale=-0.4)),
    (True, dict(temperature=0.7)),
    (True, dict(scale=0.4)),
    (False, dict(softcap=2.0)),
    (True, dict(scale=0.3, softcap=1.5, temperature=1.4)),
]


WAYS = [  # (type, layout): fp16 is another type in the same kernels
    (torch.float32, "whole"),
    (torch.float32, "split"),
    (torch.float16, "split"),
]


@pytest.fixture(params=["whole", "split"])
def layout(request, monkeypatch):
    """The vocabulary in one part and one chunk, or in several, the last of them partial."""
    if request.param == "split":
        monkeypatch.setattr(product, "multiprocessors", lambda device: 100)
        monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 40_000)


def doubled(batch):
    names = ("hidden", "weight", "bias")
    return Batch(**{**vars(batch), **{n: getattr(batch, n).detach().double().requires_grad_() for n in names}})


@pytest.mark.parametrize("dtype, layout", WAYS, indirect=["layout"])
@pytest.mark.parametrize("with_bias, options", OPTIONS, ids=str)
def test_log_prob_and_its_gradients(with_bias, options, dtype, layout):
    batch = random_batch(V=1003).to(dtype)
    if not with_bias:
        batch.bias = torch.zeros_like(batch.bias).requires_grad_()
    truth, bias = doubled(batch), batch.bias if with_bias else None
    weights = torch.randn(len(batch.target), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[::3] = 0
    expected = dense_logprob(truth, **options)
    actual = linear_logprob(batch.hidden, batch.weight, batch.target, bias=bias, impl="triton", **options)
    assert actual.dtype == torch.float32 and error(actual, expected) < 2e-6
    assert (actual <= 0).all() and (actual[batch.target < 0] == 0).all()
    grads, wanted = batch.grads((actual * weights).sum()), truth.grads((expected * weights).sum())
    for got, want in list(zip(grads, wanted, strict=True))[: 3 if with_bias else 2]:
        assert got.dtype == dtype and error(got, want) < 3 * BUDGET[dtype]


@pytest.mark.parametrize("T, H, V", [(1, 8, 1), (1, 64, 1024), (130, 64, 1024), (129, 17, 5), (64, 33, 1009)])
def test_shapes(T, H, V, layout):
    """One token; one word; tiles that divide everything and tiles that divide nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator) / 2 for n in (T, V))
    target = torch.randint(0, V, (T,), generator=generator)
    results = []
    for impl, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        out = linear_logprob(*leaves, target, impl=impl, return_lse=True, return_entropy=True)
        results.append([*out, *torch.autograd.grad(sum((x * x).sum() for x in out), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("options", [dict(), dict(scale=0.3, softcap=1.5, temperature=1.4)])
def test_log_sum_exp_and_entropy(options, layout):
    plain = random_batch(V=1003).to(torch.float32)
    results = []
    for impl, batch in (("triton", plain), ("eager", plain), ("eager", doubled(plain))):
        head = (batch.hidden, batch.weight, batch.target)
        out = linear_logprob(*head, bias=batch.bias, return_lse=True, return_entropy=True, impl=impl, **options)
        results.append([*out, *batch.grads((out[1] ** 2).sum() + (out[2] ** 2).sum())])
    for got, usual, want in zip(*results, strict=True):
        assert error(got, want) < 3 * error(usual, want) + 1e-6


def test_masked_vocabulary_rows(layout):
    """A bias of -inf switches off a whole part of the vocabulary."""
    batch = random_batch(V=1003).to(torch.float32)
    truth = doubled(batch)
    bias = torch.zeros(1003)
    bias[:600] = -math.inf
    target = batch.target.clamp(min=600)
    out = linear_logprob(batch.hidden, batch.weight, target, bias=bias, return_entropy=True, impl="triton")
    dense = linear_logprob(truth.hidden, truth.weight[600:], target - 600, return_entropy=True, impl="eager")
    for got, want in zip(out, dense, strict=True):
        assert error(got, want) < 2e-6
    grad = torch.autograd.grad(out[0].sum() + out[1].sum(), batch.weight)[0]
    assert grad.isfinite().all() and (grad[:600] == 0).all()


def test_far_logits():
    """Logits of hundreds: the largest is subtracted before the exponential, in every part."""
    hidden, weight = torch.eye(3)[:1] * 300, torch.randn(700, 3, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        target = (sign * weight[:, 0]).argmax()[None]
        out = linear_logprob(sign * hidden, weight, target, impl="triton")
        assert (
            error(out, torch.log_softmax(sign * hidden.double() @ weight.double().T, 1)[0, target]) < 1e-3 and out <= 0
        )


PAIRS = [  # each with two of the other side: a side's terms do not depend on the other's selection
    (positive, NEGATIVE_SELECT[(i + shift) % len(NEGATIVE_SELECT)])
    for i, positive in enumerate(POSITIVE_SELECT)
    for shift in (0, len(NEGATIVE_SELECT) // 2)
]


@pytest.mark.parametrize("selects", PAIRS, ids="-".join)
def test_every_selection(selects):
    truth, batch = random_batch().to(torch.float64), random_batch().to(torch.float32)
    expected = expected_terms(truth, dense_logprob(truth), selects)
    out = QCRDLoss(BETA, DELTA, positive_select=selects[0], negative_select=selects[1], impl="triton")(
        *batch.call, bias=batch.bias
    )
    assert out.selected_R.nonzero()[:, 0].tolist() == expected["selected"]
    for name in ("loss", "loss_pos", "loss_neg"):
        assert abs(getattr(out, name).item() - expected[name].item()) < 6e-6, name
        for got, want in zip(batch.grads(getattr(out, name)), truth.grads(expected[name]), strict=True):
            assert error(got, want) < 1e-5, name
    # Every other output equals the torch twin's.
    again = QCRDLoss(BETA, DELTA, positive_select=selects[0], negative_select=selects[1], impl="torch")(
        *truth.call, bias=truth.bias
    )
    for got, want in zip(out, again, strict=True):
        assert torch.equal(got, want) if got.dtype == torch.bool else error(got, want) < 6e-6


@pytest.mark.parametrize("scheme", [*SCHEMES, "softmin"])
def test_questions_of_many_rationales(scheme):
    """More candidates than a block, ties among them, empty rationales, ragged lengths up to several blocks of
    tokens."""
    generator = torch.Generator().manual_seed(5)
    R = 80
    lengths = torch.randint(0, 9, (R,), generator=generator)
    lengths[3] = 1100
    rationale = torch.repeat_interleave(torch.arange(R), lengths)
    logprob = -torch.randint(1, 6, (len(rationale),), generator=generator).float()
    question = torch.randint(0, 2, (R,), generator=generator) * 7
    positive, quality = torch.rand(R, generator=generator) < 0.6, torch.rand(R, generator=generator)
    valid = torch.rand(len(rationale), generator=generator) < 0.9
    selects = {"positive_select": "softmin"} if scheme == "softmin" else {"scheme": scheme}
    results = []
    for impl in ("triton", "torch", "eager"):
        logprob = logprob.clone().requires_grad_()
        out = contrastive_loss(logprob, rationale, question, positive, quality, **selects, valid_T=valid, impl=impl)
        results.append([*out, torch.autograd.grad(out.loss, logprob)[0]])
    for i in (0, 1):
        for got, want in zip(results[i], results[2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nan_no_candidates_and_nothing_at_all():
    for scheme in SCHEMES:
        logprob = -torch.tensor([1.0, math.nan, 2.0])
        batch = (torch.arange(3), torch.zeros(3).long(), torch.tensor([True, False, False]))
        out = contrastive_loss(logprob, *batch, scheme=scheme, impl="triton", delta=9.0)
        assert out.loss.isnan() or scheme == "sampling"
    for R in (0, 2):
        logprob = torch.full((R,), -2.5, requires_grad=True)
        out = contrastive_loss(
            logprob, torch.arange(R), torch.arange(R), torch.zeros(R).bool(), impl="triton", delta=1.0
        )
        out.loss.backward()
        assert out.loss == 0 and not out.selected_R.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_qualities(scheme):
    """What is not selected adds nothing, and a NaN that is selected reaches the loss, as in the other
    implementations."""
    for case in CASES:
        for got, want in zip(case.run(scheme, "triton"), expected(case, scheme), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_what_the_kernels_do_not_compute_comes_from_the_chunks():
    batch, each = random_batch().to(torch.float32), torch.linspace(0.5, 2, len(random_batch().target))
    for options in (
        dict(return_top1=True, return_sum_p2=True, return_lse=True),
        dict(return_entropy=True, temperature=each),
    ):
        a, b = (
            linear_logprob(batch.hidden, batch.weight, batch.target, impl=i, **options) for i in ("triton", "torch")
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_bound_on_selected_tokens_and_determinism():
    batch = random_batch().to(torch.float32)
    loss_fn = QCRDLoss(BETA, DELTA, impl="triton")
    first, again = (batch.grads(loss_fn(*batch.call, bias=batch.bias).loss) for _ in range(2))
    bounded = batch.grads(loss_fn(*batch.call, bias=batch.bias, max_selected_tokens=50).loss)
    for a, b, c in zip(first, again, bounded, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_operands_are_converted_as_documented():
    """bf16 hidden states with an fp32 head: products of bf16, fp32 results, the head's gradient in fp32."""
    batch = random_batch().to(torch.float32)
    results = []
    for impl in ("triton", "torch"):
        out = linear_logprob(batch.hidden.bfloat16(), batch.weight, batch.target, impl=impl)
        results.append([out, *torch.autograd.grad(out.sum(), (batch.weight,))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32 and error(got, want) < 1e-4


@pytest.mark.parametrize(
    "dtype, layout, with_bias, options",
    [
        *((torch.float32, "split", *option) for option in OPTIONS),
        *((torch.float32, "whole", *OPTIONS[i]) for i in (0, 3)),
        (torch.float16, "split", *OPTIONS[-1]),  # computed twice
    ],
    indirect=["layout"],
    ids=str,
)
def test_gradients_made_in_forward(with_bias, options, dtype, layout):
    """Where nothing fits the workspace, and under a softcap, the logits are computed twice: the same numbers."""
    batch = random_batch(V=1003).to(dtype)
    got, want = both(batch, "triton", with_bias=with_bias, **options)
    assert error(got[0], want[0]) < 3e-6 and error(got[1], want[1]) < 3e-6
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a.dtype == dtype and error(a, b) < 3 * BUDGET[dtype]
    again, _ = both(batch, "triton", with_bias=with_bias, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_gradients_made_in_forward_use_what_was_kept(monkeypatch):
    """The same batch with and without a workspace; a whole tile of rows that are all ignored keeps nothing and adds
    nothing."""
    batch = random_batch(V=1003).to(torch.float32)
    batch.hidden = torch.cat([batch.hidden, torch.randn(200, 24)]).detach().requires_grad_()
    batch.target = torch.cat([batch.target, torch.full((200,), -100)])
    batch.rationale = torch.cat([batch.rationale, torch.full((200,), 10)])
    kept, want = both(batch, "triton")
    monkeypatch.setattr(rationale_loss, "KEPT_BYTES", 0)
    twice, _ = both(batch, "triton")
    for a, b, c in zip(kept, twice, want, strict=True):
        assert error(a, c) < 6e-6 and error(b, c) < 6e-6
    assert any(not torch.equal(a, b) for a, b in zip(kept, twice, strict=True))


@pytest.mark.parametrize("dtype, layout", WAYS[1:], indirect=["layout"])
@pytest.mark.parametrize("options", [dict(), dict(scale=0.3, softcap=1.5)], ids=str)
def test_their_audit_is_green(options, dtype, layout):
    for audit in (audited, audited_training):
        found = audit(random_batch(V=1003).to(dtype), "triton", **options)
        assert 0 < found["audit_budget_used"] < 0.7 and found["audit_grad_err"] > 0 and found["audit_max_err"] < 1e-5


SAMPLE_CASES = [  # (B, H, V, whether there is a bias, options)
    (1, 8, 5, False, dict()),
    (70, 24, 1003, False, dict(temperature=1.5)),  # more rows than a tile, an uneven vocabulary
    (3, 24, 1003, True, dict(temperature=1.5, top_k=50)),
    (2, 32, 1024, False, dict(temperature=0.7, top_k=50, softcap=3.0, scale=0.5)),
    (9, 33, 1500, True, dict(temperature=0.0, softcap=2.0)),  # the largest logit
    (1, 16, 2000, False, dict(top_k=256)),  # more than there are groups
    (4, 16, 40, False, dict(top_k=40)),  # the whole vocabulary
    (4, 16, 50, False, dict(top_k=1)),
]


def test_a_bias_with_gaps_between_its_entries():
    """Such as a column of a matrix, in every kernel that reads one."""
    batch, strided = random_batch().to(torch.float32), torch.randn(len(random_batch().bias), 3).requires_grad_()
    key, counter = (torch.arange(n * len(batch.hidden)).reshape(-1, n) for n in (2, 3))
    results = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaf, hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (strided, batch.hidden, batch.weight))
        bias = leaf[:, 1]
        out = linear_logprob(hidden, weight, batch.target, bias=bias, impl=impl)
        weights = (batch.rationale, batch.positive, torch.ones(len(batch.positive)))
        loss = rationale_loss.linear_rationale_loss(
            hidden, weight, batch.target, *weights, beta=BETA, delta=DELTA, bias=bias, impl=impl
        )[0]
        made = [torch.autograd.grad(x.sum(), (leaf, hidden)) for x in (out, loss)]
        few = (hidden[:3], weight, key[:3], counter[:3])
        drawn = [linear_sample(*few, bias=bias, top_k=k, impl=impl) for k in (0, 5)]
        results.append([out, loss, *made[0], *made[1], *(tokens.float() for tokens in drawn)])
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("B, H, V, with_bias, options", SAMPLE_CASES, ids=str)
def test_sampled_tokens_are_those_of_the_logits(B, H, V, with_bias, options, dtype):
    """Both draw with the same random numbers; a token may differ only where two of the noisy logits tie."""
    generator = torch.Generator().manual_seed(B)
    hidden, weight = torch.randn(B, H, generator=generator).to(dtype), torch.randn(V, H, generator=generator).to(dtype)
    bias = torch.randn(V, generator=generator) if with_bias else None
    key, counter = (torch.randint(0, 2**32, (B, n), generator=generator) for n in (2, 3))
    tokens = [
        linear_sample(hidden, weight, key, counter, bias=bias, impl=impl, **options) for impl in ("triton", "torch")
    ]
    assert tokens[0].dtype == torch.int64 and torch.equal(*tokens)
    if options.get("temperature") == 0:
        assert torch.equal(tokens[0], head_logits(hidden, weight, bias, HeadOptions()).argmax(1))


@pytest.mark.parametrize("top_k", [0, 1, 40, 64])
def test_equal_logits_are_taken_from_the_front(top_k):
    """A head of zeros: every logit ties, also with -0, and top-k keeps the first entries."""
    weight = torch.zeros(300, 8)
    weight[7] = -weight[7]
    key, counter = torch.arange(4).reshape(2, 2), torch.arange(6).reshape(2, 3)
    for sign in (1, -1):
        tokens = [
            linear_sample(sign * torch.ones(2, 8), weight, key, counter, top_k=top_k, impl=i)
            for i in ("triton", "torch")
        ]
        assert torch.equal(*tokens) and (not top_k or (tokens[0] < top_k).all())


@pytest.mark.parametrize("crowded", [True, False])
def test_the_edge_of_top_k(crowded):
    """The 50 largest in two groups, or one in each of 32 groups and the next in those: never an entry beyond them."""
    place = torch.arange(1024) if crowded else torch.arange(1024).reshape(32, 32).T.flatten()
    logits = torch.empty(1024)
    logits[place] = torch.arange(1024.0) / 1024
    key, counter = torch.arange(4).reshape(2, 2), torch.zeros(2, 3).long()
    call = (torch.ones(2, 1), logits[:, None].contiguous(), key, counter)
    tokens = [linear_sample(*call, top_k=50, impl=impl) for impl in ("triton", "torch")]
    assert torch.equal(*tokens) and (logits[tokens[0]] >= logits.topk(50).values.min()).all()


FETCHES = [  # every way to fetch an operand; more rows, columns and depth than a block, and none of them a multiple
    Tile(32, 32, 16, 4, 2, descriptors=True),
    Tile(32, 64, 32, 4, 2, descriptors=True),
    Tile(64, 32, 32, 4, 2),
]


@pytest.mark.parametrize("tile", FETCHES, ids=str)
@pytest.mark.parametrize("options", [dict(), dict(scale=0.3, softcap=1.5)], ids=str)
def test_descriptors_and_other_tiles(tile, options, monkeypatch):
    monkeypatch.setattr(product, "forced_tile", tile)
    batch = random_batch(V=1003, H=40).to(torch.float32)
    truth = doubled(batch)
    out = linear_logprob(batch.hidden, batch.weight, batch.target, impl="triton", **options)
    expected = linear_logprob(truth.hidden, truth.weight, truth.target, impl="eager", **options)
    assert error(out, expected) < 2e-6
    for got, want in list(zip(batch.grads(out.sum()), truth.grads(expected.sum()), strict=True))[:2]:
        assert error(got, want) < 1e-5


def test_ways_through_the_backward_pass(monkeypatch):
    """All that `bench/tuning.py` times, against torch."""
    monkeypatch.setitem(bench_cases.HEADS, "small", bench_cases.Head(300, 203, 0.2))
    case = Case("small", 70, dtype="fp32")
    ways, wrong = bench_tuning.backward_ways(case, torch.device("cpu"))
    names = [name for name in ways if name != "products"]
    assert len(names) == len(bench_tuning.WORKSPACES_MIB) + 2
    for name in names:
        assert wrong(ways[name]()) < 1e-5, name
    ways, wrong = bench_tuning.forward_ways(case, torch.device("cpu"))
    assert wrong(ways["default"]()) < 1e-5
