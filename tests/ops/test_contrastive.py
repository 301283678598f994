"""Qualities that are NaN: what is not selected adds nothing, whichever implementation runs."""

import pytest
import torch

from qcrd_fast import contrastive_loss, losses
from qcrd_fast.config import SCHEMES
from qcrd_fast.ops.selection import SELECTIONS, Selection
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


def test_a_selection_is_added_in_two_files(monkeypatch, float64):
    """A name in `config` and a row of `ops.selection`: the oracle and the torch implementation both run it.

    The mean over the active negatives, weighted by quality; by hand: negatives of l = 1, 2 and 5 with delta = 3.
    """
    monkeypatch.setattr(losses, "NEGATIVE_SELECT", (*losses.NEGATIVE_SELECT, "wmean-active"))
    monkeypatch.setitem(SELECTIONS, "wmean-active", Selection(single=False, active_only=True, by_quality=True))
    quality = torch.tensor([0.9, 0.2, 0.6, 0.1])
    found = []
    for impl in ("eager", "torch", "auto"):
        logprob = -torch.tensor([1.0, 1.0, 2.0, 5.0])
        logprob.requires_grad_()
        out = contrastive_loss(
            logprob, torch.arange(4), torch.zeros(4).long(), torch.tensor([True, False, False, False]), quality,
            positive_select="min", negative_select="wmean-active", beta=0.2, delta=3.0, impl=impl,
        )  # fmt: skip
        out.loss.backward()
        found.append((out.loss.item(), logprob.grad))
        negative = (0.8 * (1 - 3) + 0.4 * (2 - 3)) / (0.8 + 0.4)
        assert out.loss.item() == pytest.approx(0.9 - 0.2 * negative, rel=1e-12)
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=0)
