"""Options that end a run early or make it smaller, and what a resume makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.train.questions import Data
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.trainer import Trainer, train
from tests.support.short_runs import settings

STOPPING = dict(
    method="finetune", max_steps=12, eval_steps=2, save_steps=2, early_stopping_patience=2, save_total_limit=None
)


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies that the coming validations give; then the last one again."""
    values = [0.5, 0.25, 0.75, 0.75, 0.5]

    def validate(self: Any, student: Any) -> tuple[float, str]:
        return (values.pop(0) if len(values) > 1 else values[0]), "of the test"

    monkeypatch.setattr("qcrd_fast.train.evaluation.Evaluation.validate", validate)
    return values


def test_a_run_ends_after_validations_without_a_better_one(rows_file, t5_folder, tmp_path, rated, caplog):
    """0.5, 0.25, 0.75 (the best), 0.75 and 0.5: two in a row that are no better, an equal one among them."""
    caplog.set_level("INFO", "qcrd_fast")
    results = train(settings(rows_file, t5_folder, tmp_path / "run", **STOPPING))
    assert (results["steps"], results["best_step"], results["stopped_early"]) == (10, 6, True)
    assert "stopped early after step 10 of 12" in caplog.text
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "loss" in r] == list(range(1, 11))
    assert (tmp_path / "run" / "final").resolve().name == "checkpoint-6"


def test_a_resume_counts_on_and_ends_where_the_unbroken_run_did(rows_file, t5_folder, tmp_path, rated, monkeypatch):
    run, step = tmp_path / "run", Trainer._train_step

    def killed(self: Trainer) -> None:
        if self.step == 9:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings(rows_file, t5_folder, run, **STOPPING))
    monkeypatch.setattr(Trainer, "_train_step", step)
    assert json.loads((run / "checkpoint-8" / "state.json").read_text())["stale"] == 1
    results = train(settings(rows_file, t5_folder, run, resume="auto", **STOPPING))
    assert (results["steps"], results["best_step"]) == (10, 6)


def test_a_finished_early_run_is_left_as_it_is(rows_file, t5_folder, tmp_path, rated):
    run = tmp_path / "run"
    results = train(settings(rows_file, t5_folder, run, **STOPPING))
    before = (run / "metrics.jsonl").read_bytes()
    assert train(settings(rows_file, t5_folder, run, resume="auto", **STOPPING)) == results
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="--early-stopping-patience 2, now it is 3"):
        train(settings(rows_file, t5_folder, run, resume="auto", **STOPPING | {"early_stopping_patience": 3}))


def test_fewer_samples_lie_within_more(rows_file, tmp_path):
    def ids(**options: Any) -> list[str]:
        return [q.id for q in Data.load(TrainConfig(data=str(rows_file), method="finetune", **options)).train]

    few, more, every = ids(max_samples=3), ids(max_samples=6), ids()
    assert len(few) == 3 and len(more) == 6 and set(few) < set(more) < set(every)
    assert ids(max_samples=10_000) == every and ids(max_samples=3, seed=1) != few


def test_warmup_steps_replace_the_ratio():
    config = TrainConfig(max_steps=100, warmup_ratio=0.5, warmup_steps=10, learning_rate=1.0)
    rates = [Schedule(10, config).learning_rate(step) for step in (0, 5, 10, 55)]
    assert rates == [0.0, 0.5, 1.0, 0.5]
    assert Schedule(10, TrainConfig(max_steps=100, warmup_ratio=0.5)).warmup_steps == 50


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"early_stopping_patience": 1, "validation_fraction": 0}, "needs validation questions"),
        ({"system_prompt": "Be brief."}, "needs --prompt-template chat"),
        ({"max_samples": 4, "train_fraction": 0.5}, "one of them"),
        ({"lora_r": 4}, "--lora-r needs --use-peft"),
        ({"lora_target_modules": "q_proj"}, "--lora-target-modules needs --use-peft"),
    ],
)
def test_options_at_odds_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        TrainConfig(**options)


def test_lora_on_the_named_layers_alone(rows_file, llama_folder, tmp_path: Path):
    from safetensors import safe_open

    lora = dict(method="finetune", use_peft=True, lora_r=2, max_steps=1, lora_target_modules="q_proj, v_proj")
    train(settings(rows_file, llama_folder, tmp_path / "run", **lora))
    with safe_open(tmp_path / "run" / "final" / "lora.safetensors", "pt") as file:
        layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert layers == {"q_proj", "v_proj"}
    for names, why in (
        ("q_prj", "no linear layer of the student is called 'q_prj'; there are: .*q_proj"),
        ("lm_head", "lm_head"),
    ):
        with pytest.raises(InputError, match=why):
            train(settings(rows_file, llama_folder, tmp_path / names, **lora | {"lora_target_modules": names}))


def test_attention_of_the_students_choice(rows_file, llama_folder, tmp_path, monkeypatch):
    seen = []
    real = Trainer.__init__

    def watch(self: Trainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        seen.append(self.student.model.config._attn_implementation)

    monkeypatch.setattr(Trainer, "__init__", watch)
    for attention in ("eager", "sdpa"):
        options = dict(method="finetune", max_steps=1, attn_implementation=attention)
        train(settings(rows_file, llama_folder, tmp_path / attention, **options))
    assert seen == ["eager", "sdpa"]


def test_an_adapter_goes_on_above_the_weights_it_began_with(rows_file, llama_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    student, run = Path(shutil.copytree(llama_folder, tmp_path / "student")), tmp_path / "run"
    lora = dict(method="finetune", use_peft=True, lora_r=2, max_steps=1, save_steps=1)
    train(settings(rows_file, student, run, **lora))
    (run / "eval_results.json").unlink()
    train(settings(rows_file, student, run, resume="auto", **lora))
    weights = student / "model.safetensors"
    save_file({name: 1.5 * x for name, x in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"--student: the contents of .*student differ from those that .*checkpoint-1"):
        train(settings(rows_file, student, run, resume="auto", **lora))
