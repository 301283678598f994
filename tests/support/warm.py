"""Commands as a user runs them, without the seconds that they take to begin.

`Warm` is a process that has imported everything and forks a child for each command. The child arms its faults, then
runs `qcrd-fast ARGS` or a function of a module, and may be killed or signalled like any process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import os
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.faults import QUIET_FILES, Disk, Fault, arm_call
from tests.support.paths import ROOT
from tests.support.students import narrow_discriminators

COMMAND = """#!{python} -IS
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    asked.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    sys.exit(int(asked.recv(9) or 70))
"""
UNTIMED = {"tokens_per_s", "step_ms", "sample_wait_ms", "sampled_tokens_per_s", "sample_hidden_share", "peak_mib"}


@dataclasses.dataclass
class Done:
    """How a command ended: exit code (or minus the signal), what it said, the disk points that it came by."""

    code: int
    out: str
    err: str
    points: list[str]


# ---- the child ----


def child(request: dict[str, Any]) -> int:
    faults = [Fault(**fault) for fault in request["faults"]]
    disk = None
    if request["folder"]:
        at = next((f for f in faults if f.point == "disk"), Fault("none", -1))
        disk = Disk(Path(request["folder"]), at.do, at.at)
    for fault in faults:
        if fault.point != "disk":
            arm_call(fault)
    module, name = request["call"].split(":")
    function = getattr(importlib.import_module(module), name)
    if disk:
        disk.arm()
    try:
        code = function(*request["args"]) or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    if disk:
        Path(request["out"] + ".points").write_text(json.dumps(disk.points))
    return code


def on_terminal(terminal: str, args: list[str]) -> int:
    """`qcrd-fast ARGS`, its stderr on a terminal."""
    from cli.main import entry

    os.dup2(os.open(terminal, os.O_RDWR), 2)
    return entry(args)


def script(code: str, folder: str) -> None:
    """Run Python code in a folder."""
    os.chdir(folder)
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def serve() -> None:
    """Requests on stdin, replies on stdout, one JSON object a line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [str(ROOT)]
    import torch

    for name in (
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
        "qcrd_fast.train.trainer",
        "qcrd_fast.collect.collector",
        "cli.main",
    ):
        importlib.import_module(name)

    torch.set_num_threads(1)
    contextlib.ExitStack().enter_context(narrow_discriminators())
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = {"code": reap(request["wait"], request["timeout"])}
        else:
            importlib.import_module(request["call"].split(":")[0])  # here, so that the next call finds it
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
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
                       "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
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

    def on_terminal(self, terminal: str, args: Sequence[str]) -> Done:
        return self.wait(self._start("tests.support.warm:on_terminal", [terminal, list(args)]))

    def start(self, args: Sequence[str], *faults: Fault, folder: Path | None = None) -> tuple[int, str]:
        """(process id, where its output goes); `folder` is where disk points are counted."""
        return self._start("cli.main:entry", [list(args)], *faults, folder=folder)

    def _start(self, call: str, args: list[Any], *faults: Fault, folder: Path | None = None) -> tuple[int, str]:
        out = f"{self._scratch.name}/{next(self._count)}"
        specs = [dataclasses.asdict(fault) for fault in faults]
        reply = self._ask(call=call, args=args, faults=specs, out=out, folder=str(folder) if folder else None)
        return reply["pid"], out

    def wait(self, started: tuple[int, str], timeout: float = 120.0) -> Done:
        pid, out = started
        code = self._ask(wait=pid, timeout=timeout)["code"]
        texts = [
            Path(out + name).read_text(errors="replace") if Path(out + name).exists() else ""
            for name in (".out", ".err")
        ]
        points = json.loads(Path(out + ".points").read_text()) if Path(out + ".points").exists() else []
        for name in (".out", ".err", ".points"):
            Path(out + name).unlink(missing_ok=True)
        return Done(code, *texts, points)

    def run(self, args: Sequence[str], *faults: Fault, folder: Path | None = None, timeout: float = 120.0) -> Done:
        return self.wait(self.start(args, *faults, folder=folder), timeout)

    def call(self, function: str, *args: Any, timeout: float = 300.0) -> str:
        """What MODULE:FUNCTION prints in a child; `args` as JSON has them."""
        done = self.wait(self._start(function, list(args)), timeout)
        assert done.code == 0, (done.code, done.out[-2000:], done.err[-4000:])
        return done.out

    @contextlib.contextmanager
    def command(self, path: Path) -> Iterator[None]:
        """At `path` an executable `qcrd-fast`, which runs here."""

        class Handler(socketserver.StreamRequestHandler):
            def handle(handler) -> None:
                done = self.run(json.loads(handler.rfile.readline()), timeout=300)
                print(done.out, done.err)
                handler.wfile.write(b"%d" % done.code)

        with socketserver.UnixStreamServer(f"{self._scratch.name}/{next(self._count)}", Handler) as server:
            path.write_text(COMMAND.format(python=sys.executable, address=server.server_address))
            path.chmod(0o755)
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()
            try:
                yield
            finally:
                server.shutdown()


def short_run(rows: Path, student: Path, judge: Path, out: Path, **options: Any) -> list[str]:
    """`qcrd-fast train` with everything in it within a second: micro-batches, three iterations, a lag, a validation,
    three saves of which one is deleted again. `judge`: the discriminator's encoder."""
    values = {
        "data": rows, "student": student, "output_dir": out, "discriminator": judge, "max_steps": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "iteration_steps": 2, "negative_lag": 1,
        "max_new_tokens": 6, "learning_rate": 1e-3, "discriminator_pretrain_steps": 2,
        "discriminator_update_batches": 1,
        "discriminator_folds": 2, "discriminator_min_auc": 0, "scheme": "minmax", "negative_source": "lagged",
        "save_steps": 2, "eval_steps": 4, "save_total_limit": 1, "sample_batch_size": 4, "max_answer_tokens": 4,
        "max_target_length": 24, "delta": 8.0,
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
    return found + [
        name for name in sorted(names[0] & names[1]) if (run / name).read_bytes() != (whole / name).read_bytes()
    ]


def files(folder: Path) -> list[Path]:
    """A run's files whose bytes are the run's own, not a clock's, a process's or a folder's."""
    left_out = {*QUIET_FILES, "metrics.jsonl", "config.resolved.yaml"}
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.name not in left_out
            and not str(p.relative_to(folder)).startswith("final")]  # fmt: skip


if __name__ == "__main__":
    serve()
    os._exit(0)
