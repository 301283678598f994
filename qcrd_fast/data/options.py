"""Match a text to one option of a question; None if it names several, contradicts itself or excludes one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data.choices import LATIN, Choices, latin_letters, plain_text
from qcrd_fast.data.expressions import strip_invisible
from qcrd_fast.data.latex import simplify
from qcrd_fast.data.quantities import read_quantity, sole_quantity
from qcrd_fast.data.schema import one_line

Named = tuple[int | None, str | None]
NONE: Named = (None, None)

_FULL_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}  # letters
_LEAD = re.compile(
    r"(?:[\s:=*_`\"'\u201c\u300c]+|(?:(?:the|la|le|el|il|die|der|das|a|o|l['\u2019])\s*(?<=[\s'\u2019]))?(?:correct\s+|"
    r"right\s+|best\s+)?(?:answer|option|choice|letter|alternative|statement|opci\u00f3n|opzione|op\u00e7\u00e3o|"
    r"antwort|m\u00f6glichkeit|r\u00e9ponse|respuesta|risposta|resposta|alternativa|letra|lettera|lettre|buchstabe|вариант|"
    r"ответ|буква)(?![\w])(?:\s+(?:is|must\s+be))?|"
    r"选项|選択肢|选择|选|選|所以|因此|故|よって|したがって|だから|答えは|"
    r"(?:that|is|indeed|therefore|thus|hence|so|then|it['\u2019]s|it\s+(?:is|must\s+be|has\s+to\s+be)|must\s+be|finally|"
    r"also|daher|deshalb|somit|folglich|donc|ainsi|alors|entonces|luego|por\s+(?:lo\s+)?tanto|quindi|dunque|perci\u00f2|"
    r"portanto|logo|assim|\u00e9|итак|значит|поэтому|следовательно)(?![\w]),?|"
    r"(?:the|la|le|el|il|die|der|a|o)\s+(?=[(\[]?[A-Za-z](?![\w'\u2019])))",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:[(（\[【]\s*([A-Za-z]|\d{1,2})\s*[)）\]】]|([A-Za-z])(?![A-Za-z0-9_'\u2019\u00c0-\u024f\u0400-\u04ff])|"
    r"(\d{1,2})(?![\w.,]?\d|\w))(?P<close>[).:：、．）\]\s*_`,;，。!\u2013\u2014-]*)"
)
_ANSWER_LINE = re.compile(r"A\s*[:：]\s*(?=[(\[（【]?[A-Za-z][)\]）】]?\W*$)")  # "A: B", the answer in a dialogue
_BECAUSE = (
    r"because|since|due\s+to|given\s+that|weil|denn|parce\s+qu|puisque?|porque|ya\s+que|perch\u00e9|poich\u00e9|pois|"
    r"потому|так\s+как|поскольку"
)
_REASON = re.compile(
    rf"(?:{_BECAUSE}|as|for|given|da|car|is\s+(?:(?:the|my)\s+)?(?:most\s+)?(?:correct|right|best|answer|likely|it)|fits|works|"
    r"is\s+it|makes\s+(?:the\s+most\s+)?sense|seems\s+(?:right|correct|best)|must\s+be\s+(?:right|correct|it)|"
    r"ist\s+(?:richtig|korrekt)|stimmt|passt|est\s+(?:correcte?|juste|exacte?)|es\s+(?:la\s+)?correct[ao]|"
    r"\u00e8\s+(?:corrett[ao]|giust[ao]|esatt[ao])|\u00e9\s+(?:a\s+)?(?:corret[ao]|cert[ao])|верный|верен|правильн)(?![\w])|"
    r"верн|правильн|因为|因為|由于|です|である|だ(?:[。]|$)|が正|が適|项|選項|选项|正确|正確|是(?:正确|对)",
    re.IGNORECASE,
)
_CONJUNCTION = re.compile(r"(?:as|for|given|da|car)(?![\w])", re.IGNORECASE)
_ARTICLES = tuple(ord(letter) - ord("a") for letter in "aeoyi")
_REASON_CUT = re.compile(
    rf"(?:[,;]\s*|\s+)(?:{_BECAUSE})(?![\w])|[,;]\s*(?:as|for|da|car|which|while|whereas|where)(?![\w])|，?(?:因为|因為|由于)|"
    r"[,;]\s*(?:and|so)\s+(?=the\s+others)",
    re.IGNORECASE,
)
_SO_CUT = re.compile(  # what comes behind settles the matter
    r"[,;，。]\s*(?:and\s+)?(?:so|thus|hence|therefore|leaving|which\s+leaves|also|daher|deshalb|donc|as\u00ed\s+que|"
    r"por\s+(?:lo\s+)?tanto|quindi|perci\u00f2|portanto|logo|поэтому|значит|所以|因此|だから|よって)(?![A-Za-z])",
    re.IGNORECASE,
)
_CONTRAST = re.compile(  # "B, not A"
    r"(?:(?:[,;，、]\s*(?:(?:and|und|et|y|e|и|а)\s+)?|\s+(?:and|und|et|y|e|и|а)\s+)"
    r"(?:not|never|nicht|pas|non|no|n\u00e3o|не)\s+(?!(?:only|just|nur|solo|s\u00f3)\b)|"
    r"[,;]?\s+(?:rather\s+than|instead\s+of|statt|anstatt|plut\u00f4t\s+que|en\s+lugar\s+de|invece\s+di|em\s+vez\s+de)\s+|"
    r"[,，、]?\s*(?:而不是|不是|而非|ではなく))(?P<what>.{1,120})$",
    re.IGNORECASE | re.DOTALL,
)
_BUT = re.compile(  # "not A but B"
    r"^.{0,60}?(?:(?<![\w])(?:not|nicht|no|pas|non|n\u00e3o|не)(?![\w])|不是)[^.;。]{1,80}?(?:[,，]?\s*(?:\bbut|\bsondern|\bsino|"
    r"\bmais|\bma|\bmas)\s|[,，]\s*а\s|[,，]?\s*而是)(?P<what>[^,;]{1,120})$",
    re.IGNORECASE | re.DOTALL,
)
_CAPITAL = (
    r"(?:[(\[（【]\s?[A-Za-z]\s?[)\]）】]|[A-Z](?![\w'\u2019])(?!\s+[a-z])|[b-hj-xz][).]?(?=\s*(?:$|[.,;)]))|"
    r"[aiy](?=[).]?\s*$))"
)
_ANOTHER = re.compile(
    r"(?:\s*(?:[,;/&+|、\n和或与與及跟とや]|(?<![^\W_])(?:[Aa]nd|[Oo]r|und|oder|et|ou|y|o|e|и|или|possibly|maybe|perhaps|also|"
    r"either|both|vs\.?)(?![\w]))\s*){1,4}"
    rf"{_CAPITAL}|\s*[(\[（【]\s?[A-Za-z]\s?[)\]）】]|\s+[B-HJ-Z](?![\w'\u2019])"
)
_LABEL = re.compile(r"[(（\[【]([A-Za-z])[)）\]】]")
_DENIED = re.compile(
    r"(?<![\w])(?:wrong|incorrect\w*|not|cannot|never|nobody|no\s*one|none|neither|nor|no|false|invalid|eliminat\w*|"
    r"rul(?:e[sd]?|ing)\s+(?:\w+\s+)?out|ruled|exclud\w*|reject\w*|discard\w*|dismiss\w*|except\w*|other\s+than|apart\s+from|"
    r"(?:everything|anything|all|nothing)\s+but|instead|unlikely|improbable|implausible|impossible|fails?|failed|nonsens\w*|"
    r"absurd|(?:is|are|be|seems?)\s+too|least|second|second-best|worst|worse|less|avoid\w*|unrelated|irrelevant|hardly|barely|"
    r"was\s+going\s+to|tempt\w*|initially|at\s+first|distract\w*|could|might|may|maybe|perhaps|possibly|if|unless|whether|"
    r"falsch\w*|nicht|kein\w*|nie|niemals|niemand|au(?:\u00df|ss)er|ausgeschlossen|ausschlie(?:\u00df|ss)en|scheidet|unwahrscheinlich|"
    r"unm\u00f6glich|weder|(?:ist|sind)\s+zu|vielleicht|oder|"
    r"faux|fausse|ne|pas|jamais|aucun\w*|personne|sauf|exclu\w*|\u00e9limin\w*|rejet\w*|trop|ni|peut-\u00eatre|"
    r"nunca|nadie|ning\u00fan\w*|fals[oa]|descart\w*|elimin\w*|excluy\w*|excepto|salvo|imposible|demasiado|tampoco|quiz\u00e1s?|"
    r"non|mai|nessun\w*|sbagliat\w*|errat\w*|scart\w*|esclud\w*|eccetto|tranne|impossibile|troppo|forse|"
    r"n\u00e3o|ningu\u00e9m|nenhum\w*|errad\w*|exceto|imposs\u00edvel|improv\u00e1vel|nem|talvez|"
    r"не|нет|ни|никогда|никто|неверн\w*|неправильн\w*|ошибоч\w*|исключ\w*|кроме|слишком|возможно|маловероятно|если)(?![\w])|"
    r"n['\u2019]t(?![\w])|n['\u2019](?=[a-z\u00e0-\u00ff])|makes?\s+no|"
    r"不|错|錯|非|没|沒|無|无|排除|除了|除去|误|誤|也许|可能|如果|違|でない|ではない|じゃない|ません|除|ない|ありえ",
    re.IGNORECASE,
)
_BEFORE = re.compile(  # of an announcement: the one it announces is not chosen
    r"(?<![\w])(?:least|less|second|third|worst|only\s+wrong|second-best|next|am\s+wenigsten|zweit\w*|moins|menos|meno|наименее|"
    r"don['\u2019]t\s+think|doubt)(?:[\s-]+[^\W\d_]+){0,3}[\s*_]*$|(?:最不|不|第二)[\w]{0,4}$",
    re.IGNORECASE,
)
_CHOOSE = re.compile(
    r"(?<![\w])(?:(?:i|we|i'd|i'll)\s+(?:would\s+|will\s+|therefore\s+)?(?:choose|pick|select|chose|picked|selected|go\s+with|"
    r"opt\s+for)|(?:choose|pick|select|go\s+with)|"
    r"(?:correct|right|best)\s+(?:answer|option|choice|one)\s+(?:is|would\s+be)|(?:answer|option|choice)\s+(?:is|would\s+be)|"
    r"it\s+(?:is|must\s+be)|it['\u2019]s|leaves|leaving|w\u00e4hle(?:n)?|choisi[ts]|choisissons|elijo|elegimos|scelgo|scegliamo|"
    r"escolho|escolhemos|выбираю|выбираем)\s+(?P<what>[^.;\n]{1,120})",
    re.IGNORECASE,
)
_OPTION_IS = re.compile(
    r"(?:(?:option|choice|answer|alternative|alternativa|opci\u00f3n|opzione|op\u00e7\u00e3o|вариант|antwort|r\u00e9ponse|"
    r"respuesta|risposta|resposta|ответ)\s+[(\[]?([A-Za-z]|\d)[)\].]?|"
    r"[(（\[]([A-Za-z]|\d)[)）\]]|(?<![\w'])([B-HJ-Z])|^([A-Z]))\s+"
    r"(?:(?:is|seems|must\s+be|would\s+be|ist|est|es|\u00e8|\u00e9)\s+(?:the\s+|la\s+|die\s+|a\s+)?(?:most\s+)?(?:correct|right|"
    r"best|answer|true|likely|richtig|korrekt|correct[aeo]|corrett[ao]|corret[ao]|juste|giusta|certa)|"
    r"(?:fits|works|matches)(?![\w])|stimmt|passt|верный|верен|правильн\w+)",
    re.IGNORECASE,
)
_SMALL = re.compile(
    r"a|an|the|this|that|in|on|at|to|of|for|by|with|from|into|is|are|was|it|its|be|one|only|some|my|your|their|his|her|our|just|"
    r"simply|must|would|should|will|and|goes|go|so|der|die|das|den|dem|ein|eine|einen|im|in|am|auf|mit|zu|ist|es|le|la|les|l|un|"
    r"une|des|du|de|dans|en|est|c|el|los|las|una|al|il|lo|gli|i|uno|nel|nella|\u00e8|di|o|os|as|um|uma|no|na|do|da|\u00e9|em|"
    r"в|на|это|с|из"
)
_VERDICT = re.compile(
    r"(?<![\w])(?:correct|right|yes|true|best|fits|richtig|ja|oui|juste|correct[aeo]|s\u00ed|corrett[ao]|giusto|"
    r"corret[ao]|sim|certo|верно|да)(?![\w])|[\u2713\u2714\u2705]|正确|对|正しい",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^[\s.,;:!?\"'`*()\[\]{}]*(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*\u2022]\s+)?[*_(\[（【]{0,4}([A-Za-z])[*_)\]）】.:：、-]{1,5}\s*(?=\S)")
_LOOSE = re.compile(
    r"[a-z]{1,2}|yes|no|true|false|maybe|none|all|both|ja|nein|oui|non|s\u00ed|s\u00ec|sim|n\u00e3o|да|нет"
)


_EDGES = " *_`\"'\u201c\u201d\u300c\u300d"


def _trimmed(text: str) -> str:
    return one_line(text).strip(_EDGES).rstrip(".,;:").rstrip(_EDGES)


_SPELLINGS: tuple[Callable[[str], str], ...] = (  # the finest first; all of them finer than `plain_text`
    one_line,
    _trimmed,
    lambda text: _trimmed(text).casefold(),
)


class _Table(NamedTuple):
    choices: Choices
    keys: tuple[str, ...]  # by `plain_text`
    names: tuple[str, ...]  # the keys; of options that share a key their own spelling
    shared: dict[str, tuple[int, ...]]  # key: the options that share it and differ in spelling
    pattern: re.Pattern[str] | None  # of the options' texts, the longest first
    values: tuple[Fraction | None, ...] | None  # where the options are numbers

    @property
    def digits(self) -> bool:
        return self.choices.digits


@functools.lru_cache(maxsize=512)
def _build(choices: tuple[str, ...], digits: bool) -> _Table:
    keys = tuple(plain_text(choice) for choice in choices)
    spelt: dict[str, dict[str, int]] = {}  # by key, the first option of each spelling
    for index, key in enumerate(keys):
        spelt.setdefault(key, {}).setdefault(one_line(choices[index]), index)
    shared = {key: tuple(found.values()) for key, found in spelt.items() if len(found) > 1}
    names = tuple(one_line(choice) if key in shared else key for key, choice in zip(keys, choices, strict=True))
    texts = sorted({key for key in keys if key}, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w])(?:{'|'.join(map(re.escape, texts))})(?![\w])") if texts else None
    values: tuple[Fraction | None, ...] | None = None
    if any(re.search(r"\d", choice) for choice in choices):
        numbers = [read_quantity(choice).number for choice in choices]
        values = tuple(number.value if number else None for number in numbers)
        if sum(value is None for value in values) > 1:
            values = None
    known = Choices(choices)
    known.digits = digits
    return _Table(known, keys, names, shared, pattern, values)


def _table(choices: Sequence[str]) -> _Table:
    return _build(tuple(choices), getattr(choices, "digits", False))


_OTHER_LABEL = re.compile(  # of another alphabet: "(б)", "Б) 4", "Б. 4", "вариант Б", "Б"
    r"(?<=[(\[（【])\w(?=[)\]）】])|(?<!\w)\w(?=[)\]）】])|(?<!\w)[^\W\d_](?=[.:：])|(?<!\w)[^\W\d_](?=\W*$)|"
    r"(?<=вариант )[^\W\d_](?!\w)|(?<=ответ )[^\W\d_](?!\w)|(?<=буква )[^\W\d_](?!\w)",
    re.IGNORECASE,
)


def _in_latin(text: str, choices: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return a text and options with the labels of another alphabet in Latin letters."""
    letters = getattr(choices, "letters", LATIN)
    if letters == LATIN:
        return text, choices
    plain, table = Choices(choices), latin_letters(letters)
    if plain_text(text) in map(plain_text, choices):
        return text, plain
    return _OTHER_LABEL.sub(lambda label: label[0].translate(table), text), plain


def option_name(index: int, choices: Sequence[str]) -> str:
    """The option's text as `plain_text` gives it, where no other option has the same; else in its own spelling."""
    return _table(choices).names[index]


def _spelt(key: str, text: str, table: _Table) -> tuple[int, ...]:
    """Return the options with a key that a text consists of; several where its spelling is none of theirs."""
    options = table.shared.get(key) or (table.keys.index(key),)
    for spelling in _SPELLINGS if len(options) > 1 else ():
        said = spelling(text)
        if same := [index for index in options if spelling(table.choices[index]) == said]:
            return tuple(same)
    return options


def _spelt_within(key: str, text: str, table: _Table) -> tuple[int, ...]:
    """Return the options with a key that a text has in their own spelling; all of them where it has none."""
    if key not in table.shared:
        return (table.keys.index(key),)
    spellings = {one_line(table.choices[index]): index for index in table.shared[key]}
    longest = sorted(spellings, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)"
    named = {spellings[said] for said in re.findall(pattern, one_line(text))}
    return tuple(sorted(named)) or table.shared[key]


def _mentions(raw: str, table: _Table) -> list[int]:
    """Return the options mentioned in a text; of overlapping ones the longer."""
    found: list[int] = []
    if table.pattern is None:
        return found
    text = plain_text(raw)
    for match in table.pattern.finditer(text):
        key = match[0]
        if _LOOSE.fullmatch(key):  # a word of its own, and no article, initial or determiner
            before, after = text[: match.start()].rstrip(), text[match.end() :]
            if not re.match(r"\s*(?:$|[.,;:!)])", after) or not re.search(
                r"(?:^|[.,;:!(\"']|(?<![\w])(?:is|ist|est|es))$", before
            ):
                continue
        if table.values is not None and re.search(r"[-+.,/*^\d]\s?$|\d\s$", text[: match.start()][-3:]) is not None:
            continue
        found += _spelt_within(key, raw, table)
    return list(dict.fromkeys(found))


def _is_among(index: int | None, named: Sequence[int], table: _Table) -> bool:
    """Whether an option, or one of the same text, is named."""
    return index is not None and index < len(table.names) and table.names[index] in {table.names[at] for at in named}


def _masked(text: str, table: _Table) -> str:
    return table.pattern.sub(" ", text.casefold()) if table.pattern else text


def _denied(text: str, table: _Table) -> bool:
    return _DENIED.search(_masked(text, table)) is not None


def _index(label: str, digits: bool) -> int:
    return int(label) - 1 if digits and label.isdigit() else ord(label.lower()) - ord("a")


def _option(index: int, table: _Table) -> Named:
    return (index, table.keys[index]) if 0 <= index < len(table.keys) else NONE


def read_choice(text: str, choices: Sequence[str]) -> Named:
    """Return (index, text) of the option that a text consists of; (None, None) if none.

    Where the options are not known, the index is that of the letter, and the text is what follows it.
    """
    text, choices = _in_latin(text, choices)
    table = _table(choices)
    raw = strip_invisible(text).translate(_FULL_WIDTH).strip()
    raw = raw[1:-1] if raw.startswith("[[") and raw.endswith("]]") else raw
    text = simplify(raw).strip()
    for whole in (raw, text):
        if (key := plain_text(whole)) in table.keys:
            at, *others = _spelt(key, whole, table)
            label = _LABELLED.fullmatch(whole.strip("*_`\"' ")) if len(key) <= 2 else None
            letter = next(filter(None, label.groups()[:3]), "") if label else ""
            if others:
                if label and label[1]:
                    continue
                return NONE  # spelt as neither
            if (
                not letter
                or letter.isdigit() != table.digits
                or _index(letter, table.digits) in (at, *range(len(choices), 99))
            ):
                return at, key
            if not label or not label[1]:
                return NONE  # the letter of one option, the text of another
    text = text.strip("*_`\"'\u201c\u201d\u300c\u300d ")
    if line := _ANSWER_LINE.match(text):
        text = text[line.end() :]
    start = 0
    while lead := _LEAD.match(text, start):
        start = lead.end()
    for begin in (0, start) if start else (0,):
        label = _LABELLED.match(text, begin)
        letter = next(filter(None, label.groups()[:3]), "") if label else ""
        if label and letter and (table.digits or not letter.isdigit()):
            separated = bool(label[1] or label["close"].strip())
            found = _labelled(_index(letter, table.digits), text[label.end() :], separated, label["close"], table)
            if found is not None:
                return found
            if choices and separated:
                return NONE
    return _by_text(text, start, table)


def _by_text(text: str, start: int, table: _Table) -> Named:
    whole = plain_text(text)
    if not table.keys:
        return NONE if not whole or _is_prose(text) else (None, whole)
    for said in (text[start:], _ARTICLE.sub("", text[start:])):
        rest = plain_text(said)
        if rest in table.keys and not (len(rest) == 1 and rest.isalpha()):
            spelt = _spelt(rest, said, table)
            return (spelt[0], rest) if len(spelt) == 1 else NONE
    if turned := _BUT.match(text):
        found = read_choice(turned["what"].strip(" .。"), table.choices)
        return found if found[0] is not None else NONE
    if (cut := _CONTRAST.search(text)) and not _denied(text[: cut.start()], table) and text[: cut.start()].strip():
        text = text[: cut.start()]
        whole = plain_text(text)
    if (cut := _REASON_CUT.search(text)) and _mentions(text[: cut.start()], table):
        text = text[: cut.start()]
        whole = plain_text(text)
    if _denied(whole, table):
        return NONE
    named = _mentions(text, table)
    labels = {_index(label, table.digits) for label in _LABEL.findall(text)}
    if len(labels) == 1:
        found = _option(labels.pop(), table)
        return found if not named or _is_among(found[0], named, table) else NONE
    if labels:
        return NONE
    if table.values is not None:
        return _by_value(text, table)
    if len(named) != 1:
        return NONE
    key = table.keys[named[0]]
    words = re.findall(r"[\w'\u2019-]+", re.sub(r"^(?:an?|the)\s+", "", whole))
    others = [word for word in re.findall(r"[\w'\u2019-]+", whole.replace(key, " ")) if not _SMALL.fullmatch(word)]
    if others and len(words) <= len(key.split()) + 2 and not re.search(r"[\u3040-\u9fff]", whole):
        return NONE  # a short phrase that says something else, such as a bus station
    return _option(named[0], table)


def _by_value(text: str, table: _Table) -> Named:
    assert table.values is not None
    found = read_quantity(text)
    if found.number is None and not found.blocks:
        found = sole_quantity(text.rpartition("=")[2])
    if found.number is None:
        named = [index for index in _mentions(text, table) if not re.search(r"\d", table.keys[index])]
        return _option(named[0], table) if len(named) == 1 and not re.search(r"\d", text) else NONE
    same = [index for index, value in enumerate(table.values) if value == found.number.value]
    if len(same) > 1:
        named = _mentions(text, table)
        same = [index for index in same if _is_among(index, named, table)]
    return _option(same[0], table) if len(same) == 1 else NONE


def _is_prose(text: str) -> bool:
    """Whether a text that names an option in its own words is a remark, not an option."""
    return (
        re.match(r"\W*(?:that|because|let|we|you|it|he|she|they|there|this|clear|unclear|unknown|obvious|easy|hard|simple|yet|"
                 r"correct|right|ambiguous|undefined|undetermined|impossible|unbekannt|unklar|inconnue?|desconocid[ao]|ignot[ao]|"
                 r"desconhecid[ao]|неизвестно|неясно)(?![\w])|\W*(?:[A-H]\W{0,3}){2,}$|\W*[A-H]\s+(?:is|are|was|ist|est|es)\s",
                 text, re.IGNORECASE if not re.match(r"\W*(?:[A-H]\W{0,3}){2,}$", text) else 0) is not None
        or _DENIED.search(text) is not None
        or len(text.split()) > 12
    )  # fmt: skip


def _labelled(index: int, rest: str, separated: bool, close: str, table: _Table) -> Named | None:
    """Return the option with a label, depending on what follows it; None if the letter is not a label."""
    keys, known = table.keys, index < len(table.keys)
    own = keys[index] if known else None
    after = plain_text(rest)
    if not separated and index in _ARTICLES and _CONJUNCTION.match(rest):
        return None  # "a car"
    if separated and own and after.startswith(own):
        first = table.pattern.match(after) if table.pattern else None
        if first and first[0] == own:
            if not _is_among(index, _spelt_within(own, close + rest, table), table):
                return NONE  # the letter of one option, the spelling of another
            stop = rest.casefold().find(own) + len(own)  # casefold keeps almost every length
            tail = rest[stop:] if stop >= len(own) else rest[len(rest) - len(after) + len(own) :]
            if table.values is not None and re.match(r"[.,]?\d", after[len(own) :]):
                return NONE
            cut = _REASON_CUT.search(tail) or _CONTRAST.search(tail)
            tail = tail[: cut.start()] if cut else tail
            return NONE if _denied(tail, table) else (index, own)  # "(a) x or (b) y" names one first
    joined = ("," if "," in close else ";" if ";" in close else "\n" if "\n" in close else "") + rest
    contrast = _CONTRAST.match(joined) or _CONTRAST.match(" " + rest)
    if contrast is None and (_ANOTHER.match(joined) or _ANOTHER.match(rest.lstrip("/ ")) or rest.startswith("/")):
        return NONE
    cut = None if _REASON.match(rest) else _REASON_CUT.search(" " + rest)
    body = "" if contrast else (" " + rest)[: cut.start()] if cut else rest
    if cut is None and (inner := _CONTRAST.search(body)):
        body = body[: inner.start()]
    told = plain_text(body)
    if told and _denied(
        body if not _REASON.match(rest) else (rest[: m.start()] if (m := _REASON_CUT.search(rest)) else rest), table
    ):
        starts_reason = re.match(rf"(?:{_BECAUSE}|as|for|given|da|car)(?![\w])|因为|因為|由于", rest, re.IGNORECASE)
        if not starts_reason:
            return NONE if separated or index else None
    if not told or _REASON.match(rest):
        return (_option(index, table) if keys else (index, None)) if not keys or known else NONE
    named = _mentions(body, table)
    other = bool(named) and not _is_among(index, named, table)
    if re.match(r"\n|[(（]", rest):
        return NONE if other or (keys and not known) else (index, own)
    if not separated:
        return None
    if not keys:
        return index, after
    if not known or own is None:
        return NONE
    if own.startswith(told) and len(told) > 1:
        return index, own
    if table.values is not None and re.match(r"\W*\d", told):
        value = read_quantity(told).number
        return (index, own) if value is not None and value.value == table.values[index] else NONE
    return NONE if other else (index, own)


def choice_in_sentence(sentence: str, choices: Sequence[str]) -> Named:
    """The option that a sentence settles on, such as "Option B is correct." or "So I choose (B)."."""
    sentence, choices = _in_latin(sentence, choices)
    text = simplify(strip_invisible(sentence).translate(_FULL_WIDTH))
    table = _table(choices)
    if (cut := _SO_CUT.search(text)) and (found := choice_in_sentence(text[cut.end() :], choices))[0] is not None:
        return found
    reasoned = _REASON_CUT.search(text)
    head = text[: reasoned.start()] if reasoned and re.search(r"\w", text[: reasoned.start()]) else text
    contrast = _CONTRAST.search(head)
    if contrast and (found := choice_in_sentence(head[: contrast.start()], choices))[0] is not None:
        return found
    if not _denied(head, table):
        match = _OPTION_IS.search(head)
        label = next(filter(None, match.groups()), "") if match else ""
        if label and label.isdigit() == table.digits:
            others = {_index(x, False) for x in _LABEL.findall(head)} - {_index(label, table.digits)}
            index = _index(label, table.digits)
            return NONE if others else _option(index, table) if choices else (index, None)
        if match := _CHOOSE.search(head):
            found = read_choice(match["what"], choices)
            if found[0] is not None:
                return found
    found = read_choice(text, choices)
    return found if choices or found[0] is not None else NONE


def choice_in_list(lines: Sequence[str], choices: Sequence[str]) -> tuple[bool, Named]:
    """Return whether the last sentence belongs to a list that goes through the options, and is the only right one."""
    lines = [_in_latin(line, choices)[0] for line in lines]
    if not lines or not (last := _ITEM.match(lines[-1])):
        return False, NONE
    table = _table(choices)
    items = {}
    for line in lines[-40:]:
        if (item := _ITEM.match(line)) and _index(item[1], False) < (len(choices) or 8):
            items[item[1].lower()] = line[item.end() :]
    if len(items) < 2 or last[1].lower() not in items:
        return False, NONE
    right = [label for label, said in items.items() if _VERDICT.search(said) and not _denied(said, table)]
    if len(right) != 1:
        return True, NONE
    return True, _option(_index(right[0], False), table) if choices else (_index(right[0], False), None)


def is_denied(text: str, choices: Sequence[str]) -> bool:
    """Whether a text, but for the options' own words, denies something or leaves it open."""
    return _denied(text, _table(choices))


def is_denied_announcement(before: str) -> bool:
    """Return whether the words before an announcement change what it announces, such as "the least likely"."""
    return _BEFORE.search(before) is not None


def says_options(clause: str, choices: Sequence[str]) -> bool:
    """Return whether an announcement is about options, so that without a single one there is no answer."""
    clause, choices = _in_latin(clause, choices)
    text = simplify(strip_invisible(clause)).strip("*_`\"' ")
    if len(text.split()) > 10:
        return False
    table = _table(choices)
    label = _LABELLED.match(text)
    return (
        bool(label and (label[1] or label["close"].strip() or len(text) == 1))
        or _DENIED.search(text) is not None
        or bool(_mentions(text, table))
        or (table.values is not None and re.search(r"\d", text) is not None)
    )
