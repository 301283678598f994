"""Read quantities: a number with sign, wrapping, multiplier and unit; or report that there is none or several."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data.expressions import NUMBER, OutOfBounds, evaluate_expression, fold, parse_number, strip_invisible
from qcrd_fast.data.latex import simplify

MAX_QUANTITY = 512  # characters looked at
DECIMALS = ("point", "comma")  # --decimal


class Number(NamedTuple):
    """A value, and the decimals that it was written with; None: exact, as integers and fractions are."""

    value: Fraction
    decimals: int | None = None


class Found(NamedTuple):
    """A number with its source text, or why there is none. `blocks`: an answer was given, but no single value."""

    number: Number | None
    why: str = ""
    blocks: bool = False
    text: str = ""


_LATIN = "A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_SPACES = " \u00a0\u2009\u202f"
_GROUPED = re.compile(
    rf"(?<![\d.,])\d{{1,3}}(?:([{_SPACES}'\u2019])\d{{3}})(?:\1\d{{3}})*(?![{_SPACES}'\u2019]?\d)(?=[.,]?\d*)"
)
_COMMA_RUN = re.compile(rf"(?<![\d.,])\d(?:[\d.,'\u2019]|[{_SPACES}](?=\d{{3}}(?!\d)))*")
_COMMA_GROUPED = re.compile(rf"((?!0[.'\u2019{_SPACES}])\d{{1,3}}(?:[.'\u2019{_SPACES}]\d{{3}})+|\d+)(?:,(\d+))?")
_SIGN_WORDS = re.compile(
    r"(?<![\w])(?<!\bau )(?<!\bdu )(?<!\bal )(?<!\blo )(?<!\bo )(?<!\bou )(?:negative|minus|moins|menos|meno|минус|"
    r"negativ|n\u00e9gatif|negativo)\s+(?=[(\d.])|(?:负|負の?|マイナス)\s*(?=[\d.])",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:[\s:=*_`\"'\u201c\u201d\u00ab\u00bb\u300c\u300e\u3010(\[{~\u2248\uff1a、，,|>]+|"
    r"(?:(?:that|indeed|still|again|simply|just|only|exactly|precisely|about|approximately|approx\.?|around|roughly|"
    r"nearly|equal\s+to|equals|"
    r"a\s+total\s+of|"
    r"the\s+(?:number|value|integer)|the|an?|is|are|be|now|thus|therefore|then|so|of|with|usd|eur|gbp|inr|cad|aud|rmb|rs\.?|us|"
    r"genau|etwa|ungef\u00e4hr|circa|ca\.?|rund|insgesamt|die|der|das|den|ein|eine|"
    r"environ|exactement|de|la|le|les|l'|un|une|"
    r"exactamente|aproximadamente|unos|unas|el|los|las|una|esattamente|il|lo|exatamente|cerca\s+de|"
    r"примерно|около|ровно|это)(?![\w])|"
    r"\u7ea6|\u7d04|\u5927\u7ea6|\u5171|\u4e00\u5171|\u603b\u5171|\u662f|\u4e3a|\u70ba|\u5408\u8a08|\u5168\u90e8\u3067|"
    r"[a-zA-Z]\s*=(?!=)))\s*",
    re.IGNORECASE,
)  # fmt: skip
_OPEN = r"(?:\(\s*[-+]?\s?){0,40}"
_OPEN = r"(?:\(\s*[-+]?\s?){0,40}"
_RUN = re.compile(
    rf"(?:[-+]\s?)?{_OPEN}(?:{NUMBER}|\s+(?=[-+*/^)=\d.]|[xX]\s*[\d(])|[-+*/^=]\s*{_OPEN}|\)|"
    rf"(?<=[\d)\s])[xX]\s*(?=[\d(]){_OPEN})+"
)
_FIRST = re.compile(r"[-+(\s]{0,16}\.?\d")
_SUM = re.compile(r"(?<=[\d)])\s*[-+]\s*(?=[\d(.])")
_SCIENTIFIC = re.compile(rf"([-+]?\s*{NUMBER})\s*(?:\*|[xX])\s*10\s*(?:\^|\*\*)\s*\(?\s*([-+]?\s*\d{{1,3}})\s*\)?")
_MULTIPLIERS = {
    "hundred": 2, "thousand": 3, "million": 6, "millions": 6, "billion": 9, "billions": 9, "trillion": 12, "bn": 9,
    "mn": 6,
    "mln": 6,
    "tausend": 3, "millionen": 6, "mio": 6, "milliarde": 9, "milliarden": 9, "mrd": 9, "billionen": 12,
    "mille": 3, "milliard": 9, "milliards": 9, "mil": 3, "mil millones": 9, "mill\u00f3n": 6, "millones": 6, "mila": 3,
    "milione": 6,
    "milioni": 6, "miliardo": 9, "miliardi": 9, "milh\u00e3o": 6, "milh\u00f5es": 6, "bilh\u00e3o": 9,
    "bilh\u00f5es": 9,
    "тысяча": 3, "тысячи": 3, "тысяч": 3, "тыс": 3, "миллион": 6, "миллиона": 6, "миллионов": 6, "млн": 6,
    "миллиард": 9, "миллиарда": 9, "миллиардов": 9, "млрд": 9,
    "\u5341": 1, "\u767e": 2, "\u5343": 3, "\u4e07": 4, "\u842c": 4, "\u5104": 8, "\u4ebf": 8, "\u5146": 12,
    "\u767e\u4e07": 6, "\u5343\u4e07": 7,
}  # fmt: skip
_MULTIPLIER = re.compile(
    r"\s*(?:(" + "|".join(sorted((re.escape(w) for w in _MULTIPLIERS if w.isascii() or w[0] < "\u3000"), key=len,
    reverse=True))
    + r")(?![\w])\.?|([\u5341\u767e\u5343\u4e07\u842c\u5104\u4ebf\u5146]{1,2}))", re.IGNORECASE,
)  # fmt: skip
_HALF = re.compile(r"\s+and\s+(?:a|one)\s+(half|quarter|third)(?![\w])", re.IGNORECASE)
_HALVES = {"half": Fraction(1, 2), "quarter": Fraction(1, 4), "third": Fraction(1, 3)}
_ATTACHED = re.compile(
    r"[hH]\s?\d|_\d|[ABDEFGHIOPQRSTUXYZ](?![\w'])|e(?![\w'])|--|\.\.|\u756a|[:\u2236]\s?\d|[eE][-+]?\d|"
    r"[\u00b1\u03c0\u221a\u221e\u222a!^]|!\s*[-+*/=]|[xynkKMB\u03c0i](?![\w'])|(?:st|nd|rd|th|er|"
    r"\u00e8me|-?\u0439|-?\u044f)(?![\w])|\s*(?:[pP][iI]|cubed|factorial|squared(?!\s+(?:[cdkm]?m|in|ft|units?|inch(?:es)?|feet|"
    r"foot|yards?|miles?|\w*met(?:er|re)s?)(?![\w])))(?![\w])"
    r"|\s+or\s+(?:more|less|fewer|greater|so)(?![\w])|"
    r"(?:\s*\*(?=[\w(\\])|\s\*\s|\s*\+|\s*-\s*[a-z](?!\w))|\s*(?:/\s*[\u221a\u03c0(]|"
    r"[\u221a\u03c0\u00b1\u2264\u2265<>\u2260]|\\[A-Za-z])"
)
_UNIT_POWER = re.compile(rf"(?<=[{_LATIN}])(?:\^\(?\s*-?\s*[1-4]\)?|[1-4](?![\w]))")
_BECAUSE = re.compile(
    r"[,;，、\s(\u2014-]*(?:(?<![\w])(?:because|since|as|given\s+that|due\s+to|thanks\s+to|considering|weil|da|denn|car|"
    r"parce\s+qu|"
    r"puisqu|porque|ya\s+que|pues|dado\s+que|perch\u00e9|poich\u00e9|siccome|dato\s+che|pois|j\u00e1\s+que|uma\s+vez|потому|"
    r"так\s+как|поскольку|"
    r"ибо)(?![\w])|\u56e0\u4e3a|\u56e0\u70ba|\u7531\u4e8e|\u7531\u65bc|\u306a\u305c\u306a\u3089)",
    re.IGNORECASE,
)
_SEVERAL = re.compile(
    r"(?:(?<![\w])(?:or|to|and|through|until|till|plus|versus|vs|oder|bis|und|ou|et|\u00e0|o|u|y|e|a|или|и|до)(?![\w])|"
    r"[-~\u2013\u2014,;/&+\u301c\uff5e]|"
    r"\u6216\u8005?|\u548c|\u5230|\u81f3|\u304b\u3089|\u307e\u305f\u306f|\u3068|\u3001)\s*(?:(?:about|even|maybe|perhaps|"
    r"only|around|\u00e4|et|de|del|a|an)\s+){0,2}"
    r"[-+\u221a(]?\s*\.?\d",
    re.IGNORECASE,
)
_OTHERWISE = re.compile(
    r"\s*[,;(\u2014-]*\s*(?<![\w])(?:or|but|however|unless|if|oder|aber|wenn|ou|mais|si|o|pero|ma|se|mas|или|но|если)(?![\w])"
    r"|\s*[，、,(（]?\s*(?:\u6216|\u4f46|\u5982\u679c|\u307e\u305f\u306f|\u3057\u304b\u3057|\u3067\u306f\u306a|"
    r"\u3067\u306f\u3042\u308a\u307e\u305b\u3093)", re.IGNORECASE,
)  # fmt: skip
_CLAUSE = re.compile(
    r"(?<![\w])(?:times|plus|minus|squared|cubed|factorial|more\s+than|less\s+than|fewer\s+than|out\s+of|dozens?|half|halves|"
    r"is|are|was|were|"
    r"will|can|could|would|should|has|have|had|holds?|contains?|gives?|gave|makes?|made|equals?|costs?|needs?|fits?|gets?|"
    r"leaves?|goes|"
    r"comes?|buys?|bought|ate|eats?|sold|sells?|adds?|added|divided|multiplied|subtract(?:ed)?|with|then|so|not|when|while|"
    r"which|who|"
    r"ist|sind|hat|haben|mal|enth\u00e4lt|enthalten|kostet|kosten|est|sont|ont|contient|contiennent|fois|co\u00fbtent?|es|"
    r"son|tienen?|contienen?|veces|"
    r"\u00e8|sono|hanno|contiene|contengono|volte|\u00e9|s\u00e3o|t\u00eam|tem|cont\u00e9m|vezes|раза?|содержит|содержат|"
    r"стоит|плюс)(?![\w])|\u4e58|\u52a0|\u51cf|\u500d",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"\s*(?:(?:at\s+least|at\s+most|above|below|beyond|anything|a\s+(?:minimum|maximum)\s+of|somewhere|close\s+to|mehr|weniger|"
    r"\u00fcber|unter|больше|меньше|выше|ниже|свыше|more\s+than|less\s+than|fewer\s+than|greater\s+than|over|under|"
    r"up\s+to|between|from|not|"
    r"mindestens|"
    r"h\u00f6chstens|mehr\s+als|weniger\s+als|zwischen|nicht|au\s+moins|au\s+plus|plus\s+de|moins\s+de|entre|pas|al\s+menos|"
    r"m\u00e1s\s+de|menos\s+de|"
    r"no(?!\w)|almeno|pi\u00f9\s+di|meno\s+di|tra|non|pelo\s+menos|mais\s+de|n\u00e3o|не|от|между|более|"
    r"менее)(?![\w])\s*(?:\w+\s+){0,2}?[-\d.]"
    r"|(?:[<>\u2264\u2265\u00b1\u2260]|[<>!]=)\s*[-\d.]|(?:\u5927\u4e8e|\u5927\u65bc|\u5c0f\u4e8e|\u5c0f\u65bc|"
    r"\u591a\u4e8e|\u5c11\u4e8e|\u4e0d\u5230|\u96f6\u4e0b|\u7b2c|\u81f3\u5c11|\u6700\u591a|\u8d85\u8fc7|\u4e0d\u662f)\s*\d)",
    re.IGNORECASE,
)
_BOUND_BEFORE = re.compile(
    r"(?<![\w])(?:over|under|above|below|beyond|(?:minimum|maximum)\s+of|anything\s+but|close\s+to|near|больше|меньше|свыше|"
    r"\u00fcber|unter|at\s+least|at\s+most|(?:more|less|fewer|greater|other)\s+than|up\s+to|between|not|isn['\u2019]t|"
    r"aren['\u2019]t|wasn['\u2019]t|never|"
    r"mindestens|h\u00f6chstens|mehr\s+als|weniger\s+als|zwischen|nicht|au\s+moins|au\s+plus|plus\s+de|moins\s+de|pas|"
    r"al\s+menos|m\u00e1s\s+de|"
    r"menos\s+de|no\s+(?:es|son)|almeno|pi\u00f9\s+di|meno\s+di|non\s+(?:\u00e8|sono)|pelo\s+menos|mais\s+de|"
    r"n\u00e3o(?:\s+\u00e9)?|не|более|менее)\s+"
    r"(?:(?:a|an|de|el|la|equal\s+to|exactly|only)\s+)?$|(?:\u81f3\u5c11|\u6700\u591a|\u8d85\u8fc7|\u4e0d\u662f|"
    r"\u5927\u4e8e|\u5c0f\u4e8e|\u591a\u4e8e|\u5c11\u4e8e|\u4e0d\u5230|\u96f6\u4e0b)\s*$",
    re.IGNORECASE,
)
NUMBER_WORDS = re.compile(
    r"(?<![\w])(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundreds?|thousands?|zero|none|nothing|nobody|dozens?|(?<=\d )score|"
    r"gross|couple|pair|"
    r"lakhs?|crores?|hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|twice|thrice|double|triple|"
    r"no(?=\s+\w+\s+(?:\w+\s+)?(?:left|remain\w*|over)(?![\w]))|"
    r"zwei|drei|vier|f\u00fcnf|sechs|sieben|acht|neun|zehn|elf|zw\u00f6lf|zwanzig|drei\u00dfig|hundert|null|kein\w*|"
    r"nichts|doppelt\w*|"
    r"halb\w*|h\u00e4lfte|dutzend|viertel|drittel|"
    r"deux|trois|quatre|cinq|sept|huit|neuf|dix|onze|douze|vingt|trente|z\u00e9ro|aucune?|rien|moiti\u00e9|demie?|douzaines?|"
    r"dos|tres|cuatro|cinco|seis|siete|ocho|nueve|diez|doce|veinte|treinta|cien|ningun[oa]?|ning\u00fan|nada|mitad|"
    r"medi[oa]|docenas?|"
    r"due(?!\s+to)|tre|quattro|cinque|sette|otto|nove|dieci|undici|dodici|nessun[oa]?|niente|met\u00e0|mezz[oa]|dozzin[ae]|"
    r"dois|duas|tr\u00eas|quatro|sete|oito|dez|doze|vinte|trinta|nenhuma?|metade|mei[oa]|d\u00fazias?|"
    r"два|две|три|четыре|пять|шесть|семь|восемь|девять|десять|двенадцать|двадцать|ноль|нуль|ничего|ни\s+одн\w+|половин\w+|"
    r"полтора|дюжин\w*)(?![\w])|"
    r"[\u4e00\u4e8c\u4e24\u5169\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341]"
    r"(?=[\u4e2a\u500b\u53ea\u672c\u4eba\u9897\u3064\u5757\d])|"
    r"\u534a|\u6ca1\u6709\u4e86|\u6c92\u6709\u4e86|\u90fd\u6ca1|\d\s?\u6253|\u96f6(?!\u4e0b)",
    re.IGNORECASE,
)
_BOUND_AFTER = re.compile(
    r"(?<![\w])(?:at\s+(?:least|most)|or\s+(?:more|less|fewer|above|below|over|under|higher|lower|greater)|and\s+(?:above|"
    r"below|up)|"
    r"(?:degrees?\s+)?(?:below|under)\s+(?:zero|freezing)|minimum|maximum|oder\s+(?:mehr|weniger)|mindestens|h\u00f6chstens|"
    r"unter\s+null|ou\s+(?:plus|moins)|au\s+(?:moins|plus)|o\s+(?:m\u00e1s|menos)|al\s+menos|bajo\s+cero|o\s+(?:pi\u00f9|meno)|"
    r"almeno|sotto\s+zero|ou\s+(?:mais|menos)|pelo\s+menos|или\s+(?:больше|меньше|более|менее)|ниже\s+нуля)(?![\w])|"
    r"\u4ee5\u4e0a|\u4ee5\u4e0b|\u4ee5\u5185|\u672a\u6e80|\u4ee5\u5185|\u8d85(?![\u5e02])",
    re.IGNORECASE,
)
_REMAINDER = re.compile(
    r"[\s,(]*(?:r(?:em(?:ainder)?)?|rest|reste|resto|остаток|\u4f59|\u4f59\u308a|"
    r"\u3042\u307e\u308a)[\s.:]*(?:of\s+)?\d",
    re.IGNORECASE,
)
_MONTH = (
    r"(?:Jan(?:uary|uar)?|Feb(?:ruary|ruar)?|March|M\u00e4rz|Apr(?:il)?|May|Mai|June?|Juni|July?|Juli|Aug(?:ust)?|"
    r"Sept?(?:ember)?|"
    r"O[ck]t(?:ober)?|Nov(?:ember)?|De[cz](?:ember)?|janvier|f\u00e9vrier|mars|avril|mai|juin|juillet|ao\u00fbt|septembre|"
    r"octobre|"
    r"novembre|d\u00e9cembre|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre|gennaio|"
    r"febbraio|aprile|maggio|giugno|luglio|settembre|ottobre|novembre|dicembre|janeiro|fevereiro|mar\u00e7o|maio|junho|julho|"
    r"setembro|outubro|novembro|dezembro|января|февраля|марта|апреля|мая|июня|июля|августа|сентября|октября|ноября|декабря)"
)
_DATE_AFTER = re.compile(rf"\.?\s*(?:(?:de|of)\s+)?{_MONTH}(?![\w])|\s?\u6708\s?(?:\d|$)|\u65e5$")
_DATE_BEFORE = re.compile(rf"(?<![\w]){_MONTH}\.?\s+(?:the\s+)?$|\u7b2c\s*$")
_CLOCK = re.compile(r"\s*(?:[ap]\.?m\.?|uhr|o['\u2019]clock|noon|midnight)(?![\w])", re.IGNORECASE)
_DIGITS_AFTER = re.compile(r"[.,]\d")  # "12,50": of a number in another spelling, and no end
_ODD = re.compile(
    r"^\W*[12]\d\d0['\u2019]?s(?![\w])|\d\.\d*\(\d+\)|0[xXbBoO][0-9A-Fa-f]|\d+(?:\.\d+)?\s?/\s?\d+\s?/\s?\d|\d_\d|\d\s?-\s?-\s?\d|\d\.\.+\d|\d-?е(?![\w])|"
    r"\d\s*!(?=[.)}\s]*[.)}]|\s*\S)"
)
_NAMED = re.compile(r"(?<![\w])(?:page|seite|route|chapter|nearest|log|sqrt)\s*\(?\s*$|\[\s*$", re.IGNORECASE)
_PLACE = re.compile(
    r"(?<![\w])(?:page|line|table|row|seite|p\.|route|no\.|\u00a7|chapter|nearest|log|in)\s*$|"
    r"\[\s*$",
    re.IGNORECASE,
)
_NO_UNIT = re.compile(
    r"\s*(?:decimals?|significant|d\.?p\.?|sig\.?)(?![\w])|\s*\](?!\s*$)|\s*steps?(?![\w])", re.IGNORECASE
)
_STEP = re.compile(
    r"(?<![\w])(?:steps?|part|case|question|problem|figure|equation|schritt|\u00e9tape|paso|passo|шаг)\s*\d+[.:)]?|"
    r"\u6b65\u9aa4\s*\d+|\u7b2c\s*\d+\s*\u6b65",
    re.IGNORECASE,
)
_START = re.compile(rf"(?<![{_LATIN}\d.,_])(?:[-+]\s?)?(?:\(\s?){{0,8}}\.?\d")
_CLOSERS = " \t\n*_`\"'\u201d\u00bb\u300d\u300f\u3011)]}|"
_ENUMERATION = re.compile(r"\d{1,2}[.)]\s+\S")


_RELATIVE = re.compile(r",\s*(?:which|who|with)(?![\w])(?=[^,]*$)", re.IGNORECASE)
_GIVEN = re.compile(  # number words that only name what is known: "the two days", "each of her three friends"
    rf"(?<![\w])(?:the|these|those|this|his|her|its|their|our|your|my|both|all|past|last|next|first|each|every|of|in|into|over|"
    rf"after|for|on|by|per|than|if|among|between|die|der|den|les|des|las|los|le|i|gli|as|os)\s+(?:\w+['\u2019]s\s+)?"
    rf"(?:{NUMBER_WORDS.pattern})",
    re.IGNORECASE,
)


def _worded(text: str) -> bool:
    """Whether a text counts something in words."""
    return NUMBER_WORDS.search(_GIVEN.sub(" ", text)) is not None


_WORDED_MORE = re.compile(rf"[\s,]*(?:and\s+)?(?:{NUMBER_WORDS.pattern})", re.IGNORECASE)


def point_style(text: str, decimal: str, groups: bool = True) -> str:
    """Convert numbers to English style `1234.5`: decimal commas and group separators."""
    if decimal == "comma":
        return _COMMA_RUN.sub(lambda run: _uncomma(run[0]), text)
    if groups and ("'" in text or "\u2019" in text or " " in text):
        return _GROUPED.sub(lambda run: re.sub(r"\D", "", run[0]), text)
    return text


def _uncomma(run: str) -> str:
    body = run.rstrip(".,'\u2019 ")
    match = _COMMA_GROUPED.fullmatch(body)
    if match is None:
        return run
    return re.sub(r"\D", "", match[1]) + (f".{match[2]}" if match[2] else "") + run[len(body) :]


def plain(text: str, decimal: str = "point", groups: bool = True) -> str:
    """Normalise `text` for reading: no LaTeX or currency, ASCII digits and signs, words for signs as signs."""
    return _SIGN_WORDS.sub("-", point_style(fold(simplify(text)), decimal, groups))


def read_quantity(text: str, *, decimal: str = "point", expressions: bool = False, label: bool = False) -> Found:
    """Read the quantity that a text consists of, such as a box's content.

    After it may come a unit, a clause with "because", or further remarks behind a comma; `label`: behind a mere
    `Answer:`, where
    such remarks with digits of their own show that a train of thought begins. With `expressions`, a sum is one
    quantity.
    """
    text = plain(strip_invisible(text[:MAX_QUANTITY]), decimal).rstrip(" .\n")
    if _ENUMERATION.match(text.lstrip()) and label:
        return Found(None, "a numbered list follows the marker")
    start = 0
    while True:
        if _BOUND.match(text, start):
            return Found(None, "a bound or a denial, no value", blocks=True)
        if _FIRST.match(text, start) or not (lead := _LEAD.match(text, start)):
            break
        start = lead.end()
    if text[start : start + 1] in ("\u221a", "\u221e", "\u03c0", "±"):
        return Found(None, "no rational number", blocks=True)
    if not _FIRST.match(text, start) or not (run := _RUN.match(text, start)):
        return Found(None, "no value follows directly")
    opened = text[max(0, start - 8) : start].count("(")
    body = run[0].rstrip()
    while body.count(")") > body.count("(") and opened and body.endswith(")"):
        body, opened = body[:-1].rstrip(), opened - 1
    if _ODD.search(text[start : start + len(body) + 12].split(",")[0].split("=")[-1]):
        return Found(None, "a date or another spelling, no number", blocks=True)
    trimmed = body.rstrip("=*/^(-+ ")
    rest = text[start + len(trimmed) :]
    if rest.strip() in ("-", "+", "*", "/", "^") and not ("*" in rest and "*" in text[:start]):
        return Found(None, "an expression without its end", blocks=True)
    found = _number(trimmed, expressions)
    if found.number is None:
        return found
    if _CLOCK.match(rest):
        return Found(None, "a clock", blocks=True)
    number, rest = _scaled(found.number, rest)
    return _judge(number, rest, label)._replace(text=trimmed.strip())


def sole_quantity(text: str, *, decimal: str = "point", expressions: bool = False, words: bool = False) -> Found:
    """Return the only quantity in a text; None if there are several. `words`: count number words too."""
    text = _STEP.sub(" ", _UNIT_POWER.sub("", plain(strip_invisible(text), decimal, groups=False))).rstrip(" .\n")
    only: tuple[int, str] | None = None
    position = 0
    while match := _START.search(text, position):
        run = _RUN.match(text, match.start())
        if run is None or not re.search(r"\d", run[0]):
            position = match.end()
            continue
        body, position = run[0].rstrip("=*/^(-+ \n\t"), run.end()
        if _DIGITS_AFTER.match(text, position):
            return Found(None, "a decimal comma or another spelling, no number", blocks=True)
        if only is None:
            only = match.start(), body
        elif (value := _number(body, expressions).number) is None or value != _number(only[1], expressions).number:
            return Found(None, "several numbers")
    if only is None:
        return Found(None, "no number")
    start, body = only
    opened = body.count("(")
    while body.endswith(")") and body.count(")") > opened:
        body = body[:-1].rstrip()
    before = text[max(0, start - 40) : start]
    if (
        re.match(r"[-+]\s", body) and before[-1:].isspace() and before.rstrip()[-1:].isalnum()
    ) or before.rstrip().endswith(("*", "/", "^", "+", "(-")):
        return Found(None, "part of an expression without a value", blocks=True)
    if _BOUND_BEFORE.search(before) or before.rstrip().endswith(
        ("\u221a", "\u221a(", "<", ">", "<=", ">=", "!=", "\u2264", "\u2265", "\u00b1", "\u2260")
    ):
        return Found(None, "a bound or a denial, no value", blocks=True)
    after = text[start + len(body) :]
    if (
        _ODD.search(text[start : start + len(body) + 12].split("=")[-1])
        or _DATE_AFTER.match(after)
        or _REMAINDER.match(after)
        or _CLOCK.match(after)
    ):
        return Found(None, "a date, a clock or another spelling, no number", blocks=True)
    unit = _NO_UNIT.match(after)
    precision = unit is not None and (not unit[0].lstrip().startswith("step") or _PLACE.search(before) is not None)
    if precision or _DATE_BEFORE.search(before) or _NAMED.search(before):
        return Found(None, "a place, a date or a precision, no value", blocks=True)
    if words and _worded(_RELATIVE.split(text)[0]):
        return Found(None, "number words beside the number", blocks=True)
    if _BOUND_AFTER.search(after.split(",")[0]):
        return Found(None, "a bound, no value", blocks=True)
    found = _number(body, expressions)
    if found.number is None:
        return found
    number, rest = _scaled(found.number, after)
    if _ATTACHED.match(rest) and not (rest[:1] == "!" and not rest[1:].strip(_CLOSERS + ".!")):
        return Found(None, "part of a larger term, a clock or an ordinal", blocks=True)
    return Found(number, text=body)


def _number(text: str, expressions: bool) -> Found:
    """The value of a run of digits and operators."""
    left, equals, right = text.rpartition("=")
    if equals and right.strip():
        return _number(right, expressions)
    if equals:
        text = left
    text = text.strip()
    if match := _SCIENTIFIC.fullmatch(text):
        base, exponent = one_number(match[1]), int(match[2].replace(" ", ""))
        if base and abs(exponent) <= 64:
            decimals = None if base.decimals is None else base.decimals - exponent
            return Found(Number(base.value * Fraction(10) ** exponent, decimals))
    if number := one_number(text):
        return Found(number)
    value = evaluate_expression(text)
    if value is None:
        return Found(None, "several numbers, or an expression without a value", blocks=True)
    if not expressions and _SUM.search(text):
        return Found(None, "a sum or a range, no single number", blocks=True)
    return Found(Number(value))


_ONE = re.compile(rf"([-+]? *{NUMBER})\.?")
_FRACTION = re.compile(r"([-+]?) *(?:(\d+) +)?(\d+) */ *(\d+)\.?")


def one_number(text: str) -> Number | None:
    """The value of a text that is one number, mixed number or fraction."""
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and len(text) > 2:
        text = text[1:-1].strip()
    try:
        if match := _ONE.fullmatch(text):
            written = match[1].replace(" ", "")
            mantissa, _, exponent = written.lower().partition("e")
            digits = len(mantissa.partition(".")[2])
            return Number(parse_number(written), (digits - int(exponent or 0)) if digits else None)
        if match := _FRACTION.fullmatch(text):
            sign, whole, above, below = match.groups()
            value = parse_number(whole or "0") + parse_number(above) / parse_number(below)
            return Number(-value if sign == "-" else value)
    except (OutOfBounds, ZeroDivisionError, ValueError):
        pass
    return None


def _scaled(number: Number, rest: str) -> tuple[Number, str]:
    """Return the number times a following multiplier such as `million`, and the rest."""
    for _ in range(2):
        match = _MULTIPLIER.match(rest)
        if not match:
            break
        word = re.sub(r"\s+", " ", (match[1] or match[2]).lower())
        power = _MULTIPLIERS.get(word)
        if power is None:
            power = sum(_MULTIPLIERS[c] for c in word)
        decimals = None if number.decimals is None else number.decimals - power
        number, rest = Number(number.value * 10**power, decimals), rest[match.end() :]
    if match := _HALF.match(rest):
        number, rest = Number(number.value + _HALVES[match[1].lower()]), rest[match.end() :]
    return number, rest


def _judge(number: Number, rest: str, label: bool) -> Found:
    """Return whether the number is the answer, by what follows it."""
    if _REMAINDER.match(rest):
        return Found(None, "a remainder", blocks=True)
    rest = _UNIT_POWER.sub("", rest)
    if rest[:1] == "!" and not rest[1:].strip(_CLOSERS + ".!"):
        return Found(number)
    if _ATTACHED.match(rest) or _DATE_AFTER.match(rest) or _REMAINDER.match(rest) or rest.startswith("\u6253"):
        return Found(None, "part of a larger term, a clock, a date or an ordinal", blocks=True)
    rest = rest.lstrip(_CLOSERS + "%\u2030°").rstrip(_CLOSERS)
    if not rest.strip(" .!;,、，。！"):
        return Found(number)
    if rest.rstrip().endswith(("?", "？")):
        return Found(None, "a question")
    if because := _BECAUSE.search(rest):
        rest = rest[: because.start()]
    if _SEVERAL.match(rest.lstrip()) and {one_number(other) for other in re.findall(NUMBER, rest)} != {number}:
        return Found(None, "several values", blocks=True)
    unit = re.split(r"[,;，；(（\u2014]|\s-\s|[.。]\s", rest, maxsplit=1)[0]
    remark = rest[len(unit) :]
    if _BOUND_AFTER.search(unit) or _BOUND_AFTER.match(remark.lstrip(" ,(")):
        return Found(None, "a bound, no value", blocks=True)
    if _worded(unit) or _WORDED_MORE.match(remark):
        return Found(None, "number words follow", blocks=True)
    if re.search(r"\d", unit):
        if {one_number(other) for other in re.findall(NUMBER, rest)} == {number}:
            return Found(number)  # "5 and 5"
        if _SEVERAL.search(unit):
            return Found(None, "several values", blocks=True)
        return Found(None, "further numbers follow")
    if _SEVERAL.match(remark) or _OTHERWISE.match(rest) or _OTHERWISE.match(remark):
        return Found(None, "several values, or a condition", blocks=True)
    if _CLAUSE.search(unit) or len(unit.split()) > 7 or re.search(r"[=<>\\\u221a\u03c0]", unit):
        return Found(None, "a clause follows, no unit")
    if label and re.search(r"\d", remark) and not remark.startswith(("(", "（")):
        return Found(None, "a train of thought follows the marker")
    return Found(number)
