"""Mentor-KD's JSON rows."""

from __future__ import annotations

from typing import Any

from qcrd_fast.data.schema import Question, Rationale, RowError, get_text


def mentor_row(row: dict[str, Any], source: str) -> tuple[Question, tuple[Rationale, ...]]:
    """A Mentor-KD row: `input`, gold `answer`, and perhaps a `chain` with the `completion` it ends in.

    A chain without a completion ends in the gold answer where `initial_correct` says so, else in nothing readable.
    """
    question = Question(
        id="",
        question=(get_text(row, "input", required=True) or "").strip(),
        gold=get_text(row, "answer", required=True, numbers=True) or None,
    )
    chain = get_text(row, "chain", required="completion" in row or "initial_correct" in row)
    if chain is None:
        return question, ()
    answer = get_text(row, "completion", numbers=True)
    correct = row.get("initial_correct")
    if correct is not None and not isinstance(correct, bool):
        raise RowError("initial_correct expects true or false")
    if answer is None and correct:
        answer = question.gold
    return question, (Rationale(chain.strip(), answer, source),)
