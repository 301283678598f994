"""The project's own JSONL rows: prepared, sampled, or a bare question with perhaps a gold answer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qcrd_fast.config import TASKS
from qcrd_fast.data.choices import with_choices
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.formats.golds import gold_text, parse_choices_value
from qcrd_fast.data.formats.samples import read_sample, sample_list
from qcrd_fast.data.replies import DEFAULT, parse_choices
from qcrd_fast.data.schema import (
    Question,
    Rationale,
    RowError,
    check_text,
    get_list,
    get_text,
    get_weight,
)

_PREPARED_KEYS = ("positives", "negatives", "majority", "votes")
_SAMPLED_KEYS = {
    "id", "question", "context", "gold", "answer", "samples", "choices", "task", "domain", "split", "view", "critique",
    "weight", "scores",
}  # fmt: skip
_RATIONALE_KEYS = {"text", "answer", "source", "score", "scores", "view", "critique", "wrong_step"}


def is_native(row: Row) -> bool:
    """Whether every key with a meaning is one of ours; other rows with a question are read by `columns`."""
    if row.mapping:
        return False
    if "samples" not in row.values and len(row.values.keys() & set(_PREPARED_KEYS)) > 1:
        return True
    return "question" in row.values and row.known() <= _SAMPLED_KEYS | {"source"}


def native_row(values: dict[str, Any]) -> tuple[Question, tuple[Rationale, ...], str]:
    """(question, samples, "prepared" | "sampled" | "question") of a row that is known to be ours.

    Raises:
        RowError: a missing key, or a value of the wrong type.
    """
    parsed = read(Row(values))
    return parsed.question, parsed.samples, parsed.kind


def read(row: Row) -> Parsed:
    """A prepared row, a sampled row, or a question alone.

    Raises:
        RowError: a missing key, or a value of the wrong type.
    """
    values = row.values
    text = get_text(values, "question", required=True) or ""
    if not text.strip():
        raise RowError("question is empty")
    if values.get("id") == "":
        raise RowError("id is empty")
    task = get_text(values, "task")
    if task is not None and task not in TASKS:
        raise RowError(f"task is one of {', '.join(TASKS)}; got {task!r}")
    prepared = "samples" not in values and any(key in values for key in _PREPARED_KEYS)
    row.read |= {*_SAMPLED_KEYS, *_PREPARED_KEYS} if prepared else _SAMPLED_KEYS
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    if values.get("choices") is not None and not prepared:
        options, labels = parse_choices_value(values["choices"], "choices")
        text = with_choices(text, options, labels) if options else text
    if prepared:
        gold = get_text(values, "gold", numbers=True) or None
    else:
        golds = {key: gold_text(values.get(key), key, options, labels) or "" for key in ("gold", "answer")}
        if all(golds.values()) and not _is_one_answer(golds["gold"], golds["answer"], text):
            raise row.refuse("the gold answer", golds, "gold")
        gold = golds["gold"] or golds["answer"] or None
    question = Question(
        id=get_text(values, "id", numbers=True) or "",
        question=text if prepared else text.strip(),
        gold=gold,
        task=task,
        context=get_text(values, "context"),
        domain=get_text(values, "domain"),
        split=get_text(values, "split"),
        view=get_text(values, "view") or None,
        critique=get_text(values, "critique") or None,
        weight=get_weight(values, "weight"),
    )
    if prepared:
        question = _prepared(question, values)
        for side in ("positives", "negatives"):
            extra = {
                key for item in values[side] if isinstance(item, dict) for key in item if key not in _RATIONALE_KEYS
            }
            row.parts |= {f"{side}[].{key}" for key in extra}
        return Parsed(question, question.positives + question.negatives, "prepared", row.unread(), by_text=False)
    if "samples" in values:
        items = sample_list(values["samples"], "samples")
        samples = tuple(read_sample(item, f"samples[{index}]", row.parts) for index, item in enumerate(items))
        return Parsed(question, samples, "sampled", row.unread(), by_text=False)
    return Parsed(question, (), "question", row.unread(), by_text=False)


def _is_one_answer(a: str, b: str, question: str) -> bool:
    """Whether two golds of a row are one answer of some task."""
    return a.strip() == b.strip() or any(DEFAULT.same_golds(a, b, task, parse_choices(question)) for task in TASKS)


def _prepared(question: Question, row: dict[str, Any]) -> Question:
    """The question with the row's vote. A positive that is a bare string ends in the majority answer."""
    if "majority" not in row:
        raise RowError("missing key 'majority'")
    majority = get_text(row, "majority", numbers=True)
    positives = get_list(row, "positives", lambda item, where: _rationale(item, where, majority))
    negatives = get_list(row, "negatives", lambda item, where: _rationale(item, where, None))
    votes = {} if row.get("votes") is None else row["votes"]
    if not isinstance(votes, dict):
        raise RowError("votes expects an object of answer: count")
    # in parquet every row has the answers of all rows, null where they are others'
    votes = {answer: count for answer, count in votes.items() if count is not None}
    for answer, count in votes.items():
        check_text(answer, "an answer in votes")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise RowError(f"votes[{answer!r}] expects a count")
    return dataclasses.replace(question, majority=majority, votes=votes, positives=positives, negatives=negatives)


def _rationale(item: Any, where: str, answer: str | None) -> Rationale:
    if isinstance(item, str):
        item = {"text": item, "answer": answer}
    if not isinstance(item, dict):
        raise RowError(f"{where} expects a string or an object")
    try:
        score = item.get("score")
        if score is not None and (
            isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)
        ):
            raise RowError("score expects a number")
        text = get_text(item, "text", required=True) or ""
        if not text.strip():
            raise RowError("text is empty")
        wrong_step = item.get("wrong_step")
        if wrong_step is not None and (type(wrong_step) is not int or wrong_step < 1):
            raise RowError("wrong_step expects the number of a step, from 1")
        return Rationale(
            text,
            get_text(item, "answer", numbers=True),
            get_text(item, "source"),
            score,
            view=get_text(item, "view") or None,
            critique=get_text(item, "critique") or None,
            wrong_step=wrong_step,
        )
    except RowError as error:
        raise RowError(f"{where}: {error}") from None
