"""Faults on purpose, in commands that run as a user runs them: kills, signals, full disks, poisoned numbers, damaged files.

`Warm` is a process that has imported everything and forks a child for each command, so that a trial takes no seconds to begin.
The child arms its faults, each at the n-th of some points, then runs `qcrd-fast ARGS`. Points are every operation on a file of
one folder (`disk`), or the calls of a function (`module:Class.function`). Whatever is random comes from a seed that a failure
prints.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import functools
import gc
import importlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNTIMED = {"tokens_per_s", "step_ms", "sample_wait_ms", "sampled_tokens_per_s", "sample_hidden_share", "peak_mib"}
BYTES = ("open", "write", "sync", "mkdir", "link")  # operations that need room on a disk
QUIET_FILES = ("run.log", ".lock")  # what is written there decides nothing


@dataclasses.dataclass(frozen=True)
class Fault:
    """`do` at the `at`-th point (from 0).

    kill: SIGKILL, in the middle of a write if the point is one; power: the same, and of the bytes that were not synced the
    latter half is lost; int, term, or several joined by a comma: these signals; full: no byte fits on the disk from there on;
    nan, inf, dead: what the function returns, or `gradient` after it.
    """

    do: str
    at: int = 0
    point: str = "disk"
    after: bool = False  # the call, rather than before it


@dataclasses.dataclass
class Done:
    """How a command ended: exit code (or minus the signal), what it said, the disk points that it came by."""

    code: int
    out: str
    err: str
    points: list[str]


# ---- the child ----


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
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path) if not isinstance(path, int) else None)
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
        elif event in ("os.remove", "os.rmdir") and isinstance(args[1], int) and args[1] >= 0:  # rmtree's, within a folder
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
        half = (lambda: real(descriptor, args[0][: len(args[0]) // 2], *args[1:])) if kind == "write" else (lambda: None)
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

            raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})") from None
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
    """nan, inf: of tensors, the first one alone; dead: quality scores that weigh all with 0; gradient: NaN in the student's."""
    if do == "gradient":
        parameters = [p for p in args[0].student.model.parameters() if p.grad is not None]
        parameters[-1].grad.view(-1)[0] = float("nan")
        return result
    if do == "dead":  # of Objective._quality(batch, candidates, question)
        return result.new_tensor([0.0 if candidate.positive else 1.0 for candidate in args[2]])
    value = float(do)
    if isinstance(result, tuple):
        return (result[0] * value, *result[1:])
    spoilt = result.clone()
    spoilt.view(-1)[-1] = value
    return spoilt


def child(request: dict[str, Any]) -> int:
    faults = [Fault(**fault) for fault in request["faults"]]
    disk = None
    if request["folder"]:
        at = next((f for f in faults if f.point == "disk"), Fault("none", -1))
        disk = Disk(Path(request["folder"]), at.do, at.at)
    for fault in faults:
        if fault.point != "disk":
            arm_call(fault)
    from cli.main import entry

    if disk:
        disk.arm()
    try:
        code = entry(request["args"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    if disk:
        with _open(request["out"] + ".points", "w") as file:
            json.dump(disk.points, file)
    return code


def serve() -> None:
    """Requests on stdin, replies on stdout, one JSON object a line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [str(ROOT)]
    import torch

    for name in (
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
        "qcrd_fast.train",
        "cli.main",
    ):
        importlib.import_module(name)

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = {"code": reap(request["wait"], request["timeout"])}
        else:
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    replies.close()
                    for number, name in ((1, ".out"), (2, ".err")):
                        os.dup2(os.open(request["out"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
                    code = child(request)
                    sys.stdout.flush()
                    sys.stderr.flush()
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            reply = {"pid": pid}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def reap(pid: int, timeout: float) -> int:
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 98
        time.sleep(0.002)


# ---- the tests' side ----


class Warm:
    """The process that forks commands; use as a context manager."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="qcrd-fast-faults-")
        self._count = itertools.count()

    def __enter__(self) -> Warm:
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                       "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()
        self._scratch.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        reply: dict[str, Any] = json.loads(self._server.stdout.readline())
        return reply

    def start(self, args: Sequence[str], *faults: Fault, folder: Path | None = None) -> tuple[int, str]:
        """(process id, where its output goes); `folder` is where disk points are counted."""
        out = f"{self._scratch.name}/{next(self._count)}"
        specs = [dataclasses.asdict(fault) for fault in faults]
        reply = self._ask(args=list(args), faults=specs, out=out, folder=str(folder) if folder else None)
        return reply["pid"], out

    def wait(self, started: tuple[int, str], timeout: float = 120.0) -> Done:
        pid, out = started
        code = self._ask(wait=pid, timeout=timeout)["code"]
        texts = [Path(out + name).read_text(errors="replace") if Path(out + name).exists() else "" for name in (".out", ".err")]
        points = json.loads(Path(out + ".points").read_text()) if Path(out + ".points").exists() else []
        for name in (".out", ".err", ".points"):
            Path(out + name).unlink(missing_ok=True)
        return Done(code, *texts, points)

    def run(self, args: Sequence[str], *faults: Fault, folder: Path | None = None, timeout: float = 120.0) -> Done:
        return self.wait(self.start(args, *faults, folder=folder), timeout)


def short_run(rows: Path, student: Path, judge: Path, out: Path, **options: Any) -> list[str]:
    """`qcrd-fast train` with everything in it within a second: micro-batches, three iterations, a lag, a validation, three
    saves of which one is deleted again. `judge`: the discriminator's encoder."""
    values = {
        "data": rows, "student": student, "output_dir": out, "discriminator": judge, "max_steps": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "iteration_steps": 2, "negative_lag": 1,
        "max_new_tokens": 6, "learning_rate": 1e-3, "discriminator_pretrain_steps": 2, "discriminator_update_batches": 1,
        "save_steps": 2, "eval_steps": 4, "save_total_limit": 1, "sample_batch_size": 4, "max_answer_tokens": 4, "delta": 8.0,
    }  # fmt: skip
    args = ["train"]
    for name, value in (values | options).items():
        flag = name.replace("_", "-")
        args += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return args


def differences(run: Path, whole: Path) -> list[str]:
    """What a run folder holds otherwise than that of the unbroken run: every byte but for time and the log."""

    def metrics(folder: Path) -> list[dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in UNTIMED} for line in lines]

    if not (run / "eval_results.json").is_file():
        return ["eval_results.json is missing"]
    found = [] if metrics(run) == metrics(whole) else ["metrics.jsonl"]
    if os.readlink(run / "final") != os.readlink(whole / "final"):
        found.append("final")
    names = [{str(p.relative_to(folder)) for p in files(folder)} for folder in (run, whole)]
    found += sorted(names[0] ^ names[1])
    return found + [name for name in sorted(names[0] & names[1]) if (run / name).read_bytes() != (whole / name).read_bytes()]


def files(folder: Path) -> list[Path]:
    """A run's files whose bytes are the run's own, not a clock's, a process's or a folder's."""
    left_out = {*QUIET_FILES, "metrics.jsonl", "config.resolved.yaml"}
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.name not in left_out
            and not str(p.relative_to(folder)).startswith("final")]  # fmt: skip


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


if __name__ == "__main__":
    serve()
    os._exit(0)
