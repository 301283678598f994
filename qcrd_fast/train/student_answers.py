"""What the student's samples say: the answer each one ends in, against the votes of its question."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from qcrd_fast.data.schema import Question
from qcrd_fast.quality.cases import Case, Tally, silent_share, student_case
from qcrd_fast.train.negative_store import Negative

TEACHER_READ = 200  # questions whose positives show how often the teacher ends in no answer


class StudentAnswers:
    """Reads sampled negatives, each once. What a chunk's samples are expected to say, where they do not tell, depends on the
    chunks of its iteration up to it and on nothing later, so that a resumed run sees the same."""

    def __init__(self, questions: Sequence[Question], eos: int):
        self.questions, self.eos = {q.id: q for q in questions}, eos
        self._iteration = -1
        self._cases: dict[int, dict[str, Case]] = {}  # by chunk, as read
        self._filled: dict[int, dict[str, Negative]] = {}

    def read(self, iteration: int, chunk: int, chunks: Mapping[int, Mapping[str, Negative]]) -> dict[str, Negative]:
        """The negatives of a chunk, with their cases; `chunks`: those of the iteration that are drawn."""
        if iteration != self._iteration:
            self._iteration, self._cases, self._filled = iteration, {}, {}
        if chunk not in self._filled:
            tally = Tally()
            for earlier in sorted(c for c in chunks if c <= chunk):
                for case in self._read(earlier, chunks[earlier]).values():
                    tally.add(case)
            silent = self._teacher_silent if tally.silent else 0.0
            cases = self._read(chunk, chunks[chunk])
            self._filled[chunk] = {
                i: dataclasses.replace(n, case=tally.fill_unknown(cases[i], silent)) for i, n in chunks[chunk].items()
            }
        return self._filled[chunk]

    def _read(self, chunk: int, said: Mapping[str, Negative]) -> dict[str, Case]:
        if chunk not in self._cases:
            self._cases[chunk] = {
                i: student_case(self.questions[i], n.text, cut=self.eos not in n.tokens[-1:]) for i, n in said.items()
            }
        return self._cases[chunk]

    @functools.cached_property
    def _teacher_silent(self) -> float:
        return silent_share(list(self.questions.values())[:TEACHER_READ])
