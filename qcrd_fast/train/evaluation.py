"""Evaluate during training and at the end: `final`, `eval_results.json`, `predictions.jsonl`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question
from qcrd_fast.distributed.comm import Comm
from qcrd_fast.evaluate import accuracy, ask_by_chat_template, by_field, explain, predict
from qcrd_fast.models.student import Student
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import FINAL, PREDICTIONS, RESULTS
from qcrd_fast.train.methods import method_of
from qcrd_fast.train.metrics_log import MetricsLog
from qcrd_fast.train.questions import Data
from qcrd_fast.train.run_state import RunState
from qcrd_fast.train.run_text import accuracy_text, rationales_text
from qcrd_fast.utils.files import write_json, write_lines
from qcrd_fast.utils.intervals import wilson

logger = logging.getLogger(__name__)
EXPLAINED = 8  # questions of the end whose greedy rationales are kept beside the answers, for `report`
RATIONALES = 2  # that a validation shows
ZERO_SHOT = 64  # questions of the end that the untrained student is asked in words: each reply takes up to 256 tokens
Best = dict[str, Any] | None  # {step, accuracy} of the best checkpoint on validation


class Evaluation:
    """Answers a run's questions; each rank answers its shard."""

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        run: Path,
        data: Data,
        autocast: Callable[[], torch.autocast],
        comm: Comm,
    ):
        self.config, self.state, self.run, self.data = config, state, run, data
        self.autocast, self.comm = autocast, comm
        self.questions = data.test or data.validation  # of the end

    def predict(self, student: Student, questions: list[Question], zero_shot: bool = False) -> list[dict[str, Any]]:
        """A record a question, as `evaluate.predict` gives them."""
        records = predict(
            student,
            self.comm.shard(questions),
            self.data.task,
            batch_size=self.config.eval_batch_size,
            max_answer_tokens=self.config.max_answer_tokens,
            zero_shot=zero_shot,
            autocast=self.autocast,
            impl=self.state.impl,
            batch_option="--eval-batch-size",
        )
        return self.comm.gather_in_order(records)

    def validate(self, student: Student) -> tuple[float, str]:
        """Return the validation accuracy (0..1) and a text about it with two of the student's rationales."""
        records = self.predict(student, self.data.validation)
        right, unreadable = sum(r["correct"] for r in records), sum(r["prediction"] is None for r in records)
        text = accuracy_text(right, len(records), f", {unreadable} without a readable answer" if unreadable else "")
        if self.comm.first and method_of(self.config).teaches_rationales:
            text += "\n" + self._rationales(student, records[:RATIONALES])
        return right / len(records), text

    def _rationales(self, student: Student, records: list[dict[str, Any]]) -> str:
        said = self._explain(student, records, min(self.config.max_new_tokens, self.config.max_target_length))
        return rationales_text(self.data.validation[: len(records)], said, records)

    def finish(
        self,
        student: Student,
        log: MetricsLog,
        best: Best,
        step: int,
        more: Mapping[str, Any] | None = None,
        stopped_early: bool = False,
    ) -> dict[str, Any]:
        """Point `final` at the best checkpoint and evaluate it and the untrained student.

        Uses the test set, else the validation set. `student` supplies device and prompts. `more` is added to the
        results.
        """
        chosen = self.comm.on_rank0(lambda: self._choose_final(log, best, step))
        if chosen["finished"] is not None:
            return dict(chosen["finished"])
        final, best = Path(chosen["path"]), chosen["best"]
        results: dict[str, Any] = {
            "accuracy": None,
            "accuracy_validation": best["accuracy"] if best else None,
            "accuracy_untrained": None,
        }
        records: list[dict[str, Any]] = []
        zero_shot, in_words = None, self.questions[:ZERO_SHOT]
        if self.questions:
            device, prompts = student.device, student.prompts
            untrained = Student.load(str(self.config.student), prompts, device, self.config.attn_implementation)
            results["accuracy_untrained"] = accuracy(self.predict(untrained, self.questions))
            if self.config.zero_shot and ask_by_chat_template(untrained):
                logger.info(
                    "asking the untrained student %d questions by its chat template, for a baseline", len(in_words)
                )
                zero_shot = accuracy(self.predict(untrained, in_words, zero_shot=True))
            del untrained
            trained = Student.load(str(final), prompts, device, self.config.attn_implementation)
            records = self.predict(trained, self.questions)
            self._add_rationales(trained, records[:EXPLAINED])
            results["accuracy"] = accuracy(records)
        n = len(self.questions)
        results |= {
            "n": n,
            "accuracy_95": [round(bound, 6) for bound in wilson(results["accuracy"], n)] if n else None,
            "accuracy_zero_shot": zero_shot,
            "n_zero_shot": len(in_words) if zero_shot is not None else None,
            "evaluated_on": "test" if self.data.test else "validation" if self.data.validation else None,
            "task": self.data.task,
            "method": self.config.method,
            "best_step": checkpoints.step_of(final),
            "steps": step,
            "train_questions": len(self.data.train),
            "dropped_from_train": self.data.dropped,
            **by_field(records),
            **(more or {}),
        }
        if self.config.early_stopping_patience:
            results["stopped_early"] = stopped_early
        if self.config.run_name:
            results["run_name"] = self.config.run_name

        def write() -> None:
            if self.questions:
                write_lines(self.run / PREDICTIONS, records)
            write_json(self.run / RESULTS, results)

        self.comm.on_rank0(write)
        return results

    def _add_rationales(self, student: Student, records: list[dict[str, Any]]) -> None:
        """Add the student's greedy rationale of each question to its record."""
        said = self._explain(student, self.comm.shard(records), self.config.max_target_length)
        for record, rationale in zip(records, self.comm.gather_in_order(said), strict=True):
            record["rationale"] = rationale

    def _explain(self, student: Student, records: Sequence[dict[str, Any]], max_new_tokens: int) -> list[str]:
        return explain(
            student,
            records,
            max_new_tokens=max_new_tokens,
            batch_size=self.config.eval_batch_size,
            autocast=self.autocast,
            impl=self.state.impl,
            batch_option="--eval-batch-size",
        )

    def _choose_final(self, log: MetricsLog, best: Best, step: int) -> dict[str, Any]:
        """Points `final` at the best checkpoint. A finished run's results come with it: nothing is left to do."""
        rated = {m["step"]: m["eval_accuracy"] for m in log.read() if "eval_accuracy" in m}
        if best:
            rated[best["step"]] = best["accuracy"]
        path, best = checkpoints.best_checkpoint(self.run, step, rated)
        chosen: dict[str, Any] = {"path": str(path), "best": best, "finished": None}
        predicted = (self.run / PREDICTIONS).is_file() or not self.questions
        if (self.run / FINAL).resolve() == path.resolve() and predicted:
            with contextlib.suppress(OSError, ValueError):
                chosen["finished"] = json.loads((self.run / RESULTS).read_text(encoding="utf-8"))
        if chosen["finished"] is None:
            checkpoints.point_final(self.run, path)
        return chosen
