"""A local teacher for the study: the student of a family, trained on sound chains of other questions."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.demo import problems
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.files import write_lines

log = logging.getLogger("qcrd_fast.bench")
QUESTIONS = 2000  # none of them a test question, but by chance
OPTIONS: dict[str, Any] = dict(
    task="number", method="sft-all", learning_rate=1.5e-3, num_train_epochs=8, per_device_train_batch_size=16,
    warmup_ratio=0.05, max_source_length=96, max_target_length=48, validation_fraction=0.0, save_steps=100_000,
)  # fmt: skip


@functools.cache
def mentor_folder(task: str, student: Path, cache: Path) -> Path:
    """Return the trained model's folder in `cache`; train it if it is missing."""
    settings = (student.name, task, QUESTIONS, OPTIONS)
    folder = cache / f"mentor-{task}-{student.name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        log.info("training the mentor of %s on %s", student.name, task)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            rows, rng = Path(temporary) / "rows.jsonl", random.Random(f"{task} mentor")
            write_lines(rows, sound_rows(problems.draw_problems(task, QUESTIONS, rng), rng))
            run = Path(temporary) / "run"
            options = {**OPTIONS, "data": str(rows), "student": str(student), "output_dir": str(run)}
            train(TrainConfig.from_dict(options))
            model = Path(temporary) / "model"
            shutil.copytree((run / "final").resolve(), model)
            if not folder.is_dir():
                os.replace(model, folder)
    return folder


def sound_rows(drawn: Sequence[problems.Problem], rng: random.Random) -> list[dict[str, Any]]:
    """Return prepared rows with a sound chain each, in one of the wordings."""
    rows = []
    for i, problem in enumerate(drawn):
        chain, answer = problems.write_chain([(s, problems.result(s)) for s in problem.steps], rng), str(problem.answer)
        sample = {"rationale": chain, "answer": answer}
        rows.append({"id": f"m{i}", "question": problem.text, "answer": answer, "task": "number", "samples": [sample]})
    return rows
