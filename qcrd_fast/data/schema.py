"""The rows of the data files: their types, and checks of single fields."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CHOSEN = "chosen"  # the source of the better reply of a preference pair, whose answer counts as the majority


@dataclass(frozen=True, slots=True)
class Rationale:
    """One rationale, with the answer it ends in, who said it and the discriminator's score.

    `reply`: `text` is a raw reply from which reasoning, rationale and answer are still to be read; never written to a file.
    """

    text: str
    answer: str | None = None
    source: str | None = None
    score: float | None = None
    reply: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """One prepared row: a question with its gold answer, the vote, and the rationales on either side of it."""

    id: str
    question: str
    context: str | None = None
    gold: str | None = None
    majority: str | None = None
    votes: Mapping[str, int] = field(default_factory=dict)
    task: str | None = None
    domain: str | None = None
    split: str | None = None
    positives: tuple[Rationale, ...] = ()
    negatives: tuple[Rationale, ...] = ()


class NumberText(str):
    """The text of what was a number in its file, so that its point is one whatever `--decimal` says of texts."""

    __slots__ = ()


class BadRow(NamedTuple):
    """A row that cannot be used, and why. `str()` gives `file:line: reason`."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RowError(ValueError):
    """What is wrong with one row; the reader adds the file and the line."""


def require(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError(f"expected an object, got {kind_of(row)}")
    return row


def check_text(value: Any, key: str) -> str:
    """`value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"{key} expects a string, got {kind_of(value)}")
    if "\0" in value:
        raise RowError(f"{key} has a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(f"{key} has a lone surrogate") from None
    return value


def get_text(
    row: dict[str, Any], key: str, *, required: bool = False, numbers: bool = False, booleans: bool = False
) -> str | None:
    """The string at `key`; None where it is missing or null.

    With `numbers`, a number counts as its own text; with `booleans`, true and false as yes and no.
    """
    value = row.get(key)
    if value is None:
        if required:
            raise RowError(f"missing key {key!r}" if key not in row else f"{key} is null")
        return None
    if booleans and isinstance(value, bool):
        value = "yes" if value else "no"
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = NumberText(repr(value))
    return check_text(value, key)


def get_answer(row: dict[str, Any], key: str) -> str | None:
    """An answer: a string, a number as its own text, a boolean as yes or no; None where it is missing, null or empty."""
    return get_text(row, key, numbers=True, booleans=True) or None


def get_list(row: dict[str, Any], key: str, parse: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if key not in row:
        raise RowError(f"missing key {key!r}")
    if not isinstance(row[key], list):
        raise RowError(f"{key} expects a list, got {kind_of(row[key])}")
    return tuple(parse(item, f"{key}[{index}]") for index, item in enumerate(row[key]))


def kind_of(value: Any) -> str:
    """What a JSON value is, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


def with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question followed by `Answer Choices:` and a line `(a) ...` for each choice."""
    lines = [f"({chr(ord('a') + index)}) {choice}" for index, choice in enumerate(choices)]
    return "\n".join([question.rstrip(), "Answer Choices:", *lines])


def question_text(question: Question) -> str:
    """What a prompt shows: the context, if there is one, and the question with its choices."""
    return f"{question.context}\n{question.question}" if question.context else question.question


def text_key(question: Question) -> str:
    """What two spellings of one question have in common: NFKC, and every run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", question_text(question)).split())


_DROPPED = re.compile(r"['\"\u2018\u2019\u201c\u201d](?!\d)|[.,;:!?](?![.,;:!?]?\d)")
_BESIDE = re.compile(r"\s*([^\w\s])\s*")


def leak_key(question: Question) -> str:
    """What questions have in common that differ in case, in white space beside signs or in punctuation alone.

    `.,;:!?` and quotes are dropped, but where a digit follows (`2.5`, `.5`, `1,000`); operators, signs and brackets are kept.
    """
    text = text_key(question).casefold()
    text = _DROPPED.sub(
        lambda sign: "" if sign[0] in "'\"\u2018\u2019\u201c\u201d" else " ", unicodedata.normalize("NFKC", text)
    )
    return _BESIDE.sub(r"\1", " ".join(text.split()))


def question_key(identity: str) -> int:
    """63 bits that stand for a question's id in keyed selections."""
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1
