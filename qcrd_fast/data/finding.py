"""Find the answer in a text: after its last announcement, else in its last sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from qcrd_fast.data import mathforms
from qcrd_fast.data.answers import EMPHASIS, Value, numeric_value, option_value, read_value
from qcrd_fast.data.choices import plain_text
from qcrd_fast.data.expressions import evaluate_expression
from qcrd_fast.data.latex import simplify
from qcrd_fast.data.markers import Marker, cut_next_question, find_markers, sentence_start, sentences
from qcrd_fast.data.options import choice_in_list, choice_in_sentence, is_denied, is_denied_announcement, says_options
from qcrd_fast.data.quantities import read_quantity, sole_quantity
from qcrd_fast.data.surroundings import DENIED_AFTER, TAKEN_BACK, asked, in_doubt, lead_of_box, split_boxes, tail_of_box
from qcrd_fast.data.thinking import split_thinking

_DENIAL = re.compile(
    r"(?<![\w])(?:cannot|can\s+not|can['\u2019]t|could\s+not|couldn['\u2019]t|no\s+way\s+to|"
    r"does\s+not\s+exist|depends\s+on|not\s+given|ambiguous|n/a|(?:is|are)\s+(?:no|not\s+enough)\s+(?:\w+\s+)?(?:answer|"
    r"solution|information|data)|"
    r"no\s+(?:unique\s+|single\s+|definite\s+)?(?:answer|solution)|not\s+(?:enough|sufficient)|insufficient|impossible|"
    r"undetermined|indeterminate|"
    r"unknown|undefined|not\s+possible|don't\s+know|do\s+not\s+know|unable\s+to|none\s+of\s+the|"
    r"(?:kann|l\u00e4sst\s+sich|ist|sind)(?![\w])[^.]{0,60}nicht|keine\s+(?:antwort|l\u00f6sung)|nicht\s+gen\u00fcgend|"
    r"unbekannt|unm\u00f6glich|"
    r"ne\s+peut|ne\s+permet|on\s+ne\s+sait|impossible\s+de|pas\s+de\s+(?:r\u00e9ponse|solution)|pas\s+assez|"
    r"no\s+se\s+(?:puede|sabe)|faltan\s+datos|no\s+hay\s+(?:respuesta|soluci\u00f3n)|imposible|"
    r"non\s+si\s+(?:pu\u00f2|sa)|mancano\s+dati|non\s+\u00e8\s+possibile|impossibile|n\u00e3o\s+\u00e9\s+poss\u00edvel|"
    r"n\u00e3o\s+h\u00e1|n\u00e3o\s+se\s+(?:pode|sabe)|n\u00e3o\s+d\u00e1|faltam\s+dados|imposs\u00edvel|невозможно|нельзя|"
    r"неизвестно|недостаточно|не\s+хватает|не\s+может)(?![\w])|"
    r"\u65e0\u6cd5|\u7121\u6cd5|\u4e0d\u80fd|\u4e0d\u8db3|\u4e0d\u786e\u5b9a|\u6ca1\u6709\u7b54\u6848|\u65e0\u89e3|"
    r"\u4e0d\u662f|\u308f\u304b\u308a\u307e\u305b\u3093|\u6c42\u3081\u3089\u308c|\u3067\u304d\u307e\u305b\u3093|"
    r"\u3067\u304d\u306a\u3044|\u308f\u304b\u3089\u306a\u3044|\u5206\u304b\u308a\u307e\u305b\u3093|\u4e0d\u660e",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"(?<![\w])(?:maybe|perhaps|possibly|might|could\s+be|not\s+sure|a\s+guess|hmm|or\s+so|vielleicht|"
    r"peut-\u00eatre|quiz\u00e1s?|forse|talvez|возможно)(?![\w])|\u4e5f\u8bb8",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"(?<![!<>=])[=\u2248](?!=)|(?<![\w])(?:is|are|was|were|be|equals?|makes?|made|gives?|gave|leaves?|left\s+with|gets?|"
    r"got|totals?|"
    r"total\s+of|totall?ing|"
    r"ist|sind|ergibt|ergeben|macht|machen|bleiben|bleibt|betr\u00e4gt|insgesamt|gleich|est|sont|fait|font|donne(?:nt)?|"
    r"reste(?:nt)?|vaut|"
    r"quedan?|igual\s+a|\u00e8|sono|fanno|d\u00e0|danno|rimangono|restano|rimane|\u00e9|s\u00e3o|d\u00e1|d\u00e3o|faz|fazem|"
    r"restam|sobram|ficam|"
    r"(?:es|son|da|dan|fa|hace)(?=\s+[-+$\u20ac]?\d)|равно|равен|равна|равны|будет|составляет|составит|получится|получаем|"
    r"получим|оста[её]тся|осталось|итого|всего)(?![\w])|"
    r"\u7b49\u4e8e|\u7b49\u65bc|\u662f|\u4e3a|\u70ba|\u5f97\u5230|\u5f97|\u5171\u6709|\u4e00\u5171|\u603b\u5171|\u5171|"
    r"\u5269\u4e0b|\u8fd8\u5269|\u5269|\u306f|\u5408\u8a08|\u6b8b\u308a",
    re.IGNORECASE,
)
_DIRECTLY = re.compile(  # between a verb and the number that is its complement
    r"(?:[^\d:]{0,30}:)?(?:[\W_]|(?:to|(?<!is the total )(?<=total )of|"
    r"now|only|still|just|also|then|therefore|thus|so|indeed|simply|exactly|precisely|"
    r"about|approximately|around|roughly|nearly|almost|actually|again|typically|usually|worth|given|paid|charged|offered|"
    r"in\s+(?:total|all|fact)|altogether|another|an\s+additional|(?:equal|equivalent)\s+to|"
    r"(?:an?|the)\s+(?:\w+\s+)?(?:total|sum|number|answer|result|value|average|mean|amount|score|profit|loss|quotient|weight|length|"
    r"height|distance|area|volume|speed|difference|remainder|cost|price)\s+of|"
    r"(?:us|you|me)(?:\s+with)?|(?:him|her|it|them)\s+with|with(?=\s+only)|usd|eur|gbp|rs|"
    r"noch|nur|genau|etwa|ungef\u00e4hr|rund|circa|ca|dann|"
    r"de|di|environ|exactement|encore|seulement|donc|au\s+total|en\s+tout|en\s+total|"
    r"exactamente|aproximadamente|solo|unos|unas|entonces|esattamente|ancora|quindi|in\s+tutto|in\s+totale|"
    r"exatamente|ainda|cerca\s+de|no\s+total|ao\s+todo|"
    r"примерно|около|ровно|ещ[её]|только|это)(?![\w])|\u7ea6|\u7d04|\u5927\u7ea6|\u5168\u90e8\u3067)*",
    re.IGNORECASE,
)
_CLAUSE = re.compile(  # where a clause begins that says something of its own
    r"[,;:]\s+(?!(?:which|who|that)(?![\w]))|(?<![\w])(?:so|therefore|thus|hence)(?![\w])|\n", re.IGNORECASE
)
_BECAUSE = re.compile(r",?\s+(?:because|since)(?![\w])", re.IGNORECASE)
_TAGS = re.compile(r"</?(?:answer|solution|response|output|final)\s*>|```\w{0,12}", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(
    r"[\s$.]*(?:and|or|,|;|\\text\{\s*(?:and|or)\s*\}|und|oder|et|ou|y|o|e)[\s$]*", re.IGNORECASE
)
_EDGES = " \t\n,，、;:：*_#>(-\u2013\u2014|$"
_PROSE_START = re.compile(
    r"\s*(?:correct|right|wrong|incorrect|clear|obvious|not|unknown|based|as\s+follows|below|found|given|because|let|"
    r"in\s+the|we|i|you|to\s+find)(?![\w])",
    re.IGNORECASE,
)
_REASONED = re.compile(
    r",\s+(?:as|for|da)(?![\w])|(?<![\w])(?:because|since|weil|denn|car|parce|puisque|porque|perch\u00e9|poich\u00e9|pois|потому|"
    r"поскольку)(?![\w])|\u56e0\u4e3a|\u56e0\u70ba",
    re.IGNORECASE,
)


_NO_TEXT = re.compile(  # what follows an announcement, where it is a remark and no answer
    r"\W*(?:(?:not|that|unclear|easy|hard|simple|obvious|difficult|debatable|uncertain|yet\s+to|still|at\s+(?:least|most)|"
    r"more\s+than|less\s+than|nicht|unklar|einfach|pas|inconnue?|simple|no|desconocid[ao]|f\u00e1cil|dif\u00edcil|non|ignot[ao]|"
    r"semplice|n\u00e3o|desconhecid[ao]|не|неясно)(?![\w])|不|未知)",
    re.IGNORECASE,
)
_WHY = re.compile(
    r",?\s+(?:because|since|as\s+(?:it|he|she|they|the)|weil|denn|parce\s+qu|puisqu|porque|ya\s+que|perch\u00e9|poich\u00e9|"
    r"pois|потому|так\s+как|поскольку)(?![\w](?<!qu\w))|,\s+(?:car|da|for|as|not|nicht|pas|no|non|n\u00e3o)\s|,\s+а?\s*не\s|"
    r"[,\uff0c]?\s*(?:\u56e0\u4e3a|\u56e0\u70ba|\u800c\u4e0d\u662f)|[,\uff0c]\s*\u4e0d\u662f",
    re.IGNORECASE,
)
_INITIAL = re.compile(
    r"(?:(?<![^\W\d_])[A-Z]|(?<![\w])(?:Dr|Mr|Mrs|Ms|St|Prof|Sr|Mt|Gen|Lt|Col|Capt|Sgt|Rev|Hon|Ste|Mme|Mlle))\.$"
)
_NAME = re.compile(r"[ \t]+[^\s.!?][^\n.!?]{0,200}[.!?]?")
_COPULA = re.compile(r"(?<=[\u3040-\u9fff\u300d\u300f])(?:\u3067\u3059|\u3067\u3042\u308b)$")
_FORMULA = re.compile(r"\$([^$]{1,200})\$(?!\d)|\\\((.{1,200}?)\\\)")  # "$10 an hour, so $80" holds none
_AFTER_FORMULA = re.compile(
    r"[\s.,;:!*_%\u00b0]*$|,?\s*(?:because|since|as|for|where|when)(?![\w])|\s*\(|\s*\\|"
    r"\s+(?!or\b|and\b|million|billion|trillion|thousand|hundred|dozen|to\b|times|more\b|less\b|percent)[a-z/]+(?:\s+[a-z]+)?[.\s]*$",
    re.IGNORECASE,
)
_SO = re.compile(
    r"\W*(?:so|thus|therefore|hence|finally|also|daher|somit|deshalb|donc|ainsi|por\s+(?:lo\s+)?tanto|as\u00ed|quindi|perci\u00f2|"
    r"portanto|logo|assim|итак|значит|поэтому|因此|所以|よって|したがって)(?![A-Za-z])",
    re.IGNORECASE,
)
_LEADS_UP = re.compile(  # from a sentence's beginning to an announcement
    r"\W*(?:(?:so|thus|therefore|hence|finally|then|and|in\s+conclusion|also|daher|donc)\W+)*(?:(?:i|we|this|that|which|it|one|you)\s+"
    r"(?:\w+\s+){0,3}?(?:concludes?|say|see|means?|know|find|follows?|shows?|gives?|tells?|implies)(?:\s+us)?(?:\s+that)?|"
    r"(?:daher|somit|also|folglich|deshalb|damit)\s+(?:ist|lautet)|(?:on\s+(?:en\s+)?conclut|cela\s+signifie)\s+que)\W*",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\W*(?:(?:so|thus|therefore|hence|also|daher|donc|ainsi|entonces|quindi|portanto|значит)\W+)?(?:(?:(?:i|we)\s+(?:would\s+)?"
    r"(?:choose|pick|select|go\s+with)\s+|(?:it\s+is|it's|it\s+must\s+be)\s+)?(?:(?:the\s+)?(?:option|choice|answer)\s+)?"
    r"[(\[]?[A-Za-z][)\]]?(?:\s+(?:is|ist|est|es|\u00e8|\u00e9)\s+(?:the\s+|la\s+)?(?:correct[aeo]?|right|best|richtig|corrett[ao]|"
    r"corret[ao])(?:\s+(?:answer|option|choice))?)?|yes|no|true|false|ja|nein|oui|non|s\u00ed|s\u00ec|sim|n\u00e3o|да|нет|"
    r"是的?|否|はい|いいえ)\W*",
    re.IGNORECASE,
)
_SAYS = re.compile(
    r"(?:[^\W\d_]+,?\s+){0,3}(?:answer|antwort|ergebnis|r\u00e9ponse|respuesta|risposta|resposta|ответ)(?![\w])|\W*(?:答案|答え)",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\W*[A-Za-z]\W*")
_HEADED = re.compile(r"\W*[A-Za-z](?:[.):\]]|\W*$)")
_SAID = re.compile(r"[ \t]*[^\n.!?]{1,200}")
_NEXT_LETTER = re.compile(r"[ \t.,;]*\n[ \t]*([(\[]?[A-Za-z][)\]]?)[ \t.]*(?=\n|\Z)")
_NOUN = re.compile(
    r"(?<![\w])(?:answers?|antwort|r\u00e9ponse|respuesta|risposta|resposta|ответ(?:ом)?)(?![\w])|\u7b54\u6848|\u7b54\u3048",
    re.IGNORECASE,
)
_ANSWER_IS = re.compile(
    r"(?:\s+(?:to|for)\s[^.:?!]{0,60}?)?[\s*_]{0,4}(?P<not>(?:no|non|n\u00e3o|не|n['\u2019]|\u4e0d)\s?)?"
    r"(?:(?:is|are|was|will\s+be|would\s+be|should\s+be|must\s+be|equals|ist|lautet|est|sont|es|son|\u00e8|sono|\u00e9|"
    r"s\u00e3o|"
    r"равен|равно|это|будет)(?![\w])|\u662f|\u4e3a|\u306f)(?!\s*:\s*[^\W\d]|\W*(?:that|the\s+same|correct\s*[:,]|dass|que|"
    r"che|qu['\u2019]|"
    r"что)(?![\w]))",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"(?:(?<![\w])(?:is|are|be|ist|est|es|\u00e8|\u00e9|это)|[-\u2014\u2013\u662f\u304c])\s*(?:(?:the|our|my|your|die|la|the|a|"
    r"final|correct|right|richtige)\s+){0,3}(?:answer|antwort|r\u00e9ponse|respuesta|risposta|resposta|ответ|\u7b54\u6848|"
    r"\u7b54\u3048)"
    r"(?![\w\s]*[:=])[\W_]*(?:\u3067\u3059)?[\W_]*$",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"([\d(][\d\s.,()*/x\u00d7\u00f7+-]{2,80})=\s*\$?\s?([\d.,]{0,30}\d)")
_REMARK = re.compile(
    r"\W*(?:(?:note|notes|n\.?b|p\.?s|confidence|source|sources|reference|references|remark|hint|tip|difficulty|score|"
    r"hinweis|quelle|"
    r"remarque|source|nota|fuente|fonte|fontes|confiance|confianza|fiducia|примечание|источник|\u6ce8|\u6765\u6e90|"
    r"\u7f6e\u4fe1\u5ea6)\s*[:：]|let\s+me\s+know|i\s+hope|feel\s+free|(?:i|we)\s+(?:\w+\s+)?(?:checked|verified|did|used|"
    r"solved)(?![\w])|(?:this|it)\s+can\s+be\s+(?:checked|verified|done|solved)|\[\d+\]|round(?:ed)?(?![\w]))",
    re.IGNORECASE,
)
_NAMED_VALUE = re.compile(
    r"[\s*|>\u2022-]*(?P<name>[a-z]\)|[^\W\d][^\d=:|()]{0,30}?\s*[=:|])\s*[*$\u20ac]?-?[\d.,]*\d[^\d=*/+]{0,24}"
)
_TOTAL = re.compile(
    r"\W*(?:grand\s+|in\s+)?(?:total|sum|all|altogether|answer|result|left|remaining|difference|gesamt|summe|insgesamt|"
    r"rest|total|"
    r"suma|totale|somma|soma|итого|всего|\u5408\u8ba1|\u603b|\u5408\u8a08)",
    re.IGNORECASE,
)
_COMPARED = re.compile(
    r".{0,7}(?:which|who)\s+(?:is|are|was|were|has|had)\s+\D{0,12}\d[\d.,]*\s+(?:\w+\s+)?(?:more|less|fewer|older|younger|"
    r"times|higher|lower|longer|shorter|taller|greater|cheaper)(?![\w])",
    re.IGNORECASE,
)
_NAMED_TWICE = re.compile(r"(?<![\w\\])([A-Za-z])\s*=\s*[-\d.]{1,12},?\s*(?:or|and|,|oder|ou|o|или)\s*\1\s*=")
_SYMBOL = re.compile(r"(?<![\w\\])([A-Za-z])\s*(?<![<>!])=(?!=|\s*[A-Za-z]\s*=)")


class Found(NamedTuple):
    """The answer of a text, or None, and why; the `marker` that announced it."""

    value: Value | None
    why: str
    marker: Marker | None = None
    bare: bool = False  # the text is nothing but the answer


def answer_text(text: str, decimal: str = "point") -> str:
    """Return the part of a reply or solution that looks like its answer, for guessing the task."""
    text = cut_next_question(split_thinking(text).outside).strip()
    for marker in reversed(find_markers(text)):
        if marker.clause and not marker.doubt:
            return marker.clause.strip(" .*_`$\n。")
    last = (sentences(text) or [""])[-1]
    tail = last.rpartition("=")[2] if "=" in last else last
    # "12,50" makes a number too
    number = sole_quantity(tail, decimal=decimal).number or sole_quantity(tail, decimal="comma").number
    return str(number.value) if number else last.strip(" .*_`$\n。")


def find_answer(text: str, task: str, choices: Sequence[str], decimal: str, explicit: bool = False) -> Found:
    """Find the answer outside the reasoning."""
    if not text.strip():
        return Found(None, "nothing was said")
    markers = find_markers(text)
    why = ""
    for at in range(len(markers) - 1, -1, -1):
        marker = markers[at]
        if marker.doubt:
            continue
        if marker.clause is None:
            return Found(None, "the box does not close", marker)
        if task == "choice":
            marker = _with_option(text, marker, choices)
            if is_denied_announcement(text[max(0, marker.start - 60) : marker.start]):
                return Found(None, f"only in doubt: {_short(text[marker.start : marker.stop])}", marker)
        if task == "text":
            marker = _with_initials(text, marker)
        value, why_not, blocks = _in_clause(marker, task, choices, decimal)
        if (
            value is not None
            and not explicit
            and TAKEN_BACK.search(text, marker.end if marker.kind != "box" else marker.stop)
        ):
            return Found(None, f"taken back: {_short(text[marker.end :])}", marker)
        if (
            value is not None
            and task == "number"
            and marker.kind in ("label", "statement")
            and _next_value(text, marker, value)
        ):
            return Found(None, "several lines of values", marker)
        if value is not None and task == "text" and marker.kind == "label" and _BULLET.match(text, marker.stop):
            return Found(None, "several lines", marker)
        if value is not None and marker.kind == "box":
            if _beside_another(text, markers, at):
                return Found(None, "several boxes", marker)
            value, why_not = _boxed(text, marker, value, task, choices, decimal)
            if value is None:
                return Found(None, f"{why_not}: {_short(text[max(0, marker.start - 30) : marker.stop + 30])}", marker)
        if value is not None:
            said = text[marker.start : min(marker.stop, marker.start + 120)]
            return Found(value, " ".join(said.split()), marker)
        if blocks:
            return Found(None, f"{why_not}: {_short(marker.clause or '')}", marker)
        why = why or f"{why_not}: {_short(marker.clause or '')}"
    if task == "text" and markers and not explicit:
        return Found(None, why or "no answer is announced")
    found = _sentences(text, task, choices, decimal, explicit)
    if markers and markers[-1].doubt and "\n" not in text[markers[-1].start :].strip() and not explicit:
        return Found(None, f"only in doubt: {_short(text[markers[-1].start :])}")
    return found if found.value is not None or not why else Found(None, f"{found.why}; {why}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _beside_another(text: str, markers: list[Marker], at: int) -> bool:
    """Return whether a sentence has another box with other content, so that neither is the answer."""
    before = [marker for marker in markers[:at] if marker.kind == "box"]
    if not before or before[-1].clause == markers[at].clause:
        return False
    between = text[before[-1].stop : markers[at].start]
    return _BETWEEN_BOXES.fullmatch(between[:80]) is not None or not split_boxes(between)


_BULLET = re.compile(r"[ \t.]{0,8}\n[ \t]{0,8}[-*\u2022+]\s+\S")


def _next_value(text: str, marker: Marker, value: Value) -> bool:
    """Return whether the line after an announced number is another number with a unit and nothing else."""
    following = re.match(
        r"[ \t*_`.]{0,8}\n[ \t]{0,8}(?:[-*\u2022+]\s)?((?:and|und|et|y|e|и)\s)?([^\n]{1,60})(?:\n|"
        r"$)",
        text[marker.stop :][:100],
    )
    if (
        following is None
        or not re.match(r"[\s*_$\u20ac]{0,6}[-+]?\.?\d", following[2])
        or re.search(r"[=+*/<:?]", following[2])
    ):
        return False
    other = read_quantity(following[2])
    return len(following[2].split()) <= 5 and other.number is not None and other.number != value.number


def _boxed(
    text: str, box: Marker, value: Value, task: str, choices: Sequence[str], decimal: str
) -> tuple[Value | None, str]:
    """Return a box's value with the sign, multiplier and unit of its sentence, or why it has none."""
    effect, _ = lead_of_box(text, box.start)
    if effect not in ("", "-") and (effect.startswith("denied") or task in ("number", "equation", "math")):
        return None, effect
    if asked(text, box.stop):
        return None, "a question"
    if task not in ("number", "equation", "math") or value.number is None:
        return value, ""
    content, tail = effect + (box.clause or ""), tail_of_box(text, box.stop)
    if effect and re.match(r"\s*[-\u2212]", box.clause or ""):
        return None, "two signs"
    whole = read_quantity(content + tail, decimal=decimal, expressions=task != "number")
    alone = read_quantity(content, decimal=decimal, expressions=task != "number")
    if whole.blocks and not alone.blocks:
        return None, whole.why
    if alone.number is None or (effect == "" and (whole.number is None or whole.number == alone.number)):
        return value, ""
    found = whole if whole.number is not None else alone
    return numeric_value(found.number), ""


def _in_clause(marker: Marker, task: str, choices: Sequence[str], decimal: str) -> tuple[Value | None, str, bool]:
    """Return the announced value, why there is none, and whether that rules out any answer."""
    clause = (marker.clause or "").strip()
    whole = marker.kind in ("box", "tag", "hash")
    if not clause:
        return None, "nothing follows the marker", whole
    if whole and marker.kind == "tag" and (inner := find_markers(clause)):
        return _in_clause(inner[-1], task, choices, decimal)
    if task in ("number", "equation"):
        found = read_quantity(
            clause, decimal=decimal, expressions=task == "equation", label=marker.kind in ("label", "hash")
        )
        if several_names(simplify(clause)):
            return None, "several values", True
        denied = _DENIAL.search(clause) is not None and found.number is None
        if not whole and DENIED_AFTER.search(_BECAUSE.split(clause)[0]):
            return None, "denied", True
        value = numeric_value(found.number, found.text if task == "equation" else "")
        return value, found.why, found.blocks or denied or (marker.kind in ("box", "tag"))
    if re.search(r"[?？]\W*$", clause) and not whole:
        return None, "a question", False
    if task == "choice":
        value = read_value(clause, task, choices)
        if not choices and value is not None and value.letter is None and not whole and _PROSE_START.match(clause):
            return None, "no option follows directly", False
        return (
            value,
            "no option follows",
            value is None and (whole or _settles(clause) or says_options(clause, choices)),
        )
    if task == "yes-no":
        return read_value(clause, task), "neither yes nor no", whole
    if task == "math":
        formula = clause if whole else _formula(clause)
        value = (
            None if formula is None or mathforms.looks_like_prose(formula) else read_value(formula, task, (), decimal)
        )
        return value, "no formula follows directly", whole or formula is None
    if marker.kind == "box":
        clause = simplify(clause)
    if whole:
        return read_value(_unquoted(clause), task), "no text follows", True
    clause = _reasonless(clause)
    if _NO_TEXT.match(clause) or _DENIAL.search(clause):
        return None, "no answer follows directly", True
    if _PROSE_START.match(clause) or len(clause) > 200:
        return None, "no answer follows directly", False
    return read_value(_unquoted(clause), task), "no text follows", whole


def _reasonless(clause: str) -> str:
    """Return a clause without a trailing reason and without its contrast: "Paris, not Rome"."""
    cut = _WHY.search(clause)
    return clause[: cut.start()] if cut and clause[: cut.start()].strip() else clause


def _with_initials(text: str, marker: Marker) -> Marker:
    """A marker with the rest of a name that a full stop cuts: "Dr. Smith", "U.S. Army"."""
    clause, stop = marker.clause or "", marker.stop
    if marker.kind in ("box", "tag", "hash"):
        return marker
    if clause.lstrip().startswith(("- ", "* ", "\u2022 ")) and re.match(
        r"\s*\n[ \t]*[-*\u2022][ \t]", text[stop : stop + 80]
    ):
        return marker._replace(clause="")  # a list
    for _ in range(4):
        if not _INITIAL.search(clause) or not (said := _NAME.match(text, stop)):
            break
        clause, stop = clause + said[0], said.end()
    return marker._replace(clause=clause, stop=stop)


def _with_option(text: str, marker: Marker, choices: Sequence[str]) -> Marker:
    """Extend a one-letter announcement by the option's text or further letter after it."""
    clause = marker.clause or ""
    if marker.kind in ("box", "tag") or not _LETTER.fullmatch(clause):
        return marker
    if (said := _SAID.match(text, marker.stop)) and plain_text(said[0]) in map(plain_text, choices):
        return marker._replace(clause=f"{clause} {said[0]}")
    if letter := _NEXT_LETTER.match(text, marker.stop):
        return marker._replace(clause=f"{clause}; {letter[1]}")
    return marker


def _settles(clause: str) -> bool:
    return (
        _DENIAL.search(clause) is not None
        or re.match(r"[\W_]*[(\[]?[A-Za-z][)\]]?\s*(?:or|and|/|,|&)\s*[(\[]?[A-Za-z][)\]]?(?!\w)", clause) is not None
    )


def _formula(clause: str) -> str | None:
    """Return the formula that a clause consists of, apart from unit and reason; None if there is more."""
    match = re.match(
        r"[\s:]*(?:(?:simply|just|exactly|therefore|equal\s+to|the\s+\w+)\s+)?(\$\$?|\\\(|\\\[)(.+?)(?:\$\$?|\\\)|\\\])",
        clause,
    )
    if match:
        return match[2] if _AFTER_FORMULA.match(clause, match.end()) else None
    if _NO_TEXT.match(clause) or _DENIAL.search(clause) or re.search(r"[^\W\d_]{2,}\s+\$", clause):
        return None
    return _reasonless(clause)


def _unquoted(text: str) -> str:
    text = _COPULA.sub("", text.strip().strip("*_`").strip().rstrip(".。")).rstrip("。")
    return re.sub(r"^[-\u2022]\s+", "", text).strip(" *_`\"'\u201c\u201d\u201e\u300c\u300d\u300e\u300f")


def _sentences(text: str, task: str, choices: Sequence[str], decimal: str, explicit: bool) -> Found:
    """The answer of a text that announces none: the text as a whole, or its last sentence."""
    found = sentences(_TAGS.sub("", text))
    if not found:
        value = read_value(text, task, choices, decimal) if explicit else None
        return Found(value, "the text" if value else "no words and no numbers", bare=True)
    if task == "choice":
        return _option_in(text, found, choices, explicit)
    last = found[-1]
    if task == "text" and not explicit and len(last.split()) > 1 and _DENIAL.search(last):
        return Found(None, f"says that there is none: {_short(last)}")
    if explicit or len(found) == 1:
        value = _whole(text if explicit else _TAGS.sub("", text), task, choices, decimal)
        if value is not None and (explicit or _is_bare(text, task, choices)):
            return Found(value, "the whole text", bare=True)
    if task == "text":
        return Found(None, "no answer is announced")
    if _DENIAL.search(last) and task != "yes-no":
        return Found(None, f"says that there is none: {_short(last)}")
    if _HEDGE.search(last) and not explicit:
        return Found(None, f"unsure: {_short(last)}")
    if re.search(r"[?？]\W*$", last):
        return Found(None, f"ends in a question: {_short(last)}")
    if _REMARK.match(last) or (len(found) > 1 and not explicit and _of_a_list(found)):
        return Found(None, f"a remark or a list, no last sentence: {_short(last)}")
    if task in ("number", "equation") and (why := _no_announcement(last)):
        return Found(None, f"{why}: {_short(last)}")
    if task == "equation" and explicit:
        return Found(None, f"no expression with a value: {_short(last)}")
    if task in ("number", "equation", "math"):
        return _number_in(last, task, decimal)
    value = read_value(last, task)
    first = (
        read_value(found[0].split(",")[0].split(".")[0], task)
        if len(found) > 1 and re.match(r"\W*(?:yes|no|true|false)\b\s*[,.!:;]", found[0], re.IGNORECASE)
        else None
    )
    if value is None or first is None or first.key == value.key:
        value = value or first
        return Found(value, f"the last sentence: {_short(last)}" if value else f"neither yes nor no: {_short(last)}")
    return Found(None, "the first and the last sentence differ")


def _option_in(text: str, found: list[str], choices: Sequence[str], explicit: bool) -> Found:
    """Return the option of a text without announcement: the whole text, or its last sentence's choice."""
    last = found[-1]
    listed, (index, _) = choice_in_list(found, choices)
    if listed:
        value = option_value(index, choices) if index is not None else None
        return Found(value, "the only one found right" if value else "a list of the options")
    if explicit or len(found) == 1:
        whole = text if explicit else _TAGS.sub("", text)
        value = read_value(whole, "choice", choices)
        if value and (
            explicit or (_is_bare(text, "choice", choices) and (choices or value.letter is not None or _word(whole)))
        ):
            return Found(value, "the whole text", bare=True)
    if _DENIAL.search(last) and plain_text(last) not in map(plain_text, choices):
        return Found(None, f"says that there is none: {_short(last)}")
    if _HEDGE.search(last) and not explicit:
        return Found(None, f"unsure: {_short(last)}")
    if re.search(r"[?？]\W*$", last):
        return Found(None, f"ends in a question: {_short(last)}")
    if len(found) > 1 and _LETTER.fullmatch(found[-2]) and f"{found[-2]} {last}" in text:
        last = f"{found[-2]} {last}"
    index, _ = choice_in_sentence(last, choices)
    if len(found) > 1 and index is not None and (first := _HEADED.match(found[0])):
        begun = read_value(found[0], "choice", choices)
        if begun and begun.key != option_value(index, choices).key and not is_denied(found[0][first.end() :], choices):
            return Found(None, "the first and the last sentence differ")
    value = option_value(index, choices) if index is not None else None
    return Found(
        value, f"the last sentence: {_short(last)}" if value else f"no option in the last sentence: {_short(last)}"
    )


def _word(text: str) -> bool:
    return len(text.split()) == 1


def _whole(text: str, task: str, choices: Sequence[str], decimal: str) -> Value | None:
    if task == "math" and mathforms.looks_like_prose(text):
        return None
    return read_value(text, task, choices, decimal)


def _is_bare(text: str, task: str, choices: Sequence[str]) -> bool:
    """Whether a text of one sentence is an answer and nothing else, so that there is no rationale in it."""
    plain = simplify(text)
    if task in ("number", "equation"):
        return (
            "=" not in plain
            and len(plain.split()) <= 4
            and sole_quantity(plain, expressions=task == "equation").number is not None
        )
    if task == "choice":
        return (
            len(plain.split()) <= 1
            or re.match(r"\W*(?:[A-Za-z]\b\W|\([A-Za-z]\))", plain) is not None
            or plain_text(plain) in map(plain_text, choices)
        )
    if task == "yes-no":
        return len(plain.split()) <= 1
    if task == "math":
        bare = mathforms.unwrapped(text)
        return "$" not in bare and (len(bare.split()) <= 1 or not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", bare))
    return len(sentences(text)) == 1


def _no_announcement(sentence: str) -> str:
    """Return why a last sentence that mentions the answer, without a value after it, is not searched."""
    if DENIED_AFTER.search(_BECAUSE.split(sentence)[0]):
        return "denied"
    noun = _NOUN.search(sentence)
    if noun is None:
        return ""
    if in_doubt(sentence[: noun.start()]):
        return "denied"
    said = _ANSWER_IS.match(sentence, noun.end())
    if said is None or _IS_THE_ANSWER.search(sentence):
        return ""
    if said["not"]:
        return "denied"
    for equation in reversed(list(_EQUATION.finditer(sentence))):
        if (left := evaluate_expression(equation[1])) is not None and left == evaluate_expression(equation[2]):
            return ""
    rest = sentence[said.end() :]
    if re.match(r"\W*\d", rest):
        return "" if sole_quantity(rest).number else "several numbers"
    return "no value follows"


def _of_a_list(found: list[str]) -> bool:
    """Whether the last line is one of several names with a value each, and no total."""
    last, before = _NAMED_VALUE.fullmatch(found[-1]), _NAMED_VALUE.fullmatch(found[-2])
    return bool(last and before and last["name"] != before["name"] and not _TOTAL.match(found[-1]))


def several_names(text: str) -> bool:
    """Whether a sentence gives several values to letters: "x = 8 and y = 3", "x = 8 or x = 3"."""
    return len({match[1] for match in _SYMBOL.finditer(text)}) > 1 or _NAMED_TWICE.search(text) is not None


def _number_in(sentence: str, task: str, decimal: str) -> Found:
    """Return a sentence's final value: after its last `=` or a verb such as "makes", else its only number."""
    if task == "math" and (spans := _FORMULA.findall(sentence)):
        formula = (spans[-1][0] or spans[-1][1]).rpartition("=")[2]
        read = read_value(formula, task, (), decimal) if len(spans) == 1 else None
        return Found(
            read, f"the last sentence: {_short(sentence)}" if read else f"several formulas: {_short(sentence)}"
        )
    if task == "math" and re.search(r"[\[{]|\(\s*-?[\d.]+\s*,", sentence):
        return Found(None, f"a formula among words: {_short(sentence)}")
    text = EMPHASIS.sub(r"\2", simplify(sentence))
    if because := _BECAUSE.search(text):
        head = text[: because.start()]
        text = head if re.search(r"\d", head) else text
    verb = None
    for verb in _VERB.finditer(text):  # noqa: B007
        pass
    if several_names(text):
        return Found(None, f"several values: {_short(sentence)}")
    equals = verb is not None and verb[0] in "=\u2248"
    said = text[verb.end() :] if verb else text
    found = sole_quantity(said, decimal=decimal, expressions=task != "number", words=not equals)
    aside = found.number is not None and verb and not equals and not _is_complement(text, verb)
    if aside or (verb and found.why == "no number"):
        found = sole_quantity(text, decimal=decimal, expressions=task != "number", words=True)
    if found.number is not None and verb and _COMPARED.match(text, verb.start() - 7 if verb.start() > 6 else 0):
        return Found(None, f"a comparison in a clause of its own: {_short(sentence)}")
    value = numeric_value(found.number, found.text if task == "equation" else "")
    return Found(
        value, f"the last sentence: {_short(sentence)}" if value else f"{found.why or 'no value'}: {_short(sentence)}"
    )


def _is_complement(text: str, verb: re.Match[str]) -> bool:
    """Whether the number behind a verb is what its clause states: "the total is 12", not "5 are in 3 bags"."""
    begin = max((match.end() for match in _CLAUSE.finditer(text, 0, verb.start())), default=0)
    directly = _DIRECTLY.match(text, verb.end())
    return (directly is not None and text[directly.end() : directly.end() + 1].isdigit()) or not re.search(
        r"\d", text[begin : verb.start()]
    )


def find_rationale(text: str, found: Found) -> str:
    """Return the text before the announced answer; if empty, the text after it."""
    marker = found.marker
    if marker is None:
        return "" if found.bare else _without_closing(text) if found.value else text
    start = marker.start
    if marker.kind == "box":
        inside = [m.start for m in find_markers(text[: marker.stop]) if m.start < start <= m.stop and m.kind != "box"]
        begin = inside[0] if inside else _sentence_begin(text, start)
        lead = text[begin:start]
        if not inside and (re.search(r"[\d=]", lead) or (len(lead.split()) >= 6 and not _SO.match(lead))):
            stop = text.find("\n", marker.stop)
            sentence = (
                text[begin : marker.start]
                + (marker.clause or "")
                + text[marker.stop : stop if stop >= 0 else len(text)]
            )
            return (text[:begin] + sentence).strip()
        start = begin
    start = sentence_start(text, start)
    begin = _sentence_begin(text, start)
    start = begin if _LEADS_UP.fullmatch(text, begin, start) else start
    before = text[:start].rstrip(_EDGES)
    if before.strip():
        return before.strip()
    after = text[marker.stop :].strip(_EDGES + ".。")
    if len(after.split()) >= 3 or re.search(r"\d\s*[-+*/=\u00d7\u00f7]\s*\d", after):
        return text[marker.stop :].lstrip(_EDGES + ".。").strip()
    clause = marker.clause or ""
    return text.strip() if _REASONED.search(clause) else ""


def _without_closing(text: str) -> str:
    """Drop the last sentence if it only states the answer."""
    last = (sentences(text) or [""])[-1]
    at = text.rfind(last)
    if (
        last
        and at > 0
        and text[:at].strip()
        and (_CLOSING.fullmatch(last) or (_SAYS.match(last) and len(last.split()) <= 8))
    ):
        return text[:at].strip()
    return text


def _sentence_begin(text: str, start: int) -> int:
    begin = max(text.rfind("\n", 0, start) + 1, 0)
    matches = list(re.finditer(r"[.!?]\s+|[。！？]", text[begin:start]))
    return begin + matches[-1].end() if matches else begin
