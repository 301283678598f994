"""Settings of the scores that `select` and `active` choose rows by. Imports no torch."""

from __future__ import annotations

import dataclasses

from qcrd_fast.errors import InputError

ASK = ("auto", "reason", "predict", "zero-shot")
IFD_FORMS = ("loss", "ppl")
JUDGES = ("checks", "vote")  # of `quality`; others learn from the rows around a row, and a score is of the row alone


@dataclasses.dataclass(frozen=True)
class SelectOptions:
    """What the scores depend on beside the checkpoint and the row. Raises `InputError` naming the option out of range.

    num_samples: M answers a question for `answer-entropy` and `known`. num_continuations: of each prefix of the
    explanation for the inter part of `step-uncertainty`, 0 for none. inter_weight: lambda, what the inter part is
    multiplied by [nats].
    window: tokens before a step that `local-naturalness` lets it see. temperature, top_k, max_new_tokens: of every
    sample.
    ask: how the student is asked for an answer (`reason: x`, `predict: x`, or in words by its chat template; `auto` is
    settled by `select.asking.choose_ask`, and counts as `reason` where nobody did). quality: the judge of `quality`.
    block_size: questions that are scored together.
    """

    seed: int = 0
    num_samples: int = 8
    num_continuations: int = 4
    inter_weight: float = 1.0
    ifd_form: str = "loss"
    window: int = 64
    temperature: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    ask: str = "auto"
    quality: str = "checks"
    block_size: int = 64
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (
            ("num_samples", 1),
            ("num_continuations", 0),
            ("window", 1),
            ("max_new_tokens", 1),
            ("block_size", 1),
        ):
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        for name, known in (("ask", ASK), ("ifd_form", IFD_FORMS), ("quality", JUDGES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"--{name.replace('_', '-')} is one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        if not 0 <= self.inter_weight < float("inf") or not 0 < self.temperature < float("inf"):
            raise InputError("--inter-weight must be at least 0 and --temperature above 0, both finite")
