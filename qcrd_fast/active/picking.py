"""Which questions of the pool a round asks about: the score of `select`, and its best B."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qcrd_fast.active.revision import Explanation
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.models.student import Student
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.policy import top
from qcrd_fast.select.registry import SELECTORS
from qcrd_fast.select.score import score_rows


def needs_explanations(name: str) -> bool:
    """Whether a score looks at a rationale, which in a pool is the student's own."""
    return SELECTORS[name].per == "rationale"


def pick(
    questions: Sequence[Question],
    name: str,
    B: int,
    student: Student | None,
    options: SelectOptions,
    said: Sequence[Explanation] | None = None,
) -> list[tuple[Question, float | None]]:
    """The B questions to ask about, best first, with their scores. `said`: the student's explanations, as their
    rationales."""
    rows = list(questions)
    if said is not None:
        rows = [
            dataclasses.replace(q, positives=(Rationale(e.text, e.answer, "student"),)) if e.text.strip() else q
            for q, e in zip(questions, said, strict=True)
        ]
    scores = score_rows(rows, [name], student, options)
    return [(questions[i], scores[i][name]) for i in top(rows, scores, name, B)]
