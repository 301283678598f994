"""Find announcements of an answer (`Answer:`, "the answer is", ...) in nine languages and in Markdown."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from qcrd_fast.data.latex import boxes
from qcrd_fast.data.surroundings import in_doubt, sentence_before

MAX_MARKERS = 64  # the last ones, which are looked at
MAX_CLAUSE = 1024  # characters of what is said behind a marker

_M = r"[\s*_`\"'\u201c\u201d]{0,12}"  # Markdown and quotes between a noun and its verb
_OF = r"(?:\s+(?:to|for|of)\s+(?:the|this|that|your|our|question|problem)\b[^.\n:?!]{0,80}?)?"
_ENGLISH = (
    rf"(?:final\s+|correct\s+|right\s+|best\s+|numerical\s+|numeric\s+){{0,3}}(?:answers?|ans)(?:\s+(?:choice|option))?{_OF}"
    rf"(?:,?\s+(?:then|thus|therefore|hence|here),?)?{_M}(?P<en>(?:is|are|was|will\s+be|would\s+be|should\s+be|must\s+be|"
    rf"equals|becomes|"
    rf"comes\s+(?:out\s+)?to|turns\s+out\s+to\s+be)(?![\w])|[:=\uff1a]|\u2014|\u2013|-(?=\s))"
    rf"|(?:correct|right|best)\s+(?:option|choice|statement|alternative|one){_M}(?:(?:is|would\s+be|must\s+be)(?![\w])|[:=])"
    rf"|final\s+(?:result|value){_M}(?:is(?![\w])|[:=])"
)
_WHERE = {  # nouns, what may stand between, and the verbs
    "de": (r"(?:end)?antwort(?:option)?|endergebnis|l\u00f6sung|ergebnis|resultat",
    r"(?:\s+(?:auf\s+die\s+frage|darauf|darum|daher|somit|also))?",
           r"ist|sind|lautet|betr\u00e4gt|w\u00e4re|hei\u00dft"),
    "fr": (r"r\u00e9ponse|r\u00e9sultat|solution",
    r"(?:\s+(?:finale?|correcte?|exacte?|juste|bonne|\u00e0\s+la\s+question|est\s+donc)){0,3}",
           r"est|sont|sera|serait|vaut"),
    "es": (r"respuesta|resultado|soluci\u00f3n|(?:opci\u00f3n|alternativa)(?=\s+corr)",
    r"(?:\s+(?:final|correcta|a\s+la\s+pregunta|por\s+tanto)){0,3}",
    r"es|son|ser\u00eda|ser\u00e1"),
    "it": (r"risposta|risultato|soluzione|(?:opzione|alternativa)(?=\s+(?:corr|giu))",
    r"(?:\s+(?:finale|corretta|giusta|esatta|alla\s+domanda)){0,3}",
    r"\u00e8|e'|sono|sar\u00e0|sarebbe"),
    "pt": (r"resposta|resultado|solu\u00e7\u00e3o|(?:op\u00e7\u00e3o|alternativa)(?=\s+(?:corr|certa))",
    r"(?:\s+(?:final|correta|certa|\u00e0\s+pergunta)){0,3}",
    r"\u00e9|s\u00e3o|ser\u00e1|seria"),
    "ru": (r"ответ(?:ом)?|результат", r"(?:\s+на\s+(?:этот\s+)?вопрос)?",
    r"равен|равно|равна|это|есть|является|будет|составляет"),
}  # fmt: skip
_WORDED = "|".join(
    rf"(?:{nouns})(?![\w]){between}{_M}(?:(?:{verbs})(?![\w])|[:=\uff1a]|\u2014|\u2013|"
    rf"-(?=\s))"
    for nouns, between, verbs in _WHERE.values()
)
_CHINESE = (
    rf"(?:答案|解答|结果|結果)(?:选项|選項)?{_M}(?:(?:因此|所以|也)?(?:应该|應該|应当|应|應|就)?(?:是|为|為|等于|等於|选择|选|選)|[:：=])"
    rf"|(?:^|(?<=[。，,\s]))答{_M}[:：]|(?:故|应|應|因此|所以)?(?:选择|選擇|选|選)(?:项|項|择)?{_M}[:：]?(?=\s*[(（\[【]?[A-Za-z][^A-Za-z]|"
    rf"\s*[A-Za-z]$)"
    rf"|正确(?:选项|的是|的选项)(?:是|为)?{_M}[:：]?"
)
_JAPANESE = rf"(?:答え|解答|回答|正解|正答|答)(?:の選択肢)?{_M}(?:は(?:、|，)?|[:：=])"
_KOREAN = rf"(?:정답|답){_M}(?:은|는|[:：])"
_TEXT = re.compile(
    rf"(?<![\w])(?:{_ENGLISH}|{_WORDED})|{_CHINESE}|{_JAPANESE}|{_KOREAN}"
    r"|(?P<hash>(?<![#\S])####(?!#))|<answer>(?P<tag>)"
    rf"|^[\s#*_>]{{0,12}}(?:the\s+)?(?:final\s+answer|answer|respuesta\s+final|r\u00e9ponse\s+finale|"
    rf"endg\u00fcltige\s+antwort|risposta\s+finale|"
    rf"resposta\s+final|окончательный\s+ответ|最终答案|最終的な答え){_M}(?P<heading>\n)",
    re.IGNORECASE | re.MULTILINE,
)
_DOUBT = re.compile(
    r"(?<![\w])(?:if|whether|suppose|supposing|assum\w+|maybe|perhaps|might|tempt\w*|first\s+guess|wenn|ob|vielleicht|"
    r"falsche?|si|peut-\u00eatre|fausse|quiz\u00e1s?|incorrecta|forse|talvez|errada|"
    r"если|возможно)(?![\w])|如果|也许|假设"
    r"|(?<![\w])(?:no|not|wrong|incorrect|mistaken|previous|initial|other|another|неправильный|неверный|falsche|incorrecta)\s+"
    r"(?:(?:the|an?|final|correct|right|possible|single)\s+){0,3}$|错误\w{0,2}$|(?:不是|没有)\w{0,2}$",
    re.IGNORECASE,
)
_DETERMINER = re.compile(
    r"(?:(?<![\w])(?:and|so|thus|hence|therefore|then|finally|in\s+conclusion|the|my|our|this|your|a|final|correct|right|best|"
    r"also|daher|somit|deshalb|die|meine|das|der|richtige|korrekte|endg\u00fcltige|beste|donc|ainsi|la|le|ma|bonne|"
    r"por\s+(?:lo\s+)?tanto|as\u00ed|entonces|el|mi|"
    r"quindi|perci\u00f2|il|mia|portanto|logo|assim|ent\u00e3o|o|minha|"
    r"итак|значит|таким\s+образом|поэтому|мой|правильный|верный|окончательный|итоговый)[,:]?|"
    r"所以|因此|故|综上|最终|最終的な|最終|正确|正確|的|この問題の|したがって|よって|問題の|は|そのため|,|，|、|\s|[*_#>`(])$",
    re.IGNORECASE,
)
_END = re.compile(
    r"(?<=[.!?])(?<!approx\.)(?<!\bca\.)(?<!\bRs\.)(?<!\bNo\.)(?<!\bNr\.)(?:[*_`\"'\u201d)\]$]{0,6})(?=\s)|"
    r"[。！？](?!\d)"
)
_SKIP = re.compile(r"(?:\n[ \t]{0,8}[-+\u2022][ \t]{1,4}|\s|[*_`#:：=]|(?<=\n)>|(?<=\n )>|(?:\\\[|\$\$)[ \t]{0,9}\n)*")
_QUESTION = (
    r"(?:Q|Question|Problem|Premise|Exercise|Human|User|Instruction|Frage|Aufgabe|Pregunta|Problema|Domanda|Pergunta|"
    r"Quest\u00e3o|Exerc\u00edcio|Ejercicio|Esercizio|Exercice|Example|Beispiel|Exemple|Ejemplo|Esempio|Exemplo|Пример|"
    r"(?:Next|Another)\s(?:question|problem)|Now\s+(?:try|solve)\s+this(?:\s+one)?|Вопрос|Задача|问题|問題|题目|題目|质问|質問|问|問)"
)
_NEXT = re.compile(
    rf"\n[ \t>]{{0,12}}[*_#]{{0,4}}\s?(?:\d{{1,3}}[.)]\s)?{_QUESTION}\s?\d{{0,4}}\s?[*_]{{0,3}}[:：]|"
    r"(?<=[.!?])\s{0,4}Q:\s|"
    rf"\n[ \t>]{{0,12}}[*_#]{{0,4}}\s?{_QUESTION}\s?\d{{1,4}}(?:[.)*_]{{1,3}}(?:\s|$)|[ \t]{{0,4}}\n)|"
    rf"\n#{{2,4}}[ \t]{{0,9}}(?:Instruction|Question|Input)\b",
    re.IGNORECASE,
)


_ONE_ITEM = re.compile(r"1[.)][ \t]+[^\s*_)\]]")  # a list begins, or a train of thought


class Marker(NamedTuple):
    """An announcement at text[start:end]; `clause` is the text announced.

    kind: `box`, `tag` and `hash` (the clause is the whole of it), `label` (`Answer:`) or `statement` ("the answer is").
    `clause` is None in a box that does not close; `doubt`: the sentence says that it is none, or asks.
    """

    start: int
    end: int
    kind: str
    clause: str | None
    stop: int
    doubt: bool = False


def cut_next_question(text: str) -> str:
    """`text` up to where it runs on into a further, invented question."""
    for match in _NEXT.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


_THEREFORE = re.compile(
    r"(?:therefore|thus|so|hence|simply|also|daher|somit|folglich|donc|alors|ainsi|entonces|por\s+(?:lo\s+)?tanto|quindi|dunque|"
    r"portanto|ent\u00e3o|logo|поэтому|значит|итак)(?![\w]),?\s+",
    re.IGNORECASE,
)


def find_markers(text: str) -> list[Marker]:
    """The last `MAX_MARKERS` places where the answer is announced, in their order."""
    found: collections.deque[Marker] = collections.deque(maxlen=MAX_MARKERS)
    for box in boxes(text):
        found.append(Marker(box.start, box.end, "box", box.content, box.end))
    matches = collections.deque(_TEXT.finditer(text), maxlen=MAX_MARKERS)
    markers = [*found, *(_marker(text, match) for match in matches)]
    return sorted(markers, key=lambda marker: marker.start)[-MAX_MARKERS:]


def _marker(text: str, match: re.Match[str]) -> Marker:
    start, end = match.span()
    if match["hash"]:
        stop = text.find("\n", end, end + MAX_CLAUSE)
        stop = min(len(text), end + MAX_CLAUSE) if stop < 0 else stop
        return Marker(start, end, "hash", text[end:stop], stop)
    if match["tag"] is not None:
        stop = text.find("</answer>", end)
        stop = len(text) if stop < 0 else stop
        return Marker(start, end, "tag", text[end:stop][-MAX_CLAUSE:], stop)
    said = match[0].rstrip("*_`\"' \n")
    label = said.endswith((":", "=", "：", "-", "\u2014", "\u2013")) or match["heading"] is not None
    begin = text.rfind("\n", max(0, start - 60), start) + 1 or max(0, start - 60)
    before = re.split(r"[.!?。！？;]\s", text[begin:start])[-1]
    skip = _SKIP.match(text, end)
    at = skip.end() if skip else end
    if therefore := _THEREFORE.match(text, at):  # "the answer is therefore 12"
        at = therefore.end()
    clause = _line(text, at) if _is_list(text, end, at) or (label and _ONE_ITEM.match(text, at)) else _clause(text, at)
    doubt = _DOUBT.search(before) is not None or in_doubt(sentence_before(text, start))
    return Marker(start, end, "label" if label else "statement", clause, at + len(clause), doubt)


def _is_list(text: str, end: int, start: int) -> bool:
    """Whether a numbered list begins at `start`, and not the answer 1 with a full stop."""
    if not re.compile(r"1[.)]\s+\S").match(text, start):
        return False
    return "\n" in text[end:start] or re.search(r"\s2[.)]\s", text[start : start + MAX_CLAUSE]) is not None


def _line(text: str, start: int) -> str:
    limit = min(len(text), start + MAX_CLAUSE)
    end = text.find("\n", start, limit)
    return text[start : limit if end < 0 else end]


def _clause(text: str, start: int) -> str:
    """From `start` to the end of the sentence or line."""
    limit = start + len(_line(text, start))
    end = _END.search(text, start, min(limit + 1, len(text)))
    return text[start : min(end.end(), limit) if end else limit]


def sentence_start(text: str, start: int) -> int:
    """Where the words that lead up to a marker at `start` begin: "so the final", "Therefore,"."""
    for _ in range(24):
        match = _DETERMINER.search(text, max(0, start - 24), start)
        if match is None or match.start() == start:
            break
        start = match.start()
    return start


def sentences(text: str) -> list[str]:
    """The sentences of the end of a text; a line is never part of two."""
    out: list[str] = []
    for line in text[-4 * MAX_CLAUSE :].split("\n"):
        position = 0
        for end in _END.finditer(line):
            out.append(line[position : end.end()])
            position = end.end()
        out.append(line[position:])
    return [piece.strip() for piece in out if re.search(r"\w", piece)]
