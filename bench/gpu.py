"""Run everything that needs a GPU in one command with a time limit.

Kernels against float64, tests, counters, benchmarks, training.

    python -m qcrd_fast.bench.gpu --minutes 8 --output-dir DIR [--data DIR --student DIR] [--resume] [--append]
    python -m qcrd_fast.bench.gpu --minutes 3 --output-dir DIR --rehearse      # tiny shapes on a CPU, in Triton's
    interpreter

Each part is a process of its own with a limit of its own; what it found is in DIR/PART.json, what it said in
DIR/PART.log. DIR/summary.json has a line for each, and DIR/results.md the same for reading, with what the cost model
predicts beside what was measured. With `--resume` finished parts are not run again. Exit codes: 1 if a kernel is wrong
or a part failed; 75 if the time ran out with parts left (`--resume` goes on); 130 or 143 after a signal; else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qcrd_fast.utils.files import write_json, write_text

from .gpu_parts import SKIPPED, Part, Setting, find_parts
from .gpu_predictions import compare, page
from .record import describe_machine

DONE = ("ok", "wrong", "failed", SKIPPED)  # --resume tries all but the first again
GRACE_S = 20.0  # from the signal that asks a part to stop until it is killed; training saves in it
REHEARSAL = "a rehearsal on a CPU with tiny shapes: nothing here is a measurement"


class Halt(BaseException):
    """A signal was received."""


class Call:
    """One run of the command: its deadline, its folder and the result of each part."""

    def __init__(self, setting: Setting, minutes: float, resume: bool):
        self.setting, self.folder = setting, setting.output
        self.deadline = time.monotonic() + 60 * minutes
        self.path = self.folder / "summary.json"
        before = json.loads(self.path.read_text(encoding="utf-8")) if resume and self.path.is_file() else {}
        self.parts: dict[str, dict[str, Any]] = {p["part"]: p for p in before.get("parts", ())}
        self.where = describe_machine(torch.device("cpu" if setting.rehearse else "cuda"))

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """Write the summary and the page of the results so far."""
        note = {"rehearsal": REHEARSAL} if self.setting.rehearse else {}
        write_json(self.path, {**note, "where": self.where, "parts": list(self.parts.values())})
        title = REHEARSAL if self.setting.rehearse else f"{self.where['device']}, commit {self.where['commit']}"
        results = {name: read_json(self.folder / f"{name}.json") for name in self.parts}
        predicted = compare(results, "" if self.setting.rehearse else self.where["device"])
        write_text(self.folder / "results.md", page(list(self.parts.values()), predicted, title))

    def run(self, part: Part) -> None:
        """Run a part, unless an earlier run finished it, a requirement is missing or no time is left."""
        if self.parts.get(part.name, {}).get("status") == "ok":
            return
        row: dict[str, Any] = {"part": part.name, "status": SKIPPED, "said": part.lacks or ""}
        self.parts[part.name] = row
        limit = min(part.limit_s, self.left_s() - GRACE_S / 2)
        if part.lacks is None and limit < part.least_s:
            row |= {"status": "left", "said": "no time left"}
        elif part.lacks is None:
            row |= {"status": "stopped", "said": ""}
            started = time.monotonic()
            with self.listing(part, row):
                code, ended = run_process(part, self.folder / f"{part.name}.log", limit, self.setting.rehearse)
                row |= {"seconds": round(time.monotonic() - started, 1), "exit": code}
                row |= self.judge(part, code, ended)
        print(f"{part.name:24} {row['status']:9} {row.get('seconds', 0):6.1f} s  {row['said']}", flush=True)
        self.write()

    @contextlib.contextmanager
    def listing(self, part: Part, row: dict[str, Any]) -> Iterator[None]:
        """Add the part to the summary on any exit; its file states the machine and whether it is a rehearsal."""
        (self.folder / f"{part.name}.json").unlink(missing_ok=True)
        try:
            yield
        finally:
            if results := read_json(self.folder / f"{part.name}.json"):
                note = {"rehearsal": REHEARSAL} if self.setting.rehearse else {}
                write_json(self.folder / f"{part.name}.json", {**note, "where": self.where, **results})
            self.write()

    def judge(self, part: Part, code: int, ended: str) -> dict[str, str]:
        """Return {"status", "said"} of a part that has ended. After a timeout, what it measured still counts."""
        results, log = read_json(self.folder / f"{part.name}.json"), self.folder / f"{part.name}.log"
        try:
            status, said = part.read(code, results, log.read_text(encoding="utf-8", errors="replace"))
        except (KeyError, IndexError, TypeError, ValueError) as error:  # a file that a stopped part left half told
            status, said = "failed", f"its results are unreadable: {type(error).__name__} {error}"
        if ended and status != "wrong":
            return {"status": ended, "said": said if results else ""}
        return {"status": status, "said": said}

    def exit_code(self) -> int:
        found = {row["status"] for row in self.parts.values()}
        return 1 if found & {"wrong", "failed"} else 75 if found - set(DONE) else 0


def read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def run_process(part: Part, log: Path, limit_s: float, rehearse: bool) -> tuple[int, str]:
    """Run a process; return (exit code, "" or "timed out").

    On a signal or at the time limit the process and its children are ended.
    """
    env = {**os.environ, **part.env}
    env.pop("QCRD_FAST_IMPL", None)
    with open(log, "w", encoding="utf-8") as file:
        file.write(f"# {REHEARSAL}\n" if rehearse else "")
        file.flush()
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s), ""
        except subprocess.TimeoutExpired:
            return end(process), "timed out"
        except BaseException:
            end(process)
            raise


def end(process: subprocess.Popen[Any]) -> int:
    """End a process group: two requests, then a kill."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGTERM, GRACE_S / 4), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            break
    with contextlib.suppress(ProcessLookupError):  # what it left behind
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def halt(signum: int, frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # one is enough
        signal.signal(number, signal.SIG_IGN)
    raise Halt(signum)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="when to stop, whatever is left")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of svamp's published files, at any depth")
    parser.add_argument("--student", help="Hugging Face folder, or hub id, to train")
    parser.add_argument("--seeds", type=int, default=5, help="of each method; default: 5")
    parser.add_argument(
        "--parts", default="", help="only the parts whose names begin with one of these, such as loss,tuning"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier call left")
    parser.add_argument("--append", action="store_true", help="add the rows to bench/results as well")
    parser.add_argument("--rehearse", action="store_true", help="the whole with tiny shapes on a CPU")
    given = parser.parse_args(arguments)
    folder = given.output_dir
    if given.append and given.rehearse:
        parser.error("--append and --rehearse: a rehearsal measures nothing")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --rehearse runs the whole on a CPU")
    if (folder / "summary.json").exists() and not given.resume:
        parser.error(f"{folder} holds an earlier call; --resume goes on with it")
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(folder, given.data, given.student, given.seeds, given.append, given.rehearse)
    call = Call(setting, given.minutes, given.resume)
    before = {number: signal.signal(number, halt) for number in (signal.SIGINT, signal.SIGTERM)}
    print(REHEARSAL if given.rehearse else f"{call.where['device']}, commit {call.where['commit']}", flush=True)
    try:
        for part in find_parts(setting):
            if part.name.startswith(tuple(given.parts.split(","))):
                call.run(part)
    except Halt as stop:
        print(f"stopped by signal {stop.args[0]}; --resume goes on", file=sys.stderr)
        return 128 + int(stop.args[0])
    finally:
        call.write()
        for number, handler in before.items():
            signal.signal(number, handler)
    return call.exit_code()


if __name__ == "__main__":
    sys.exit(main())
