"""Parse equations in a rationale: money, percent, thousands, fractions, units, chains of `=`.

    [(str(e.text), e.holds) for e in find_equations("3 bags x $2.50 = $7.50, and 10 apples - 4 apples = 5 apples.")]
    -> [("3 bags * 2.50 = 7.50", True), ("10 apples - 4 apples = 5", False)]

What cannot be computed is no equation: one with a variable, a side without a number, or without an operator on either
side.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data.expressions import NUMBER, OutOfBounds, evaluate_expression, parse_number, strip_invisible
from qcrd_fast.data.quantities import plain

MAX_TEXT = 20_000  # characters of a rationale that are read
MAX_UNIT_WORDS = 3  # between a number and the operator after it
_TOKEN = re.compile(
    rf"(?P<number>(?<![\d.]){NUMBER}(?P<percent>\s?%)?)|(?P<approximate>[\u2248\u2243\u2245]|=~|~=)|(?P<equals>=+)|"
    r"(?P<operator>\*\*|[-+*/^])|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<word>[^\W\d_]+(?:['\u2019.-][^\W\d_]+)*)|(?P<other>\S)|"
    r"(?P<line>\n)"
)
_WORDS = {  # that stand for a sign; longest first
    ("is", "equal", "to"): "=", ("are", "equal", "to"): "=", ("multiplied", "by"): "*", ("divided", "by"): "/",
    ("equals",): "=", ("equal",): "=", ("plus",): "+", ("minus",): "-", ("times",): "*",
}  # fmt: skip
_WORDS_BY_FIRST = {first: [item for item in _WORDS.items() if item[0][0] == first] for first, *_ in _WORDS}
_CROSS = re.compile(r"(?<=[\d)\]%])(\s*)[xX\u2715\u2716](?=\s*[\d(\[]|\s+[^\W\d_])")
_EMPHASIS = re.compile(r"(?<![^\s(\[])(?<!\d )(?<![)%] )[*_]{1,3}(?=[^\s*_])")  # **5 + 3 = 8**, but 5 *3
_EMPHASIS_END = re.compile(r"(?<=[^\s*_(+/-])[*_]{1,3}(?![^\s.,;:!?)\]])(?!\s*[\d(])")
_ASIDE = re.compile(r"\s*\([^()\d=]{1,60}\)")  # 6 (in the morning) + 3
_PERCENT = re.compile(r"(?<=\d)\s+per\s?cent(?![\w])", re.IGNORECASE)
_ABOUT = {"about", "approximately", "approx", "roughly", "around", "nearly", "remainder", "r", "rounded", "rounding"}
_BREAKS = {
    "and",
    "or",
    "so",
    "then",
    "but",
    "is",
    "are",
    "was",
    "has",
    "have",
    "if",
    "because",
    "which",
    "that",
    "we",
    "there",
}


class Token(NamedTuple):
    kind: str
    text: str
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation `left = right` as read.

    `operands`: numbers of the left side, or of the right if the left is one number; `result`: the number that it ends
    in.
    """

    text: str
    holds: bool
    operands: tuple[Fraction, ...]
    result: Fraction


class _Side(NamedTuple):
    """An expression beside an equals sign: its text, its numbers, the values that it may mean, and its first number."""

    text: str
    numbers: tuple[Fraction, ...]
    values: frozenset[Fraction]
    first: Fraction
    last: Fraction
    computed: bool  # holds an operator, or a percentage
    decimals: int  # that its last number is written with
    letters: bool  # a single letter stands where a unit may, perhaps a variable


def find_equations(text: str) -> list[Equation]:
    """The equations of a rationale in their order; `a = b = c` is two."""
    tokens = list(_tokens(text))
    found = []
    for at, token in enumerate(tokens):
        if token.kind not in ("equals", "approximate"):
            continue
        left, right = _before(tokens, at), _after(tokens, at)
        if left is None or right is None or not (left.computed or right.computed):
            continue
        about = token.kind == "approximate" or any(
            t.text.lower() in _ABOUT for t in tokens[max(at - 2, 0) : at + 8] if t.kind == "word"
        )
        holds = _same(left, right, about)
        if not holds and (left.letters or right.letters):
            continue  # 2x + 3 = 7
        operands = left.numbers if left.computed else right.numbers
        sloppy = right.first in left.values and right.first not in right.values  # 5 + 3 = 8 - 2 = 6
        result = left.last if not left.computed else right.first if sloppy else right.last
        found.append(Equation(f"{left.text} = {right.text}", holds, operands, result))
    return found


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, in digits or as English words, in their order."""
    found = []
    for token in _tokens(text):
        if token.kind == "number":
            found.append(parse_number(token.text.rstrip("% ")))
        elif token.kind == "word":
            found += [_NAMES[part] for part in token.text.lower().split("-") if part in _NAMES]
    return found


def _tokens(text: str) -> Iterator[Token]:
    text = _EMPHASIS_END.sub("", _EMPHASIS.sub("", text[:MAX_TEXT]))
    text = _ASIDE.sub(" ", _PERCENT.sub("%", plain(strip_invisible(text))))
    text = _CROSS.sub(r"\1*", text)
    found = []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup if match.lastgroup != "percent" else "number")
        if kind == "number":
            try:
                parse_number(match[0].rstrip("% "))
            except OutOfBounds:
                kind = "other"
        found.append(Token(kind, match[0], match["percent"] is not None))
    at, lowered = 0, [token.text.lower() for token in found]
    while at < len(found):
        for words, sign in _WORDS_BY_FIRST.get(lowered[at], ()):
            if tuple(lowered[at : at + len(words)]) == words:
                yield Token("equals" if sign == "=" else "operator", sign)
                at += len(words)
                break
        else:
            if found[at].kind == "word" and lowered[at] == "of" and at and _is_part(found, at - 1):
                yield Token("operator", "*")  # 20% of 50, 1/2 of 8
            elif (
                found[at].text == "/" and 0 < at < len(found) - 1 and found[at - 1].kind == found[at + 1].kind == "word"
            ):
                yield Token("word", "/")  # miles / hour
            elif found[at].text in ("x", "X") and _is_times(found, at):
                yield Token("operator", "*")  # 3 bags x 2.50
            else:
                yield found[at]
            at += 1


def _is_part(tokens: Sequence[Token], at: int) -> bool:
    """Whether a percentage or a fraction ends at a token."""
    if tokens[at].kind == "close":
        at -= 1
    if tokens[at].percent:
        return True
    return at >= 2 and tokens[at].kind == tokens[at - 2].kind == "number" and tokens[at - 1].text == "/"


def _is_times(tokens: Sequence[Token], at: int) -> bool:
    """Return whether an x between a number with its unit and another number means times."""
    before = tokens[max(at - 1 - MAX_UNIT_WORDS, 0) : at]
    return at + 1 < len(tokens) and tokens[at + 1].kind == "number" and any(t.kind == "number" for t in before)


def _before(tokens: Sequence[Token], at: int) -> _Side | None:
    """The longest expression that ends before a token."""
    taken: list[Token] = []
    at = at - 1
    while at >= 0 and tokens[at].kind == "line":
        at -= 1
    depth, operand = 0, False  # whether an operand is complete, so that an operator may stand before it
    while at >= 0:
        token = tokens[at]
        if not operand:
            at = _skip_unit(tokens, at, taken)
            if at < 0:
                break
            token = tokens[at]
            if token.kind == "number":
                operand = True
            elif token.kind == "close":
                depth += 1
            else:
                break
        elif token.kind == "operator":
            operand = False
        elif token.kind == "open" and depth:
            depth -= 1
        elif token.kind == "number" and _mixed(tokens, at):
            pass  # 2 1/2
        else:
            break
        taken.append(token)
        at -= 1
    if taken and taken[-1].kind == "operator" and at >= 0 and tokens[at].kind in ("word", "close"):
        return None  # x + 2 - 7: an operand cannot be computed
    while taken and taken[-1].kind in ("operator", "close", "word") and taken[-1].text != "-":
        taken.pop()
    return _side(taken[::-1], listed=True)


def _skip_unit(tokens: Sequence[Token], at: int, taken: list[Token]) -> int:
    """Past the words of a unit that ends at a token, which are noted; `at` itself where no number stands before
    them."""
    start = at
    while (
        start >= 0
        and at - start < MAX_UNIT_WORDS
        and tokens[start].kind == "word"
        and tokens[start].text not in _BREAKS
    ):
        start -= 1
    if start == at or start < 0 or tokens[start].kind not in ("number", "close"):
        return at
    taken += tokens[start + 1 : at + 1][::-1]
    return start


def _after(tokens: Sequence[Token], at: int) -> _Side | None:
    """The longest expression that begins after a token."""
    taken: list[Token] = []
    at = at + 1
    while at < len(tokens) and tokens[at].kind == "line":
        at += 1
    depth, operand, whole = 0, False, 0  # whole: how many tokens are an expression
    while at < len(tokens):
        token = tokens[at]
        if not operand:
            if token.kind == "number":
                operand = True
            elif token.kind == "open":
                depth += 1
            elif not (token.kind == "operator" and token.text in "+-" and (not taken or taken[-1].kind == "open")):
                if token.kind == "word" and not taken and token.text.lower() in _ABOUT:
                    at += 1
                    continue
                if token.kind == "word" and len(token.text) == 1 and taken:
                    return None  # 2 + x
                break
        elif token.kind == "close" and depth:
            depth -= 1
        elif token.kind == "number" and _mixed(tokens, at - 1):
            pass
        else:
            end = at
            while end < len(tokens) and end - at < MAX_UNIT_WORDS and tokens[end].kind == "word":
                if tokens[end].text in _BREAKS:
                    break
                end += 1
            if end >= len(tokens) or tokens[end].kind != "operator":
                break
            taken += tokens[at:end]
            at, token, operand = end, tokens[end], False
        taken.append(token)
        if operand and not depth:
            whole = len(taken)
        at += 1
    return _side(taken[:whole])


def _mixed(tokens: Sequence[Token], at: int) -> bool:
    """Whether the number at a token is the whole part of a mixed fraction."""
    kinds = [t.kind for t in tokens[at : at + 4]]
    return (
        kinds[:4] == ["number", "number", "operator", "number"]
        and tokens[at + 2].text == "/"
        and tokens[at].text.isdigit()
    )


def _side(tokens: Sequence[Token], listed: bool = False) -> _Side | None:
    """One side of an equation."""
    numbers = [t for t in tokens if t.kind == "number"]
    if not numbers:
        return None
    values: set[Fraction] = set()
    for percent in (True, False) if any(t.percent for t in tokens) else (False,):
        parts: list[str] = []
        for i, token in enumerate(tokens):
            if token.kind == "number":
                digits = token.text.rstrip("% ")
                if i and tokens[i - 1].kind == "number":
                    parts.append("+")
                parts.append(f"({digits}/100)" if percent and token.percent else digits)
            elif token.kind in ("open", "close"):
                parts.append("(" if token.kind == "open" else ")")
            elif token.kind == "operator":
                parts.append(token.text)
        text = "".join(parts)
        for each in (text, text.removeprefix("-") if listed else text):
            value = evaluate_expression(each)
            if value is not None:
                values.add(value)
    if not values:
        return None
    read = tuple(parse_number(t.text.rstrip("% ")) for t in numbers)
    return _Side(
        " ".join(t.text for t in tokens),
        read,
        frozenset(values),
        read[0],
        next(iter(values)) if len(values) == 1 else read[-1],
        any(t.kind == "operator" for t in tokens[1:]) or any(t.percent for t in tokens),
        len(numbers[-1].text.rstrip("% ").partition(".")[2]),
        any(t.kind == "word" and len(t.text) == 1 for t in tokens),
    )


def _same(left: _Side, right: _Side, about: bool) -> bool:
    """Whether two sides mean one value; the shorter one may be rounded or cut to its decimals.

    Of `5 + 3 = 8 - 2 = 6` the first equation is read as `5 + 3 = 8`, as it is meant.
    """
    for a in left.values:
        for b in (*right.values, right.first):
            if a == b:
                return True
            decimals = min(right.decimals, 9)
            if (decimals or about) and abs(a - b) < Fraction(1, 10**decimals):
                return True
    return False


_NAMES = {
    name: Fraction(value)
    for value, names in {
        0: "zero", 1: "one single", 2: "two twice double both pair couple half", 3: "three thrice triple third",
        4: "four quarter", 5: "five", 6: "six", 7: "seven week", 8: "eight", 9: "nine", 10: "ten", 11: "eleven",
        12: "twelve dozen year", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen",
        18: "eighteen", 19: "nineteen", 20: "twenty", 24: "day", 30: "thirty", 40: "forty", 50: "fifty",
        60: "sixty hour minute", 70: "seventy", 80: "eighty", 90: "ninety", 100: "hundred percent dollar",
        1000: "thousand",
    }.items()
    for name in names.split()
}  # fmt: skip
