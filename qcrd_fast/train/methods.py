"""The table of training methods. Their names are `config.METHODS`.

A new method is a name there and a row of `METHODS`: the weights of a question's rationales, weights of their tokens
(`train.token_weights`), or a loss of its own in `train.objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from qcrd_fast.config import MethodOptions, TrainConfig
from qcrd_fast.train import token_weights
from qcrd_fast.train.token_weights import TokenWeights

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
    token_weights: w of L = -sum_t n_t sg(w_t) log p_t over the rationales' tokens, n_t the normaliser: a rationale's
    weight divided by its tokens, or, `on_policy`, 1 / (sampled tokens of the optimizer batch). The labels' tokens weigh
    1 always.
    """

    weights: Callable[[float, int, int], Weights] = no_rationale
    beta: float = 0.0
    warmup: Callable[[float, int, int], Weights] | None = None
    contrastive: bool = False  # the weights come from scoring all candidates first (Eq. 3)
    mutual_information: bool = False  # a loss of its own
    teaches_rationales: bool = True
    samples_student: bool = False  # unless --negative-source is of the teacher alone
    default_label: str | None = None  # gold, majority; None: gold where known, else the majority
    token_weights: TokenWeights | None = None
    on_policy: bool = False  # trains on what the student itself says now: its samples are no negatives
    # that scores: model (--teacher), self (the student with context), mentor (its distributions)
    teacher: str | None = None
    reference: bool = False  # needs the initial student's log-probs of the minority
    # of rationales: from the teacher's whole distribution; --gkd-lambda is the student's own share
    divergence: bool = False


METHODS = {
    "qcrd": Method(contrastive=True, samples_student=True),
    "sft-all": Method(all_positives),
    "dss": Method(first_positive),
    "finetune": Method(teaches_rationales=False, default_label="gold"),
    "single-task": Method(teaches_rationales=False, default_label="majority"),
    "mi": Method(mutual_information=True),
    "redi": Method(all_rationales, beta=REDI_BETA, warmup=first_positive),
    "dft": Method(all_positives, token_weights=token_weights.probability),
    "npo": Method(all_rationales, token_weights=token_weights.preference, reference=True),  # beta: --beta
    "opd": Method(token_weights=token_weights.advantage, samples_student=True, on_policy=True, teacher="model"),
    "sdft": Method(token_weights=token_weights.advantage, samples_student=True, on_policy=True, teacher="self"),
    "mentor-kd": Method(all_positives, teacher="mentor"),
    "gkd": Method(all_positives, teacher="model", divergence=True),
}


def method_of(config: MethodOptions) -> Method:
    return METHODS[config.method]


def is_on_policy(config: TrainConfig) -> bool:
    """Whether the run trains on what its student says now."""
    method = method_of(config)
    return method.on_policy or (method.divergence and config.gkd_lambda > 0)


def samples_student(config: TrainConfig) -> bool:
    """Whether the run draws rationales from its student: negatives, or what an on-policy method trains on."""
    of_its_own = method_of(config).samples_student
    return is_on_policy(config) or (of_its_own and config.effective("negative_source") in ("lagged", "fixed"))


def lag_of(config: TrainConfig) -> int:
    """j: iterations between a student and the use of what it said; an on-policy method uses it at once."""
    return 0 if is_on_policy(config) else config.negative_lag


def samples_the_first(config: TrainConfig) -> bool:
    """Whether it is the initial student that is sampled, in each iteration."""
    return config.effective("negative_source") == "fixed" and not is_on_policy(config)


def has_discriminator(config: TrainConfig) -> bool:
    """Whether the run trains a discriminator: one of its qualities is its score."""
    return "discriminator" in config.qualities


def label_kind(config: TrainConfig) -> str | None:
    """gold, majority, or None: gold where known, else the majority."""
    return config.label or method_of(config).default_label
