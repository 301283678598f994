"""Continuous batching: sample many continuations, with the decode step in a CUDA graph and rare host syncs.

Prompts wait in a queue, longest first. A row whose continuation has ended goes to the next prompts in the queue,
several at a time; when the queue is empty, on a CPU, the last rows move into the gaps and the batch shrinks. Suffixes:
B rows, N new tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from qcrd_fast.generation.decoder import Decoder
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prefix_packing import length_batches
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import MAX_TOKENS, Student
from qcrd_fast.ops.chunked import head_logits, pick_tokens
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.ops.reference import HeadOptions
from qcrd_fast.utils.determinism import deterministic_already
from qcrd_fast.utils.device import Autocast

CACHE_BYTES = 4 << 30  # of keys and values; fewer rows where a batch needs more
REFILL = 8  # prompts are read when an eighth of the rows is free;
GRAPHED_REFILL = 2  # under a graph half: reading is launched kernel by kernel and costs about twenty replayed tokens
TOKENS_A_REPLAY = 4  # decode steps between two looks at which rows have ended; on a CPU each step is looked at
SPAN = 64  # slots looked at, in a graph, are a multiple of it
WORKER_NAME = "sampling"  # how threads that draw are called


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Sampling options. temperature 0: greedy; top_k 0 and top_p 1: the whole softmax; `batch_size`: rows at most."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 64
    impl: str = "auto"


log = logging.getLogger(__name__)


def nucleus(top_p: float) -> Callable[[Tensor], Tensor] | None:
    """Top-p filter for logits [B, V]; None if top_p >= 1."""
    if top_p >= 1:
        return None
    warper = TopPLogitsWarper(top_p)
    return lambda logits_BV: warper(None, logits_BV)  # type: ignore[arg-type]


class Cancelled(Exception):
    """Raised when `stop` was set while `Sampler.generate` ran."""


class Sampler:
    """Draws continuations of prompts of at most `longest` tokens from a student, whose weights may change between two
    draws but stay where they are in memory. `forced`: a draw may say how continuations begin.

    Noise belongs to the question (`ops.philox`), so a draw depends on the batch through rounding alone. `static`:
    decode as a CUDA graph does, all rows always and a few tokens at a time; graphs are captured at the first draw or by
    `warm_up`.
    """

    def __init__(
        self,
        student: Student,
        settings: SampleSettings,
        longest: int,
        *,
        most: int | None = None,
        style: str = "tensor",
        autocast: Autocast | None = None,
        static: bool | None = None,
        forced: bool = False,
    ):
        self.student, self.settings, self.autocast = student, settings, autocast
        self.head = student.head
        self.eos: int = student.tokenizer.eos_token_id
        device = student.device
        self.graphed = device.type == "cuda" and static is not False
        self.static = self.graphed or bool(static)
        with self._context():
            rows = min(settings.batch_size, most or settings.batch_size)
            self.decoder = Decoder(student, rows, longest, settings.max_new_tokens, style, CACHE_BYTES)
        rows = self.rows = self.decoder.rows
        self.token_B, self.position_B, self.new_B, self.limit_B, self.index_B, self.iteration_B = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(6)
        )
        self.key_B2 = torch.zeros(rows, 2, dtype=torch.long, device=device)
        self.done_B = torch.ones(rows, dtype=torch.bool, device=device)
        self.out_BN = torch.zeros(rows, settings.max_new_tokens, dtype=torch.long, device=device)
        self.forced_BN = torch.full_like(self.out_BN, -1) if forced else None  # -1: drawn
        self._top_p = nucleus(settings.top_p)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.drawn_tokens = 0

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """Enter eval mode, no gradient and the caller's autocast, whose weight cache is off under CUDA graphs."""
        autocast = self.autocast() if self.autocast else contextlib.nullcontext()
        with eval_mode(self.student.model), torch.no_grad(), autocast:
            if self.autocast and self.graphed:
                torch.set_autocast_cache_enabled(False)
            yield

    def generate(
        self,
        sources: Sequence[TokenIds],
        keys: Sequence[tuple[int, int]],
        indices: Sequence[int] | None = None,
        iteration: int = 0,
        stop: threading.Event | None = None,
        limits: Sequence[int] | None = None,
        prefixes: Sequence[TokenIds] | None = None,
    ) -> list[TokenIds]:
        """One continuation for each source, EOS included where it was reached; see
        `qcrd_fast.generation.sample.sample`.

        limits: tokens of each at most, 1 or more, where that is fewer than `max_new_tokens`. prefixes: what each begins
        with, of a sampler that is `forced`; they are part of what is returned, and of what the limits count.

        Raises `Cancelled` within a few tokens of `stop` being set, `ValueError` for a prompt, a limit or a prefix that
        does not fit.
        """
        most, longest = self.settings.max_new_tokens, self.decoder.prompt
        for i, source in enumerate(sources):
            if not 0 < len(source) <= longest:
                raise ValueError(f"prompt {i} has {len(source)} tokens, expected 1 to {longest}")
        if limits and min(limits) < 1:
            raise ValueError(f"limits must be at least 1, got {min(limits)}")
        if prefixes and (self.forced_BN is None or max(map(len, prefixes)) > most):
            raise ValueError(
                f"a prefix has {max(map(len, prefixes))} tokens, expected at most {most}, of a forced sampler"
            )
        requests = [
            _Request(
                list(s), keys[i], indices[i] if indices else 0, min(limits[i], most) if limits else most, i,
                prefix=list(prefixes[i]) if prefixes else [],
            )
            for i, s in enumerate(sources)
        ]  # fmt: skip
        queue = deque(sorted(requests, key=lambda r: (-len(r.source), r.source, r.index, r.number)))
        results: list[TokenIds] = [[] for _ in sources]
        row: list[_Request | None] = [None] * self.rows  # who is in it
        self.iteration_B.fill_(iteration)
        self.done_B.fill_(True)
        with self._context():
            self.decoder.refresh()
            while queue or any(row):
                if stop is not None and stop.is_set():
                    raise Cancelled
                free = [b for b, request in enumerate(row) if request is None]
                if queue and len(free) * (GRAPHED_REFILL if self.static else REFILL) >= self.rows:
                    self._prefill([(b, queue.popleft()) for b in free[: len(queue)]], row)
                active = self.rows if self.static else self._compact(row)
                self._advance(active, row)
                self._collect(active, row, results)
        return results

    def use(self, impl: str) -> None:
        """Switch to another implementation."""
        self.settings = dataclasses.replace(self.settings, impl=impl)
        captured = bool(self._graphs)
        self._graphs.clear()
        if captured:  # not at the next draw, which may be beside training
            self.warm_up()

    def warm_up(self) -> None:
        """Capture the CUDA graphs, before anything else runs on the GPU."""
        if self.graphed:
            with self._context():
                for kv_length in range(SPAN, self.decoder.slots + SPAN, SPAN):
                    if self.graphed:
                        self._graph(min(kv_length, self.decoder.slots))

    # Rows

    def _prefill(self, pairs: Sequence[tuple[int, _Request]], row: list[_Request | None]) -> None:
        """Prefill free rows. Prompts of similar length are read together, and equal prompts once."""
        device = self.student.device
        for batch in length_batches([len(r.source) for _, r in pairs], MAX_TOKENS):
            some = [pairs[i] for i in batch]
            unique = {tuple(r.source): r.source for _, r in some}
            number = {source: u for u, source in enumerate(unique)}
            rows = [b for b, _ in some]
            token, position = self.decoder.prefill(
                list(unique.values()), rows, [number[tuple(r.source)] for _, r in some]
            )
            at = torch.tensor(rows, device=device)
            for state_B, values in (
                (self.token_B, token),
                (self.position_B, position),
                (self.index_B, [r.index for _, r in some]),
                (self.limit_B, [r.limit for _, r in some]),
            ):
                state_B[at] = torch.tensor(values, device=device)
            self.key_B2[at] = torch.tensor([r.key for _, r in some], device=device)
            if self.forced_BN is not None:
                width = self.forced_BN.shape[1]
                prefixes = [r.prefix + [-1] * (width - len(r.prefix)) for _, r in some]
                self.forced_BN[at] = torch.tensor(prefixes, device=device)
            self.new_B[at] = 0
            self.done_B[at] = False
            for (b, request), p in zip(some, position, strict=True):
                row[b], request.position = request, p

    def _compact(self, row: list[_Request | None]) -> int:
        """Move the last rows in use into the gaps before them; returns how many rows are in use."""
        active = sum(request is not None for request in row)
        gaps = [b for b in range(active) if row[b] is None]
        last = [b for b in range(active, self.rows) if row[b] is not None]
        if gaps:
            self.decoder.move(gaps, last)
            for state in (
                self.token_B,
                self.position_B,
                self.new_B,
                self.limit_B,
                self.index_B,
                self.key_B2,
                self.done_B,
            ):
                state[gaps] = state[last]
            self.out_BN[gaps] = self.out_BN[last]
            if self.forced_BN is not None:
                self.forced_BN[gaps] = self.forced_BN[last]
            for to, source in zip(gaps, last, strict=True):
                row[to], row[source] = row[source], None
        return active

    def _collect(self, active: int, row: list[_Request | None], results: list[TokenIds]) -> None:
        """Move finished sequences from their rows to `results`. The only place where the host waits for the device."""
        ended = [b for b, done in enumerate(self.done_B[:active].tolist()) if done and row[b] is not None]
        if not ended:
            return
        at = torch.tensor(ended, device=self.student.device)
        for b, tokens, count in zip(ended, self.out_BN[at].tolist(), self.new_B[at].tolist(), strict=True):
            request, row[b] = row[b], None
            assert request is not None
            results[request.number] = tokens[:count]
            self.drawn_tokens += count

    # Tokens

    def _advance(self, active: int, row: list[_Request | None]) -> None:
        """The next token of each row, or the next few."""
        tokens = TOKENS_A_REPLAY if self.static else 1
        taken = [request for request in row if request is not None]
        for request in taken:
            request.position += tokens
        kv_length = min(max(r.position for r in taken), self.decoder.slots)
        width = max(len(r.source) for r in taken)
        if self.static:
            kv_length, width = min(-(-kv_length // SPAN) * SPAN, self.decoder.slots), self.decoder.prompt
        graph = self._graph(kv_length) if self.graphed else None
        if graph is not None:
            graph.replay()
        else:
            for _ in range(tokens):
                self._step(active, kv_length, width)

    def _step(self, active: int, kv_length: int, width: int) -> None:
        """One token of the first rows; nothing here depends on a value, so that a graph can hold it."""
        token_B, position_B, new_B, done_B = (
            x[:active] for x in (self.token_B, self.position_B, self.new_B, self.done_B)
        )
        hidden_BH = self.decoder.step(token_B, position_B, kv_length, width)
        counter_B3 = torch.stack([new_B, self.index_B[:active], self.iteration_B[:active]], 1)
        chosen_B = self._pick(hidden_BH, self.key_B2[:active], counter_B3)
        at_B1, out_BN = new_B.clamp(max=self.settings.max_new_tokens - 1)[:, None], self.out_BN[:active]
        if self.forced_BN is not None:
            forced_B = self.forced_BN[:active].gather(1, at_B1)[:, 0]
            chosen_B = torch.where(forced_B < 0, chosen_B, forced_B)
        out_BN.scatter_(1, at_B1, torch.where(done_B[:, None], out_BN.gather(1, at_B1), chosen_B[:, None]))
        new_B += ~done_B
        done_B |= (chosen_B == self.eos) | (new_B >= self.limit_B[:active])
        position_B += ~done_B  # a row that has ended repeats its last step until it is taken out
        token_B.copy_(torch.where(done_B, token_B, chosen_B))

    def _pick(self, hidden_BH: Tensor, key_B2: Tensor, counter_B3: Tensor) -> Tensor:
        head, settings = self.head, self.settings
        with torch.autocast(hidden_BH.device.type, enabled=False):
            if self._top_p is None or not settings.temperature:
                return linear_sample(
                    hidden_BH, head.weight, key_B2, counter_B3, **head.options,
                    temperature=settings.temperature, top_k=settings.top_k, impl=settings.impl,
                )  # fmt: skip
            options = HeadOptions(head.scale, float(head.softcap or 0), settings.temperature)
            logits_BV = head_logits(hidden_BH, head.weight, head.bias, options)
            return pick_tokens(logits_BV, key_B2, counter_B3, settings.top_k, warp=self._top_p)

    def _graph(self, kv_length: int) -> torch.cuda.CUDAGraph | None:
        """Return the CUDA graph of a few steps over `kv_length` slots; None (logged once) if the model cannot be
        captured."""
        if kv_length not in self._graphs:
            states = (self.token_B, self.position_B, self.new_B, self.done_B)
            kept = [state.clone() for state in states]
            self.done_B.fill_(True)  # the steps that are run for it leave every row where it stands
            try:
                self._graphs[kv_length] = self._capture(kv_length)
            except RuntimeError as error:
                self.graphed = False
                log.warning("sampling without CUDA graphs, which is slower: %s", str(error).splitlines()[0][:200])
                self._end_capture()
            for state, value in zip(states, kept, strict=True):
                state.copy_(value)
        return self._graphs.get(kv_length)

    def _capture(self, kv_length: int) -> torch.cuda.CUDAGraph:
        device, stream = self.student.device, self._capture_stream()
        arguments = (self.rows, kv_length, self.decoder.prompt)
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        stream.wait_stream(torch.cuda.current_stream(device))
        with deterministic_already(), torch.cuda.stream(stream):  # which a capture that fails would not leave
            self._step(*arguments)  # kernels are compiled and libraries make their workspaces
            with _never_waiting():
                self._step(*arguments)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                for _ in range(TOKENS_A_REPLAY):
                    self._step(*arguments)
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph

    def _capture_stream(self) -> torch.cuda.Stream:
        """Return the stream to capture on: the current one, so that a graph keeps its priority and its multiprocessors.

        The default stream cannot be captured; a side stream takes its place.
        """
        device = self.student.device
        current = torch.cuda.current_stream(device)
        return current if current != torch.cuda.default_stream(device) else _side_stream(device)

    def _end_capture(self) -> None:
        """Reset torch's generator after a failed capture by capturing an empty graph; the next dropout would raise
        otherwise."""
        stream = self._capture_stream()
        with contextlib.suppress(RuntimeError), torch.cuda.stream(stream):
            nothing = torch.zeros(1, device=self.student.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                nothing.zero_()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: memory and libraries' workspaces belong to a stream


@contextlib.contextmanager
def _never_waiting() -> Iterator[None]:
    """Raise `RuntimeError` for operations that synchronise with the device, before they break a capture.

    The mode is global to the process, so it stays off while another thread samples.
    """
    here = threading.current_thread()
    if any(thread is not here and thread.name.startswith(WORKER_NAME) for thread in threading.enumerate()):
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@dataclasses.dataclass
class _Request:
    source: TokenIds
    key: tuple[int, int]
    index: int
    limit: int
    number: int  # in the caller's order
    position: int = 0  # of its row's next token, or a little more
    prefix: TokenIds = dataclasses.field(default_factory=list)  # what the continuation begins with
