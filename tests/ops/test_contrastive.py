"""Qualities that are NaN: what is not selected adds nothing, whichever implementation runs."""

import pytest
import torch

from qcrd_fast import contrastive_loss
from qcrd_fast.config import SCHEMES
from tests.support.nan_qualities import CASES, expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.where}-of-{'positive' if case.positive[case.where] else 'negative'}"
)
def test_nan_qualities(case, scheme):
    """Loss, weights, selection and gradients have a NaN where, and only where, the equations have one."""
    for impl in ("eager", "torch"):
        found = case.run(scheme, impl)
        for got, want in zip(found, expected(case, scheme), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


def test_a_nan_quality_by_hand():
    """The second positive is not selected: 1/N (0.9 * 1) - 0.2 * 1/N (0.8 * (0.5 - 3))."""
    logprob, rationale = -torch.tensor([1.0, 1, 2, 2, 0.5, 0.5]), torch.tensor([0, 0, 1, 1, 2, 2])
    question, positive = torch.tensor([0, 0, 0]), torch.tensor([True, True, False])
    quality = torch.tensor([0.9, float("nan"), 0.2])
    for impl in ("eager", "torch"):
        out = contrastive_loss(logprob, rationale, question, positive, quality, impl=impl)
        assert out.loss.item() == pytest.approx(0.9 + 0.2 * 0.8 * 2.5) and out.selected_R.tolist() == [
            True,
            False,
            True,
        ]
