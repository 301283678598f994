"""Short training runs, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qcrd_fast.config import TrainConfig
from qcrd_fast.runs.folder import checkpoint_path

PARTS = {"scheme": "minmax", "negative_source": "lagged"}  # of the method that the defaults leave out
# fields that measure the machine, not the run
UNTIMED = ("tokens_per_s", "step_ms", "sample_wait_ms", "sampled_tokens_per_s")


def settings(rows: Path, student: Path, out: Path, **changes) -> TrainConfig:
    """By the method with all its parts, unless `changes` say otherwise: lagged negatives, min and max, a
    discriminator."""
    values = dict(
        **PARTS,
        quality=None if changes.get("discriminator") == "none" or changes.get("paper") else "discriminator",
        data=str(rows),
        student=str(student),
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        iteration_steps=2,
        negative_lag=1,
        max_new_tokens=6,
        learning_rate=1e-3,
        discriminator_folds=2,
        discriminator_min_auc=0.0,  # two steps teach it nothing
        discriminator_pretrain_steps=2,
        discriminator_update_batches=1,
        save_steps=3,
        sample_batch_size=4,
        max_answer_tokens=4,
        max_target_length=24,  # an untrained student does not end what it says
        delta=8.0,
    )  # fmt: skip  (delta: an untrained student finds everything unlikely)
    return TrainConfig(**(values | changes))


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in lines]


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path(run, step) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
