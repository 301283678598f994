"""The checks as a judge: each factor by hand, and what has the vote alone."""

import pytest

from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.quality.cases import student_case, teacher_cases
from qcrd_fast.quality.checks import FALSE, NO_EQUATION, UNTRACED, ChecksJudge
from qcrd_fast.quality.votes import vote_score

ASKED = "Ann has 3 red and 4 blue keys and gives 2 to each of 2 others. How many are left?"


@pytest.mark.parametrize(
    "chain, factor",
    [
        ("First 3 + 4 = 7. Then 2 * 2 = 4. So 7 - 4 = 3.", 1.0),
        ("First 3 + 4 = 9. Then 2 * 2 = 4. So 9 - 4 = 3.", FALSE),
        ("There are 9 - 6 = 3.", UNTRACED),
        ("First 9 - 6 = 4. So 4 - 1 = 3.", FALSE),  # a false equation says more
        ("Three are left.", NO_EQUATION),
        ("3 keys + 4 keys = $7, and 7 keys - 4 keys = 3 keys", 1.0),
    ],
)
@pytest.mark.parametrize("task", ["number", "text"])
def test_factors_by_hand(chain, factor, task):
    positives = (Rationale(chain, "3"), Rationale("other", "3"))
    asked = Question("q", ASKED, majority="3", votes={"3": 2, "5": 1}, task=task, positives=positives)
    score = ChecksJudge().scores(teacher_cases(asked)[:1])[0]
    assert score == pytest.approx(vote_score(2, 3) * (factor if task == "number" else 1.0))
    if task == "number" and factor == 1.0:
        assert ChecksJudge().scores([student_case(asked, chain)])[0] == pytest.approx(score)
