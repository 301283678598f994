r"""LaTeX in answers: find `\boxed{...}` by its braces, and convert markup to plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_BOX = 4096  # characters of a box's content
_DEPTH = 40
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])[ \t]*(?:\{|(?P<bare>[^\s{}\\$]))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(
    r"\\(?P<command>[A-Za-z]+)\*?[ \t]*|\\(?P<symbol>.)|(?P<open>\{)|(?P<close>\})|(?P<dollars>\$\$?)|"
    r"(?P<text>[^\\{}$]+)",
    re.DOTALL,
)
DROPPED = {
    "left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg", "displaystyle", "textstyle",
    "limits",
    "boxed", "fbox", "framebox",
    "text", "textrm", "textbf", "textit", "textsf", "texttt", "textup", "textnormal", "mathrm", "mathbf", "mathit",
    "mathsf",
    "mathtt", "mathnormal", "mbox", "hbox", "operatorname", "emph", "underline", "boldsymbol", "bm", "bf", "rm", "it",
    "unit",
    "ensuremath", "phantom", "vphantom", "hphantom", "color", "bold", "num", "si", "SI",
}  # fmt: skip
_WORDS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "approx": "≈", "simeq": "≈", "sim": "≈", "pm": "±", "mp": "±",
    "pi": "π",
    "infty": "∞", "circ": "°", "degree": "°", "degrees": "°", "celsius": "°C", "le": "≤", "leq": "≤", "ge": "≥",
    "geq": "≥",
    "lt": "<", "gt": ">", "ne": "≠", "neq": "≠", "implies": " = ", "Rightarrow": " = ", "quad": " ", "qquad": " ",
    "space": " ", "ldots": "...", "dots": "...", "cdots": "...", "percent": "%", "pounds": "£", "euro": "€",
    "therefore": " ",
    "thinspace": "\u2009", "newline": "\n", "par": "\n", "minus": "-", "colon": ":", "lbrack": "[", "rbrack": "]",
    "equiv": "=",
    "dollar": "$", "textdollar": "$", "cup": "∪", "cap": "∩", "emptyset": "∅", "varnothing": "∅",
}  # fmt: skip
_SYMBOLS = {",": "\u2009", ";": "\u2009", ":": "\u2009", "!": "", " ": " ", "\n": " ", "(": "", ")": "", "[": "",
    "]": "",
            "\\": "\n", "/": ""}  # fmt: skip
_ESCAPED = "%&#_$"


# Beside a currency sign "m" is a million, which has to be seen before the sign is dropped: "$3m", but not "$3m$".
_SHORT_AMOUNT = re.compile(
    r"((?:[$\u00a3\u20ac\u00a5\u20b9]|(?<![A-Za-z])(?:USD|EUR|GBP))[ ]?\d[\d.,]*)[ ]?([kmb])(?![\w/^]|\s*\$)",
    re.IGNORECASE,
)

_COUNTRY = re.compile(r"(?<![A-Za-z])(?:US|CA|AU|NZ|HK|R)(?=\\?\$\s?\d)")  # "US$12"


class Box(NamedTuple):
    """A box at text[start:end]; `content` is None where its braces do not close."""

    start: int
    end: int
    content: str | None


def boxes(text: str) -> Iterator[Box]:
    r"""The outermost `\boxed{...}` of `text`, in order; one that does not close is the last."""
    position = 0
    while match := _BOX.search(text, position):
        if match["bare"]:
            digits = re.compile(r"[\d.,]*\d|\S").match(text, match.start("bare"))
            position = digits.end() if digits else match.end()
            yield Box(match.start(), position, text[match.start("bare") : position])
            continue
        depth, position = 1, match.end()
        for brace in _BRACE.finditer(text, match.end(), min(len(text), match.end() + MAX_BOX)):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                position = brace.end()
                break
        if depth:
            yield Box(match.start(), len(text), None)
            return
        yield Box(match.start(), position, text[match.end() : position - 1])


def simplify(text: str) -> str:
    r"""`text` without LaTeX's markup: `\frac{1}{2}` as `1/2`, `2{,}250` as `2,250`, `\times` as `*`, `\text{ cm}` as
    ` cm`.

    Commands that are not known stay, so that what holds one is no number. An amount such as `$3m` becomes `3M`.
    """
    text = _COUNTRY.sub("", text) if "$" in text else text
    text = _SHORT_AMOUNT.sub(lambda amount: amount[1] + amount[2].upper(), text)
    if "\\" not in text and "$" not in text and "{" not in text:
        return text
    return _group(_Tokens(text), 0)


class _Tokens:
    def __init__(self, text: str):
        self.text, self.position = text, 0

    def next(self) -> re.Match[str] | None:
        match = _TOKEN.match(self.text, self.position)
        self.position = match.end() if match else len(self.text)
        return match

    def argument(self, depth: int) -> str:
        """Return a command's argument: a braced group, a command or one character."""
        while self.text[self.position : self.position + 1] == " ":
            self.position += 1
        start = self.position
        token = self.next()
        if token is None or token["close"] or token["dollars"]:
            self.position = start
            return ""
        if token["open"]:
            return _group(self, depth + 1)
        if token["text"]:
            self.position = token.start() + 1
            return token[0][0]
        return _command(token, self, "", depth + 1)


def _group(tokens: _Tokens, depth: int) -> str:
    """The plain text up to the closing brace, or the end."""
    out: list[str] = []
    last = ""
    while token := tokens.next():
        if token["close"]:
            if depth:
                break
            continue
        if token["text"]:
            piece = token["text"].replace("~", " ")
        elif token["dollars"]:
            piece = ""
        elif token["open"]:
            piece = _group(tokens, depth + 1) if depth < _DEPTH else ""
            if last.endswith(("^", "_")) and len(piece) > 1 and piece != "°":
                piece = f"({piece})"
        else:
            piece = _command(token, tokens, last, depth)
        if piece.startswith("°") and last.endswith("^"):
            out[-1] = out[-1][:-1]
        if piece:
            out.append(piece)
            last = piece
    return "".join(out)


def _command(token: re.Match[str], tokens: _Tokens, before: str, depth: int) -> str:
    if symbol := token["symbol"]:
        return symbol if symbol in _ESCAPED else _SYMBOLS.get(symbol, "\\" + symbol)
    name = token["command"]
    if name in DROPPED:
        return ""
    if name in _WORDS:
        return _WORDS[name]
    if depth >= _DEPTH:
        return "\\" + name
    if name in ("frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"):
        above, below = tokens.argument(depth), tokens.argument(depth)
        if above.strip().isdecimal() and below.strip().isdecimal():
            return f"{' ' if before[-1:].isdecimal() else ''}{above.strip()}/{below.strip()}"
        return f"({above})/({below})"
    if name == "sqrt":
        return f"√({tokens.argument(depth)})"
    return f"\\{name} "
