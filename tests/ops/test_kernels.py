"""The Triton kernels: under the interpreter here, on a GPU where there is one."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from qcrd_fast import QCRDLoss, linear_logprob
from qcrd_fast.config import NEGATIVE_SELECT, SCHEMES
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.ops.rationale_loss import linear_rationale_loss
from tests.support.audits import audited
from tests.support.draws import chi_square, draws
from tests.support.loss_oracle import BETA, DELTA, Batch, dense_logprob, error, random_batch
from tests.support.paths import ROOT, SUPPORT
from tests.support.rationale_losses import both


def test_kernels_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    env.pop("QCRD_FAST_IMPL", None)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(SUPPORT / "interpreted_kernels.py"),
    ]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"the interpreter of triton {metadata.version('triton')} needs numpy below 2.4")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-20_000:] + done.stderr[-4_000:]


def test_parts_fill_whole_rounds():
    """264 places, as on an H100 or H200; T5-base's vocabulary has 251 tiles."""
    from csrc_triton.product import choose_parts

    assert choose_parts(blocks=1, tiles=251, slots=264) == 62  # few rows: as many parts as have four tiles
    assert choose_parts(blocks=128, tiles=251, slots=264) == 2  # 256 programs, where 3 parts would need a second round
    # 1,000 programs in 4 rounds, not 200 in one that is 3/4 full
    assert choose_parts(blocks=200, tiles=251, slots=264) == 5
    assert choose_parts(blocks=5000, tiles=251, slots=264) == 1
    assert choose_parts(blocks=1, tiles=1, slots=264) == 1


# ---- on a GPU
# -------------------------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
# gradients: da is rounded to the operands' type
BUDGET = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = {
    "t5-base": dict(T=700, H=768, V=32128, options=dict(scale=768**-0.5)),
    "smollm2": dict(T=129, H=576, V=49152, options=dict()),
    "gemma": dict(T=65, H=640, V=262144, options=dict(softcap=30.0)),
    "uneven": dict(T=333, H=200, V=5003, options=dict(scale=0.3, softcap=5.0, temperature=0.7)),
    "one-token": dict(T=1, H=64, V=1, options=dict()),
}


def big_batch(T, H, V, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator) / 8
    target = torch.randint(0, V, (T,), generator=generator)
    target[::7] = -100 if T > 1 else 0
    ragged = random_batch()
    batch = Batch(
        hidden,
        weight,
        target,
        *[getattr(ragged, n) for n in ("rationale", "question", "positive", "quality")],
        weight[:, 0],
    )
    return batch.to(dtype, "cuda")


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_log_prob_and_its_gradients(self, name, dtype):
        """Against float64 on the same rounded operands, every head size, with rows that are skipped."""
        T, H, V, options = CASES[name].values()
        batch = big_batch(T, H, V, dtype)
        truth = Batch(
            **{
                **vars(batch),
                **{n: getattr(batch, n).detach().double().requires_grad_() for n in ("hidden", "weight", "bias")},
            }
        )
        weights = torch.randn(T, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cuda()
        weights[1::3] = 0
        head = lambda b: (b.hidden, b.weight, b.target)  # noqa: E731
        extras = dict(return_lse=True, return_entropy=True)
        actual = linear_logprob(*head(batch), bias=batch.bias, impl="triton", **extras, **options)
        expected = linear_logprob(*head(truth), bias=truth.bias, impl="torch", **extras, **options)
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == torch.float32 and error(got, want) < 1e-5
        assert (actual[0] <= 0).all()
        combine = lambda out: (out[0] * weights).sum() + (out[1] * weights).sum() / 2 + (out[2] * weights).sum() / 3  # noqa: E731
        for got, want in zip(batch.grads(combine(actual)), truth.grads(combine(expected)), strict=True):
            assert got.dtype == dtype and error(got, want) < BUDGET[dtype]
        plain, wanted = batch.grads((actual[0] * weights).sum()), truth.grads((expected[0] * weights).sum())
        again = batch.grads((actual[0] * weights).sum())
        for got, want, same in zip(plain, wanted, again, strict=True):
            assert error(got, want) < BUDGET[dtype] and torch.equal(got, same)

    @pytest.mark.parametrize("impl", ["triton", "torch"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_their_audit_is_green(self, name, dtype, impl):
        T, H, V, options = CASES[name].values()
        options = {k: v for k, v in options.items() if k != "temperature"}
        assert audited(big_batch(T, H, V, dtype), impl, **options)["audit_budget_used"] < 0.7

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("negative", NEGATIVE_SELECT)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_loss_and_gradients(self, scheme, negative, dtype):
        batch = random_batch().to(dtype, "cuda")
        truth = Batch(
            **{
                **vars(batch),
                **{n: getattr(batch, n).detach().double().requires_grad_() for n in ("hidden", "weight", "bias")},
            }
        )
        outs = []
        for b, impl in ((batch, "triton"), (truth, "eager")):
            outs.append(QCRDLoss(BETA, DELTA, scheme, negative_select=negative, impl=impl)(*b.call, bias=b.bias))
        assert torch.equal(outs[0].selected_R, outs[1].selected_R) and torch.equal(outs[0].active_R, outs[1].active_R)
        for name in ("loss", "loss_pos", "loss_neg"):
            assert abs(getattr(outs[0], name).item() - getattr(outs[1], name).item()) < 1e-5
        for got, want in zip(batch.grads(outs[0].loss), truth.grads(outs[1].loss), strict=True):
            assert error(got, want) < BUDGET[dtype]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torch_twin(self, dtype):
        """What runs where Triton does not."""
        batch = random_batch().to(dtype, "cuda")
        truth = random_batch().to(torch.float64)
        truth = Batch(
            **{
                **vars(truth),
                **{n: getattr(batch, n).detach().double().cpu().requires_grad_() for n in ("hidden", "weight", "bias")},
            }
        )
        out = linear_logprob(batch.hidden, batch.weight, batch.target, bias=batch.bias, impl="torch")
        expected = dense_logprob(truth)
        assert error(out, expected) < 1e-5
        for got, want in zip(batch.grads(out.sum()), truth.grads(expected.sum()), strict=True):
            assert error(got, want) < BUDGET[dtype]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [dict(), dict(scale=0.3, temperature=0.7), dict(softcap=5.0)], ids=str)
    def test_gradients_made_in_forward(self, options, dtype):
        """A ragged batch, and the same twice: bitwise the same. A softcap goes the other way."""
        batch = random_batch().to(dtype, "cuda")
        got, want = both(batch, "triton", **options)
        assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5
        for a, b in zip(got[2:], want[2:], strict=True):
            assert a.dtype == dtype and error(a, b) < BUDGET[dtype]
        again, _ = both(batch, "triton", **options)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

    def test_gradients_made_in_forward_without_host_sync(self):
        batch = random_batch().to(torch.bfloat16, "cuda")
        weight_R = torch.rand(len(batch.positive), device="cuda")
        head = (batch.hidden, batch.weight, batch.target, batch.rationale, batch.positive, weight_R)
        for debug in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(debug)
            try:
                linear_rationale_loss(*head, beta=BETA, delta=DELTA, impl="triton")[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_no_host_sync_with_a_bound_on_selected_tokens(self):
        batch = random_batch().to(torch.bfloat16, "cuda")
        loss_fn = QCRDLoss(BETA, DELTA, impl="triton")
        for debug in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(debug)
            try:
                loss_fn(*batch.call, num_questions=6, max_selected_tokens=64).loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_no_logits_are_held(self):
        """At T5-base's head: the peak above operands and gradients stays far under T x V."""
        T, H, V = 8192, 768, 32128
        hidden = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(0, V, (T,), device="cuda")
        linear_logprob(hidden, weight, target, impl="triton").sum().backward()
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_logprob(hidden, weight, target, impl="triton").sum().backward()
        assert (torch.cuda.max_memory_allocated() - before) / 2**20 < 200  # dense fp32 logits alone: 1,004 MiB

    def test_more_than_2_31_logits(self):
        """Offsets are 64 bits wide."""
        T, H, V = 70_000, 64, 32_768
        hidden, weight = (torch.randn(n, H, device="cuda", dtype=torch.bfloat16) for n in (T, V))
        target = torch.randint(0, V, (T,), device="cuda")
        out = linear_logprob(hidden, weight.requires_grad_(), target, impl="triton")
        assert error(out[-50:], linear_logprob(hidden[-50:], weight, target[-50:], impl="eager")) < 1e-5
        grad = torch.autograd.grad(out[-50:].sum(), weight, retain_graph=True)[0]
        small = linear_logprob(hidden[-50:], weight, target[-50:], impl="eager").sum()
        assert error(grad, torch.autograd.grad(small, weight)[0]) < 1e-2
        assert torch.autograd.grad(out.sum(), weight)[0].isfinite().all()

    def test_captured_in_a_cuda_graph(self):
        batch = random_batch().to(torch.bfloat16, "cuda")
        with torch.no_grad():
            expected = linear_logprob(batch.hidden, batch.weight, batch.target.clamp(min=0), impl="triton")
            graph, target = torch.cuda.CUDAGraph(), batch.target.clamp(min=0)
            with torch.cuda.graph(graph):
                out = linear_logprob(batch.hidden, batch.weight, target, impl="triton")
            graph.replay()
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("top_k", [0, 50])
    @pytest.mark.parametrize("name", ["smollm2", "gemma", "uneven"])
    def test_sampled_tokens(self, name, top_k, dtype):
        """The tokens that the torch twin draws, but for noisy logits that tie within rounding; captured in a graph
        too."""
        T, H, V, options = CASES[name].values()
        options = {**options, "temperature": 1.5, "top_k": top_k}
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, H, generator=generator).to("cuda", dtype) for n in (T, V))
        weight /= 8
        key, counter = (torch.randint(0, 2**32, (T, n), generator=generator).cuda() for n in (2, 3))
        drawn = linear_sample(hidden, weight, key, counter, impl="triton", **options)
        expected = linear_sample(hidden.double(), weight.double(), key, counter, impl="torch", **options)
        assert (drawn != expected).sum() <= 1 + T // 200
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = linear_sample(hidden, weight, key, counter, impl="triton", **options)
        graph.replay()
        assert torch.equal(again, drawn)

    @pytest.mark.parametrize("top_k", [0, 50])
    def test_100k_draws_follow_the_softmax(self, top_k):
        hidden, weight = torch.randn(1, 64).bfloat16().cuda(), torch.randn(120, 64).bfloat16().cuda() / 8
        key, counter = (x.cuda().contiguous() for x in draws(100_000))
        tokens = linear_sample(hidden.expand(100_000, 64), weight, key, counter, top_k=top_k, impl="triton")
        logits_V = (hidden.double() @ weight.double().T)[0].cpu()
        if top_k:
            logits_V[logits_V < logits_V.topk(top_k).values.min()] = -torch.inf
        assert abs(chi_square(tokens.cpu(), logits_V.softmax(0))) < 4
