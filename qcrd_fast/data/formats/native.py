"""The project's own JSONL rows: prepared, sampled, or a bare question with perhaps a gold answer."""

from __future__ import annotations

import collections
import math
from typing import Any

from qcrd_fast.config import TASKS
from qcrd_fast.data.schema import Question, Rationale, RowError, check_text, get_list, get_text, with_choices

_PREPARED_KEYS = ("positives", "negatives", "majority", "votes")


def native_row(row: dict[str, Any]) -> tuple[Question, tuple[Rationale, ...], str]:
    """(question, samples, "prepared" | "sampled" | "question"). Keys that are not known are let pass.

    Raises:
        RowError: a missing key, or a value of the wrong type.
    """
    text = get_text(row, "question", required=True) or ""
    if not text.strip():
        raise RowError("question is empty")
    if row.get("id") == "":
        raise RowError("id is empty")
    task = get_text(row, "task")
    if task is not None and task not in TASKS:
        raise RowError(f"task is one of {', '.join(TASKS)}; got {task!r}")
    prepared = "samples" not in row and any(key in row for key in _PREPARED_KEYS)
    if row.get("choices") is not None and not prepared:
        text = with_choices(text, _choices(row))
    gold = _gold(row, "gold")
    question = Question(
        id=get_text(row, "id", numbers=True) or "",
        question=text if prepared else text.strip(),
        context=get_text(row, "context"),
        gold=gold if gold is not None or prepared else _gold(row, "answer") or _gold(row, "answerKey"),
        task=task,
        domain=get_text(row, "domain"),
        split=get_text(row, "split"),
    )
    if prepared:
        question = _prepared(question, row)
        return question, question.positives + question.negatives, "prepared"
    if "samples" in row:
        return question, get_list(row, "samples", _sample), "sampled"
    return question, (), "question"


def _choices(row: dict[str, Any]) -> tuple[str, ...]:
    """The options of a row: a list of texts, or an object with the list `text`."""
    if isinstance(row["choices"], dict):
        return get_list(row["choices"], "text", check_text)
    return get_list(row, "choices", check_text)


def _gold(row: dict[str, Any], key: str) -> str | None:
    """The gold answer at `key`; a whole number beside choices is the index of one, from 0 on, unless it is one itself."""
    gold, choices = row.get(key), row.get("choices")
    if type(gold) is int and isinstance(choices, list) and 0 <= gold < len(choices) and str(gold) not in choices:
        return f"({chr(ord('a') + gold)})"
    return get_text(row, key, numbers=True, booleans=True) or None


def _prepared(question: Question, row: dict[str, Any]) -> Question:
    """The question with the row's vote. A positive that is a bare string ends in the majority answer."""
    if "majority" not in row:
        raise RowError("missing key 'majority'")
    majority = get_text(row, "majority", numbers=True)
    positives = get_list(row, "positives", lambda item, where: _rationale(item, where, majority))
    negatives = get_list(row, "negatives", lambda item, where: _rationale(item, where, None))
    votes = row.get("votes")
    if votes is None:
        votes = dict(collections.Counter(r.answer for r in positives + negatives if r.answer is not None).most_common())
    if not isinstance(votes, dict):
        raise RowError("votes expects an object of answer: count")
    for answer, count in votes.items():
        check_text(answer, "an answer in votes")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise RowError(f"votes[{answer!r}] expects a count")
    fields = {name: getattr(question, name) for name in ("id", "question", "context", "gold", "task", "domain", "split")}
    return Question(**fields, majority=majority, votes=votes, positives=positives, negatives=negatives)


def _rationale(item: Any, where: str, answer: str | None) -> Rationale:
    if isinstance(item, str):
        item = {"text": item, "answer": answer}
    if not isinstance(item, dict):
        raise RowError(f"{where} expects a string or an object")
    try:
        score = item.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)):
            raise RowError("score expects a number")
        text = get_text(item, "text", required=True) or ""
        if not text.strip():
            raise RowError("text is empty")
        return Rationale(text, get_text(item, "answer", numbers=True), get_text(item, "source"), score)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None


def _sample(item: Any, where: str) -> Rationale:
    """A sample; a bare string, or an object without an answer of its own, is a raw reply that ends in one."""
    if isinstance(item, str):
        return Rationale(check_text(item, where), reply=True)
    if not isinstance(item, dict):
        raise RowError(f"{where} expects a string or an object")
    try:
        text = get_text(item, "rationale", required=True) or ""
        answer = get_text(item, "answer", numbers=True, booleans=True)
        return Rationale(text, answer, get_text(item, "source"), reply="answer" not in item)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None
