"""What the teacher of an active run is asked, from files, and how its verdicts are read: exactly, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qcrd_fast.collect.prompts import answer_form, clean
from qcrd_fast.data.schema import Question
from qcrd_fast.data.thinking import split_thinking
from qcrd_fast.errors import InputError

FIELDS = {name: ("question", "step") for name in ("repair", "rewrite", "repair-all", "rewrite-all")} | {
    "new": ("question",)
}
NAMES = tuple(FIELDS)
_FIELD = re.compile(r"\{(question|context|kept|step|form)\}")
_MARK = r"[*_`\"']{0,3}"
_RIGHT = re.compile(rf"{_MARK}(?:right|correct){_MARK}[.!]?{_MARK}", re.IGNORECASE)
_WRONG = re.compile(
    rf"{_MARK}(?:wrong|incorrect)(?:\s+(?P<number>\d{{1,4}}))?{_MARK}(?:[.!]?{_MARK}|\s*[:,.\u2013\u2014-]{_MARK}\s+(?P<why>\S.*))",
    re.IGNORECASE,
)


class Prompts:
    """The prompts by name, each the file `NAME.txt` of `folder`, else the package's own.

    Raises `InputError` for a file that is not UTF-8 or lacks a field that its prompt needs.
    """

    def __init__(self, folder: str | None = None):
        self.texts = {}
        if folder is not None and not any((Path(folder) / f"{name}.txt").is_file() for name in NAMES):
            raise InputError(f"--prompts: {folder} holds none of {', '.join(f'{name}.txt' for name in NAMES)}")
        for name in NAMES:
            path = Path(folder or "") / f"{name}.txt"
            if folder is None or not path.is_file():
                path = Path(__file__).parent / "prompts" / f"{name}.txt"
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise InputError(f"--prompts: {path} is no readable UTF-8 file") from error
            for field in FIELDS[name]:
                if f"{{{field}}}" not in text:
                    raise InputError(f"--prompts: {path} does not contain {{{field}}}")
            self.texts[name] = text

    def fill(self, name: str, question: Question, kept: Sequence[str] = (), step: str = "") -> str:
        """The prompt of a question: at a step, after the steps `kept` before it."""
        told = "These steps are right:\n" + "\n".join(kept) if kept else "There is no step before the next one."
        context, body = question.context or "", question.question
        if context and "{context}" not in self.texts[name]:
            context, body = "", f"{context}\n{body}"
        values = {
            "question": body,
            "context": context and context + "\n",
            "kept": told,
            "step": step,
            "form": answer_form(question),
        }
        return _FIELD.sub(lambda match: values[match[1]], self.texts[name])  # what is put in is not read again


class Verdict(NamedTuple):
    """right: True, False, or None where the reply does not say so in the form that was asked for. number: of the wrong
    step, where the reply gives one. why: it is wrong. rest: what follows the verdict."""

    right: bool | None
    number: int | None = None
    why: str = ""
    rest: str = ""


def read_verdict(reply: str) -> Verdict:
    """The verdict in a reply: its first line is `right`, and no later one `wrong`; or `wrong`, perhaps with the number
    of a step and a reason.

    Reasoning blocks such as <think> are left out. Anything else is no verdict: it is never guessed.
    """
    parts = split_thinking(clean(reply))
    if parts.cut:
        return Verdict(None)
    first, _, rest = parts.outside.strip().partition("\n")
    first, rest = first.strip(), rest.strip()
    if _RIGHT.fullmatch(first):
        return Verdict(None if any(_WRONG.fullmatch(line.strip()) for line in rest.splitlines()) else True)
    if match := _WRONG.fullmatch(first):
        number = int(match["number"]) if match["number"] else None
        return Verdict(False, number, (match["why"] or "").strip(), rest)
    return Verdict(None)
