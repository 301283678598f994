"""Weights of single tokens: L = -sum_t n_t sg(w_t) log p_t, w a function of the student's log-probs and of a teacher's.

w = 1 is the plain term. Weights are detached: the gradient is that of a weighted log-likelihood. n_t, the normaliser,
is the caller's (`train.methods`). Suffixes: T tokens, R rationales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # `train.methods` is read without torch
    from torch import Tensor


class TokenScores(NamedTuple):
    """What weights are made of; all detached.

    logprob_T: the student's log p of each token [nats]. other_T: a teacher's or a reference's, 0 where there is none.
    rationale_T: which rationale a token belongs to. positive_R: labels and positives, not negatives. b: --npo-beta.
    """

    logprob_T: Tensor
    other_T: Tensor
    rationale_T: Tensor
    positive_R: Tensor
    b: float = 0.1


TokenWeights = Callable[[TokenScores], "Tensor"]


def probability(scores: TokenScores) -> Tensor:
    """p_t: DFT, arXiv 2508.05629."""
    return scores.logprob_T.exp()


def advantage(scores: TokenScores) -> Tensor:
    """a_t = log pi_T - log pi_S. Over tokens that the student samples, E[-a_t grad log pi_S] is the gradient of
    KL(pi_S || pi_T) at each place."""
    return scores.other_T - scores.logprob_T


def preference(scores: TokenScores) -> Tensor:
    """2 sigmoid(b r) for the tokens of a negative, r = log(pi / pi_ref) of all of it; 1 for the others: NPO, arXiv
    2404.05868.

    A negative of |r| tokens enters with minus its weight, so that its gradient is that of (2 / b) log(1 + (pi /
    pi_ref)^b), divided by |r| as every other term is.
    """
    weight_R = 2 * (scores.b * log_ratio(scores)).sigmoid()
    return weight_R.masked_fill(scores.positive_R, 1.0)[scores.rationale_T]


def log_ratio(scores: TokenScores) -> Tensor:
    """log(pi / pi_ref) of each rationale [R]: summed over its tokens."""
    ratio_T = scores.logprob_T - scores.other_T
    return ratio_T.new_zeros(len(scores.positive_R)).index_add(0, scores.rationale_T, ratio_T)
