"""The fields view, context, critique, domain and weight: read, pooled, written, and what prompts make of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions, prepare, to_row, validate_file
from qcrd_fast.data.schema import Question, Rationale, later_fields, question_text
from qcrd_fast.errors import InputError
from qcrd_fast.evaluate import by_field
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.models.views import VIEWS, read_views, view_text
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.teacher_signal.score import ScoreSettings, _targets
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective, _prompts
from qcrd_fast.train.questions import Data
from qcrd_fast.train.teaching import ModelTeaching, asked_of
from qcrd_fast.utils.device import make_autocast


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUESTION = {"id": "q", "question": "What is 2 + 2?", "context": "Sums.", "domain": "add", "answer": "4"}


def test_fields_go_through_prepare_and_back(tmp_path):
    said = {"rationale": "2 + 2 = 4.", "answer": "4", "critique": "right"}
    other = {"rationale": "Two and two make 4.", "answer": "4", "view": "short"}
    rows = write(
        tmp_path / "rows.jsonl",
        QUESTION | {"view": "equations", "critique": "c", "samples": [said, other]},
        QUESTION | {"view": "steps", "samples": [{"rationale": "First 2, then 4.", "answer": "4"}]},
    )
    prepare(rows, tmp_path / "out.jsonl")
    [row] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [(p["text"][:5], p["view"], p.get("critique")) for p in row["positives"]] == [
        ("2 + 2", "equations", "right"), ("Two a", "short", None), ("First", "steps", None),
    ]  # fmt: skip
    assert row["context"] == "Sums." and row["domain"] == "add" and row["critique"] == "c" and "view" not in row
    read = load_questions(tmp_path / "out.jsonl")
    assert [r.view for r in read.questions[0].positives] == ["equations", "short", "steps"]
    assert not read.summary.keys_not_read


def test_an_empty_text_of_a_field_is_none(tmp_path):
    said = {"rationale": "4.", "answer": "4", "view": "", "critique": ""}
    row = QUESTION | {"view": "", "critique": "", "domain": "", "context": "", "samples": [said]}
    [question] = load_questions(write(tmp_path / "rows.jsonl", row)).questions
    assert (question.view, question.critique) == (None, None) and question_text(question) == question.question
    assert [(r.view, r.critique) for r in question.positives] == [(None, None)]
    again = write(tmp_path / "prepared.jsonl", to_row(question) | {"view": ""})
    assert load_questions(again).questions == [question]


def test_a_view_that_all_rows_share_is_the_questions(tmp_path):
    rows = write(tmp_path / "rows.jsonl", QUESTION | {"view": "steps", "samples": [{"rationale": "4.", "answer": "4"}]})
    assert load_questions(rows).questions[0].view == "steps"


@pytest.mark.parametrize(
    "fields, said",
    [({"weight": -1}, "weight expects"), ({"weight": True}, "weight expects"), ({"view": 3}, "view expects a string")],
)
def test_bad_fields_are_named(fields, said, tmp_path):
    path = write(tmp_path / "rows.jsonl", QUESTION | {"samples": []} | fields)
    [bad] = validate_file(path)
    assert said in str(bad) and str(bad).startswith(f"{path}:1: ")


def test_the_digest_of_rows_without_the_fields_is_what_it_was():
    row = Question("q", "?", positives=(Rationale("r"),))
    assert later_fields(row) == "" and "view" not in repr(row) and "weight" not in repr(row)
    assert later_fields(Question("q", "?", weight=2.0)) != later_fields(Question("q", "?", weight=3.0)) != ""
    assert later_fields(Question("q", "?", positives=(Rationale("r", view="steps"),)))


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    return Student.load(str(request.getfixturevalue(request.param)), PromptSettings())


def test_a_view_asks_for_rationales_alone(student, rows_file):
    question = load_questions(rows_file).questions[0]
    a, b = question.positives[0], Rationale("So 5.", "5", view="short")
    viewed = Question(
        "q", question.question, majority="5", view="equations", positives=(a, b), negatives=(Rationale("So 4.", "4"),)
    )
    [example] = make_examples([viewed], student, TrainConfig(reasoning_task=True, negative_source="minority"))
    assert example.predict == student.source_ids(PREDICT, question.question)
    assert example.explain == student.source_ids(EXPLAIN + VIEWS["equations"], question.question)
    assert example.positives[0].prompt is None
    assert example.positives[1].prompt == student.source_ids(EXPLAIN + VIEWS["short"], question.question)
    candidates = [*example.positives, *example.minority]
    sources, source_of = _prompts([example], candidates, [0, 0, 0])
    assert [sources[i] for i in source_of] == [example.explain, example.positives[1].prompt, example.explain]


def test_a_teacher_is_asked_in_the_view_of_what_it_scores(student, rows_file):
    question = load_questions(rows_file).questions[0]
    a, b = Rationale("So 5.", "5"), Rationale("So 6.", "6", view="short")
    viewed = dataclasses.replace(question, view="equations", positives=(a, b), negatives=())
    config = TrainConfig(method="mentor-kd", teacher="x", reasoning_task=True)
    [example] = make_examples([viewed], student, config)
    objective = Objective(student, config, None, make_autocast(student.device, False))
    asked = objective._label_asked([example]) + asked_of([example], example.positives, [0, 0])
    teacher = ModelTeaching(LocalTeacher(student), config)
    sources, _, source_of = teacher._laid_out(asked)
    prompts = [example.predict, example.reason[0], example.explain, example.positives[1].prompt]
    assert [sources[i] for i in source_of] == prompts
    found = {tuple(t.source) for t in _targets([viewed], ScoreSettings("", "", ""), student)}
    assert found == set(map(tuple, (example.predict, example.explain, example.positives[1].prompt)))


def test_what_the_student_says_is_asked_for_in_the_questions_view(student, rows_file):
    config, lagged = TrainConfig(method="opd", teacher="x"), {}
    question = dataclasses.replace(load_questions(rows_file).questions[0], view="short")
    [example] = make_examples([question], student, config)
    lagged[question.id] = Negative(student.target_ids("So 5."), "So 5.")
    objective = Objective(student, config, None, make_autocast(student.device, False))
    weighted, _ = objective.weigh(MicroBatch([example], lagged, 1))
    [asked] = asked_of([example], weighted.candidates, weighted.question)
    assert ModelTeaching(LocalTeacher(student), config).source(asked) == example.explain
    assert example.explain == student.source_ids(EXPLAIN + VIEWS["short"], question.question)


def test_a_view_in_no_table_is_named_with_its_question_before_a_run_begins(rows_file, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    test = write(tmp_path / "test.jsonl", rows[0] | {"view": "poem"})
    train = write(tmp_path / "train.jsonl", *rows[1:])
    with pytest.raises(InputError, match=r"question .*'poem' is in no table"):
        Data.load(TrainConfig(data=str(train), test_data=str(test)))


def test_questions_whose_gold_cannot_be_read_are_not_answered(rows_file, tmp_path, caplog):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    vague = [row | {"answer": "3 or 4"} for row in rows[:2]]
    test = write(tmp_path / "test.jsonl", vague[0], rows[2])
    config = TrainConfig(data=str(rows_file), test_data=str(test), task="number")
    assert [q.gold for q in Data.load(config).test] == [rows[2]["answer"]]
    assert "--test-data: left out 1 of 2 questions, whose answer cannot be read as number" in caplog.text
    with pytest.raises(InputError, match="--test-data: no answer can be read as number"):
        Data.load(dataclasses.replace(config, test_data=str(write(tmp_path / "vague.jsonl", *vague))))


def test_a_table_of_views(tmp_path, student):
    path = tmp_path / "views.yaml"
    path.write_text("steps: Slowly.\nmine: 'In verse. '\n")
    table = read_views(str(path))
    assert (
        view_text("steps", table) == "Slowly. "
        and view_text("mine", table) == "In verse. "
        and view_text(None, table) == ""
    )
    assert view_text("short", table) == VIEWS["short"]
    student.prompts = PromptSettings.from_option("raw", 64, 64, views=str(path))
    assert PromptSettings.of_state(json.loads(json.dumps(vars(student.prompts)))) == student.prompts
    with pytest.raises(InputError, match="view 'poem' is in no table"):
        student.source_ids(EXPLAIN, "2?", "poem")
    path.write_text("steps: 3\n")
    with pytest.raises(InputError, match="expected view: text"):
        read_views(str(path))


def test_a_context_is_cut_before_the_question_is(student):
    text = "Ann has 3 apples. Ann finds 4 apples."
    whole = student.source_ids(EXPLAIN, text)
    student.prompts = PromptSettings(max_source_length=len(whole) + 2)
    long = student.source_ids(EXPLAIN, "Ben has 9 pens, then loses 2 pens. " * 9 + "\n" + text)
    tail = student.text(whole).removeprefix(student.text(student.source_ids("", "explain:")))
    assert len(long) <= len(whole) + 3
    assert student.text(long).endswith(tail.strip()[-30:])


def test_accuracy_by_domain_and_view():
    records = [{"correct": c, "domain": d} for c, d in ((True, "a"), (False, "a"), (True, "b"))]
    assert by_field(records) == {"accuracy_by_domain": {"a": {"accuracy": 0.5, "n": 2}, "b": {"accuracy": 1.0, "n": 1}}}
    assert by_field([{"correct": True, "domain": "a"}]) == {}
