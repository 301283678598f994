"""Parse the answers of the student's samples and compare them with the votes of their questions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from qcrd_fast.data.schema import Question
from qcrd_fast.quality.cases import Case, Tally, silent_share, student_case
from qcrd_fast.quality.samples import TEACHER_READ
from qcrd_fast.train.negative_store import Negative, was_cut
from qcrd_fast.train.schedule import Schedule


class StudentAnswers:
    """Parses each sampled negative once.

    The expected answer of a sample without a conclusion depends only on samples of its iteration up to its step. So a
    resumed run and several processes get the same result. `questions`: those that `schedule` counts.
    """

    def __init__(self, questions: Sequence[Question], schedule: Schedule, eos: int):
        self.questions, self.schedule, self.eos = questions, schedule, eos
        self._by_id = {q.id: q for q in questions}
        self._iteration, self._next = -1, 0  # the step whose samples are counted next
        self._tally, self._cases = Tally(), dict[str, Case]()

    def read(self, step: int, chunks: Mapping[int, Mapping[str, Negative]]) -> dict[str, Negative]:
        """Return the negatives of a step's chunk with their cases. `chunks`: those of its iteration up to this one."""
        iteration, chunk = self.schedule.chunk(step)
        if iteration != self._iteration or step < self._next - 1:
            if iteration != self._iteration:
                self._cases = {}
            self._iteration, self._next, self._tally = iteration, iteration * self.schedule.iteration_steps, Tally()
        while self._next <= step:
            by_question = chunks[self.schedule.chunk(self._next)[1]]
            for index in self.schedule.questions(self._next):
                self._tally.add(self._case(self.questions[index].id, by_question))
            self._next += 1
        silent = self._teacher_silent if self._tally.silent else 0.0
        return {
            i: dataclasses.replace(n, case=self._tally.fill_unknown(self._case(i, chunks[chunk]), silent))
            for i, n in chunks[chunk].items()
        }

    def _case(self, question_id: str, by_question: Mapping[str, Negative]) -> Case:
        if question_id not in self._cases:
            own = by_question[question_id]
            self._cases[question_id] = student_case(
                self._by_id[question_id], own.text, cut=was_cut(own.tokens, self.eos)
            )
        return self._cases[question_id]

    @functools.cached_property
    def _teacher_silent(self) -> float:
        return silent_share(self.questions[:TEACHER_READ])
