"""Revisions: what is kept byte for byte, what is learnt from, and that a verdict is read or counted, never guessed."""

from __future__ import annotations

import pytest

from qcrd_fast.active.prompts import Prompts, read_verdict
from qcrd_fast.active.revision import Explanation, Outcome, revise, to_question
from qcrd_fast.collect.reply import Choice
from qcrd_fast.data.load import load_questions, to_row, write_prepared
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError

QUESTION = Question("q", "Ann has 3 bags of 4 apples and eats 5. How many are left?", gold="7", task="number")
#           three steps, of which the second is wrong; with two spaces, a line break and a tab that have to stay
STEPS = ("Ann has 3 * 4 = 12 apples.", "  She eats 5:\t12 - 5 = 8.", "\nSo 8 are left.")
SAID = Explanation("".join(STEPS), "8")
WRONG = "wrong: 12 - 5 is 7\nShe eats 5: 12 - 5 = 7.\nSo 7 are left.\nAnswer: 7"


def talk(
    replies: list[str], said: Explanation = SAID, mode: str = "repair", question: Question = QUESTION, show: str = "one"
) -> tuple[Outcome, list]:
    """The outcome of a conversation in which the teacher says these replies, and the requests."""
    conversation = revise(question, said, mode, Prompts(), show)
    request, asked = next(conversation), []
    for reply in replies:
        asked.append(request)
        try:
            request = conversation.send(Choice(reply))
        except StopIteration as end:
            assert len(asked) == len(replies)
            return end.value, asked
    raise AssertionError("the conversation waits for more")


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_repair_keeps_the_steps_before_the_wrong_one_to_the_byte(wrong):
    outcome, asked = talk(["right"] * wrong + [WRONG])
    before = "".join(STEPS[:wrong])
    assert outcome.text.encode().startswith(before.encode())
    assert outcome.text[len(before) :].lstrip() == "She eats 5: 12 - 5 = 7.\nSo 7 are left."
    assert outcome.text[len(before) :][:1].isspace() == bool(wrong)  # and what stood between
    assert (outcome.result, outcome.wrong_step, outcome.right_steps) == ("kept", wrong + 1, wrong)
    assert (outcome.answer, outcome.critique) == ("7", "12 - 5 is 7")
    assert [request.purpose for request in asked] == ["revise"] * (wrong + 1)


def test_a_teacher_sees_one_step_at_a_time():
    _, asked = talk(["right", "right", WRONG])
    for i, request in enumerate(asked):
        for k, step in enumerate(STEPS):
            assert (step.strip() in request.prompt) == (k <= i)
        assert ("Answer: 8" in request.prompt) == (i == 2)  # the answer is judged with the last step
        assert QUESTION.question in request.prompt


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_all_steps_in_one_request_give_the_same_repair(wrong):
    outcome, [request] = talk([WRONG.replace("wrong:", f"Wrong {wrong}:")], show="all")
    one_by_one, _ = talk(["right"] * (wrong - 1) + [WRONG])
    told = [f"{i}. {step.strip()}" for i, step in enumerate(STEPS, 1)]
    assert "\n".join([*told, "Answer: 8"]) in request.prompt
    assert outcome.text.encode() == one_by_one.text.encode() and outcome.text.startswith("".join(STEPS[: wrong - 1]))
    assert (outcome.wrong_step, outcome.critique, outcome.result) == (wrong, "12 - 5 is 7", "kept")


@pytest.mark.parametrize("number", ["", " 0", " 4", " 12345"])
def test_a_verdict_about_no_step_that_was_shown_is_none(number):
    outcome, _ = talk([WRONG.replace("wrong:", f"wrong{number}:")], show="all")
    assert (outcome.result, outcome.wrong_step, outcome.text) == ("unreadable verdict", None, None)
    assert talk(["right"], Explanation("3 * 4 = 12. 12 - 5 = 7.", "7"), show="all")[0].result == "no fault"


def test_a_rewrite_has_nothing_of_the_students():
    outcome, _ = talk(["right", WRONG], mode="rewrite")
    assert outcome.text == "She eats 5: 12 - 5 = 7.\nSo 7 are left."
    assert (outcome.mode, outcome.wrong_step, outcome.result) == ("rewrite", 2, "kept")


def test_a_fresh_rationale_shows_nothing_of_the_students():
    outcome, [request] = talk(["3 * 4 = 12. 12 - 5 = 7.\nAnswer: 7"], mode="new")
    assert not any(step.strip() in request.prompt for step in STEPS)
    assert (request.purpose, outcome.text, outcome.result, outcome.wrong_step) == (
        "label",
        "3 * 4 = 12. 12 - 5 = 7.",
        "kept",
        None,
    )


@pytest.mark.parametrize(
    "said", [Explanation("", None), Explanation("Ann has 12 apples.", None), Explanation(" \n", "7")]
)
def test_what_cannot_be_revised_gets_a_fresh_rationale(said):
    outcome, [request] = talk(["3 * 4 = 12. 12 - 5 = 7.\nAnswer: 7"], said)
    assert (request.purpose, outcome.mode, outcome.result) == ("label", "new", "kept")


def test_no_fault_makes_the_students_own_a_positive():
    own = Explanation("3 * 4 = 12. 12 - 5 = 7.", "7.0")
    outcome, _ = talk(["right", "Right."], own)
    assert (outcome.result, outcome.text, outcome.answer, outcome.wrong_step) == ("no fault", own.text, "7.0", None)
    row = to_question(QUESTION, outcome)
    assert (row.positives[0].source, row.negatives) == ("student", ())


def test_a_fault_that_the_teacher_missed_is_no_positive():
    outcome, _ = talk(["right", "right", "right"])
    assert (outcome.result, outcome.text, outcome.is_positive) == ("fault missed", None, False)


@pytest.mark.parametrize(
    "reply, result",
    [
        ("wrong: no\nShe has 8.\nAnswer: 8", "another answer"),
        ("wrong: no\nShe eats some of them.", "no answer"),
        ("wrong", "no answer"),
        ("The step is wrong because 12 - 5 = 7.\nAnswer: 7", "unreadable verdict"),
        ("maybe\nAnswer: 7", "unreadable verdict"),
        ("", "unreadable verdict"),
    ],
)
def test_what_is_not_kept_is_counted(reply, result):
    outcome, _ = talk(["right", reply])
    assert (outcome.result, outcome.is_positive) == (result, False)


def test_a_repair_that_changes_nothing_is_no_revision():
    own = Explanation("3 * 4 = 12. 12 - 5 = 7.", "7")
    outcome, _ = talk(["right", "wrong: style\n12 - 5 = 7.\nAnswer: 7"], own)
    assert outcome.result == "unchanged"


@pytest.mark.parametrize(
    "rest",
    [
        "She eats 5: 12 - 5 = 7. So 7 are left.",
        "Ann has 3 * 4 = 12 apples. She eats 5: 12 - 5 = 7. So 7 are left.",
        "Step 1: ann has  3 * 4 = 12 apples.\nStep 2: She eats 5: 12 - 5 = 7.\nStep 3: So 7 are left.",
    ],
)
def test_steps_that_the_teacher_repeats_stand_once(rest):
    outcome, _ = talk(["right", f"wrong: no\n{rest}\nAnswer: 7"])
    assert (
        outcome.text.count("12 apples") == 1
        and outcome.text.startswith(STEPS[0])
        and outcome.text.endswith("So 7 are left.")
    )


@pytest.mark.parametrize(
    "reply, right, why",
    [
        ("right", True, ""),
        (" Right. ", True, ""),
        ("**Correct**", True, ""),
        ("right\n\nThe step multiplies bags by apples.", True, ""),
        ("<think>Is it wrong? wrong: no</think>\nright", True, ""),
        ("wrong", False, ""),
        ("Wrong: it is 7.", False, "it is 7."),
        ("**wrong**: it is 7.", False, "it is 7."),
        ("incorrect - it is 7", False, "it is 7"),
        ("right\nwrong: it is 7", None, ""),
        ("not right", None, ""),
        ("right, but it could be shorter", None, ""),
        ("The step is right.", None, ""),
        ("wrong or right", None, ""),
        ("yes", None, ""),
        ("", None, ""),
        ("<think>right", None, ""),
        ("\u0000\u0000", None, ""),
    ],
)
def test_a_verdict_is_read_exactly_or_not_at_all(reply, right, why):
    assert read_verdict(reply)[::2][:2] == (right, why)


def test_a_row_marks_the_wrong_step_and_keeps_the_verdict(tmp_path):
    outcome, _ = talk(["right", WRONG])
    row = to_question(QUESTION, outcome)
    assert row.positives[0].text == outcome.text
    [negative] = row.negatives
    assert (negative.text, negative.wrong_step, negative.critique) == (SAID.text, 2, "12 - 5 is 7")
    path = tmp_path / "rows.jsonl"
    write_prepared(path, [to_row(row)])
    [read] = load_questions(path).questions
    assert (read.positives[0].text, read.negatives) == (row.positives[0].text, row.negatives)


@pytest.mark.parametrize("value", ["2", 0, True, 1.5])
def test_a_wrong_step_that_is_no_number_is_refused(tmp_path, value):
    outcome, _ = talk(["right", WRONG])
    row = to_row(to_question(QUESTION, outcome))
    row["negatives"][0]["wrong_step"] = value
    write_prepared(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: negatives\[0\]: wrong_step"):
        load_questions(tmp_path / "rows.jsonl")


def test_prompts_come_from_files(tmp_path):
    (tmp_path / "repair.txt").write_text("Q {question} K {kept} S {step}", encoding="utf-8")
    prompts = Prompts(str(tmp_path))
    text = prompts.fill("repair", Question("q", "What is {step}?", context="C."), ["a", "b"], "{kept}")
    assert text == "Q C.\nWhat is {step}? K These steps are right:\na\nb S {kept}"  # what is put in is not read again
    assert "{" not in prompts.fill("new", QUESTION) and "Answer: " in prompts.fill("new", QUESTION)
    (tmp_path / "repair.txt").write_text("Q {question}", encoding="utf-8")
    with pytest.raises(InputError, match=r"repair\.txt does not contain \{step\}"):
        Prompts(str(tmp_path))
    with pytest.raises(InputError, match=r"holds none of repair\.txt"):
        Prompts(str(tmp_path / "none"))
