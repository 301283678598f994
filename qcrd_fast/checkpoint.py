"""Checkpoints: a Hugging Face model folder with what a resume needs, whole or not there at all. No pickle.

A checkpoint is written under a temporary name, its manifest (sha256 of every file) last, then renamed. Random states are
not stored because there are none: every random number is a function of (seed, step) or (seed, question, iteration).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcrd_fast.discriminator.trainer import DiscriminatorTrainer
from qcrd_fast.distributed.parallel import Engine, like
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.loading import save_tokenizer
from qcrd_fast.models.lora import save_model
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runfolder import (
    DISCRIMINATOR,
    FINAL,
    MANIFEST,
    OPTIMIZER,
    SNAPSHOTS,
    STATE,
    checkpoint_path,
    snapshot_path,
)
from qcrd_fast.utils.files import remove_tree, sha256, sync, told_room, write_json

log = logging.getLogger(__name__)

TOKENIZER_BYTES = 150  # of each token, at most, in the files of common tokenizers
_OWN = "discriminator:"  # prefix of the discriminator's entries in optimizer.safetensors


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, latest first."""
    found = [
        p
        for p in run.glob("checkpoint-*")
        if p.is_dir() and not p.is_symlink() and p.name.removeprefix("checkpoint-").isdecimal() and p.name.isascii()
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
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        files = dict(json.loads(text, object_pairs_hook=_unique)["files"]) if text.endswith("}\n") else {}  # to its last byte
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    needed = {"config.json", STATE} if any(map(_is_optimizer, files)) else {"config.json", STATE, OPTIMIZER}
    if missing := needed - files.keys():
        return f"{MANIFEST} does not list {sorted(missing)[0]}"
    fault = _find_bad_file(checkpoint, files, MANIFEST)
    if fault or run is None:
        return fault
    try:
        wanted = read_state(checkpoint)["snapshots"]
    except InputError as error:
        return str(error)
    return _find_bad_file(run / SNAPSHOTS, {snapshot_path(run, int(i)).name: d for i, d in wanted.items()}, STATE)


def require_whole(folder: Path) -> None:
    """Raises `InputError` for a checkpoint that is not as its manifest says; nothing for a folder that has none, or
    a hub id."""
    if os.path.isfile(folder / MANIFEST) and (fault := find_fault(folder)):
        raise InputError(f"{folder}: the checkpoint is damaged: {fault}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a name twice: a bit may turn a file's name into another's, of which the last would count."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


_KINDS = {"step": int, "config": dict, "prompt": dict, "snapshots": dict, "data_sha256": str}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises `InputError` where it is not what `save_checkpoint` wrote."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        wrong = [name for name, kind in _KINDS.items() if type(state[name]) is not kind]
        wrong += [f"snapshots of {i!r}" for i, d in state["snapshots"].items() if not i.isdecimal() or type(d) is not str]
        PromptSettings(**state["prompt"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{checkpoint / STATE} is unreadable: {type(error).__name__} {error}") from error
    if wrong:
        raise InputError(f"{checkpoint / STATE} is unreadable: {wrong[0]} is of another kind")
    return state


def _find_bad_file(folder: Path, digests: dict[str, str], listed: str) -> str | None:
    for name, digest in digests.items():
        path = folder / name
        if os.path.basename(name) != name or not os.path.isfile(path):  # also of a name that is too long for one
            return f"{name}, listed in {listed}, is missing"
        if path.is_symlink():
            return f"{name} is a link"
        if sha256(path) != digest:
            return f"{name} does not match its checksum in {listed}"
    return None


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    trainer: DiscriminatorTrainer | None,
    state: dict[str, Any],
    engine: Engine | None = None,
) -> Path:
    """Write checkpoint-`step`; the earlier ones stay untouched if that fails. Raises `RunError` when the disk is full.

    Of several ranks all must call it: rank 0 writes, and of a sharded model each its own share of the optimizer's state.
    """
    engine = engine or Engine(student.model)
    ranks = engine.ranks
    final, temporary = checkpoint_path(run, step), run / f".tmp-checkpoint-{step}"
    moments = {n: t.detach() for n, t in optimizer_tensors(student.model, optimizer).items()}

    def write_model() -> None:
        remove_tree(temporary)
        temporary.mkdir()
        save_model(student.model, temporary, engine.weights())
        save_tokenizer(student.tokenizer, temporary)
        if trainer is not None:
            save_file({n: t.cpu() for n, t in trainer.tensors().items()}, temporary / DISCRIMINATOR)

    def write_optimizer() -> str | None:
        if not (engine.sharded or ranks.first):
            return None
        tensors = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in moments.items()}
        if trainer is not None and ranks.first:
            own, state["discriminator_optimizer"] = trainer.optimizer_tensors()
            tensors |= {_OWN + name: tensor for name, tensor in own.items()}
        name = f"optimizer-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors" if engine.sharded else OPTIMIZER
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
        with engine.whole():
            ranks.on_first(write_model)
        shares = {name for name in ranks.together(write_optimizer) if name}
        ranks.on_first(lambda: finish(shares))
    except BaseException as error:
        if ranks.first:
            remove_tree(temporary)
        if not isinstance(error, OSError | SafetensorError | RunError):  # such as a second signal
            raise
        room = told_room(run, checkpoint_bytes(student, trainer))
        raise RunError(f"cannot write {final}: {error} ({room}); earlier checkpoints are intact") from error
    return final


def load_checkpoint(
    checkpoint: Path, student: Student, optimizer: torch.optim.Optimizer, trainer: DiscriminatorTrainer | None
) -> dict[str, Any]:
    """Put a whole checkpoint's optimizer and discriminator state back; returns its `state.json`.

    The student itself is loaded from the checkpoint folder beforehand. Each rank reads all of it and keeps its own share.
    Raises `InputError` for files that are not of this student.
    """
    state = read_state(checkpoint)
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
        if trainer is not None:
            trainer.load(load_file(checkpoint / DISCRIMINATOR), own, state["discriminator_optimizer"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise InputError(f"{checkpoint}: optimizer or discriminator are not this student's safetensors: {reason}") from error
    return state


def _read_optimizer(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the optimizer's state, one at a time; what ranks saved in shares is joined, whatever their number."""
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    with contextlib.ExitStack() as stack:
        names = sorted(name for name in files if _is_optimizer(name))
        shares = [stack.enter_context(safe_open(checkpoint / name, "pt")) for name in names]
        held = [set(share.keys()) for share in shares]
        for key in dict.fromkeys(key for share in shares for key in share.keys()):  # noqa: SIM118 (no mapping)
            parts = [share.get_tensor(key) for share, keys in zip(shares, held, strict=True) if key in keys]
            yield key, parts[0] if len(parts) == 1 or parts[0].dim() == 0 else torch.cat(parts)


def _is_optimizer(name: str) -> bool:
    return name.startswith("optimizer") and name.endswith(".safetensors")


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as {parameter/moment: tensor}."""
    return {
        f"{name}/{moment}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def resumable(run: Path, step: int, limit: int | None, passed_over: Collection[int] = ()) -> list[Path]:
    """The latest `limit` checkpoints up to `step`, without those that this run was resumed without: they may be damaged."""
    return [p for p in checkpoints(run) if step_of(p) <= step and step_of(p) not in passed_over][:limit]


def rotate(run: Path, step: int, limit: int | None, best: int | None, passed_over: Collection[int] = ()) -> None:
    """Delete the checkpoints before `step` but for the latest `limit` and the best."""
    kept = resumable(run, step, limit, passed_over)
    for checkpoint in checkpoints(run):
        if checkpoint not in kept and step_of(checkpoint) != best and step_of(checkpoint) <= step:
            remove_tree(checkpoint)


def best_checkpoint(run: Path, step: int, rated: dict[int, float]) -> tuple[Path, dict[str, Any] | None]:
    """The whole checkpoint with the best of the validation accuracies `rated` (by step), and {step, accuracy}; the earlier one
    of equals. Without any, that of `step` and None."""
    kept = {step_of(path) for path in checkpoints(run)}
    best = max(rated, key=lambda at: (rated[at], -at), default=None)
    for at in sorted(rated, key=lambda at: (-rated[at], at)):
        if at in kept or at == best:
            path = checkpoint_path(run, at)
            if (fault := find_fault(path)) is None:
                return path, {"step": at, "accuracy": rated[at]}
            log.warning("%s is damaged (%s); taking the next best", path, fault)
    return checkpoint_path(run, step), None


def point_final(run: Path, checkpoint: Path) -> None:
    """`final` -> a checkpoint of the same run."""
    temporary = run / f".{FINAL}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, run / FINAL)


def checkpoint_bytes(student: Student, trainer: DiscriminatorTrainer | None) -> int:
    """About what a checkpoint takes on disk: weights, AdamW's two moments of those that are trained, tokenizer."""
    parameters = list(student.model.parameters())
    needed = _bytes(parameters) + 2 * _bytes(p for p in parameters if p.requires_grad)
    if trainer is not None:
        needed += 3 * _bytes(trainer.discriminator.parameters())
    return needed + TOKENIZER_BYTES * len(student.tokenizer) + 2**16


def require_room(run: Path, student: Student, trainer: DiscriminatorTrainer | None, snapshots: int, kept: int) -> None:
    """Raises `RunError` where the disk has no room for a checkpoint and, unless `snapshots` is 0, a snapshot; warns where it
    has none for `kept` checkpoints, the one being written and that many snapshots."""
    one, weights = checkpoint_bytes(student, trainer), 2 * sum(p.numel() for p in student.model.parameters())
    needed, free = one + weights * bool(snapshots), shutil.disk_usage(run).free
    if free < needed:
        raise RunError(f"--output-dir: {run}: no room for a checkpoint ({told_room(run, needed)})")
    held = sum(p.stat().st_size for folder in (*checkpoints(run), run / SNAPSHOTS) for p in folder.glob("*"))
    most = (kept + 1) * one + snapshots * weights
    if free + held < most:
        log.warning("%s may fill its disk: %d bytes at most, %d free; see --save-total-limit", run, most, free + held)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
