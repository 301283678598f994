"""TensorBoard and W&B, stood in for by what they were told: a run of theirs begins and ends with one of ours."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types

import pytest

from qcrd_fast.train import trainer as module
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.determinism import WORKSPACE
from tests.support.short_runs import settings

SHORT = {"discriminator": "none", "negative_source": "minority", "max_steps": 4, "save_steps": 2}


def stand_in(monkeypatch, name: str, **members) -> None:
    found = types.ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    found.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, found)


@pytest.fixture
def told(monkeypatch) -> list[tuple]:
    """(what, of what) in order."""
    told: list[tuple] = []

    class Board:
        def __init__(self, folder: str, purge_step: int):
            told.append(("from", purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            if key == "loss":
                told.append(("loss", step))

        def close(self) -> None:
            told.append(("end", 0))

    def log(values: dict, step: int) -> None:
        if "loss" in values:
            told.append(("loss", step))

    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Board)

    def init(**options) -> types.SimpleNamespace:
        told.append(("run", options["id"], options["resume"]))
        return types.SimpleNamespace(id=options["id"] or f"new-{len(told)}")

    stand_in(monkeypatch, "wandb", init=init, log=log, finish=lambda exit_code: told.append(("end", exit_code)))
    return told


def test_the_tracker_ends_with_the_run_and_goes_on_from_the_checkpoint(told, monkeypatch, rows_file, llama_folder,
                                                                       tmp_path):  # fmt: skip
    step = module.Trainer._train_step

    def interrupted(self):
        if self.step == 3:
            self.log.flush()
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(module.Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(rows_file, llama_folder, tmp_path / "run", report_to="tensorboard", **SHORT))
    assert told == [("from", 1), ("loss", 1), ("loss", 2), ("loss", 3), ("end", 0)]
    told.clear()
    monkeypatch.setattr(module.Trainer, "_train_step", step)
    train(settings(rows_file, llama_folder, tmp_path / "run", report_to="tensorboard", resume="auto", **SHORT))
    assert told == [("from", 3), ("loss", 3), ("loss", 4), ("end", 0)]  # step 3 is made again, and shown once


def test_each_run_of_a_process_is_its_own_and_resumes_as_itself(told, monkeypatch, rows_file, llama_folder, tmp_path):
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = dict(os.environ)
    options = SHORT | {"report_to": "wandb", "max_steps": 2, "deterministic": True}
    for seed in range(2):
        train(settings(rows_file, llama_folder, tmp_path / f"run-{seed}", seed=seed, **options))
    assert told == 2 * [("run", None, None), ("loss", 1), ("loss", 2), ("end", 0)]
    assert dict(os.environ) == before
    told.clear()
    train(settings(rows_file, llama_folder, tmp_path / "run-1", seed=1, resume="auto", **options))
    assert told[0] == ("run", "new-5", "allow") and told[-1] == ("end", 0)  # in the run that it began
