"""One job of a sweep: a run's options, the key of its row, and the names of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from qcrd_fast.config import PARTS, QUALITY_OPTIONS, SELECTS, DataOptions, TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import CONFIG, FREE_OPTIONS, RESULTS, check_same_config
from qcrd_fast.utils.config_files import read_object
from qcrd_fast.utils.files import sha256

# what this module adds to a run folder
ATTEMPTS, WHERE, JUDGED = "attempts.jsonl", "environment.json", "rationales.json"
# options with a column of their own, or none
APART = {*FREE_OPTIONS, "data", "eval_data", "test_data", "student", "seed"}
KEY = ("recipe", "student", "method", "options", "seed", "data")  # a run is found again by these
_digests: dict[tuple[str | None, ...], str] = {}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. `recipe` names it in the CSV; `judge`: its rationales on the test questions are judged too."""

    config: TrainConfig
    recipe: str
    judge: bool = False

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    @property
    def options(self) -> Path:
        """The file that the run's process reads, beside the folder."""
        return self.folder.with_name(self.folder.name + ".yaml")

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.config.method} seed {self.config.seed}"

    @property
    def state(self) -> str:
        """finished, begun or new. Raises `InputError` when the folder holds a run with other options.

        A run that `start` began is finished once it has said what machine it ran on, and on which data.
        """
        began = self.folder / CONFIG
        if not began.is_file():
            return "new"
        try:
            before = yaml.safe_load(began.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{began}: unreadable: {error}") from error
        if not isinstance(before, dict):
            raise InputError(f"{began}: unreadable: it holds no options")
        check_same_config(self.config, before, began, FREE_OPTIONS)
        needed = {WHERE: self.options.is_file(), JUDGED: self.judge}
        missing = [name for name, is_needed in needed.items() if is_needed and not (self.folder / name).is_file()]
        if missing or "accuracy" not in read_object(self.folder / RESULTS):
            return "begun"
        if read_object(self.folder / WHERE).get("data", "") not in ("", data_digest(self.config)):
            raise InputError(f"{self.folder}: the run was made from other data; choose another folder")
        return "finished"


def key(job: Job) -> dict[str, Any]:
    """Return the columns that identify a run's row."""
    config = job.config
    return {
        "recipe": job.recipe,
        "student": _student_name(str(config.student)),
        "method": config.method,
        "options": options_text(config),
        "seed": config.seed,
        "data": data_digest(config),
    }


def _student_name(student: str) -> str:
    """Return the last part of a path or hub id; for a run's `final` or `checkpoint-N` with the run's name."""
    path = Path(student)
    return "/".join(path.parts[-2:]) if re.fullmatch(r"final|checkpoint-\d+", path.name) else path.name


def options_text(config: TrainConfig) -> str:
    """Format the options that differ from their defaults, except those with a column.

    Of qcrd, what the defaults were when the first rows were written (`PARTS`) is left out instead: those rows keep
    their meaning.
    """
    found, parts = [], PARTS if config.method == "qcrd" and not config.paper else {}
    if parts:
        resolved = config.resolved()
        config = dataclasses.replace(config, **{n: getattr(resolved, n) for n in (*SELECTS, *QUALITY_OPTIONS, *parts)})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in {*APART, "method"} and value not in (field.default, parts.get(field.name, field.default)):
            name = field.name.replace("_", "-")
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            found.append(
                f"--{'' if value is not False else 'no-'}{name}" + ("" if isinstance(value, bool) else f" {shown}")
            )
    return " ".join(found)


def data_digest(config: DataOptions) -> str:
    """Twelve digits of the contents of --data, --eval-data and --test-data; "" where one is not there."""
    paths = (config.data, config.eval_data, config.test_data)
    if not all(Path(path).exists() for path in paths if path):
        return ""
    if paths not in _digests:
        digest = hashlib.sha256()
        for name in paths:
            path = Path(name or "")
            files = (
                sorted(p for p in path.rglob("*") if p.is_file()) if name and path.is_dir() else [path] if name else []
            )
            digest.update(repr([sha256(file) for file in files]).encode())
        _digests[paths] = digest.hexdigest()[:12]
    return _digests[paths]
