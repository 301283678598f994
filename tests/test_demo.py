"""The built-in data: what the teacher says is checked arithmetic, and the test questions are new."""

import json
import random
import re
from pathlib import Path

import pytest

from qcrd_fast import demo
from qcrd_fast.data.load import load_questions
from qcrd_fast.errors import InputError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", 60)
    monkeypatch.setattr(demo, "TEST_QUESTIONS", 10)


def test_a_right_answer_comes_with_right_steps():
    rng = random.Random(0)
    wrong = 0
    for problem in demo.draw_problems(300, rng):
        rationale, answer = demo.teach(problem, rng)
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", rationale)
        assert len(steps) == 2 and steps[1][0] == steps[0][3]  # two steps, the second from the first
        right = all(int(a) + (int(b) if sign == "+" else -int(b)) == int(c) for a, sign, b, c in steps)
        if answer == problem.answer:
            assert right and steps[0][1] == "+" and steps[1][1] == "-"
        wrong += answer != problem.answer
    assert 0.1 < wrong / 300 < 0.35  # the teacher slips now and then


def test_test_questions_are_not_in_the_training_set(small, tmp_path):
    paths = demo.write_demo(tmp_path / "demo", seed=1)
    train, test = (load_questions(paths[name]).questions for name in ("data", "test_data"))
    assert len(train) == 60 and len(test) == 10
    assert not {q.question for q in train} & {q.question for q in test}
    assert any(q.negatives for q in train) and all(q.gold for q in train + test)


def test_the_same_seed_makes_the_same_demo(small, tmp_path):
    first, second = (demo.write_demo(tmp_path / name, seed=3) for name in "ab")
    for name in ("data", "test_data"):
        assert Path(first[name]).read_text() == Path(second[name]).read_text()


def test_it_runs_end_to_end_and_answers(small, tmp_path):
    from qcrd_fast.evaluate import evaluate_run, generate_text

    out = tmp_path / "run"
    results = demo.run_demo({"max_steps": 3, "iteration_steps": 1, "seed": 2}, str(out))
    assert results["n"] == 10 and results["evaluated_on"] == "test" and results["accuracy_untrained"] == 0
    again = demo.run_demo({"max_steps": 3, "iteration_steps": 1, "seed": 2, "resume": "auto"}, str(out))
    assert again == results
    assert evaluate_run(str(out), str(out / "demo" / "test.jsonl"))["accuracy"] == results["accuracy"]
    said = generate_text(str(out), "Ann has 3 eggs, finds 4 and eats 2. How many are left?", max_new_tokens=8)
    assert set(said[0]) == {"rationale", "answer"}


def test_it_brings_its_own_data(tmp_path):
    with pytest.raises(InputError, match="demo brings its own --student"):
        demo.run_demo({"student": "x"}, str(tmp_path / "run"))
    plan = demo.run_demo({}, str(tmp_path / "run"), dry_run=True)
    assert json.dumps(plan) and not (tmp_path / "run").exists()
