"""Answers while a run trains, and its results at the end: `final`, `eval_results.json` and `predictions.jsonl`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question
from qcrd_fast.distributed.comm import Ranks
from qcrd_fast.evaluate import accuracy, predict
from qcrd_fast.models.student import Student
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import FINAL, PREDICTIONS, RESULTS
from qcrd_fast.train.metrics_log import MetricsLog
from qcrd_fast.train.questions import Data
from qcrd_fast.utils.files import write_json, write_lines

Best = dict[str, Any] | None  # {step, accuracy} of the best checkpoint on validation


class Evaluation:
    """Answers a run's questions; of several ranks each its share."""

    def __init__(self, config: TrainConfig, run: Path, data: Data, autocast: Callable[[], torch.autocast], ranks: Ranks):
        self.config, self.run, self.data, self.autocast, self.ranks = config, run, data, autocast, ranks
        self.questions = data.test or data.validation  # of the end

    def predict(self, student: Student, questions: list[Question]) -> list[dict[str, Any]]:
        """A record a question, as `evaluate.predict` gives them."""
        records = predict(
            student,
            self.ranks.share(questions),
            self.data.task,
            batch_size=self.config.eval_batch_size,
            max_answer_tokens=self.config.max_answer_tokens,
            autocast=self.autocast,
            impl=self.config.impl,
            batch_option="--eval-batch-size",
        )
        return self.ranks.collect(records)

    def validate(self, student: Student) -> float:
        """Accuracy on the validation questions, 0..1."""
        value = accuracy(self.predict(student, self.data.validation))
        assert value is not None
        return value

    def finish(
        self, student: Student, log: MetricsLog, best: Best, step: int, more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Point `final` at the best checkpoint of a run that ended behind `step`, and evaluate it and the untrained student, on
        the test set, else on the validation set. `student`: whose device and prompts are taken. `more` is added to the
        results."""
        chosen = self.ranks.on_first(lambda: self._choose_final(log, best, step))
        if chosen["finished"] is not None:
            return dict(chosen["finished"])
        final, best = Path(chosen["path"]), chosen["best"]
        results: dict[str, Any] = {
            "accuracy": None,
            "accuracy_validation": best["accuracy"] if best else None,
            "accuracy_untrained": None,
        }
        records: list[dict[str, Any]] = []
        if self.questions:
            device, prompts = student.device, student.prompts
            untrained = Student.load(str(self.config.student), prompts, device)
            results["accuracy_untrained"] = accuracy(self.predict(untrained, self.questions))
            del untrained
            records = self.predict(Student.load(str(final), prompts, device), self.questions)
            results["accuracy"] = accuracy(records)
        results |= {
            "n": len(self.questions),
            "evaluated_on": "test" if self.data.test else "validation" if self.data.validation else None,
            "task": self.data.task,
            "method": self.config.method,
            "best_step": checkpoints.step_of(final),
            "steps": step,
            "train_questions": len(self.data.train),
            "dropped_from_train": self.data.dropped,
            **(more or {}),
        }

        def write() -> None:
            if self.questions:
                write_lines(self.run / PREDICTIONS, records)
            write_json(self.run / RESULTS, results)

        self.ranks.on_first(write)
        return results

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
