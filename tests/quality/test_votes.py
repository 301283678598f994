"""The vote as a judge: the formula, what n and K are, samples without a conclusion."""

import dataclasses
import json

import pytest

from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.quality.cases import Tally, silent_share, student_case, teacher_cases
from qcrd_fast.quality.judges import make_judge
from qcrd_fast.quality.samples import load_samples
from qcrd_fast.quality.votes import VoteJudge, vote_score

QUESTION = Question(
    id="q",
    question="Ann has 3 eggs, finds 4 and eats 2. How many are left?",
    gold="5",
    majority="5",
    votes={"5": 3, "9": 1, "6": 1},
    task="number",
    positives=(Rationale("3 + 4 = 7. 7 - 2 = 5.", "5"), Rationale("7 - 2 = 5 eggs are left.")),
    negatives=(Rationale("3 + 4 + 2 = 9.", "9.0"), Rationale("All of them.", "77"), Rationale("Who knows?")),
)


def scores(question, cases):
    return make_judge("vote", [question]).scores(cases)


@pytest.mark.parametrize(
    "n, K, expected",
    [
        (1, 3, 2.25 / 8.5),
        (3, 3, 12.25 / 12.5),
        (3, 6, 0.5),
        (6, 6, 42.25 / 42.5),
        (0, 5, 0.25 / 30.5),
        (1, 1, 0.75),
        (0, 1, 0.25),
    ],
)
def test_formula(n, K, expected):
    assert vote_score(n, K) == pytest.approx(expected, rel=1e-15)


def test_teacher_rationales_take_the_rows_votes():
    found = scores(QUESTION, teacher_cases(QUESTION))
    # by value; a positive without an answer is the majority's; an answer that nobody gave, or none: no vote
    assert found == [vote_score(n, 5) for n in (3, 3, 1, 0, 0)]
    assert [case.agrees for case in teacher_cases(QUESTION)] == [True, True, False, False, None]


@pytest.mark.parametrize(
    "text, votes, agrees",
    [
        ("First 3 + 4 = 7. Then 7 - 2 = 5.", 3, True),
        ("The answer is 5.0 eggs.", 3, True),
        ("3 + 4 + 2 = 9.", 1, False),
        ("3 + 4 = 7.", 0, False),
    ],
)
def test_a_students_sample_is_judged_by_its_answer(text, votes, agrees):
    case = student_case(QUESTION, text)
    assert (case.votes, case.agrees) == (votes, agrees)
    assert scores(QUESTION, [case]) == [vote_score(votes, 5)]
    assert Tally(4, 3, 2).fill_unknown(case, 0.5) == case  # it tells itself


def test_a_cut_sample_takes_the_share_that_agrees():
    tally = Tally()
    said = ["7 - 2 = 5.", "So 5 are left.", "3 + 4 = 7.", "2 + 2 = 4.", "The answer is 5."]
    for text in said:
        tally.add(student_case(QUESTION, text))
    cut = student_case(QUESTION, "7 - 2 = 5", cut=True)  # may be the beginning of 50
    tally.add(cut)
    assert cut.agrees is None and cut.votes is None
    filled = tally.fill_unknown(cut, 0.0)
    assert scores(QUESTION, [filled]) == [3 / 5]
    assert scores(QUESTION, [Tally().fill_unknown(cut, 0.0)]) == [0.0]  # nothing is readable yet


def test_a_complete_sample_without_an_answer():
    """Where the teacher always concludes, it agrees with nobody; where the teacher often does not, some of them
    agree."""
    silent = student_case(QUESTION, "She ate them all up.")
    tally = Tally(readable=4, agree=2, silent=4)
    assert silent.agrees is None
    assert scores(QUESTION, [tally.fill_unknown(silent, 0.0)]) == [0.0]
    assert scores(QUESTION, [tally.fill_unknown(silent, 0.5)]) == [0.5]  # 2 agree aloud, so 2 of the 4 in silence
    assert scores(QUESTION, [tally.fill_unknown(silent, 1.0)]) == [1.0]
    assert silent_share([QUESTION]) == 0.0
    quiet = dataclasses.replace(QUESTION, positives=(Rationale("Two are eaten.", "5"), QUESTION.positives[0]))
    assert silent_share([quiet]) == 0.5 and silent_share([]) == 0.0


def test_rows_without_votes_and_text_answers_weigh_as_without_a_judge():
    bare = dataclasses.replace(QUESTION, votes={})
    own = student_case(bare, "7 - 2 = 5.")
    assert own.agrees is True
    assert scores(bare, [*teacher_cases(bare), own]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    text = Question(
        "t", "Why?", majority="Rain.", votes={"rain": 2, "snow": 1}, task="text", positives=(Rationale("x", "Rain"),)
    )
    own = student_case(text, "The answer is rain.")
    filled = Tally(5, 5, 0).fill_unknown(own, 0.5)
    assert (own.agrees, filled.expected) == (None, None)  # such answers cannot be compared
    assert scores(text, [*teacher_cases(text), filled]) == [vote_score(2, 3), 0.0]


def test_other_tasks():
    choice = Question(
        "c",
        "Where?\nAnswer Choices:\n(a) house\n(b) train",
        majority="train",
        votes={"train": 2, "house": 1},
        task="choice",
    )
    assert student_case(choice, "It moves, so the answer is (b).").agrees is True
    assert student_case(choice, "So the answer is (a) house.").votes == 1
    binary = Question("b", "Is it?", majority="no", votes={"no": 3}, task="yes-no")
    assert student_case(binary, "It is not. So the answer is no.").votes == 3
    equation = Question(
        "e", "Half of 84?", majority="( 84.0 / 2.0 )", votes={"( 84.0 / 2.0 )": 4, "84 - 2": 1}, task="equation"
    )
    assert student_case(equation, "Half of 84 is 84 / 2 = 42.").votes == 4
    assert student_case(equation, "84 - 2 = 82.").votes == 1


def test_a_new_judge_is_a_name_and_a_class(monkeypatch):
    from qcrd_fast.quality import judges

    class Coin:
        def __init__(self, questions):
            self.known = {q.id for q in questions}

        def scores(self, cases):
            return [float(case.question.id in self.known) for case in cases]

    monkeypatch.setitem(judges.JUDGES, "coin", Coin)
    assert make_judge("coin", [QUESTION]).scores(teacher_cases(QUESTION)) == [1.0] * 5
    assert isinstance(make_judge("vote", []), VoteJudge)


def test_samples_of_another_question_with_the_same_id_are_of_others(tmp_path):
    question = Question("1", "2+2?", majority="4", votes={"4": 3}, task="number", positives=(Rationale("So 4.", "4"),))
    path = tmp_path / "samples.jsonl"
    rows = [
        {"id": "1", "question": "3+3?", "samples": ["So 6."]},
        {"id": "9", "question": "2+2?", "samples": ["So 4.", "So 5."]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_samples(path, [question])
    assert [case.agrees for case in found.cases["1"]] == [True, False] and found.strangers == 1
