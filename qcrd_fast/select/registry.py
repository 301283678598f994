"""The scores that rows are chosen by, once: name, direction, what they are of, what they need. Imports no torch.

A new score is a function of a `Block` and a row of `SELECTORS`. Step uncertainty is after ELAD (arXiv 2402.13098), of
which only the abstract and the captions could be had: the formulas are ours.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from qcrd_fast.config import nearest
from qcrd_fast.errors import InputError


@dataclasses.dataclass(frozen=True)
class Selector:
    """A score. `score` maps a `Block` of rows to one value a row (`per` question), or to one list a row with a value
    for each of its positives (`per` rationale); None where a row cannot be scored.

    higher_is_chosen: which end of the scores `--top` takes. needs_samples: M sampled answers of the student. at_most:
    rows and rationales above it are never chosen by `--top`.
    """

    name: str
    higher_is_chosen: bool
    per: Literal["question", "rationale"]
    needs_student: bool
    needs_samples: bool
    score: Callable[[Any], Sequence[Any]]
    about: str
    at_most: float | None = None
    options: tuple[str, ...] = ()  # of `SelectOptions`, that this score alone reads; see `unused`


def _later(module: str, function: str) -> Callable[[Any], Sequence[Any]]:
    """A function that loads its module, and torch, when it is first called."""

    def call(block: Any) -> Sequence[Any]:
        found: Sequence[Any] = getattr(importlib.import_module(f"qcrd_fast.select.{module}"), function)(block)
        return found

    return call


def _rows(*selectors: Selector) -> dict[str, Selector]:
    return {selector.name: selector for selector in selectors}


# name, higher is chosen, per, needs a student, needs samples
SELECTORS: dict[str, Selector] = _rows(
    Selector("random", True, "question", False, False, _later("votes", "random"),
    "a keyed random number: the baseline"),
    Selector(
        "answer-entropy", True, "question", True, True, _later("uncertainty", "answer_entropy"),
        "entropy of the student's sampled answers [nats]",
    ),
    Selector(
        "step-uncertainty", True, "question", True, False, _later("uncertainty", "step_uncertainty"),
        "how much the student's answer moves with each step of its explanation (after ELAD, formulas ours)",
        options=("num_continuations", "inter_weight", "temperature", "top_k", "max_new_tokens"),
    ),
    Selector(
        "ifd", True, "rationale", True, False, _later("likelihood", "ifd"),
        "how little the question helps to predict the rationale (instruction-following difficulty); above 1 is dropped",
        at_most=1.0, options=("ifd_form",),
    ),
    Selector(
        "known", False, "question", True, True, _later("uncertainty", "known"),
        "share of the student's samples that give the majority's answer",
    ),
    Selector("agree", False, "question", False, False, _later("votes", "agree"),
    "largest share of the teacher's votes"),
    Selector(
        "naturalness", False, "rationale", True, False, _later("likelihood", "naturalness"),
        "mean log p of the rationale under the student [nats/token]",
    ),
    Selector(
        "local-naturalness", False, "rationale", True, False, _later("likelihood", "local_naturalness"),
        "the same with each step seeing a short window of what is before it", options=("window",),
    ),
    Selector("quality", True, "rationale", False, False, _later("votes", "quality"), "the weight of --quality",
    options=("quality",)),
)  # fmt: skip


_SAMPLING = ("temperature", "top_k", "max_new_tokens")


def unused(names: Sequence[str], given: Iterable[str]) -> list[str]:
    """Those of the options of `SelectOptions`, and of `views` and `device`, that no score of `names` reads."""
    read = {"seed", "block_size", "impl"}
    for selector in map(SELECTORS.__getitem__, names):
        read |= {*selector.options}
        read |= {"ask", "views", "device"} if selector.needs_student else set()
        read |= {"num_samples", *_SAMPLING} if selector.needs_samples else set()
    return [name for name in given if name not in read]


def parse_names(text: str) -> list[str]:
    """The names of `--by a,b`. Raises `InputError` for one that is not known, or given twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SELECTORS:
            raise InputError(f"--by is some of {', '.join(SELECTORS)}; got {name!r}{nearest(name, SELECTORS)}")
    if not names or len(set(names)) < len(names):
        raise InputError(f"--by needs names, each once; got {text!r}")
    return names
