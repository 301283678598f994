"""What `prepare` reports of the questions it made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qcrd_fast.answers import parse_choices, same_answer
from qcrd_fast.rows import Question
from qcrd_fast.voting import Vote


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` reports. Means and the share are over the questions that have samples."""

    questions: int
    with_samples: int
    with_gold: int
    positives: int
    negatives: int
    mean_positives: float
    mean_negatives: float
    share_without_minority: float
    majority_wrong_against_gold: int
    wrong_by_tie: int
    ties: int
    duplicates: int
    answers_dropped: int
    skipped_rows: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def text(self) -> str:
        """One `name: value` line for each field."""
        notes = {
            "majority_wrong_against_gold": "of the questions with both",
            "wrong_by_tie": "of these, the ones that a tie decided",
            "ties": "settled by a seeded hash",
            "duplicates": "same rationale and answer, counted once",
            "answers_dropped": "samples without a rationale or a readable answer",
        }
        lines = []
        for name, value in self.to_dict().items():
            figure = f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
            note = f"  ({notes[name]})" if name in notes else ""
            lines.append(f"{name.replace('_', ' ') + ':':<30}{figure:>10}{note}")
        return "\n".join(lines)


def summarize(questions: Sequence[Question], votes: Sequence[Vote], split_by: str, skipped: int) -> PrepareSummary:
    """The figures of `questions`; `votes` are those held for them, none where prepared rows were taken as they are."""
    sampled = [q for q in questions if q.positives or q.negatives]
    positives, negatives = sum(len(q.positives) for q in questions), sum(len(q.negatives) for q in questions)
    alone = sum(len(q.votes) < 2 if split_by == "gold" else not q.negatives for q in sampled)
    wrong = [
        q
        for q in questions
        if q.majority is not None
        and q.gold is not None
        and not same_answer(q.majority, q.gold, q.task or "text", parse_choices(q.question))
    ]
    return PrepareSummary(
        questions=len(questions),
        with_samples=len(sampled),
        with_gold=sum(q.gold is not None for q in questions),
        positives=positives,
        negatives=negatives,
        mean_positives=positives / max(len(sampled), 1),
        mean_negatives=negatives / max(len(sampled), 1),
        share_without_minority=alone / max(len(sampled), 1),
        majority_wrong_against_gold=len(wrong),
        wrong_by_tie=sum(map(_is_tie, wrong)),
        ties=sum(map(_is_tie, questions)),
        duplicates=sum(v.duplicates for v in votes),
        answers_dropped=sum(v.dropped for v in votes),
        skipped_rows=skipped,
    )


def _is_tie(question: Question) -> bool:
    counts = sorted(question.votes.values())
    return len(counts) > 1 and counts[-1] == counts[-2]
