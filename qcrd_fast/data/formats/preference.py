"""Preference pairs: chosen and rejected replies are samples, and the chosen one is the majority."""

from __future__ import annotations

import dataclasses
from typing import Any

from qcrd_fast.data.formats import golds
from qcrd_fast.data.formats.columns import question_text
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.formats.samples import is_cut, read_sample
from qcrd_fast.data.formats.turns import as_list, exchange, is_turns
from qcrd_fast.data.schema import CHOSEN, REJECTED, Rationale, RowError


def read(row: Row) -> Parsed:
    """A row with `chosen` and `rejected`, as texts or as conversations, which may hold the question."""
    asked: set[str] = set()
    samples = []
    for role, source in (("chosen", CHOSEN), ("rejected", REJECTED)):
        key = row.key(role) or role
        sample, question = _side(row.take(key) if key in row.values else None, key, row)
        samples.append(dataclasses.replace(sample, source=source))
        asked |= {question} if question is not None else set()
    if len(asked) > 1:
        raise RowError("chosen and rejected answer different questions")
    if row.key("question"):
        question = question_text(row)[0]
    elif asked:
        question = asked.pop()
    else:
        raise RowError("no question: chosen and rejected are texts, and there is no prompt")
    return Parsed(golds.make_question(row, question), tuple(samples), unread=row.unread())


def _side(value: Any, key: str, row: Row) -> tuple[Rationale, str | None]:
    """(reply, question or None)"""
    value = as_list(value)
    if is_turns(value):
        question, reply, system = exchange(value, key)
        if reply is None:
            raise RowError(f"{key} has no turn of the assistant")
        if system:
            row.parts.add(f"{key}[system]")
        return Rationale(reply, reply=True, truncated=is_cut(value[-1])), question
    if value is None:
        raise RowError(f"missing key {key!r}")
    sample = read_sample(value, key, row.parts)
    return Rationale(sample.text, reply=True, truncated=sample.truncated), None
