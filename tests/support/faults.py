"""Faults on purpose: kills, power cuts, signals, full disks, poisoned numbers, damaged files.

`Disk` and `arm_call` arm a process (see `warm.py`) to suffer a fault at the n-th of some points: every operation on a
file of one folder (`disk`), or the calls of a function (`module:Class.function`). Whatever is random comes from a seed
that a failure prints.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BYTES = ("open", "write", "sync", "mkdir", "link")  # operations that need room on a disk
QUIET_FILES = ("run.log", ".lock")  # what is written there decides nothing


@dataclasses.dataclass(frozen=True)
class Fault:
    """`do` at the `at`-th point (from 0).

    kill: SIGKILL, in the middle of a write if the point is one; power: the same, and of the bytes that were not synced
    the latter half is lost; int, term, or several joined by a comma: these signals; full: no byte fits on the disk from
    there on;
    nan, inf, dead: what the function returns, or `gradient` after it.
    """

    do: str
    at: int = 0
    point: str = "disk"
    after: bool = False  # the call, rather than before it


class Disk:
    """Counts operations that change files below `folder` and does what is asked at one of them."""

    def __init__(self, folder: Path, do: str, at: int):
        self.folder, self.do, self.at = str(folder), do, at
        self.points: list[str] = []
        self.synced: dict[str, int] = {}  # bytes of each file written to that a power cut cannot take
        self._next = itertools.count()

    def inside(self, path: Any) -> str | None:
        """The path below the folder, if it is."""
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        below = name.removeprefix(self.folder + os.sep)
        return below if below != name and below not in QUIET_FILES else None

    def point(self, kind: str, path: Any, half: Callable[[], Any] = lambda: None) -> None:
        """`half` does what the operation would have done if it were cut in the middle."""
        if (below := self.inside(path)) is None:
            return
        index = next(self._next)
        self.points.append(f"{kind} {below}")
        if self.do == "full" and index >= self.at and kind in BYTES:
            half()
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path) if not isinstance(path, int) else None
            )
        if self.do != "full" and index == self.at:
            half()
            if self.do == "power":
                self._cut_power()
            strike(self.do)
        if kind == "sync":
            self.synced[below] = os.path.getsize(os.path.join(self.folder, below))
        elif kind in ("open", "write"):
            self.synced.setdefault(below, 0)

    def _cut_power(self) -> None:
        for below, kept in self.synced.items():
            path = os.path.join(self.folder, below)
            if os.path.isfile(path):
                os.truncate(path, kept + (os.path.getsize(path) - kept) // 2)

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        builtins.open = io.open = self._open  # type: ignore[assignment]
        for name, kind in (("fsync", "sync"), ("write", "write"), ("pwrite", "write")):
            real = getattr(os, name)
            setattr(os, name, functools.partial(self._descriptor, real, kind))
        import safetensors.torch
        from transformers import PreTrainedTokenizerBase

        safetensors.torch.serialize_file = functools.partial(self._tensors, safetensors.torch.serialize_file)
        saved, disk = PreTrainedTokenizerBase.save_pretrained, self

        def save_pretrained(self: Any, folder: Any, *args: Any, **options: Any) -> Any:  # its file is written by Rust
            done = saved(self, folder, *args, **options)
            path = Path(folder) / "tokenizer.json"
            try:
                disk.point("write", path, lambda: os.truncate(path, path.stat().st_size // 2))
            except OSError as error:
                raise Exception(f"{error.strerror} (os error {error.errno})") from None  # as tokenizers says it
            return done

        PreTrainedTokenizerBase.save_pretrained = save_pretrained  # type: ignore[method-assign]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.point("open", path)
        elif (
            event in ("os.remove", "os.rmdir") and isinstance(args[1], int) and args[1] >= 0
        ):  # rmtree's, within a folder
            self.point(event.removeprefix("os."), f"{os.readlink(f'/proc/self/fd/{args[1]}')}/{os.fsdecode(args[0])}")
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            self.point(event.removeprefix("os."), args[0])
            if event == "os.rename" and (source := self.inside(args[0])) and (target := self.inside(args[1])):
                for below in [b for b in self.synced if b == source or b.startswith(source + os.sep)]:
                    self.synced[target + below.removeprefix(source)] = self.synced.pop(below)
        elif event == "os.symlink":
            self.point("link", args[1])

    def _open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = _open(path, mode, *args, **options)
        return _Torn(file, path, self) if set(mode) & set("wax+") and self.inside(path) else file

    def _descriptor(self, real: Callable[..., Any], kind: str, descriptor: int, *args: Any) -> Any:
        half = (
            (lambda: real(descriptor, args[0][: len(args[0]) // 2], *args[1:])) if kind == "write" else (lambda: None)
        )
        self.point(kind, descriptor, half)
        return real(descriptor, *args)

    def _tensors(self, real: Callable[..., Any], tensors: Any, path: Any, *args: Any, **options: Any) -> Any:
        def half() -> None:
            real(tensors, path, *args, **options)
            os.truncate(path, os.stat(path).st_size // 2)

        try:
            self.point("write", path, half)
        except OSError as error:
            from safetensors import SafetensorError

            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            ) from None
        return real(tensors, path, *args, **options)


_open = io.open


class _Torn:
    """A file whose writes are points."""

    def __init__(self, file: Any, path: Any, disk: Disk):
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> Any:
        self._disk.point("write", self._path, lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def strike(do: str) -> None:
    for name in do.replace("power", "kill").split(","):
        os.kill(os.getpid(), signal.Signals[f"SIG{name.upper()}"])


def arm_call(fault: Fault) -> None:
    """Wrap the function of a fault's point."""
    module, _, path = fault.point.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, calls = getattr(owner, name), itertools.count()

    def wrapped(*args: Any, **options: Any) -> Any:
        struck = next(calls) == fault.at
        poison = fault.do in ("nan", "inf", "gradient", "dead")
        if struck and not fault.after and not poison:
            strike(fault.do)
        result = real(*args, **options)
        if struck and poison:
            return poisoned(fault.do, result, args)
        if struck and fault.after:
            strike(fault.do)
        return result

    setattr(owner, name, wrapped)


def poisoned(do: str, result: Any, args: tuple[Any, ...]) -> Any:
    """nan, inf: of tensors, the first one alone; dead: quality scores that weigh all with 0; gradient: NaN in the
    student's."""
    if do == "gradient":
        parameters = [p for p in args[0].student.model.parameters() if p.grad is not None]
        parameters[-1].grad.view(-1)[0] = float("nan")
        return result
    if do == "dead":  # of Objective.quality(batch, candidates, question)
        return result.new_tensor([0.0 if candidate.positive else 1.0 for candidate in args[2]])
    value = float(do)
    if isinstance(result, tuple):
        return (result[0] * value, *result[1:])
    spoilt = result.clone()
    spoilt.view(-1)[-1] = value
    return spoilt


def damage(path: Path, how: str, rng: random.Random) -> None:
    """missing; 0, 8, half, last: cut to 0 bytes, 8, half, all but one; flip: one bit."""
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "flip":
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * size)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
    else:
        os.truncate(path, {"0": 0, "8": min(8, size - 1), "half": size // 2, "last": size - 1}[how])


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A tmpfs of that size on `folder`. Raises `PermissionError` where mounting is refused."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
