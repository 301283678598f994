"""The student as it was: its weights at the start of past iterations, in bf16.

They are on disk, where a resume finds them; on a GPU machine the latest are in pinned host memory too, which takes them
from the GPU and back without stopping it.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.distributed.parallel import unshard
from qcrd_fast.errors import RunError
from qcrd_fast.runs.folder import snapshot_name
from qcrd_fast.utils.files import disk_space_text, replacing, sha256, sync

Weights = dict[str, Tensor]


class Snapshots:
    """One safetensors file an iteration, written by a thread; the latest `in_memory` also stay in host memory.

    A call that needs a file, or its digest, waits for it and raises what writing it raised. Of several ranks the first
    writes, and all of them wait for it.
    """

    def __init__(self, folder: Path, in_memory: int = 0, comm: Comm = SINGLE):
        self.folder, self.in_memory, self.comm = folder, in_memory, comm
        self._known: dict[int, str] = {}  # sha256 by iteration
        self._ring: dict[int, tuple[Weights, Any]] = {}  # weights on the host, and the event after their copy
        self._spare: list[Weights] = []  # host buffers whose snapshot has left the ring
        self._writing: dict[int, Future[str]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._stream: Any = None

    @property
    def known(self) -> dict[int, str]:
        """sha256 by iteration, once everything is written."""
        for iteration in list(self._writing):
            # until then another thread must find it in `_writing`
            self._known[iteration] = self._writing[iteration].result()
            del self._writing[iteration]
        return self._known

    @known.setter
    def known(self, digests: dict[int, str]) -> None:
        self.wait()
        self._known = digests

    def path(self, iteration: int) -> Path:
        return self.folder / snapshot_name(iteration)

    def has(self, iteration: int) -> bool:
        """Whether it can be loaded, now or when it is written."""
        return iteration in self._ring or iteration in self._writing or iteration in self._known

    @torch.no_grad()
    def save(self, iteration: int, model: torch.nn.Module) -> None:
        """Snapshot the weights as of the work queued so far.

        The training stream copies them on the device and continues; another stream moves the copy to the host.
        """
        self.wait()
        device = next(model.parameters()).device
        weights = {n: unshard(p.detach()).to(torch.bfloat16, copy=True) for n, p in model.named_parameters()}
        arrived = None
        if device.type == "cuda":
            weights, arrived = self._to_host(weights, device)
        if self.in_memory:
            self._ring[iteration] = weights, arrived
            for old in sorted(self._ring)[: -self.in_memory]:
                self._spare.append(self._ring.pop(old)[0])
        if self.comm.size > 1:
            self._known[iteration] = self.comm.on_rank0(lambda: self._write(iteration, weights, arrived))
        else:
            self._writing[iteration] = self._writer.submit(self._write, iteration, weights, arrived)

    def _to_host(self, weights: Weights, device: torch.device) -> tuple[Weights, Any]:
        """(pinned copies, the event after which they hold the weights)."""
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        host = self._spare.pop() if self._spare else None
        with torch.cuda.stream(self._stream):
            host = host or {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for n, t in weights.items()}
            for name, tensor in weights.items():
                host[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
            return host, self._stream.record_event()

    def _write(self, iteration: int, weights: Weights, arrived: Any) -> str:
        if arrived is not None:
            arrived.synchronize()
        self.folder.mkdir(exist_ok=True)
        path = self.path(iteration)
        try:
            with replacing(path) as temporary:
                save_file(weights, temporary)
                digest = sha256(temporary)
            sync(self.folder)  # a checkpoint that outlives a power cut may need it
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in weights.values())
            raise RunError(f"cannot write {path}: {error} ({disk_space_text(self.folder, needed)})") from error
        return digest

    def wait(self) -> None:
        """Until everything is on disk."""
        _ = self.known

    def digests(self, oldest: int) -> dict[int, str]:
        """{iteration: sha256} of the snapshots from `oldest` on, for the checkpoint that may need them."""
        return {i: digest for i, digest in self.known.items() if i >= oldest}

    @torch.no_grad()
    def load_into(self, iteration: int, model: torch.nn.Module) -> None:
        """Copy a snapshot into the model's own parameters, on the current stream; their place in memory stays."""
        weights, arrived = self._ring.get(iteration, (None, None))
        if weights is None:
            if writing := self._writing.get(iteration):
                writing.result()
            weights = load_file(self.path(iteration))
        for name, parameter in model.named_parameters():
            if arrived is not None:
                torch.cuda.current_stream(parameter.device).wait_event(arrived)
            parameter.copy_(weights[name], non_blocking=True)

    def prune(self, oldest: int, keep_initial: bool) -> None:
        """Delete snapshots older than `oldest`. Only rank 0 does."""
        for path in self.folder.glob("iteration-*.safetensors") if self.comm.first else ():
            number = path.stem.removeprefix("iteration-")
            if number.isdecimal() and int(number) < oldest and not (keep_initial and int(number) == 0):
                path.unlink()
                self._known.pop(int(number), None)

    def close(self) -> None:
        """Finish writing."""
        self._writer.shutdown()
