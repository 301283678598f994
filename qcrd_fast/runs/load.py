"""The model of a run folder, with the prompts that it was trained with."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qcrd_fast.config import TASKS
from qcrd_fast.errors import InputError
from qcrd_fast.models.loading import read_config
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runs.checkpoints import latest_checkpoint, verify_checkpoint
from qcrd_fast.runs.folder import CONFIG, FINAL, MANIFEST, STATE
from qcrd_fast.utils.config_files import read_object
from qcrd_fast.utils.device import resolve_device

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's


def find_model(run_or_model: str) -> str:
    """The model folder of a run (its `final`, else its latest checkpoint), or the argument itself."""
    path = Path(run_or_model)
    if os.path.isfile(path / CONFIG):
        if (path / FINAL / "config.json").is_file():
            if (path / FINAL).resolve().parent != path.resolve():
                raise InputError(
                    f"{path / FINAL} leads out of the run; name the model itself if it is the one you mean"
                )
            return str(path / FINAL)
        latest = latest_checkpoint(path)
        if latest is None:
            raise InputError(f"{path}: the run has no checkpoint yet")
        return str(latest)
    return run_or_model


def find_state(name: str) -> Path | None:
    """Return the file with a trained model's prompt settings, local or on the hub; None for a plain model."""
    path = Path(name) / STATE
    if os.path.isfile(path):
        return path
    if os.path.exists(name):
        return None
    with contextlib.suppress(Exception):  # no such model, no network: loading the model says so
        from huggingface_hub import hf_hub_download

        found = Path(hf_hub_download(name, STATE)).resolve()  # the cache has links
        if isinstance(read_object(found).get("prompt"), dict):  # and no file of somebody else's that has this name
            return found
    return None


def check_student(name: str, device: str = "auto") -> None:
    """Run the checks of `load_student` that need no weights, on what `find_model` found."""
    verify_checkpoint(Path(name))
    if not os.path.isfile(Path(name) / ADAPTER):  # which names its base model
        read_config(name, "student")
    resolve_device(device)


def load_student(run_or_model: str, device: str = "auto") -> tuple[Student, dict[str, Any]]:
    """Load a student with its training prompts; return it with its saved state ({} for a plain model).

    A LoRA adapter is merged into the base model that it names.
    """
    name = find_model(run_or_model)
    verify_checkpoint(Path(name))
    state: dict[str, Any] = {}
    path = find_state(name)
    if path is not None:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            prompts = PromptSettings.of_state(state["prompt"])
            if state.get("task") not in (None, "mixed", *TASKS):
                raise ValueError(f"task {state['task']!r} is none of {', '.join(TASKS)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: unreadable: {error}") from error
        if "data_sha256" in state and not (path.parent / MANIFEST).is_file():  # a checkpoint's, not an exported model's
            raise InputError(f"{name}: the checkpoint is damaged: {MANIFEST} is missing")
    else:
        prompts = PromptSettings()
    if os.path.isfile(Path(name) / ADAPTER):
        student = _load_adapted(Path(name), prompts)
        student.model.to(resolve_device(device))
    else:
        student = Student.load(name, prompts, resolve_device(device))
    student.model.eval()
    return student, state


def _load_adapted(folder: Path, prompts: PromptSettings) -> Student:
    """The base model of a LoRA adapter with the adapter merged, on the CPU."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder} holds a LoRA adapter; merging it needs peft: pip install peft") from error
    base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{folder / ADAPTER} does not name its base model")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder}: {ADAPTER_WEIGHTS} is needed; a pickle is never loaded")
    student = Student.load(base, prompts)
    try:
        model = PeftModel.from_pretrained(student.model, str(folder))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an adapter of anybody's can make a library raise
        raise InputError(
            f"{folder}: the adapter does not fit {base!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    _check_adapter(model, folder)
    student.model = model.merge_and_unload()
    return student


def _check_adapter(model: Any, folder: Path) -> None:
    """Raise `InputError` unless the file holds exactly the LoRA matrices that the adapter's configuration declares."""
    from peft import get_peft_model_state_dict

    wanted = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in name}
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        held = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (no mapping)
    if differing := sorted(wanted ^ held):
        what = "lacks" if differing[0] in wanted else "has, and its configuration does not ask for,"
        raise InputError(f"{folder}: the adapter {what} {differing[0]} ({len(differing)} such tensors)")
