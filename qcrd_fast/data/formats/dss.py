"""Distilling Step-by-Step's folders, as they are published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.data.choices import with_choices
from qcrd_fast.data.files import open_rows
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.schema import BadRow, Question, Rationale, RowError, check_text, get_list, get_text
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable

SPLITS = ("train", "test", "valid")
_ROWS_NAME = re.compile(rf"(.+)_({'|'.join(SPLITS)})\.json")
_COT_NAME = re.compile(rf"({'|'.join(SPLITS)})_CoT_(\d+)\.json")
_NEXT_QUESTION = re.compile(r"\n[ \t]*\n\s*Q:")
_ANSWER_IS = re.compile(r"\b(?:So the|The) answer is\b")


_OWN = {"id", "premise", "hypothesis", "label", "question", "choices", "answer", "input"}


def is_dss(row: Row) -> bool:
    """Return whether a row is from svamp or the entailment sets; cqa is recognised by its sample files."""
    values = row.values
    asks = row.key("question") == "input" and "label" in values and not row.has("completion")
    return "premise" in values or asks


def read(row: Row, files: DssFiles | None) -> Parsed:
    """Read a row of a split's file; its sample is in another file."""
    row.read |= _OWN
    return Parsed(dss_row(row.values, files.split if files else None), kind="dss", unread=row.unread(), by_text=False)


def dss_row(row: dict[str, Any], split: str | None) -> Question:
    """Read a Distilling Step-by-Step row of svamp, cqa or the entailment sets.

    Keys: `input` and `label`; `question`, `choices` and `answer`; `premise`, `hypothesis` and `label`.
    """
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


def dss_sample(text: str, source: str) -> Rationale:
    """Split a released completion at "The answer is" and drop invented further questions."""
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
    """Return the files of a Distilling Step-by-Step folder or `NAME_{split}.json`; None for another path.

    Raises:
        InputError: the folder lacks the split.
    """
    if os.path.isdir(path):
        rows = path / f"{path.resolve().name}_{split or 'train'}.json"
        if not rows.is_file():
            found = sorted(file.name for file in path.glob("*.json"))
            there = ", ".join(found) or "no .json"
            raise InputError(
                f"{printable(path)}: no {printable(rows.name)} in this folder (there: {there}); of other rows, name "
                f"the file"
            )
    else:
        rows = path
    match = _ROWS_NAME.fullmatch(rows.name)
    if match is None:
        return None
    numbered = [
        (name, file) for file in (rows.parent / "llm").glob("*.json") if (name := _COT_NAME.fullmatch(file.name))
    ]
    samples = sorted((int(name[2]), file) for name, file in numbered if name[1] == match[2])
    return DssFiles(rows, match[2], tuple(file for _, file in samples))


def is_sample_list(path: Path) -> bool:
    return _COT_NAME.fullmatch(path.name) is not None


def iter_samples(files: DssFiles) -> Iterator[str | BadRow]:
    """The released completions of a split, in row order."""
    for path in files.samples:
        for line, text in open_rows(path):
            if isinstance(text, BadRow):
                yield text
                continue
            try:
                yield check_text(text, "a sample")
            except RowError as error:
                yield BadRow(printable(path), line, str(error))
