"""The loss benchmark: its truth, what it calls wrong, what it counts, and its command, at sizes of a moment."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases as bench_cases
from bench import loss, peers, plot, timing
from bench.cases import EVERY, Case, Head, find_truth, make_batch
from cli.main import entry
from qcrd_fast.errors import InputError

CPU = torch.device("cpu")
SMALL = Case("small", 257, 3, 2, "random", "fp32")  # a prime number of tokens, no chunk or head divides another


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_cases.HEADS, "small", Head(24, 203, 24**-0.5))
    monkeypatch.delenv("QCRD_FAST_IMPL", raising=False)


def double(case: Case) -> bench_cases.Batch:
    batch = make_batch(case, CPU)
    leaves = (batch.hidden_TH.detach().double().requires_grad_(), batch.weight_VH.detach().double().requires_grad_())
    return batch._replace(hidden_TH=leaves[0], weight_VH=leaves[1])


@pytest.mark.parametrize("logits", bench_cases.LOGITS)
def test_the_truth_is_what_the_oracle_says(logits: str) -> None:
    """Two evaluations written apart, in float64: chunks of 100 rows here, full logits and autograd there."""
    batch = double(Case("small", 257, 3, 2, logits, "fp32"))
    truth = find_truth(batch, chunk=100)
    value, selected_R = peers.joint("eager")(batch)
    value.backward()
    assert truth.loss == pytest.approx(float(value.detach()), rel=1e-12)
    for got, want in ((truth.dhidden_TH, batch.hidden_TH.grad), (truth.dweight_VH, batch.weight_VH.grad)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(truth.selected_R, selected_R)
    assert truth.selected_share == pytest.approx(loss.selected_share(batch))
    assert int(selected_R.sum()) == 2 * int(batch.question_R.max() + 1)  # a positive and a negative of every question


@pytest.mark.parametrize("logits", bench_cases.LOGITS)
def test_no_selection_hangs_on_rounding(logits: str) -> None:
    case = Case("tiny", 2048, 5, 2, logits, "bf16")
    batch = make_batch(case, CPU)
    nll_T = peers.eager_nll(batch.hidden_TH.detach(), batch.weight_VH.detach(), batch.target_T, batch.scale)
    per_rationale = [nll_T[batch.rationale_T == r].mean() for r in range(len(batch.question_R))]
    nll_QN = torch.stack(per_rationale).view(-1, 7)
    uniform = math.log(bench_cases.HEADS["tiny"].V)
    assert abs(float(nll_QN.mean()) - uniform) < 1 if logits == "random" else float(nll_QN.mean()) < 0.5 * uniform + 2
    assert batch.hidden_TH.dtype == torch.bfloat16 and len(nll_QN) == 3
    assert torch.equal(peers.joint("torch")(batch)[1], find_truth(batch).selected_R)


def test_the_batch_is_packed_and_reproducible() -> None:
    first, again = make_batch(SMALL, CPU, seed=3), make_batch(SMALL, CPU, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], again[:-1], strict=True))
    counts = torch.bincount(first.rationale_T)
    assert int(counts.sum()) == 257 and int(counts.min()) > 0 and len(set(counts.tolist())) > 1
    assert (first.rationale_T.diff() >= 0).all()


def test_every_provider_here_is_right() -> None:
    found, absent = peers.find_providers(
        CPU, torch.float32, ("eager", "torch-fused", "liger", "qcrd-torch", "qcrd-triton")
    )
    assert {p.full_name for p in found} >= {"eager plain", "eager composed", "qcrd-torch joint", "qcrd-torch composed"}
    assert "liger-kernel" in absent["liger"] and "GPU" in absent["qcrd-triton"]
    batch = make_batch(SMALL, CPU)
    truths = {every: find_truth(batch, every=every) for every in (False, True)}
    for provider in found:
        row = loss.check(provider, batch, truths[provider.mode in EVERY], 1e-4, CPU)
        assert row["status"] == "ok", row
        assert batch.hidden_TH.grad is None
        assert ("dweight_error" in row) == (provider.mode != "score") and row.get("dweight_error", 0) < 1e-5


def test_wrong_and_failing_providers_are_shown_as_such() -> None:
    def doubled(hidden: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        return peers.eager_nll(2 * hidden, weight, target, scale) / 2

    def negated(hidden: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        return -peers.eager_nll(hidden, weight, target, scale)

    def broken(hidden: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        raise RuntimeError("no kernel image\nand a long trace")

    batch = make_batch(SMALL, CPU)
    truth = find_truth(batch)
    found = [peers.Provider(f.__name__, "plain", peers.plain(f), 6, 0) for f in (doubled, negated, broken)]
    rows = [loss.check(provider, batch, truth, 1e-3, CPU) for provider in found]
    status = [row["status"] for row in rows]
    assert status[0].startswith("wrong: beyond") or status[0].startswith("wrong: selects")
    assert status[1] == "wrong: selects other rationales"
    assert status[2] == "failed: RuntimeError: no kernel image"
    results = loss.time_all(found, rows, batch, SMALL.unit, 1, CPU)
    assert "ms" in rows[0] and "ms" not in rows[2] and results["floor_ms"] > 0  # the others are timed all the same


def test_what_is_counted() -> None:
    found, _ = peers.find_providers(CPU, torch.float32, ("eager", "qcrd-torch"))
    units = {p.full_name: [round(p.units(2 / 7, kept), 3) for kept in (False, True)] for p in found}
    assert units == {
        "eager score": [2, 2],
        "eager plain": [6, 6],
        "eager composed": [3.714, 3.714],
        "eager every": [6, 6],
        "qcrd-torch every": [8, 8],
        "qcrd-torch every-kept": [6.5, 6.5],
        "qcrd-torch score": [2, 2],
        "qcrd-torch joint": [3.714, 3.714],
        "qcrd-torch composed": [4.286, 3.714],  # the second where the gradients are made in forward
    }
    assert SMALL.unit == 257 * 24 * 203
    product, products, flops = loss.the_products(make_batch(SMALL, CPU))
    product()
    products()
    assert flops == 6 * SMALL.unit


def test_peak_memory_is_the_most_held_at_once() -> None:
    def call() -> None:
        first = torch.empty(2**18)  # 1 MiB
        second = torch.empty(2**19)
        del first
        third = torch.empty(2**18)
        del second, third

    assert timing.peak_mib(call, CPU) == pytest.approx(3, abs=0.01)


def test_rounds_take_turns() -> None:
    order: list[str] = []

    def note(name: str) -> None:
        if order[-1:] != [name]:
            order.append(name)

    times = timing.rounds([lambda: note("a"), lambda: note("b")], 3, CPU)
    assert order == ["a", "b", "a", "b"] and [len(t) for t in times] == [3, 3]  # ab, ba, ab
    assert timing.quantile([4.0, 1.0, 2.0], 0.5) == 2


def test_a_call_shorter_than_a_tick_of_the_clock_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """User time that stands still for most calls and then jumps by a tick of 4 ms: 1 ms a call, no quotient by 0."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(timing, "clock", lambda device: calls // 4 * 4e-3)
    assert timing.time_once_ms(call, CPU) == 0
    for ms in timing.rounds([call, call], 3, CPU)[0]:
        assert ms == pytest.approx(1, rel=0.2)


def test_cases_by_default_and_in_full() -> None:
    gpu = torch.device("cuda")
    assert {(c.head, c.tokens) for c in loss.find_cases(CPU)} == {("tiny", 1024)}
    headline = loss.find_cases(gpu)
    assert len(headline) == 4 * 2 and {(c.tokens, c.dtype, c.positives, c.negatives) for c in headline} == {
        (16384, "bf16", 5, 2)
    }
    assert len(loss.find_cases(gpu, full=True)) == 4 * 3 * 4 * 2 * 2
    assert len(loss.find_cases(gpu, full=True, heads=["t5-base"], dtypes=["fp32"], candidates=["1+1"])) == 3 * 2
    for wrong in (
        dict(heads=["t5"]),
        dict(candidates=["5"]),
        dict(candidates=["5+0"]),
        dict(tokens=[10]),
        dict(logits=["flat"]),
    ):
        with pytest.raises(InputError):
            loss.find_cases(CPU, **wrong)  # type: ignore[arg-type]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("bench.loss")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "loss.csv")
    file = tmp_path / "out.json"
    args = [
        "bench",
        "loss",
        "--heads",
        "small",
        "--tokens",
        "257",
        "--candidates",
        "3+2",
        "--repeats",
        "2",
        "--device",
        "cpu",
    ]
    args += ["--providers", "eager,qcrd-torch,cce", "--json", str(file), "--append"]
    assert entry([*args, "--dry-run"]) == 0
    assert "absent" in capsys.readouterr().out and not file.exists()
    assert entry(args) == 0 and entry(args) == 0
    out, err = capsys.readouterr()
    assert "qcrd-torch  joint" in out and "cce: not run" in out and "Traceback" not in err
    results = json.loads(file.read_text())
    assert [case["case"]["logits"] for case in results["cases"]] == ["random", "peaked"]
    for case in results["cases"]:
        assert case["absent"].keys() == {"cce"} and len(case["rows"]) == 9
        every_ms = 6 * Case("small", 257, 3, 2).unit / case["rate_tflops"] / 1e9
        floors = {"score": case["product_ms"], "every": every_ms, "every-kept": every_ms}
        for row in case["rows"]:
            assert row["status"] == "ok" and row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            assert row["peak_mib"] > 0 and row["floor_share"] == pytest.approx(
                floors.get(row["mode"], case["floor_ms"]) / row["ms"]
            )
    rows = list(csv.DictReader((tmp_path / "loss.csv").read_text().splitlines()))
    assert (
        len(rows) == 2 * 2 * 9
        and rows[0]["head"] == "small"
        and rows[0]["torch"] == importlib.metadata.version("torch")
    )
    (drawn, _) = plot.latest(tmp_path / "loss.csv").items()
    assert len(drawn[1]) == 4
    (tmp_path / "loss.csv").write_text("other,columns\n")
    assert entry(args) == 2 and "other columns" in capsys.readouterr().err
    assert (tmp_path / "loss.csv").read_text() == "other,columns\n"


@pytest.mark.parametrize(
    "args", [["--heads", "t5-bas"], ["--providers", "ligr"], ["--tokens", "many"], ["--json", "no/such/x"]]
)
def test_refusals(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["bench", "loss", *args]) == 2
    assert capsys.readouterr().out == ""


def test_an_override_would_falsify_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCRD_FAST_IMPL", "torch")
    assert entry(["bench", "loss"]) == 2
