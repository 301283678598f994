"""Tokenize questions once before training: prompts, labels and rationales."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, Rationale, question_key, question_text
from qcrd_fast.data.splits import label_of
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, REASON, TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.quality.cases import MINORITY, POSITIVE, Case, teacher_case
from qcrd_fast.quality.checks import factor
from qcrd_fast.train.domains import domain_of
from qcrd_fast.train.methods import label_kind, method_of
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.utils.oom import explaining_oom

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A rationale that a question's contrastive loss may select."""

    text: str
    tokens: TokenIds
    source: str  # teacher, minority, lagged; sampled: by the student, for an on-policy method
    case: Case | None = None  # what a judge is shown of it
    prompt: TokenIds | None = None  # that asks for it, where it is of a view of its own
    view: str | None = None  # that it is asked for in

    @property
    def positive(self) -> bool:
        return self.source in ("teacher", "sampled")


@dataclasses.dataclass(frozen=True)
class Example:
    id: str
    key: int  # 63 bits that stand for the id in keyed selections
    text: str
    predict: TokenIds
    explain: TokenIds
    label: TokenIds
    positives: tuple[Candidate, ...]
    minority: tuple[Candidate, ...]
    answer: str = ""  # text of the label
    reason: tuple[TokenIds, TokenIds] | None = None  # (prompt, rationale then answer) of the third task
    weight: float = 1.0  # what the question counts
    domain: str = ""
    view: str | None = None  # that rationales are asked for in, the student's own too
    reason_view: str | None = None  # the same of the third task

    def candidates(self, lagged: Mapping[str, Negative]) -> list[Candidate]:
        """Return positives, the teacher's minority, and the lagged negative unless its text equals a positive's."""
        own = lagged.get(self.id)
        said = own is not None and own.text.strip() not in {p.text.strip() for p in self.positives}
        return [
            *self.positives,
            *self.minority,
            *([Candidate(own.text, own.tokens, "lagged", own.case)] if own and said else []),
        ]


def longest_row(examples: Sequence[Example]) -> dict[str, Any]:
    """Return {id, prompt_tokens, target_tokens} of the question with the most prompt and target tokens together."""

    def sizes(e: Example) -> tuple[int, int]:
        targets = [e.label, *(c.tokens for c in (*e.positives, *e.minority)), *([e.reason[1]] if e.reason else [])]
        prompts = [e.predict, e.explain, *([e.reason[0]] if e.reason else [])]
        return max(map(len, prompts)), max(map(len, targets))

    longest = max(examples, key=lambda e: sum(sizes(e)))
    prompt, target = sizes(longest)
    return {"id": longest.id, "prompt_tokens": prompt, "target_tokens": target}


def longest_text(examples: Sequence[Example]) -> str:
    """`longest_row` in words."""
    return "{id}, {prompt_tokens} prompt + {target_tokens} target tokens".format(**longest_row(examples))


def make_examples(questions: Sequence[Question], student: Student, config: TrainConfig) -> list[Example]:
    """Tokenise the training questions, each of which has the answer that `label_of` asks for.

    Raises `RunError` where memory ends, `InputError` for weights of rows or of domains where the loss takes none,
    and for weights that are all 0.
    """
    kind, method = label_kind(config), method_of(config)
    weighted = config.domain_weights != "none" or any(question.weight not in (None, 1.0) for question in questions)
    cannot = {
        "--method mi": method.mutual_information,
        "--forward joint": method.contrastive and config.forward == "joint",
        "--mentor-kd-literal": config.mentor_kd_literal and config.kd_lambda > 0,
    }
    if weighted and (how := next((name for name, so in cannot.items() if so), None)):
        what = "--domain-weights" if config.domain_weights != "none" else "--data: the rows' weights"
        raise InputError(f"{what}: {how} cannot weigh questions; leave one out")
    if questions and all(question.weight == 0 for question in questions):
        raise InputError(f"--data: the weight of all {len(questions)} questions is 0: there is nothing to learn")
    examples, long_prompts, long_targets = [], [], []
    limits = config.max_source_length, config.max_target_length
    with (
        explaining_oom("--train-fraction (fewer questions), --num-positives, --max-target-length, --max-source-length"),
        student.measuring() as lengths,
    ):
        for question in questions:
            prompts, targets = len(lengths.prompts), len(lengths.targets)
            examples.append(_example(question, label_of(question, kind), student, config))
            if any(n > limits[0] for n in lengths.prompts[prompts:]):
                long_prompts.append(question.id)
            if any(n > limits[1] for n in lengths.targets[targets:]):
                long_targets.append(question.id)
    if long_prompts:
        log.warning(
            "%d of %d questions have a prompt over --max-source-length %d: its beginning is cut off, the question at "
            "its end stays; 95%% of the prompts have at most %d tokens, --max-source-length %d fits all: %s",
            len(long_prompts), len(questions), limits[0], _percentile_95(lengths.prompts), max(lengths.prompts),
            _some(long_prompts),
        )  # fmt: skip
    if long_targets:
        fits, total = max(lengths.targets), sum(lengths.targets)
        lost = sum(max(n - limits[1], 0) for n in lengths.targets) / total
        log.warning(
            "%d of %d questions have a rationale or label over --max-target-length %d, whose end is cut off; 95%% of "
            "them have at most %d tokens, --max-target-length %d fits all%s: %s",
            len(long_targets), len(questions), limits[1], _percentile_95(lengths.targets), fits,
            f" ({lost:.0%} of all their tokens are lost: use it)" if lost > 0.05 else "", _some(long_targets),
        )  # fmt: skip
    return examples


def _percentile_95(lengths: Sequence[int]) -> int:
    return sorted(lengths)[round(0.95 * (len(lengths) - 1))]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if ids[5:] else "")


def _example(question: Question, label: str | None, student: Student, config: TrainConfig) -> Example:
    assert label is not None  # others were set aside when the data were loaded
    text = question_text(question)
    positives = question.positives[: config.num_positives]
    minority = () if config.effective("negative_source") == "none" else question.negatives
    reason, reason_view = None, None
    if config.reasoning_task and positives:
        best = positives[0]
        if config.qualities[0] == "checks":  # the first of those that pass most
            best = max(positives, key=lambda r: factor(teacher_case(question, r, POSITIVE)))
        worked = f"{best.text.strip()}\nAnswer: {label}"
        reason_view = best.view or question.view
        reason = (student.source_ids(REASON, text, reason_view), student.target_ids(worked))

    def candidate(rationale: Rationale, source: str, kind: str) -> Candidate:
        own = rationale.view is not None and rationale.view != question.view
        prompt = student.source_ids(EXPLAIN, text, rationale.view) if own else None
        tokens, case = student.target_ids(rationale.text), teacher_case(question, rationale, kind)
        return Candidate(rationale.text, tokens, source, case, prompt, rationale.view or question.view)

    return Example(
        id=question.id,
        key=question_key(question.id),
        text=text,
        predict=student.source_ids(PREDICT, text),
        explain=student.source_ids(EXPLAIN, text, question.view),
        label=student.target_ids(label),
        answer=label,
        positives=tuple(candidate(r, "teacher", POSITIVE) for r in positives),
        minority=tuple(candidate(r, "minority", MINORITY) for r in minority),
        reason=reason,
        weight=1.0 if question.weight is None else question.weight,
        domain=domain_of(question),
        view=question.view,
        reason_view=reason_view,
    )
