"""Prompts for a teacher, one template a kind of answer, and splitting its reply.

The idea is that of Figure 3 of arXiv 2405.13014: an explanation first, then the answer in a given form, here a last
line
`Answer: ...`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.data import replies
from qcrd_fast.data.answers import parse_choices
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError

_FRAME = (
    "{{context}}Question: {{question}}\n\n"
    "Explain step by step how to find the answer, in a few short sentences. {form}\n"
)
_FORMS = {
    "number": "Then end with a line `Answer: ` and the number alone, without units.",
    "equation": "Then end with a line `Answer: ` and the arithmetic expression that gives the result, such as (8 - 3) "
    "* 2.",
    "choice": "Then end with a line `Answer: ` and the letter of the right choice, such as (a).",
    "yes-no": "Then end with a line `Answer: ` and yes or no.",
    "nli": "Then end with a line `Answer: ` and one word: entailment, neutral or contradiction.",
    "math": "Then end with a line `Answer: ` and the answer alone, in LaTeX within \\boxed{}.",
    "text": "Then end with a line `Answer: ` and the answer alone, as short as possible.",
}
TEMPLATES = {name: _FRAME.format(form=form) for name, form in _FORMS.items()} | {
    "nli": "Premise: {context}Hypothesis: {question}\n\nExplain in a few short sentences whether the premise entails "
    "the "
    "hypothesis, contradicts it or does neither. " + _FORMS["nli"] + "\n"
}
NLI_LABELS = {"entailment", "neutral", "contradiction"}


class Reading(NamedTuple):
    """A reply taken apart; `answer` is None where none can be read as one of the task."""

    rationale: str
    answer: str | None


class Template:
    """The text a question is put into: one of `TEMPLATES` by name, or the content of a file.

    Raises `InputError` for a file that is missing, not UTF-8, or without {question}.
    """

    def __init__(self, option: str = "auto"):
        self.text: str | None = None
        self.name = option
        if option == "auto" or option in TEMPLATES:
            return
        path = Path(option)
        try:
            self.text = path.read_text(encoding="utf-8").removesuffix("\n")  # an editor's, not the prompt's
        except (OSError, ValueError) as error:
            known = ", ".join(("auto", *TEMPLATES))
            raise InputError(f"--template: {option!r} is neither {known}, nor a readable UTF-8 file") from error
        if "{question}" not in self.text:
            raise InputError(f"--template: {path} does not contain {{question}}")

    def prompt(self, question: Question) -> str:
        """Return a question's prompt. Without {context} in the template, the context comes before the question."""
        text = self.text or TEMPLATES[self._kind(question)]
        context, body = question.context or "", question.question
        if context and "{context}" not in text:
            body = f"{context}\n{body}"
        if context and self.text is None:
            context += "\n"
        values = {"{question}": body, "{context}": context}
        # what is put in is not read again
        return re.sub(r"\{(?:question|context)\}", lambda match: values[match[0]], text)

    def _kind(self, question: Question) -> str:
        if self.name != "auto":
            return self.name
        if question.context and (question.gold or "").strip().lower() in NLI_LABELS:
            return "nli"
        return question.task or "text"


def answer_form(question: Question) -> str:
    """The sentence of a prompt that says how the reply is to end."""
    return _FORMS[question.task or "text"]


def prompt_digest(prompt: str, system: str = "") -> str:
    text = f"{system}\0{prompt}" if system else prompt
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def take_apart(text: str, question: Question, *, cut: bool = False, thinking: str = "auto") -> replies.Reading:
    """Split a reply into reasoning, rationale and answer as `prepare` does. `cut`: it reached its maximum length."""
    task, choices = question.task or "text", parse_choices(question.question)
    return replies.read_reply(clean(text), task, choices, truncated=cut, thinking=thinking)


def read_reply(text: str, question: Question, *, cut: bool = False, thinking: str = "auto") -> Reading:
    """The rationale and the answer in a reply."""
    reading = take_apart(text, question, cut=cut, thinking=thinking)
    return Reading(reading.rationale, reading.answer)


def written(reading: replies.Reading, source: str | None, thinking: str) -> dict[str, Any]:
    """Return a sample as written to a row. Reasoning that is not the rationale is kept for `prepare --thinking`."""
    sample = {"rationale": reading.rationale, "answer": reading.answer, "source": source}
    beside = (
        thinking in ("auto", "only") and reading.answer is not None and reading.reasoning not in ("", reading.rationale)
    )
    return sample | ({"reasoning": reading.reasoning} if beside else {})


def clean(text: str) -> str:
    """`text` as it can be written to a row: no NUL, no lone surrogates, line feeds alone."""
    text = text.replace("\r\n", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text
