"""Communication between the processes (ranks) that train one student under torchrun.

A rank is one process with one device. Each step's questions are dealt out to the ranks (`Schedule.micro_batches`); the
loss is divided by the questions of all ranks, so the sum of their gradients is the gradient of one process that has
them all. Rank 0 alone writes files; the run folder must be one that every rank can read. What ranks tell each other is
JSON in tensors, through gloo; gradients and shards go through NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import json
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.utils.torchrun import rank, world_size

log = logging.getLogger(__name__)
T = TypeVar("T")
_rendezvous: list[dist.Store] = []  # torchrun's store or the first rank's, once this process has found it
_groups = itertools.count(1)  # that this process has joined
ERRORS = {error.__name__: error for error in (InputError, RunError)}


class Comm:
    """The process group of a run. With one process every method is the identity and sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's items: every `size`-th."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def gather_in_order(self, own: list[T]) -> list[T]:
        """Return the results for all items, in order, from each rank's results (JSON values) for its `shard`."""
        if self.size == 1:
            return own
        parts = self.gather(own)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's JSON value, by rank."""
        if self.size == 1:
            return [value]
        data = _encoded(value)
        length = torch.tensor([len(data)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded)
        return [_decoded(part[: int(n)]) for part, n in zip(received, lengths, strict=True)]

    def together(self, function: Callable[[], T]) -> list[T]:
        """Call `function` on every rank and return all results (JSON values). An error on one rank is raised on all."""
        if self.size == 1:
            return [function()]
        return [_value(each) for each in self.gather(_told(function))]

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result (a JSON value) on every rank. An error is raised on all."""
        if self.size == 1:
            return function()
        data = _encoded(_told(function)) if self.first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        if not self.first:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return _value(_decoded(data))  # type: ignore[no-any-return]

    def max(self, value: int) -> int:
        """Return the largest value over ranks."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


SINGLE = Comm()


def _told(function: Callable[[], Any]) -> dict[str, Any]:
    """Call `function` and encode its result or its error for the other ranks."""
    try:
        return {"value": function()}
    except (InputError, RunError, OSError, SafetensorError) as error:
        return {"error": type(error).__name__, "message": str(error)}


def _value(told: dict[str, Any]) -> Any:
    """Decode a rank's result. Raises its `InputError` or `RunError`; disk errors are raised as `OSError`."""
    if "error" in told:
        raise ERRORS.get(told["error"], OSError)(told["message"])
    return told["value"]


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def own_device(name: str) -> str:
    """Return this process's device for `--device name`: on a machine with several GPUs, that of its local rank."""
    if world_size() == 1:
        return name
    if name.startswith("cuda:"):
        raise InputError(f"--device: {world_size()} processes cannot all use {name}; give cuda, and each takes its own")
    if name == "cpu" or not torch.cuda.is_available():
        return name
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise InputError(f"--nproc-per-node: process {local} of this machine has no GPU of its own ({found} found)")
    return f"cuda:{local}"


@contextlib.contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[Comm]:
    """Join the process group that torchrun started; leave it when the context ends.

    Raises `InputError` where torchrun's variables are incomplete or the process has a group already, `RunError` when
    another rank ends or says nothing for `timeout_s` seconds.
    """
    size = world_size()
    if size == 1:
        yield SINGLE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(f"WORLD_SIZE is {size} but {missing[0]} is not set; start several processes with torchrun")
    if not os.environ["MASTER_PORT"].isdecimal():
        raise InputError(f"MASTER_PORT: expected a number, got {os.environ['MASTER_PORT']!r}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    comm = Comm(rank(), size)
    if not comm.first:
        disable_progress_bar()
    if dist.is_initialized():
        raise InputError("torch.distributed has a process group already; destroy it first: a run has one of its own")
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, timeout=timeout, store=_store(timeout), rank=comm.rank, world_size=size)
        yield comm
        comm.max(0)  # nobody leaves before the last has arrived
    except Exception as error:
        _clear_frames(error)
        if isinstance(error, Stopped) or backend == "gloo":  # NCCL would wait for what the others never send
            _leave()  # where the process lives on, the others notice and it can train again
        if isinstance(error, RunError) or not (isinstance(error, RuntimeError) and _is_lost_peer(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"rank {comm.rank}: another of the {size} processes has ended or was silent for --ddp-timeout "
            f"{timeout_s:g} s ({reason}); existing checkpoints are intact, continue with --resume auto"
        ) from error
    _leave()


def _store(timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks find each other, a new corner of it each time: the addresses of an earlier group stay in it."""
    if not _rendezvous:
        _rendezvous.append(next(dist.rendezvous("env://", timeout=timeout))[0])
    (store,) = _rendezvous
    store.set_timeout(timeout)
    return dist.PrefixStore(f"run-{next(_groups)}", store)


def _leave() -> None:
    """Destroy the process group, if there is one.

    DDP must be freed first. If it held the last reference, destroying the group would wait for a thread that needs the
    GIL, which the thread that frees DDP holds.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error and of its causes hold, such as DDP."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out")
    )
