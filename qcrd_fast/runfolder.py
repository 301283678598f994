"""The run folder: who may write to it, what is in it, and files that are whole or absent. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.redact import RedactingFormatter
from qcrd_fast.rows import shown
from qcrd_fast.world import rank

LOCK, LOG = ".lock", "run.log"
FULL = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = (
    ".tmp-checkpoint-*", ".config.resolved.yaml.tmp", ".metrics.jsonl.tmp", ".final.tmp", ".predictions.jsonl.tmp",
    ".eval_results.json.tmp", "snapshots/.iteration-*.tmp", "snapshots/.tmp*", "negatives/.iteration-*.tmp",
)  # fmt: skip
# Options that a resumed run may change: they do not touch what is computed, but for rounding (--impl, the kill-switch).
FREE_OPTIONS = {
    *("impl", "deterministic", "overlap", "output_dir", "resume", "save_total_limit", "report_to", "device", "eval_batch_size"),
    *("fsdp", "ddp_timeout", "audit_every", "on_audit_failure"),
}
# How a step's questions are dealt out: on a resume their product, with the number of processes, is compared instead.
DEALT = {"per_device_train_batch_size", "gradient_accumulation_steps"}


class RunFolder:
    """A locked output folder; use as a context manager. The lock dies with the process, so none is ever stale.

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

    def __enter__(self) -> RunFolder:
        if rank() > 0:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            kind = RunError if error.errno in FULL else InputError
            raise kind(f"--output-dir: cannot write to {self.path}: {error.strerror}; choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            self._release()
            raise InputError(f"--output-dir: {self.path} is in use by process {owner}; choose another folder") from None
        try:
            with contextlib.suppress(OSError):  # on a full disk the lock holds without a name; `train` tells what it needs
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self._refuse_links()
            held = [p.name for p in self.path.iterdir() if p.name not in (LOCK, LOG)]  # a start that failed leaves those
            if held and not self.config.resume:
                raise InputError(
                    f"--output-dir: {self.path} is not empty ({sorted(held)[0]} is there); "
                    "continue with --resume auto or choose another folder"
                )
            self._check_same_config()
            self._clear()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def _clear(self) -> None:
        """Delete what a killed run was writing; the names are our own."""
        for pattern in UNFINISHED:
            for path in self.path.glob(pattern):
                remove_tree(path)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_links(self) -> None:
        """Nothing that the run writes, reads or deletes may be elsewhere; `final` is replaced and not followed, nor is what a
        killed run was about to call so."""
        folders = [self.path, *(self.path / name for name in ("snapshots", "negatives")), *self.path.glob("checkpoint-*")]
        for path in (p for folder in folders if folder.is_dir() for p in folder.iterdir()):
            if path.is_symlink() and path not in (self.path / "final", self.path / ".final.tmp"):
                raise InputError(f"--output-dir: {path} is a link; nothing outside the run folder is read or written")

    def _check_same_config(self) -> None:
        path = self.path / "config.resolved.yaml"
        states = sorted(self.path.glob("checkpoint-*/state.json"))
        if not path.exists() and not states:
            return
        try:
            text = (path if path.exists() else states[0]).read_text(encoding="utf-8")
            before = yaml.safe_load(text) if path.exists() else json.loads(text).get("config")
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise InputError(f"{path}: unreadable, only plain values are read: {error}") from error
        check_same_config(self.config, before, path)

    def write_config(self) -> None:
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.resolved.yaml", text)


def check_same_config(config: TrainConfig, before: Any, where: Path) -> None:
    """Raises `InputError` with both values for an option that a resumed run may not change; `where` says what it was."""
    for name, value in config.to_dict().items():
        if name not in FREE_OPTIONS | DEALT and isinstance(before, dict) and name in before and before[name] != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{where}: the run began with {flag} {before[name]!r}, now it is {value!r}")


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Only errors are logged: for the processes beside the one that keeps the log."""
    logger = logging.getLogger("qcrd_fast")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Log(logging.FileHandler):
    """A log that a full disk does not end; where anything is lost by it, the run ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """The package's log lines go to a file too, without secrets."""
    logger = logging.getLogger("qcrd_fast")
    handler = _Log(path, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def require_file(path: Path) -> None:
    """Raises `InputError` for a device or pipe, such as /dev/null: a file that is renamed to its name would replace it."""
    if (path.exists() and not path.is_file()) or path.parent.resolve() == Path("/dev"):
        raise InputError(f"{path} is a device or pipe; name a file")


OWN = ("config.resolved.yaml", "metrics.jsonl", "eval_results.json", "predictions.jsonl", LOG, LOCK)


def require_not_of_run(path: Path, option: str) -> None:
    """Raises `InputError` for a file that a run keeps itself, or in one of its checkpoints."""
    if (path.name in OWN and (path.parent / "config.resolved.yaml").is_file()) or (path.parent / "MANIFEST.json").is_file():
        raise InputError(f"{option}: {shown(path)} belongs to a run; choose another name")


def require_writable(folder: Path, option: str) -> None:
    """Raises `InputError` naming `option` unless files can be made in `folder`, or where it is yet to be made; none is left."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{option}: cannot write to {shown(folder)}: {error.strerror}; choose another folder") from error


def require_place(path: Path, option: str) -> None:
    """Raises `InputError` naming `option` unless `path` can be a file in a folder that exists."""
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{option}: {shown(path)} is not a file in a folder that exists")
    require_file(path)
    require_writable(path.parent, option)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all (temporary name, fsync, rename)."""
    require_file(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", errors="surrogatepass") as file:  # a link is not written through
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file whole or not at all."""
    write_text(path, _lines(records))


def append_lines(path: Path, records: Iterable[dict[str, Any]], *, durable: bool = False) -> None:
    """Append records to a JSONL file in one write; `durable`: they are on the disk when this returns."""
    with open(path, "ab") as file:
        file.write(_lines(records).encode("utf-8", "surrogatepass"))
        if durable:
            file.flush()
            os.fsync(file.fileno())


def append_whole(descriptor: int, data: bytes) -> None:
    """Append `data` in one write, on the disk when this returns; where that fails (`OSError`) the file is as it was."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a JSONL file; a cut or garbled line and all behind it are left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not line.endswith(b"\n") or not isinstance(record, dict):
                return
            yield record


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def told_room(folder: Path, needed: int) -> str:
    """ "N bytes needed, M bytes free" of a folder's disk, for a message."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return f"{needed} bytes needed, {free} bytes free"


def remove_tree(path: Path) -> None:
    """Delete a folder of ours; a link is unlinked, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
