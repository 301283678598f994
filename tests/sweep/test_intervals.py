"""Intervals that cover what they say: against closed forms, and by simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qcrd_fast.errors import InputError
from qcrd_fast.sweep.intervals import Answers, compare, crossed_variance, estimate, pair, single, student_t
from qcrd_fast.utils.intervals import wilson


@pytest.mark.parametrize(
    ("share", "freedom", "value"),  # of printed tables
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 4, 2.7764),
        (0.8, 4, 0.9410),
        (0.975, 30, 2.0423),
        (0.975, 1e6, 1.9600),
    ],
)
def test_students_t(share: float, freedom: float, value: float) -> None:
    assert student_t(share, freedom) == pytest.approx(value, rel=1e-3)
    assert student_t(1 - share, freedom) == pytest.approx(-value, rel=1e-3)


def test_one_seed_is_the_interval_of_a_mean() -> None:
    right = np.array([[1.0] * 60 + [0.0] * 40])
    found = estimate(right)
    error = np.sqrt(0.6 * 0.4 / 99)
    assert found.mean == 0.6 and found.error == pytest.approx(error)
    assert found.low == pytest.approx(0.6 - 1.984 * error, abs=0.01)
    assert found.high == pytest.approx(0.6 + 1.984 * error, abs=0.01)
    assert found.detectable == pytest.approx((1.984 + 0.845) * error, rel=1e-2)


def test_the_same_answers_differ_by_nothing() -> None:
    a_SQ = np.random.default_rng(0).random((3, 40)) < 0.5
    found = compare(a_SQ, a_SQ)
    assert (found.mean, found.low, found.high, found.detectable) == (0, 0, 0, 0)


def test_pairing_takes_out_what_questions_share() -> None:
    """Hard questions are hard for both: unpaired, the interval is several times wider."""
    random = np.random.default_rng(0)
    hard_Q = random.random(400)
    a_SQ, b_SQ = (
        np.stack([hard_Q < level + 0.01 * random.standard_normal() for _ in range(4)]) for level in (0.55, 0.5)
    )
    paired = compare(a_SQ, b_SQ)
    apart = compare(a_SQ, b_SQ[:, random.permutation(400)])
    assert paired.high - paired.low < 0.75 * (apart.high - apart.low)
    assert paired.low < 0.05 < paired.high


def test_a_constant_added_moves_the_interval_alone() -> None:
    value_SQ = np.random.default_rng(1).standard_normal((5, 50))
    a, b = estimate(value_SQ), estimate(value_SQ + 2)
    assert b.low - a.low == pytest.approx(2) and b.error == pytest.approx(a.error)
    assert estimate(value_SQ) == a  # nothing is random from call to call


@pytest.mark.parametrize(
    ("seed_noise", "question_noise", "both_noise"),
    [(0.0, 0.3, 1.0), (0.05, 0.3, 0.3), (0.2, 0.3, 0.3)],
    ids=["questions lead", "both", "seeds lead"],
)
def test_intervals_cover_the_truth_and_power_is_80(seed_noise: float, question_noise: float, both_noise: float) -> None:
    """5 seeds and 100 questions, drawn 300 times: about 95% of the intervals hold the true difference, and a true
    difference of the detectable size is found about 80% of the time."""
    random = np.random.default_rng(0)
    S, Q = 5, 100
    told = []
    for _ in range(300):
        noise_SQ = seed_noise * random.standard_normal((S, 1)) + question_noise * random.standard_normal(Q)
        told.append(estimate(noise_SQ + both_noise * random.standard_normal((S, Q)), resamples=300))
    detectable = np.mean([t.detectable for t in told])
    assert 0.92 <= np.mean([t.low <= 0 <= t.high for t in told]) <= 0.99
    assert 0.72 <= np.mean([t.low + detectable > 0 for t in told]) <= 0.9


def test_variance_of_a_crossed_design_is_unbiased() -> None:
    random = np.random.default_rng(0)
    S, Q = 6, 30
    told = [
        crossed_variance(
            0.2 * random.standard_normal((S, 1)) + 0.5 * random.standard_normal(Q) + random.standard_normal((S, Q))
        )
        for _ in range(2000)
    ]
    assert np.mean([variance for variance, _ in told]) == pytest.approx(0.04 / S + 0.25 / Q + 1 / (S * Q), rel=0.08)
    assert all(1 <= freedom <= (S - 1) * (Q - 1) + S + Q for _, freedom in told)


def test_answers_go_through_text_and_pair_by_id(tmp_path) -> None:
    records = [{"id": f"q{i}", "correct": i % 3 == 0} for i in range(11)]
    a = Answers.of(records)
    assert Answers.of(records[::-1]) == a  # order of the file does not matter
    assert Answers.from_hex(a.to_hex(), 11, a.questions) == a
    with pytest.raises(ValueError, match="16 bits for 20 questions"):
        Answers.from_hex(a.to_hex(), 20, "")
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert Answers.read(tmp_path) == a
    with pytest.raises(InputError, match="no predictions"):
        Answers.read(tmp_path / "nowhere")
    worse = Answers.of([r | {"correct": False} for r in records])
    told = pair({0: a, 1: a, 7: a}, {0: worse, 1: worse})
    assert told is not None and told.seeds == 2 and told.mean == pytest.approx(4 / 11)
    others = Answers.of([{"id": "else", "correct": True}])
    assert pair({0: a}, {0: others}) is None and pair({0: a}, {1: a}) is None and single({0: a, 1: others}) is None
    assert single({0: a, 3: a}).mean == pytest.approx(4 / 11)


def test_an_accuracy_has_one_interval_wherever_it_is_shown() -> None:
    def answers(right: int, n: int) -> Answers:
        return Answers.of([{"id": str(i), "correct": i < right} for i in range(n)])

    for right, n in ((0, 12), (12, 12), (5, 12), (0, 1)):
        one = single({0: answers(right, n)})
        assert (one.low, one.high) == pytest.approx(wilson(right / n, n))
    none = single({0: answers(0, 12), 1: answers(0, 12)})
    assert none.low == 0 and none.high == pytest.approx(0.2425, abs=1e-4)  # not 0 to 0
    few = single({0: answers(1, 24), 1: answers(0, 24), 2: answers(2, 24)})
    assert 0 <= few.low < few.mean < few.high <= 1


def test_shapes_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="got shape"):
        estimate([])
    with pytest.raises(ValueError, match="same seeds and questions"):
        compare([[1, 0]], [[1, 0, 1]])
