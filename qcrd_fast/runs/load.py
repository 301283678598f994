"""The model of a run folder, with the prompts that it was trained with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qcrd_fast.config import TASKS
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runs.checkpoints import latest_checkpoint, require_whole
from qcrd_fast.runs.folder import CONFIG, FINAL, MANIFEST, STATE
from qcrd_fast.utils.device import resolve_device


def find_model(run_or_model: str) -> str:
    """The model folder of a run (its `final`, else its latest checkpoint), or the argument itself."""
    path = Path(run_or_model)
    if os.path.isfile(path / CONFIG):
        if (path / FINAL / "config.json").is_file():
            if (path / FINAL).resolve().parent != path.resolve():
                raise InputError(f"{path / FINAL} leads out of the run; name the model itself if it is the one you mean")
            return str(path / FINAL)
        latest = latest_checkpoint(path)
        if latest is None:
            raise InputError(f"{path}: the run has no checkpoint yet")
        return str(latest)
    return run_or_model


def load_student(run_or_model: str, device: str = "auto") -> tuple[Student, dict[str, Any]]:
    """A student with the prompts that it was trained with, and the state saved beside it ({} for a plain model)."""
    name = find_model(run_or_model)
    require_whole(Path(name))
    state: dict[str, Any] = {}
    path = Path(name) / STATE
    if os.path.isfile(path):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            prompts = PromptSettings(**state["prompt"])
            if state.get("task") not in (None, "mixed", *TASKS):
                raise ValueError(f"task {state['task']!r} is none of {', '.join(TASKS)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: unreadable: {error}") from error
        if "data_sha256" in state and not (Path(name) / MANIFEST).is_file():  # a checkpoint's, not an exported model's
            raise InputError(f"{name}: the checkpoint is damaged: {MANIFEST} is missing")
    else:
        prompts = PromptSettings()
    student = Student.load(name, prompts, resolve_device(device))
    student.model.eval()
    return student, state
