"""The student of an active run: what it says before it answers, and how likely it finds a rationale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcrd_fast.active.revision import Explanation
from qcrd_fast.data import replies
from qcrd_fast.data.answers import parse_choices
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import REASON
from qcrd_fast.models.student import Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.select.steps import split_reply
from qcrd_fast.utils.device import make_autocast
from qcrd_fast.utils.oom import explaining_oom

BLOCK = 64  # rationales whose hidden states are held at once


def explain(
    student: Student, questions: Sequence[Question], *, batch_size: int, impl: str = "auto"
) -> list[Explanation]:
    """The student's greedy explanation of each question and the answer behind it."""
    settings = SampleSettings(max_new_tokens=student.prompts.max_target_length, batch_size=batch_size, impl=impl)
    sources = [student.source_ids(REASON, question_text(q), q.view) for q in questions]
    with explaining_oom("--eval-batch-size, --max-target-length", "explaining"):
        drawn = sample(
            student, sources, [(0, 0)] * len(sources), settings, autocast=make_autocast(student.device, None)
        )
    return [_read(student.text(tokens), question) for tokens, question in zip(drawn, questions, strict=True)]


def _read(text: str, question: Question) -> Explanation:
    rationale, said = split_reply(text)
    answer = said and replies.extract_answer(said, question.task or "text", parse_choices(question_text(question)))
    return Explanation(rationale, answer)


@torch.no_grad()
def mean_nll(student: Student, asked: Sequence[tuple[Question, str, str | None]], impl: str = "auto") -> list[float]:
    """-log p of each (question, rationale, answer) as a reply to `reason: x`, mean over its tokens [nats/token]."""
    found: list[float] = []
    with make_autocast(student.device, None)():
        for at in range(0, len(asked), BLOCK):
            some = asked[at : at + BLOCK]
            sources = [student.source_ids(REASON, question_text(q), q.view) for q, *_ in some]
            targets = [student.target_ids(f"{text.strip()}\nAnswer: {answer}") for _, text, answer in some]
            packed = student.hidden(sources, targets, list(range(len(some))), shared=False)
            head = student.head
            logprob_T = linear_logprob(packed.hidden, head.weight, packed.target, impl=impl, **head.options)
            assert isinstance(logprob_T, torch.Tensor)
            total_R = torch.zeros(len(some), dtype=torch.float64, device=logprob_T.device)
            total_R.index_add_(0, packed.segment, logprob_T.double())
            found += [-total / len(target) for total, target in zip(total_R.tolist(), targets, strict=True)]
    return found
