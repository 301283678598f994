"""AUC, its interval and calibration, against pairs counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qcrd_fast.discriminator import metrics
from qcrd_fast.discriminator.metrics import auc, auc_within, calibration, interval, question_weights, score_report


def pairs(score, positive, weight=None):
    """AUC as its definition says, pair by pair."""
    weight = np.ones(len(score)) if weight is None else weight
    won = total = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            w = weight[i] * weight[j]
            total, won = total + w, won + w * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    return won / total


def test_auc_counts_pairs_with_ties_and_weights() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4  # many ties
    weight = rng.integers(0, 3, (5, 40)).astype(float)
    assert auc(score, positive) == pytest.approx(pairs(score, positive), abs=1e-12)
    assert auc(score, positive, weight) == pytest.approx([pairs(score, positive, w) for w in weight], abs=1e-12)
    assert (
        auc([0.1, 0.9], [False, True]) == 1
        and auc([0.9, 0.1], [False, True]) == 0
        and auc([1, 1], [False, True]) == 0.5
    )


def test_without_a_pair_there_is_no_auc() -> None:
    for score, positive in (([], []), ([0.5], [True]), ([0.2, 0.3], [False, False])):
        told = score_report(score, positive, [str(i) for i in range(len(score))])
        assert told["auc"] is None and told["auc_95"] is None and told["auc_within_questions"] is None
        assert told["questions"] == len(score)


def test_the_interval_resamples_whole_questions() -> None:
    weight = question_weights(["a", "b", "a", "c"], resamples=500)
    assert weight.shape == (500, 4) and (weight[:, 0] == weight[:, 2]).all()
    assert (weight[:, 0] + weight[:, 1] + weight[:, 3] == 3).all()
    rng = np.random.default_rng(1)
    positive, question = rng.random(300) < 0.5, [str(i // 3) for i in range(300)]
    score = rng.random(300) + 0.4 * positive
    told = score_report(score, positive, question)
    low, high = told["auc_95"]
    assert low < told["auc"] < high and 0.05 < high - low < 0.2
    assert score_report(score, positive, question) == told  # seeded
    copied = [q for q in question for _ in range(4)]  # four copies of a rationale tell nothing new: the interval stays
    again = score_report(np.repeat(score, 4), np.repeat(positive, 4), copied)["auc_95"]
    assert again == pytest.approx([low, high], abs=1e-9)
    assert interval([0.5, np.nan]) == [0.5, 0.5] and interval([np.nan]) is None


def test_many_rationales_are_resampled_in_chunks(monkeypatch) -> None:
    score, positive, question = np.arange(30) % 7 / 7, np.arange(30) % 2 == 0, [str(i // 2) for i in range(30)]
    whole = score_report(score, positive, question)["auc_95"]
    monkeypatch.setattr(metrics, "MAX_CELLS", 30 * 64)
    assert len(metrics.auc_resampled(score, positive, question, resamples=100)) == 100
    assert score_report(score, positive, question)["auc_95"] == pytest.approx(whole, abs=0.05)


def test_within_questions_each_question_counts_once() -> None:
    score = [0.9, 0.1, 0.2, 0.8, 0.3, 0.5]
    positive = [True, False, True, False, False, True]
    # a: 1, b: 0, c has no pair
    assert auc_within(score, positive, ["a", "a", "b", "b", "b", "c"]) == pytest.approx(0.5)


def test_calibration_by_hand() -> None:
    told = calibration([0.05, 0.95, 0.95, 1.0], [False, True, False, True])
    assert [(row["n"], row["share_positive"]) for row in told["reliability"]] == [(1, 0), (3, 2 / 3)]
    assert told["expected_calibration_error"] == pytest.approx(0.25 * 0.05 + 0.75 * abs((0.95 + 0.95 + 1) / 3 - 2 / 3))
    assert calibration([], [])["expected_calibration_error"] is None
