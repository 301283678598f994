"""The table of selections (Table 5 of the paper) and their properties. Names and schemes are in `config`.

A new selection is a name in `config` and a row of `SELECTIONS`: the oracle and the torch implementation read its
properties.

Shape suffix: R rationales.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Properties of one selection."""

    single: bool  # one candidate; else a mean of all
    order: int = 1  # 1: the largest -log p wins, -1: the smallest
    active_only: bool = False  # candidates are negatives inside the margin
    random: bool = False  # the largest keyed hash wins
    by_quality: bool = False  # the mean is weighted by quality
    soft: bool = False  # and by exp(order * l / SOFTMIN_TEMPERATURE)
    kernel: bool = False  # `csrc_triton.contrastive` has it; else it runs in torch on a GPU too


SELECTIONS = {
    "min": Selection(single=True, order=-1, kernel=True),
    "max": Selection(single=True, kernel=True),
    "max-active": Selection(single=True, active_only=True, kernel=True),
    "sampling": Selection(single=True, random=True, kernel=True),
    "mean": Selection(single=False, kernel=True),
    "wmean": Selection(single=False, by_quality=True, kernel=True),
    "softmin": Selection(single=False, order=-1, by_quality=True, soft=True, kernel=True),
}
SOFTMIN_TEMPERATURE = 0.2  # nats/token; towards 0 it is min, towards infinity wmean
MASK64 = 2**64 - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64


def sampling_score(seed: int, key: int, iteration: int, is_positive: bool, rank: int) -> int:
    """Return a 24-bit hash of the arguments; the candidate with the largest hash is sampled."""
    state = 0
    for word in (seed, iteration, key, 2 * rank + (not is_positive)):
        state = (state ^ (word & MASK64)) + GOLDEN & MASK64
        state = (state ^ state >> 30) * MIX_1 & MASK64
        state = (state ^ state >> 27) * MIX_2 & MASK64
        state ^= state >> 31
    return state >> 40


def signed(x: int) -> int:
    """Return the int64 with the lowest 64 bits of `x`."""
    return x if -(2**63) <= x < 2**63 else (x + 2**63) % 2**64 - 2**63


def sampling_scores(seed: int, key_R: Tensor, iteration: int, question_R: Tensor, positive_R: Tensor) -> Tensor:
    """Return `sampling_score` of every rationale, fp32 [R], ranked within its question and class."""
    return _sampling_scores(signed(seed), key_R, signed(iteration), question_R, positive_R)


# int64 that wraps around is nothing for a compiler
@torch.library.custom_op("qcrd_fast::sampling_scores", mutates_args=())
def _sampling_scores(seed: int, key_R: Tensor, iteration: int, question_R: Tensor, positive_R: Tensor) -> Tensor:
    R = len(question_R)
    group_R = 2 * question_R + ~positive_R
    order_R = torch.argsort(group_R, stable=True)
    sorted_R = group_R[order_R]
    rank_R = torch.empty_like(order_R)
    rank_R[order_R] = torch.arange(R, device=order_R.device) - torch.searchsorted(sorted_R, sorted_R)

    def shifted(x_R: Tensor, bits: int) -> Tensor:  # a logical shift; int64's is arithmetic
        return (x_R >> bits) & (2 ** (64 - bits) - 1)

    state_R = torch.zeros_like(key_R)
    for word in (seed, iteration, key_R, 2 * rank_R + ~positive_R):
        state_R = (state_R ^ word) + signed(GOLDEN)
        state_R = (state_R ^ shifted(state_R, 30)) * signed(MIX_1)
        state_R = (state_R ^ shifted(state_R, 27)) * signed(MIX_2)
        state_R = state_R ^ shifted(state_R, 31)
    return shifted(state_R, 40).float()


@_sampling_scores.register_fake
def _(seed: int, key_R: Tensor, iteration: int, question_R: Tensor, positive_R: Tensor) -> Tensor:
    return key_R.new_empty(question_R.shape, dtype=torch.float32)
