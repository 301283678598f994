"""Where memory ends, so does the run, with exit code 1, the option that helps first and the longest row."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cli.main import entry
from qcrd_fast import evaluate
from qcrd_fast.config import TrainConfig
from qcrd_fast.discriminator.model import Discriminator
from qcrd_fast.errors import RunError
from qcrd_fast.generation.engine import Sampler
from qcrd_fast.models.student import Student
from qcrd_fast.train.negatives import LaggedNegatives
from qcrd_fast.utils import oom
from qcrd_fast.utils.oom import explaining_oom, is_exhausted
from tests.support.paths import ROOT

CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes."
)
EXHAUSTED = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(CPU_SAYS),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
]


def test_what_counts_as_the_end_of_memory() -> None:
    assert all(map(is_exhausted, EXHAUSTED))
    others = (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError(12, "x"))
    assert not any(map(is_exhausted, (*others, RunError("out of memory in a training step"))))
    with pytest.raises(RuntimeError, match="shapes"), explaining_oom("--x"):
        raise others[0]
    wanted = r"in here \(std::bad_alloc\); what helps: --x; the longest row there: q7$"
    with pytest.raises(RunError, match=wanted), explaining_oom("--x", "here", lambda: "q7"):
        raise EXHAUSTED[-1]


def test_the_same_step_in_more_parts() -> None:
    for size, parts, wanted in (
        (8, 1, "4 --gradient-accumulation-steps 2"),
        (3, 2, "1 --gradient-accumulation-steps 6"),
    ):
        config = TrainConfig(per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        assert oom.for_training(config).startswith(f"--per-device-train-batch-size {wanted} (the same step)")
    rest = oom.for_training(TrainConfig(per_device_train_batch_size=1, gradient_checkpointing=True, use_peft=True))
    assert rest == "--max-target-length below 256, --max-source-length below 1024"


STAGES = {
    "a training step": (
        Student,
        "hidden",
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 2",
        "target tokens",
    ),
    "the discriminator's training": (Discriminator, "rate", "--discriminator-batch-size 2", "longest row there: q"),
    "the sampler": (LaggedNegatives, "_autocasts", "--sample-batch-size 32", "prompt tokens"),
    "sampling negatives": (Sampler, "generate", "--sample-batch-size 32", "prompt tokens"),
    "answering": (evaluate, "sample", "--eval-batch-size 32", "prompt tokens"),
    "the optimizer's step": (torch.optim.AdamW, "step", "--use-peft", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_names_what_helps(stage, llama_folder, rows_file, tmp_path, monkeypatch, capsys) -> None:
    owner, name, helps, longest = STAGES[stage]

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(CPU_SAYS)

    monkeypatch.setattr(owner, name, fails)
    args = ["train", "--data", str(rows_file), "--student", str(llama_folder), "--output-dir", str(tmp_path / "run")]
    args += ["--per-device-train-batch-size", "4", "--max-steps", "2", "--save-steps", "1"]
    if stage != "the optimizer's step":
        args += ["--paper"]  # all stages; the discriminator has an optimizer too
    assert entry(args) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"out of memory in {stage} (" in said and "you tried to allocate 99 bytes" in said
    assert f"what helps: {helps}" in said and longest in said


def test_other_verbs_end_in_a_line_too(llama_folder, rows_file, tmp_path, monkeypatch, capsys) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(evaluate, "sample", fails)
    assert entry(["eval", str(llama_folder), "--data", str(rows_file), "--output", str(tmp_path)]) == 1
    assert "what helps: --batch-size 32, or --max-answer-tokens below 48; the longest row" in capsys.readouterr().err
    assert entry(["generate", str(llama_folder), "1 + 1"]) == 1
    assert "--num-samples" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "load_student", fails)
    assert entry(["generate", str(llama_folder), "1 + 1"]) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "Traceback" not in said


LIMITED = """
import resource, sys
from cli.main import entry
from qcrd_fast.models.student import Student

hidden = Student.hidden
def limited(*args, **kwargs):
    pages = int(open("/proc/self/statm").read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (96 << 20), hard))
    return hidden(*args, **kwargs)
Student.hidden = limited
sys.exit(entry(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_limit_that_a_step_does_not_fit(llama_folder, tmp_path) -> None:
    """96 MiB for the activations of 64 long texts: a real allocation fails, within the kernels of torch."""
    rows = tmp_path / "rows.jsonl"
    text = " ".join(["Tom", "has", "3", "bags"] * 60)
    row = {"majority": "3", "positives": [text], "negatives": [f"{text} 4"], "votes": {"3": 2}}
    rows.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{text} {i}", **row}) + "\n" for i in range(72)))
    args = ["train", "--data", str(rows), "--student", str(llama_folder), "--output-dir", str(tmp_path / "run")]
    args += ["--per-device-train-batch-size", "64", "--discriminator", "none", "--negative-source", "minority"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *args], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1, done.stderr[-2000:]
    said = done.stderr.strip().splitlines()[-1]
    assert "out of memory in a training step (" in said and "--per-device-train-batch-size 32" in said
    assert "the longest row there: q" in said and "Traceback" not in done.stderr
