"""The table of training methods. Their names are `config.METHODS`.

A new method is a name there and a row of `METHODS`: the weights of a question's rationales, weights of their tokens
(`train.token_weights`), or a loss of its own in `train.objective`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qcrd_fast.config import TEACHER_OPTIONS, MethodOptions, TrainConfig
from qcrd_fast.errors import InputError
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


# Who teaches beside the rows, and the options that name it:
# scores    how likely tokens are, of a local model or a server
# weights   whole distributions, of local weights
# mentor    the likeliest tokens of distributions, in files or of local weights
# self      the student itself, with a rationale before the question
TEACHERS: dict[str | None, tuple[str, ...]] = {
    "scores": ("teacher", "teacher_model"),
    "weights": ("teacher",),
    "mentor": ("teacher", "teacher_logprobs"),
    "self": (),
    None: (),
}


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
    teacher: str | None = None  # one of `TEACHERS`
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
    "opd": Method(token_weights=token_weights.advantage, samples_student=True, on_policy=True, teacher="scores"),
    "sdft": Method(token_weights=token_weights.advantage, samples_student=True, on_policy=True, teacher="self"),
    "mentor-kd": Method(all_positives, teacher="mentor"),
    "gkd": Method(all_positives, teacher="weights", divergence=True),
}


def method_of(config: MethodOptions) -> Method:
    return METHODS[config.method]


def each_with_its_teacher(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Configs of several methods that share their options, each with those of a teacher alone that it takes.

    Raises `InputError` as `check_teacher`, for one that none takes too.
    """
    taken = {name for config in configs for name in TEACHERS[method_of(config).teacher]}
    found = []
    for config in configs:
        others: dict[str, Any] = dict.fromkeys(taken.difference(TEACHERS[method_of(config).teacher]))
        found.append(dataclasses.replace(config, **others))
        check_teacher(found[-1])
    return found


def check_teacher(config: TrainConfig) -> None:
    """Raises `InputError` for a method without the teacher that its row needs, and for one that it cannot ask."""
    name, kind, url = config.method, method_of(config).teacher, config.teacher_is_url
    for option in TEACHER_OPTIONS:
        if getattr(config, option) is not None and option not in TEACHERS[kind]:
            flag = "--" + option.replace("_", "-")
            others = [other for other, method in METHODS.items() if option in TEACHERS[method.teacher]]
            who = {None: "learns from the rows alone", "self": "is taught by the student itself"}
            why = who.get(kind, f"takes {' or '.join('--' + o.replace('_', '-') for o in TEACHERS[kind])}")
            raise InputError(f"{flag}: --method {name} {why}; leave it out, or choose --method {' or '.join(others)}")
    if kind == "scores" and not config.teacher:
        raise InputError(
            f"--method {name} needs --teacher: a model with the student's tokenizer, or the URL of a server that "
            "scores prompts"
        )
    if kind == "weights" and (not config.teacher or url):
        raise InputError(f"--method {name} needs --teacher PATH: local weights of a model with the student's tokenizer")
    if config.teacher_model and not url:
        raise InputError("--teacher-model needs a server: give its URL as --teacher, or leave --teacher-model out")
    if config.mentor_kd_literal and kind != "mentor":
        raise InputError(f"--mentor-kd-literal is for --method mentor-kd, not {name}")
    if kind == "self" and config.teacher_ema < 1 and config.use_peft:
        raise InputError("--teacher-ema must be 1 with --use-peft, whose teacher is the frozen base model")
    if kind == "mentor" and config.kd_lambda:
        if bool(config.teacher) == bool(config.teacher_logprobs):
            raise InputError(
                f"--method {name} needs either --teacher-logprobs DIR, which score-teacher writes, or --teacher, a "
                f"local model; {'both' if config.teacher else 'neither'} is given"
            )
        if url:
            raise InputError(
                f"--method {name} asks no server while it trains: qcrd-fast score-teacher --teacher URL, then "
                "--teacher-logprobs DIR"
            )
        if config.mentor_kd_literal and not config.teacher:
            raise InputError(
                "--mentor-kd-literal needs --teacher, a local model: --teacher-logprobs has no padding in it"
            )


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
