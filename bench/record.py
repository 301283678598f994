"""Add measurements to CSV files in bench/results, with machine, versions and commit."""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.errors import InputError
from qcrd_fast.utils.environment import commit

log = logging.getLogger("qcrd_fast.bench")
VERSIONED = ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels")
WHERE = ("device", "threads", "torch", "triton", "transformers", "commit", "time")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and time."""
    versions = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        **versions,
        "commit": commit(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def check_appendable(path: Path, columns: Sequence[str]) -> None:
    """Raise `InputError` unless rows with these columns can be added to this CSV file."""
    if not path.parent.is_dir():
        raise InputError(f"--append: there is no folder {path.parent}; run from a checkout")
    if path.exists() and (text := path.read_text(encoding="utf-8")) and text.partition("\n")[0] != ",".join(columns):
        raise InputError(f"--append: {path} has other columns; expected {','.join(columns)}")


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], digits: int = 5) -> None:
    """Append rows, floats with that many significant digits; a new file gets a header.

    Keys that are no column are dropped. Raises `InputError` as `check_appendable` does.
    """
    check_appendable(path, columns)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(columns)
        for row in rows:
            writer.writerow(
                [float(f"{v:.{digits}g}") if isinstance(v := row.get(name), float) else v for name in columns]
            )


def run_cases(
    cases: Sequence[Any],
    run: Callable[[Any], list[dict[str, Any]]],
    device: torch.device,
    columns: Sequence[str],
    append_to: Path | None,
    **shared: Any,
) -> dict[str, Any]:
    """Return {"where", what is `shared` by all rows, "rows": those of `run` for each case}.

    With `append_to`, rows are added to that CSV file as soon as they are measured.
    """
    if append_to:
        check_appendable(append_to, columns)
    where, rows = describe_machine(device), []
    for number, case in enumerate(cases, 1):
        log.info("case %d of %d: %s", number, len(cases), case)
        measured = run(case)
        rows += measured
        if append_to:
            append(append_to, columns, ({**where, **shared, **row} for row in measured))
    return {"where": where, **shared, "rows": rows}


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
