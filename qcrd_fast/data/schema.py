"""The rows of the data files: their types, and checks of single fields."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CHOSEN = "chosen"  # the source of the better reply of a preference pair, whose answer counts as the majority
REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Rationale:
    """One rationale with its answer, its source and its quality score.

    view: the style that it is written in, which its prompt names (`models.views`). critique: what was said of it, or of
    what it is a revision of. wrong_step: its first wrong step, from 1.

    `reply`: `text` is a raw reply from which reasoning, rationale and answer are still to be read; never written to a
    file.
    `truncated`: the reply was cut at its maximum length, so only an announced answer counts; never written either.
    """

    text: str
    answer: str | None = None
    source: str | None = None
    score: float | None = None
    reply: bool = False
    truncated: bool = False
    view: str | None = field(default=None, repr=False)
    critique: str | None = field(default=None, repr=False)
    wrong_step: int | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Question:
    """One prepared row: a question with its gold answer, the vote, and the rationales on either side of it.

    view: the style of its rationales that name none, and of what a student is asked for. weight: what the question
    counts in training, 1 unless set; of mean 1 over the rows where `select --weight` wrote it.
    """

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
    view: str | None = field(default=None, repr=False)
    critique: str | None = field(default=None, repr=False)
    weight: float | None = field(default=None, repr=False)


class NumberText(str):
    """Text of a JSON number: its point is a decimal point, whatever `--decimal` says."""

    __slots__ = ()


class BadRow(NamedTuple):
    """A row that cannot be used, and why. `str()` gives `file:line: reason`."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RowError(ValueError):
    """A fault in one row; the reader adds file and line."""


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
    """Return an answer as text: strings, numbers, booleans as yes or no; None if missing, null or empty."""
    return get_text(row, key, numbers=True, booleans=True) or None


def get_list(row: dict[str, Any], key: str, parse: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if key not in row:
        raise RowError(f"missing key {key!r}")
    if not isinstance(row[key], list):
        raise RowError(f"{key} expects a list, got {kind_of(row[key])}")
    return tuple(parse(item, f"{key}[{index}]") for index, item in enumerate(row[key]))


def kind_of(value: Any) -> str:
    """Name the type of a JSON value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


MISSING = frozenset(  # as tables write that there is no value; `none` and `Null` may be words of an answer
    {"NaN", "nan", "NAN", "None", "null", "NULL", "N/A", "n/a", "N/a", "<NA>", "<na>"}
)


def question_text(question: Question) -> str:
    """Return the prompt text: context, if any, and question with its choices."""
    return f"{question.context}\n{question.question}" if question.context else question.question


_RAISED = re.compile(r"(?<=\d)[\u00b9\u00b2\u00b3\u2070\u2071\u2074-\u207f]+")


def folded(text: str) -> str:
    """The text in NFKC, where what is raised over a number stays so: `5\u00b2` is `5^2`, and not `52`."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", _RAISED.sub(lambda raised: f"^{raised[0]}", text))


def one_line(text: str) -> str:
    """The text `folded`, its white space collapsed."""
    return " ".join(folded(text).split())


def text_key(question: Question) -> str:
    """Return the key that spellings of one question share."""
    return one_line(question_text(question))


_DROPPED = re.compile(r"['\"\u2018\u2019\u201c\u201d](?!\d)|[.,;:!?](?![.,;:!?]?\d)")
_BESIDE = re.compile(r"\s*([^\w\s])\s*")


def leak_key(question: Question) -> str:
    """Return the key shared by questions that differ only in case, punctuation or white space beside signs.

    `.,;:!?` and quotes are dropped, but where a digit follows (`2.5`, `.5`, `1,000`); operators, signs and brackets are
    kept.
    """
    text = text_key(question).casefold()
    text = _DROPPED.sub(
        lambda sign: "" if sign[0] in "'\"\u2018\u2019\u201c\u201d" else " ", unicodedata.normalize("NFKC", text)
    )
    return _BESIDE.sub(r"\1", " ".join(text.split()))


def later_fields(question: Question) -> str:
    """What of a question its `repr` leaves out, so that the digests of rows without any of it are what they were before
    there were such fields; empty where there is nothing."""
    parts = [(r.view, r.critique) for r in (*question.positives, *question.negatives)]
    own = (question.view, question.critique, question.weight)
    return repr((own, parts)) if any(v is not None for some in (own, *parts) for v in some) else ""


def get_weight(row: dict[str, Any], key: str) -> float | None:
    """A finite number of at least 0 at `key`; None where it is missing or null."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RowError(f"{key} expects a finite number of at least 0")
    return float(value)


def question_key(identity: str) -> int:
    """Return 63 bits that identify a question in keyed selections."""
    return int.from_bytes(hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1
