"""Gradient accumulation changes nothing (trial 11 of docs/reliability.md)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qcrd_fast.config import TrainConfig
from qcrd_fast.train.trainer import train
from tests.support.eager_equations import assert_same


@pytest.mark.parametrize("folder", ["t5_folder", "llama_folder"])
class TestTrial11:
    """(batch, accumulation) of (4, 1), (2, 2) and (1, 4): the same loss and the same gradient of every parameter, to
    1e-10. In Hugging Face's Trainer, against the equations: test_adapters.py, test_hf_trainer."""

    def test_own_loop(self, folder: str, rows_file, request, tmp_path, float64) -> None:
        student = tmp_path / "student"
        shutil.copytree(request.getfixturevalue(folder), student)
        config = json.loads((student / "config.json").read_text()) | {"dropout_rate": 0.0}
        (student / "config.json").write_text(json.dumps(config))
        judge = request.getfixturevalue("t5_folder")
        runs = [self.run(rows_file, student, judge, tmp_path / f"{b}x{a}", b, a) for b, a in ((4, 1), (2, 2), (1, 4))]
        (loss, gradients), *others = runs
        assert len(loss) == 2 and gradients and all(float(g.norm()) > 0 for g in gradients.values())
        for other_loss, other_gradients in others:
            assert other_loss == pytest.approx(loss, rel=1e-10)
            assert_same(gradients, other_gradients)

    def run(self, rows, student, judge, out, batch: int, accumulation: int):
        """(losses of two steps, the first step's gradients before they are clipped)"""
        found: dict[str, torch.Tensor] = {}

        def note(optimizer, *_) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if not found and optimizer.defaults["lr"] == 2e-3:  # the student's, not the discriminator's
                found.update({str(i): p.grad.clone() for i, p in enumerate(parameters) if p.grad is not None})

        hook = register_optimizer_step_pre_hook(note)
        try:
            train(TrainConfig(
                data=str(rows), student=str(student), output_dir=str(out), max_steps=2,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation, max_grad_norm=0.0, learning_rate=2e-3, delta=8.0,
                max_new_tokens=6,
                discriminator=str(judge), sample_batch_size=4, discriminator_pretrain_steps=2,
                discriminator_min_auc=0.0, discriminator_folds=2, discriminator_update_batches=1,
                validation_fraction=0.0, iteration_steps=1, negative_lag=1, negative_source="lagged", scheme="minmax",
            ))  # fmt: skip
        finally:
            hook.remove()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["active_hinge_lagged"] > 0
        return [line["loss"] for line in lines], found
