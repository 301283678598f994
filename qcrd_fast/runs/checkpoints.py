"""Read the checkpoints of a run: list, verify, choose, rotate. `train.checkpointer` writes them.

A checkpoint is a Hugging Face model folder with what a resume needs, whole or not there at all. No pickle.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.runs.folder import FINAL, MANIFEST, OPTIMIZER, SNAPSHOTS, STATE, checkpoint_path, snapshot_path
from qcrd_fast.utils.files import remove_tree, sha256

log = logging.getLogger(__name__)


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
    """Return the latest intact checkpoint; warn about each later one, naming the fault.

    With `resume`, the snapshots that it needs must be whole too.
    """
    for checkpoint in checkpoints(run):
        fault = find_corruption(checkpoint, run if resume else None)
        if fault is None:
            return checkpoint
        log.warning("%s is damaged (%s); trying an earlier one", checkpoint, fault)
    return None


def find_corruption(checkpoint: Path, run: Path | None = None) -> str | None:
    """Return what is wrong with a checkpoint, or with the snapshots in `run` that it needs; None if intact."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        # to its last byte
        files = dict(json.loads(text, object_pairs_hook=_unique)["files"]) if text.endswith("}\n") else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    needed = {"config.json", STATE} if any(map(is_optimizer, files)) else {"config.json", STATE, OPTIMIZER}
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


def verify_checkpoint(folder: Path) -> None:
    """Raise `InputError` if a checkpoint differs from its manifest. A folder without a manifest and a hub id pass."""
    if os.path.isfile(folder / MANIFEST) and (fault := find_corruption(folder)):
        raise InputError(f"{folder}: the checkpoint is damaged: {fault}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject JSON objects with duplicate keys: a flipped bit can turn one file's name into another's."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


_KINDS = {"step": int, "config": dict, "prompt": dict, "snapshots": dict, "data_sha256": str}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's `state.json`. Raises `InputError` if `save_checkpoint` did not write it."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        wrong = [name for name, kind in _KINDS.items() if type(state[name]) is not kind]
        wrong += [
            f"snapshots of {i!r}" for i, d in state["snapshots"].items() if not i.isdecimal() or type(d) is not str
        ]
        PromptSettings.of_state(state["prompt"])
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


def is_optimizer(name: str) -> bool:
    return name.startswith("optimizer") and name.endswith(".safetensors")


def resumable(run: Path, step: int, limit: int | None, passed_over: Collection[int] = ()) -> list[Path]:
    """Return the latest `limit` checkpoints up to `step`, without those that this run skipped as possibly damaged."""
    return [p for p in checkpoints(run) if step_of(p) <= step and step_of(p) not in passed_over][:limit]


def rotate(run: Path, step: int, limit: int | None, best: int | None, passed_over: Collection[int] = ()) -> None:
    """Delete the checkpoints before `step` but for the latest `limit` and the best."""
    kept = resumable(run, step, limit, passed_over)
    for checkpoint in checkpoints(run):
        if checkpoint not in kept and step_of(checkpoint) != best and step_of(checkpoint) <= step:
            remove_tree(checkpoint)


def best_checkpoint(run: Path, step: int, rated: dict[int, float]) -> tuple[Path, dict[str, Any] | None]:
    """Return the intact checkpoint with the best validation accuracy in `rated` (by step), and {step, accuracy}.

    Of equal ones, the earlier. If none is rated: the checkpoint of `step`, and None.
    """
    kept = {step_of(path) for path in checkpoints(run)}
    best = max(rated, key=lambda at: (rated[at], -at), default=None)
    for at in sorted(rated, key=lambda at: (-rated[at], at)):
        if at in kept or at == best:
            path = checkpoint_path(run, at)
            if (fault := find_corruption(path)) is None:
                return path, {"step": at, "accuracy": rated[at]}
            log.warning("%s is damaged (%s); taking the next best", path, fault)
    return checkpoint_path(run, step), None


def point_final(run: Path, checkpoint: Path) -> None:
    """`final` -> a checkpoint of the same run."""
    temporary = run / f".{FINAL}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, run / FINAL)
