"""The demo's problems, teacher and neutral text: what is taught is checked arithmetic, and soundness is judged by
hand."""

import random

import pytest

from qcrd_fast.demo import problems

ASKED = "Ann has 3 red and 4 blue keys and gives 2 to each of 2 others. How many are left?"
SOUND = "First 3 + 4 = 7. Then 2 * 2 = 4. So 7 - 4 = 3."


@pytest.mark.parametrize(
    "chain, sound, faithful",
    [
        (SOUND, True, True),
        ("Multiply: 2 * 2 = 4. Add: 4 + 3 = 7. Subtract: 7 - 4 = 3.", True, True),  # sums and factors in any order
        ("First 3 + 4 = 8. Then 2 * 2 = 5. So 8 - 5 = 3.", False, False),  # false equations
        ("There are 9 - 6 = 3.", False, False),  # numbers from nowhere
        ("First 4 - 2 = 2. So 2 + 2 = 4.", False, False),  # another answer
        ("First 4 + 2 = 6. So 6 - 3 = 3.", True, False),  # holds, but is no reason
        ("So 3.", False, False),
    ],
)
def test_soundness_by_hand(chain, sound, faithful):
    problem = problems.Problem(ASKED, ((3, "+", 4), (2, "*", 2), (7, "-", 4)))
    assert problems.is_sound(chain, ASKED, "3") is sound
    assert problems.is_faithful(chain, problem) is faithful


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_teacher_is_right_for_the_wrong_reason_as_often_as_it_is_meant_to_be(task):
    rng = random.Random(1)
    drawn = problems.draw_problems(task, 400, rng)
    assert len({p.text for p in drawn}) == 400
    right, sound = 0, 0
    for problem in drawn:
        assert problems.is_sound(
            problems.write_chain([(s, problems.result(s)) for s in problem.steps], rng),
            problem.text,
            str(problem.answer),
        )
        for chain, answer in set(problems.teach(problem, rng)):
            if answer == str(problem.answer):
                right, sound = right + 1, sound + problems.is_sound(chain, problem.text, answer)
    assert 2.5 < right / 400 < 4.5 and 0.48 < sound / right < 0.64
    again = random.Random(1)
    assert problems.draw_problems(task, 400, again) == drawn


def test_no_word_of_a_task_is_unknown_and_no_neutral_text_reasons():
    words = set(problems.vocabulary())
    rng = random.Random(9)
    for task in problems.TASKS:
        for row in problems.write_rows(task, problems.draw_problems(task, 100, rng), rng):
            text = " ".join([row["question"], *(s["rationale"] for s in row["samples"])])
            assert set(problems.WORD.findall(text)) <= words
    for _, prompt, target in problems.lookup_pairs(100, rng):
        assert not set(prompt.partition("How many")[2].split()) & {"left", "both", "all", "than", "does"}
        assert all(problems.OPERATIONS[o](a, b) == c for a, o, b, c in problems.stated_steps(target))
