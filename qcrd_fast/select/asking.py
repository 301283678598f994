"""How a student is asked, what it says, and how its answers are read and counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qcrd_fast.data import replies
from qcrd_fast.data.answers import parse_choices
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.errors import InputError
from qcrd_fast.evaluate import ask_by_chat_template, zero_shot_text
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, REASON, TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.quality.cases import same
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.steps import ANSWER, split_reply, split_steps
from qcrd_fast.utils.device import make_autocast

MAX_ANSWER = 24  # tokens of an answer that is asked for behind an explanation without one
PREFIXES = {"reason": REASON, "predict": PREDICT}


def choose_ask(ask: str, student: Student, state: Mapping[str, Any]) -> str:
    """How to ask a student that was loaded with `state` ({} of a model that is no run): as it was trained.

    `auto`: `reason` of a run with `--reasoning-task`, `predict` of one without, and of a plain model `zero-shot` where
    it has a chat template, which its prompts take from here on, else `reason`.

    Raises `InputError` for `reason` of a run that was trained without it, and for `zero-shot` without a chat template.
    """
    config = state.get("config")
    trained = config.get("reasoning_task") if isinstance(config, dict) else state.get("reasoning_task")
    if ask == "reason" and state and trained is not True:
        raise InputError("--ask reason: the student was trained without --reasoning-task, so it knows no such task")
    if ask == "auto" and state:
        return "reason" if trained is True else "predict"
    if ask in ("auto", "zero-shot"):
        if ask_by_chat_template(student):
            return "zero-shot"
        if ask == "zero-shot":
            raise InputError("--ask zero-shot: the student has no chat template to be asked by")
        return "reason"
    return ask


def prompt_ids(student: Student, row: Question, ask: str) -> TokenIds:
    """Tokens of the prompt for an answer."""
    if ask == "zero-shot":
        return student.source_ids("", zero_shot_text(row, row.task or "text"))
    return student.source_ids(PREFIXES.get(ask, REASON), question_text(row), None if ask == "predict" else row.view)


def rationale_prompt_ids(student: Student, row: Question, view: str | None, ask: str) -> TokenIds:
    """Tokens of the prompt for a rationale of a view: `explain: x`, or the question in words."""
    if ask == "zero-shot":
        return prompt_ids(student, row, ask)
    return student.source_ids(EXPLAIN, question_text(row), view or row.view)


def read_answer(student: Student, row: Question, tokens: TokenIds, ask: str) -> str | None:
    """The answer of a reply; None where none can be read."""
    text, task = student.text(tokens), row.task or "text"
    choices = parse_choices(question_text(row)) if task == "choice" else ()
    if ask == "predict":
        return replies.extract_answer(text, task, choices)
    cut = student.tokenizer.eos_token_id not in tokens[-1:]
    return replies.read_reply(text, task, choices, truncated=cut).answer


def sampled_answers(student: Student, rows: Sequence[Question], options: SelectOptions) -> list[list[str | None]]:
    """M answers a row, each sampled with noise of its own: the same whatever the other rows are, but for rounding."""
    M = options.num_samples
    prompts = [prompt_ids(student, row, options.ask) for row in rows for _ in range(M)]
    keys = [key_words(options.seed, row.id) for row in rows for _ in range(M)]
    drawn = sample(
        student, prompts, keys, sample_settings(options), indices=list(range(M)) * len(rows),
        autocast=make_autocast(student.device, None),
    )  # fmt: skip
    of_row = [drawn[i : i + M] for i in range(0, len(drawn), M)]
    return [[read_answer(student, row, t, options.ask) for t in some] for row, some in zip(rows, of_row, strict=True)]


def sample_settings(options: SelectOptions) -> SampleSettings:
    return SampleSettings(options.temperature, options.top_k, max_new_tokens=options.max_new_tokens, impl=options.impl)


def groups(row: Question, answers: Sequence[str | None]) -> list[int]:
    """How many of the answers are one and the same, largest first. One that cannot be read is like no other."""
    kinds: list[tuple[str, int]] = []
    unread = sum(answer is None for answer in answers)
    for answer in answers:
        if answer is None:
            continue
        at = next((k for k, (other, _) in enumerate(kinds) if same(row, answer, other)), None)
        if at is None:
            kinds.append((answer, 1))
        else:
            kinds[at] = (kinds[at][0], kinds[at][1] + 1)
    return sorted([count for _, count in kinds] + [1] * unread, reverse=True)


def entropy(counts: Sequence[int]) -> float:
    """-sum p log p of the shares [nats]."""
    total = sum(counts)
    return -math.fsum(n / total * math.log(n / total) for n in counts) + 0.0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a student says by itself: the prompt, the steps of its explanation and the answer that it ends in, as
    texts."""

    prompt: TokenIds
    steps: tuple[str, ...]
    answer: str


def explain_greedily(student: Student, rows: Sequence[Question], options: SelectOptions) -> list[Explanation]:
    """The student's own greedy explanation of each row. Where it ends in no answer, it is asked for one behind
    `Answer:`."""
    autocast = make_autocast(student.device, None)
    settings = dataclasses.replace(sample_settings(options), temperature=0.0, top_k=0)
    prompts = [prompt_ids(student, row, options.ask) for row in rows]
    keys = [(0, 0)] * len(rows)
    said = [split_reply(student.text(t)) for t in sample(student, prompts, keys, settings, autocast=autocast)]
    steps = [tuple(split_steps(explanation)) for explanation, _ in said]
    open_ends = [i for i, (_, answer) in enumerate(said) if answer is None]
    answers = [answer or "" for _, answer in said]
    short = dataclasses.replace(settings, max_new_tokens=MAX_ANSWER)
    asked = sample(
        student, [prompts[i] for i in open_ends], [(0, 0)] * len(open_ends), short, autocast=autocast,
        prefixes=[step_ids(student, steps[i]) + student.piece_ids(f"\n{ANSWER}") for i in open_ends],
    )  # fmt: skip
    for i, tokens in zip(open_ends, asked, strict=True):
        answers[i] = student.text(tokens).split("\n")[0].strip()
    return [Explanation(*parts) for parts in zip(prompts, steps, answers, strict=True)]


def step_ids(student: Student, steps: Sequence[str]) -> TokenIds:
    """Tokens of steps, each tokenised by itself, so that the tokens of the first few are the beginning of those of
    all."""
    return [token for step in steps for token in student.piece_ids(step)]
