"""`select`: policies, what is written, a kill and the same command again."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.errors import InputError
from qcrd_fast.select import policy
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.progress import Progress, identity
from qcrd_fast.select.registry import SELECTORS, unused
from qcrd_fast.select.score import RowScores, mean_score
from qcrd_fast.select.selection import Policy, describe

ROWS = [Question(name, name, positives=(Rationale("a"), Rationale("b"))) for name in "dcba"]


def scored(*values: float | None) -> list[dict[str, float | None]]:
    return [{"ifd": v, "known": v, "random": v} for v in values]


def test_the_best_are_chosen_first_and_ties_by_id() -> None:
    assert policy.top(ROWS, scored(1, 2, 2, 0), "random", 3) == [2, 1, 0]  # b before c
    assert policy.top(ROWS, scored(1, 2, 2, 0), "known", 2) == [3, 0]  # the least known first
    assert policy.top(ROWS, scored(1, 2, 2, 0), "known", 1, reverse=True) == [2]
    assert policy.top(ROWS, scored(None, 0.5, 1.5, 1.0), "ifd", 4) == [3, 1]  # neither above 1 nor without a score


def test_what_is_above_a_threshold_is_dropped() -> None:
    assert policy.drop_above(ROWS, scored(1, 2, None, 0), "random", 1) == [0, 2, 3]
    found = [RowScores({"ifd": 1.0}, {"ifd": values}) for values in ([0.5, 1.5], [2.0, 3.0], [None, 1.0], [0.1, 0.2])]
    left = Policy(["ifd"], drop_above=1.0).choose(ROWS, found)
    assert [(row.id, [r.text for r in row.positives]) for row, _ in left] == [
        ("d", ["a"]),
        ("b", ["a", "b"]),
        ("a", ["a", "b"]),
    ]
    assert [of_row.positives["ifd"] for _, of_row in left] == [[0.5], [None, 1.0], [0.1, 0.2]]
    assert [of_row.row["ifd"] for _, of_row in left] == [0.5, 1.0, pytest.approx(0.15)]  # of what is written


def test_of_ifd_no_rationale_above_1_is_chosen() -> None:
    values = ([0.2, 0.3], [0.9, 1.5], [1.1, None], [0.5, 0.6])  # the mean of the second, c, is above 1 at first
    found = [RowScores({"ifd": mean_score(some)}, {"ifd": list(some)}) for some in values]
    for reverse, ids in ((False, "ca"), (True, "da")):
        left = Policy(["ifd"], top=2, reverse=reverse).choose(ROWS, found)
        assert [row.id for row, _ in left] == list(ids)
        assert all(scores.row["ifd"] == mean_score(scores.positives["ifd"]) <= 1 for _, scores in left)
        assert [len(row.positives) for row, _ in left] == [1 if row.id == "c" else 2 for row, _ in left]
    assert {row.id for row, _ in Policy(["ifd"], top=9).choose(ROWS, found)} == {"d", "c", "a"}


def test_rows_of_other_splits_are_left_as_they_are() -> None:
    splits = ["train", "test", None, "validation"]
    rows = [dataclasses.replace(row, split=split) for row, split in zip(ROWS, splits, strict=True)]
    found = [RowScores({"known": v, "ifd": v}, {"ifd": [v, v]}) for v in (5.0, 9.0, 1.0, 0.0)]

    def ids(**options: object) -> list[str]:
        return [row.id for row, _ in Policy(["ifd"], **options).choose(rows, found)]

    assert ids(drop_above=2) == ["c", "b", "a"]
    left = Policy(["known"], top=1).choose(rows, found)
    assert [row.id for row, _ in left] == ["c", "b", "a"]  # b is the least known of d and b
    weighed = Policy(["known"], weight=True).choose(rows, found)
    assert [row.weight for row, _ in weighed] == [0.5, None, 1.5, None]
    tests = [dataclasses.replace(row, split="test") for row in ROWS]  # nothing else is there: choose among them
    assert [row.id for row, _ in Policy(["known"], top=1).choose(tests, found)] == ["a"]


def test_the_summary_counts_rows_to_train_on(tmp_path: Path, capsys) -> None:
    rows = [
        {"id": str(n), "question": f"{n}?", "majority": "4", "votes": {"4": 2, "5": n}, "split": split,
         "positives": [{"text": "4.", "answer": "4"}], "negatives": []}
        for n, split in enumerate(["train", "train", "Test", "train"])
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["select", "--data", str(tmp_path / "rows.jsonl"), "--by", "agree", "--json"]
    assert entry([*command, "--top", "2", "--output", str(tmp_path / "a.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [summary[name] for name in ("rows", "chosen", "of_other_splits", "positives")] == [3, 2, 1, 2]
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    assert entry([*command, "--drop-above", "-1", "--output", str(tmp_path / "b.jsonl")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["chosen"] == 0 and "none of 3 rows to train on is left" in captured.err


def test_weights_have_the_mean_1_and_follow_the_ranks() -> None:
    assert policy.weights(ROWS, scored(5, 1, 1, 9), "random") == [1.25, 0.5, 0.5, 1.75]
    assert policy.weights(ROWS, scored(5, 1, 1, 9), "known") == [0.75, 1.5, 1.5, 0.25]
    assert policy.weights(ROWS, scored(None, 3, None, 3), "random") == [1, 1, 1, 1]
    for reverse, weights in ((False, [0.5, 1.75, 1.25, 0.5]), (True, [0.5, 1.25, 1.75, 0.5])):  # above 1: never first
        assert policy.weights(ROWS, scored(1.1, 0.9, 0.2, 7), "ifd", reverse=reverse) == weights


def test_the_figures_of_a_score() -> None:
    figures = {"known_mean": 2.0, "known_min": 0.0, "known_median": 1.5, "known_max": 5.0, "known_without": 1}
    assert describe("known", [5, None, 0, 2, 1]) == figures


@pytest.mark.parametrize(
    "options, said",
    [
        ({"top": 2, "weight": True}, "--top and --weight are given"),
        ({"names": ["ifd", "known"], "top": 2}, "needs one score"),
        ({"reverse": True}, "--reverse goes with"),
        ({"drop_above": float("nan")}, "must be finite"),
    ],
)
def test_policies_that_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Policy(**{"names": ["ifd"], **options})


def test_rows_with_scores_are_rows_again(rows_file, llama_folder, tmp_path: Path, capsys) -> None:
    output = tmp_path / "scored.jsonl"
    arguments = ["select", "--data", str(rows_file), "--student", str(llama_folder), "--output", str(output), "--json"]
    assert entry([*arguments, "--by", "ifd,agree,naturalness", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["would_score"] == 24 and not output.exists()
    assert entry([*arguments, "--by", "ifd,agree,naturalness"]) == 0
    summary = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary["rows"] == summary["chosen"] == len(rows) == 24 and summary["ifd_without"] == 0
    assert set(rows[0]["scores"]) == {"ifd", "agree", "naturalness"}
    assert set(rows[0]["positives"][0]["scores"]) == {"ifd", "naturalness"}
    again = load_questions(output)
    assert again.questions == load_questions(rows_file).questions
    assert not again.summary.keys_not_read
    assert (
        entry(["select", "--data", str(output), "--by", "agree", "--weight", "--output", str(tmp_path / "w.jsonl")])
        == 0
    )
    weights = [q.weight for q in load_questions(tmp_path / "w.jsonl").questions]
    assert sum(weights) == pytest.approx(24) and len(set(weights)) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"scored.jsonl", "w.jsonl"}


@pytest.mark.parametrize(
    "more, said",
    [
        (["--by", "ifd"], "needs --student"),
        (["--by", "random", "--student", "x"], "asks nothing of it"),
        (["--by", "ifdd", "--student", "x"], "did you mean 'ifd'"),
        (["--by", "random", "--top", "0"], "--top"),
        (["--by", "step-uncertainty", "--student", "no/such"], "no/such"),
        (["--by", "ifd", "--student", "LLAMA/config.json"], "is a file"),
        (["--by", "ifd", "--student", "LLAMA", "--device", "gpu"], "--device"),
    ],
)
def test_commands_that_are_refused(more, said, rows_file, llama_folder, tmp_path, capsys) -> None:
    more = [part.replace("LLAMA", str(llama_folder)) for part in more]
    for dry in ([], ["--dry-run"]):
        assert entry(["select", "--data", str(rows_file), "--output", str(tmp_path / "o.jsonl"), *more, *dry]) == 2
        assert said in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def command(rows_file, student, output: Path) -> list[str]:
    options = ["--by", "step-uncertainty", "--max-new-tokens", "8", "--block-size", "5", "--top", "9"]
    return ["select", "--data", str(rows_file), "--student", str(student), "--output", str(output), *options]


def test_a_stop_and_the_same_command_again_give_the_same_bytes(
    rows_file, llama_folder, tmp_path: Path, monkeypatch
) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert entry(command(rows_file, llama_folder, whole)) == 0
    kept = tmp_path / ".broken.jsonl.scores.jsonl"
    add = Progress.add

    def stop(self: Progress, scores: dict) -> None:
        add(self, scores)
        if kept.read_bytes().count(b"\n") > 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "add", stop)
        assert entry(command(rows_file, llama_folder, broken)) == 130
    assert not broken.exists()
    with open(kept, "ab") as file:
        file.write(b'{"id": "q2", "row": {"step-unc')  # a line that a kill would cut
    scored: list[dict] = []
    monkeypatch.setattr(Progress, "add", lambda self, scores: (scored.append(scores), add(self, scores))[1])
    assert entry(command(rows_file, llama_folder, broken)) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert sum(map(len, scored)) == 24 - 10
    assert not kept.exists()


def test_a_table_of_views_is_the_students_too(rows_file, llama_folder, tmp_path: Path, capsys) -> None:
    table, rows, output = tmp_path / "views.yaml", tmp_path / "rows.jsonl", tmp_path / "o.jsonl"
    rows.write_text("".join(json.dumps(json.loads(r) | {"view": "mine"}) + "\n" for r in rows_file.open()))
    asked = ["select", "--data", str(rows), "--student", str(llama_folder), "--by", "naturalness", "-o", str(output)]
    assert entry(asked) == 2 and "'mine' is in no table" in capsys.readouterr().err
    scores = []
    for text in ("First", "Now there are 2"):
        table.write_text(f"mine: {text}")
        assert entry([*asked, "--views", str(table)]) == 0
        scores.append([json.loads(line)["scores"] for line in output.open()])
    assert scores[0] != scores[1]
    same = identity(ROWS, ["ifd"], None, SelectOptions(), {"mine": "a"})
    assert same != identity(ROWS, ["ifd"], None, SelectOptions(), {"mine": "b"})
    assert identity(ROWS, ["ifd"], None, SelectOptions(), {}) == identity(ROWS, ["ifd"], None, SelectOptions())


def test_a_weight_that_is_replaced_is_named(rows_file, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for data, output in ((rows_file, first), (first, second)):
        assert "takes the place" not in capsys.readouterr().err
        assert entry(["select", "--data", str(data), "--output", str(output), "--by", "random", "--weight"]) == 0
    assert "takes the place of the weight that 24 rows have" in capsys.readouterr().err


def test_options_that_no_score_reads_are_named(rows_file, tmp_path: Path, capsys) -> None:
    asked = ["select", "--data", str(rows_file), "--output", str(tmp_path / "o.jsonl"), "--by", "quality,agree"]
    assert entry([*asked, "--quality", "vote", "--seed", "3", "--block-size", "7"]) == 0
    assert "no use for" not in capsys.readouterr().err
    (tmp_path / "views.yaml").write_text("mine: Now")
    views = ["--views", str(tmp_path / "views.yaml"), "--device", "cpu"]
    assert entry([*asked, "--window", "3", "--temperature", "0.5", *views]) == 0
    assert (
        "--by quality,agree has no use for --window, --temperature, --views, --device"
        in capsys.readouterr().err.replace(", agree", ",agree")
    )
    names = {f.name for f in dataclasses.fields(SelectOptions)}
    assert unused(list(SELECTORS), names) == []  # each option is read somewhere
    assert {o for s in SELECTORS.values() for o in s.options} <= names


def test_a_full_disk_keeps_what_was_scored(rows_file, llama_folder, tmp_path: Path, monkeypatch, capsys) -> None:
    """The disk fills after the second block; it is still full for the next command, which may lose nothing."""
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert entry(command(rows_file, llama_folder, whole)) == 0
    kept = tmp_path / ".broken.jsonl.scores.jsonl"
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if os.fstat(descriptor).st_size and kept.read_bytes().count(b"\n") > 10:
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        assert entry(command(rows_file, llama_folder, broken)) == 1
        before = kept.read_bytes()
        said = capsys.readouterr().err.splitlines()[-1]
        assert "No space left" in said and "is kept" in said and before.count(b"\n") == 11
        assert entry(command(rows_file, llama_folder, broken)) == 1
    assert kept.read_bytes() == before and not broken.exists()
    scored: list[dict] = []
    add = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, scores: (scored.append(scores), add(self, scores))[1])
    assert entry(command(rows_file, llama_folder, broken)) == 0
    assert broken.read_bytes() == whole.read_bytes() and sum(map(len, scored)) == 24 - 10


def test_another_file_of_the_student_is_another_student(llama_folder, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(llama_folder, student)
    before = identity(ROWS, ["ifd"], str(student), SelectOptions())
    assert identity(ROWS[::-1], ["ifd"], str(student), SelectOptions()) == before
    (student / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert identity(ROWS, ["ifd"], str(student), SelectOptions()) != before


def test_two_commands_do_not_write_the_same_output(tmp_path: Path) -> None:
    with Progress(tmp_path / "o.jsonl", "x") as first:
        first.add({"a": RowScores({"ifd": 0.1}, {})})
        with pytest.raises(InputError, match="another process"), Progress(tmp_path / "o.jsonl", "x"):
            pass
    with Progress(tmp_path / "o.jsonl", "x") as again:
        assert again.finished == {"a": RowScores({"ifd": 0.1}, {})}
    with Progress(tmp_path / "o.jsonl", "other rows") as other:
        assert not other.finished
        other.add({"b": RowScores({"ifd": 0.2}, {})})
    with Progress(tmp_path / "o.jsonl", "x") as first:
        assert not first.finished


def test_a_command_that_is_refused_loses_no_scores(rows_file, llama_folder, tmp_path: Path, capsys) -> None:
    output = tmp_path / "o.jsonl"
    asked = ["select", "--data", str(rows_file), "--student", str(llama_folder), "--output", str(output)]
    refused = [*asked, "--by", "known", "--ask", "zero-shot"]
    assert entry(refused) == 2 and "no chat template" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with Progress(output, "a command that was killed") as first:
        first.add({"a": RowScores({"ifd": 0.1}, {})})
    assert entry(refused) == 2
    with Progress(output, "a command that was killed") as again:
        assert again.finished == {"a": RowScores({"ifd": 0.1}, {})}


@pytest.mark.slow
def test_a_kill_and_the_same_command_again_give_the_same_bytes(rows_file, llama_folder, warm, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert warm.run(command(rows_file, llama_folder, whole)).code == 0
    kept = tmp_path / ".broken.jsonl.scores.jsonl"
    process = warm.start(command(rows_file, llama_folder, broken))
    end = time.monotonic() + 120
    while not broken.exists() and not (kept.exists() and kept.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < end, "no scores were kept"
        time.sleep(0.005)
    os.kill(process[0], signal.SIGKILL)
    assert warm.wait(process).code == -signal.SIGKILL and not broken.exists()
    assert warm.run(command(rows_file, llama_folder, broken)).code == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert not kept.exists()
