"""Reading and comparing answers: numbers as numbers, equations by value, letters and yes/no without case.

Everything here is pure text work with bounds on length, digits and exponents: nothing is ever passed to `eval`.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

from qcrd_fast.data.expressions import NUMBER, OutOfBounds, evaluate_expression, fold, parse_number, visible

MAX_ANSWER = 4096  # characters looked at

_ONE_NUMBER = re.compile(rf"([-+]? *{NUMBER})\.?")
_ONE_FRACTION = re.compile(r"([-+]?) *(?:(\d+) +)?(\d+) */ *(\d+)\.?")
_RUN = re.compile(r"(?<![\w.,])[-+]?\.?\d[\d.,]*(?:[eE][-+]?\d+)?")  # what looks like a number in running text
_ARITHMETIC = re.compile(r"[\d\s.,()+\-*/^=]*")
_MARKER = re.compile(r"(?:\banswers?(?: is| are|\s*:)(?:\s*:)?|####|\\boxed\b)\s*", re.IGNORECASE)
_LETTER = re.compile(r"\(([A-Za-z])\)[.:]?\s*(.*)|([A-Za-z])(?:[).:]+(?:\s+(.*)|$)|$)", re.DOTALL)
_LABEL = re.compile(r"(?<!not )\(([a-z])\)", re.IGNORECASE)
_NOT_THAT = "".join(f"(?<!not {article})" for article in ("", "a ", "an ", "the "))
_ANOTHER = re.compile(r"(?:and|or|,|/|&)\s*\(?[A-Za-z]\)", re.IGNORECASE)  # behind a letter: several, so none
_CHOICE_LINE = re.compile(r"^[ \t]*\(?([A-Za-z])[).:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_WORDS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_OPPOSITE = {"yes": "no", "no": "yes"}
_YES_NO = re.compile(r"\b(?:yes|no|true|false)\b")
_NOT = re.compile(  # before the word
    r"(?:\b(?:not|never)|n['\u2019]t)\s+(?:(?:a|always|necessarily|really|quite|entirely)\s+)?$"
)
_EMPHASIS = re.compile(  # Markdown's, around a whole value
    r"(?<![^\s(\[{:\"'=$])(\*{1,3}|_{1,3}|`)(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![^\s.,;:!?)\]}\"'])"
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}|\d{4}/\d\d?/\d\d?")


def canonical(answer: str, task: str, choices: Sequence[str] = ()) -> str | None:
    """The form in which two equal answers are equal strings; None where the answer cannot be read as one of `task`.

    number: its value, `32` for `32.0`, `$32`, `1,000` -> `1000`, `1/2` -> `0.5`; units, currency and `%` are ignored, and
    a text with several different numbers is none. equation: its value. yes-no: `yes` or `no` (also from true, false; `not`
    turns it round). Markdown's emphasis is no part of them.
    choice: the choice's text where known (from `choices` or the answer itself), else its letter. text: without case,
    invisible characters (joiners, direction marks), outer punctuation and repeated white space, in NFKC.
    """
    text = _bare(visible(answer[:MAX_ANSWER]).strip(), task, choices)
    return _read(text, task, choices) if text else None


def _bare(text: str, task: str, choices: Sequence[str]) -> str:
    """Without Markdown's emphasis, where it keeps the answer from being read."""
    if task == "text" or not any(c in text for c in "*_`") or _read(text, task, choices) is not None:
        return text
    return _EMPHASIS.sub(r"\2", text)


def _read(text: str, task: str, choices: Sequence[str]) -> str | None:
    if task in ("number", "equation"):
        return _value_key(text, loose=task == "number")
    if task == "yes-no":
        return _yes_no(text)
    if task == "choice":
        return _choice(text, choices)
    return _plain(text)


def surface(answer: str, task: str, choices: Sequence[str] = ()) -> str | None:
    """A readable answer as it is taught: the canonical form of numbers and yes/no, the choice's own text, else as written."""
    key = canonical(answer, task, choices)
    if key is None or task in ("number", "yes-no"):
        return key
    answer = _bare(answer.strip(), task, choices)
    if task == "choice":
        if choices:
            index, choice = next((i, choice) for i, choice in enumerate(choices) if _plain(choice) == key)
            if canonical(choice, task, choices) == key:
                return choice
            return f"({chr(ord('a') + index)}) {choice}"  # a choice that is called by another's letter
        match = _LETTER.fullmatch(answer.strip())
        answer = (match[2] or match[4] or key) if match else answer
    return answer.strip().rstrip(".").strip() or key


def same_answer(a: str, b: str, task: str, choices: Sequence[str] = ()) -> bool:
    """Whether two answers are one; `(c)` and `(c) train station` are, also where the choices are not known."""
    key = canonical(a, task, choices)
    if key is None:
        return False
    if key == canonical(b, task, choices):
        return True
    return task == "choice" and not choices and _letter(a) is not None and _letter(a) == _letter(b)


def is_correct(prediction: str, gold: str, task: str, choices: Sequence[str] = ()) -> bool:
    """Whether generated text answers `gold`. Pass `parse_choices(question)` for choices, so that letters are understood."""
    answer = extract_answer(prediction, task, choices)
    return answer is not None and same_answer(answer, gold, task, choices)


def extract_answer(text: str, task: str, choices: Sequence[str] = ()) -> str | None:
    """The answer in generated text, or None.

    What follows the last "answer is", "answer:", "####" or "\\boxed" is read; without such a marker the text as a whole,
    then, for numbers, its last number. A yes-no answer needs the word: a statement such as "that it is not common" agrees
    with one wording of the question and denies another.
    """
    text = text.strip()
    parts = _MARKER.split(text[-8 * MAX_ANSWER :])
    if len(parts) > 1:
        rest = parts[-1].strip().split("\n\n")[0].split("\nQ:")[0]
        for piece in (rest, rest.split("\n")[0], _sentence(rest)):
            piece = piece.strip().removeprefix("{").removesuffix("}").lstrip(" :*_`\"'").rstrip(" :*_`\"'.")
            if task == "text":
                piece = piece.split("\n")[0]
            answer = surface(piece, task, choices)
            if answer is not None:
                return answer
        return _edge_number(rest, first=True) if task == "number" else None
    if task == "text":
        return surface(text, task) if "\n" not in text else None
    answer = surface(text, task, choices)
    if answer is None and task != "equation":
        answer = surface(_sentence(text, last=True), task, choices)
    return _edge_number(text) if answer is None and task == "number" else answer


class TaskGuess:
    """Which task the answers shown so far are of."""

    def __init__(self) -> None:
        self.any = False
        self._counts = dict.fromkeys(("number", "equation", "choice", "yes-no", "text"), 0)

    def add(self, answer: str) -> None:
        self.any = True
        text = visible(answer[:MAX_ANSWER]).strip()
        if not text:
            return
        letter = _LETTER.fullmatch(text)
        if _DATE.fullmatch(text):
            kind = "text"
        elif _number(text) is not None:
            kind = "number"
        elif evaluate_expression(text) is not None:
            kind = "equation"
        elif text.casefold().strip(".") in _WORDS:
            kind = "yes-no"
        else:
            kind = "choice" if letter and not (letter[2] or letter[4]) else "text"
        self._counts[kind] += 1

    @property
    def task(self) -> str:
        """number, equation, choice (single letters), yes-no or text: whichever at least 95% of the answers can be read as."""
        counts, total = dict(self._counts), sum(self._counts.values())
        if counts["equation"] > 0.05 * total:
            counts["equation"] += counts["number"]
        return next((task for task, count in counts.items() if total and count >= 0.95 * total), "text")


def guess_task(answers: Iterable[str]) -> str:
    """The task of some answers (see `TaskGuess`)."""
    guess = TaskGuess()
    for answer in answers:
        guess.add(answer)
    return guess.task


def parse_choices(question: str) -> tuple[str, ...]:
    """The choices of a question that ends in lines `(a) ...`, `(b) ...`; empty where it has none."""
    found: list[str] = []
    for letter, text in _CHOICE_LINE.findall(question[-8 * MAX_ANSWER :]):
        if letter.lower() == chr(ord("a") + len(found)):
            found.append(text)
        elif letter.lower() == "a":
            found = [text]
    return tuple(found) if len(found) > 1 else ()


def _number(text: str) -> Fraction | None:
    """The value of a text that is one number, mixed number or fraction, with perhaps a currency or `%`."""
    text = fold(text).strip().rstrip("% ").strip()
    try:
        if match := _ONE_NUMBER.fullmatch(text):
            return parse_number(match[1].replace(" ", ""))
        if match := _ONE_FRACTION.fullmatch(text):
            sign, whole, above, below = match.groups()
            value = parse_number(whole or "0") + parse_number(above) / parse_number(below)
            return -value if sign == "-" else value
    except (OutOfBounds, ZeroDivisionError):
        pass
    return None


@functools.lru_cache(maxsize=8192)
def _value_key(text: str, loose: bool) -> str | None:
    value = _value(text, loose)
    return None if value is None else _format(value)


def _value(text: str, loose: bool) -> Fraction | None:
    for piece in (text, text.rsplit("=", 1)[-1]):
        for read in (_number, evaluate_expression):
            value = read(piece)
            if value is not None:
                return value
    if not loose:
        return None
    folded = fold(text)
    if _ARITHMETIC.fullmatch(folded):  # an expression that has no value, or is out of bounds
        return None
    values = {_number(run.rstrip(".,")) for run in _RUN.findall(folded)}
    return values.pop() if len(values) == 1 else None


def _edge_number(text: str, first: bool = False) -> str | None:
    """The last (or first) number written in `text`."""
    folded = fold(text[:MAX_ANSWER] if first else text[-MAX_ANSWER:])
    if _ARITHMETIC.fullmatch(folded):
        return None
    runs = _RUN.findall(folded)
    value = _number(runs[0 if first else -1].rstrip(".,")) if runs else None
    return None if value is None else _format(value)


def _format(value: Fraction) -> str:
    """An integer exactly, anything else to nine digits after those of its integer part."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = len(str(abs(int(value)))) + 9
        number = Decimal(value.numerator) / Decimal(value.denominator)
    return format(number.normalize(), "f")


def _yes_no(text: str) -> str | None:
    text = text.casefold()
    found = set()
    for word in _YES_NO.finditer(text):
        denied = _NOT.search(text, max(0, word.start() - 24), word.start())
        found.add(_OPPOSITE[_WORDS[word[0]]] if denied else _WORDS[word[0]])
    if len(found) <= 1:
        return found.pop() if found else None
    start = re.match(r"\W*(yes|no|true|false)\b(?!\s+(?:and|or)\b)", text)
    return _WORDS[start[1]] if start else None


def _choice(text: str, choices: Sequence[str]) -> str | None:
    match = _LETTER.fullmatch(text)
    letter = (match[1] or match[3]).lower() if match else None
    rest = _plain((match[2] or match[4] or "") if match else text)
    if match and _ANOTHER.match(match[2] or match[4] or ""):
        return None
    if not choices:
        return rest or letter
    keys = [_plain(choice) for choice in choices]
    if letter is not None:
        index = ord(letter) - ord("a")
        return (keys[index] or None) if index < len(keys) else _plain(text) if _plain(text) in keys else None
    if rest in keys:
        return rest
    letters = {label.lower() for label in _LABEL.findall(text)}
    if letters:
        return _choice(letters.pop(), choices) if len(letters) == 1 else None
    named = {key for key in keys if key and re.search(rf"(?<!\w){_NOT_THAT}{re.escape(key)}(?!\w)", rest)}
    return named.pop() if len(named) == 1 else None


def _letter(answer: str) -> str | None:
    match = _LETTER.fullmatch(answer.strip())
    return (match[1] or match[3]).lower() if match else None


def _sentence(text: str, last: bool = False) -> str:
    """The first or the last sentence of `text`."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text[-MAX_ANSWER:] if last else text[:MAX_ANSWER]) if part]
    return parts[-1 if last else 0] if parts else ""


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.split())
    return text.strip(" .,;:!?\"'`*()[]{}") or text
