"""Whole runs under the shadow check, with kernels that are broken on purpose: plain torch stands in for the kernels on
a CPU, so a run that fell back must end with the very weights of one that used torch throughout."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cli.main import entry
from csrc_triton import contrastive, linear_logprob, linear_sample
from qcrd_fast.errors import RunError
from qcrd_fast.ops import chunked, dispatch, reference
from qcrd_fast.ops.chunked import head_logits, pick_tokens
from qcrd_fast.ops.reference import HeadOptions
from qcrd_fast.runs import checkpoints
from qcrd_fast.train.trainer import Trainer, train
from tests.support.short_runs import metrics, same, weights
from tests.support.short_runs import settings as full_settings

AUDITED = ("audit_max_err", "audit_grad_err", "audit_budget_used", "audit_fallback")


def settings(*args, **changes):
    return full_settings(*args, **{"discriminator": "none", "eval_steps": 6, **changes})


class Kernels:
    """Stand-ins for the kernels. `harm(log p [T], call number)` breaks them, `harm_gradient` their gradients alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = self.samples = 0
        self.harm = self.harm_gradient = lambda x, call: x
        monkeypatch.setattr(dispatch, "_triton_obstacle", lambda device, dtype: None)
        monkeypatch.setattr(linear_logprob, "forward", self.forward)
        monkeypatch.setattr(linear_logprob, "backward", self.backward)
        monkeypatch.setattr(linear_logprob, "forward_keeping", self.forward_keeping)
        monkeypatch.setattr(linear_logprob, "backward_kept", self.backward_kept)
        monkeypatch.setattr(contrastive, "means", chunked.rationale_mean)
        monkeypatch.setattr(contrastive, "forward", chunked.contrastive_torch)
        monkeypatch.setattr(linear_sample, "sample", self.sample)

    def forward(self, *args):
        self.calls += 1
        logprob_T, *rest = chunked.chunked_forward(*args)[:4]  # what the kernels return
        return self.harm(logprob_T, self.calls), *rest

    def forward_keeping(self, *args):
        self.calls += 1
        logprob_T, *rest = chunked.forward_keeping(*args)
        return self.harm(logprob_T, self.calls), *rest

    def backward(self, *args):
        dhidden, *rest = chunked.chunked_backward(*args)
        return None if dhidden is None else self.harm_gradient(dhidden, self.calls), *rest

    def backward_kept(self, *args):
        dhidden, *rest = chunked.backward_kept(*args)
        return None if dhidden is None else self.harm_gradient(dhidden, self.calls), *rest

    def sample(self, hidden, weight, key, counter, bias, options, top_k):
        self.samples += 1
        return pick_tokens(head_logits(hidden, weight, bias, HeadOptions(*options)), key, counter, top_k)


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


def off(logprob_T, call, by=1e-2):
    """Every fifth row is wrong."""
    return logprob_T + by * (torch.arange(len(logprob_T)) % 5 == 0)


@pytest.fixture(scope="module")
def plain(rows_file, llama_folder, tmp_path_factory):
    """A run in plain torch, never audited."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(settings(rows_file, llama_folder, out, impl="torch"))
    return out


def unaudited(run):
    return [{k: v for k, v in line.items() if k not in AUDITED} for line in metrics(run)]


def steps(run):
    return [line for line in metrics(run) if "loss" in line]


@pytest.mark.parametrize(
    "student, changes",
    [
        ("t5_folder", {"discriminator": "auto"}),
        ("t5_folder", {"method": "mi", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("llama_folder", {"forward": "joint"}),
        ("llama_folder", {"method": "sft-all"}),
    ],
    ids=str,
)
def test_a_healthy_run_is_green_and_the_same_bit_for_bit(request, rows_file, tmp_path, student, changes):
    folder, runs = request.getfixturevalue(student), {}
    for every in (0, 2):
        out = tmp_path / str(every)
        train(settings(rows_file, folder, out, audit_every=every, max_steps=3, **changes))
        runs[every] = out
    assert same(weights(runs[0], 3), weights(runs[2], 3)) and unaudited(runs[0]) == unaudited(runs[2])
    audited = [line["step"] for line in steps(runs[2]) if "audit_max_err" in line]
    assert audited == [1, 3] and not any(set(AUDITED) & line.keys() for line in metrics(runs[0]))
    for line in steps(runs[2]):
        if "audit_max_err" in line:
            assert (
                0 < line["audit_budget_used"] < 0.5
                and 0 < line["audit_grad_err"] < 5e-6
                and line["audit_max_err"] < 1e-5
            )
            assert "audit_fallback" not in line


def test_bf16_has_its_own_budget(rows_file, llama_folder, tmp_path):
    train(settings(rows_file, llama_folder, tmp_path / "run", audit_every=1, bf16=True, max_steps=3))
    used = [line["audit_budget_used"] for line in steps(tmp_path / "run")]
    assert len(used) == 3 and all(0 < u < 0.7 for u in used)


def test_by_default_the_kernels_are_audited_and_torch_is_not(kernels, rows_file, llama_folder, tmp_path, plain):
    assert not any("audit_max_err" in line for line in metrics(plain))
    train(settings(rows_file, llama_folder, tmp_path / "run"))
    assert kernels.calls and kernels.samples
    assert [line["step"] for line in steps(tmp_path / "run") if "audit_max_err" in line] == [1]  # the next: 201
    assert same(weights(tmp_path / "run"), weights(plain))


@pytest.mark.parametrize(
    "harm, what",
    [
        (off, "log p is off by 0.01 nats"),
        (lambda x_T, call: torch.where(torch.arange(len(x_T)) % 7 == 3, math.nan, x_T), "log p is off by inf nats"),
    ],
    ids=["1e-2", "nan"],
)
def test_broken_from_the_start_it_is_a_torch_run(kernels, rows_file, llama_folder, tmp_path, plain, caplog, harm, what):
    kernels.harm = harm
    out = tmp_path / "run"
    train(settings(rows_file, llama_folder, out))
    assert same(weights(out), weights(plain)) and unaudited(out) == unaudited(plain)
    first, *others = steps(out)
    assert first["audit_fallback"] == "torch" and not any("audit_fallback" in line for line in others)
    assert first["audit_max_err"] is None if "inf" in what else first["audit_max_err"] == pytest.approx(1e-2, rel=1e-2)
    assert f"step 1: --impl triton failed its audit: {what}" in caplog.text and "with --impl torch" in caplog.text
    assert json.loads((out / "checkpoint-6" / "state.json").read_text())["failed_impl"] == "triton"
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_wrong_gradients_alone_are_found(kernels, rows_file, llama_folder, tmp_path, plain):
    kernels.harm_gradient = lambda x, call: x * 1.01
    train(settings(rows_file, llama_folder, tmp_path / "run"))
    first = steps(tmp_path / "run")[0]
    assert first["audit_max_err"] < 1e-5 and first["audit_grad_err"] > 1e-3 and first["audit_fallback"] == "torch"
    assert same(weights(tmp_path / "run"), weights(plain))


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step, config):
    real = Trainer._train_step

    def dies(self):
        if self.step == step:
            raise Killed
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", dies)
        with pytest.raises(Killed):
            train(config)


@pytest.mark.parametrize("stop_after", [3, 5])  # before the failed audit, and behind the checkpoint that follows it
def test_killed_and_resumed_it_is_the_same_run(
    kernels, rows_file, llama_folder, tmp_path, monkeypatch, stop_after, caplog
):
    """Broken between two audits: the steps until the second are what they are, from there on all is torch."""

    def harm(logprob_T, call):
        return off(logprob_T, call) if seen["broken"] else logprob_T

    seen, kernels.harm = {"broken": False}, harm
    real = Trainer._train_step

    def breaks(self):
        seen["broken"] = self.step >= 2
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", breaks)
    options = dict(audit_every=4, save_steps=1)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(settings(rows_file, llama_folder, whole, **options))
    assert [line["step"] for line in steps(whole) if "audit_fallback" in line] == [5]
    killed_at(monkeypatch, stop_after, settings(rows_file, llama_folder, out, **options))
    before = kernels.calls, kernels.samples
    caplog.clear()
    train(settings(rows_file, llama_folder, out, resume="auto", **options))
    assert metrics(out) == metrics(whole) and same(weights(out), weights(whole))
    if stop_after == 5:
        assert "--impl triton failed an audit earlier in this run: it continues with --impl torch" in caplog.text
        assert (kernels.calls, kernels.samples) == before


def test_stop_keeps_the_last_good_checkpoint(kernels, rows_file, llama_folder, tmp_path, plain, monkeypatch, capsys):
    """Exit 1, nothing of the failed step saved; with the kill-switch the rest is a torch run's."""
    kernels.harm = lambda logprob_T, call: off(logprob_T, call) if seen["broken"] else logprob_T
    seen = {"broken": False}
    real = Trainer._train_step

    def breaks(self):
        seen["broken"] = self.step >= 3
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", breaks)
    out = tmp_path / "run"
    config = settings(rows_file, llama_folder, out, audit_every=3, on_audit_failure="stop").to_dict()
    given = tmp_path / "config.json"  # JSON is YAML
    given.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert entry(["train", "--config", str(given)]) == 1
    said = capsys.readouterr().err
    assert "step 4: --impl triton failed its audit" in said and "QCRD_FAST_IMPL=torch" in said
    assert [p.name for p in checkpoints.checkpoints(out)] == ["checkpoint-3"] and checkpoints.find_corruption(
        out / "checkpoint-3"
    ) is None
    monkeypatch.setenv("QCRD_FAST_IMPL", "torch")
    assert entry(["train", "--config", str(given), "--resume", "auto"]) == 0
    assert same(weights(out), weights(plain)) and unaudited(out) == unaudited(plain)


def test_the_kill_switch_comes_before_everything(
    kernels, rows_file, llama_folder, tmp_path, plain, monkeypatch, caplog
):
    kernels.harm = off
    monkeypatch.setenv("QCRD_FAST_IMPL", "torch")
    train(settings(rows_file, llama_folder, tmp_path / "off", impl="triton", audit_every=2))
    assert not kernels.calls and not kernels.samples and same(weights(tmp_path / "off"), weights(plain))
    assert all(line.get("audit_budget_used", 0) < 0.5 for line in steps(tmp_path / "off"))
    monkeypatch.setenv("QCRD_FAST_IMPL", "triton")
    with pytest.raises(RunError, match="QCRD_FAST_IMPL=triton keeps it from falling back"):
        train(settings(rows_file, llama_folder, tmp_path / "on"))
    assert not checkpoints.checkpoints(tmp_path / "on")
    # A run that fell back goes on with the kernels where it is told to.
    monkeypatch.delenv("QCRD_FAST_IMPL")
    killed_at(monkeypatch, 4, settings(rows_file, llama_folder, tmp_path / "back"))
    kernels.harm = lambda logprob_T, call: logprob_T  # a new driver
    kernels.calls = 0
    monkeypatch.setenv("QCRD_FAST_IMPL", "triton")
    train(settings(rows_file, llama_folder, tmp_path / "back", resume="auto"))
    assert kernels.calls and "QCRD_FAST_IMPL=triton runs it all the same" in caplog.text


def test_torch_has_nothing_to_fall_back_on(rows_file, llama_folder, tmp_path, monkeypatch):
    real = chunked.chunked_forward
    monkeypatch.setattr(
        chunked, "chunked_forward", lambda *args, **kept: (off(real(*args, **kept)[0], 0), *real(*args, **kept)[1:])
    )
    with pytest.raises(RunError, match="plain torch: this machine computes wrongly"):
        train(settings(rows_file, llama_folder, tmp_path / "run", impl="torch", audit_every=1))


def test_eager_falls_back_to_torch_too(rows_file, llama_folder, tmp_path, monkeypatch, plain):
    real = reference.linear_logprob_eager
    monkeypatch.setattr(reference, "linear_logprob_eager", lambda *args: (off(real(*args)[0], 0), *real(*args)[1:]))
    train(settings(rows_file, llama_folder, tmp_path / "run", impl="eager", audit_every=6))
    assert steps(tmp_path / "run")[0]["audit_fallback"] == "torch" and same(weights(tmp_path / "run"), weights(plain))


def test_a_student_that_is_nan_is_not_blamed_on_the_kernels(kernels, rows_file, llama_folder, tmp_path, monkeypatch):
    """The loss is NaN under any implementation: the run stops as it would without audits, naming the step and its
    questions."""
    real = Trainer._train_step

    def poisons(self):
        if self.step == 1:
            with torch.no_grad():
                next(iter(self.student.model.parameters())).fill_(math.nan)
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", poisons)
    with pytest.raises(RunError, match=r"step 2: loss nan, .*; questions q\d"):
        train(settings(rows_file, llama_folder, tmp_path / "run", audit_every=1))
    assert "audit_fallback" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_negatives_that_are_drawn_ahead_change_over_too(kernels, rows_file, llama_folder, tmp_path, plain, monkeypatch):
    """What is queued is drawn as it was; nothing after it."""
    kernels.harm, real, drawn = off, Trainer._fall_back, []

    def falls_back(self):
        real(self)
        drawn.append(kernels.samples)

    monkeypatch.setattr(Trainer, "_fall_back", falls_back)
    train(settings(rows_file, llama_folder, tmp_path / "run", overlap="stream"))
    assert same(weights(tmp_path / "run"), weights(plain)) and drawn == [kernels.samples] and kernels.samples
