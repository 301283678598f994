"""The demo: data and student of its own, two methods side by side, resumed as other runs are."""

import json
import re
from pathlib import Path

import pytest

from qcrd_fast.data.load import load_questions
from qcrd_fast.demo import comparison, runner, students
from qcrd_fast.errors import InputError

SHORT = {"max_steps": 3, "eval_steps": 2, "save_steps": 2, "seed": 2}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A demo of few questions with a student of three steps, and its cache."""
    monkeypatch.setattr(runner, "QUESTIONS", 40)
    monkeypatch.setattr(runner, "TEST_QUESTIONS", 10)
    phases = ("symbol_pairs", 2, 0), ("lookup_pairs", 1, 1)
    monkeypatch.setattr(students, "DEMO", students.Recipe("decoder", phases, 8, 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qcrd-fast" / "students"


def test_test_questions_are_not_in_the_training_set(small, tmp_path):
    paths = runner.write_demo(tmp_path / "demo", seed=1)
    train, test = (load_questions(paths[name]).questions for name in ("data", "test_data"))
    assert len(train) == 40 and len(test) == 10
    assert not {q.question for q in train} & {q.question for q in test}
    assert any(q.negatives for q in train) and all(q.gold for q in train + test)


def test_a_seed_draws_the_data_and_the_student_is_one(small, tmp_path):
    demos = [runner.write_demo(tmp_path / f"demo-{i}", seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, again, other = ([Path(paths[name]).read_bytes() for name in ("data", "test_data")] for paths in demos)
    assert first == again and first[0] != other[0] and first[1] == other[1]  # the test questions are one set
    weights = {(Path(paths["student"]) / "model.safetensors").read_bytes() for paths in demos}
    assert len(weights) == 1 and len(list(small.iterdir())) == 1  # made once, then copied


def test_pretraining_gives_the_same_student_each_time_and_learns(tmp_path):
    recipe = students.Recipe("decoder", (("symbol_pairs", 2, 0),), 4, 20)
    for name in "ab":
        students.pretrain(recipe, tmp_path / name)
    students.pretrain(recipe._replace(phases=()), tmp_path / "c")
    a, b, untrained = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != untrained


def test_a_cache_that_cannot_be_written_is_done_without(small, tmp_path, caplog):
    small.parent.parent.write_text("a file where the folder should be")
    with caplog.at_level("INFO", logger="qcrd_fast"):
        runner.write_student(tmp_path / "student")
    assert "cannot be kept" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "student"]
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_two_methods_end_to_end_and_resumed(small, tmp_path):
    from qcrd_fast.evaluate import evaluate_run, generate_text

    out = tmp_path / "run"
    alone = runner.run_demo(SHORT, str(out))
    assert [row["student"] for row in alone["comparison"]] == ["untrained", "qcrd"]
    assert alone["n"] == 10 and alone["evaluated_on"] == "test"
    both = runner.run_demo(SHORT | {"resume": "auto"}, str(out), compare="dss")
    untrained, dss, own = both["comparison"]
    assert (dss["student"], own["student"]) == ("dss", "qcrd") and own["accuracy"] == both["accuracy"] == alone[
        "accuracy"
    ]
    assert own == alone["comparison"][1] and untrained == alone["comparison"][0]
    assert all(0 <= row[name] <= 1 for row in both["comparison"] for name in comparison.MEASURES)
    told = json.loads((out / "compare" / "dss" / "eval_results.json").read_text())
    assert told["method"] == "dss" and {name: told[name] for name in comparison.MEASURES} == {
        name: dss[name] for name in comparison.MEASURES
    }
    assert runner.run_demo(SHORT | {"resume": "auto"}, str(out), compare="dss") == both
    with pytest.raises(InputError, match="not empty"):
        runner.run_demo(SHORT, str(out), compare="dss")
    page = (out / "report.html").read_text()
    assert "Answers and reasoning" in page and "untrained" in page and page.count("<svg") > 3
    again = evaluate_run(str(out), str(out / "demo" / "test.jsonl"), reasoning=True)
    assert again["accuracy"] == both["accuracy_reasoned"]
    said = generate_text(
        str(out), "Ann has 3 eggs, finds 4 and eats 2. How many are left?", max_new_tokens=8, reasoning=True
    )
    assert set(said[0]) == {"rationale", "answer"}
    text = comparison.summary_text(both, str(out))
    assert re.search(r"^dss( +[01]\.\d{3}){3}$", text, re.MULTILINE) and "--reasoning" in text


def test_without_the_reasoning_task_its_explanations_are_judged(small, tmp_path):
    results = runner.run_demo(SHORT | {"reasoning_task": False}, str(tmp_path / "run"))
    assert results["comparison"][1]["accuracy_reasoned"] is None and 0 <= results["sound_reasoning"] <= 1
    assert "--reasoning" not in comparison.summary_text(results, "run")


def test_it_brings_its_own_data(tmp_path):
    with pytest.raises(InputError, match="demo brings its own --student"):
        runner.run_demo({"student": "x"}, str(tmp_path / "run"))
    plan = runner.run_demo({}, str(tmp_path / "run"), compare="dss", dry_run=True)
    assert plan["config"]["method"] == "qcrd" and plan["compare"]["method"] == "dss"
    assert json.dumps(plan) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, compare, said",
    [
        ({"method": "opd"}, None, "--method opd needs --teacher"),
        ({}, "gkd", "--method gkd needs --teacher"),
        ({"teacher": "x"}, "dss", "--teacher: --method qcrd learns from the rows alone"),
        ({"teacher": "x"}, None, "--teacher: --method qcrd learns from the rows alone"),
        ({}, "qcrd", "method of the demo itself"),
        ({"resume": "runs/demo/checkpoint-3"}, "dss", "--resume auto continues both"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, compare, said, tmp_path):
    with pytest.raises(InputError, match=said):
        runner.run_demo(options, str(tmp_path / "run"), compare=compare)
    assert not (tmp_path / "run").exists()
