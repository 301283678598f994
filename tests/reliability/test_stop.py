"""Signals, and numbers that must not be learnt from (trials 9 and 10 of docs/reliability.md)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from qcrd_fast.runs import checkpoints
from tests.support.crash_run import Crashes
from tests.support.faults import Fault
from tests.support.warm import differences

STEP, SAMPLE = "qcrd_fast.train.objective:Objective.step", "qcrd_fast.train.negatives:LaggedNegatives._sample"
CODES = {"int": 130, "term": 143}


def steps(run: Path) -> list[int]:
    return sorted(map(checkpoints.step_of, checkpoints.checkpoints(run)))


class TestTrial9:
    """SIGINT or SIGTERM in a step, in sampling, in a validation, in a save: the step is finished and saved, exit 130 or
    143; a second signal quits at once; the run goes on exactly. In `collect`: test_collect.py,
    test_a_signal_waits_for_what_is_in_flight and
    test_in_flight_is_given_up_after_the_grace_and_a_second_signal_quits."""

    @pytest.mark.parametrize(
        "student, do, at, point, saved",
        [
            (0, "int", 4, STEP, 3),
            (1, "term", 5, STEP, 3),  # between two micro-batches
            (0, "term", 4, SAMPLE, 5),
            (1, "int", 0, "qcrd_fast.train.evaluation:predict", 4),
            (0, "term", "write .tmp-checkpoint-2/optimizer.safetensors", "disk", 2),
            (1, "int", 3, "qcrd_fast.discriminator.trainer:DiscriminatorTrainer.update", 5),  # between two folds
        ],
        ids=["step", "micro-batch", "sampling", "eval", "save", "discriminator"],
    )
    def test_the_first_signal(
        self, crashes: Crashes, student: int, do: str, at, point: str, saved: int, tmp_path
    ) -> None:
        whole, run = crashes.wholes[student], tmp_path / "run"
        at = whole.points.index(at) if isinstance(at, str) else at
        done = crashes.warm.run(crashes.args(whole.student, run), Fault(do, at, point), folder=run)
        assert done.code == CODES[do] and "finishing the step and saving" in done.err, done.err
        assert steps(run)[-1] == saved and checkpoints.latest_checkpoint(run, resume=True) is not None
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 0 and f"resuming from {run / f'checkpoint-{saved}'}" in done.err, done.err
        assert differences(run, whole.run) == []

    @pytest.mark.parametrize(
        "student, do, at, point, saved",
        [
            (0, "int,term", 6, STEP, [2]),
            (1, "term,int", "write .tmp-checkpoint-4/optimizer.safetensors", "disk", [2]),
            (1, "int", 0, "qcrd_fast.discriminator.trainer:DiscriminatorTrainer._step", []),  # nothing is trained yet
            (0, "term", 0, "qcrd_fast.models.student:Student.load", []),
            (1, "int", 0, "qcrd_fast.train.trainer:Trainer.finish", [4, 6]),
        ],
        ids=["second in a step", "second in a save", "pretraining", "loading", "at the end"],
    )
    def test_at_once(self, crashes: Crashes, student: int, do: str, at, point: str, saved: list[int], tmp_path) -> None:
        """A second signal, or the first where there is no step to finish."""
        whole, run = crashes.wholes[student], tmp_path / "run"
        at = whole.points.index(at) if isinstance(at, str) else at
        done = crashes.warm.run(crashes.args(whole.student, run), Fault(do, at, point), folder=run)
        assert done.code == CODES[do.split(",")[-1]] and "Traceback" not in done.err, done.err
        assert steps(run) == saved and not list(run.glob(".tmp*"))
        done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
        assert done.code == 0, done.err
        assert differences(run, whole.run) == []


class TestTrial10:
    """NaN or Inf in the loss, a gradient or a quality score, quality weights or a student that are all zero: the run
    ends within one step with exit 1, naming the step and its rows; the last good checkpoint stays and nothing after it
    is saved."""

    @pytest.mark.parametrize(
        "student, do, at, point, says",
        [
            (0, "nan", 5, "qcrd_fast.train.objective:linear_rationale_loss", "loss nan"),
            (1, "inf", 4, "qcrd_fast.train.objective:linear_rationale_loss", "loss inf"),
            (0, "gradient", 5, STEP, "grad_norm nan"),
            (1, "nan", 4, "qcrd_fast.discriminator.cross_fit:CrossFitted.score", "a score that is not finite"),
            (0, "inf", 5, "qcrd_fast.discriminator.cross_fit:CrossFitted.score", "a score that is not finite"),
        ],
        ids=["nan loss", "inf loss", "nan gradient", "nan quality", "inf quality"],
    )
    def test_not_finite(
        self, crashes: Crashes, student: int, do: str, at: int, point: str, says: str, tmp_path
    ) -> None:
        whole, run = crashes.wholes[student], tmp_path / "run"
        done = crashes.warm.run(crashes.args(whole.student, run), Fault(do, at, point))
        self.check(run, done, says, [2])
        if do == "gradient":  # whose weights were NaN already
            done = crashes.warm.run(crashes.args(whole.student, run, resume="auto"))
            assert done.code == 0 and differences(run, whole.run) == [], done.err

    def test_quality_weights_that_are_all_zero(self, crashes: Crashes, tmp_path) -> None:
        """D gives every positive 0 and every negative 1: L_CL is 0, and the student would learn nothing of
        rationales."""
        run, sizes = tmp_path / "run", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        dead = Fault("dead", 2, "qcrd_fast.train.objective:Objective.quality")
        done = crashes.warm.run(crashes.args(crashes.wholes[1].student, run, **sizes), dead)
        self.check(run, done, "the discriminator assigns weight 0 to every rationale", [2])

    @pytest.mark.parametrize("student", [0, 1], ids=["t5", "llama"])
    def test_a_student_of_zeros(self, crashes: Crashes, student: int, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "zeros"
        shutil.copytree(crashes.wholes[student].student, folder)
        zeros = {name: tensor * 0 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(zeros, folder / "model.safetensors", {"format": "pt"})
        done = crashes.warm.run(crashes.args(folder, tmp_path / "run", save_steps=1, eval_steps=1))
        self.check(tmp_path / "run", done, "without any gradient", [], step=1)

    def check(self, run: Path, done, says: str, saved: list[int], step: int = 3) -> None:
        assert done.code == 1 and "Traceback" not in done.err, done.err
        last = done.err.strip().splitlines()[-1]
        assert re.search(rf"step {step}: .*{says}.*questions q\d+", last), last
        assert steps(run) == saved and (
            not saved or checkpoints.find_corruption(run / f"checkpoint-{saved[-1]}", run) is None
        )
        assert (run / "metrics.jsonl").read_text().count('"loss"') < step and not list(run.glob(".tmp*"))
