"""The loss and its gradients against an independent float64 evaluation and numbers worked out by hand; what callers
rely on."""

import itertools
import math

import pytest
import torch

from qcrd_fast import QCRDLoss, contrastive_loss, linear_logprob
from qcrd_fast.config import NEGATIVE_SELECT, POSITIVE_SELECT, SCHEMES
from qcrd_fast.losses import weighted_rationale_loss
from qcrd_fast.ops import chunked, contrastive, dispatch, reference, selection
from qcrd_fast.ops import linear_logprob as linear_logprob_op
from tests.support.loss_oracle import BETA, DELTA, Batch, dense_logprob, error, expected_terms, random_batch

IMPLS = ("eager", "torch")
PAIRS = list(itertools.product(POSITIVE_SELECT, NEGATIVE_SELECT))
BUDGET = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of the vocabulary, the last one partial, as at real sizes."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1024)


# ---- by hand
# ------------------------------------------------------------------------------------------------------------

# Question 0: l = 1, 2 positive; 2.5, 4 negative. Question 1: 0.5 positive; 1, 2 negative. delta 3, beta 0.2, N 2.
HAND = dict(
    logprob=-torch.tensor([1.0, 2.0, 2.5, 4.0, 0.5, 1.0, 2.0], dtype=torch.float64),
    rationale=torch.arange(7),
    question=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
    positive=torch.tensor([1, 1, 0, 0, 1, 0, 0]).bool(),
    quality=torch.tensor([0.8, 0.6, 0.3, 0.1, 0.9, 0.2, 0.4], dtype=torch.float64),
)
GOLDEN = {  # selects: (loss_pos, loss_neg, selected)
    ("min", "max"): ((0.8 * 1 + 0.9 * 0.5) / 2, (0 + 0.6 * -1) / 2, [0, 4, 6]),  # 4 is inactive and silences question 0
    ("min", "max-active"): (0.625, (0.7 * -0.5 + 0.6 * -1) / 2, [0, 2, 4, 6]),
    ("max", "min"): ((0.6 * 2 + 0.9 * 0.5) / 2, (0.7 * -0.5 + 0.8 * -2) / 2, [1, 2, 4, 5]),
    ("mean", "mean"): ((2.0 / 2 + 0.45) / 2, (-0.35 / 2 + (-1.6 - 0.6) / 2) / 2, [0, 1, 2, 4, 5, 6]),
    ("wmean", "wmean"): ((2.0 / 1.4 + 0.5) / 2, (-0.35 / 1.6 - 2.2 / 1.4) / 2, [0, 1, 2, 4, 5, 6]),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selects", GOLDEN)
def test_numbers_worked_out_by_hand(selects, impl):
    loss_pos, loss_neg, selected = GOLDEN[selects]
    settings = dict(beta=0.2, delta=3.0, positive_select=selects[0], negative_select=selects[1], impl=impl)
    out = contrastive_loss(**HAND, **settings)
    assert float(out.loss_pos) == pytest.approx(loss_pos, abs=1e-12)
    assert float(out.loss_neg) == pytest.approx(loss_neg, abs=1e-12) and loss_neg < 0
    assert float(out.loss.detach()) == pytest.approx(loss_pos - 0.2 * loss_neg, abs=1e-12)
    assert out.selected_R.nonzero()[:, 0].tolist() == selected
    assert out.active_R.tolist() == [False, False, True, False, False, True, True]
    assert out.loss.dtype == torch.float64 and not out.nll_R.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_worked_out_by_hand(impl):
    """Raising log p of the chosen positive lowers the loss by s/N; of the chosen negative it raises it by beta
    (1-s)/N."""
    logprob = HAND["logprob"].clone().requires_grad_()
    contrastive_loss(**{**HAND, "logprob": logprob}, beta=0.2, delta=3.0, impl=impl).loss.backward()
    expected = torch.tensor([-0.8 / 2, 0, 0, 0, -0.9 / 2, 0, 0.2 * 0.6 / 2], dtype=torch.float64)
    torch.testing.assert_close(logprob.grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_at_the_margin_the_hinge_has_no_gradient(impl):
    logprob = -torch.tensor([1.0, 3.0]).requires_grad_()
    batch = (torch.arange(2), torch.zeros(2).long(), torch.tensor([True, False]))
    out = contrastive_loss(logprob, *batch, beta=1.0, delta=3.0, impl=impl)
    assert not out.active_R.any() and out.selected_R.tolist() == [True, False] and out.loss_neg == 0
    assert torch.autograd.grad(out.loss, logprob)[0].tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selects", [("min", "max"), ("max", "min"), ("min", "max-active")])
def test_ties_go_to_the_lowest_index(selects, impl):
    question, positive = torch.zeros(6).long(), torch.tensor([0, 1, 1, 0, 1, 0]).bool()
    settings = dict(positive_select=selects[0], negative_select=selects[1], impl=impl)
    out = contrastive_loss(torch.full((6,), -2.0), torch.arange(6), question, positive, beta=1, delta=3, **settings)
    assert out.selected_R.nonzero()[:, 0].tolist() == [0, 1]


# ---- against the independent evaluation
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selects", PAIRS, ids="-".join)
def test_every_pair_of_selections(selects, impl, dtype):
    truth, batch = random_batch().to(torch.float64), random_batch().to(dtype)
    expected = expected_terms(truth, dense_logprob(truth), selects)
    out = QCRDLoss(BETA, DELTA, positive_select=selects[0], negative_select=selects[1], impl=impl)(
        *batch.call, bias=batch.bias
    )
    assert out.selected_R.nonzero()[:, 0].tolist() == expected["selected"]
    for name in ("loss", "loss_pos", "loss_neg"):  # nats, and a hinge near 0 is the difference of two numbers near 8
        assert abs(getattr(out, name).item() - expected[name].item()) < 3 * BUDGET[dtype], name
        for got, want in zip(batch.grads(getattr(out, name)), truth.grads(expected[name]), strict=True):
            assert error(got, want) < 5 * BUDGET[dtype], name
    # The weights are all that a training pass needs.
    again = weighted_rationale_loss(
        out.logprob_T, batch.rationale, batch.positive, out.weight_R, beta=BETA, delta=DELTA, valid_T=batch.target >= 0
    )
    for name, got in zip(("loss", "loss_pos", "loss_neg"), again, strict=False):
        assert abs(got.item() - expected[name].item()) < 3 * BUDGET[dtype], name
    assert ((out.weight_R != 0) == out.selected_R).all() and (out.weight_R >= 0).all()


def test_the_random_batch_has_something_of_everything():
    batch = random_batch().to(torch.float64)
    out = QCRDLoss(BETA, DELTA, impl="eager")(*batch.call, bias=batch.bias)
    negatives = ~batch.positive & (out.nll_R > 0)
    assert out.active_R.any() and (negatives & ~out.active_R).any() and out.nll_R[7] == 0
    gaps = (out.nll_R[negatives] - DELTA).abs().min(), torch.pdist(out.nll_R[out.nll_R > 0][:, None]).min()
    assert min(gaps) > 1e-4  # no selection hangs on rounding


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [1, 2])
def test_schemes_without_quality_and_with_a_global_count(seed, scheme, impl):
    truth, batch = random_batch(seed).to(torch.float64), random_batch(seed).to(torch.float64)
    expected = expected_terms(truth, dense_logprob(truth), SCHEMES[scheme], quality=False, N=64)
    out = QCRDLoss(BETA, DELTA, scheme, impl=impl)(*batch.call[:-1], bias=batch.bias, num_questions=64)
    assert error(out.loss, expected["loss"]) < 1e-12
    assert error(batch.grads(out.loss)[1], truth.grads(expected["loss"])[1]) < 1e-11


OPTIONS = [
    dict(),
    dict(scale=24**-0.5),
    dict(softcap=2.0),
    dict(temperature=0.7),
    dict(scale=0.3, softcap=1.5, temperature=1.4),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_log_prob_and_its_gradients(options, impl, dtype):
    batch = random_batch(V=167).to(dtype)
    truth = Batch(
        **{
            **vars(batch),
            **{n: getattr(batch, n).detach().double().requires_grad_() for n in ("hidden", "weight", "bias")},
        }
    )
    weights = torch.randn(len(batch.target), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[::3] = 0  # rows without a gradient are skipped
    expected = dense_logprob(truth, **options)
    actual = linear_logprob(batch.hidden, batch.weight, batch.target, bias=batch.bias, impl=impl, **options)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Operands are rounded, sums are not: half types lose nothing more in the forward pass than fp32 does.
    assert error(actual, expected) < (1e-12 if dtype == torch.float64 else 2e-6)
    assert (actual <= 0).all() and (actual[batch.target < 0] == 0).all()
    for got, want in zip(batch.grads((actual * weights).sum()), truth.grads((expected * weights).sum()), strict=True):
        assert got.dtype == dtype and error(got, want) < BUDGET[dtype] * 3


def test_gradients_of_all_three_outputs_are_those_of_finite_differences():
    batch = random_batch(H=5, V=19).to(torch.float64)

    def outputs(hidden, weight, bias):
        options = dict(bias=bias, scale=0.6, softcap=2.0, temperature=0.8, return_lse=True, return_entropy=True)
        return linear_logprob(hidden, weight, batch.target[:9], impl="torch", **options)

    torch.autograd.gradcheck(outputs, (batch.hidden[:9].detach().requires_grad_(), batch.weight, batch.bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_log_sum_exp_and_entropy(impl):
    batch = random_batch().to(torch.float32)
    out = linear_logprob(batch.hidden, batch.weight, batch.target, return_lse=True, return_entropy=True, impl=impl)
    logits = batch.hidden.double() @ batch.weight.double().T
    valid = batch.target >= 0
    assert error(out[1], torch.logsumexp(logits, 1) * valid) < 1e-6
    assert error(out[2], torch.distributions.Categorical(logits=logits).entropy() * valid) < 1e-6
    assert len(linear_logprob(batch.hidden, batch.weight, batch.target, return_entropy=True, impl=impl)) == 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(100, 110))
@pytest.mark.parametrize("spread, close", [(0.05, True), (0.5, True), (0.3, False), (1.0, False)])
def test_selection_never_flips_beyond_rounding(impl, seed, spread, close):
    """bf16 operands, losses in fp32: what is selected is the extremum in float64 of the same operands, or within 1e-5
    nats of it. `close`: all candidates are nearly the same tokens, where losses in bf16 flip one selection in six."""
    batch = random_batch(seed, spread=spread).to(torch.bfloat16)
    if close:
        hidden, target = batch.hidden.detach().clone(), batch.target.clone()
        same = hidden[0]
        hidden[:] = same + 0.01 * (hidden - same)
        target[target >= 0] = target[target >= 0][0]
        batch.hidden, batch.target = hidden, target
    doubles = {name: getattr(batch, name).detach().double() for name in ("hidden", "weight", "bias")}
    truth = dense_logprob(Batch(**{**vars(batch), **doubles}))
    out = QCRDLoss(BETA, 1e3, impl=impl)(*batch.call, bias=batch.bias)
    valid = batch.target >= 0
    for r in range(len(batch.question)):
        if not out.selected_R[r]:
            continue
        rivals = (batch.question == batch.question[r]) & (batch.positive == batch.positive[r])
        exact = {
            int(o): -truth[(batch.rationale == o) & valid].mean().item()
            for o in rivals.nonzero()[:, 0]
            if out.nll_R[o] > 0
        }
        best = min(exact.values()) if batch.positive[r] else max(exact.values())
        assert abs(exact[r] - best) < 1e-5


# ---- edges
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "question, positive, expected",
    [
        ([0, 0], [0, 0], 0.2 * 0.5),  # m = 0; both negatives at 2.5, one of them selected: h = -0.5
        ([0, 0], [1, 1], 2.5),  # k = 0
        ([0, 3], [1, 1], (2.5 + 2.5) / 4),  # questions 1 and 2 have nothing, and N counts them
        ([0], [1], 2.5),  # one token
        ([], [], 0.0),  # nothing at all
    ],
)
def test_missing_classes_count_nothing_but_their_question(question, positive, expected, impl):
    R = len(question)
    logprob = torch.full((R,), -2.5, requires_grad=True)
    batch = (torch.arange(R), torch.tensor(question).long(), torch.tensor(positive).bool())
    out = contrastive_loss(logprob, *batch, beta=0.2, delta=3.0, impl=impl)
    assert float(out.loss.detach()) == pytest.approx(expected)
    out.loss.backward()  # even where nothing was selected


@pytest.mark.parametrize("impl", IMPLS)
def test_all_hinges_inactive(impl):
    batch = random_batch().to(torch.float64)
    out = QCRDLoss(BETA, 0.0, impl=impl)(*batch.call, bias=batch.bias)
    assert out.loss_neg == 0 and not out.active_R.any() and not (out.selected_R & ~batch.positive).any()
    torch.testing.assert_close(out.loss, out.loss_pos)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_rationale_of_3000_tokens(impl):
    """Its mean is exact to fp32 rounding."""
    logprob = -torch.rand(3003, generator=torch.Generator().manual_seed(0)) * 9
    rationale = torch.tensor([0] + [1] * 3000 + [2] * 2)
    out = contrastive_loss(
        logprob, rationale, torch.zeros(3).long(), torch.tensor([1, 0, 1]).bool(), impl=impl, delta=5.0
    )
    assert float(out.nll_R[1]) == pytest.approx(float(-logprob[1:3001].double().mean()), rel=3e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_batches_equal_packed_ones(impl):
    """[B, L] with ignored padding gives the loss of the packed tokens."""
    batch = random_batch().to(torch.float64)
    R, L = len(batch.question), 13
    hidden, target = torch.zeros(R, L, 24, dtype=torch.float64), torch.full((R, L), -100)
    for r in range(R):
        tokens = batch.rationale == r
        hidden[r, : tokens.sum()], target[r, : tokens.sum()] = batch.hidden[tokens].detach(), batch.target[tokens]
    rationale = torch.arange(R)[:, None].expand(R, L)
    loss_fn = QCRDLoss(BETA, DELTA, impl=impl)
    padded = loss_fn(hidden, batch.weight, target, rationale, batch.question, batch.positive, batch.quality)
    packed = loss_fn(*batch.call)
    assert error(padded.loss, packed.loss) < 1e-12 and padded.logprob_T.shape == (R, L)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_vocabulary_rows(impl):
    """A bias of -inf switches tokens off, here a whole chunk of them."""
    batch = random_batch().to(torch.float64)
    bias = torch.zeros(203, dtype=torch.float64)
    bias[:70] = -math.inf
    out = linear_logprob(
        batch.hidden, batch.weight, batch.target.clamp(min=70), bias=bias, return_entropy=True, impl=impl
    )
    dense = linear_logprob(
        batch.hidden, batch.weight[70:], batch.target.clamp(min=70) - 70, return_entropy=True, impl="eager"
    )
    for got, want in zip(out, dense, strict=True):
        assert error(got, want) < 1e-12
    grad = torch.autograd.grad(out[0].sum() + out[1].sum(), batch.weight)[0]
    assert grad.isfinite().all() and (grad[:70] == 0).all()


# ---- selection and gradients
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_only_where_selected(scheme, impl):
    batch = random_batch().to(torch.float64)
    out = QCRDLoss(BETA, DELTA, scheme, impl=impl)(*batch.call, bias=batch.bias)
    grad = batch.grads(out.loss)[0]
    wanted = out.selected_R[batch.rationale] & (batch.target >= 0)
    assert ((grad != 0).any(1) == wanted).all()


def test_backward_visits_only_the_selected_rows(monkeypatch):
    seen = []
    backward = chunked.chunked_backward
    monkeypatch.setattr(chunked, "chunked_backward", lambda h, *rest: seen.append(len(h)) or backward(h, *rest))
    batch = random_batch().to(torch.float32)
    out = QCRDLoss(BETA, DELTA, impl="torch")(*batch.call)
    out.loss.backward()
    selected = int((out.selected_R[batch.rationale] & (batch.target >= 0)).sum())
    assert seen == [selected] and selected < len(batch.target)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_is_not_paid_for(frozen, monkeypatch):
    needs = []
    backward = chunked.chunked_backward
    monkeypatch.setattr(chunked, "chunked_backward", lambda *args: needs.append(args[-1]) or backward(*args))
    batch, full = random_batch().to(torch.float64), random_batch().to(torch.float64)
    getattr(batch, frozen).requires_grad_(False)
    for b in (batch, full):
        QCRDLoss(BETA, DELTA, impl="torch")(*b.call, bias=b.bias).loss.backward()
    names = ("hidden", "weight", "bias")
    assert needs[0] == tuple(name != frozen for name in names) and getattr(batch, frozen).grad is None
    for name in set(names) - {frozen}:
        torch.testing.assert_close(getattr(batch, name).grad, getattr(full, name).grad)


def test_quality_gets_no_gradient():
    for impl in IMPLS:
        batch = random_batch().to(torch.float64)
        quality = batch.quality.clone().requires_grad_()
        out = QCRDLoss(BETA, DELTA, impl=impl)(*batch.call[:-1], quality)
        out.loss.backward()
        assert quality.grad is None


def test_the_bound_on_selected_tokens():
    batch, free = random_batch().to(torch.float64), random_batch().to(torch.float64)
    loss_fn = QCRDLoss(BETA, DELTA, impl="torch")
    expected = free.grads(loss_fn(*free.call, bias=free.bias).loss)
    out = loss_fn(*batch.call, bias=batch.bias)
    selected = int((out.selected_R[batch.rationale] & (batch.target >= 0)).sum())
    for bound in (selected, selected + 3, 10**6):
        grads = batch.grads(loss_fn(*batch.call, bias=batch.bias, max_selected_tokens=bound).loss)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(
        ValueError, match=rf"max_selected_tokens is {selected - 1} \(.*max_rows\), but {selected} tokens"
    ):
        loss_fn(*batch.call, max_selected_tokens=selected - 1).loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_reaches_the_loss(impl):
    """Whoever watches the loss must see it, under every selection."""
    for selects in PAIRS:
        for r in range(7):
            logprob = HAND["logprob"].clone()
            logprob[r] = math.nan
            settings = dict(positive_select=selects[0], negative_select=selects[1], delta=9.0, impl=impl)
            out = contrastive_loss(**{**HAND, "logprob": logprob}, **settings)
            chosen_by_chance = "sampling" in selects
            assert out.loss.isnan() or chosen_by_chance, (selects, r)
    quality = torch.full((7,), math.nan)
    assert contrastive_loss(**{**HAND, "quality": quality}, impl=impl).loss.isnan()


# ---- sampling
# ---------------------------------------------------------------------------------------------------------------


def test_sampling_hash_is_pinned():
    """A resumed run, on whatever machine, must draw the same candidates."""
    assert [selection.sampling_score(0, 0, 0, True, r) for r in range(3)] == [2175092, 5210941, 3823076]
    assert selection.sampling_score(-1, 2**62, 3, False, 1) == 5198722


@pytest.mark.parametrize("impl", IMPLS)
def test_sampling_does_not_depend_on_the_batch(impl):
    """The same question draws the same candidate alone, in company, and in any order of questions."""
    settings = dict(scheme="sampling", delta=99.0, seed=7, iteration=3, impl=impl)
    question, positive = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0]), torch.tensor([1, 0, 1, 0, 1, 1, 0, 0]).bool()
    logprob = -torch.rand(8)
    key = torch.tensor([2**40 + 1, -5])
    both = contrastive_loss(logprob, torch.arange(8), question, positive, question_key=key, **settings)
    swapped = contrastive_loss(logprob, torch.arange(8), 1 - question, positive, question_key=key.flip(0), **settings)
    assert both.selected_R.tolist() == swapped.selected_R.tolist()
    for q in (0, 1):
        mine = question == q
        zeros = torch.zeros(4).long()
        alone = contrastive_loss(
            logprob[mine], torch.arange(4), zeros, positive[mine], question_key=key[q, None], **settings
        )
        assert alone.selected_R.tolist() == both.selected_R[mine].tolist()


def test_sampling_is_uniform_and_changes_with_its_key():
    R, Q = 5, 4000
    question = torch.arange(Q).repeat_interleave(R)
    batch = (-torch.ones(R * Q), torch.arange(R * Q), question, torch.ones(R * Q).bool())
    picks = []
    for settings in (dict(), dict(seed=1), dict(iteration=1)):
        out = contrastive_loss(*batch, scheme="sampling", impl="torch", **settings)
        picks.append(out.selected_R.view(Q, R).int().argmax(1))
        counts = picks[-1].bincount(minlength=R)
        assert (counts - Q / R).abs().max() < 5 * (Q * 0.2 * 0.8) ** 0.5
    for a, b in itertools.combinations(picks, 2):
        assert abs((a == b).float().mean() - 1 / R) < 0.05


# ---- types, choice of implementation, errors
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_fp32(dtype, impl):
    batch = random_batch().to(dtype)
    out = QCRDLoss(BETA, DELTA, impl=impl)(*batch.call)
    assert {x.dtype for x in out if x.is_floating_point()} == {torch.float32}
    out = contrastive_loss(HAND["logprob"].to(dtype), *list(HAND.values())[1:], impl=impl)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_rounds_the_operands_and_nothing_else(impl):
    batch = random_batch().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(batch.hidden, batch.weight, batch.target, bias=batch.bias, impl=impl)
        (out * out).sum().backward()
    rounded = Batch(
        **{**vars(batch), "hidden": batch.hidden.bfloat16().double(), "weight": batch.weight.bfloat16().double()}
    )
    assert out.dtype == torch.float32 and error(out, dense_logprob(rounded)) < 2e-6
    assert batch.weight.grad.dtype == torch.float32 and batch.hidden.grad.dtype == torch.float32


def test_mixed_operands_compute_in_the_type_of_hidden():
    batch = random_batch().to(torch.float32)
    out = linear_logprob(batch.hidden.bfloat16(), batch.weight, batch.target, impl="torch")
    rounded = linear_logprob(batch.hidden.bfloat16(), batch.weight.bfloat16(), batch.target, impl="torch")
    torch.testing.assert_close(out, rounded)
    assert torch.autograd.grad(out.sum(), batch.weight)[0].dtype == torch.float32


def test_choice_of_implementation(monkeypatch):
    cpu = torch.device("cpu")
    assert dispatch.choose_impl("auto", cpu, torch.float32)[0] == "torch"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: the tensors are on cpu.*TRITON_INTERPRET=1"):
        linear_logprob(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose_impl("triton", cpu, torch.float32)[0] == "triton"
    with pytest.raises(ValueError, match="no float64"):
        dispatch.choose_impl("triton", cpu, torch.float64)
    monkeypatch.setenv("QCRD_FAST_IMPL", "eager")
    assert dispatch.choose_impl("triton", cpu, torch.float32) == ("eager", "QCRD_FAST_IMPL=eager")
    monkeypatch.setenv("QCRD_FAST_IMPL", "fast")
    with pytest.raises(ValueError, match="QCRD_FAST_IMPL=fast: expected one of auto, triton, torch, eager"):
        linear_logprob(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]))


def test_errors_name_what_was_expected_and_what_came():
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for change, message in [
        (dict(weight=torch.randn(5, 3)), r"weight must be \[V, 4\] to match hidden \[3, 4\], got \[5, 3\]"),
        (dict(target=torch.tensor([0, 1])), r"target must be \[3\] to match hidden, got \[2\]"),
        (dict(target=torch.tensor([0, 1, 5])), r"target must lie in \[0, 5\) or be ignore_index -100, got 0 to 5"),
        (dict(target=torch.tensor([0, 1, -1])), r"target must lie in \[0, 5\)"),
        (dict(target=torch.rand(3)), "target must be int64 or int32, got torch.float32"),
        (dict(hidden=torch.ones(3, 4).long()), "hidden must be floating point"),
        (dict(bias=torch.randn(4)), r"bias must be \[5\] to match weight, got \[4\]"),
        (dict(temperature=0.0), "temperature must be above 0 and finite, got 0.0"),
        (dict(temperature=math.inf), "temperature must be above 0 and finite, got inf"),
        (dict(softcap=math.inf), "softcap must be above 0 and finite, or None, got inf"),
        (dict(scale=math.nan), "scale must be finite, got nan"),
        (dict(softcap=-1.0), "softcap must be above 0 and finite, or None, got -1.0"),
        (dict(impl="cuda"), "impl='cuda': expected one of auto, triton, torch, eager"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_logprob(**{**dict(hidden=hidden, weight=weight, target=target), **change})
    for change, message in [
        (dict(rationale=torch.tensor([0, 1, 0, 2, 3, 4, 5])), r"contiguous and non-decreasing.*decreases at token 2"),
        (dict(rationale=torch.arange(7) + 1), r"rationale must lie in \[0, 7\), got 1 to 7"),
        (dict(rationale=torch.arange(6)), r"rationale must have one entry a token \(7\), got \[6\]"),
        (dict(question=torch.zeros(2, 3).long()), r"question must be \[R\], got \[2, 3\]"),
        (dict(question=torch.tensor([0, 0, 0, 0, 0, 0, -1])), r"question must lie in \[0, ...\), got -1 to 0"),
        (dict(question_key=torch.tensor([3])), r"question must lie in \[0, 1\), got 0 to 1"),
        (dict(positive=torch.ones(7)), "positive must be bool, got torch.float32"),
        (dict(positive=torch.ones(6).bool()), r"positive must be \[7\] to match question, got \[6\]"),
        (dict(quality=torch.full((7,), 1.5)), r"quality must lie in \[0, 1\], got 1.5 to 1.5"),
        (dict(valid_T=torch.ones(7)), "valid_T must be bool"),
        (dict(num_questions=0), "num_questions must be above 0, got 0"),
        (dict(num_questions=torch.tensor(-2)), "num_questions must be above 0, got -2"),
        (
            dict(scheme="minmx"),
            r"scheme is one of minmax, maxmin, sampling, mean, wmean; got 'minmx'; did you mean 'minmax'\?",
        ),
        (
            dict(positive_select="max-active"),
            "positive_select is one of min, softmin, max, mean, wmean, sampling; got 'max-active'",
        ),
        (
            dict(negative_select="none"),
            "negative_select is one of max, max-active, min, mean, wmean, sampling; got 'none'",
        ),
        (dict(impl="fused"), "impl is one of auto, triton, torch, eager; got 'fused'"),
        (dict(beta=-0.1), "beta must be finite and at least 0, got -0.1"),
        (dict(delta=math.inf), "delta must be finite, got inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            contrastive_loss(**{**HAND, **change})
    for name in ("logprob", "rationale", "question", "positive"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
            contrastive_loss(**{**HAND, name: None})
    for name in ("quality", "valid_T", "question_key"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            contrastive_loss(**{**HAND, name: [1.0] * 7})
    call = dict(
        zip(("hidden", "weight", "target", "rationale", "question", "positive"), random_batch().call, strict=False)
    )
    for name in call:
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            QCRDLoss()(**{**call, name: [1, 2]})
    for settings in (dict(scheme="x"), dict(impl="x"), dict(beta=math.nan)):
        with pytest.raises(ValueError):
            QCRDLoss(**settings)


# ---- inside other machinery
# ---------------------------------------------------------------------------------------------


def test_operators_are_well_formed():
    """Schemas, fake tensors and autograd registration, as PyTorch checks them."""
    batch = random_batch(H=4, V=17).to(torch.float32)
    head = (batch.hidden, batch.weight, batch.target.clamp(max=16), batch.bias)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for args in [
        (*head, 1.0, 0.0, 1.0, None, -100, False, False, False, None, 0),
        (*head, 0.5, 2.0, 0.7, None, -100, True, True, False, 99, 1000),
    ]:
        torch.library.opcheck(linear_logprob_op._linear_logprob, args, test_utils=checks)
    logprob = -torch.rand(len(batch.target), requires_grad=True)
    segments = (logprob, batch.rationale, batch.target >= 0, batch.question, batch.positive, batch.quality, None)
    torch.library.opcheck(
        contrastive._contrastive, (*segments, "min", "max", 3.0, torch.tensor(4.0), False), test_utils=checks
    )


class Tiny(torch.nn.Module):
    """Two layers and a tied head, checkpointed if asked."""

    def __init__(self, checkpoint=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.checkpoint = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16), checkpoint
        self.loss_fn = QCRDLoss(BETA, 4.0, scale=0.25, impl="torch")

    def body(self, ids):
        return torch.tanh(self.layer(self.embed(ids)))

    def forward(self, ids, *batch):
        hidden = (
            torch.utils.checkpoint.checkpoint(self.body, ids, use_reentrant=False)
            if self.checkpoint
            else self.body(ids)
        )
        return self.loss_fn(hidden, self.embed.weight, ids.roll(-1), *batch).loss


def tiny_batch():
    ids = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(1))
    rationale = torch.tensor([0] * 3 + [1] * 4 + [2] * 1 + [3] * 4)
    return ids, rationale, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 1]).bool(), torch.rand(4)


def step(model, run, batch):
    model.zero_grad()
    loss = run(*batch)
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters()]]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_and_checkpointed_models_take_the_same_step(autocast):
    dtype, eps = (torch.float32, torch.finfo(torch.bfloat16).eps) if autocast else (torch.float64, 1e-12)
    batch, model, other = tiny_batch(), Tiny().to(dtype), Tiny(checkpoint=True).to(dtype)
    exact = Tiny().double()
    truth = step(exact, exact, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = step(model, model, batch)
        compiled = step(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch)
        checkpointed = step(other, other, batch)
    for got in (compiled, checkpointed):
        for a, b, c in zip(got, plain, truth, strict=True):
            assert error(a, c) <= 2 * error(b, c) + eps


def test_module_and_functions_give_the_same_numbers():
    batch = random_batch().to(torch.float32)
    out = QCRDLoss(BETA, DELTA, impl="torch")(*batch.call)
    logprob = linear_logprob(batch.hidden, batch.weight, batch.target, impl="torch")
    call = (logprob, *batch.call[3:])
    same = contrastive_loss(*call, beta=BETA, delta=DELTA, scheme="minmax", valid_T=batch.target >= 0, impl="torch")
    for a, b in zip(out, same, strict=True):
        assert torch.equal(a, b)
    first, second = batch.grads(out.loss), batch.grads(same.loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # and determinism


def test_data_parallel_and_sharded_models(warm):
    """DDP and FSDP2 on two ranks give the gradients of one process, also where the head that comes in is sharded."""
    warm.call("tests.support.sharded_loss:main")


def test_shift_of_all_logits_changes_nothing():
    batch = random_batch().to(torch.float64)
    a, b = (
        linear_logprob(batch.hidden, batch.weight, batch.target, bias=batch.bias + c, impl="torch") for c in (0, 40)
    )
    assert error(a, b) < 1e-12


def test_chunking_holds_a_bounded_block_of_logits(monkeypatch):
    """T5-base's vocabulary at 4,096 tokens: dense logits and their log-softmax take 1 GiB, this under 64 MiB."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 16 * 2**20)
    T, V, H = 4096, 32128, 2
    hidden, weight, target = torch.randn(T, H), torch.randn(V, H), torch.randint(0, V, (T,))
    options, live, peak = reference.HeadOptions(), [0], [0]

    class Meter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x._base is None and not any(x is a for a in args):
                    size = x.untyped_storage().nbytes()
                    live[0] += size
                    peak[0] = max(peak)
                    torch.utils.weak.weakref.finalize(x, lambda size=size: live.__setitem__(0, live[0] - size))
            peak[0] = max(peak[0], live[0])
            return out

    with Meter():
        lse = chunked.chunked_forward(hidden, weight, target, None, options, -100, False)[1]
        rows = torch.arange(0, T, 4)
        ones = torch.ones(len(rows))
        coefficients = (ones, -ones, None)
        chunked.chunked_backward(
            hidden[rows], weight, target[rows], None, lse[rows], coefficients, options, (True, True, False)
        )
    assert 16 < peak[0] / 2**20 < 64


def test_the_training_pass_uses_its_own_hinge():
    """A negative at or beyond the margin gives neither loss nor gradient, whatever its weight."""
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64, requires_grad=True)
    rationale, positive = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([True, False, False, False, False])
    weight = torch.tensor([0.5, 0.25, 0.25, 0.25, 0.0], dtype=torch.float64)
    loss, loss_pos, loss_neg, _ = weighted_rationale_loss(logprob, rationale, positive, weight, beta=0.2, delta=3.0)
    loss.backward()
    assert (loss_pos.item(), loss_neg.item()) == (0.5, -0.25) and loss.item() == pytest.approx(0.55)
    assert logprob.grad.tolist() == pytest.approx([-0.5, 0.05, 0, 0, 0])
    free = weighted_rationale_loss(logprob, rationale, positive, weight, beta=0.2, delta=None)[2]
    assert free.item() == pytest.approx(0.25 * (2 + 3 + 4))


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32])
def test_narrow_question_indices(kind):
    out = contrastive_loss(
        torch.tensor([-1.0, -2.0]), torch.tensor([0, 1]), torch.tensor([0, 1]).to(kind), torch.tensor([True, True]),
        beta=0.2, delta=3.0, scheme="minmax",
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(1.5)
