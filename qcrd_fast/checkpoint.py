"""Checkpoints: a Hugging Face model folder with what a resume needs, whole or not there at all. No pickle.

A checkpoint is written under a temporary name, its manifest (sha256 of every file) last, then renamed. Random states are
not stored because there are none: every random number is a function of (seed, step) or (seed, question, iteration).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcrd_fast.discriminator import DiscriminatorTrainer
from qcrd_fast.errors import RunError
from qcrd_fast.lora import save_model
from qcrd_fast.runfolder import remove_tree, sha256, write_json
from qcrd_fast.snapshots import Snapshots
from qcrd_fast.students import Student

log = logging.getLogger(__name__)

STATE, MANIFEST, OPTIMIZER, DISCRIMINATOR = "state.json", "MANIFEST.json", "optimizer.safetensors", "discriminator.safetensors"
_OWN = "discriminator:"  # prefix of the discriminator's entries in optimizer.safetensors


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, latest first."""
    found = [
        p
        for p in run.glob("checkpoint-*")
        if p.is_dir() and p.name.removeprefix("checkpoint-").isdecimal() and p.name.isascii()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def latest_checkpoint(run: Path, resume: bool = False) -> Path | None:
    """The latest whole checkpoint; a warning names what is wrong with each later one.

    With `resume`, the snapshots that it needs must be whole too.
    """
    for checkpoint in checkpoints(run):
        fault = find_fault(checkpoint, run if resume else None)
        if fault is None:
            return checkpoint
        log.warning("%s is damaged (%s); trying an earlier one", checkpoint, fault)
    return None


def find_fault(checkpoint: Path, run: Path | None = None) -> str | None:
    """What is wrong with a checkpoint (and with the snapshots in `run` that it needs), naming the file; None if whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    if missing := {"config.json", STATE, OPTIMIZER} - files.keys():
        return f"{MANIFEST} does not list {sorted(missing)[0]}"
    fault = _find_bad_file(checkpoint, files)
    if fault is None and run is not None:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        snapshots = Snapshots(run / "snapshots")
        fault = _find_bad_file(
            snapshots.folder, {snapshots.path(int(i)).name: digest for i, digest in state["snapshots"].items()}
        )
    return fault


def _find_bad_file(folder: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        path = folder / name
        if os.path.basename(name) != name or not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} does not match its checksum"
    return None


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    trainer: DiscriminatorTrainer | None,
    state: dict[str, Any],
) -> Path:
    """Write checkpoint-`step`; the earlier ones stay untouched if that fails. Raises `RunError` when the disk is full."""
    final, temporary = checkpoint_path(run, step), run / f".tmp-checkpoint-{step}"
    remove_tree(temporary)
    try:
        temporary.mkdir()
        save_model(student.model, temporary)
        student.tokenizer.save_pretrained(temporary)
        tensors = optimizer_tensors(student.model, optimizer)
        if trainer is not None:
            save_file({n: t.cpu() for n, t in trainer.tensors().items()}, temporary / DISCRIMINATOR)
            own, state["discriminator_optimizer"] = trainer.optimizer_tensors()
            tensors |= {_OWN + name: tensor for name, tensor in own.items()}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary / OPTIMIZER)
        write_json(temporary / STATE, {"step": step, **state})
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        for path in files:
            _fsync(path)
        write_json(temporary / MANIFEST, {"files": {p.name: sha256(p) for p in files}})
        remove_tree(final)
        os.replace(temporary, final)
        _fsync(run)
    except (OSError, SafetensorError) as error:
        remove_tree(temporary)
        free = shutil.disk_usage(run).free
        raise RunError(f"cannot write {final}: {error} ({free} bytes free); earlier checkpoints are intact") from error
    return final


def load_checkpoint(
    checkpoint: Path, student: Student, optimizer: torch.optim.Optimizer, trainer: DiscriminatorTrainer | None
) -> dict[str, Any]:
    """Put a whole checkpoint's optimizer and discriminator state back; returns its `state.json`.

    The student itself is loaded from the checkpoint folder beforehand.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / OPTIMIZER)
    own = {n.removeprefix(_OWN): t for n, t in tensors.items() if n.startswith(_OWN)}
    load_optimizer(student.model, optimizer, {n: t for n, t in tensors.items() if not n.startswith(_OWN)})
    if trainer is not None:
        trainer.load(load_file(checkpoint / DISCRIMINATOR), own, state["discriminator_optimizer"])
    return state


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as {parameter/moment: tensor}."""
    return {
        f"{name}/{moment}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        device = tensor.device if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = tensor.to(device)


def resumable(run: Path, step: int, limit: int | None) -> list[Path]:
    """The latest `limit` checkpoints up to `step`. One beyond it is a damaged one that this run was resumed without."""
    return [checkpoint for checkpoint in checkpoints(run) if step_of(checkpoint) <= step][:limit]


def rotate(run: Path, step: int, limit: int | None, best: int | None) -> None:
    """Delete the checkpoints before `step` but for the latest `limit` and the best."""
    kept = resumable(run, step, limit)
    for checkpoint in checkpoints(run):
        if checkpoint not in kept and step_of(checkpoint) != best and step_of(checkpoint) <= step:
            remove_tree(checkpoint)


def point_final(run: Path, checkpoint: Path) -> None:
    """`final` -> a checkpoint of the same run."""
    temporary = run / ".final.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, run / "final")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
