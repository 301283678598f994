"""Where negatives are sampled: serially, or in a thread with its own CUDA stream beside training.

Streams share nothing on the device: the worker reads prompts from the host, returns tokens to the host, and loads
weights from host memory after an event (`qcrd_fast.train.snapshots`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from qcrd_fast.config import NegativeOptions
from qcrd_fast.errors import InputError
from qcrd_fast.generation.engine import WORKER_NAME

T = TypeVar("T")
SHARE = 0.25  # of the multiprocessors that a green context keeps for sampling


def choose_overlap(config: NegativeOptions, device: torch.device) -> str:
    """Resolve `--overlap auto`. Raises `InputError` for a kind that this machine does not support."""
    wanted = "serial" if config.overlap == "auto" else config.overlap  # the others are unmeasured
    if wanted in ("priority", "green-context") and device.type != "cuda":
        raise InputError(
            f"--overlap {wanted} needs a GPU, and the device is {device.type}; serial and stream work everywhere"
        )
    if wanted == "green-context" and (obstacle := _no_green_context()):
        raise InputError(f"--overlap green-context: {obstacle}")
    return wanted


def _no_green_context() -> str | None:
    try:
        from torch.cuda import green_contexts
    except ImportError:
        return f"torch {torch.__version__} has no green contexts"
    return (
        None
        if getattr(green_contexts, "SUPPORTED", True)
        else f"torch {torch.__version__} was built without green contexts"
    )


class SamplingWorker:
    """Run sampling calls one after another.

    `serial`: at once, in the caller's thread. `stream`: in a thread with a CUDA stream of its own (on a CPU, in a
    thread).
    `priority`: on a stream of high priority, whose short kernels go before training's waiting ones. `green-context`: on
    a quarter of the multiprocessors.
    """

    def __init__(self, kind: str, device: torch.device):
        self.kind, self.device = kind, device
        self._pool: ThreadPoolExecutor | None = None
        self._stream: Any = None
        self._green: Any = None  # lives as long as its stream is used
        if kind == "serial":
            return
        self._pool = ThreadPoolExecutor(1, WORKER_NAME, torch.set_num_threads, (torch.get_num_threads(),))
        if device.type != "cuda":
            return
        if kind == "green-context":
            from torch.cuda.green_contexts import GreenContext

            count = torch.cuda.get_device_properties(device).multi_processor_count
            self._green = GreenContext.create(num_sms=max(1, round(SHARE * count)), device_id=device.index or 0)
            if hasattr(self._green, "Stream"):  # else the thread enters the context itself
                self._stream = self._green.Stream()
        else:
            self._stream = torch.cuda.Stream(device, priority=-1 if kind == "priority" else 0)

    def run(self, call: Callable[[], T]) -> Future[T]:
        if self._pool is not None:
            return self._pool.submit(self._on_stream, call)
        done: Future[T] = Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done

    def _on_stream(self, call: Callable[[], T]) -> T:
        with self._streaming():
            return call()

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        entered = self._green if self._stream is None else None
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):  # None: the current one
            if entered is not None:
                entered.set_context()
            try:
                yield
            finally:
                if entered is not None:
                    entered.pop_context()

    def close(self) -> None:
        """Cancel queued calls and wait for the running one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
