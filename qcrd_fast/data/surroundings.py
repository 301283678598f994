"""Words around an announced answer that change it: doubts, denials, corrections, bounds, signs, other boxes."""

from __future__ import annotations

import re

from qcrd_fast.data.latex import DROPPED, simplify

REACH = 200  # characters looked at before an announcement

_PUNCTUATION = r"(?:[.!?,;…—–(\n。！？，；]|\s-)[\s*_\"'$)]{0,8}"
TAKEN_BACK = re.compile(
    rf"{_PUNCTUATION}(?:(?:but|oh|ah|um|uh|ok(?:ay)?|well|so|and|aber|mais|pero|ma|mas|но|然而|但是?)[,\s]{{1,3}})?(?:"
    r"(?:wait|hold\s+on|hang\s+on|hmm+|oops|scratch\s+that|correction|sorry|apologies|my\s+(?:mistake|bad)|i\s+mean|"
    r"or\s+rather|rather|let\s+me\s+(?:re|double|think|check|verify|correct|fix|try|see|redo)\w*|"
    r"let['\u2019]?s\s+(?:re|double|check|verify)\w*|"
    r"i\s+(?:made|was\s+wrong|think\s+i|need\s+to\s+re|should\s+re|miscalc|misread|misc|forgot)\w*|"
    r"(?:that|this|it)(?:['\u2019]s|\s+is|\s+was|\s+seems|\s+looks|\s+would\s+be)\s+(?:clearly\s+|obviously\s+|also\s+)?"
    r"(?:wrong|incorrect|not\s+(?:right|correct|true|possible)|impossible|a\s+mistake|an\s+error|false|off)|"
    r"(?:that|this|it)\s+(?:isn['\u2019]t|can['\u2019]t|cannot|couldn['\u2019]t|doesn['\u2019]t|does\s+not)(?![\w])|"
    r"(?:which|what)\s+(?:is|was|would\s+be)\s+(?:clearly\s+|of\s+course\s+)?(?:wrong|incorrect|not|false|a\s+mistake|"
    r"an\s+error|impossible)|"
    r"moment(?:\s+mal)?|warte|halt|nein|quatsch|falsch|korrektur|das\s+(?:ist|war|stimmt|kann)\s+(?:falsch|nicht)|"
    r"attends|attendez|erreur|correction|c['\u2019]est\s+faux|je\s+me\s+suis\s+tromp|"
    r"espera|perd\u00f3n|correcci\u00f3n|est\u00e1\s+mal|me\s+equivoqu|es\s+incorrecto|"
    r"aspetta|scusa|correzione|\u00e8\s+sbagliato|ho\s+sbagliato|"
    r"espere|desculpe|corre\u00e7\u00e3o|est\u00e1\s+errado|errei|"
    r"подожди\w*|стоп|нет|ошибка|исправ\w+|это\s+неверно|это\s+неправильно|я\s+ошиб\w+)(?![\w])|"
    r"actually(?![\w])(?!,?\s+correct)|(?:no|nope|non|n\u00e3o)(?:[,.!]|\s+wait|\s+it)|"
    r"\u7b49\u7b49|\u7b49\u4e00\u4e0b|\u4e0d\u5bf9|\u4e0d\u5c0d|\u4fee\u6b63|\u9519\u4e86|\u641e\u9519|"
    r"\u5f85\u3063\u3066|\u3044\u3048|\u3044\u3084|\u9055\u3044\u307e\u3059|\u8a02\u6b63|\u9593\u9055)",
    re.IGNORECASE,
)
DENIED_AFTER = re.compile(  # in the sentence of an announcement, behind its value
    r"(?<![\w])(?:(?:is|are|was|would\s+be|seems)\s+(?:\w+\s+)?(?:wrong|incorrect|mistaken|impossible|false|unlikely|"
    r"not\s+(?:right|correct|true|the\s+answer))|isn['\u2019]t\s+(?:right|correct|true|the\s+answer)|"
    r"(?:cannot|can['\u2019]t)\s+be\s+(?:right|correct|true|the)|"
    r"ist\s+(?:falsch|nicht\s+(?:richtig|korrekt|die))|w\u00e4re\s+falsch|est\s+(?:faux|fausse|incorrecte?)|"
    r"n['\u2019]est\s+pas\s+(?:la|correct|juste)|"
    r"(?:es|\u00e8|\u00e9|est\u00e1)\s+(?:incorrect[oa]|errad[oa]|sbagliat[oa]|fals[oa]|mal)|неверно|неправильн\w+|"
    r"ошибочн\w+)(?![\w])|\u662f\u9519|\u4e0d\u5bf9|\u4e0d\u6b63\u786e|\u9055\u3046|\u9593\u9055",
    re.IGNORECASE,
)
_DOUBT = re.compile(  # before an announcement, in its part of the sentence
    r"(?<![\w])(?:(?:common|typical|usual|easy)\s+(?:mistake|error)s?|mistake|wrong\s+to|incorrect\s+to|be\s+wrong|"
    r"doubt\w*|deny|denies|denied|unlikely|unsure|falls|caso|se|"
    r"(?:do|does|did|would|should|could|can|is|was|are)(?:\s+not|n['\u2019]t)|cannot|never|"
    r"not\s+(?:sure|clear|certain|true|say\w*|think\w*|mean\w*|that|whether|the)|"
    r"(?:thinks?|thought|says?|said|claims?|claimed|believes?|believed|guess(?:es|ed)?|wrote|told|suggests?|argues?)(?=\s)|"
    r"saying|thinking|claiming|"
    r"nicht|kein\w*|(?:ne|n['\u2019])\s?\w+\s+pas|pas|no\s+(?:creo|es|pienso|digo)|non|n\u00e3o|не|вряд\s+ли)(?![\w])|"
    r"\u4e0d\u8ba4\u4e3a|\u305f\u3076\u3093|\u3082\u3057|\u304a\u305d\u3089\u304f|\u53ef\u80fd",
    re.IGNORECASE,
)
_THAT = re.compile(r"\s*(?:dass|da\u00df|que|qu['\u2019]|che|что|that)(?![\w])", re.IGNORECASE)
_OWN_VIEW = re.compile(
    r"(?<![\w])(?:i|we)\s+(?:(?:now|would|can|therefore|also)\s+)?(?:think|say|believe|claim|guess|said)(?:\s+that)?(?=\s)|"
    r"(?<![\w])(?:ich|wir)\s+glauben?(?![\w])|(?:saying|thinking|that\s+is\s+to\s+say)\s*,",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])[\"')*_$]{0,4}\s|[。！？]|;\s|\n")
_FULL_STOP = re.compile(r"(?<=[.!?])[\"')*_$]{0,4}\s|[。！？]|\n")
_WRONG_BOX = re.compile(
    r"(?<![\w])(?:whether|if|ob|wenn|falls|если)(?![\w])[^,]*$|"
    r"(?<![\w])(?:not|cannot|never|isn['\u2019]t|aren['\u2019]t|can['\u2019]t|nicht|keine?|pas|no\s+es|non\s+\u00e8|"
    r"n\u00e3o(?:\s+\u00e9)?|не)(?:\s+(?:be|equal|to|the|a|answer|simply|just|only|exactly|really)){0,3}\s*$|"
    r"(?:不是|不可能是?|如果)\s*$",
    re.IGNORECASE,
)
_BOX_QUESTION = re.compile(r"[^.!?。！？\n]{0,80}[?？]")
_BOX_BOUND = re.compile(
    r"(?:[<>\u2264\u2265\u2260\u00b1]|!=|(?<![\w])(?:at\s+(?:least|most)|(?:more|less|fewer|greater|other|larger|smaller|"
    r"rather)"
    r"\s+than|up\s+to|over|under|above|below|beyond|exceeds?|minimum(?:\s+of)?|maximum(?:\s+of)?|but|"
    r"mindestens|h\u00f6chstens|(?:mehr|weniger|gr\u00f6\u00dfer|kleiner)\s+als|\u00fcber|unter|"
    r"au\s+(?:moins|plus)|(?:plus|moins)\s+de|al\s+menos|como\s+m\u00e1ximo|(?:m\u00e1s|menos|mayor|menor)\s+(?:de|que)|"
    r"almeno|al\s+massimo|(?:pi\u00f9|meno|maggiore|minore)\s+di|pelo\s+menos|no\s+m\u00e1ximo|(?:mais|maior)\s+(?:de|que)|"
    r"больше|меньше|более|менее)|\u81f3\u5c11|\u6700\u591a|\u5927\u4e8e|\u5c0f\u4e8e|\u8d85\u8fc7)"
    r"(?:\s+(?:than|or\s+equal\s+to|than\s+or\s+equal\s+to))?\s*$",
    re.IGNORECASE,
)
_BOX_TERM = re.compile(
    r"(?:[+*/^\u221a_]|(?<![\w])(?:plus|times|twice|half\s+of|double|root\s+of)|(?<=[\d)])\s*-|(?<![\w])[a-z]\s*-)\s*$",
    re.IGNORECASE,
)
_BOX_SIGN = re.compile(
    r"(?:^|[\s=:(\u2248])(?:-|\u2212)\s*$|(?<![\w])(?:negative|minus|negativ|moins|menos|meno|минус)\s*$|[负負]\s*$",
    re.IGNORECASE,
)
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?\s*(?:\[[^\]]{0,20}\])?\s*$")


def sentence_before(text: str, start: int) -> str:
    """The sentence up to `start`, its last `REACH` characters."""
    return _SENTENCE.split(text[max(0, start - REACH) : start])[-1]


def in_doubt(before: str) -> bool:
    """Whether the words that lead up to an announcement deny it, doubt it, or leave it to somebody else."""
    part = len(before)
    while (part := before.rfind(",", 0, max(part, 0))) >= 0 and _THAT.match(before, part + 1):
        pass  # "not, that"
    return _DOUBT.search(_OWN_VIEW.sub(" ", before[part + 1 :])) is not None


def lead_of_box(text: str, start: int) -> tuple[str, str]:
    """Return the effect of the words before a box ("", "-" or why it has no answer), and these words."""
    raw = sentence_before(text, start)
    depth, at = 0, len(raw)
    for brace in reversed(list(re.finditer(r"(?<!\\)[{}]", raw))):
        depth += 1 if brace[0] == "}" else -1
        if depth < 0:
            depth, at = 0, brace.start()
            command = _COMMAND.search(raw, max(0, at - 40), at)
            if (command is None and raw[:at].endswith(("}", "^", "_"))) or (command and command[1] not in DROPPED):
                return "part of a formula", raw
    lead = simplify(raw).rstrip("* _`\"'\t([{:")
    if _WRONG_BOX.search(lead):
        return "denied or in doubt", lead
    if _BOX_BOUND.search(lead):
        return "a bound, no value", lead
    if _BOX_TERM.search(lead):
        return "part of a formula", lead
    return ("-" if _BOX_SIGN.search(lead) else ""), lead


def asked(text: str, stop: int) -> bool:
    """Return whether the sentence at `stop` is a question."""
    return _BOX_QUESTION.match(text, stop, stop + 90) is not None


def split_boxes(between: str) -> bool:
    """Return whether this text between two boxes separates sentences, lines or steps."""
    plain = simplify(between).strip("$ \t")
    return (
        plain in ("=", "\u2248")
        or _FULL_STOP.search(plain + " ") is not None
        or TAKEN_BACK.search(". " + plain) is not None
    )


def tail_of_box(text: str, stop: int) -> str:
    """Return the text after a box in its sentence, without the formula's end."""
    raw = re.split(r"[.!?](?=\W*(?:\s|$))|[。！？\n]|\\\]|\$\$", text[stop : stop + REACH])[0]
    return "" if re.fullmatch(r"[\s$*_)\]}\\.,]*", raw) else raw
