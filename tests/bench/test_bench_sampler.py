"""The benchmarks of sampling and of whole steps: everybody does the same work, at sizes of a moment."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, T5Config

from bench import sampler, shapes, step
from cli.main import entry
from qcrd_fast.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = dict(vocab_size=150, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **shapes.START)
    llama = dict(
        vocab_size=150, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=None, **shapes.SPECIAL,
    )  # fmt: skip
    monkeypatch.setitem(shapes.SHAPES, "t5", T5Config(**t5))
    monkeypatch.setitem(shapes.SHAPES, "llama", LlamaConfig(**llama))
    monkeypatch.setitem(step.LENGTHS, "uniform", ((3, 8), (4, 9)))
    monkeypatch.setattr(sampler, "PROMPT_TOKENS", (3, 8))


@pytest.mark.parametrize("shape, lengths", [("t5", "fixed"), ("t5", "ragged"), ("llama", "fixed"), ("llama", "ragged")])
def test_every_sampler_draws_the_lengths_it_was_given(shape: str, lengths: str) -> None:
    case = sampler.Case(shape, 6, 5, lengths, 20, "fp32")
    names = [n for n in sampler.find_names(CPU, ()) if n != "generate-batch"]
    rows = sampler.run_case(case, CPU, names, 1)
    for row in rows:
        assert row["status"] == "ok", row
        assert row["new_tokens"] == sum(sampler.Work.of(case, CPU).limits)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["new_tokens"] / row["ms"])
    assert rows[0]["provider"] == "generate" and rows[0]["of_generate"] == 1 and names[-1] == "qcrd"


@pytest.mark.slow
def test_continuous_batching_draws_the_same_lengths() -> None:
    """Of decoder-only models, and only where all have one length."""
    for shape, lengths, status in (
        ("llama", "fixed", "ok"),
        ("llama", "ragged", "one length"),
        ("t5", "fixed", "decoder-only"),
    ):
        rows = sampler.run_case(sampler.Case(shape, 4, 3, lengths, 20, "fp32"), CPU, ["generate-batch"], 1)
        assert status in rows[0]["status"]


def test_ragged_lengths_differ_and_need_refills() -> None:
    case = sampler.Case("t5", 40, 16, "ragged", 20, "fp32")
    limits = sampler.Work.of(case, CPU).limits
    assert case.rows == 20 and min(limits) >= 4 and max(limits) <= 16 and len(set(limits)) > 5
    assert set(sampler.Work.of(sampler.Case("t5", 9, 16), CPU).limits) == {16}


def test_a_sampler_that_fails_or_draws_too_little_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: sampler.Work) -> sampler.Draw:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(sampler.PROVIDERS, "broken", broken)
    monkeypatch.setitem(sampler.PROVIDERS, "short", lambda work: lambda: [[5]] * len(work.sources))
    rows = sampler.run_case(sampler.Case("t5", 3, 4, dtype="fp32"), CPU, ["broken", "short", "qcrd"], 1)
    assert "no kernel image" in rows[0]["status"] and "3 tokens, not 12" in rows[1]["status"]
    assert rows[2]["status"] == "ok" and "ms" not in rows[0] and "ms" not in rows[1]


def test_sampler_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sampler, "RESULTS", tmp_path / "sampler.csv")
    args = [
        "bench",
        "sampler",
        "--shapes",
        "t5",
        "--prompts",
        "4",
        "--new-tokens",
        "3",
        "--providers",
        "qcrd,generate",
        "--device",
        "cpu",
        "--repeats",
        "1",
    ]
    args += ["--append", "--json", str(tmp_path / "out.json")]
    assert entry([*args, "--dry-run"]) == 0
    assert "ragged" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert entry(args) == 0 and entry(args) == 0
    assert "qcrd" in capsys.readouterr().out
    with open(tmp_path / "sampler.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["provider"] for row in rows} == {"qcrd", "generate"}
    assert all(float(row["tokens_per_s"]) > 0 and row["commit"] and row["transformers"] for row in rows)
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 4
    monkeypatch.setattr(sampler, "RESULTS", tmp_path / "gone" / "sampler.csv")
    assert entry(args) == 2 and "no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, wrong",
    [
        (sampler, {"shapes": ["t5bse"]}),
        (sampler, {"lengths": ["even"]}),
        (step, {"shapes": ["x"]}),
        (step, {"lengths": "even"}),
    ],
)
def test_unknown_names_are_refused(module, wrong: dict) -> None:
    with pytest.raises(InputError, match="there are"):
        module.find_cases(CPU, **wrong)
    with pytest.raises(InputError, match="there are"):
        module.find_names(CPU, ["vlllm"])


def test_lengths_have_the_quantiles_that_were_given() -> None:
    quantiles = step.LENGTHS["svamp"][1]
    drawn = sorted(shapes.draw_from_quantiles(20_000, quantiles, seed=0))
    assert drawn[0] >= quantiles[0] and drawn[-1] <= quantiles[-1]
    for at, quantile in enumerate(quantiles[1:-1], 1):
        assert drawn[len(drawn) * at // (len(quantiles) - 1)] == pytest.approx(quantile, rel=0.1)


CASE = {
    "t5": step.Case("t5", 4, 2, positives=2, new=6, top_k=20),
    "llama": step.Case("llama", 2, 2, positives=2, new=6, top_k=20),
}


@pytest.mark.parametrize("shape", ["t5", "llama"])
def test_every_arm_trains_on_the_same_loss(shape: str, tmp_path: Path) -> None:
    """Ours, plain and fused, given the same negatives; and each with negatives of its own."""
    names = ("serial", "stream", "given", "hf", "hf given", "hf-torch-fused given")
    rows = step.run_case(CASE[shape], CPU, names, 1, 2, tmp_path)
    by_arm = {row["arm"]: row for row in rows}
    assert all(row["status"] == "ok" or "linear_cross_entropy" in row["status"] for row in rows), rows
    assert by_arm["hf given"]["loss"] == pytest.approx(by_arm["given"]["loss"], abs=1e-3)
    assert by_arm["stream"]["loss"] == by_arm["serial"]["loss"]
    assert by_arm["given"]["sampling_ms"] is None and all(
        by_arm[a]["sampling_ms"] > 0 for a in ("serial", "stream", "hf")
    )
    assert 0 <= by_arm["stream"]["overlap_fraction"] <= 1 and by_arm["hf"]["of_hf"] == 1


def test_a_wrong_loss_is_said() -> None:
    rows = [{"arm": "given", "loss": 10.0, "status": "ok"}, {"arm": "hf given", "loss": 10.2, "status": "ok"}]
    step.check_losses(rows)
    assert rows[0]["status"] == "ok" and rows[1]["status"].startswith("wrong")


def test_what_is_hidden() -> None:
    """Training takes 100 ms, sampling 40: in turn 140; beside it 104, of which 4 are left over."""
    rows = [
        {"arm": "serial", "step_ms": 140.0, "sampling_ms": 40.0},
        {"arm": "stream", "step_ms": 104.0, "sampling_ms": 55.0},
        {"arm": "given", "step_ms": 100.0, "sampling_ms": None},
        {"arm": "hf", "step_ms": 700.0, "sampling_ms": 400.0},
        {"arm": "hf given", "step_ms": 300.0, "sampling_ms": None},
    ]
    step.summarise(rows)
    assert [row.get("overlap_fraction") for row in rows[:3]] == [0, pytest.approx(0.9), None]
    assert rows[1]["of_longest"] == pytest.approx(1.04)
    assert rows[1]["of_hf"] == pytest.approx(700 / 104) and rows[2]["of_hf"] == 3


def test_step_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step, "RESULTS", tmp_path / "step.csv")
    args = [
        "bench",
        "step",
        "--shapes",
        "t5",
        "--questions",
        "2",
        "--providers",
        "given,priority",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--append",
    ]
    assert entry([*args, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    assert entry(args) == 0
    with open(tmp_path / "step.csv", newline="") as file:
        given, priority = csv.DictReader(file)
    assert float(given["step_ms"]) > 0 and "needs a GPU" in priority["status"]
    assert "overlap_fraction" in capsys.readouterr().out
