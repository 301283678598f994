"""Parse choices and gold answers in all their forms."""

from __future__ import annotations

import ast
import re
from typing import Any

from qcrd_fast.config import TASKS
from qcrd_fast.data.answers import option_value
from qcrd_fast.data.choices import parse_choices, with_choices
from qcrd_fast.data.formats.fields import Row, plain
from qcrd_fast.data.formats.turns import as_list
from qcrd_fast.data.schema import MISSING, NumberText, Question, RowError, check_text, get_text

GOLD = "gold"  # the source of a rationale that is the gold answer's own worked solution
_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*(?=\S)")
_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_LITERALS_TOUCH = re.compile(r"0\s+0|00")
_ARRAY = re.compile(r"array\((\[[^\[\]]*\])(?:,\s*dtype=[^()]*)?\)")
_LETTERED = re.compile(r"(?:(?<=[\s,;])|^)\(?([A-Ha-h])\s?[).:](?:\s+|(?=\S))")
_NUMBERED = re.compile(r"^\s*\(?(\d{1,2})\s?[).:]\s+", re.MULTILINE)
_REPLY_KEYS = {"index", "finish_reason", "stop_reason", "logprobs"}
_INDEX_NAMES = ("answerindex", "answeridx", "correctindex")
_SAMPLED = ("samples", "completion", "rationale", "prediction", "messages", "chosen")
_YES_NO = {True: ("yes", "true"), False: ("no", "false")}


AUTO = ""  # the gold is at the clearest key


def make_question(row: Row, text: str, *, gold_key: str | None = AUTO) -> Question:
    """The question of a row: its text with the choices, its gold (None: it has none), and the rest.

    Raises:
        RowError: no text, choices or a gold that cannot be read, or keys that contradict each other.
    """
    if not text.strip():
        raise RowError("the question is empty")
    options, labels = choices(row)
    if gold_key == AUTO:
        gold_key = next(iter(gold_keys(row)), None)
    counted = "gold" in row.mapping or (gold_key is not None and plain(gold_key) in _INDEX_NAMES)
    gold = gold_text(row.take(gold_key), gold_key, options, labels, counted=counted) if gold_key else None
    task = row.key("task")
    context = row.key("context")
    return Question(
        id=_identity(row),
        question=with_choices(text.strip(), options, labels) if options else text.strip(),
        context=row.take(context) if context and isinstance(row.values[context], str) else None,
        gold=gold,
        task=row.take(task) if task and row.values[task] in TASKS else None,
        domain=_string(row, "domain"),
        split=_string(row, "split"),
        view=_string(row, "view"),
        critique=_string(row, "critique"),
    )


def gold_keys(row: Row) -> list[str]:
    """Return the keys of a gold answer, clearest first. Beside samples, `correct: true` or `correct: 2` is not one.

    Raises:
        RowError: a label beside a reply that says true or false, or 1 or 0, so is of the reply or a gold.
    """
    keys = row.keys("gold")
    sampled = any(map(row.has, _SAMPLED)) or bool(row.numbered())
    if "gold" in row.mapping or not sampled or choices(row)[0]:
        return [key for key in keys if plain(key) != "correct" or not _is_flag(row.values[key])] if sampled else keys
    for key in keys:
        if plain(key) == "label" and row.has("completion") and _is_flag(row.values[key], "01"):
            if "completion" in row.mapping or "prediction" in row.mapping:
                return [other for other in keys if other != key]
            raise RowError(
                f"{key} may be of the reply or a gold answer; if the latter: --map gold={key}; if the former, replies "
                f"are voted on without it: --map completion={row.key('completion')}"
            )
    return [key for key in keys if plain(key) != "correct" or not _is_flag(row.values[key], "0123456789.")]


def _is_flag(value: Any, digits: str = "") -> bool:
    """Return whether `value` marks a sample as right or wrong, or counts the right ones, as `digits` allow."""
    if isinstance(value, bool):
        return True
    text = (str(int(value)) if value == int(value) else str(value)) if isinstance(value, int | float) else value
    return isinstance(text, str) and (
        text.strip().casefold() in ("true", "false")
        or (
            bool(digits)
            and bool(text.strip())
            and not text.strip().strip(digits)
            and (len(digits) > 2 or len(text.strip()) == 1)
        )
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
        columns = row.options()
        texts = tuple(check_text(_plain_value(row.take(key)), key) for _, key in columns)
        return texts, tuple(label for label, _ in columns)
    return parse_choices_value(row.take(key), key)


def _plain_value(value: Any) -> Any:
    return NumberText(repr(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_choices_value(value: Any, key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (texts, labels) of choices: a list of texts or objects, {"text": [...], "label": [...]} or {"A": text}.

    JSON numbers are `NumberText`.

    Raises:
        RowError: they are none of these.
    """
    if isinstance(value, str):
        value = as_list(value)
    if isinstance(value, str):
        value = _written(value, key)
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


def _written(text: str, key: str) -> Any:
    """Choices in a cell of text: as Python or numpy prints a list or an object, or as `a ) 38 , b ) 27`."""
    text = text.strip()
    bare = _ARRAY.sub(r"\1", text)
    if bare.startswith("[") and bare.endswith("]") and not _LITERAL.sub("", bare[1:-1]).strip(" ,\n\t"):
        return [ast.literal_eval(literal) for literal in _LITERAL.findall(bare)]
    if bare.startswith(("{", "[")):
        try:
            if not _LITERALS_TOUCH.search(_LITERAL.sub("0", bare)):
                return ast.literal_eval(bare)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        raise RowError(f"{key} expects a list; its text is not readable as JSON or Python")
    for pattern in (_LETTERED, _NUMBERED):
        marks = list(pattern.finditer(text))
        labels = [mark[1].casefold() for mark in marks]
        known = [chr(ord("a") + i) if pattern is _LETTERED else str(i + 1) for i in range(len(marks))]
        if len(marks) > 1 and not marks[0].start() and labels == known:
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            texts = [text[mark.end() : end].strip().rstrip(",;").strip() for mark, end in zip(marks, ends, strict=True)]
            if all(texts):
                return {label.upper(): option for label, option in zip(labels, texts, strict=True)}
    raise RowError(f"{key} expects a list; its text is none, nor `A. x`, `B. y` in order")


def is_api_choices(value: Any) -> bool:
    """Whether `choices` are the replies of an API rather than the options of a question."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict)
            and ("message" in item or ("text" in item and "label" not in item and bool(item.keys() & _REPLY_KEYS)))
            for item in value
        )
    )


def gold_text(
    value: Any, key: str, options: tuple[str, ...] = (), labels: tuple[str, ...] = (), *, counted: bool = False
) -> str | None:
    """A gold answer as text: a label or an index (from 0) as the choice's text, a boolean as yes or no.

    Where there are labels, what may be a label is one. Where all choices are `NumberText`, a number may also be one of
    them. With `counted`, a number is an index alone, which may be written as text. A choice whose text would be read as
    another's label has its own label before it, as `(c) 4` where there is a `(4)`.

    Raises:
        RowError: an index beyond the choices, several answers, a value of another type, or a number that is one choice
            and counts another.
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
    numbers = not counted and all(isinstance(option, NumberText) for option in options)
    if isinstance(value, int | float) and numbers and str(value) not in labels:
        same = next((option for option in options if float(option) == value), None)
        placed = options[value] if isinstance(value, int) and 0 <= value < len(options) else None
        if same is not None and placed is not None and float(placed) != value:
            raise RowError(
                f"{key} is {value}, which is the choice {same} or, counted from 0, the choice {placed}; write the "
                f"choice as text, or, if it counts, --map gold={key}"
            )
        value = value if same is None else same
    if not isinstance(value, list | dict) and value is not None and str(value).strip() in labels:
        return _named(labels.index(str(value).strip()), options, labels)
    if isinstance(value, str) and value.strip() not in options:
        folded = [label.casefold() for label in labels]
        if folded.count(value.strip().casefold()) == 1:
            return _named(folded.index(value.strip().casefold()), options, labels)
    if isinstance(value, str) and counted and value.strip().isdecimal() and options:
        place = int(value)
        other = value.strip() in options and (place >= len(options) or options[place] != value.strip())
        if other and plain(key) not in _INDEX_NAMES:
            raise RowError(
                f"{key} is {value!r}, which is a choice and may count another; if it counts from 0, call it "
                f"answer_index, and if not, answer, without --map gold={key}"
            )
        value = place
    if isinstance(value, int) and options:
        if not 0 <= value < len(options):
            raise RowError(f"{key} is choice {value}, counted from 0; there are {len(options)}")
        return _named(value, options, labels)
    text = get_text({key: value}, key, numbers=True) or None
    if text is None or not text.strip() or (text.strip() in MISSING and text.strip() not in options):
        return None
    if options and text.strip().isdigit() and text.strip() not in options:
        raise RowError(
            f"{key} is {text!r}, which is none of the choices and no label; if it counts the choices from 0: --map "
            f"gold={key}"
        )
    return text


def _named(index: int, options: tuple[str, ...], labels: tuple[str, ...]) -> str:
    """The text of a choice, after its label where the text alone would be read as another's."""
    text = options[index]
    read = parse_choices(with_choices("?", options, labels))
    if read.count(text.strip()) != 1:
        return text
    told = option_value(read.index(text.strip()), read).text
    return text if told == text.strip() else told
