"""What an active run is about: its settings, its teacher, its questions; and whether a folder holds the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from qcrd_fast.active import teachers
from qcrd_fast.active.folder import CONFIG
from qcrd_fast.active.options import FREE, OWN, REFUSED, TRAIN_DEFAULTS, ActiveConfig
from qcrd_fast.active.prompts import Prompts
from qcrd_fast.collect.collection import REPLAY, check_teacher
from qcrd_fast.collect.endpoint import Endpoint, EndpointSettings
from qcrd_fast.config import TrainConfig
from qcrd_fast.data.files import is_hub_name
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, later_fields, leak_key
from qcrd_fast.data.splits import comparable, drop_overlap, label_of, main_task, of_split
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.runs.folder import FREE_OPTIONS
from qcrd_fast.runs.load import find_model, find_state
from qcrd_fast.select.registry import unused
from qcrd_fast.train.methods import METHODS, TEACHERS
from qcrd_fast.train.preflight import check_start
from qcrd_fast.train.questions import check_views
from qcrd_fast.utils.config_files import read_object
from qcrd_fast.utils.files import printable, write_text

log = logging.getLogger(__name__)
NEEDED = ("eval_data", "output_dir", "student")
TAUGHT = tuple(name for name, method in METHODS.items() if TEACHERS[method.teacher])


class Setup:
    """The settings, questions, teacher and folder of an active run. Raises `InputError` for whatever is wrong with
    them."""

    def __init__(self, config: ActiveConfig, options: dict[str, Any]):
        self.config = config
        if options.get("method") in TAUGHT:
            raise InputError(
                f"--method {options['method']} is not for active, whose teacher writes text; "
                f"train on the questions of its rounds with: qcrd-fast train --method {options['method']} --teacher "
                f"PATH"
            )
        self.base = TrainConfig.from_dict(TRAIN_DEFAULTS | options)
        if config.teacher_model and not config.is_url:
            raise InputError("--teacher-model names the model of an endpoint; --teacher is no URL")
        if idle := idle_options(config):
            log.warning("without effect here: %s", ", ".join("--" + name.replace("_", "-") for name in idle))
        for name in NEEDED:
            if not getattr(self.base, name):
                raise InputError(f"active needs --{name.replace('_', '-')}")
        for name in REFUSED:
            if getattr(self.base, name) != getattr(TrainConfig(), name):
                raise InputError(f"--{name.replace('_', '-')} {REFUSED[name]}")
        if self.base.resume not in (None, "auto"):
            raise InputError("--resume: an active run goes on where it was; say --resume auto")
        for name, value in TRAIN_DEFAULTS.items():
            if getattr(self.base, name) != value and name in ("reasoning_task", "validation_fraction"):
                raise InputError(f"--{name.replace('_', '-')}: in an active run it is always {str(value).lower()}")
        self.initial = find_model(str(self.base.student))
        self.path = Path(str(self.base.output_dir))
        for name, path in (("pool", config.pool), *((n, getattr(self.base, n)) for n in ("eval_data", "test_data"))):
            if path and not os.path.exists(path) and not is_hub_name(path):
                raise InputError(f"--{name.replace('_', '-')}: {printable(path)} does not exist")
        check_start(dataclasses.replace(self.base, student=self.initial), dry_run=True)
        self.prompts = Prompts(config.prompts)
        # of a student that was not trained here
        self.student_prompts = PromptSettings.from_option(
            self.base.prompt_template,
            self.base.max_source_length,
            self.base.max_target_length,
            self.base.system_prompt,
            self.base.views,
        )
        # what the files of these options say
        self.texts = {
            "prompts": sorted(self.prompts.texts.items()),
            "views": sorted(self.student_prompts.views.items()),
            "prompt_template": self.student_prompts.template,
            "system_prompt": self.student_prompts.system,
        }
        self.teacher = self._find_teacher()
        self.pool, self.validation, self.test = self._load()
        check_views([*self.pool, *self.validation, *self.test], self.student_prompts.views)
        self.task = self.base.task or main_task(self.pool)
        self.validation = comparable(self.validation, self.task, "--eval-data")
        self.test = comparable(self.test, self.task, "--test-data")
        state = find_state(self.initial) if Path(self.initial).is_dir() else None
        trained = read_object(state).get("config") if state else None
        self.reasons = isinstance(trained, dict) and trained.get("reasoning_task") is True
        if config.continue_student and self.base.use_peft:
            raise InputError("--continue-student does not go with --use-peft: a round would begin from an adapter")

    # What the run is about

    def _find_teacher(self) -> teachers.Teacher | None:
        """A teacher that answers at once; None for an endpoint, of which the address is checked."""
        config, name = self.config, str(self.config.teacher)
        if config.is_url:
            Endpoint(self.endpoint())
            return None
        check_teacher(name)
        if name.startswith(REPLAY):
            return teachers.ReplayTeacher(name.removeprefix(REPLAY))
        if name.startswith(teachers.ORACLE):
            return teachers.OracleTeacher(name.removeprefix(teachers.ORACLE))
        return teachers.ModelTeacher(
            name, api=config.api or "", temperature=config.temperature, max_tokens=config.max_tokens,
            seed=self.base.seed,
            device=self.base.device,
        )  # fmt: skip

    def endpoint(self) -> EndpointSettings:
        c = self.config
        return EndpointSettings(
            url=str(c.teacher), api=c.api or "chat", model=c.teacher_model or "", temperature=c.temperature,
            max_tokens=c.max_tokens, timeout_s=c.timeout, deadline_s=c.deadline, concurrency=c.concurrency,
        )  # fmt: skip

    def _load(self) -> tuple[list[Question], list[Question], list[Question]]:
        def questions(path: str, part: str, split: str | None = None) -> list[Question]:
            loaded = load_questions(
                path, seed=self.base.seed, on_bad_row=self.base.on_bad_row, task=self.base.task, part=part, split=split
            )
            log.info("%s", loaded.taken_for)
            for bad in loaded.skipped:
                log.warning("set aside %s", bad)
            return loaded.questions

        def part(path: str, option: str, split: str) -> list[Question]:
            return of_split(questions(path, split), split, f"{option}: {path}")

        test = part(self.base.test_data, "--test-data", "test") if self.base.test_data else []
        validation = part(str(self.base.eval_data), "--eval-data", "validation")
        validation, shared = drop_overlap(validation, test)
        for name, some in (("--eval-data", validation), ("--test-data", test)):
            missing = [q.id for q in some if label_of(q, None) is None]
            if missing:
                raise InputError(f"{name}: {len(missing)} questions have no answer, such as {missing[0]}")
        if not validation:
            raise InputError(f"--eval-data: no question is left; {shared} are in --test-data")
        pool, counts = questions(str(self.config.pool), "train", "train"), {}
        labelled = [q for q in pool if label_of(q, None) is not None]
        counts["have no answer to compare with"] = len(pool) - len(labelled)
        kept = list({leak_key(q): q for q in reversed(labelled)}.values())[::-1]  # of each the first
        counts["are there under another id"] = len(labelled) - len(kept)
        kept, counts["are in --eval-data or --test-data"] = drop_overlap(kept, [*validation, *test])
        if self.teacher is not None:
            known = [q for q in kept if self.teacher.knows(q)]
            counts["are unknown to the teacher"] = len(kept) - len(known)
            kept = known
        for reason, count in counts.items():
            if count:
                log.warning("--pool: set aside %d questions that %s", count, reason)
        if not kept:
            told = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
            raise InputError(f"--pool: {self.config.pool}: no question is left: {told}")
        return [_bare(q) for q in kept], validation, test

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run has to agree with."""
        digest = hashlib.sha256()
        for some in (self.pool, self.validation, self.test):
            digest.update((repr(some) + "".join(map(later_fields, some))).encode("utf-8", "surrogatepass"))
        base = {k: v for k, v in self.base.resolved().to_dict().items() if k not in ("data", "resume")}
        return {
            "active": dataclasses.asdict(self.config),
            "train": base,
            "data_sha256": digest.hexdigest(),
            "texts_sha256": {
                name: hashlib.sha256(repr(text).encode()).hexdigest() for name, text in self.texts.items()
            },
        }

    def plan(self) -> dict[str, Any]:
        """What would be done."""
        mode = self.mode(1)
        first = self.prompts.fill("new" if mode == "new" else mode, self.pool[0], (), "..." if mode != "new" else "")
        return {
            "pool": len(self.pool),
            "validation": len(self.validation),
            "test": len(self.test),
            "task": self.task,
            "rounds_at_most": self.config.rounds,
            "questions_a_round": min(self.config.top, len(self.pool)),
            "budget_tokens": self.config.budget_tokens,
            "first_round": f"by {self.by(1)}, {mode}",
            "output_dir": str(self.path),
            "prompt": first,
        }

    def by(self, round: int) -> str:
        return "random" if round == 1 and not self.reasons else self.config.by

    def mode(self, round: int) -> str:
        """How the teacher is asked: a student that was not trained to reason has nothing to revise."""
        if (round == 1 and not self.reasons) or (self.teacher is not None and not self.teacher.revises):
            return "new"
        return self.config.revise

    def check_same(self) -> None:
        now = self.to_dict()
        path = self.path / CONFIG
        if not path.exists():
            write_text(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
            return
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            parts = [(name, before[name], now[name]) for name in ("active", "train")]
            digest = before["data_sha256"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: unreadable: {error}") from error
        for _, old, new in parts:
            for name, value in new.items():
                if name not in (FREE | FREE_OPTIONS | {*OWN}) - {"student"} and old.get(name) != value:
                    raise InputError(
                        f"{path}: the run began with --{name.replace('_', '-')} {old.get(name)!r}, now it is {value!r}"
                    )
        for name, text in now["texts_sha256"].items():
            if before.get("texts_sha256", {}).get(name, text) != text:  # runs before had none
                raise InputError(f"{path}: the run began with another text of --{name.replace('_', '-')}")
        if digest != now["data_sha256"]:
            raise InputError(f"{path}: the run began with other questions; choose another --output-dir")


def idle_options(config: ActiveConfig) -> list[str]:
    """Options that were set though nothing of this run reads them."""
    changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    idle = set(unused([config.by], [n for n in ("num_samples", "num_continuations", "ifd_form") if n in changed]))
    if not config.is_url:
        idle |= {"concurrency", "timeout", "deadline"}
    if str(config.teacher).startswith((REPLAY, teachers.ORACLE)):
        idle |= {"api", "temperature"}
    if config.revise == "new" or str(config.teacher).startswith(REPLAY):
        idle |= {"show"}
    return [name for name in changed if name in idle]


def _bare(question: Question) -> Question:
    """The question without what teachers said of it before; its label stays."""
    return dataclasses.replace(question, votes={}, positives=(), negatives=(), majority=label_of(question, None))
