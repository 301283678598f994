"""Time and memory. On a GPU: CUDA events and the caching allocator's peak.

On a CPU: user time of all threads, which other processes change least, and the profiler's record of every allocation
(torch's own; a matrix library's are not in it).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

HEAD_START_CYCLES = 2_000_000  # about a millisecond in which the host launches what is timed
CACHE_BYTES = 2**28  # more than any GPU's second-level cache
SHORTEST_MS = 20.0  # of user time, which the system counts by its ticks: in less it may stand still or jump


def time_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Time a call [ms]; on a CPU, the mean of as many as the clock can tell from none."""
    return mean_ms(lambda: time_once_ms(call, device), device)


def mean_ms(once: Callable[[], float], device: torch.device) -> float:
    """Return the mean of what `once` returns [ms]: of one call on a GPU, on a CPU of calls of `SHORTEST_MS` in all."""
    taken, calls = once(), 1
    while device.type != "cuda" and taken < SHORTEST_MS:
        taken, calls = taken + once(), calls + 1
    return taken / calls


def time_once_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Time one call [ms]; on a CPU that may be 0.

    On a GPU: device time from a cold cache, with the host as far ahead as in training, so launches cost time only where
    they take longer than the work.
    """
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        _cache(device).zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    started = clock(device)
    call()
    return 1e3 * (clock(device) - started)


def clock(device: torch.device) -> float:
    """Return seconds: wall time with a GPU, user time of all threads on a CPU."""
    return time.perf_counter() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_utime


@functools.cache
def _cache(device: torch.device) -> torch.Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Return the peak memory of `call` beyond what was allocated before it [MiB]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def rounds(calls: list[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Time each call `repeats` times, interleaved [ms]; every round starts with another one."""
    times: list[list[float]] = [[] for _ in calls]
    for r in range(repeats):
        for i in range(len(calls)):
            which = (i + r) % len(calls)
            times[which].append(time_ms(calls[which], device))
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence the file descriptor: the profiler's library writes to it at every start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
