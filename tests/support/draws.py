"""Many draws, and how well they follow a distribution."""

from __future__ import annotations

import math

import torch


def draws(count):
    """(keys, counters) of as many positions of one question."""
    counter = torch.zeros(count, 3, dtype=torch.int64)
    counter[:, 0] = torch.arange(count)
    return torch.tensor([[123, 456]]).expand(count, 2), counter


def chi_square(tokens, probability_V):
    """The statistic's distance from its mean, in its standard deviations, over entries that are expected five times or
    more."""
    expected_V = probability_V * len(tokens)
    seen_V = torch.bincount(tokens, minlength=len(probability_V)).double()
    often_V = expected_V >= 5
    assert (seen_V[probability_V == 0] == 0).all()
    terms = (seen_V - expected_V)[often_V].square() / expected_V[often_V]
    freedom = int(often_V.sum()) - 1
    return (terms.sum().item() - freedom) / math.sqrt(2 * freedom)
