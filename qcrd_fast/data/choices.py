"""Parse the options that a question lists, and write them."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from qcrd_fast.data.latex import simplify
from qcrd_fast.data.schema import RowError, folded

_QUESTION_END = 32768  # characters of a question that are looked at
_LABEL_STYLES = (  # of a line, then of options on one line: the label is the group
    r"^[ \t]*(?:[-*\u2022][ \t]+)?[(（\[【]?([A-Za-z])[)）\].:：、．】][ \t]*(?=\S)",
    r"^[ \t]*(?:[-*\u2022][ \t]+)?[(（\[【]?(\d{1,2})[)）\].:：、．】][ \t]+(?=\S)",
    r"^[ \t]*([A-Z])[ \t]+[-\u2013\u2014|][ \t]+(?=\S)",
)
_LINES = tuple(re.compile(style, re.MULTILINE) for style in _LABEL_STYLES)
_INLINE = tuple(
    re.compile(style)
    for style in (
        r"(?:(?<!\w)\(|（)([A-Za-z])[)）][ \t]*", r"(?:(?<!\w)\[|【)([A-Za-z])[\]】][ \t]*",
        r"(?<![\w(])([A-Za-z])[)）][ \t]*",
        r"(?<![\w'])([A-Z])[:：][ \t]*", r"(?<![\w'])([A-Z])[.．、][ \t]*", r"(?<![\w])[(（](\d)[)）][ \t]*",
    )
)  # fmt: skip
_CLEAR = 2  # of these styles, the first ones, whose labels stand in brackets, need no question mark before them
_TAIL = re.compile(r"[\s,;，；]+(?:or|and|oder|ou|o|или)?\s*$|\s+(?:or|and)\s*$", re.IGNORECASE)


_WIDE = {**{code: code - 0xFEE0 for code in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}, 0xFF0E: "."}
_BOLD = re.compile(r"(\*\*|__)([(\[]?[A-Za-z][)\].:]{0,2})\1")
_TEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{\s*\([A-Za-z]\)")
_TASK = re.compile(r"(?:compute|find|what|how|calculate|solve|show|prove)(?![\w])", re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"(?:[.;]\s*|\s+)(?:(?:please\s+)(?:answer|choose|select|pick|respond|reply|give)|answer\s+with|answer\s*:)(?:(?![.;]\s).)*\.?$",
    re.IGNORECASE,
)


MAX_CHOICES = 26
NO_CHOICE = "(no option)"  # at a label that a question skips
_FAR = 10  # the last label, as a number, up to which skipped ones are filled in
LATIN = string.ascii_lowercase
ALPHABETS = {  # in which options are lettered: the Latin letters that look like theirs at the same place
    LATIN: LATIN,
    "абвгдежзиклмнопрст": "a",
    "αβγδεζηθικλμν": "ab",
}
_LABELS = (*map(tuple, ALPHABETS), tuple(map(str, range(1, MAX_CHOICES + 1))))  # of choices, in order


def latin_letters(letters: str) -> dict[int, str]:
    """Return the translation of an alphabet's letters to the Latin ones of the same place; of Latin ones to no label,
    but for those that look like theirs at the same place."""
    table = str.maketrans(dict.fromkeys(LATIN + LATIN.upper(), "\u00f8"))
    for own, latin in [*zip(letters, LATIN, strict=False), *((c, c) for c in ALPHABETS[letters])]:
        table |= {ord(own): latin, ord(own.upper()): latin.upper()}
    return table


class Choices(tuple[str, ...]):
    """The options' texts in order.

    digits: they are numbered, not lettered. letters: the alphabet of their labels, a key of `ALPHABETS`.
    """

    digits: bool = False
    letters: str = LATIN


def parse_choices(question: str) -> Choices:
    """Return the options in a question, one a line or inline; empty if it lists none.

    Read are `(a) x`, `A) x`, `A. x`, `A: x`, `[A] x`, `（A）x`, with or without a bullet, and `1. x` on last lines; the
    letters are Latin, Cyrillic or Greek.
    """
    text = _BOLD.sub(r"\2", question[-_QUESTION_END:].translate(_WIDE))
    if _TEX.search(text):
        text = simplify(text)
    for letters in ALPHABETS:
        if letters == LATIN or letters[1] in text.casefold():
            choices = _lettered(text, text if letters == LATIN else text.translate(latin_letters(letters)))
            if choices:
                choices.letters = LATIN if choices.digits else letters
                return choices
    return Choices()


def _lettered(text: str, latin: str) -> Choices:
    """Return the options in a text, with the labels of `latin`, which is the text with other letters."""
    for pattern, digits in zip(_LINES, (False, True, False), strict=True):
        found = _sequence(text, latin, pattern, digits, lines=True)
        if found and _is_told(text, found):
            continue
        if found and ((not digits and pattern is not _LINES[2]) or _are_options(text, found[0])):
            return _choices(found[1], digits)
    for rank, pattern in enumerate(_INLINE):
        digits = r"\d" in pattern.pattern
        found = _sequence(text, latin, pattern, digits, lines=False)
        if found and _is_told(text, found):
            continue
        if found and (rank < _CLEAR or _are_options(text, found[0])):
            return _choices(found[1], digits)
    return Choices()


def _choices(texts: list[str], digits: bool) -> Choices:
    choices = Choices(texts)
    choices.digits = digits
    return choices


def _are_options(text: str, start: int) -> bool:
    before = text[:start].rstrip()
    return (
        before.endswith(("?", "？"))
        or re.search(r"(?:options|choices|following|below|选项)\W{0,4}$", before, re.IGNORECASE) is not None
    )


def _is_told(text: str, found: tuple[int, list[str]]) -> bool:
    """Return whether the labels are part of the question's text, or questions themselves, and not options."""
    if _are_options(text, found[0]):
        return False
    if not text[: found[0]].strip(" \t*-\u2022$\n(") and _TASK.match(found[1][0]):
        return True
    end, last = text.rstrip(), found[1][-1]
    if not end.endswith(("?", "？")):
        return False
    return "\n" in end[end.rfind(last[:20]) :] or re.search(r"[.!]\s+\S[^.!]*$", last) is not None


def _sequence(
    text: str, latin: str, pattern: re.Pattern[str], digits: bool, lines: bool
) -> tuple[int, list[str]] | None:
    """Find the last run of labels A, B, C, ... or 1, 2, 3, ... and the texts after them."""
    first = "1" if digits else "a"
    run: list[re.Match[str]] = []
    for match in pattern.finditer(latin):
        label = match[1].lower()
        if label == (str(len(run) + 1) if digits else chr(ord("a") + len(run))):
            run.append(match)
        elif label == first:
            run = [match]
    if len(run) < 2:
        return None
    texts = []
    for index, match in enumerate(run):
        stop = run[index + 1].start() if index + 1 < len(run) else len(text)
        rows = text[match.end() : stop].split("\n\n")[0].strip().split("\n")
        piece = " ".join(row.strip() for row in rows) if lines and index + 1 < len(run) else rows[0].strip()
        piece = _INSTRUCTION.sub("", piece).strip() if index + 1 == len(run) else piece
        texts.append(piece if lines else _TAIL.sub("", piece).strip())
    return (run[0].start(), texts) if all(texts) else None


def with_choices(question: str, choices: tuple[str, ...], labels: Sequence[str] = ()) -> str:
    """The question followed by `Answer Choices:` and a line `(a) ...` for each choice.

    With `labels` that are letters (Latin, Cyrillic, Greek) or numbers from 1, each choice keeps its own, so that a
    reply's "(C)" is that one; labels that are skipped have a line without an option.

    Raises:
        RowError: more choices than letters.
    """
    if len(choices) > MAX_CHOICES:
        raise RowError(f"{len(choices)} choices; at most {MAX_CHOICES} are read, as each has a letter")
    names, places = tuple(LATIN), dict(enumerate(choices))
    own = [label.lstrip("0") if label.isdigit() else label.casefold() for label in labels]
    for alphabet in _LABELS:
        found = [alphabet.index(label) for label in own if label in alphabet]
        if found and len(set(found)) == len(choices) and max(found) < max(_FAR, len(choices)):
            names, places = alphabet, dict(zip(found, choices, strict=True))
    lines = [f"({names[place]}) {places.get(place, NO_CHOICE)}" for place in range(max(places, default=-1) + 1)]
    return "\n".join([question.rstrip(), "Answer Choices:", *lines])


def plain_text(text: str) -> str:
    """Two spellings of one text alike: without case, outer punctuation and repeated white space, `folded`."""
    text = folded(folded(text).casefold())
    text = " ".join(text.split())
    return text.strip(" .,;:!?\"'`*()[]{}") or text
