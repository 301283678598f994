"""Teachers that answer at once: a file of earlier samples, a scripted oracle that knows the true steps, a local model.

An endpoint is asked by `asking`. Tokens of the first two are estimated as those of a server that does not say: four
bytes each.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from qcrd_fast.active.revision import Request
from qcrd_fast.collect.collection import REPLAY
from qcrd_fast.collect.local import LocalTeacher, Replay
from qcrd_fast.collect.reply import Choice, Reply, estimate_tokens
from qcrd_fast.data.schema import Question, text_key
from qcrd_fast.errors import InputError
from qcrd_fast.quality.equations import Equation, find_equations
from qcrd_fast.utils.files import printable, read_records
from qcrd_fast.utils.keyed import keyed

ORACLE = "oracle:"
LOCAL_BATCH = 16


class Teacher(Protocol):
    """Who answers at once. `batch`: conversations that are held side by side. `revises`: whether it can judge a step.
    `knows`: whether it has anything to say of a question."""

    name: str
    api: str
    batch: int
    revises: bool

    def knows(self, question: Question) -> bool: ...

    def replies(self, asked: Sequence[tuple[Question, Request, str]]) -> list[Reply]:
        """A reply for each (question, request, key)."""


class ReplayTeacher:
    """Earlier samples as fresh rationales; of a question's samples the first. A verdict cannot be looked up.

    Raises `InputError` for a bad row.
    """

    api, batch, revises = "replay", 1, False

    def __init__(self, path: str):
        self.name, self.replay = REPLAY + path, Replay(path)

    def knows(self, question: Question) -> bool:
        return bool(self.replay.samples(question))

    def replies(self, asked: Sequence[tuple[Question, Request, str]]) -> list[Reply]:
        return [_estimated(request, self._text(question)) for question, request, _ in asked]

    def _text(self, question: Question) -> str:
        sample = self.replay.samples(question)[0]
        return f"{sample['rationale']}\nAnswer: {sample['answer']}"


@dataclasses.dataclass(frozen=True)
class Solution:
    """The true steps of a question in one or several wordings, each a list of steps, and its answer."""

    wordings: tuple[tuple[str, ...], ...]
    answer: str


class OracleTeacher:
    """A scripted teacher that knows the true steps: rows of {"question", "answer", "solutions": [[step, ...], ...]},
    the same steps in one or several wordings.

    A step is right where it holds an equation and all of its equations are those of the solution, the last one where
    the answer is right too. A repair has the wording nearest to the student's; a fresh rationale one that depends on
    the question alone.

    Raises `InputError`, as file:line, for a bad row.
    """

    api, batch, revises = "oracle", 1, True

    def __init__(self, path: str):
        self.name, self.solutions = ORACLE + path, dict[str, Solution]()
        try:
            for number, row in enumerate(read_records(Path(path), "raise"), 1):
                try:
                    wordings = tuple(tuple(map(_text, wording)) for wording in row["solutions"])
                    if not wordings or not all(wordings) or len(set(map(len, wordings))) > 1:
                        raise ValueError("solutions")
                    key = text_key(Question("", _text(row["question"])))
                    self.solutions[key] = Solution(wordings, _text(row["answer"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{printable(path)}:{number}: no solutions in it") from error
        except InputError as error:
            raise InputError(f"--teacher oracle: {error}; expected question, answer, solutions") from error
        except OSError as error:
            raise InputError(f"--teacher oracle: {printable(path)} is no readable UTF-8 file") from error

    def knows(self, question: Question) -> bool:
        return text_key(question) in self.solutions

    def replies(self, asked: Sequence[tuple[Question, Request, str]]) -> list[Reply]:
        return [_estimated(request, self._reply(question, request)) for question, request, _ in asked]

    def _reply(self, question: Question, request: Request) -> str:
        solution = self.solutions[text_key(question)]
        own = solution.wordings[keyed("wording", question.question) % len(solution.wordings)]
        whole = "\n".join([" ".join(own), f"Answer: {solution.answer}"])
        if request.mode == "new":
            return whole
        true = [_meaning(each) for each in solution.wordings[0]]
        every, count = set().union(*true), len(request.steps)
        right = next((i for i, step in enumerate(request.steps) if not (m := _meaning(step)) or not m <= every), count)
        if right == count and request.answer not in (None, solution.answer):
            right, why = count - 1, "the answer is another"
        elif right < count:
            why = "this is not a step of the solution"
        else:
            return "right"
        number = f" {right + 1}" if request.answer and not request.kept else ""  # all steps are shown
        verdict = f"wrong{number}: {why}"
        if request.mode == "rewrite":
            return f"{verdict}\n{whole}"
        kept = [*request.kept, *request.steps[:right]]
        said, known = " ".join([*kept, request.steps[right]]), set().union(*map(_meaning, kept))
        wording = max(solution.wordings, key=lambda steps: _likeness(said, " ".join(steps[: len(kept) + 1])))
        rest = [each for each, meaning in zip(wording, true, strict=True) if not meaning <= known]
        return "\n".join([verdict, " ".join(rest), f"Answer: {solution.answer}"])


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value


def _meaning(step: str) -> set[tuple[Any, ...]]:
    """The equations of a step: of each its numbers, in any order, its result, and whether it holds."""

    def key(equation: Equation) -> tuple[tuple[Fraction, ...], Fraction, bool]:
        return tuple(sorted(equation.operands)), equation.result, equation.holds

    return {key(equation) for equation in find_equations(step)}


def _estimated(request: Request, text: str) -> Reply:
    return Reply([Choice(text)], estimate_tokens(request.prompt), estimate_tokens(text), estimated=True)


class ModelTeacher:
    """A local model of transformers, sampled with keyed noise: the same replies for the same batch. Raises `InputError`
    for a name that is none."""

    batch, revises = LOCAL_BATCH, True

    def __init__(self, name: str, *, api: str, temperature: float, max_tokens: int, seed: int, device: str):
        self.name = name
        self.teacher = LocalTeacher(
            name,
            api=api,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            batch_size=LOCAL_BATCH,
            device=device,
        )
        self.api = self.teacher.api

    def knows(self, question: Question) -> bool:
        return True

    def replies(self, asked: Sequence[tuple[Question, Request, str]]) -> list[Reply]:
        drawn = self.teacher.sample([(dataclasses.replace(q, id=key), request.prompt, 0) for q, request, key in asked])
        return [Reply([choice], prompt_tokens, completion_tokens) for choice, prompt_tokens, completion_tokens in drawn]
