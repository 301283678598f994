"""An explanation as steps, and as a reply: where the steps end and the answer begins. Imports no torch."""

from __future__ import annotations

import re

ANSWER = "Answer:"  # what stands before the answer in a reply of the task `reason: x`
CUE = f"\n{ANSWER} "
_BOUNDARY = re.compile(r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'\u201d)\]])(?=\s)|(?=\n)")
# a list's mark or white space alone: no step of its own
_NUMBERED = re.compile(r"\s*(?:\(?\w{1,3}[.):]|[-*\u2022])*\s*")
_ABBREVIATED = re.compile(r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|St|Mt|No|vs|etc|e\.g|i\.e|approx|[A-Z])\.$")


def split_steps(text: str) -> list[str]:
    """The steps of an explanation: its sentences and lines, as they are; joined they are `text`, byte for byte.

    White space belongs to the step behind it, a list's mark to the step that it begins. An empty text has no step.
    """
    pieces: list[str] = []
    at = 0
    for end in [*(match.start() for match in _BOUNDARY.finditer(text)), len(text)]:
        piece = text[at:end]
        last = end == len(text)
        if not last and (_NUMBERED.fullmatch(piece) or (_ABBREVIATED.search(piece) and text[end] != "\n")):
            continue  # it goes on into the next piece
        if last and pieces and not piece.strip():
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)
        at = end
    return pieces if text.strip() else []


def split_reply(text: str) -> tuple[str, str | None]:
    """(explanation, answer) of a student's reply: what is before its last `Answer:`, and the line behind it; None where
    there is none. The explanation is as it stands, without white space at its end."""
    before, found, after = text.rpartition(ANSWER)
    if not found:
        return text.rstrip(), None
    answer = after.strip().split("\n")[0].strip()
    return before.rstrip(), answer or None
