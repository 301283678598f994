"""Negatives from the student as it was: snapshots of its weights, and rationales drawn from them chunk by chunk.

A chunk is the questions of a few consecutive steps of one iteration. Its composition is a function of (seed, iteration,
chunk) alone and its random numbers belong to its questions, so a chunk that a killed run left unfinished is drawn again
whole and comes out the same.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qcrd_fast.config import TrainConfig
from qcrd_fast.runfolder import append_lines, read_lines, sha256, write_lines
from qcrd_fast.sampling import SampleSettings, key_words, sample
from qcrd_fast.schedule import Schedule
from qcrd_fast.students import Student, TokenIds


class Snapshots:
    """The student's weights at the start of past iterations, in bf16, one safetensors file each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[int, str] = {}  # sha256 by iteration

    def path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:05d}.safetensors"

    def save(self, iteration: int, model: torch.nn.Module) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.path(iteration)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({n: p.detach().to("cpu", torch.bfloat16) for n, p in model.named_parameters()}, temporary)
        self.known[iteration] = sha256(temporary)
        temporary.replace(path)

    def digests(self, oldest: int) -> dict[int, str]:
        """{iteration: sha256} of the snapshots from `oldest` on, for the checkpoint that may need them."""
        return {i: digest for i, digest in self.known.items() if i >= oldest}

    def load_into(self, iteration: int, model: torch.nn.Module) -> None:
        tensors = load_file(self.path(iteration))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])

    def prune(self, oldest: int, keep_initial: bool) -> None:
        """Delete what no iteration from `oldest` on can ask for."""
        for path in self.folder.glob("iteration-*.safetensors"):
            number = int(path.stem.removeprefix("iteration-"))
            if number < oldest and not (keep_initial and number == 0):
                path.unlink()
                self.known.pop(number, None)


@dataclasses.dataclass(frozen=True)
class Negative:
    """A sampled rationale: its tokens (with EOS where the sampling reached it) and its text."""

    tokens: TokenIds
    text: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question to sample a rationale for."""

    id: str
    source: TokenIds


class LaggedNegatives:
    """One sampled rationale per question and iteration, drawn just before the steps that use it.

    Iteration t samples from the snapshot of iteration max(t - j, 0) (`fixed`: always 0) and keeps what was said in
    `negatives/iteration-t.jsonl`, a chunk at a time, each ended by a line that counts it.
    """

    def __init__(
        self,
        student: Student,
        questions: Sequence[Asked],
        schedule: Schedule,
        snapshots: Snapshots,
        folder: Path,
        config: TrainConfig,
        autocast: Callable[[], torch.autocast],
    ):
        self.questions, self.schedule, self.snapshots, self.folder = questions, schedule, snapshots, folder
        self.config, self.autocast = config, autocast
        self.settings = SampleSettings(
            config.negative_temperature,
            config.negative_top_k,
            config.negative_top_p,
            config.max_new_tokens,
            config.sample_batch_size,
        )
        self._student = student
        self._sampler: Student | None = None
        self._loaded: int | None = None
        self._iteration: int | None = None
        self._drawn: dict[int, dict[str, Negative]] = {}

    def source_iteration(self, iteration: int) -> int:
        """Whose snapshot speaks in an iteration."""
        return 0 if self.config.negative_source == "fixed" else max(iteration - self.config.negative_lag, 0)

    def for_step(self, step: int) -> dict[str, Negative]:
        """Negatives by question id for the questions of a step (and of its chunk)."""
        iteration, chunk = self.schedule.chunk(step)
        self._open(iteration)
        if chunk not in self._drawn:
            self._drawn[chunk] = self._draw(iteration, chunk)
        return self._drawn[chunk]

    def of_iteration(self, iteration: int) -> dict[str, Negative]:
        """All negatives of an iteration, by question id; chunks that are missing are drawn."""
        found: dict[str, Negative] = {}
        for step in self.schedule.first_steps(iteration):
            found |= self.for_step(step)
        return found

    def _open(self, iteration: int) -> None:
        if iteration == self._iteration:
            return
        self._iteration, self._drawn = iteration, {}
        self.folder.mkdir(exist_ok=True)
        path = self._path(iteration)
        whole, pending = [], []
        for record in read_lines(path):
            pending.append(record)
            if "end" in record:
                if self._is_whole(iteration, pending):
                    self._drawn[record["chunk"]] = {r["id"]: Negative(r["tokens"], r["text"]) for r in pending[:-1]}
                    whole += pending
                pending = []
        if path.exists():
            write_lines(path, whole)  # without the tail that a killed run left

    def _is_whole(self, iteration: int, records: list[dict[str, Any]]) -> bool:
        """Whether these are the records of one chunk, all its questions and no other; if not, it is drawn again."""
        *rows, end = records
        chunk = end.get("chunk")
        if not isinstance(chunk, int) or not 0 <= chunk < len(self.schedule.first_steps(iteration)) or chunk in self._drawn:
            return False
        asked = [self.questions[i].id for i in self.schedule.chunk_questions(iteration, chunk)]
        return (
            end["end"] == len(rows)
            and [r.get("id") for r in rows] == asked
            and all(isinstance(r.get("text"), str) and isinstance(r.get("tokens"), list) for r in rows)
        )

    def _draw(self, iteration: int, chunk: int) -> dict[str, Negative]:
        asked = [self.questions[i] for i in self.schedule.chunk_questions(iteration, chunk)]
        drawn = sample(
            self._student_of(self.source_iteration(iteration)),
            [q.source for q in asked],
            [key_words(self.config.seed, q.id) for q in asked],
            self.settings,
            iteration=iteration,
            autocast=self.autocast,
        )
        negatives = {q.id: Negative(t, self._student.text(t)) for q, t in zip(asked, drawn, strict=True)}
        records = [{"chunk": chunk, "id": i, "tokens": n.tokens, "text": n.text} for i, n in negatives.items()]
        append_lines(self._path(iteration), [*records, {"chunk": chunk, "end": len(records)}])
        return negatives

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:05d}.jsonl"

    def _student_of(self, iteration: int) -> Student:
        if self._sampler is None:
            self._sampler = copy.copy(self._student)
            self._sampler.model = copy.deepcopy(self._student.model).requires_grad_(False).eval()
        if self._loaded != iteration:
            self.snapshots.load_into(iteration, self._sampler.model)
            self._loaded = iteration
        return self._sampler
