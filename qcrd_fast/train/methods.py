"""The table of training methods. Their names are `config.METHODS`.

A new method is a name there and a row of `METHODS`: the weights of a question's rationales, or a loss of its own in
`train.objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qcrd_fast.config import TrainConfig

REDI_BETA = 0.8  # arXiv 2505.24850
Weights = tuple[list[float], list[float]]  # of a question's positives, of its minority; the rest weighs nothing


def no_rationale(share: float, positives: int, minority: int) -> Weights:
    return [], []


def first_positive(share: float, positives: int, minority: int) -> Weights:
    return [share], []


def all_positives(share: float, positives: int, minority: int) -> Weights:
    return [share / max(positives, 1)] * positives, []


def all_rationales(share: float, positives: int, minority: int) -> Weights:
    return [share / max(positives, 1)] * positives, [share / max(minority, 1)] * minority


class Method(NamedTuple):
    """weights: (1/N, number of positives, of minority rationales) -> the weights l has for each of a question's
    rationales.

    beta: of the negatives among them, whose term has no margin. warmup: the weights of the first `--redi-warmup` of the
    steps.
    """

    weights: Callable[[float, int, int], Weights] = no_rationale
    beta: float = 0.0
    warmup: Callable[[float, int, int], Weights] | None = None
    contrastive: bool = False  # the weights come from scoring all candidates first (Eq. 3)
    mutual_information: bool = False  # a loss of its own
    teaches_rationales: bool = True
    samples_student: bool = False  # unless --negative-source is of the teacher alone
    default_label: str | None = None  # gold, majority; None: gold where known, else the majority


METHODS = {
    "qcrd": Method(contrastive=True, samples_student=True),
    "sft-all": Method(all_positives),
    "dss": Method(first_positive),
    "finetune": Method(teaches_rationales=False, default_label="gold"),
    "single-task": Method(teaches_rationales=False, default_label="majority"),
    "mi": Method(mutual_information=True),
    "redi": Method(all_rationales, beta=REDI_BETA, warmup=first_positive),
}


def method_of(config: TrainConfig) -> Method:
    return METHODS[config.method]


def samples_student(config: TrainConfig) -> bool:
    """Whether the run draws negatives from its student."""
    return method_of(config).samples_student and config.effective("negative_source") in ("lagged", "fixed")


def has_discriminator(config: TrainConfig) -> bool:
    """Whether the run trains a discriminator: one of its qualities is its score."""
    return "discriminator" in config.qualities


def label_kind(config: TrainConfig) -> str | None:
    """gold, majority, or None: gold where known, else the majority."""
    return config.label or method_of(config).default_label
