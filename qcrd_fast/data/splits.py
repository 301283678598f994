"""Splits of questions: held-out rows, overlap with a test set, one split, task and label, golds to compare with."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from qcrd_fast.data.choices import parse_choices
from qcrd_fast.data.replies import DEFAULT
from qcrd_fast.data.schema import Question, leak_key, question_text
from qcrd_fast.errors import InputError

log = logging.getLogger(__name__)

SPLITS = {  # by the name that rows have here: as data sets write it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing"),
}


def split_name(written: str | None) -> str | None:
    """A row's split under its usual name, whatever its case: `Dev` is validation. Another name stays as it is; an empty
    one is None."""
    name = (written or "").strip()
    return next((usual for usual, names in SPLITS.items() if name.casefold() in names), name or None)


def hold_out(questions: Sequence[Question], fraction: float, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Return (train, validation) in the given order; depends only on ids and seed.

    `fraction` is rounded to whole questions, at least one on each side where there are two and it is not 0.
    """
    count = round(fraction * len(questions))
    if fraction > 0 and len(questions) > 1:
        count = min(max(count, 1), len(questions) - 1)
    ranked = sorted(questions, key=lambda q: hashlib.sha256(f"{seed}\0{q.id}".encode()).digest())
    held = {question.id for question in ranked[:count]}
    return [q for q in questions if q.id not in held], [q for q in questions if q.id in held]


def drop_overlap(train: Sequence[Question], test: Iterable[Question]) -> tuple[list[Question], int]:
    """Drop training questions that are in `test` up to punctuation and case; also return how many."""
    seen = {leak_key(question) for question in test}
    kept = [question for question in train if leak_key(question) not in seen]
    return kept, len(train) - len(kept)


def of_split(questions: list[Question], wanted: str, where: str) -> list[Question]:
    """The rows of a split ("validation", "test"), else those without a split, else, with a warning, those of the one
    split that is there.

    Raises `InputError`, naming the file `where`, if there are several others: they are not for this.
    """
    for name in (wanted, None):
        if found := [q for q in questions if q.split == name]:
            return found
    there = sorted({str(q.split) for q in questions})
    if len(there) > 1:
        raise InputError(f"{where}: no question is of split {wanted} (there: {', '.join(there)})")
    if there:
        log.warning("%s: all questions are of split %s, none of %s", where, there[0], wanted)
    return questions


def main_task(questions: Sequence[Question]) -> str:
    """The answer type of nearly all questions, or `mixed`: then each is read as its own."""
    task, count = Counter(q.task or "text" for q in questions).most_common(1)[0]
    return task if count >= 0.95 * len(questions) else "mixed"


def label_of(question: Question, label: str | None) -> str | None:
    """The answer that the label task teaches (`--label`)."""
    if label == "gold":
        return question.gold
    if label == "majority":
        return question.majority
    return question.gold if question.gold is not None else question.majority


def comparable(questions: Sequence[Question], task: str, where: str) -> list[Question]:
    """The questions whose answer can be read as one of the task, so that a prediction can be right; warns of others.

    Raises `InputError`, naming the option `where`, if there are only others.
    """
    unread = [q for q in questions if not _has_value(q, q.task or "text" if task == "mixed" else task)]
    if not unread:
        return list(questions)
    first = f"{unread[0].id!r}: {label_of(unread[0], None)!r}"
    if len(unread) == len(questions):
        raise InputError(f"{where}: no answer can be read as {task} (--task), such as that of {first}")
    log.warning(
        "%s: left out %d of %d questions, whose answer cannot be read as %s (--task), such as %s",
        where, len(unread), len(questions), task, first,
    )  # fmt: skip
    left = {id(q) for q in unread}
    return [q for q in questions if id(q) not in left]


def _has_value(question: Question, task: str) -> bool:
    choices = parse_choices(question_text(question)) if task == "choice" else ()
    return DEFAULT.answer(label_of(question, None) or "", task, choices)[0] is not None
