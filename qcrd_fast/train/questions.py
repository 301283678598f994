"""The questions of a run: training, validation and test sets."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, later_fields
from qcrd_fast.data.splits import comparable, drop_overlap, hold_out, label_of, main_task, of_split
from qcrd_fast.errors import InputError
from qcrd_fast.models.views import read_views, view_text
from qcrd_fast.train.methods import label_kind, method_of
from qcrd_fast.utils.oom import explaining_oom

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """The three question sets of a run, and the hash of the training rows."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    task: str
    dropped: int  # training questions that are in the test or validation set too
    digest: str

    @classmethod
    def load(cls, config: TrainConfig) -> Data:
        """Raises `InputError` naming the file for unreadable or empty data."""

        def questions(path: str, **which: Any) -> list[Question]:
            with explaining_oom("a part of the rows, such as: shuf -n 100000 FILE"):
                loaded = load_questions(path, seed=config.seed, on_bad_row=config.on_bad_row, task=config.task, **which)
            log.info("%s", loaded.taken_for)
            for bad in loaded.skipped:
                log.warning("set aside %s", bad)
            if more := loaded.summary.skipped_rows - len(loaded.skipped):
                log.warning("set aside %d more", more)
            return loaded.questions

        if not config.data:
            raise InputError("--data is needed; to try the trainer without any, run: qcrd-fast demo --output-dir DIR")
        rows = questions(config.data, split="train")
        test: list[Question] = []
        if config.test_data:
            test = of_split(questions(config.test_data, part="test"), "test", f"--test-data: {config.test_data}")
        kind = label_kind(config)
        labelled = [q for q in rows if label_of(q, kind) is not None]
        if not labelled:
            raise InputError(f"--data: {config.data}: no question has a {kind or 'gold or majority'} answer to teach")
        if len(labelled) < len(rows):
            log.warning("--data: set aside %d questions without an answer to teach", len(rows) - len(labelled))
        rows, in_test = drop_overlap(labelled, test)
        in_validation = 0
        if config.eval_data:
            where = f"--eval-data: {config.eval_data}"
            validation = of_split(questions(config.eval_data, part="validation"), "validation", where)
            validation, shared = drop_overlap(validation, test)
            if not validation:
                raise InputError(f"--eval-data: {config.eval_data}: all {shared} questions are in the test set")
            if shared:
                log.warning("--eval-data: dropped %d questions that are in the test set", shared)
            rows, in_validation = drop_overlap(rows, validation)
        else:
            rows, validation = hold_out(rows, config.validation_fraction, config.seed)
            rows, _ = drop_overlap(rows, validation)  # the same question under another id
        if config.train_fraction < 1:
            rows = hold_out(rows, config.train_fraction, config.seed)[1]
        elif config.max_samples and config.max_samples < len(rows):
            rows = hold_out(rows, config.max_samples / len(rows), config.seed)[1]
        if not rows:
            both = ((in_validation, "--eval-data"), (in_test, "--test-data"))
            where = " and ".join(f"{count} are in {option} too" for count, option in both if count)
            raise InputError(f"--data: {config.data}: no question is left to train on: {where}")
        if method_of(config).teaches_rationales and not any(question.positives for question in rows):
            raise InputError(f"--data: no question has a positive rationale, which --method {config.method} needs")
        for name, some in (("--eval-data", validation), ("--test-data", test)):
            missing = [q.id for q in some if label_of(q, None) is None]
            if missing:
                raise InputError(f"{name}: {len(missing)} questions have no answer, such as {missing[0]}")
        check_views([*rows, *validation, *test], read_views(config.views))
        if config.method == "qcrd" and all(_samples(question) < 2 for question in rows):
            log.warning(
                "--data: no question has more than one sample: there was nothing to vote on, and qcrd has no minority"
            )
        task = config.task or main_task(rows)
        validation = comparable(validation, task, "--eval-data" if config.eval_data else "validation")
        test = comparable(test, task, "--test-data")
        return cls(rows, validation, test, task, in_test + in_validation, _digest(rows, validation, test))


def check_views(questions: Iterable[Question], own: Mapping[str, str]) -> None:
    """Raises `InputError` naming a question whose view, or that of one of its rationales, is in no table."""
    for question in questions:
        for view in (question.view, *(r.view for r in (*question.positives, *question.negatives))):
            try:
                view_text(view, own)
            except InputError as error:
                raise InputError(f"question {question.id!r}: {error}") from None


def _samples(question: Question) -> int:
    return max(sum(question.votes.values()), len(question.positives) + len(question.negatives))


def _digest(*parts: list[Question]) -> str:
    """Return the sha256 of the parts as text, one question at a time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for question in part:
            digest.update((repr(question) + later_fields(question)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
