"""Options of a question, and which of them a text names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from qcrd_fast.data.expressions import visible
from qcrd_fast.data.latex import simplify

_QUESTION_END = 32768  # characters of a question that are looked at
_LABEL_STYLES = (  # of a line, then of options on one line: the label is the group
    r"^[ \t]*(?:[-*\u2022][ \t]+)?[(（\[【]?([A-Za-z])[)）\].:：、．】][ \t]*(?=\S)",
    r"^[ \t]*(?:[-*\u2022][ \t]+)?[(（\[【]?(\d{1,2})[)）\].:：、．】][ \t]+(?=\S)",
)
_LINES = tuple(re.compile(style, re.MULTILINE) for style in _LABEL_STYLES)
_INLINE = tuple(
    re.compile(style)
    for style in (
        r"(?:(?<!\w)\(|（)([A-Za-z])[)）][ \t]*", r"(?<![\w])[\[【]([A-Za-z])[\]】][ \t]*", r"(?<![\w(])([A-Za-z])[)）][ \t]*",
        r"(?<![\w'])([A-Z])[:：][ \t]*", r"(?<![\w'])([A-Z])[.．、][ \t]*", r"(?<![\w])[(（](\d)[)）][ \t]*",
    )
)  # fmt: skip
_CLEAR = 2  # of these styles, the first ones, whose labels stand in brackets, need no question mark before them
_FULL_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}  # letters
_TAIL = re.compile(r"[\s,;，；]+(?:or|and|oder|ou|o|или)?\s*$|\s+(?:or|and)\s*$", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:[\s:=*_`\"'\u201c\u300c]+|(?:(?:the|la|le|el|il|die|der|das|a|o|l['\u2019])\s*(?<=[\s'\u2019]))?(?:correct\s+|"
    r"right\s+|best\s+)?(?:answer|option|choice|letter|alternative|statement|opci\u00f3n|opzione|op\u00e7\u00e3o|"
    r"antwort|m\u00f6glichkeit|r\u00e9ponse|respuesta|risposta|resposta|letra|lettera|lettre|buchstabe|вариант|"
    r"ответ)(?![\w])(?:\s+is)?|"
    r"选项|選択肢|选择|选|選|that|is|indeed|therefore|(?:the|la|le|el|il|die|der)\s+(?=[(\[]?[A-Za-z](?![\w'\u2019])))",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:[(（\[【]\s*([A-Za-z]|\d{1,2})\s*[)）\]】]|([A-Za-z])(?![A-Za-z0-9_'\u2019\u00c0-\u024f\u0400-\u04ff])|"
    r"(\d{1,2})(?![\w.,]?\d|\w))(?P<close>[).:：、．）\]\s*_`,;，。!-]*)"
)
_REASON = re.compile(
    r"(?:because|since|as|for|due\s+to|given|weil|da|denn|car|parce|puisque|porque|ya\s+que|perch\u00e9|poich\u00e9|pois|"
    r"потому|так\s+как|поскольку|"
    r"is\s+(?:the\s+)?(?:correct|right|best|answer)|ist\s+richtig|est\s+(?:correcte|juste)|es\s+(?:la\s+)?correct[ao]|"
    r"\u00e8\s+corrett[ao]|\u00e9\s+(?:a\s+)?corret[ao])(?![\w])|"
    r"\u56e0\u4e3a|\u56e0\u70ba|\u7531\u4e8e|\u3067\u3059|\u3067\u3042\u308b|\u3060|\u304c\u6b63|\u9879|\u9009\u9879|"
    r"\u6b63\u786e",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"(?:(?:and|or|und|oder|et|ou|y|o|e|и|или)(?![\w])|"
    r"[,/&、\u548c\u6216])\s*[(\[（]?[A-Za-z][)\]）.]?(?![\w'\u2019])",
    re.IGNORECASE,
)
_NOT_THAT = "".join(f"(?<!not {article})" for article in ("", "a ", "an ", "the "))
_LABEL = re.compile(r"(?<!not )[(（]([A-Za-z])[)）]")
_DENIED = re.compile(
    r"(?<![\w])(?:wrong|incorrect|not|false|eliminate[ds]?|rule[ds]?\s+out|falsch|incorrecta?)(?![\w])|不|"
    r"错",
    re.IGNORECASE,
)
_CHOOSE = re.compile(
    r"(?<![\w])(?:(?:i|we|i'd|i'll)\s+(?:would\s+)?(?:choose|pick|select|chose|picked|selected|go\s+with|opt\s+for)|"
    r"(?:choose|pick|select|go\s+with)|"
    r"(?:correct|right|best)\s+(?:answer|option|choice|one)\s+(?:is|would\s+be)|(?:answer|option|choice)\s+(?:is|would\s+be)|"
    r"it\s+is|"
    r"w\u00e4hle|choisis|elijo|scelgo|escolho|выбираю)\s+(?P<what>[^.;\n]{1,120})",
    re.IGNORECASE,
)
_OPTION_IS = re.compile(
    r"(?:(?:option|choice|answer|alternative|opci\u00f3n|opzione|op\u00e7\u00e3o|вариант)\s+[(\[]?([A-Za-z]|\d)[)\].]?|"
    r"[(（\[]([A-Za-z]|\d)[)）\]]|(?<![\w'])([B-HJ-Z])|^([A-Z]))\s+"
    r"(?:is|seems|must\s+be|would\s+be|ist|est|es|\u00e8|\u00e9)\s+(?:the\s+|la\s+|a\s+)?(?:most\s+)?(?:correct|right|best|"
    r"answer|true|likely|richtig|correct[aeo]|corrett[ao]|corret[ao]|juste)",
    re.IGNORECASE,
)


class Choices(tuple[str, ...]):
    """The options' texts in order; `digits`: they are numbered, not lettered."""

    digits: bool = False


def parse_choices(question: str) -> Choices:
    """The options that a question lists, on lines of their own or on its own line; empty where it has none.

    Read are `(a) x`, `A) x`, `A. x`, `A: x`, `[A] x`, `（A）x`, with a bullet or without, and `1. x` on lines at the end.
    """
    text = question[-_QUESTION_END:]
    for pattern, digits in zip(_LINES, (False, True), strict=True):
        found = _sequence(text, pattern, digits, lines=True)
        if found and (not digits or _are_options(text, found[0])):
            return _choices(found[1], digits)
    for rank, pattern in enumerate(_INLINE):
        digits = r"\d" in pattern.pattern
        found = _sequence(text, pattern, digits, lines=False)
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


def _sequence(text: str, pattern: re.Pattern[str], digits: bool, lines: bool) -> tuple[int, list[str]] | None:
    """Where the last run of labels A, B, C, ... or 1, 2, 3, ... begins, and the texts behind them."""
    first = "1" if digits else "a"
    run: list[re.Match[str]] = []
    for match in pattern.finditer(text):
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
        piece = text[match.end() : stop].split("\n")[0].strip()
        texts.append(piece if lines else _TAIL.sub("", piece).strip())
    return (run[0].start(), texts) if all(texts) else None


def plain_text(text: str) -> str:
    """Two spellings of one text alike: without case, outer punctuation and repeated white space, in NFKC."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.split())
    return text.strip(" .,;:!?\"'`*()[]{}") or text


def read_choice(text: str, choices: Sequence[str]) -> tuple[int | None, str | None]:
    """(index, text) of the option that a text, such as what follows "the answer is", consists of; (None, None) for none.

    Where the options are not known, the index is that of the letter, and the text is what follows it.
    """
    keys = [plain_text(choice) for choice in choices]
    raw = visible(text).translate(_FULL_WIDTH).strip()
    raw = raw[1:-1] if raw.startswith("[[") and raw.endswith("]]") else raw
    text = simplify(raw).strip()
    for whole in (raw, text):
        if plain_text(whole) in keys:
            return keys.index(plain_text(whole)), plain_text(whole)
    text = text.strip("*_`\"'\u201c\u201d\u300c\u300d ")
    digits = getattr(choices, "digits", False)
    start = 0
    while lead := _LEAD.match(text, start):
        start = lead.end()
    for begin in (0, start) if start else (0,):
        label = _LABELLED.match(text, begin)
        if label and (label[1] or label[2] or label[3]) and (digits or not (label[1] or label[2] or label[3]).isdigit()):
            index, rest = _index(label[1] or label[2] or label[3], digits), text[label.end() :]
            separated = bool(label[1] or label["close"].strip())
            found = _labelled(index, rest, separated, label["close"], keys)
            if found is not None:
                return found
            if choices and separated:
                return None, None
    rest = plain_text(text[start:])
    rest = re.sub(r"^(?:an?|the)\s+(?=\S)", "", rest) if rest not in keys else rest
    if not choices:
        return None, (plain_text(text) or None)
    if rest in keys:
        return keys.index(rest), rest
    labels = {label.lower() for label in _LABEL.findall(text)}
    if labels:
        index = _index(labels.pop(), False)
        return (index, keys[index]) if not labels and index < len(keys) and not _DENIED.search(text) else (None, None)
    whole = plain_text(text)
    named = {key for key in keys if key and re.search(rf"(?<!\w){_NOT_THAT}{re.escape(key)}(?!\w)", whole)}
    if len(named) == 1:
        key = named.pop()
        return keys.index(key), key
    return None, None


def _index(label: str, digits: bool) -> int:
    return int(label) - 1 if digits and label.isdigit() else ord(label.lower()) - ord("a")


def _labelled(index: int, rest: str, separated: bool, close: str, keys: list[str]) -> tuple[int | None, str | None] | None:
    """The option with a label, by what follows it: nothing, its text, or a reason; None: the letter is no label."""
    if _ANOTHER.match(("," if "," in close else "") + rest) or _ANOTHER.match(rest.lstrip("/ ")) or rest.startswith("/"):
        return None, None
    after = plain_text(rest)
    known = index < len(keys)
    if not after or _REASON.match(rest) or re.match(r"\n|[(（]", rest):
        return (index, keys[index]) if known else (None, None) if keys else (index, None)
    if not separated:
        return None
    if _DENIED.search(rest) and not (known and after.startswith(keys[index])):
        return None, None
    if not keys:
        return index, after
    if not known:
        return None, None
    if after == keys[index] or after.startswith(keys[index]) or keys[index].startswith(after):
        return index, keys[index]
    named = [key for key in keys if key and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", after)]
    return (None, None) if named and keys[index] not in named else (index, keys[index])


def choice_in_sentence(sentence: str, choices: Sequence[str]) -> tuple[int | None, str | None]:
    """The option that a sentence settles on, such as "Option B is correct." or "So I choose (B)."."""
    text = simplify(visible(sentence))
    if _DENIED.search(text):
        return read_choice(text, choices) if choices and not _LABEL.search(text) else (None, None)
    if (match := _OPTION_IS.search(text)) and (label := next(filter(None, match.groups()), None)):
        digits = getattr(choices, "digits", False)
        if label.isdigit() == digits:
            index = _index(label, digits)
            if choices:
                keys = [plain_text(choice) for choice in choices]
                return (index, keys[index]) if 0 <= index < len(keys) else (None, None)
            return index, None
    if match := _CHOOSE.search(text):
        found = read_choice(match["what"], choices)
        if found[0] is not None:
            return found
    found = read_choice(text, choices)
    return found if choices or found[0] is not None else (None, None)
