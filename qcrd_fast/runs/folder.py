"""The run folder: its lock, its file names, and atomic writes. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from qcrd_fast.config import TrainConfig, completed
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.runs.logs import logging_to, quiet_logs
from qcrd_fast.utils.files import FULL, open_locked, printable, remove_tree, write_text
from qcrd_fast.utils.torchrun import rank

# Every name in a run folder, once.
CONFIG, METRICS, RESULTS, PREDICTIONS = (
    "config.resolved.yaml",
    "metrics.jsonl",
    "eval_results.json",
    "predictions.jsonl",
)
LOCK, LOG, FINAL, SNAPSHOTS, NEGATIVES = ".lock", "run.log", "final", "snapshots", "negatives"
STATE, MANIFEST, OPTIMIZER, DISCRIMINATOR = (
    "state.json",
    "MANIFEST.json",
    "optimizer.safetensors",
    "discriminator.safetensors",
)
TEACHER, REFERENCE, WANDB_ID = "teacher.safetensors", "reference.json", "wandb-id.txt"
OWN = (CONFIG, METRICS, RESULTS, PREDICTIONS, LOG, LOCK, WANDB_ID)
UNFINISHED = (
    ".tmp-checkpoint-*", f".{CONFIG}.tmp", f".{METRICS}.tmp", f".{FINAL}.tmp", f".{PREDICTIONS}.tmp", f".{RESULTS}.tmp",
    f".{REFERENCE}.tmp", f".{WANDB_ID}.tmp",
    f"{SNAPSHOTS}/.iteration-*.tmp", f"{SNAPSHOTS}/.tmp*", f"{NEGATIVES}/.iteration-*.tmp",
)  # fmt: skip
# Options that a resumed run may change: they do not touch what is computed, but for rounding (--impl, the kill-switch).
FREE_OPTIONS = {
    *(
        "impl",
        "deterministic",
        "overlap",
        "output_dir",
        "resume",
        "save_total_limit",
        "report_to",
        "device",
        "eval_batch_size",
    ),
    *("fsdp", "ddp_timeout", "audit_every", "on_audit_failure", "run_name", "zero_shot"),
}
# How a step's questions are dealt out: on a resume their product, with the number of processes, is compared instead.
DEALT = {"per_device_train_batch_size", "gradient_accumulation_steps"}


class RunFolder:
    """Locked output folder, as a context manager.

    The lock ends with the process, so it is never stale. Inside, the package's log also goes to `run.log`.

    Raises `InputError` when the folder cannot be written, belongs to a running process (named by its PID), or already
    holds something and `--resume` was not given. Of several processes that torchrun started the first locks it for all.
    """

    def __init__(self, config: TrainConfig):
        if not config.output_dir:
            raise InputError("--output-dir is needed")
        if "\0" in config.output_dir:
            raise InputError(f"--output-dir: {config.output_dir!r} is no name of a folder")
        self.path = Path(config.output_dir)
        self.config = config
        self._lock: int | None = None
        self._logs = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        if rank() > 0:
            self._logs.enter_context(quiet_logs())
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(self.path / LOCK, os.O_NOFOLLOW)
        except BlockingIOError:
            owner = (self.path / LOCK).read_text(errors="replace").strip() or "unknown"
            raise InputError(f"--output-dir: {self.path} is in use by process {owner}; choose another folder") from None
        except OSError as error:
            kind = RunError if error.errno in FULL else InputError
            raise kind(f"--output-dir: cannot write to {self.path}: {error.strerror}; choose another folder") from error
        try:
            # on a full disk the lock holds without a name; `train` tells what it needs
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self._refuse_links()
            # a start that failed leaves those
            held = [p.name for p in self.path.iterdir() if p.name not in (LOCK, LOG)]
            if held and not self.config.resume:
                raise InputError(
                    f"--output-dir: {self.path} is not empty ({sorted(held)[0]} is there); "
                    "continue with --resume auto or choose another folder"
                )
            self._check_same_config()
            self._clear()
            self._logs.enter_context(logging_to(self.path / LOG))
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _clear(self) -> None:
        """Delete temporary files of a killed run; their names are reserved."""
        for pattern in UNFINISHED:
            for path in self.path.glob(pattern):
                remove_tree(path)

    def _release(self) -> None:
        self._logs.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_links(self) -> None:
        """Reject symlinks in the run folder. `final` is exempt: it is replaced, never followed."""
        folders = [self.path, *(self.path / name for name in (SNAPSHOTS, NEGATIVES)), *self.path.glob("checkpoint-*")]
        for path in (p for folder in folders if folder.is_dir() for p in folder.iterdir()):
            if path.is_symlink() and path not in (self.path / FINAL, self.path / f".{FINAL}.tmp"):
                raise InputError(f"--output-dir: {path} is a link; nothing outside the run folder is read or written")

    def _check_same_config(self) -> None:
        path = self.path / CONFIG
        states = sorted(self.path.glob(f"checkpoint-*/{STATE}"))
        if not path.exists() and not states:
            self.config = self.config.resolved()
            return
        try:
            text = (path if path.exists() else states[0]).read_text(encoding="utf-8")
            before = yaml.safe_load(text) if path.exists() else json.loads(text).get("config")
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise InputError(f"{path}: unreadable, only plain values are read: {error}") from error
        if isinstance(before, dict):
            self.config = self.config.resolved(before)
        check_same_config(self.config, before, path)

    def write_config(self) -> None:
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(self.path / CONFIG, text)


def check_same_config(
    config: TrainConfig, before: Any, where: Path, free: Collection[str] = frozenset(FREE_OPTIONS | DEALT)
) -> None:
    """Raise `InputError` with both values for an option that a resume may not change. `where` names their source."""
    if not isinstance(before, dict):
        return
    config = config.resolved(before)
    if config.method == "qcrd":
        before = completed(before)
    for name, value in config.to_dict().items():
        if name not in free and name in before and before[name] != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{where}: the run began with {flag} {before[name]!r}, now it is {value!r}")


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def snapshot_name(iteration: int) -> str:
    return f"iteration-{iteration:05d}.safetensors"


def snapshot_path(run: Path, iteration: int) -> Path:
    return run / SNAPSHOTS / snapshot_name(iteration)


def negatives_name(iteration: int) -> str:
    return f"iteration-{iteration:05d}.jsonl"


def require_not_of_run(path: Path, option: str) -> None:
    """Raises `InputError` for a file that a run keeps itself, or in one of its checkpoints."""
    if (path.name in OWN and (path.parent / CONFIG).is_file()) or (path.parent / MANIFEST).is_file():
        raise InputError(f"{option}: {printable(path)} belongs to a run; choose another name")
