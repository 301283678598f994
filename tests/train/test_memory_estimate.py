"""The memory that a dry run predicts is the memory that training takes, as torch's profiler records it."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from bench.timing import peak_mib
from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.discriminator.cross_fit import CrossFitTrainer, build_judge
from qcrd_fast.discriminator.model import build_discriminator
from qcrd_fast.models.lora import add_lora
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train import memory_estimate
from qcrd_fast.train.examples import Example, make_examples
from qcrd_fast.train.objective import Objective
from qcrd_fast.train.questions import Data
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.utils.device import make_autocast

CPU = torch.device("cpu")
OPTIONS = {
    "qcrd": {"scheme": "minmax", "negative_source": "lagged"},
    "default": {},
    "joint": {"forward": "joint", "negative_source": "lagged"},
    "mi": {"method": "mi"},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "alone": {"shared_prompts": False},
    "lora": {"use_peft": True},
}


def prepared(folder, rows_file, **options) -> tuple[TrainConfig, Student, list[Example], Schedule]:
    config = TrainConfig(
        **{"data": str(rows_file), "student": str(folder), "per_device_train_batch_size": 3, **options}
    )
    data = Data.load(config)
    student = Student.load(str(folder), PromptSettings(), CPU)
    return config, student, make_examples(data.train, student, config), Schedule(len(data.train), config)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_training_pass_takes_what_was_predicted(kind, name, t5_folder, llama_folder, rows_file) -> None:
    if name == "lora":
        pytest.importorskip("peft", reason="needs PEFT, the extra `peft`")
    folder = {"t5": t5_folder, "llama": llama_folder}[kind]
    config, student, examples, schedule = prepared(folder, rows_file, **OPTIONS[name])
    if config.use_peft:
        add_lora(student.model, config)
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    autocast = make_autocast(CPU, config.bf16)
    worst = memory_estimate.find_worst(student, examples, schedule)
    fake = memory_estimate._Fake(student, autocast, config)
    workspace = fake.loss_workspace(worst.weighted, worst.batch)
    held, peak = fake.training(worst, workspace, True)

    # the same passes, on real tensors
    fake.student, fake.objective = student, Objective(student, config, None, autocast, 0)
    student.model.train()

    def step() -> None:
        fake.loss(worst).backward()

    student.model.zero_grad(set_to_none=True)
    measured = peak_mib(step, CPU) * 2**20
    assert 0 < held <= peak
    low = -0.1 if config.bf16 else -0.05  # products of bf16 take copies of their own, where the processor has them
    # a padding mask without padding is left out there
    assert low < peak / measured - 1 < (0.2 if name == "alone" else 0.05)


def test_a_teachers_weights_are_counted(t5_folder, llama_folder, rows_file) -> None:
    """Those of the teacher's own files, or a copy of the student; files of log-probs take none."""
    own = {}
    for method, teacher in (("opd", str(t5_folder)), ("sdft", None), ("dft", None), ("mentor-kd", str(t5_folder))):
        _, student, examples, schedule = prepared(llama_folder, rows_file, method=method, teacher=teacher, quality=None)
        told = memory_estimate.predict_memory(student, examples, schedule, make_autocast(CPU, None), None, [])
        own[method] = told["teacher"]
        assert told["peak"] > told["parameters"] + told["optimizer"] + told["teacher"] and told["activations"] > 0
        assert (told["sampler"] > 0) == (method in ("opd", "sdft"))
    files = sum(p.numel() for p in Student.load(str(t5_folder), PromptSettings()).model.parameters())
    assert own["opd"] == own["mentor-kd"] == 4 * files and own["dft"] == 0
    assert own["sdft"] == 4 * sum(p.numel() for p in student.model.parameters())


def test_the_discriminator_takes_what_was_predicted(t5_folder, llama_folder, rows_file) -> None:
    for folder in (t5_folder, llama_folder):
        config, student, examples, _ = prepared(folder, rows_file)
        judge = build_discriminator("auto", student.model, student.tokenizer)
        assert judge is not None
        fake = memory_estimate._Fake(student, make_autocast(CPU, None), config)
        predicted = fake.judging(judge, examples)
        fake._copy = lambda module: module  # type: ignore[method-assign]
        fake.mode = contextlib.nullcontext()  # type: ignore[assignment]
        measured = peak_mib(lambda: fake.judging(judge, examples), CPU) * 2**20  # noqa: B023 (called at once)
        assert predicted / measured == pytest.approx(1, abs=0.05)


def test_each_fold_of_the_discriminator_counts(t5_folder, rows_file, monkeypatch) -> None:
    """Weights and two moments of each, which is what a checkpoint holds of them, and the gradients of one."""
    monkeypatch.delattr(memory_estimate._Fake, "training")  # the passes' part is unknown then
    sizes = {}
    for folds in (0, 1, 3):
        config, student, examples, schedule = prepared(t5_folder, rows_file, discriminator_folds=folds)
        judge = build_judge(config.to_dict(), student.model, student.tokenizer)
        told = memory_estimate.predict_memory(student, examples, schedule, make_autocast(CPU, None), judge, [])
        sizes[folds] = told["discriminator"]
        trainer = CrossFitTrainer(judge, config)
        trainer.pretrain(Data.load(config).train, 1)
        held = [t for t in (*trainer.tensors().values(), *trainer.optimizer_tensors()[0].values()) if t.dim()]
        gradients = sum(p.numel() * 4 for p in judge.models[0].parameters())
        assert told["discriminator"] == sum(t.numel() * t.element_size() for t in held) + gradients
        assert all(p.grad is None for p in judge.parameters())
    assert sizes[0] == sizes[1] and sizes[3] * 4 == sizes[1] * 10


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_needs(t5_folder, rows_file, tmp_path, capsys) -> None:
    args = ["train", "--data", str(rows_file), "--student", str(t5_folder), "--output-dir", str(tmp_path / "run")]
    assert entry([*args, "--per-device-train-batch-size", "4", "--paper", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory, row, weights = plan["memory"], plan["longest_row"], 4 * plan["parameters"]
    # buffers are not trained
    assert weights <= memory["parameters"] < 1.01 * weights and memory["gradients"] == weights
    assert memory["optimizer"] == 2 * weights and memory["discriminator"] > 0 and memory["micro_batch_questions"] == 4
    assert (
        memory["peak"] > memory["parameters"] + memory["optimizer"] + memory["activations"]
        and "pass" in memory["peak_in"]
    )
    found = {json.loads(line)["id"]: json.loads(line) for line in rows_file.read_text().splitlines()}[row["id"]]
    student = Student.load(str(t5_folder), PromptSettings())
    assert row["target_tokens"] == max(len(student.target_ids(s["rationale"])) for s in found["samples"])
    assert row["prompt_tokens"] == len(student.source_ids(EXPLAIN, found["question"]))
    assert not (tmp_path / "run").exists()
    more = ["--gradient-accumulation-steps", "2", "--method", "dss", "--dry-run"]
    assert entry([*args, *more]) == 0
    text = capsys.readouterr().out
    assert f"{row['id']}, {row['prompt_tokens']} prompt + {row['target_tokens']} target tokens" in text
    assert "memory peak " in text and "MiB" in text and "memory discriminator          0.0 MiB" in text


@pytest.mark.slow
def test_what_several_processes_hold(t5_folder, rows_file) -> None:
    told = {}
    for name, size, fsdp in (("alone", 1, False), ("ddp", 2, False), ("fsdp", 2, True)):
        config, student, examples, _ = prepared(t5_folder, rows_file, fsdp=fsdp, method="dss")
        told[name] = memory_estimate.estimate_memory(student, examples, [], Schedule(len(examples), config, size))[
            "memory"
        ]
    alone = told["alone"]
    assert told["ddp"]["gradients"] == 2 * alone["gradients"] and told["ddp"]["optimizer"] == alone["optimizer"]
    for part in ("parameters", "gradients", "optimizer"):
        assert told["fsdp"][part] == alone[part] // 2
    assert alone["peak"] < told["ddp"]["peak"] and alone["sampler"] == alone["discriminator"] == 0


def test_what_cannot_be_counted_is_unknown_and_said(t5_folder, rows_file, monkeypatch, caplog) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError("no such kernel")

    _, student, examples, schedule = prepared(t5_folder, rows_file)
    monkeypatch.setattr(memory_estimate._Fake, "training", fails)
    told = memory_estimate.estimate_memory(student, examples, [], schedule)["memory"]
    assert told["activations"] is None and told["peak"] is None and told["parameters"] > 0
    assert "NotImplementedError: no such kernel" in caplog.text
