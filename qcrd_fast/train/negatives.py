"""Lagged negatives: rationales sampled from snapshots of the student, chunk by chunk.

A chunk is the questions of a few consecutive steps of one iteration. Which questions it has is a function of (seed,
iteration, chunk), and its random numbers are keyed by question. So a chunk that a killed run left unfinished is sampled
again with the same result, and so is one that is prefetched.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.generation.engine import Sampler, SampleSettings
from qcrd_fast.generation.hf_generate import GenerateSampler
from qcrd_fast.generation.sample import make_sampler
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.train.methods import is_on_policy, lag_of, samples_the_first
from qcrd_fast.train.negative_store import Negative, NegativeStore, was_cut
from qcrd_fast.train.overlap import SamplingWorker
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.snapshots import Snapshots
from qcrd_fast.train.student_answers import StudentAnswers
from qcrd_fast.utils.oom import explains_oom, for_sampling

PREFETCH_CHUNKS = 2  # chunks drawn before their steps


@dataclasses.dataclass(frozen=True)
class SamplingPrompt:
    """A question's prompt for sampling a rationale."""

    id: str
    source: TokenIds


def _longest_prompt(negatives: LaggedNegatives, *_: Any) -> str:
    longest = max(negatives.questions, key=lambda q: len(q.source))
    return f"{longest.id}, {len(longest.source)} prompt tokens"


class LaggedNegatives:
    """One sampled rationale per question and iteration.

    Sampled just before the steps that use it, or prefetched up to `PREFETCH_CHUNKS` chunks ahead (`--overlap`).
    Iteration t samples from the snapshot of iteration max(t - j, 0) (`fixed`: always 0) and keeps the samples in
    `store`. With `answers`, each negative also holds its parsed answer. Each rank samples its shard of a chunk; all
    ranks get all samples, rank 0 stores them.
    """

    def __init__(
        self,
        student: Student,
        questions: Sequence[SamplingPrompt],
        schedule: Schedule,
        snapshots: Snapshots,
        folder: Path,
        config: TrainConfig,
        autocast: Callable[[], torch.autocast],
        worker: SamplingWorker | None = None,
        comm: Comm = SINGLE,
        answers: StudentAnswers | None = None,
    ):
        self.answers = answers
        self.questions, self.schedule, self.snapshots = questions, schedule, snapshots
        self.config, self.autocast = config, autocast
        truncation = (config.negative_temperature, config.negative_top_k, config.negative_top_p)
        if is_on_policy(config):
            truncation = 1.0, 0, 1.0  # from the student's own distribution, all of it
        self.settings = SampleSettings(*truncation, config.max_new_tokens, config.sample_batch_size, config.impl)
        self.worker = worker or SamplingWorker("serial", torch.device("cpu"))
        self.wait_s = self.busy_s = 0.0  # the caller waited; drawing took
        self.tokens = 0
        self.comm = comm
        self._student = student
        self._sampler: Sampler | GenerateSampler | None = None
        self._loaded: int | None = None
        self._stop = threading.Event()
        self._prefetched: dict[tuple[int, int], Future[_Drawn]] = {}
        self.store = NegativeStore(folder, schedule, [q.id for q in questions], comm, kept=1 + PREFETCH_CHUNKS)

    def source_iteration(self, iteration: int) -> int:
        """Whose snapshot speaks in an iteration."""
        return 0 if samples_the_first(self.config) else max(iteration - lag_of(self.config), 0)

    @explains_oom("the sampler", for_sampling, _longest_prompt)
    def prepare(self) -> None:
        """Create the sampler with its own copy of the weights and capture its graphs, before training starts."""
        if self._sampler is not None:
            return
        student, autocast = copy.copy(self._student), self.autocast if self._autocasts() else None
        student.model = copy.deepcopy(self._student.model).requires_grad_(False).eval()
        if student.device.type == "cuda":
            if autocast:  # weights in bf16, as the snapshots have them, in place of casting them for each token
                for parameter in student.model.parameters():  # not the buffers: rotary frequencies need fp32
                    parameter.data = parameter.data.to(torch.bfloat16)
                autocast = None
            torch.cuda.synchronize(student.device)
        longest = max(len(q.source) for q in self.questions)

        def make() -> Sampler | GenerateSampler:
            sampler = make_sampler(student, self.settings, longest, autocast=autocast)
            sampler.warm_up()
            return sampler

        self._sampler = self.worker.run(make).result()

    def use(self, impl: str) -> None:
        """Switch the sampler to another implementation."""
        self.settings = dataclasses.replace(self.settings, impl=impl)
        if (sampler := self._sampler) is not None:
            self.worker.run(lambda: sampler.use(impl)).result()

    @explains_oom("sampling negatives", for_sampling, _longest_prompt)
    def for_step(self, step: int) -> dict[str, Negative]:
        """Return the negatives of a step's chunk by question id; sample and store what is missing."""
        iteration, chunk = self.schedule.chunk(step)
        by_chunk = self.store.chunks(iteration)
        if self.answers:
            for earlier in range(chunk):  # there, but where damage took them
                self._fetch(iteration, earlier)
        self._fetch(iteration, chunk)
        if self.worker.kind != "serial":
            self._prefetch(step)
        return self.answers.read(step, by_chunk) if self.answers else by_chunk[chunk]

    def _fetch(self, iteration: int, chunk: int) -> None:
        """Sample a chunk and store it, unless it is stored already."""
        if chunk not in self.store.chunks(iteration):
            started = time.perf_counter()
            drawn = self._draw(iteration, chunk).result()
            self.wait_s += time.perf_counter() - started
            self.busy_s += drawn.seconds
            tokens = self.comm.gather_in_order(drawn.tokens)
            self.tokens += sum(map(len, tokens))
            asked = self._asked(iteration, chunk)
            eos = self._student.tokenizer.eos_token_id
            found = {
                q.id: Negative(t, self._student.text(t), was_cut(t, eos)) for q, t in zip(asked, tokens, strict=True)
            }
            self.store.append(iteration, chunk, found)

    def of_iteration(self, iteration: int) -> dict[str, Negative]:
        """Return all negatives of an iteration by question id; sample missing chunks."""
        found: dict[str, Negative] = {}
        for step in self.schedule.first_steps(iteration):
            found |= self.for_step(step)
        return found

    @property
    def overlap_fraction(self) -> float:
        """Fraction of sampling time hidden behind training, 0..1."""
        return max(0.0, 1 - self.wait_s / self.busy_s) if self.busy_s and self.worker.kind != "serial" else 0.0

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.busy_s if self.busy_s else None

    def close(self) -> None:
        """Stop prefetching; a resume samples these chunks again."""
        self._stop.set()
        self.worker.close()

    # Drawing

    def _draw(self, iteration: int, chunk: int) -> Future[_Drawn]:
        """Return the future of a chunk: the prefetched one, else a new one."""
        self.prepare()
        begun = self._prefetched.pop((iteration, chunk), None)
        return begun or self.worker.run(lambda: self._sample(iteration, chunk))

    def _prefetch(self, step: int) -> None:
        """Start sampling the chunks after this step whose snapshots exist."""
        for iteration, chunk in self._following(step):
            if not self.snapshots.has(self.source_iteration(iteration)):
                return
            if chunk not in self.store.chunks(iteration) and (iteration, chunk) not in self._prefetched:
                self._prefetched[iteration, chunk] = self.worker.run(lambda i=iteration, c=chunk: self._sample(i, c))  # type: ignore[misc]

    def _following(self, step: int) -> Iterator[tuple[int, int]]:
        """Return the next `PREFETCH_CHUNKS` chunks of the run."""
        now = self.schedule.chunk(step)
        found: dict[tuple[int, int], None] = {}
        while (step := step + 1) < self.schedule.total_steps and len(found) < PREFETCH_CHUNKS:
            if (chunk := self.schedule.chunk(step)) != now:
                found[chunk] = None
        return iter(found)

    def _sample(self, iteration: int, chunk: int) -> _Drawn:
        """Sample a chunk. Runs in the worker; uses only the sampler, its weights and the snapshots."""
        started = time.perf_counter()
        sampler, source = self._sampler, self.source_iteration(iteration)
        assert sampler is not None
        if self._loaded != source:
            self.snapshots.load_into(source, sampler.student.model)
            self._loaded = source
        asked = self.comm.shard(self._asked(iteration, chunk))
        keys = [key_words(self.config.seed, q.id) for q in asked]
        tokens = (
            sampler.generate([q.source for q in asked], keys, iteration=iteration, stop=self._stop) if asked else []
        )
        return _Drawn(tokens, time.perf_counter() - started)

    def _autocasts(self) -> bool:
        device = self._student.device.type
        with self.autocast():
            return torch.is_autocast_enabled(device)

    def _asked(self, iteration: int, chunk: int) -> list[SamplingPrompt]:
        return [self.questions[i] for i in self.schedule.chunk_questions(iteration, chunk)]


@dataclasses.dataclass(frozen=True)
class _Drawn:
    tokens: list[TokenIds]
    seconds: float
