"""Mentor-KD's JSON rows."""

from __future__ import annotations

from typing import Any

from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.schema import Question, Rationale, RowError, get_text

_OWN = {"input", "chain", "completion", "answer", "initial_correct"}


def is_mentor_kd(row: Row) -> bool:
    """Return whether a row has `input` and another Mentor-KD key, and no key of another tool.

    A `completion` is the answer of a `chain`; alone it is another tool's sample.
    """
    keys = row.values.keys()
    chained = "chain" in keys or "completion" not in keys
    return "input" in keys and bool(keys & _OWN - {"input"}) and chained and row.known() <= {*_OWN, "id", "source"}


def read(row: Row, name: str) -> Parsed:
    """A row of the file `name`."""
    get_text(row.values, "input", required=True)
    row.read |= _OWN
    return Parsed(*mentor_row(row.values, name), kind="mentor-kd", unread=row.unread(), by_text=False)


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
