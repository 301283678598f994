"""What may change while a run goes on."""

from __future__ import annotations

import dataclasses

from qcrd_fast.train.judging import Judges


@dataclasses.dataclass
class RunState:
    """Shared by everything that computes in a run; the trainer alone changes it.

    impl: implementation of the loss; torch after a failed audit. judges: of positives and negatives; the vote's after a
    discriminator that was rejected.
    """

    impl: str
    judges: Judges = dataclasses.field(default_factory=Judges)
