r"""The reader of replies: splits a teacher's or student's text into reasoning, rationale and answer.

    read_reply("3 * 6 = 18 jars. The answer is \\boxed{18}.", "number")
    -> Reading(reasoning="", rationale="3 * 6 = 18 jars.", answer="18", why="\\boxed{18}")

The rules stand in docs/replies.md. Where the text leaves a doubt there is no answer: an unreadable reply costs one
sample, a wrong reading teaches a wrong rationale.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from qcrd_fast.data.answers import Value, equal, read_value, surface
from qcrd_fast.data.choices import Choices, parse_choices
from qcrd_fast.data.finding import answer_text, find_answer, find_rationale
from qcrd_fast.data.markers import cut_next_question
from qcrd_fast.data.quantities import DECIMALS
from qcrd_fast.data.schema import NumberText, Rationale
from qcrd_fast.data.thinking import THINKING, Parts, split_thinking
from qcrd_fast.errors import InputError

__all__ = ["Choices", "Reader", "Reading", "answer_text", "extract_answer", "is_correct", "parse_choices", "read_reply"]

_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_JSON_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n|\n[ \t]*```\s*\Z", re.IGNORECASE)
_ANSWER_KEYS = ("final_answer", "answer")
_REASON_KEYS = (
    "reasoning",
    "rationale",
    "explanation",
    "thought",
    "thoughts",
    "steps",
    "solution",
    "chain_of_thought",
    "reason",
)
_OPEN_NUMBER = re.compile(r"\D*\d(?:[\d.,/]*\d)?")
_LAST_WORD = re.compile(r"\S+\Z")
MAX_OWN_ANSWER = 32768  # characters, the last ones, of an answer of its own


class Reading(NamedTuple):
    """A parsed reply. `answer` is None if unreadable for the task; `why` explains the result."""

    reasoning: str
    rationale: str
    answer: str | None
    why: str
    value: Value | None = None  # of a reply: with the decimals that its answer was written with


@dataclasses.dataclass(frozen=True)
class Reader:
    """How replies and answers are read and compared: the options `--thinking`, `--decimal`, `--tolerance`,
    `--answer-regex` and `--answer-reader`.

    `pattern`: of the last match in a reply its first group, or all of it, is the answer. `function`: (text, task,
    choices) -> the answer or None. With either, replies are read in no other way; golds and answers of their own are,
    where it finds none.
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
        """A whole reply taken apart; where it was `truncated` at its maximum length, only an announced answer
        counts."""
        parts = split_thinking(text)
        outside = cut_next_question(parts.outside).strip()
        if self.pattern or self.function:
            answer, why = self._custom(outside, task, choices)
            if truncated and self._custom(_LAST_WORD.sub("", outside), task, choices)[0] != answer:
                answer, why = None, "the reply was cut at its maximum length"
            return Reading(parts.thinking, self._rationale(parts, outside), answer, why)
        if (parsed := _from_json(outside)) and not parts.cut:
            answer, why = self.answer(parsed[1], task, choices)
            return Reading(parts.thinking, self._rationale(parts, parsed[0]), answer, why)
        found = find_answer(outside, task, choices, self.decimal)
        rationale = self._rationale(parts, find_rationale(outside, found))
        if parts.cut:
            return Reading(parts.thinking, outside, None, "the reasoning does not end")
        if truncated:  # "the answer is 1" may be the beginning of 18
            marker = found.marker
            open_end = marker and marker.kind == "statement" and _OPEN_NUMBER.fullmatch(outside[marker.end :].strip())
            if marker is None or open_end:
                return Reading(parts.thinking, rationale, None, "the reply was cut at its maximum length")
        return Reading(parts.thinking, rationale, found.value.text if found.value else None, found.why, found.value)

    def sample(self, sample: Rationale, task: str, choices: Sequence[str] = ()) -> Reading:
        """Return a sample's rationale and answer, both read from a raw reply; a separate answer is read by itself."""
        if sample.reply:
            return self.read(sample.text, task, choices, truncated=sample.truncated)
        parts = split_thinking(sample.text)
        rationale = self._rationale(parts, parts.outside).strip()
        if sample.answer is None:
            return Reading(parts.thinking, rationale, None, "no answer was given")
        answer, why = self.answer(sample.answer, task, choices)
        value = None
        if answer is not None and task == "number" and not (self.pattern or self.function):
            written = read_value(
                sample.answer, task, choices, "point" if isinstance(sample.answer, NumberText) else self.decimal
            )
            value = written if written is not None and written.key == answer else None
        return Reading(parts.thinking, rationale, answer, why, value)

    def answer(self, text: str, task: str, choices: Sequence[str] = ()) -> tuple[str | None, str]:
        """Read a separate answer, such as a gold. Return (training text, what was read), or (None, why not)."""
        if self.pattern or self.function:
            answer, why = self._custom(text, task, choices)
            if answer is not None:
                return answer, why
        parts = split_thinking(text)
        decimal = "point" if isinstance(text, NumberText) else self.decimal
        found = find_answer(parts.outside[-MAX_OWN_ANSWER:], task, choices, decimal, explicit=True)
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
        """Return the value of an answer from `read`, `sample` or `answer`; numbers are canonical by then."""
        return read_value(answer, task, choices)

    def same(self, a: str, b: str, task: str, choices: Sequence[str] = ()) -> bool:
        """Whether two answers that were read are one."""
        left, right = self.value(a, task, choices), self.value(b, task, choices)
        return left is not None and right is not None and equal(left, right, task, self.tolerance)

    def same_golds(self, a: str, b: str, task: str, choices: Sequence[str] = ()) -> bool:
        """Whether two golds, perhaps with a solution before the answer, are one answer."""
        left, right = self.answer(a, task, choices)[0], self.answer(b, task, choices)[0]
        return left is not None and right is not None and self.same(left, right, task, choices)

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


def _from_json(text: str) -> tuple[str, str] | None:
    """Return (rationale, answer) of a JSON reply, perhaps in a code fence; None for any other."""
    text = _JSON_FENCE.sub("", text).strip() if text.startswith("```") else text
    if not (text.startswith("{") and text.endswith("}")) or len(text) > MAX_OWN_ANSWER:
        return None
    try:
        said = json.loads(text, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    values = {str(key).casefold().replace(" ", "_"): value for key, value in said.items()}
    answer = next((values[key] for key in _ANSWER_KEYS if key in values), None)
    if not isinstance(answer, (str, bool)):
        return None
    why = next((values[key] for key in _REASON_KEYS if isinstance(values.get(key), (str, list))), "")
    steps = why if isinstance(why, list) else [why]
    return "\n".join(step for step in steps if isinstance(step, str)).strip(), answer if isinstance(
        answer, str
    ) else str(answer).lower()


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
    """Parse a reply into reasoning, rationale and answer. `choices`: from `parse_choices`.

    Raises:
        InputError: an unknown value of `thinking` or `decimal`.
    """
    reader = DEFAULT if (thinking, decimal) == ("auto", "point") else Reader.from_options(thinking, decimal)
    return reader.read(text, task, choices or (), truncated=truncated)


def extract_answer(text: str, task: str, choices: Sequence[str] = ()) -> str | None:
    """Return the answer of a short text, such as a student's output, as training text; None if unreadable."""
    if task == "text" and "\n" in text[-MAX_OWN_ANSWER:].strip():
        return read_reply(text, task, choices).answer
    return DEFAULT.answer(text, task, choices)[0]


def is_correct(prediction: str, gold: str, task: str, choices: Sequence[str] = ()) -> bool:
    """Return whether generated text answers `gold`. Pass `parse_choices(question)` to understand letters."""
    said, wanted = extract_answer(prediction, task, choices), DEFAULT.answer(gold, task, choices)[0]
    return said is not None and wanted is not None and DEFAULT.same(said, wanted, task, choices)


def is_worked(gold: str) -> bool:
    """Whether a gold answer looks like a worked solution that ends in the answer."""
    return "####" in gold or "\\boxed" in gold or "\n" in gold.strip()
