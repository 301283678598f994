"""Published teacher data as it is: Mentor-KD's JSON rows and Distilling Step-by-Step's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.errors import InputError
from qcrd_fast.rows import BadRow, Question, Rationale, RowError, check_text, get_list, get_text, iter_rows
from qcrd_fast.utils.files import shown

SPLITS = ("train", "test", "valid")
_ROWS_NAME = re.compile(rf"(.+)_({'|'.join(SPLITS)})\.json")
_COT_NAME = re.compile(rf"({'|'.join(SPLITS)})_CoT_(\d+)\.json")
_NEXT_QUESTION = re.compile(r"\n[ \t]*\n\s*Q:")
_ANSWER_IS = re.compile(r"\b(?:So the|The) answer is\b")


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


def dss_row(row: dict[str, Any], split: str | None) -> Question:
    """A Distilling Step-by-Step row: svamp's `input` and `label`, cqa's `question`, `choices` and `answer`, or the
    `premise`, `hypothesis` and `label` of its entailment sets."""
    if "premise" in row:
        context: str | None = get_text(row, "premise", required=True)
        question, gold, task = get_text(row, "hypothesis", required=True), get_text(row, "label", required=True), "text"
    elif "choices" in row:
        context, task = None, "choice"
        question = with_choices(get_text(row, "question", required=True) or "", get_list(row, "choices", check_text))
        gold = get_text(row, "answer", required=True)
    else:
        context, task = None, ""
        question, gold = get_text(row, "input", required=True), get_text(row, "label", required=True, numbers=True)
    identity = get_text(row, "id", numbers=True) or ""
    return Question(identity, (question or "").strip(), context, gold or None, task=task or None, split=split)


def with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question followed by `Answer Choices:` and a line `(a) ...` for each choice."""
    lines = [f"({chr(ord('a') + index)}) {choice}" for index, choice in enumerate(choices)]
    return "\n".join([question.rstrip(), "Answer Choices:", *lines])


def dss_sample(text: str, source: str) -> Rationale:
    """A released completion: the rationale up to "The answer is", and what follows it; the invented next questions cut."""
    text = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    markers = list(_ANSWER_IS.finditer(text))
    if not markers:
        return Rationale(text.strip(), None, source)
    return Rationale(text[: markers[-1].start()].strip(), text[markers[-1].end() :].strip() or None, source)


class DssFiles(NamedTuple):
    """The rows of one split, and the files of its samples in the order of their numbers."""

    rows: Path
    split: str
    samples: tuple[Path, ...]


def find_dss(path: Path, split: str | None) -> DssFiles | None:
    """The files of a Distilling Step-by-Step folder or `NAME_{split}.json`; None where `path` is no such thing.

    Raises:
        InputError: the folder lacks the split.
    """
    if os.path.isdir(path):
        rows = path / f"{path.resolve().name}_{split or 'train'}.json"
        if not rows.is_file():
            found = sorted(file.name for file in path.glob("*.json"))
            raise InputError(f"{shown(path)}: no {shown(rows.name)} in this folder (there: {', '.join(found) or 'no .json'})")
    else:
        rows = path
    match = _ROWS_NAME.fullmatch(rows.name)
    if match is None:
        return None
    numbered = [(name, file) for file in (rows.parent / "llm").glob("*.json") if (name := _COT_NAME.fullmatch(file.name))]
    samples = sorted((int(name[2]), file) for name, file in numbered if name[1] == match[2])
    return DssFiles(rows, match[2], tuple(file for _, file in samples))


def is_sample_list(path: Path) -> bool:
    return _COT_NAME.fullmatch(path.name) is not None


def iter_samples(files: DssFiles) -> Iterator[str | BadRow]:
    """The released completions of a split, in row order."""
    for path in files.samples:
        for line, text in iter_rows(path):
            if isinstance(text, BadRow):
                yield text
                continue
            try:
                yield check_text(text, "a sample")
            except RowError as error:
                yield BadRow(shown(path), line, str(error))
