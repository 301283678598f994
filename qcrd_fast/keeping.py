"""What a run keeps: where it goes on from, what it saves, and which checkpoints and snapshots stay."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import torch

from qcrd_fast import checkpoint
from qcrd_fast.config import TrainConfig
from qcrd_fast.discriminator.trainer import DiscriminatorTrainer
from qcrd_fast.distributed.parallel import Engine
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.student import Student
from qcrd_fast.results import Best
from qcrd_fast.rundata import Data
from qcrd_fast.runfolder import DEALT, FREE_OPTIONS, check_same_config
from qcrd_fast.schedule import Schedule
from qcrd_fast.snapshots import Snapshots

log = logging.getLogger(__name__)


def resume_point(config: TrainConfig, run: Path, schedule: Schedule) -> str | None:
    """The checkpoint that `--resume` continues from, or None for a run that has none yet.

    Raises `InputError` for one that is damaged or of other options, `RunError` where none is whole.
    """
    if config.resume != "auto":
        chosen = Path(str(config.resume))
        fault = checkpoint.find_fault(chosen, run) if chosen.is_dir() else "no such folder"
        if fault or chosen.resolve().parent != run.resolve():
            raise InputError(f"--resume: {chosen}: {fault or f'is not a checkpoint of {run}'}")
        found: Path | None = chosen
    else:
        found = checkpoint.latest_checkpoint(run, resume=True)
        if found is None and checkpoint.checkpoints(run):
            raise RunError(f"{run}: no whole checkpoint is left to resume from")
    if found is None:
        return None
    state = checkpoint.read_state(found)
    check_same_config(config, state.get("config"), found / checkpoint.STATE)
    began = state["config"]
    alone = math.prod(began.get(name, getattr(config, name)) for name in DEALT)  # runs before there were several processes
    before = state.get("questions_per_step", alone)
    if before != schedule.questions_per_step:
        raise InputError(
            f"{found}: the run began with {before} questions a step, now it is {schedule.questions_per_step} "
            f"(--per-device-train-batch-size {config.per_device_train_batch_size} x --gradient-accumulation-steps "
            f"{config.gradient_accumulation_steps} x {schedule.world_size} processes); their product must stay"
        )
    return str(found)


class Keeper:
    """Saves a run and restores it. `snapshots` is None where the run has no lagged negatives."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: Data,
        schedule: Schedule,
        student: Student,
        optimizer: torch.optim.Optimizer,
        trainer: DiscriminatorTrainer | None,
        engine: Engine,
        snapshots: Snapshots | None,
    ):
        self.config, self.run, self.data, self.schedule = config, run, data, schedule
        self.student, self.optimizer, self.trainer, self.engine = student, optimizer, trainer, engine
        self.snapshots = snapshots
        self.saved_step: int | None = None
        self._passed_over: set[int] = set()  # steps of checkpoints later than the one that was resumed from

    def save(self, step: int, best: Best, progress: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, with `progress` in its state, and delete those that are no longer kept."""
        state = {
            "config": {name: value for name, value in self.config.to_dict().items() if name not in FREE_OPTIONS},
            "prompt": dataclasses.asdict(self.student.prompts),
            "task": self.data.task,
            "method": self.config.method,
            "best": best,
            "data_sha256": self.data.digest,
            "questions_per_step": self.schedule.questions_per_step,
            "snapshots": self.snapshots.digests(self._oldest_for(step)) if self.snapshots else {},
            **progress,
        }
        checkpoint.save_checkpoint(self.run, step, self.student, self.optimizer, self.trainer, state, self.engine)
        self.saved_step = step
        self._passed_over.discard(step)
        at, keep = best["step"] if best else None, self.config.save_total_limit
        self.engine.ranks.on_first(lambda: checkpoint.rotate(self.run, step, keep, at, self._passed_over))

    def restore(self, found: Path) -> dict[str, Any]:
        """Put back what a checkpoint holds beside the student's weights, which are loaded already; returns its state."""
        state = checkpoint.load_checkpoint(found, self.student, self.optimizer, self.trainer)
        if state["data_sha256"] != self.data.digest:
            raise InputError(f"--data: the rows differ from those that {found} was trained on")
        self.saved_step = state["step"]
        self._passed_over = {s for s in map(checkpoint.step_of, checkpoint.checkpoints(self.run)) if s > state["step"]}
        if self.snapshots:
            self.snapshots.known = {int(k): v for k, v in state["snapshots"].items()}
        return state

    def require_room(self, step: int) -> None:
        """Raises `RunError` where the disk has no room to go on from `step`."""
        left = self.schedule.total_steps - step
        if not left:
            return
        saves = math.ceil(left / min(self.schedule.save_steps, self.schedule.eval_steps))
        iterations = self.schedule.iteration(self.schedule.total_steps - 1) + 1
        snapshots = min(iterations, self.config.negative_lag + 3) if self.snapshots else 0
        kept = min(saves, (self.config.save_total_limit or saves) + bool(self.data.validation))
        checkpoint.require_room(self.run, self.student, self.trainer, snapshots, kept)

    def snapshot(self, step: int) -> None:
        """Keep the student as it is at the start of an iteration, and delete the snapshots that nobody will ask for."""
        if not self.snapshots:
            return
        fixed, iteration = self.config.negative_source == "fixed", self.schedule.iteration(step)
        if not fixed or iteration == 0:
            self.snapshots.save(iteration, self.student.model)
        resumable = checkpoint.resumable(self.run, step, self.config.save_total_limit, self._passed_over)
        oldest = self._oldest_for(min(map(checkpoint.step_of, resumable))) if resumable else 0
        self.snapshots.prune(oldest, keep_initial=fixed)

    def _oldest_for(self, step: int) -> int:
        """The oldest snapshot that a resume at `step` may ask for: the discriminator looks one iteration back."""
        if self.config.negative_source == "fixed":
            return 0
        return max(self.schedule.iteration(step) - 1 - self.config.negative_lag, 0)
