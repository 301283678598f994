"""A judge's input: question, the answer of a rationale, and the teacher's votes for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from qcrd_fast.data.choices import parse_choices
from qcrd_fast.data.replies import DEFAULT
from qcrd_fast.data.schema import Question, Rationale

POSITIVE, MINORITY, STUDENT = "positive", "minority", "student"


@dataclasses.dataclass(frozen=True)
class Case:
    """One rationale to score.

    kind: `positive` or `minority` of the teacher, or `student`. votes: n, how many of the teacher's readable samples
    give this rationale's answer; None where the question has no votes, or where the rationale has no conclusion that
    can be compared.
    agrees: whether the answer is the majority's; None where that cannot be told. expected: the chance that it is, for a
    student's sample without a conclusion (see `fill_unknown`).
    """

    question: Question
    rationale: Rationale
    kind: str
    votes: int | None = None
    agrees: bool | None = None
    expected: float | None = None

    @property
    def positive(self) -> bool:
        return self.kind == POSITIVE

    @property
    def samples(self) -> int:
        """K: the teacher's readable samples of the question, duplicates merged."""
        return sum(self.question.votes.values())


def teacher_case(question: Question, rationale: Rationale, kind: str) -> Case:
    """Return the case of a teacher's rationale. A positive without an answer has the majority's."""
    answer = rationale.answer
    if answer is None and kind == POSITIVE:
        answer = question.majority
    return Case(question, rationale, kind, votes_for(question, answer), _agrees(question, answer))


def teacher_cases(question: Question) -> list[Case]:
    """The cases of all the question's rationales, positives first."""
    positives = [teacher_case(question, r, POSITIVE) for r in question.positives]
    return positives + [teacher_case(question, r, MINORITY) for r in question.negatives]


def student_case(question: Question, said: str | Rationale, *, cut: bool = False) -> Case:
    """Return the case of a student's rationale, with its own answer, else the answer read from its text.

    `cut`: the sampling stopped before EOS, so the text has no conclusion. A question of the task `text` has none
    either, since such answers cannot be compared.
    """
    said = Rationale(said) if isinstance(said, str) else said
    cut, answer, text = cut or said.truncated, None, said.text
    if comparable(question) and not cut:
        if said.reply or said.answer is not None:
            reading = DEFAULT.sample(said, question.task or "text", _choices(question.question))
            answer, text = reading.answer, reading.rationale
        else:
            answer = conclusion(question, text)
    votes = None if answer is None else votes_for(question, answer)
    return Case(question, Rationale(text, answer, STUDENT, truncated=cut), STUDENT, votes, _agrees(question, answer))


def comparable(question: Question) -> bool:
    """Whether answers to the question can be compared: not those of the task `text`."""
    return (question.task or "text") != "text"


def conclusion(question: Question, text: str) -> str | None:
    """Return the answer that a rationale ends in; for `equation` questions a number, its value."""
    task = question.task or "text"
    return DEFAULT.read(text, "number" if task == "equation" else task, _choices(question.question)).answer


def votes_for(question: Question, answer: str | None) -> int | None:
    """n: the votes for `answer`, 0 where no sample gives it; None for a question without votes."""
    if not question.votes:
        return None
    if answer is None:
        return 0
    if answer in question.votes:
        return question.votes[answer]
    return next((count for other, count in question.votes.items() if same(question, answer, other)), 0)


def same(question: Question, a: str, b: str) -> bool:
    return a == b or DEFAULT.same(a, b, question.task or "text", _choices(question.question))


def _agrees(question: Question, answer: str | None) -> bool | None:
    if answer is None or question.majority is None:
        return None
    return same(question, answer, question.majority)


@functools.lru_cache(maxsize=1024)
def _choices(text: str) -> tuple[str, ...]:
    return tuple(parse_choices(text))


def silent_share(questions: Iterable[Question]) -> float:
    """Return the share of positives without a readable answer in their text; 0 without any.

    A student that writes like the teacher has none either.
    """
    silent = total = 0
    for question in questions:
        if comparable(question):
            for rationale in question.positives:
                total += 1
                silent += conclusion(question, rationale.text) is None
    return silent / total if total else 0.0


@dataclasses.dataclass
class Tally:
    """Counts an iteration's samples: readable, agreeing, and without an answer."""

    readable: int = 0
    agree: int = 0
    silent: int = 0

    def add(self, case: Case) -> None:
        if case.agrees is not None:
            self.readable += 1
            self.agree += case.agrees
        elif not case.rationale.truncated and comparable(case.question):
            self.silent += 1

    def fill_unknown(self, case: Case, silent_share: float) -> Case:
        """The case with its chance to agree, where its text does not tell.

        A sample that was cut takes the share of readable samples that agree. A complete one without an answer is one of
        the `agree * u / (1 - u)` samples that are expected to agree in silence, `u` being the teacher's `silent_share`;
        where the teacher's rationales always end in an answer, that is none.
        """
        if case.kind != STUDENT or case.votes is not None or case.agrees is not None or not comparable(case.question):
            return case
        if case.rationale.truncated:
            chance = self.agree / self.readable if self.readable else 0.0
        else:
            in_silence = self.agree * silent_share / (1 - silent_share) if silent_share < 1 else float(self.silent)
            chance = min(1.0, in_silence / self.silent) if self.silent else 0.0
        return dataclasses.replace(case, expected=chance)
