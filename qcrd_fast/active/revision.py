"""The revision of a student's explanation: a conversation with a teacher, as a generator of requests that is sent
replies.

After ELAD (arXiv 2402.13098); prompts and rules ours. The teacher sees the question and the student's steps one at a
time, or all of them in one request, says right or wrong, and at the first wrong step goes on:

    repair     the student's steps before the wrong one, byte for byte, then the teacher's, in the student's style
    rewrite    the whole rationale in the teacher's own words
    new        a fresh rationale; the student's is not looked at

No torch here: who asks the teacher, and in what order, is `asking`'s.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Sequence
from typing import Any

from qcrd_fast.active.prompts import Prompts, Verdict, read_verdict
from qcrd_fast.collect.prompts import take_apart
from qcrd_fast.collect.reply import Choice
from qcrd_fast.data import replies
from qcrd_fast.data.answers import parse_choices
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.data.splits import label_of
from qcrd_fast.select.steps import split_steps

REVISE = ("repair", "rewrite", "new")
SHOW = ("one", "all")
LABEL, REVISION = "label", "revise"  # purposes of the ledger: a fresh rationale, a verdict with perhaps a revision
KEPT, NO_FAULT = "kept", "no fault"  # of `Outcome.result`: what is learnt from
MISSED, UNREADABLE, NO_ANSWER, OTHER_ANSWER, UNCHANGED = (
    "fault missed", "unreadable verdict", "no answer", "another answer", "unchanged",
)  # fmt: skip
FAILED = "request failed"
_LABEL = re.compile(r"(?:[-*\u2022]\s+)?(?:\**step\s*\d+\**\s*[:.)-]\**\s*|\(?\d{1,2}[.)]\s+)?", re.IGNORECASE)
RESULTS = (KEPT, NO_FAULT, MISSED, UNREADABLE, NO_ANSWER, OTHER_ANSWER, UNCHANGED, FAILED)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What the student says of a question: a rationale, then the answer that stands behind `Answer:`, where one can be
    read."""

    text: str
    answer: str | None


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to the teacher. For teachers that do not read prompts: `kept` are the student's steps that are right,
    `steps` the one in question or all of them, with the `answer` where the last is among them."""

    purpose: str
    prompt: str
    mode: str
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    answer: str | None = None


@dataclasses.dataclass
class Outcome:
    """What came of one question: the row of `revisions.jsonl`.

    mode: how the teacher was asked in the end. steps: of the student's explanation. wrong_step: the first wrong one,
    from 1.
    critique: why it is wrong, as the teacher says. text, answer: the revision. result: one of `RESULTS`. The nll are of
    the student before it was trained on the revision [nats/token].
    """

    id: str
    mode: str
    explanation: str
    explained_answer: str | None
    steps: int = 0
    right_steps: int = 0
    wrong_step: int | None = None
    critique: str | None = None
    text: str | None = None
    answer: str | None = None
    result: str = FAILED
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    nll: float | None = None
    nll_explanation: float | None = None

    @property
    def is_positive(self) -> bool:
        return self.result in (KEPT, NO_FAULT)

    @property
    def judged(self) -> bool:
        """Whether the teacher's verdict on the explanation is known."""
        return self.result == NO_FAULT or self.wrong_step is not None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def revise(
    question: Question, said: Explanation, mode: str, prompts: Prompts, show: str = "one"
) -> Generator[Request, Choice, Outcome]:
    """The conversation about one question. An explanation without a step or a readable answer cannot be revised: then
    it is about a fresh rationale. `show`: one step at a time, a request each, or all in one."""
    outcome = Outcome(question.id, mode, said.text, said.answer)
    steps = split_steps(said.text)
    outcome.steps = len(steps)
    if mode == "new" or not steps or said.answer is None:
        outcome.mode = "new"
        reply = yield Request(LABEL, prompts.fill("new", question), "new")
        return _finish(outcome, question, "", reply.text, reply.cut)
    told = [step.strip() for step in steps]
    last = f"Answer: {said.answer}"
    at = 0
    while at < len(steps):
        if show == "all":
            end, listed = len(steps), [f"{i}. {step}" for i, step in enumerate(told, 1)]
            prompt = prompts.fill(f"{mode}-all", question, (), "\n".join([*listed, last]))
        else:
            end, listed = at + 1, told[at : at + 1]
            shown = [*listed, last] if end == len(steps) else listed
            prompt = prompts.fill(mode, question, told[:at], "\n".join(shown))
        answer = said.answer if end == len(steps) else None
        reply = yield Request(REVISION, prompt, mode, tuple(told[:at]), tuple(told[at:end]), answer)
        verdict = read_verdict(reply.text)
        wrong = at + 1 if show == "one" else verdict.number
        readable = wrong is not None and at < wrong <= end and verdict.number in (None, wrong)
        if verdict.right is None or (not verdict.right and not readable):
            outcome.result = UNREADABLE
            return outcome
        if not verdict.right:
            assert wrong is not None
            return _finish_at(outcome, question, steps, wrong, verdict, reply.cut)
        at = outcome.right_steps = end
    right = same_answer(question, said.answer)
    outcome.result = NO_FAULT if right else MISSED
    if right:
        outcome.text, outcome.answer = said.text, said.answer
    return outcome


def _finish_at(
    outcome: Outcome, question: Question, steps: Sequence[str], wrong: int, verdict: Verdict, cut: bool
) -> Outcome:
    """Of a repair, what stands before the wrong step is kept byte for byte, white space before it included."""
    outcome.wrong_step, outcome.critique, outcome.right_steps = wrong, verdict.why or None, wrong - 1
    step = steps[wrong - 1]
    space = step[: len(step) - len(step.lstrip())]
    prefix = "".join(steps[: wrong - 1]) + space if outcome.mode == "repair" else ""
    return _finish(outcome, question, prefix, verdict.rest, cut)


def _finish(outcome: Outcome, question: Question, prefix: str, reply: str, cut: bool) -> Outcome:
    """Put what the teacher wrote behind `prefix`; keep it where its answer is the question's label."""
    reading = take_apart(reply, question, cut=cut)
    outcome.answer = reading.answer
    written = without_repeated(prefix, reading.rationale.strip())
    outcome.text = prefix + written
    if reading.answer is None or not outcome.text.strip():
        outcome.result = NO_ANSWER
    elif not same_answer(question, reading.answer):
        outcome.result = OTHER_ANSWER
    elif (
        outcome.wrong_step is not None
        and outcome.text.strip() == outcome.explanation.strip()
        and same_answer(question, outcome.explained_answer)
    ):
        outcome.result = UNCHANGED
    else:
        outcome.result = KEPT
    return outcome


def without_repeated(prefix: str, written: str) -> str:
    """What a teacher wrote, without the steps of `prefix` where it begins by repeating them, all or the last of
    them."""
    before, after = [step_key(step) for step in split_steps(prefix)], split_steps(written)
    for first in range(len(before)):
        count = len(before) - first
        if [step_key(step) for step in after[:count]] == before[first:]:
            return "".join(after[count:]).lstrip()
    return written


def step_key(step: str) -> str:
    """What two spellings of a step have in common: no label such as `Step 2:`, white space as one space, any case."""
    step = step.strip()
    label = _LABEL.match(step)
    return " ".join(step[label.end() if label else 0 :].split()).casefold()


def same_answer(question: Question, answer: str | None) -> bool:
    """Whether an answer is the question's label: its gold answer, else its majority."""
    label, task = label_of(question, None), question.task or "text"
    return bool(answer and label and replies.is_correct(answer, label, task, parse_choices(question.question)))


def to_question(question: Question, outcome: Outcome) -> Question:
    """The row that the student learns from: the revision as a positive, the faulty original as a negative, both with
    what the teacher said of it."""
    source = "student" if outcome.result == NO_FAULT else f"teacher ({outcome.mode})"
    positive = Rationale(str(outcome.text), outcome.answer, source, critique=outcome.critique)
    negatives: tuple[Rationale, ...] = ()
    if outcome.wrong_step is not None:
        negatives = (
            Rationale(
                outcome.explanation, outcome.explained_answer, "student", critique=outcome.critique,
                wrong_step=outcome.wrong_step,
            ),
        )  # fmt: skip
    return dataclasses.replace(question, positives=(positive,), negatives=negatives)
