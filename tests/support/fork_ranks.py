"""Processes forked from one that has imported everything, with the variables that torchrun sets."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Ended(NamedTuple):
    """How ranks ended, each by rank. code: of the exit, or minus the signal. at: `time.time()` [s]. said: the last of
    stderr. result: what the function returned, as JSON has it; None where it did not."""

    code: list[int]
    at: list[float]
    said: list[str]
    result: list[Any]


def fork_ranks(function: Callable[[int], Any], ranks: int, timeout_s: float = 280.0) -> list[Any]:
    """What `function(rank)` returns in each rank, and only once all have ended well."""
    ended = run_ranks(function, ranks, timeout_s)
    failed = [f"rank {rank}: exit {code}\n{ended.said[rank]}" for rank, code in enumerate(ended.code) if code]
    assert not failed, "\n".join(failed)
    return ended.result


def in_group(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """`function` within a gloo process group of the ranks."""

    def grouped(rank: int) -> Any:
        dist.init_process_group("gloo")
        result = function(rank)
        dist.destroy_process_group()
        return result

    return grouped


def run_ranks(function: Callable[[int], Any], ranks: int, timeout_s: float) -> Ended:
    """Call `function(rank)` in each of some ranks; its `SystemExit` is the exit code.

    A rank that is stopped is killed once the others have ended. Behind the time limit each says where it is, and is
    killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        said, results = ([Path(folder, f"{rank}.{kind}") for rank in range(ranks)] for kind in ("txt", "json"))
        started: dict[int, int] = {}
        for rank in range(ranks):
            if not (pid := os.fork()):
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
                _child(lambda rank=rank: function(rank), said[rank], results[rank], timeout_s)
            started[pid] = rank
        codes, at = _wait(started, time.time() + timeout_s + 2.0)
        return Ended(
            codes, at, [path.read_text(errors="replace")[-3000:] for path in said],
            [json.loads(path.read_text()) if path.exists() else None for path in results],
        )  # fmt: skip


def _child(function: Callable[[], Any], said: Path, result: Path, timeout_s: float) -> None:
    code = 70
    try:
        torch.set_num_threads(1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT, 0o644), 2)
        faulthandler.enable()
        faulthandler.dump_traceback_later(timeout_s)
        result.write_text(json.dumps(function()))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # gloo's threads live on in FSDP2's caches, and abort a process whose interpreter ends


def _wait(started: dict[int, int], deadline: float) -> tuple[list[int], list[float]]:
    """(exit codes, times) by rank of `started`, {process id: rank}."""
    codes: dict[int, int] = {}
    at: dict[int, float] = {}
    stopped: set[int] = set()
    while len(codes) < len(started):
        for pid, rank in started.items():
            if rank in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                codes[rank], at[rank] = os.waitstatus_to_exitcode(status), time.time()
        alive = {pid for pid, rank in started.items() if rank not in codes}
        if alive and (alive <= stopped or time.time() > deadline):
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[rank] for rank in range(len(codes))], [at[rank] for rank in range(len(at))]
