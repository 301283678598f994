"""What belongs to a question beside its text: choices in every form, a gold answer in every form."""

from __future__ import annotations

import re
from typing import Any

from qcrd_fast.config import TASKS
from qcrd_fast.data.formats.fields import Row
from qcrd_fast.data.formats.turns import as_list
from qcrd_fast.data.schema import Question, RowError, check_text, get_text, with_choices

GOLD = "gold"  # the source of a rationale that is the gold answer's own worked solution
_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*(?=\S)")
_YES_NO = {True: ("yes", "true"), False: ("no", "false")}


def make_question(row: Row, text: str, *, gold_key: str | None = None) -> Question:
    """The question of a row: its text with the choices, its gold (by default at the clearest gold key), and the rest.

    Raises:
        RowError: no text, choices or a gold that cannot be read, or keys that contradict each other.
    """
    if not text.strip():
        raise RowError("the question is empty")
    options, labels = choices(row)
    gold_key = gold_key or row.key("gold")
    gold = gold_text(row.take(gold_key), gold_key, options, labels) if gold_key else None
    task = row.key("task")
    context = row.key("context")
    return Question(
        id=_identity(row),
        question=with_choices(text.strip(), options) if options else text.strip(),
        context=row.take(context) if context and isinstance(row.values[context], str) else None,
        gold=gold,
        task=row.take(task) if task and row.values[task] in TASKS else None,
        domain=_string(row, "domain"),
        split=_string(row, "split"),
    )


def source(row: Row) -> str | None:
    return _string(row, "source")


def _string(row: Row, role: str) -> str | None:
    key = row.key(role)
    return row.take(key) if key and isinstance(row.values[key], str) else None


def _identity(row: Row) -> str:
    key = row.key("id")
    if key is None or isinstance(row.values[key], bool) or not isinstance(row.values[key], str | int):
        return ""
    row.read.add(key)
    return get_text(row.values, key, numbers=True) or ""


def choices(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(texts, labels) of a row's choices, in the order of their labels where these are letters or numbers."""
    key = row.key("choices")
    if key is None or is_api_choices(row.values[key]):
        letters = [key for name in "abcdefghij" if (key := _column(row, name)) is not None]
        if len(letters) < 2 or letters != [_column(row, name) for name in "abcdefghij"[: len(letters)]]:
            return (), ()
        return tuple(check_text(_plain_value(row.take(key)), key) for key in letters), ()
    return parse_choices_value(row.take(key), key)


def _column(row: Row, letter: str) -> str | None:
    names = (letter, letter.upper(), f"option_{letter}", f"option_{letter.upper()}", f"Option {letter.upper()}")
    return next((name for name in names if row.values.get(name) not in (None, "")), None)


def _plain_value(value: Any) -> Any:
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_choices_value(value: Any, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(texts, labels) of choices: a list of texts or of objects, {"text": [...], "label": [...]} or {"A": text, ...}.

    Raises:
        RowError: they are none of these.
    """
    if isinstance(value, str):
        value = as_list(value)
    labels: list[Any] = []
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, dict):
        labels, value = list(value), list(value.values())
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        labels, value = (
            [item.get("label", item.get("key")) for item in value],
            [item.get("text", item.get("value")) for item in value],
        )
        labels = [] if None in labels else labels
    if not isinstance(value, list):
        raise RowError(f"{key} expects a list")
    texts = [check_text(_plain_value(item), f"{key}[{index}]") for index, item in enumerate(value)]
    if labels:
        names = [check_text(_plain_value(label), "a label of the choices").strip() for label in labels]
        if len(names) != len(texts) or len(set(names)) < len(names):
            raise RowError(f"{key}: {len(texts)} texts, but {len(set(names))} labels")
        pairs = sorted(zip(names, texts, strict=True), key=lambda pair: (len(pair[0]), pair[0].casefold()))
        return tuple(text for _, text in pairs), tuple(name for name, _ in pairs)
    marks = [_LABEL.match(text) for text in texts]
    if texts and all(mark and mark[1].lower() == chr(ord("a") + index) for index, mark in enumerate(marks)):
        texts = [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark]  # "A) 21"
    return tuple(texts), ()


def is_api_choices(value: Any) -> bool:
    """Whether `choices` are the replies of an API rather than the options of a question."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict) and ("message" in item or ("text" in item and "label" not in item and "index" in item))
            for item in value
        )
    )


def gold_text(value: Any, key: str, options: tuple[str, ...] = (), labels: tuple[str, ...] = ()) -> str | None:
    """A gold answer as text: a label or an index (from 0) as the choice's text, a boolean as yes or no.

    Raises:
        RowError: an index beyond the choices, several answers, or a value of another type.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise RowError(f"{key} has {len(value)} answers; one is expected")
    if isinstance(value, bool):
        words = _YES_NO[value]
        return next((option for option in options if option.casefold().strip(" .") in words), words[0])
    if isinstance(value, float) and options and value.is_integer():
        value = int(value)
    if isinstance(value, int) and options:
        if not 0 <= value < len(options):
            raise RowError(f"{key} is choice {value}, counted from 0; there are {len(options)}")
        return options[value]
    text = get_text({key: value}, key, numbers=True) or None
    if text is None:
        return None
    if text.strip() in labels and text not in options:
        return options[labels.index(text.strip())]
    if options and text.strip().isdigit() and text.strip() not in options:
        raise RowError(f"{key} is {text!r}, which is none of the choices and no label; an index is written without quotes")
    return text
