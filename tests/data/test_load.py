"""Reading, pooling, splitting and writing of questions; the faults of trial files; and the real teacher data."""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from qcrd_fast.data import jsonl as rows_module
from qcrd_fast.data.files import open_rows
from qcrd_fast.data.load import load_questions, validate_file, write_prepared
from qcrd_fast.data.schema import Question, Rationale, question_text
from qcrd_fast.data.splits import drop_overlap, hold_out, of_split
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.files import require_file
from tests.support.paths import DATA

SAMPLED = {
    "id": "q1",
    "question": "2 + 2?",
    "answer": "4",
    "samples": [
        {"rationale": "two and two", "answer": "4"},
        {"rationale": "no idea", "answer": "5"},
        "I count. The answer is 4.",
    ],
}
PREPARED = {
    "id": "q1",
    "question": "2 + 2?",
    "gold": "4",
    "majority": "4",
    "votes": {"4": 2, "5": 1},
    "task": "number",
    "positives": [{"text": "two and two", "answer": "4", "source": "me", "score": 0.5}, "it is four"],
    "negatives": [{"text": "no idea", "answer": "5"}],
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def reasons(path: Path, **options) -> list[str]:
    return [row.reason for row in validate_file(path, **options)]


# Reading and pooling


def test_sampled_rows_are_voted(tmp_path):
    (question,) = load_questions(write(tmp_path / "a.jsonl", SAMPLED)).questions
    assert (question.id, question.gold, question.majority, question.task) == ("q1", "4", "4", "number")
    assert question.votes == {"4": 2, "5": 1}
    assert [r.text for r in question.positives] == ["two and two", "I count."]
    assert question.negatives == (Rationale("no idea", "5"),)


def test_a_prepared_file_alone_is_taken_as_it_is(tmp_path):
    row = {**PREPARED, "votes": {"4": 9}, "negatives": [{"text": "right, and yet here", "answer": "4"}]}
    (question,) = load_questions(write(tmp_path / "a.jsonl", row)).questions
    assert question.votes == {"4": 9} and len(question.negatives) == 1
    assert question.positives == (Rationale("two and two", "4", "me", 0.5), Rationale("it is four", "4"))


def test_pooled_prepared_rows_vote_again(tmp_path):
    other = {
        **PREPARED,
        "majority": "5",
        "positives": [{"text": "five", "answer": "5"}, {"text": "5!", "answer": "5"}],
        "negatives": [],
    }
    first, second = write(tmp_path / "a.jsonl", PREPARED), write(tmp_path / "b.jsonl", other)
    result = load_questions([first, second])
    (question,) = result.questions
    assert question.votes == {"5": 3, "4": 2} and question.majority == "5"
    again = load_questions([first, first])  # the same rows twice are duplicates
    assert again.questions[0].votes == {"4": 2, "5": 1} and again.summary.duplicates == 3


def test_rows_without_id_are_pooled_by_text(tmp_path):
    text = "Caf\u00e9?"
    rows = [{"question": form, "samples": [{"rationale": form, "answer": "1"}, {"rationale": str(i), "answer": "2"}]}
            for i, form in enumerate([text, f" {text} \n", unicodedata.normalize("NFD", text)])]  # fmt: skip
    (question,) = load_questions(write(tmp_path / "a.jsonl", *rows)).questions
    assert question.votes == {"2": 3, "1": 1}


def test_the_order_of_files_and_rows_does_not_change_the_votes(tmp_path):
    rng = random.Random(0)
    rows = [
        {"question": f"{i % 7}?", "samples": [{"rationale": str(rng.random()), "answer": str(rng.randrange(3))}]}
        for i in range(60)
    ]
    first = load_questions(write(tmp_path / "a.jsonl", *rows)).questions
    rng.shuffle(rows)
    halves = write(tmp_path / "b.jsonl", *rows[:30]), write(tmp_path / "c.jsonl", *rows[30:])
    second = load_questions(halves).questions
    assert {q.id: (q.majority, list(q.votes.items()), set(q.positives)) for q in first} == {
        q.id: (q.majority, list(q.votes.items()), set(q.positives)) for q in second
    }


def test_one_id_for_two_questions_or_two_golds_is_refused(tmp_path):
    first = write(tmp_path / "a.jsonl", SAMPLED)
    with pytest.raises(InputError, match=r"b\.jsonl:1: id 'q1' is another question at .*a\.jsonl:1"):
        load_questions([first, write(tmp_path / "b.jsonl", {**SAMPLED, "question": "3 + 3?"})])
    with pytest.raises(InputError, match="gold is '4', but '6'"):
        load_questions([first, write(tmp_path / "b.jsonl", {**SAMPLED, "answer": 6})])
    load_questions([first, write(tmp_path / "b.jsonl", {**SAMPLED, "answer": "4.0"})])


def test_split_by_gold(tmp_path):
    wrong = {**SAMPLED, "answer": "5"}
    (question,) = load_questions(write(tmp_path / "a.jsonl", wrong), split_by="gold").questions
    assert question.majority == "4" and [r.answer for r in question.positives] == ["5"] and len(question.negatives) == 2
    (again,) = load_questions(write(tmp_path / "b.jsonl", PREPARED | {"gold": "5"}), split_by="gold").questions
    assert [r.answer for r in again.positives] == ["5"]
    path = write(tmp_path / "c.jsonl", {"id": "x", "question": "?", "samples": SAMPLED["samples"]})
    with pytest.raises(InputError, match="no gold answer to split by"):
        load_questions(path, split_by="gold")


def test_tasks_are_given_guessed_or_overridden(tmp_path):
    rows = [
        SAMPLED,
        {
            "id": "c",
            "question": "Where?",
            "choices": ["park", "zoo"],
            "answer": "zoo",
            "samples": [{"rationale": "r", "answer": "(b)"}],
        },
    ]
    path = write(
        tmp_path / "a.jsonl", *rows, {"id": "t", "question": "Who?", "answer": "7", "task": "text", "samples": []}
    )
    questions = load_questions(path).questions
    assert [q.task for q in questions] == ["number", "choice", "text"]
    assert questions[1].majority == "zoo" and questions[1].question == "Where?\nAnswer Choices:\n(a) park\n(b) zoo"
    assert {q.task for q in load_questions(path, task="text").questions} == {"text"}


def test_votes_that_leave_nothing(tmp_path):
    rows = [{"id": str(i), "question": f"{i}?", "samples": [{"rationale": "r", "answer": a} for a in found]}
            for i, found in enumerate([[], [None, ""], ["1"], ["1", "2"]])]  # fmt: skip
    result = load_questions(write(tmp_path / "a.jsonl", *rows), task="number")
    assert [q.majority is None for q in result.questions] == [True, True, False, False]
    assert [len(q.positives) for q in result.questions] == [0, 0, 1, 1]
    summary = result.summary
    assert (summary.questions, summary.with_samples, summary.ties, summary.answers_dropped) == (4, 2, 1, 2)
    assert summary.share_without_minority == 0.5 and "ties:" in summary.text()


def test_options_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", SAMPLED)
    for options in ({"format": "csv"}, {"split_by": "vote"}, {"on_bad_row": "drop"}, {"task": "essay"}):
        with pytest.raises(InputError, match="is one of"):
            load_questions(path, **options)
    with pytest.raises(InputError, match="No such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no input: no questions"):
        load_questions([])
    with pytest.raises(InputError, match="no questions"):
        load_questions(write(tmp_path / "b.jsonl", {**SAMPLED, "split": "train"}), split="test")
    with pytest.raises(InputError, match="a folder is read with"):
        load_questions(tmp_path, format="native")


def test_a_split_has_one_name(tmp_path):
    rows = [{**SAMPLED, "id": s, "question": f"{s}?", "split": s} for s in ("Train", "dev", "TEST", "extra", " ")]
    path = write(tmp_path / "a.jsonl", *rows)
    found = {q.id: q.split for q in load_questions(path).questions}
    assert found == {"Train": "train", "dev": "validation", "TEST": "test", "extra": "extra", " ": None}
    assert [q.id for q in load_questions(path, split="training").questions] == ["Train", " "]
    assert [q.id for q in load_questions(path, split="Valid").questions] == ["dev", " "]


def test_a_question_in_several_splits_is_kept_in_the_one_held_out(tmp_path):
    rows = [
        {"question": "2+2?", "answer": "4", "split": "train", "response": "It is 4."},
        {"question": "2+2?", "answer": "5", "split": "test", "response": "It is 4!"},
        {"question": "2+2?", "answer": "5", "response": "It is 4, I say: 4."},
        {"question": "3+2?", "answer": "5", "split": "train", "response": "It is 5."},
    ]
    result = load_questions(write(tmp_path / "a.jsonl", *rows))
    both, other = result.questions
    assert (both.split, both.gold, other.split) == ("test", "5", "train")
    assert [r.text for r in both.positives] == ["It is 4!", "It is 4, I say: 4."]  # nothing of the training row
    assert any("1 questions are in several splits" in note for note in result.summary.warnings)
    assert not reasons(tmp_path / "a.jsonl")


def test_rows_of_another_split_are_not_taken_for_the_test_set(caplog):
    def rows(*splits):
        return [Question(str(n), str(n), split=split) for n, split in enumerate(splits)]

    def ids(*splits):
        return [q.id for q in of_split(rows(*splits), "test", "--data: f.jsonl")]

    assert ids("train", "test", None) == ["1"] and ids("train", None) == ["1"] and ids(None, None) == ["0", "1"]
    assert not caplog.records
    assert ids("validation", "validation") == ["0", "1"]
    assert "f.jsonl: all questions are of split validation, none of test" in caplog.text
    with pytest.raises(InputError, match=r"f.jsonl: no question is of split test \(there: train, validation\)"):
        ids("train", "validation")


def test_validate_names_rows_that_contradict_each_other(tmp_path):
    golds = [{"question": "2+2?", "answer": "4"}, {"question": "2+2?", "answer": "5"}]
    assert reasons(write(tmp_path / "a.jsonl", *golds)) == [f"gold is '4', but '5' at {tmp_path / 'a.jsonl'}:2"]
    assert not reasons(write(tmp_path / "b.jsonl", golds[0], {"question": "2+2?", "answer": "4.0"}))


# Published formats


def mentor_kd(path: Path) -> Path:
    rows = [
        {"input": "2 + 2?\n", "chain": "two and two", "answer": "4", "initial_correct": True},
        {"input": "2 + 2?\n", "chain": " five ", "completion": "5.0", "answer": "4", "initial_correct": False},
        {"input": "3 + 3?", "answer": 6},
    ]
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def dss(folder: Path, cots: list[str]) -> Path:
    (folder / "llm").mkdir(parents=True)
    write(
        folder / f"{folder.name}_train.json",
        {"input": "Luke?", "label": "( 84.0 / 2.0 )"},
        {"input": "Faye?", "label": "( 7.0 * 3.0 )"},
    )
    write(folder / f"{folder.name}_test.json", {"input": "Test?", "label": "8.0"})
    for index, part in enumerate(cots):
        (folder / "llm" / f"train_CoT_{index}.json").write_text(json.dumps([part]), encoding="utf-8")
    return folder


def test_mentor_kd(tmp_path):
    first, second = load_questions(mentor_kd(tmp_path / "toy_train.json")).questions
    assert first.votes == {"4": 1, "5": 1} and {r.text for r in first.positives + first.negatives} == {
        "two and two",
        "five",
    }
    assert first.question == "2 + 2?" and first.positives[0].source == "toy_train"
    assert (second.gold, second.majority, second.positives) == ("6", None, ())


def test_dss(tmp_path):
    folder = dss(
        tmp_path / "toy",
        ["He did. The answer is (84 / 2).\n\nQ: Next?\nA: The answer is 1.", "So 7 * x. The answer is (7 * x)."],
    )
    result = load_questions(folder)
    first, second = result.questions
    assert first.task == "equation" and first.split == "train" and first.gold == "( 84.0 / 2.0 )"
    assert first.positives == (Rationale("He did.", "(84 / 2)", "toy/llm"),) and first.majority == "(84 / 2)"
    assert (
        second.positives == ()
        and result.summary.answers_dropped == 1
        and result.summary.majority_wrong_against_gold == 0
    )
    (test,) = load_questions(folder, split="test").questions
    assert test == load_questions(folder / "toy_test.json").questions[0] and test.split == "test" and not test.positives
    with pytest.raises(
        InputError, match=r"no toy_valid\.json in this folder \(there: toy_test\.json, toy_train\.json\)"
    ):
        load_questions(folder, split="valid")


def test_dss_samples_must_match_the_rows(tmp_path):
    folder = dss(tmp_path / "toy", ["one. The answer is 42."])
    with pytest.raises(InputError, match="2 rows, but 1 samples"):
        load_questions(folder, on_bad_row="skip")
    assert reasons(folder) and "2 rows, but 1 samples" in reasons(folder)[0]
    assert "name its folder" in reasons(folder / "llm" / "train_CoT_0.json")[0]


def test_dss_choices_and_premises(tmp_path):
    row = {"id": "a", "question": "Where?", "choices": ["park", "zoo"], "answer": "zoo"}
    (question,) = load_questions(write(tmp_path / "x_test.json", row), format="dss").questions
    assert (
        question.task == "choice"
        and question.question.endswith("Answer Choices:\n(a) park\n(b) zoo")
        and question.gold == "zoo"
    )
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}
    (question,) = load_questions(write(tmp_path / "y_test.json", row)).questions
    assert question_text(question) == "It rains.\nIt is wet." and question.gold == "entailment"


# Writing, holding out, overlap


def test_written_rows_read_back_the_same(tmp_path):
    odd = tmp_path / "odd \u202e name\n\u00e9.jsonl"
    text = "\u05e9\u05dc\u05d5\u05dd \u200d " + unicodedata.normalize("NFD", "é") + "\u2028\U0001f600"
    question = Question(
        "q", text, "ctx", "4", "4", {"4": 1}, "number", "math", "train", (Rationale(text, "4", "me", 0.25),), ()
    )
    bare = Question("r", "only a question", task="number")
    write_prepared(odd, [question, bare])
    assert load_questions(odd).questions == [question, bare]
    first, second = (json.loads(line) for line in odd.read_bytes().decode().split("\n")[:2])
    assert list(first) == [
        "id",
        "question",
        "context",
        "gold",
        "majority",
        "votes",
        "task",
        "domain",
        "split",
        "positives",
        "negatives",
    ]
    assert list(second) == ["id", "question", "majority", "votes", "task", "positives", "negatives"]
    again = tmp_path / "again.jsonl"
    write_prepared(again, load_questions(odd).questions)
    assert again.read_bytes() == odd.read_bytes() and not reasons(odd)
    assert sorted(tmp_path.iterdir()) == sorted([odd, again])


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", PREPARED)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_prepared(path, load_questions(path).questions)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="No such file"):
        write_prepared(tmp_path / "none" / "a.jsonl", [])


def test_hold_out_depends_on_ids_and_seed_alone():
    questions = [Question(f"q{i}", f"{i}?") for i in range(50)]
    train, held = hold_out(questions, 0.1, seed=1)
    assert len(held) == 5 and len(train) == 45 and not {q.id for q in train} & {q.id for q in held}
    assert {q.id for q in hold_out(questions[::-1], 0.1, seed=1)[1]} == {q.id for q in held}
    assert {q.id for q in hold_out(questions, 0.1, seed=2)[1]} != {q.id for q in held}
    assert hold_out(questions, 0.0) == (questions, [])
    assert [len(side) for side in hold_out(questions[:3], 0.1)] == [2, 1]
    assert hold_out(questions[:1], 0.5) == (questions[:1], [])


def test_drop_overlap_goes_by_the_text():
    train = [Question("a", "same? "), Question("b", "other?"), Question("c", "same?", context="but in a context")]
    assert drop_overlap(train, [Question("z", " same?\n")]) == (train[1:], 1)


# What is wrong with a line, named; the 17 kinds of trial 14 are in test_reliability_rows.py

GOOD = json.dumps(SAMPLED).encode()
NO_SAMPLES = {k: v for k, v in SAMPLED.items() if k != "samples"}


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (GOOD.replace(b"two and", b"two\\u0000and") + b"\n", 1, "NUL character"),
        (GOOD.replace(b"two and", b"two\xed\xa0\x80and") + b"\n", 1, "not UTF-8"),
        (GOOD.replace(b'"q1"', b"true") + b"\n", 1, "id expects a string, got a boolean"),
        (GOOD + b"\n" + json.dumps({**NO_SAMPLES, "id": "q2"}).encode() + b"\n", 2, "missing key 'samples'"),
        (GOOD + b'\n[["nested"]]\n', 2, "expected an object, got a list"),
        (GOOD.replace(b'"4"', b"[" * 100_000 + b"]" * 100_000, 1) + b"\n", 1, "nested too deeply"),
        (b"\x80\x04\x95\x00", 1, "a pickle, which is never loaded"),
        (b"PK\x03\x04....", 1, "a zip archive"),
        (GOOD + GOOD + b"\n", 1, "more than one JSON value"),
        (GOOD.replace(b'"4"', b"9" * 5000, 1) + b"\n", 1, "integer string conversion"),
        (b'{"question": "?", "answer": "1", "samples": "none"}\n', 1, "samples expects a list, got a string"),
        (b'{"question": "?", "samples": [{"answer": "1"}]}\n', 1, r"samples\[0\]: missing key 'rationale' \(there: "
        r"'answer'\)"),
        (b'{"question": " "}\n', 1, "question is empty"),
        (b'{"question": "?", "task": "essay"}\n', 1, "task is one of"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, content, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    (bad,) = validate_file(path)
    assert bad.line == line
    with pytest.raises(InputError, match=rf"rows\.jsonl:{line}: .*{reason}"):
        load_questions(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"majority": None, "positives": [], "negatives": [], "votes": {}}, None),
        ({"votes": None}, None),
        ({"positives": None}, "positives expects a list, got null"),
        ({"positives": [["x"]]}, "positives[0] expects a string or an object"),
        ({"positives": [{"answer": "4"}]}, "positives[0]: missing key 'text'"),
        ({"negatives": [{"text": " "}]}, "negatives[0]: text is empty"),
        ({"positives": [{"text": "x", "score": "high"}]}, "positives[0]: score expects a number"),
        ({"votes": {"4": -1}}, "votes['4'] expects a count"),
        ({"votes": [4]}, "votes expects an object of answer: count"),
        ({"majority": ["4"]}, "majority expects a string, got a list"),
        ({"question": None}, "question is null"),
        ({"id": ""}, "id is empty"),
    ],
)
def test_prepared_rows_are_checked(tmp_path, change, reason):
    path = write(tmp_path / "rows.jsonl", {**PREPARED, **change})
    assert reasons(path) == ([reason] if reason else [])


@pytest.mark.parametrize("key", ["question", "majority", "positives", "negatives"])
def test_a_prepared_row_needs_its_keys(tmp_path, key):
    path = write(tmp_path / "rows.jsonl", {k: v for k, v in PREPARED.items() if k != key})
    assert reasons(path) == [f"missing key {key!r}"]


def test_bad_rows_are_set_aside_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", b"{", GOOD, GOOD.replace(b"q1", b"q2"), b""]))
    result = load_questions(path, on_bad_row="skip")
    assert [q.id for q in result.questions] == ["q1", "q2"]
    # the same row again is no fault
    assert [row.line for row in result.skipped] == [3] and result.summary.skipped_rows == 1
    assert result.summary.duplicates == 3 and result.summary.inputs[0]["blank_lines"] == 1  # nor is a blank line
    path.write_bytes(b"{\n")
    with pytest.raises(InputError, match=r"no questions; the first of 1 bad rows: .*rows\.jsonl:1: "):
        load_questions(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('[\n{"input": "?", "answer": "1"},\n{"input": 3}\n]', [(3, "input expects a string")]),
        ('[{"input": "?", "answer": "1"},\n {"answer": "1", "chain": ""}]', [(2, "missing key 'input'")]),
        (
            '[{"input": "?", "answer": "1"},\n {"input": "?", "input": "!"}, 7]',
            [(2, "duplicate key"), (2, "expected an object")],
        ),
        ('[{"input": "?", "answer": "1"}', [(1, "the array is cut")]),
        ('[{"input": "?", "answer": "1"},\n{"input"', [(2, "not JSON, or cut")]),
        ('[{"input": "?", "answer": "1"} {}]', [(1, "expected ',' or ']', got '{'")]),
        ("[]", [(1, "the array is empty")]),
        ("\ufeff[\n{}\n]", [(2, "missing key 'question'")]),  # a byte order mark is harmless
        ("[" * 100_000, [(1, "nested too deeply")]),
        ('[{"input": "?", "answer": "1", "initial_correct": 1, "chain": "c"}]', [(1, "initial_correct expects")]),
    ],
)
def test_faults_in_an_array_have_the_line_of_the_row(tmp_path, content, found):
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    bad = list(validate_file(path))
    assert [row.line for row in bad] == [line for line, _ in found]
    assert all(reason in row.reason for row, (_, reason) in zip(bad, found, strict=True))


def test_an_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_CHUNK", 7)
    path = mentor_kd(tmp_path / "toy_train.json")
    assert [line for line, _ in open_rows(path)] == [2, 8, 15]
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 60)
    assert "no complete row within 60 characters" in reasons(path)[0]


def test_no_torch():
    code = "import sys; import qcrd_fast.data.load; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The real teacher data, against counts made with other, naive code

needs_mentor_kd = pytest.mark.skipif(
    not (DATA / "mentor-kd").is_dir(), reason="no mentor-kd/ in ../shared/data or QCRD_FAST_DATA"
)
needs_dss = pytest.mark.skipif(not (DATA / "dss").is_dir(), reason="no dss/ in ../shared/data or QCRD_FAST_DATA")


@needs_mentor_kd
def test_pooled_svamp_against_a_naive_count(tmp_path):
    names = ["svamp_3_train.json", "svamp_aug_t5_large.json", "svamp_aug_flan-t5_large.json"]
    result = load_questions([DATA / "mentor-kd" / name for name in names])
    pairs, gold, rows = collections.defaultdict(dict), {}, 0
    for name in names:
        for row in json.loads((DATA / "mentor-kd" / name).read_text(encoding="utf-8")):
            gold[row["input"].strip()] = float(row["answer"])
            try:
                answer = float(row.get("completion", row["answer"]))
            except ValueError:  # " x"
                continue
            rows += 1
            pairs[row["input"].strip()][row["chain"], answer] = None
    assert len(gold) == len(result.questions) == 700 and rows == 651 * 3 + 700 * 6 - 4
    outright = ties = positives = negatives = 0
    for question in result.questions:
        counts = collections.Counter(answer for _, answer in pairs[question.question])
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        assert {float(answer): count for answer, count in question.votes.items()} == counts
        assert float(question.majority) in best
        outright += len(best) == 1 and best[0] != gold[question.question]
        ties += len(best) > 1
        positives += counts[float(question.majority)]
        negatives += counts.total() - counts[float(question.majority)]
    summary = result.summary
    assert (summary.positives, summary.negatives, summary.ties) == (positives, negatives, ties)
    assert summary.majority_wrong_against_gold - summary.wrong_by_tie == outright == 28
    assert (summary.answers_dropped, summary.duplicates) == (4, rows - positives - negatives)
    write_prepared(tmp_path / "a.jsonl", result.questions)
    assert load_questions(tmp_path / "a.jsonl").questions == result.questions
    assert not list(validate_file(tmp_path / "a.jsonl"))


@needs_mentor_kd
def test_strategy_qa_is_right_about_as_often_as_its_own_flag_says():
    summary = load_questions(DATA / "mentor-kd" / "strategy_qa_test.json").summary
    right = summary.with_samples - summary.majority_wrong_against_gold
    assert summary.questions == 687 and abs(right - 366) <= 5
    train = load_questions(DATA / "mentor-kd" / "strategy_qa_3_train.json")
    assert train.summary.majority_wrong_against_gold == 0 and train.questions[0].task == "yes-no"


@needs_mentor_kd
def test_a_published_test_file_has_gold_and_no_samples():
    questions = load_questions(DATA / "mentor-kd" / "svamp_test.json").questions
    assert len(questions) == 150 and all(q.gold and not q.positives and q.task == "number" for q in questions)


@needs_dss
@pytest.mark.parametrize(("name", "count", "right", "unread"), [("svamp", 800, 594, 33), ("cqa", 9741, 7388, 183)])
def test_palm_rationales(name, count, right, unread):
    """A quick parse finds svamp 522 right (148 unread): it stops at the first `)`; cqa 7,388 right (182 unread; of the
    letter of one option with the text of another it takes the letter)."""
    summary = load_questions(DATA / "dss" / name).summary
    assert (summary.questions, summary.answers_dropped) == (count, unread)
    assert summary.with_samples - summary.majority_wrong_against_gold == right


@needs_dss
def test_cqa_rows_carry_ids_and_choices():
    questions = load_questions(DATA / "dss" / "cqa", split="test").questions
    assert len(questions) == 1221 and all(
        q.task == "choice" and "\nAnswer Choices:\n(a) " in q.question for q in questions
    )
    assert all(q.split == "test" and q.id for q in questions)


@needs_mentor_kd
def test_the_published_files_are_valid():
    for path in sorted((DATA / "mentor-kd").glob("svamp*.json")):
        assert not list(validate_file(path)), path.name


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in (pipe, "/dev/stdout"):
        with pytest.raises(InputError, match="is a device or pipe"):
            require_file(Path(name))
    with pytest.raises(InputError, match="is a device or pipe"):
        write_prepared(pipe, [])
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
