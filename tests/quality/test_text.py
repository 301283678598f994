"""The text as a judge: the regression against its own equations, folds, and what has the vote alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.quality import text
from qcrd_fast.quality.cases import student_case, teacher_cases
from qcrd_fast.quality.votes import VoteJudge, vote_score


def question(i: int) -> Question:
    """Majority chains compute; of the minority's two in three do not, and the third multiplies where it should add."""
    a, b = 3 + i % 7, 2 + i % 5
    wrong, slip = (a + b + 1, f"{a} + {b} = {a + b + 1}.") if i % 3 else (a * b, f"{a} * {b} = {a * b}.")
    return Question(
        id=f"q{i}",
        question=f"Ann has {a} eggs and finds {b}. How many are there?",
        gold=str(a + b),
        majority=str(a + b),
        votes={str(a + b): 2, str(wrong): 1},
        task="number",
        positives=(
            Rationale(f"{a} + {b} = {a + b}.", str(a + b)),
            Rationale(f"So {a} + {b} = {a + b} eggs.", str(a + b)),
        ),
        negatives=(Rationale(slip, str(wrong)),),
    )


QUESTIONS = [question(i) for i in range(80)]


@pytest.fixture(scope="module")
def judge():
    return text.TextJudge(QUESTIONS)


def test_the_regression_solves_its_equations():
    rng = np.random.default_rng(0)
    x_RF = rng.normal(size=(200, 3))
    y_R = (rng.random(200) < text.sigmoid(x_RF @ [1.0, -2.0, 0.0] + 0.5)).astype(float)
    w = text.fit_logistic(x_RF, y_R)
    residual_R = text.sigmoid(x_RF @ w[:-1] + w[-1]) - y_R
    assert np.abs(x_RF.T @ residual_R + text.RIDGE * w[:-1]).max() < 1e-6 and abs(residual_R.sum()) < 1e-5
    assert w[0] > 0.5 and w[1] < -1 and abs(w[2]) < 0.7
    apart = text.fit_logistic(np.r_[-np.ones((5, 1)), np.ones((5, 1))], np.r_[np.zeros(5), np.ones(5)])  # separable
    assert np.isfinite(apart).all() and apart[0] > 1


def test_equations_move_the_vote(judge):
    """A minority chain whose equation holds is doubted less than one whose does not, at the same vote."""
    sound, false = QUESTIONS[6], QUESTIONS[7]
    (right, wrong) = (judge.scores([teacher_cases(q)[2]])[0] for q in (sound, false))
    assert wrong < vote_score(1, 3) and wrong < right
    majority = judge.scores(teacher_cases(false)[:1])[0]
    assert majority > vote_score(2, 3)
    own = student_case(false, "Ann has 3 + 4 = 99 eggs.")  # n = 0
    assert judge.scores([own])[0] < vote_score(0, 3)


def test_half_of_the_logit_with_the_prior_taken_off(judge):
    case = teacher_cases(QUESTIONS[3])[2]
    w = judge.weights[text.fold_of("q3")]
    s = vote_score(1, 3)
    z = np.log(s / (1 - s)) + 0.5 * (np.array(text._features(case)) @ w[:-1] + w[-1])
    assert judge.scores([case]) == pytest.approx([1 / (1 + np.exp(-z))], rel=1e-12)
    kept = [c for q in QUESTIONS if text.fold_of(q.id) != text.fold_of("q3") for c in teacher_cases(q)]
    x_RF = np.array([text._features(c) for c in kept])
    center, scale = x_RF.mean(0), np.where(x_RF.std(0) > 0, x_RF.std(0), 1)
    again = text.fit_logistic((x_RF - center) / scale, np.array([float(c.agrees) for c in kept]))
    x_F = np.array(text._features(case))
    prior = np.log(2)  # 2 of 3 are the majority's
    assert x_F @ w[:-1] + w[-1] == pytest.approx(again[:-1] @ ((x_F - center) / scale) + again[-1] - prior, rel=1e-9)


def test_a_question_is_scored_by_what_other_questions_taught(judge):
    """Its own chains may say anything: what scores it does not move."""
    changed = dataclasses.replace(QUESTIONS[3], negatives=(Rationale("Nonsense, 1 + 1 = 3 and 2 + 2 = 5.", "9"),) * 1)
    other = text.TextJudge([q if q.id != "q3" else changed for q in QUESTIONS])
    fold = text.fold_of("q3")
    same = [np.array_equal(mine, theirs) for mine, theirs in zip(judge.weights, other.weights, strict=True)]
    assert same == [i == fold for i in range(text.FOLDS)]


def test_what_has_the_vote_alone(judge):
    yes_no = dataclasses.replace(QUESTIONS[0], task="yes-no", majority="yes", votes={"yes": 2, "no": 1})
    said = [Rationale("1 + 1 = 3.", "yes"), Rationale("1 + 1 = 2.", "no")]
    yes_no = dataclasses.replace(yes_no, positives=(said[0],), negatives=(said[1],))
    assert text.TextJudge([yes_no]).scores(teacher_cases(yes_no)) == [vote_score(2, 3), vote_score(1, 3)]
    few = text.TextJudge(QUESTIONS[:5])
    assert few.scores(teacher_cases(QUESTIONS[0])) == VoteJudge().scores(teacher_cases(QUESTIONS[0]))
    cut = dataclasses.replace(student_case(QUESTIONS[0], "3 + 2", cut=True), expected=0.4)
    assert judge.scores([cut]) == [0.4]
    assert text.TextJudge([]).scores([cut]) == [0.4]


def test_features_are_finite_and_as_many_as_their_names():
    for said, answer in (("", None), ("x" * 50_000, "5"), ("9" * 300 + " = 4", "1/3"), ("1 + 1 = 2\n" * 900, "-7")):
        values = text.features("How many of 3?", said, answer)
        assert len(values) == len(text.FEATURES) and np.isfinite(values).all()
