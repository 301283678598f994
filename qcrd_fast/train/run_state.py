"""The part of a run that may change while it trains."""

from __future__ import annotations

import dataclasses

from qcrd_fast.train.judging import Judges


@dataclasses.dataclass
class RunState:
    """Implementation and judges in use, shared by all parts of a run; only the trainer changes them.

    impl: implementation of the loss; torch after a failed audit. judges: of positives and negatives; the vote's after a
    discriminator that was rejected.
    """

    impl: str
    judges: Judges = dataclasses.field(default_factory=Judges)
