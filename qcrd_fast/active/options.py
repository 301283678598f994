"""Options of `active` beside `train`'s, once: name, default, meaning, range. Imports no torch."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from qcrd_fast.active.revision import REVISE, SHOW
from qcrd_fast.config import check_field, option
from qcrd_fast.errors import InputError
from qcrd_fast.select.options import IFD_FORMS
from qcrd_fast.select.registry import SELECTORS

# Of `train`, in a round: the student reasons before it answers, and the rounds are compared by `active` itself.
TRAIN_DEFAULTS: dict[str, Any] = {
    "reasoning_task": True,
    "validation_fraction": 0.0,
    "save_total_limit": 1,
    "zero_shot": False,
}
BY = tuple(name for name in SELECTORS if name != "agree")  # which is of a teacher's votes, that a pool has none of
# of `train`, which `active` sets for each round
OWN = ("data", "eval_data", "test_data", "output_dir", "resume", "student")
# of `train`, and why not
REFUSED = {
    "data": "is not for active: its questions are --pool",
    **dict.fromkeys(
        ("train_fraction", "max_samples"),
        "is not for active: --top and --budget-tokens say how many questions are used",
    ),
    "early_stopping_patience": "is not for active: its rounds end by --flat-rounds",
    "fsdp": "is not supported by active",
}
FREE = {"concurrency", "timeout", "deadline", "pool"}  # what a resumed run may change; the questions are compared


@dataclasses.dataclass(frozen=True)
class ActiveConfig:
    """Settings of an active run beside those of its training. Construction checks every value and raises
    `InputError`."""

    pool: str | None = option(
        None, "questions to choose from; each has a gold answer, or a majority", group="Active", usual=True
    )
    teacher: str | None = option(
        None,
        "who is asked: http(s)://... of an OpenAI-compatible endpoint, a folder or hub id of a local model, "
        "replay:FILE of earlier samples, or oracle:FILE of true steps",
        group="Active",
        usual=True,
    )
    teacher_model: str | None = option(None, "name of the model at an endpoint", group="Active", usual=True)
    by: str = option(
        "step-uncertainty", "the score that questions are chosen by", choices=BY, group="Active", usual=True
    )
    top: int = option(32, "B: questions chosen a round", low=1, group="Active", usual=True)
    rounds: int = option(5, "R: rounds at most", low=1, group="Active", usual=True)
    budget_tokens: int | None = option(
        None, "teacher tokens of the run at most, prompts included; a request in flight reserves what it may take",
        low=1,
        group="Active", usual=True,
    )  # fmt: skip
    round_tokens: int | None = option(
        None, "teacher tokens of one round at most; default: no such limit", low=1, group="Active"
    )
    revise: str = option(
        "repair",
        "repair: keep the student's steps before the first wrong one, the teacher goes on; rewrite: the teacher's own "
        "words where a step is wrong; new: a fresh rationale",
        choices=REVISE,
        group="Active",
        usual=True,
    )
    continue_student: bool = option(
        False,
        "train each round from the student of the last one; else from the initial one",
        group="Active",
        usual=True,
    )
    no_fault_share: float | None = option(
        0.9, "stop when the teacher finds no fault in this share of the explanations that it judged in a round; none: "
        "never",
        low=0, high=1, open_low=True, group="Active",
    )  # fmt: skip
    flat_rounds: int | None = option(
        2, "stop after this many rounds in a row whose validation accuracy was no better than the best before; none: "
        "never",
        low=1, group="Active",
    )  # fmt: skip
    show: str = option(
        "one", "one: the teacher sees the student's steps one at a time, a request each; all: in one request, which "
        "costs less",
        choices=SHOW, group="Active",
    )  # fmt: skip
    num_samples: int = option(8, "M: answers sampled a question, for the scores that need them", low=1, group="Active")
    num_continuations: int = option(
        4, "continuations of each step for step-uncertainty; 0: none", low=0, group="Active"
    )
    ifd_form: str = option("loss", "ratio of losses or of perplexities in ifd", choices=IFD_FORMS, group="Active")
    prompts: str | None = option(
        None,
        "folder whose files repair.txt, repair-all.txt, rewrite.txt, ... take the place of the built-in prompts",
        group="Active",
    )
    max_tokens: int = option(512, "longest reply of the teacher [tokens]", low=1, group="Active")
    temperature: float = option(0.0, "of the teacher's sampling", low=0, group="Active")
    api: str | None = option(
        None, "how a model is asked; default: chat, where it can", choices=("chat", "completions"), group="Active"
    )
    concurrency: int = option(8, "requests in flight at once", low=1, group="Active")
    timeout: float = option(180.0, "seconds for a whole reply", low=0, open_low=True, group="Active")
    deadline: float = option(600.0, "seconds for a request with its retries", low=0, open_low=True, group="Active")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_field(field, hints[field.name], getattr(self, field.name)))
        for name in ("pool", "teacher", "budget_tokens"):
            if getattr(self, name) is None:
                what = {
                    "pool": "FILE, the questions",
                    "teacher": "URL, PATH, replay:FILE or oracle:FILE",
                    "budget_tokens": "N",
                }[name]
                raise InputError(f"active needs --{name.replace('_', '-')} {what}")
        if self.is_url and not self.teacher_model:
            raise InputError("--teacher-model is needed: the name of the model at the endpoint")
        if self.budget_tokens is not None and self.budget_tokens <= self.max_tokens:
            raise InputError(
                f"--budget-tokens {self.budget_tokens} is not above --max-tokens {self.max_tokens}, which each "
                f"request reserves"
            )

    @property
    def is_url(self) -> bool:
        return str(self.teacher).startswith(("http://", "https://"))
