r"""One reader of replies: reasoning, rationale and answer of whatever a teacher or student said.

    read_reply("3 * 6 = 18 jars. The answer is \\boxed{18}.", "number")
    -> Reading(reasoning="", rationale="3 * 6 = 18 jars.", answer="18", why="\\boxed{18}")

The rules stand in docs/replies.md. Where the text leaves a doubt there is no answer: an unreadable reply costs one sample, a
wrong reading teaches a wrong rationale.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data import mathforms
from qcrd_fast.data.answers import EMPHASIS, Value, equal, numeric_value, option_value, read_value, surface
from qcrd_fast.data.choices import Choices, choice_in_sentence, parse_choices, plain_text
from qcrd_fast.data.latex import simplify
from qcrd_fast.data.markers import Marker, cut_next_question, find_markers, sentence_start, sentences
from qcrd_fast.data.quantities import DECIMALS, read_quantity, sole_quantity
from qcrd_fast.data.schema import Rationale
from qcrd_fast.data.thinking import THINKING, Parts, split_thinking
from qcrd_fast.errors import InputError

__all__ = ["Choices", "Reader", "Reading", "answer_text", "extract_answer", "is_correct", "parse_choices", "read_reply"]

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
    r"[=\u2248](?!=)|(?<![\w])(?:is|are|was|were|be|equals?|makes?|made|gives?|gave|leaves?|left\s+with|gets?|got|totals?|"
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
_BECAUSE = re.compile(r",?\s+(?:because|since)(?![\w])", re.IGNORECASE)
_TAGS = re.compile(r"</?(?:answer|solution|response|output|final)\s*>|```\w{0,12}", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:and|or|,|;|\\text\{\s*(?:and|or)\s*\}|und|oder|et|ou|y|o|e)[\s$]*", re.IGNORECASE)
_EDGES = " \t\n,，、;:：*_#>(-\u2013\u2014|$"
_PROSE_START = re.compile(
    r"\s*(?:correct|right|wrong|incorrect|clear|obvious|not|unknown|based|as\s+follows|below|found|given|because|let|"
    r"in\s+the|we|i|you|to\s+find)(?![\w])",
    re.IGNORECASE,
)
_REASONED = re.compile(
    r"(?<![\w])(?:because|since|weil|denn|car|parce|puisque|porque|perch\u00e9|poich\u00e9|pois|потому|"
    r"поскольку)(?![\w])|\u56e0\u4e3a|\u56e0\u70ba",
    re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")


MAX_OWN_ANSWER = 32768  # characters, the last ones, of an answer of its own


class Reading(NamedTuple):
    """A reply taken apart. `answer` is None where none can be read as one of the task; `why` says what was read, or why not."""

    reasoning: str
    rationale: str
    answer: str | None
    why: str


class _Answer(NamedTuple):
    value: Value | None
    why: str
    marker: Marker | None = None
    bare: bool = False  # the text is nothing but the answer


@dataclasses.dataclass(frozen=True)
class Reader:
    """How replies and answers are read and compared: the options `--thinking`, `--decimal`, `--tolerance`, `--answer-regex`
    and `--answer-reader`.

    `pattern`: of the last match in a reply its first group, or all of it, is the answer. `function`: (text, task, choices) ->
    the answer or None. With either, replies are read in no other way; golds and answers of their own are, where it finds none.
    """

    thinking: str = "auto"
    decimal: str = "point"
    tolerance: Fraction | None = None
    pattern: re.Pattern[str] | None = None
    function: Callable[[str, str, Sequence[str]], str | None] | None = None

    @classmethod
    def from_options(
        cls,
        thinking: str = "auto",
        decimal: str = "point",
        tolerance: float | str | None = None,
        answer_regex: str | None = None,
        answer_reader: str | None = None,
    ) -> Reader:
        """Raises `InputError` for a value that is none of its option's."""
        for name, value, known in (("thinking", thinking, THINKING), ("decimal", decimal, DECIMALS)):
            if value not in known:
                raise InputError(f"--{name} is one of {', '.join(known)}; got {value!r}")
        if answer_regex is not None and answer_reader is not None:
            raise InputError("--answer-regex and --answer-reader are given; one of them reads the answers")
        try:
            width = None if tolerance is None else Fraction(str(tolerance))
        except (ValueError, ZeroDivisionError):
            width = Fraction(-1)
        if width is not None and width < 0:
            raise InputError(f"--tolerance is a number of at least 0; got {tolerance!r}")
        try:
            pattern = re.compile(answer_regex, re.MULTILINE) if answer_regex is not None else None
        except re.error as error:
            raise InputError(f"--answer-regex: {answer_regex!r} is no regular expression: {error}") from error
        return cls(thinking, decimal, width, pattern, _load(answer_reader) if answer_reader is not None else None)

    def read(self, text: str, task: str, choices: Sequence[str] = (), *, truncated: bool = False) -> Reading:
        """A whole reply taken apart; where it was `truncated` at its maximum length, only an announced answer counts."""
        parts = split_thinking(text)
        outside = cut_next_question(parts.outside).strip()
        if self.pattern or self.function:
            answer, why = self._custom(outside, task, choices)
            return Reading(parts.thinking, self._rationale(parts, outside), answer, why)
        found = _find(outside, task, choices, self.decimal)
        rationale = self._rationale(parts, _rationale(outside, found))
        if parts.cut:
            return Reading(parts.thinking, outside, None, "the reasoning does not end")
        if truncated and found.marker is None:
            return Reading(parts.thinking, rationale, None, "the reply was cut at its maximum length")
        return Reading(parts.thinking, rationale, found.value.text if found.value else None, found.why)

    def sample(self, sample: Rationale, task: str, choices: Sequence[str] = ()) -> Reading:
        """A sample's rationale and answer: of a raw reply both are read from its text; else its answer is read by itself."""
        if sample.reply:
            return self.read(sample.text, task, choices)
        parts = split_thinking(sample.text)
        rationale = self._rationale(parts, parts.outside).strip()
        if sample.answer is None:
            return Reading(parts.thinking, rationale, None, "no answer was given")
        answer, why = self.answer(sample.answer, task, choices)
        return Reading(parts.thinking, rationale, answer, why)

    def answer(self, text: str, task: str, choices: Sequence[str] = ()) -> tuple[str | None, str]:
        """(an answer of its own, such as a gold, as it is taught; what was read, or why nothing was)."""
        if self.pattern or self.function:
            answer, why = self._custom(text, task, choices)
            if answer is not None:
                return answer, why
        parts = split_thinking(text)
        found = _find(parts.outside[-MAX_OWN_ANSWER:], task, choices, self.decimal, explicit=True)
        if parts.cut:
            return None, "the reasoning does not end"
        return found.value.text if found.value else None, found.why

    def solution(self, gold: str, task: str, choices: Sequence[str] = ()) -> Reading | None:
        """A gold answer that is a worked solution, taken apart; None where it is the answer alone."""
        if not is_worked(gold):
            return None
        reading = self.read(_CALCULATOR.sub("", gold), task, choices)
        return reading if reading.answer is not None and reading.rationale.strip() else None

    def value(self, answer: str, task: str, choices: Sequence[str] = ()) -> Value | None:
        """The value of an answer that `read`, `sample` or `answer` returned: numbers are in canonical form by then."""
        return read_value(answer, task, choices)

    def same(self, a: str, b: str, task: str, choices: Sequence[str] = ()) -> bool:
        """Whether two answers that were read are one."""
        left, right = self.value(a, task, choices), self.value(b, task, choices)
        return left is not None and right is not None and equal(left, right, task, self.tolerance)

    def _rationale(self, parts: Parts, own: str) -> str:
        if not parts.thinking or self.thinking == "drop":
            return own
        if self.thinking == "only":
            return parts.thinking
        if self.thinking == "keep":
            return f"{parts.thinking}\n\n{own}".strip()
        return own if len(re.findall(r"\w+", own)) >= 3 or re.search(r"[\u3040-\u9fff]{3}", own) else parts.thinking

    def _custom(self, text: str, task: str, choices: Sequence[str]) -> tuple[str | None, str]:
        if self.pattern:
            found = None
            for match in self.pattern.finditer(text):
                found = match[1] if self.pattern.groups else match[0]
            why = "--answer-regex"
        else:
            assert self.function
            try:
                found = self.function(text, task, choices)
            except Exception as error:
                raise InputError(f"--answer-reader: {type(error).__name__}: {error}") from error
            why = "--answer-reader"
        if found is None:
            return None, f"{why} found none"
        if not isinstance(found, str):
            raise InputError(f"{why}: expected a string or None, got {found!r}")
        answer = surface(found, task, choices, self.decimal)
        return answer, why if answer is not None else f"{why} gave {found[:80]!r}, which is no {task}"


DEFAULT = Reader()


def _load(name: str) -> Callable[[str, str, Sequence[str]], str | None]:
    import importlib
    import os
    import sys

    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise InputError(f"--answer-reader expects MODULE:FUNCTION; got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise InputError(f"--answer-reader: {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"--answer-reader: {name!r} is no function")
    return found


def read_reply(
    text: str,
    task: str,
    choices: Sequence[str] | None = None,
    *,
    thinking: str = "auto",
    decimal: str = "point",
    truncated: bool = False,
) -> Reading:
    """Reasoning, rationale and answer of a reply. `choices`: those of the question, as `parse_choices` finds them.

    Raises:
        InputError: an unknown value of `thinking` or `decimal`.
    """
    reader = DEFAULT if (thinking, decimal) == ("auto", "point") else Reader.from_options(thinking, decimal)
    return reader.read(text, task, choices or (), truncated=truncated)


def extract_answer(text: str, task: str, choices: Sequence[str] = ()) -> str | None:
    """The answer of a short text, such as a student's output, as it is taught; None where none can be read."""
    if task == "text" and "\n" in text[-MAX_OWN_ANSWER:].strip():
        return read_reply(text, task, choices).answer
    return DEFAULT.answer(text, task, choices)[0]


def is_correct(prediction: str, gold: str, task: str, choices: Sequence[str] = ()) -> bool:
    """Whether generated text answers `gold`. Pass `parse_choices(question)` for choices, so that letters are understood."""
    said, wanted = extract_answer(prediction, task, choices), DEFAULT.answer(gold, task, choices)[0]
    return said is not None and wanted is not None and DEFAULT.same(said, wanted, task, choices)


def is_worked(gold: str) -> bool:
    """Whether a gold answer looks like a worked solution that ends in the answer."""
    return "####" in gold or "\\boxed" in gold or "\n" in gold.strip()


def answer_text(text: str) -> str:
    """The part of a reply, or of a worked solution, that looks like its answer, whatever its task; for guessing the task."""
    text = cut_next_question(split_thinking(text).outside).strip()
    for marker in reversed(find_markers(text)):
        if marker.clause and not marker.doubt:
            return marker.clause.strip(" .*_`$\n。")
    last = (sentences(text) or [""])[-1]
    number = sole_quantity(last.rpartition("=")[2] if "=" in last else last).number
    return str(number.value) if number else last.strip(" .*_`$\n。")


def _find(text: str, task: str, choices: Sequence[str], decimal: str, explicit: bool = False) -> _Answer:
    """The answer in what stands outside of the reasoning."""
    if not text.strip():
        return _Answer(None, "nothing was said")
    markers = find_markers(text)
    why = ""
    for at in range(len(markers) - 1, -1, -1):
        marker = markers[at]
        if marker.doubt:
            continue
        if marker.clause is None:
            return _Answer(None, "the box does not close", marker)
        value, why_not, blocks = _in_clause(marker, task, choices, decimal)
        if value is not None and marker.kind == "box" and task != "math" and _beside_another(text, markers, at):
            return _Answer(None, "several boxes", marker)
        if value is not None:
            said = text[marker.start : min(marker.stop, marker.start + 120)]
            return _Answer(value, " ".join(said.split()), marker)
        if blocks:
            return _Answer(None, f"{why_not}: {_short(marker.clause)}", marker)
        why = why or f"{why_not}: {_short(marker.clause)}"
    found = _sentences(text, task, choices, decimal, explicit)
    if markers and markers[-1].doubt and "\n" not in text[markers[-1].start :].strip() and not explicit:
        return _Answer(None, f"only in doubt: {_short(text[markers[-1].start :])}")
    return found if found.value is not None or not why else _Answer(None, f"{found.why}; {why}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _beside_another(text: str, markers: list[Marker], at: int) -> bool:
    before = [marker for marker in markers[:at] if marker.kind == "box"]
    return bool(before) and _BETWEEN_BOXES.fullmatch(text[before[-1].stop : markers[at].start][:80]) is not None


def _in_clause(marker: Marker, task: str, choices: Sequence[str], decimal: str) -> tuple[Value | None, str, bool]:
    """(the value that a marker announces, why there is none, whether that settles that there is none at all)."""
    clause = (marker.clause or "").strip()
    whole = marker.kind in ("box", "tag", "hash")
    if not clause:
        return None, "nothing follows the marker", whole
    if whole and marker.kind == "tag" and (inner := find_markers(clause)):
        return _in_clause(inner[-1], task, choices, decimal)
    if task in ("number", "equation"):
        found = read_quantity(clause, decimal=decimal, expressions=task == "equation", label=marker.kind in ("label", "hash"))
        denied = _DENIAL.search(clause) is not None and found.number is None
        value = numeric_value(found.number, found.text if task == "equation" else "")
        return value, found.why, found.blocks or denied or (marker.kind in ("box", "tag"))
    if re.search(r"[?？]\W*$", clause) and not whole:
        return None, "a question", False
    if task == "choice":
        value = read_value(clause, task, choices)
        if not choices and value is not None and value.letter is None and not whole and _PROSE_START.match(clause):
            return None, "no option follows directly", False
        return value, "no option follows", value is None and (whole or _settles(clause))
    if task == "yes-no":
        return read_value(clause, task), "neither yes nor no", whole
    if task == "math":
        clause = _inline_math(clause) if not whole else clause
        value = None if mathforms.looks_like_prose(clause) else read_value(clause, task, (), decimal)
        return value, "no formula follows directly", whole
    if not whole and (_PROSE_START.match(clause) or len(clause) > 200):
        return None, "no answer follows directly", False
    if marker.kind == "box":
        clause = simplify(clause)
    return read_value(_unquoted(clause), task), "no text follows", whole


def _settles(clause: str) -> bool:
    return (
        _DENIAL.search(clause) is not None
        or re.match(r"[\W_]*[(\[]?[A-Za-z][)\]]?\s*(?:or|and|/|,|&)\s*[(\[]?[A-Za-z][)\]]?(?!\w)", clause) is not None
    )


def _inline_math(clause: str) -> str:
    match = re.match(r"[\s:]*(\$\$?|\\\(|\\\[)(.+?)(?:\$\$?|\\\)|\\\])", clause)
    return match[2] if match else clause


def _unquoted(text: str) -> str:
    return text.strip().strip("*_`").strip().rstrip(".").strip(" *_`\"'\u201c\u201d\u201e\u300c\u300d")


def _sentences(text: str, task: str, choices: Sequence[str], decimal: str, explicit: bool) -> _Answer:
    """The answer of a text that announces none: the text as a whole, or its last sentence."""
    found = sentences(_TAGS.sub("", text))
    if not found:
        value = read_value(text, task, choices, decimal) if explicit else None
        return _Answer(value, "the text" if value else "no words and no numbers", bare=True)
    last = found[-1]
    if explicit or len(found) == 1:
        value = _whole(text if explicit else _TAGS.sub("", text), task, choices, decimal)
        if value is not None and (explicit or _is_bare(text, task, choices)):
            return _Answer(value, "the whole text", bare=True)
    if task == "text":
        return _Answer(None, "no answer is announced")
    if _DENIAL.search(last) and task != "yes-no" and plain_text(last) not in map(plain_text, choices):
        return _Answer(None, f"says that there is none: {_short(last)}")
    if _HEDGE.search(last) and not explicit:
        return _Answer(None, f"unsure: {_short(last)}")
    if re.search(r"[?？]\W*$", last):
        return _Answer(None, f"ends in a question: {_short(last)}")
    if task == "equation" and explicit:
        return _Answer(None, f"no expression with a value: {_short(last)}")
    if task in ("number", "equation", "math"):
        return _number_in(last, task, decimal)
    if task == "choice":
        index, _ = choice_in_sentence(last, choices)
        if not choices and index is None:
            return _Answer(None, f"no option in the last sentence: {_short(last)}")
        value = option_value(index, choices) if index is not None else None
        return _Answer(
            value, f"the last sentence: {_short(last)}" if value else f"no option in the last sentence: {_short(last)}"
        )
    value = read_value(last, task)
    first = (
        read_value(found[0].split(",")[0].split(".")[0], task)
        if len(found) > 1 and re.match(r"\W*(?:yes|no|true|false)\b\s*[,.!:;]", found[0], re.IGNORECASE)
        else None
    )
    if value is None or first is None or first.key == value.key:
        value = value or first
        return _Answer(value, f"the last sentence: {_short(last)}" if value else f"neither yes nor no: {_short(last)}")
    return _Answer(None, "the first and the last sentence differ")


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
    return task == "math" or len(sentences(text)) == 1


def _number_in(sentence: str, task: str, decimal: str) -> _Answer:
    """The value that a sentence ends up with: after its last `=` or verb such as "makes", else the only one in it."""
    text = EMPHASIS.sub(r"\2", simplify(sentence))
    if because := _BECAUSE.search(text):
        head = text[: because.start()]
        text = head if re.search(r"\d", head) else text
    verb = None
    for verb in _VERB.finditer(text):  # noqa: B007
        pass
    found = sole_quantity(text[verb.end() :] if verb else text, decimal=decimal, expressions=task != "number")
    if verb and found.why == "no number":
        found = sole_quantity(text, decimal=decimal, expressions=task != "number")
    value = numeric_value(found.number, found.text if task == "equation" else "")
    if value is None and task == "math" and (spans := re.findall(r"\$([^$]{1,200})\$|\\\((.{1,200}?)\\\)", sentence)):
        formula = (spans[-1][0] or spans[-1][1]).rpartition("=")[2]
        value = read_value(formula, task, (), decimal) if len(spans) == 1 else None
    return _Answer(
        value, f"the last sentence: {_short(sentence)}" if value else f"{found.why or 'no value'}: {_short(sentence)}"
    )


def _rationale(text: str, found: _Answer) -> str:
    """What stands before the announcement of the answer; where nothing does, what stands after it."""
    marker = found.marker
    if marker is None:
        return "" if found.bare else text
    start = marker.start
    if marker.kind == "box":
        inside = [m.start for m in find_markers(text[: marker.stop]) if m.start < start <= m.stop and m.kind != "box"]
        begin = inside[0] if inside else _sentence_begin(text, start)
        lead = text[begin:start]
        if not inside and (re.search(r"[\d=]", lead) or len(lead.split()) >= 6):
            stop = text.find("\n", marker.stop)
            sentence = text[begin : marker.start] + (marker.clause or "") + text[marker.stop : stop if stop >= 0 else len(text)]
            return (text[:begin] + sentence).strip()
        start = begin
    start = sentence_start(text, start)
    before = text[:start].rstrip(_EDGES)
    if before.strip():
        return before.strip()
    after = text[marker.stop :].strip(_EDGES + ".。")
    if len(after.split()) >= 3:
        return text[marker.stop :].lstrip(_EDGES + ".。").strip()
    clause = marker.clause or ""
    return text.strip() if _REASONED.search(clause) else ""


def _sentence_begin(text: str, start: int) -> int:
    begin = max(text.rfind("\n", 0, start) + 1, 0)
    matches = list(re.finditer(r"[.!?]\s+|[。！？]", text[begin:start]))
    return begin + matches[-1].end() if matches else begin
