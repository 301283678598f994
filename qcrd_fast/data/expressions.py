"""Parse and evaluate numbers and arithmetic expressions exactly, within bounds, without `eval`."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_EXPRESSION = 512  # characters
MAX_DIGITS = 64  # of one number
MAX_EXPONENT = 64
MAX_BITS = 4096  # of a numerator or denominator
_DIGITS = r"(?:\d{1,3}(?:[,\u00a0\u2009\u202f]\d{2,3})*[,\u00a0\u2009\u202f]\d{3}(?!\d)|\d+)"
NUMBER = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\w.]))?"
_TOKEN = re.compile(rf"\s*(?:({NUMBER})|(\*\*|[-+*/^()]))")
_TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_FOLDED = str.maketrans(
    {
        "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\ufe63": "-",
        "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2215": "/", "\u2044": "/",
        "\u066b": ".", "\u066c": ",",
    }
)  # fmt: skip
_RANK = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "pos": 3, "**": 4}


def evaluate_expression(text: str) -> Fraction | None:
    """Evaluate an expression with + - * / ** ^ and parentheses; None if it is not one, or out of bounds."""
    if len(text) > MAX_EXPRESSION:
        return None
    text = _TIMES.sub("*", fold(text)).strip().rstrip(".=").strip()
    values: list[Fraction] = []
    operators: list[str] = []
    position, operand = 0, True  # whether an operand comes next
    try:
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                return None
            position, token = match.end(), match[2]
            if token is None or token == "(":
                if not operand:
                    return None
                if token:
                    operators.append(token)
                else:
                    values.append(parse_number(match[1]))
                    operand = False
            elif token == ")":
                if operand:
                    return None
                while operators[-1] != "(":
                    _apply(operators.pop(), values)
                operators.pop()
            elif operand:
                if token not in "+-":
                    return None
                operators.append("neg" if token == "-" else "pos")
            else:
                token = "**" if token == "^" else token
                rank = _RANK[token] + (token == "**")  # right associative
                while operators and operators[-1] != "(" and _RANK[operators[-1]] >= rank:
                    _apply(operators.pop(), values)
                operators.append(token)
                operand = True
        if operand:
            return None
        while operators:
            _apply(operators.pop(), values)
    except (OutOfBounds, IndexError, KeyError, ZeroDivisionError):
        return None
    return values[0]


class OutOfBounds(Exception):
    pass


def _apply(operator: str, values: list[Fraction]) -> None:
    right = values.pop()
    if operator in ("neg", "pos"):
        values.append(-right if operator == "neg" else right)
        return
    left = values.pop()
    if operator == "+":
        result = left + right
    elif operator == "-":
        result = left - right
    elif operator == "*":
        result = left * right
    elif operator == "/":
        result = left / right
    else:
        size = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) > MAX_EXPONENT or size * abs(right) > MAX_BITS:
            raise OutOfBounds
        result = left ** int(right)
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise OutOfBounds
    values.append(result)


def parse_number(text: str) -> Fraction:
    text = re.sub(r"[,\u00a0\u2009\u202f]", "", text)
    exponent = re.search(r"[eE]([-+]?\d+)", text)
    if sum(c.isdigit() for c in text) > MAX_DIGITS or (exponent and abs(int(exponent[1])) > MAX_EXPONENT):
        raise OutOfBounds
    return Fraction(text)


def strip_invisible(text: str) -> str:
    """`text` without format characters: joiners, direction marks, soft hyphens."""
    return text if text.isascii() else "".join(c for c in text if unicodedata.category(c) != "Cf")


def fold(text: str) -> str:
    """Digits, signs and operators of any script as ASCII; currency signs dropped."""
    if text.isascii():
        return text.replace("$", "")
    out = []
    for c in strip_invisible(text).translate(_FOLDED):
        if c.isdecimal():
            out.append(str(unicodedata.decimal(c)))
        elif "\uff01" <= c <= "\uff5e":
            out.append(chr(ord(c) - 0xFEE0))
        elif unicodedata.category(c) == "No" and "\u2044" in unicodedata.normalize("NFKC", c):
            out.append(" " + unicodedata.normalize("NFKC", c).replace("\u2044", "/"))
        elif unicodedata.decomposition(c).startswith("<super> 00") and c.isdigit():
            out.append(f"^{unicodedata.digit(c)}")
        elif unicodedata.category(c) != "Sc":
            out.append(c)
    return "".join(out)
