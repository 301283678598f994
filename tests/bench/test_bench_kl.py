"""`bench kl`: every provider computes the same divergence, and what is wrong is shown as wrong."""

from __future__ import annotations

import json

import pytest
import torch

from bench import kl
from bench.kl import Case
from cli.main import entry as main

CPU = torch.device("cpu")


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_every_provider_here_is_right(beta):
    names, absent = kl.find_providers(CPU, ())
    assert (
        names == ["eager", "liger-formula", "qcrd-torch", "qcrd-torch-kept"]
        and "need a CUDA GPU" in absent["qcrd-triton"]
    )
    rows = kl.run_case(Case("rehearsal", 48, beta, "fp32"), CPU, names, 1)
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert (
            row["status"] == "ok" and row["loss_error"] < 1e-5 and row["dweight_error"] < 1e-5 and row["extra_mib"] > 0
        )


def test_a_wrong_provider_is_not_timed(monkeypatch):
    monkeypatch.setitem(kl.PROVIDERS, "eager", lambda batch: 2 * kl.eager(batch))
    monkeypatch.setitem(kl.PROVIDERS, "qcrd-torch", lambda batch: batch.hidden_TH @ batch.teacher_TG)
    wrong, failed = kl.run_case(Case("rehearsal", 24, 0.0, "fp32"), CPU, ("eager", "qcrd-torch"), 1)
    assert (
        wrong["status"] == "wrong: beyond 0.001"
        and "ms" not in wrong
        and failed["status"].startswith("failed: RuntimeError")
    )


def test_command(tmp_path, capsys):
    file = tmp_path / "kl.json"
    args = ["bench", "kl", "--heads", "rehearsal", "--tokens", "24", "--beta", "0,1", "--repeats", "1"]
    assert main([*args, "--providers", "eager,qcrd-torch", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["beta"], row["provider"]) for row in rows] == [
        (b, p) for b in (0.0, 1.0) for p in ("eager", "qcrd-torch")
    ]
    assert "extra_of_eager" in capsys.readouterr().out
    assert main([*args, "--dry-run"]) == 0 and "absent    qcrd-triton" in capsys.readouterr().out
    for wrong, message in (
        (["--beta", "2"], "--beta is 0"),
        (["--heads", "x"], "no head 'x'"),
        (["--beta", "a"], "expected numbers"),
    ):
        assert main([*args, *wrong]) == 2 and message in capsys.readouterr().err
