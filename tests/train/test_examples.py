"""What the loop trains on: labels, candidates, and negatives that must not contradict a positive."""

import dataclasses

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.data.splits import label_of
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.negative_store import Negative

QUESTION = Question(
    id="q",
    question="Ann has 3 eggs, finds 4 and eats 2. How many are left?",
    gold="5",
    majority="6",
    positives=(Rationale("First 3 + 4 = 7. Then 7 - 2 = 5."), Rationale("Add: 3 + 4 = 7. Subtract: 7 - 2 = 5.")),
    negatives=(Rationale("First 3 + 4 = 8. Then 8 - 2 = 6."),),
)


@pytest.fixture(scope="module")
def student(llama_folder):
    return Student.load(str(llama_folder), PromptSettings())


def test_the_label_is_gold_where_known_unless_told():
    assert label_of(QUESTION, None) == "5"
    assert label_of(dataclasses.replace(QUESTION, gold=None), None) == "6"
    assert label_of(QUESTION, "majority") == "6"


def test_candidates_are_positives_minority_and_the_students_own(student):
    example = make_examples([QUESTION], student, TrainConfig(negative_source="lagged"))[0]
    own = Negative(student.target_ids("3 + 2 = 5."), "3 + 2 = 5.")
    assert [c.source for c in example.candidates({"q": own})] == ["teacher", "teacher", "minority", "lagged"]
    assert [c.positive for c in example.candidates({"q": own})] == [True, True, False, False]
    assert len(example.candidates({"other": own})) == 3
    echo = Negative([], QUESTION.positives[1].text)  # says what a positive says
    assert "lagged" not in [c.source for c in example.candidates({"q": echo})]


def test_switches_leave_candidates_out(student):
    example = make_examples([QUESTION], student, TrainConfig(num_positives=1, negative_source="none"))[0]
    assert [c.source for c in example.candidates({})] == ["teacher"]
    by_default = {
        m: make_examples([QUESTION], student, TrainConfig(method=m))[0].candidates({}) for m in ("qcrd", "redi")
    }
    assert {m: sum(not c.positive for c in found) for m, found in by_default.items()} == {"qcrd": 0, "redi": 1}
    resolved = TrainConfig(method="redi").resolved()
    assert len(make_examples([QUESTION], student, resolved)[0].candidates({})) == 3


def test_the_reasoning_target_ends_in_the_answer(student):
    example = make_examples([QUESTION], student, TrainConfig(reasoning_task=True))[0]
    assert example.reason is not None
    text = student.text(example.reason[1])
    assert text.startswith("First 3 + 4 = 7") and text.split("Answer:")[1].strip() == "5"
