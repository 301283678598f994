"""Answers as values: their canonical form, and when two of them are one.

Everything here is pure text work with bounds on length, digits and exponents: nothing is ever passed to `eval`. Where
an answer stands in a reply is found in `replies`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data import mathforms
from qcrd_fast.data.choices import LATIN, parse_choices, plain_text
from qcrd_fast.data.expressions import MAX_DIGITS, evaluate_expression, strip_invisible
from qcrd_fast.data.options import option_name, read_choice
from qcrd_fast.data.quantities import Number, one_number, plain, read_quantity

__all__ = [
    "Value",
    "canonical",
    "equal",
    "groups",
    "guess_task",
    "parse_choices",
    "read_value",
    "same_answer",
    "surface",
]

MAX_ANSWER = 4096  # characters looked at

EMPHASIS = re.compile(  # Markdown's, around a whole value
    r"(?<![^\s(\[{:\"'=$])(\*{1,3}|_{1,3}|`)(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![^\s.,;:!?)\]}\"'])"
)
_WORDS = {
    "yes": "yes", "true": "yes", "no": "no", "false": "no",
    "ja": "yes", "wahr": "yes", "nein": "no", "falsch": "no", "oui": "yes", "vrai": "yes", "non": "no", "faux": "no",
    "s\u00ed": "yes", "s\u00ec": "yes", "verdadero": "yes", "falso": "no", "vero": "yes", "sim": "yes",
    "verdadeiro": "yes",
    "n\u00e3o": "no", "да": "yes", "нет": "no", "верно": "yes", "неверно": "no",
    "\u662f": "yes", "\u662f\u7684": "yes", "\u5bf9": "yes", "\u6b63\u786e": "yes", "\u5426": "no",
    "\u4e0d\u662f": "no",
    "\u9519\u8bef": "no", "\u4e0d\u5bf9": "no", "\u4e0d\u6b63\u786e": "no",
    "\u306f\u3044": "yes", "\u3044\u3044\u3048": "no", "1": "", "0": "",
}  # fmt: skip
_ENGLISH = ("yes", "no", "true", "false")
_OPPOSITE = {"yes": "no", "no": "yes"}
_YES_NO = re.compile(r"\b(?:yes|no|true|false)\b")
_STANDING = re.compile(  # a word of answer by itself, and no determiner or negation
    rf"(?<![\w'\u2019])(?:{'|'.join(word for word in _WORDS if word.isalpha())})(?![\w'\u2019])(?="
    r"\W*$|\s*[.,;:!?()\u2014\u2013\"\u201d\u00bb]|"
    r"\s+(?:and|or|but|for|if|in|when|und|oder|aber|f\u00fcr|wenn|et|ou|mais|pour|si|y|o|pero|para|e|ma|per|se|mas|и|или|но|"
    r"для|если)(?![\w]))"
)
_BOTH = re.compile(r"(?:\u662f|\u5bf9)(?:\u4e5f|\u548c|\u6216|\u8fd8\u662f)|\u306f\u3044(?:\u3068|\u3067\u3082|\u304b)")
_FIRST_WORD = re.compile(
    r"[\W_]*(?:(?:that\s+)?(?:it\s+is\s+)?)?(?:(?:(?:most|very|quite)\s+)?(?:probably|likely|definitely|certainly)\s+)?"
    r"([^\W\d_]+)"
)
_FOLLOWS = re.compile(  # the first word, where it is the answer
    r"\W*$|\s*[,.;:!?()\u2014\u2013\u3002\uff0c\u3001\uff01\"\u201d\u300d]|\s*-\s|\s+(?:because|since|as|it|he|she|they|you|we|i|this|"
    r"that|there|these|those|the|a|an|not|in|to|for|weil|denn|da|parce|car|puisque|porque|ya\s+que|pues|perch\u00e9|poich\u00e9|"
    r"pois|потому|так\s+как|поскольку)(?![\w])"
)
_CONDITION = re.compile(
    r"[\s,;:(]*(?:if|unless|only\s+if|provided|depending|as\s+long\s+as|when|maybe|perhaps|in\s+(?:some|certain|most|many)|"
    r"wenn|falls|sofern|vielleicht|si|peut-\u00eatre|quiz\u00e1s?|tal\s+vez|a\s+veces|se|forse|talvez|если|возможно|"
    r"при\s+условии)(?![\w])|[\s，、]*(?:\u5982\u679c|\u4e5f\u8bb8)"
)
_MAIN_CLAUSE = re.compile(r"[\s,;:(\u2013\u2014-]*[^,.;\n]{1,120},\s+(?!otherwise|else)[^\W\d_]+\s+[^\W\d_]+")
_UNSURE = re.compile(
    r"(?<![\w])(?:if|unless|whether|maybe|perhaps|possibly|may|might|could|would|sometimes|partly|partially|half|hardly|"
    r"barely|scarcely|depends|depending|in\s+(?:some|certain)|not\s+(?:sure|certain|clear|known)|unclear|neither|"
    r"(?:not|n['\u2019]t|cannot)\s+(?:\w+\s+)?(?:say|answer|claim|call|tell|conclude|know))(?![\w])|n['\u2019]t\s+(?:say|answer|tell)"
)
_NOT = re.compile(  # before the word
    r"(?:\b(?:not|never)|n['\u2019]t)\s+(?:(?:a|always|necessarily|really|quite|entirely)\s+)?$"
)
_NOT_THIS = re.compile(  # before the word, in other languages
    r"(?<![\w])(?:nicht|pas|no\s+es|no|non\s+\u00e8|n\u00e3o\s+\u00e9|не|n['\u2019]est)\s+(?:\w+\s+)?$"
)
_IDIOM = re.compile(r"(?<![\w])no\s+(?:doubt|question)(?![\w])(?:\s+about\s+(?:it|that))?[,.:;!]?")
_CHOICE_OF_TWO = re.compile(
    r"\W*(?:true\s+or\s+false|yes\s+or\s+no|yes/no|true/false|ja\s+oder\s+nein|wahr\s+oder\s+falsch|oui\s+ou\s+non|"
    r"vrai\s+ou\s+faux|s\u00ed\s+o\s+no|verdadero\s+o\s+falso|s\u00ec\s+o\s+no|vero\s+o\s+falso|sim\s+ou\s+n\u00e3o|"
    r"verdadeiro\s+ou\s+falso|да\s+или\s+нет|верно\s+или\s+неверно|是或否|对或错)\W{0,3}[:\uff1a?]\s*"
)
_COPULA = re.compile(r"(?:\u3067\u3059|\u3067\u3042\u308b|\u3060)[\u3002.]?$")
_QUOTES = " .,;:!?\"'`*()[]{}\u3002\uff01\u3001\uff0c\u300c\u300d\u300e\u300f\u201c\u201d\u201e\u00ab\u00bb"
_UNIT = re.compile(  # after a gold that is one quantity; currencies before a number and % are no units here
    r"\s*(?:(?:(?:square|sq\.?|cubic)\s+)?(?:"
    r"[kcm\u00b5\u03bc]?m|k?g|mg|lbs?|oz|in|ft|yds?|mi|[cm]?[lL]|gal|ha|"
    r"(?:kilo|centi|milli)?(?:met(?:er|re)s?|grams?|lit(?:er|re)s?)|tons?|tonnes?|pounds?|ounces?|miles?|yards?|foot|feet|"
    r"inch(?:es)?|gallons?|acres?|hectares?"
    r")(?:\s?\u00b2|\s?\u00b3|\^?[23])?|"
    r"(?:ms|secs?|seconds?|s|mins?|minutes?|hrs?|hours?|h|days?|weeks?|months?|years?|yrs?)|"
    r"(?:dollars?|cents?|euros?|usd|eur|gbp)|per\s?cent|mph|km/h|kph|m/s(?:\u00b2|\^?2)?|"
    r"\u00b0\s?[CF]?|degrees?(?:\s+(?:celsius|fahrenheit))?|[kM]?W|kWh|[kM]?J|N|k?Pa|[kMG]?Hz|V|kV|[kMGT]B)\.?"
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}|\d{4}/\d\d?/\d\d?")
_LETTER = re.compile(r"[(\[（]?[A-Za-z][)\]）]?[.:]?")


class Value(NamedTuple):
    """An answer that could be read: `key` is alike for equal answers, `text` is how it is taught."""

    key: str
    text: str
    number: Number | None = None
    letter: int | None = None  # of an option, where the options are not known


def read_value(answer: str, task: str, choices: Sequence[str] = (), decimal: str = "point") -> Value | None:
    """Parse a text as an answer, perhaps inside Markdown, LaTeX, units or an option's letter; None if it is not one."""
    text = strip_invisible(answer[:MAX_ANSWER]).strip()
    if not text:
        return None
    if task in ("number", "equation"):
        return _numeric(text, task == "equation", decimal)
    if task == "yes-no":
        word = _yes_no(EMPHASIS.sub(r"\2", text))
        return Value(word, word) if word else None
    if task == "choice":
        return _choice(answer[:MAX_ANSWER].strip(), choices)
    if task == "math":
        return _math(text, decimal)
    return Value(plain_text(text), text.rstrip(".").strip() or text) if plain_text(text) else None


def canonical(answer: str, task: str, choices: Sequence[str] = (), decimal: str = "point") -> str | None:
    """Return the canonical form of an answer, equal for equal answers; None if unreadable for `task`.

    number: its value, `32` for `32.0`, `$32` or `\frac{64}{2}`, `1,000` -> `1000`, `1/2` -> `0.5`; units, currency and
    `%` are ignored, and a sum, a range or a text with several numbers is none. equation: its value. math: the value,
    else LaTeX in one spelling. yes-no: `yes` or `no` (also from true, false; `not` turns it round). choice: the
    choice's text where known (from `choices` or the answer itself), else its letter. text: without case, invisible
    characters (joiners, direction marks), outer punctuation and repeated white space, `folded`.
    """
    value = read_value(answer, task, choices, decimal)
    return value.key if value else None


def surface(answer: str, task: str, choices: Sequence[str] = (), decimal: str = "point") -> str | None:
    """Return a readable answer as training text: canonical numbers and yes/no, a choice's own text, else as written."""
    value = read_value(answer, task, choices, decimal)
    return value.text if value else None


def same_answer(
    a: str, b: str, task: str, choices: Sequence[str] = (), *, decimal: str = "point", tolerance: Fraction | None = None
) -> bool:
    """Return whether two answers are equal; `(c)` equals `(c) train station` even if the choices are unknown."""
    left, right = read_value(a, task, choices, decimal), read_value(b, task, choices, decimal)
    return left is not None and right is not None and equal(left, right, task, tolerance)


def equal(a: Value, b: Value, task: str, tolerance: Fraction | None = None) -> bool:
    """Whether two values are one answer: see `agree` for numbers."""
    if a.key == b.key:
        return True
    if a.number is not None and b.number is not None:
        return agree(a.number, b.number, tolerance)
    if task == "choice":
        return a.letter is not None and a.letter == b.letter
    return task == "math" and a.number is None and b.number is None and mathforms.verified(a.text, b.text)


def agree(a: Number, b: Number, tolerance: Fraction | None = None) -> bool:
    """Whether two numbers are one answer.

    By value; else, without a `tolerance`, where the more precise one, rounded or cut to the decimals of the other, of
    which there are at least 2, gives it. With a tolerance: where they differ by no more than that.
    """
    if a.value == b.value:
        return True
    if tolerance is not None:
        return abs(a.value - b.value) <= tolerance
    if a.decimals is not None and (b.decimals is None or b.decimals > a.decimals):
        a, b = b, a  # b is the coarser
    if b.decimals is None or b.decimals < 2 or a.decimals == b.decimals:
        return False
    scale = 10**b.decimals
    scaled, coarse = abs(a.value) * scale, abs(b.value) * scale
    same_sign = (a.value < 0) == (b.value < 0) or not coarse
    return same_sign and coarse in (int(scaled), int(scaled + Fraction(1, 2)))


def groups(values: Sequence[Value], task: str, tolerance: Fraction | None = None) -> list[int]:
    """Map each value to the index of its group's leader, the most precise member; all members are equal to it.

    Values are compared with leaders alone, so that no chain of near values makes one answer of two. The order of the
    values does not matter, but for which of several equal ones leads.
    """
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if value.key not in first or _precision(value) < _precision(values[first[value.key]]):
            first[value.key] = index
    order = sorted(first.values(), key=lambda index: _precision(values[index]))
    leader: dict[str, int] = {}
    leaders: list[int] = []
    for index in order:
        value = values[index]
        near = [other for other in leaders if equal(values[other], value, task, tolerance)]
        if near:
            near.sort(key=lambda other: _distance(values[other], value))
            leader[value.key] = near[0]
        else:
            leaders.append(index)
            leader[value.key] = index
    return [leader[value.key] for value in values]


def _precision(value: Value) -> tuple[int, int, str]:
    if value.number is None:
        return (0, -len(value.key), value.key)
    decimals = value.number.decimals
    return (0, 0, value.key) if decimals is None else (1, -decimals, value.key)


def _distance(a: Value, b: Value) -> tuple[Fraction, str]:
    if a.number is None or b.number is None:
        return Fraction(0), a.key
    return abs(a.number.value - b.number.value), a.key


class TaskGuess:
    """Guess the task from the answers seen so far. `decimal`: their number format, as in `--decimal`."""

    def __init__(self, decimal: str = "point") -> None:
        self.decimal = decimal
        self.any = False
        self._counts = dict.fromkeys(("number", "equation", "math", "choice", "yes-no", "text"), 0)

    def add(self, answer: str) -> None:
        self.any = True
        text = strip_invisible(answer[:MAX_ANSWER]).strip()
        if not text:
            return
        if _DATE.fullmatch(text):
            kind = "text"
        elif _LETTER.fullmatch(text):
            kind = "choice"
        elif _is_quantity(text, self.decimal):
            kind = "number"
        elif evaluate_expression(plain(text, self.decimal).strip().rstrip(".")) is not None:
            kind = "equation"
        elif _WORDS.get(text.casefold().strip(".")):
            kind = "yes-no"
        else:
            kind = "math" if mathforms.looks_like_math(text) else "text"
        self._counts[kind] += 1

    @property
    def task(self) -> str:
        """Return number, equation, math, choice (single letters), yes-no or text: the kind that fits 95% of the
        answers."""
        counts, total = dict(self._counts), sum(self._counts.values())
        if counts["math"] > 0.05 * total:
            counts["math"] += counts["number"] + counts["equation"]
        elif counts["equation"] > 0.05 * total:
            counts["equation"] += counts["number"]
        return next((task for task, count in counts.items() if total and count >= 0.95 * total), "text")


def _is_quantity(text: str, decimal: str) -> bool:
    """Whether a text is one number, perhaps with a unit that is known: "12", "$5", "12 km", "10kg"."""
    said = plain(text, decimal).strip()
    if one_number(said.rstrip("% ").strip()) is not None:
        return True
    unit = re.search(r"(?<=[\d).])\s*[^\d\s).][^\d]{0,24}[23\u00b2\u00b3]?$", said)
    return (
        unit is not None
        and "\\" not in text
        and _UNIT.fullmatch(unit[0]) is not None
        and one_number(said[: unit.start()].strip()) is not None
        and read_value(text, "number", (), decimal) is not None
    )


def guess_task(answers: Iterable[str]) -> str:
    """The task of some answers (see `TaskGuess`)."""
    guess = TaskGuess()
    for answer in answers:
        guess.add(answer)
    return guess.task


@functools.lru_cache(maxsize=8192)
def _numeric(text: str, expressions: bool, decimal: str) -> Value | None:
    found = read_quantity(text, decimal=decimal, expressions=expressions)
    return numeric_value(found.number, found.text if expressions else "")


def numeric_value(number: Number | None, text: str = "") -> Value | None:
    """A number as an answer; `text` is how it is taught, by default in canonical form."""
    if number is None:
        return None
    key = _format(number.value)
    if sum(c.isdigit() for c in key) > MAX_DIGITS:
        return None
    return Value(key, text or key, number)


def _format(value: Fraction) -> str:
    """An integer exactly, anything else to nine digits after those of its integer part."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = len(str(abs(int(value)))) + 9
        number = Decimal(value.numerator) / Decimal(value.denominator)
    return format(number.normalize(), "f")


def _yes_no(text: str) -> str | None:
    text = _COPULA.sub("", text.casefold())
    text = _IDIOM.sub("", _CHOICE_OF_TWO.sub("", text, count=1))
    if whole := _WORDS.get(text.strip(_QUOTES)):
        return whole
    said = {_polarity(text, match) for match in _STANDING.finditer(text)}
    if len(said) > 1 or None in said or _BOTH.search(text):
        return None
    start = _FIRST_WORD.match(text)
    head = _WORDS.get(start[1]) if start else None
    if start and head:
        rest = text[start.end() :]
        if _CONDITION.match(rest) and not _MAIN_CLAUSE.match(rest):
            return None
        if not _FOLLOWS.match(rest) or (start[1] in _ENGLISH and re.match(r"\s+(?:and|or)\b", rest)):
            head = None  # "no evidence"
        elif start[1] not in _ENGLISH and not re.match(r"[\s,.;:!。，、]|$", rest):
            head = None
    found = set()
    for word in _YES_NO.finditer(text):
        if (
            word[0] == "no"
            and re.match(r"\s+\w", text[word.end() : word.end() + 3])
            and not (head and start and word.start() == start.start(1))
        ):
            continue  # "no evidence"
        found.add(_polarity(text, word))
    if head:
        return head if not said - {head} and not re.search(r"(?<![\w])it\s+depends", text) else None
    return found.pop() if len(found) == 1 and not _UNSURE.search(text) else None


def _polarity(text: str, word: re.Match[str]) -> str | None:
    """Return yes or no of an answer word in its context; None if negated in another language."""
    before = text[max(0, word.start() - 24) : word.start()]
    said = _WORDS[word[0]]
    if _NOT.search(before):
        return _OPPOSITE[said]
    return None if _NOT_THIS.search(before) else said


def _choice(text: str, choices: Sequence[str]) -> Value | None:
    index, key = read_choice(text, choices)
    if choices:
        return option_value(index, choices) if index is not None and key else None
    if index is not None and not key:
        return option_value(index, ())
    if not key:
        return None
    rest = re.sub(r"^[(\[（【]?[A-Za-z][)\]）】.:]+\s*", "", text) if index is not None else text
    return Value(key, rest.strip().rstrip(".").strip() or key, letter=index)


def option_value(index: int, choices: Sequence[str]) -> Value:
    """The option at `index` as an answer: its text, or its letter where the options are not known."""
    letter = str(index + 1) if getattr(choices, "digits", False) else getattr(choices, "letters", LATIN)[index]
    if not choices:
        return Value(letter, letter, letter=index)
    choice, key = choices[index], option_name(index, choices)
    read, _ = read_choice(choice, choices)
    if read is None or option_name(read, choices) != key:
        choice = f"({letter}) {choice}"  # a choice that is called by another's label
    return Value(key, choice)


def _math(text: str, decimal: str) -> Value | None:
    found = read_quantity(text, decimal=decimal, expressions=True)
    bare = mathforms.unwrapped(text)
    if found.number is not None and mathforms.is_plain_number(bare):
        return numeric_value(found.number)
    key = mathforms.normal_form(bare)
    return Value(key, bare) if key else None
