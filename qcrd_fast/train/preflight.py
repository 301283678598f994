"""Checks before a run loads anything: files, packages, devices, disk and memory. Imports no torch.

A wrong option is named within a second, and not after a minute of loading.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.files import is_hub_name
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.model_folder import check_model_name, count_parameters
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.runs.folder import CONFIG, RESULTS
from qcrd_fast.train.methods import check_teacher
from qcrd_fast.utils.files import disk_space_text, printable, require_writable
from qcrd_fast.utils.memory import free_bytes, swap_bytes
from qcrd_fast.utils.oom import for_weights
from qcrd_fast.utils.torchrun import world_size

PACKAGES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "peft": "PEFT"}  # each is an extra of that name


def check_start(config: TrainConfig, *, dry_run: bool = False, names: bool = True) -> None:
    """Check the files, folders, packages and devices that options name, and whether the student fits. Reads no rows.

    With `dry_run` the output folder is checked as well, as `RunFolder` does. `names` False leaves names of the hub to
    `check_names`, which comes behind what is wrong with folders and rows. Raises `InputError` naming the option,
    `RunError` where the disk has no room for a checkpoint.
    """
    for option in ("data", "eval_data", "test_data"):
        path = getattr(config, option)
        if path and not os.path.exists(path) and not is_hub_name(path):
            raise InputError(f"--{option.replace('_', '-')}: {printable(path)} does not exist")
    check_teacher(config)
    if config.teacher_logprobs and not os.path.isdir(config.teacher_logprobs):
        raise InputError(f"--teacher-logprobs: {printable(config.teacher_logprobs)} is no folder")
    if names or os.path.isdir(str(config.student)):
        check_names(config)
    PromptSettings.from_option(
        config.prompt_template, config.max_source_length, config.max_target_length, config.system_prompt, config.views
    )
    if config.resume not in (None, "auto") and not os.path.isdir(str(config.resume)):
        raise InputError(f"--resume: {printable(str(config.resume))}: no such folder; auto finds the latest checkpoint")
    for option, package in (("--report-to", config.report_to), ("--use-peft", "peft" if config.use_peft else "none")):
        if package != "none" and importlib.util.find_spec(package) is None:
            raise InputError(f"{option} needs {PACKAGES[package]}: pip install 'qcrd-fast[{package}]'")
    if config.device.startswith("cuda") and not _has_gpu_driver():
        raise InputError(f"--device: {config.device} is not available on this machine: it has no GPU driver")
    if dry_run and config.output_dir:
        require_writable(Path(config.output_dir), "--output-dir")
    _check_sizes(config)


def check_names(config: TrainConfig) -> None:
    """Raises `InputError` for a student, discriminator or teacher that is no folder of a model, and none of the hub."""
    check_model_name(str(config.student), "student")  # as loading it says
    if config.discriminator not in ("auto", "none"):
        check_model_name(config.discriminator, "--discriminator")
    is_run = os.path.isfile(os.path.join(config.teacher or "", CONFIG))  # whose `final` teaches
    if config.teacher and not config.teacher_is_url and not is_run:
        check_model_name(config.teacher, "--teacher")


def require_memory(config: TrainConfig, parameters: int, free: int, where: str) -> None:
    """Raise `InputError` if weights, gradients and AdamW's moments (fp32) alone exceed free memory."""
    needed = 4 * parameters * (1 if config.use_peft else 4) // (world_size() if config.fsdp else 1)
    if needed > free:
        raise InputError(
            f"--student: {parameters / 1e6:,.0f} million parameters: training takes at least {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB of {where} are free; what helps: {for_weights(config)}"
        )


def _check_sizes(config: TrainConfig) -> None:
    """Check a local student's minimum size against free disk and, for training on a CPU, free memory."""
    if config.resume and os.path.isfile(os.path.join(str(config.output_dir), RESULTS)):
        return  # a run that is done: there is nothing to train and nothing to write
    student = Path(str(config.student))
    parameters = count_parameters(student) if student.is_dir() else None
    if parameters is None:
        return
    if config.device == "cpu" or not _has_gpu_driver():
        require_memory(config, parameters, free_bytes() + swap_bytes(), "memory")
    folder = Path(config.output_dir or ".")
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    needed = 4 * parameters * (1 if config.use_peft else 3)
    with contextlib.suppress(OSError):  # a folder that cannot be looked at is named by who writes to it
        disk = shutil.disk_usage(folder)
        if disk.total and disk.free < needed:  # such as /proc has none at all: it cannot be written to
            raise RunError(
                f"--output-dir: {config.output_dir}: no room for a checkpoint ({disk_space_text(folder, needed)})"
            )


def _has_gpu_driver() -> bool:
    """Return whether a CUDA or ROCm driver is present; torch checks the rest."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return os.name == "nt" or os.path.exists("/dev/kfd")
