"""Write, load and rotate a run's checkpoints and snapshots; choose where a resume starts.

A checkpoint is written under a temporary name, its manifest (sha256 of every file) last, then renamed. Random states
are not stored because there are none: every random number is a function of (seed, step) or (seed, question, iteration).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.discriminator.cross_fit import CrossFitTrainer
from qcrd_fast.distributed.parallel import Strategy, like
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.loading import save_tokenizer
from qcrd_fast.models.lora import save_model
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import (
    DEALT,
    DISCRIMINATOR,
    FREE_OPTIONS,
    MANIFEST,
    OPTIMIZER,
    SNAPSHOTS,
    STATE,
    TEACHER,
    check_same_config,
    checkpoint_path,
)
from qcrd_fast.train.evaluation import Best
from qcrd_fast.train.methods import lag_of, samples_the_first
from qcrd_fast.train.questions import Data
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.snapshots import Snapshots
from qcrd_fast.utils.files import disk_space_text, remove_tree, sha256, sync, write_json

TOKENIZER_BYTES = 150  # of each token, at most, in the files of common tokenizers
_OWN = "discriminator:"  # prefix of the discriminator's entries in optimizer.safetensors

log = logging.getLogger(__name__)


def resume_point(config: TrainConfig, run: Path, schedule: Schedule) -> str | None:
    """Return the checkpoint that `--resume` continues from, or None for a run without one.

    Raises `InputError` if it is damaged or has other options, `RunError` if no checkpoint is intact.
    """
    if config.resume != "auto":
        chosen = Path(str(config.resume))
        fault = checkpoints.find_corruption(chosen, run) if chosen.is_dir() else "no such folder"
        if fault or chosen.resolve().parent != run.resolve():
            raise InputError(f"--resume: {chosen}: {fault or f'is not a checkpoint of {run}'}")
        resume_from: Path | None = chosen
    else:
        resume_from = checkpoints.latest_checkpoint(run, resume=True)
        if resume_from is None and checkpoints.checkpoints(run):
            raise RunError(f"{run}: no intact checkpoint is left to resume from")
    if resume_from is None:
        return None
    state = checkpoints.read_state(resume_from)
    check_same_config(config, state.get("config"), resume_from / STATE)
    began = state["config"]
    # runs before there were several processes
    alone = math.prod(began.get(name, getattr(config, name)) for name in DEALT)
    before = state.get("questions_per_step", alone)
    if before != schedule.questions_per_step:
        raise InputError(
            f"{resume_from}: the run began with {before} questions a step, now it is {schedule.questions_per_step} "
            f"(--per-device-train-batch-size {config.per_device_train_batch_size} x --gradient-accumulation-steps "
            f"{config.gradient_accumulation_steps} x {schedule.world_size} processes); their product must stay"
        )
    return str(resume_from)


def as_before(resume_from: Path, prompts: PromptSettings) -> PromptSettings:
    """Return `prompts` with the version and date of the checkpoint `resume_from`.

    Raises `InputError` if a template or system prompt file has changed since.
    """
    before = PromptSettings.of_state(checkpoints.read_state(resume_from)["prompt"])
    for name, option in (("template", "--prompt-template"), ("system", "--system-prompt")):
        was, now = getattr(before, name), getattr(prompts, name)
        if was != now:
            raise InputError(f"{resume_from}: the run began with {option} {was[:80]!r}, now it is {now[:80]!r}")
    if dict(before.views) != dict(prompts.views):
        raise InputError(f"{resume_from}: the run began with another table of --views")
    return dataclasses.replace(prompts, version=before.version, date=before.date)


class Checkpointer:
    """Saves and restores a run. `snapshots` is None for a run without lagged negatives."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: Data,
        schedule: Schedule,
        student: Student,
        optimizer: torch.optim.Optimizer,
        discriminator_trainer: CrossFitTrainer | None,
        strategy: Strategy,
        snapshots: Snapshots | None,
        moving: torch.nn.Module | None = None,
    ):
        self.moving = moving  # a teacher whose weights change
        self.config, self.run, self.data, self.schedule = config, run, data, schedule
        self.student, self.optimizer, self.discriminator_trainer, self.strategy = (
            student,
            optimizer,
            discriminator_trainer,
            strategy,
        )
        self.snapshots = snapshots
        self.saved_step: int | None = None
        self._passed_over: set[int] = set()  # steps of checkpoints later than the one that was resumed from

    def drop_discriminator(self) -> None:
        """Leave the discriminator out of later checkpoints."""
        self.discriminator_trainer = None

    def save(self, step: int, best: Best, progress: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, with `progress` in its state, and delete surplus ones."""
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
        save_checkpoint(
            self.run, step, self.student, self.optimizer, self.discriminator_trainer, state, self.strategy, self.moving
        )
        self.saved_step = step
        self._passed_over.discard(step)
        self._rotate(step, best)

    def _rotate(self, step: int, best: dict[str, Any] | None) -> None:
        at, keep = best["step"] if best else None, self.config.save_total_limit
        self.strategy.comm.on_rank0(lambda: checkpoints.rotate(self.run, step, keep, at, self._passed_over))

    def restore(self, resume_from: Path) -> dict[str, Any]:
        """Put back what a checkpoint holds beside the student's weights, which are loaded already; returns its
        state."""
        state = load_checkpoint(resume_from, self.student, self.optimizer, self.discriminator_trainer, self.moving)
        if state["data_sha256"] != self.data.digest:
            raise InputError(f"--data: the rows differ from those that {resume_from} was trained on")
        self.saved_step = state["step"]
        self._passed_over = {
            s for s in map(checkpoints.step_of, checkpoints.checkpoints(self.run)) if s > state["step"]
        }
        self._rotate(state["step"], state.get("best"))  # what a kill left of a checkpoint that was being deleted
        if self.snapshots:
            self.snapshots.known = {int(k): v for k, v in state["snapshots"].items()}
        return state

    def require_room(self, step: int) -> None:
        """Raise `RunError` if the disk has no room to continue from `step`."""
        left = self.schedule.total_steps - step
        if not left:
            return
        saves = math.ceil(left / min(self.schedule.save_steps, self.schedule.eval_steps))
        iterations = self.schedule.iteration(self.schedule.total_steps - 1) + 1
        snapshots = min(iterations, lag_of(self.config) + 3) if self.snapshots else 0
        kept = min(saves, (self.config.save_total_limit or saves) + bool(self.data.validation))
        require_room(self.run, self.student, self.discriminator_trainer, snapshots, kept)

    def snapshot(self, step: int) -> None:
        """Save the student at the start of an iteration, and delete snapshots that no resume needs."""
        if not self.snapshots:
            return
        fixed, iteration = samples_the_first(self.config), self.schedule.iteration(step)
        if not fixed or iteration == 0:
            self.snapshots.save(iteration, self.student.model)
        resumable = checkpoints.resumable(self.run, step, self.config.save_total_limit, self._passed_over)
        oldest = self._oldest_for(min(map(checkpoints.step_of, resumable))) if resumable else 0
        self.snapshots.prune(oldest, keep_initial=fixed)

    def _oldest_for(self, step: int) -> int:
        """The oldest snapshot that a resume at `step` may ask for: the discriminator looks one iteration back."""
        if samples_the_first(self.config):
            return 0
        return max(self.schedule.iteration(step) - 1 - lag_of(self.config), 0)


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    discriminator_trainer: CrossFitTrainer | None,
    state: dict[str, Any],
    strategy: Strategy | None = None,
    moving: torch.nn.Module | None = None,
) -> Path:
    """Write checkpoint-`step` atomically. Raises `RunError` if the disk is full; earlier checkpoints are untouched.

    All ranks must call it: rank 0 writes, and with a sharded model every rank writes its shard of the optimizer's
    state.
    """
    strategy = strategy or Strategy(student.model)
    comm = strategy.comm
    final, temporary = checkpoint_path(run, step), run / f".tmp-checkpoint-{step}"
    moments = {n: t.detach() for n, t in optimizer_tensors(student.model, optimizer).items()}

    def write_model() -> None:
        remove_tree(temporary)
        temporary.mkdir()
        save_model(student.model, temporary, strategy.weights())
        save_tokenizer(student.tokenizer, temporary)
        if discriminator_trainer is not None:
            save_file({n: t.cpu() for n, t in discriminator_trainer.tensors().items()}, temporary / DISCRIMINATOR)
        if moving is not None:
            save_file({n: p.detach().cpu().contiguous() for n, p in moving.named_parameters()}, temporary / TEACHER)

    def write_optimizer() -> str | None:
        if not (strategy.sharded or comm.first):
            return None
        tensors = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in moments.items()}
        if discriminator_trainer is not None and comm.first:
            own, state["discriminator_optimizer"] = discriminator_trainer.optimizer_tensors()
            tensors |= {_OWN + name: tensor for name, tensor in own.items()}
        name = f"optimizer-{comm.rank + 1:05d}-of-{comm.size:05d}.safetensors" if strategy.sharded else OPTIMIZER
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary / name)
        sync(temporary / name)  # by the machine that wrote it
        return name

    def finish(shares: set[str]) -> None:
        write_json(temporary / STATE, {"step": step, **state})
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        if unseen := shares - {p.name for p in files}:
            raise OSError(f"{min(unseen)} was written by another process, but is not there; all must share the folder")
        for path in files:
            sync(path)
        write_json(temporary / MANIFEST, {"files": {p.name: sha256(p) for p in files}})
        sync(temporary)  # the names in it too
        remove_tree(final)
        os.replace(temporary, final)
        sync(run)

    try:
        with strategy.unsharded():
            comm.on_rank0(write_model)
        shares = {name for name in comm.together(write_optimizer) if name}
        comm.on_rank0(lambda: finish(shares))
    except BaseException as error:
        if comm.first:
            remove_tree(temporary)
        if not isinstance(error, OSError | SafetensorError | RunError):  # such as a second signal
            raise
        room = disk_space_text(run, checkpoint_bytes(student, discriminator_trainer))
        raise RunError(f"cannot write {final}: {error} ({room}); earlier checkpoints are intact") from error
    return final


def load_checkpoint(
    checkpoint: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    discriminator_trainer: CrossFitTrainer | None,
    moving: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Load optimizer and discriminator state from an intact checkpoint; return its `state.json`.

    The student is loaded beforehand. Each rank reads everything and keeps its shard. Raises `InputError` if the files
    belong to another student.
    """
    state = checkpoints.read_state(checkpoint)
    parameters, own = dict(student.model.named_parameters()), {}
    try:
        for key, tensor in _read_optimizer(checkpoint):
            name, _, moment = key.rpartition("/")
            if key.startswith(_OWN):
                own[key.removeprefix(_OWN)] = tensor
                continue
            parameter = parameters[name]
            if moment != "step" and tensor.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, its weight {tuple(parameter.shape)}")
            optimizer.state[parameter][moment] = tensor if moment == "step" else like(tensor, parameter)
        if discriminator_trainer is not None:
            discriminator_trainer.load(load_file(checkpoint / DISCRIMINATOR), own, state["discriminator_optimizer"])
        if moving is not None:
            weights = load_file(checkpoint / TEACHER)
            with torch.no_grad():
                for name, parameter in moving.named_parameters():
                    parameter.copy_(weights[name])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise InputError(
            f"{checkpoint}: optimizer or discriminator are not this student's safetensors: {reason}"
        ) from error
    return state


def _read_optimizer(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the optimizer's state. Shards are concatenated, whatever their number."""
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    with contextlib.ExitStack() as stack:
        names = sorted(name for name in files if checkpoints.is_optimizer(name))
        shares = [stack.enter_context(safe_open(checkpoint / name, "pt")) for name in names]
        held = [set(share.keys()) for share in shares]
        for key in dict.fromkeys(key for share in shares for key in share.keys()):  # noqa: SIM118 (no mapping)
            parts = [share.get_tensor(key) for share, keys in zip(shares, held, strict=True) if key in keys]
            yield key, parts[0] if len(parts) == 1 or parts[0].dim() == 0 else torch.cat(parts)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's state as {parameter/moment: tensor}."""
    return {
        f"{name}/{moment}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def checkpoint_bytes(student: Student, discriminator_trainer: CrossFitTrainer | None) -> int:
    """Estimate a checkpoint's size on disk: weights, AdamW's two moments of trainable parameters, tokenizer."""
    parameters = list(student.model.parameters())
    needed = _bytes(parameters) + 2 * _bytes(p for p in parameters if p.requires_grad)
    if discriminator_trainer is not None:
        needed += _bytes(discriminator_trainer.discriminator.parameters()) + discriminator_trainer.optimizer_bytes
    return needed + TOKENIZER_BYTES * len(student.tokenizer) + 2**16


def require_room(
    run: Path, student: Student, discriminator_trainer: CrossFitTrainer | None, snapshots: int, kept: int
) -> None:
    """Raise `RunError` without room for a checkpoint and, unless `snapshots` is 0, a snapshot.

    Warns without room for `kept` checkpoints, the one being written and that many snapshots.
    """
    one, weights = (
        checkpoint_bytes(student, discriminator_trainer),
        2 * sum(p.numel() for p in student.model.parameters()),
    )
    needed, free = one + weights * bool(snapshots), shutil.disk_usage(run).free
    if free < needed:
        raise RunError(f"--output-dir: {run}: no room for a checkpoint ({disk_space_text(run, needed)})")
    held = sum(
        p.stat().st_size for folder in (*checkpoints.checkpoints(run), run / SNAPSHOTS) for p in folder.glob("*")
    )
    most = (kept + 1) * one + snapshots * weights
    if free + held < most:
        log.warning("%s may fill its disk: %d bytes at most, %d free; see --save-total-limit", run, most, free + held)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
