"""The loop: each way it stops, what it writes, what a resume takes up, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from cli.main import entry
from qcrd_fast.active import loop
from qcrd_fast.active import student as students
from qcrd_fast.active.options import REFUSED, ActiveConfig
from qcrd_fast.active.revision import Explanation
from qcrd_fast.active.setup import idle_options
from qcrd_fast.models.prompts import Prompter, PromptSettings
from qcrd_fast.utils import signals
from tests.support import fake_teacher
from tests.support import problems as demo
from tests.support.active_runs import arguments, contents, read, solutions, write, write_files
from tests.support.students import make_llama


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("active")
    (folder / "student").mkdir()
    return write_files(folder, pool=12, validation=4, test=4) | {
        "student": str(make_llama(folder / "student", layers=1))
    }


@pytest.fixture
def explains(monkeypatch):
    """Lets every student explain: `faulty(i)` says whether the i-th question has a slip in its second step."""

    def choose(faulty):
        def explain(student, questions, **_):
            found = []
            for q in questions:
                words = q.question.replace(",", " ").replace(".", " ").split()
                a, b, c = (int(word) for word in words if word.isdigit())
                problem = demo.Problem(words[0], "things", "finds", "loses", a, b, c)
                first, second = solutions(problem)[0]
                slip = faulty(int(q.id[1:]))
                said = str(int(problem.answer) + slip)
                found.append(Explanation(f"{first}  {second.replace(f'= {problem.answer}', f'= {said}')}", said))
            return found

        monkeypatch.setattr(students, "explain", explain)

    return choose


@pytest.fixture
def reasons(monkeypatch):
    """The initial student counts as one that was trained to reason."""
    real = loop.ActiveRun.__init__

    def init(self, *args):
        real(self, *args)
        self.reasons = True

    monkeypatch.setattr(loop.ActiveRun, "__init__", init)


@pytest.fixture
def untrained(monkeypatch):
    """Training that leaves the student as it is, where it is not what a test is about."""

    def train(config, run):
        checkpoint = run.path / "checkpoint-1"
        if not checkpoint.exists():
            shutil.copytree(config.student, checkpoint)
            prompt = dataclasses.asdict(PromptSettings(max_target_length=config.max_target_length))
            state = {"prompt": prompt, "config": {"reasoning_task": True}}
            (checkpoint / "state.json").write_text(json.dumps(state))
            (run.path / "final").symlink_to(checkpoint.name)
        run.write_config()

    monkeypatch.setattr(loop, "train", train)


def run(capsys, args, code=0):
    assert entry([*args, "--json"]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out) if out else err


def test_a_run_repairs_trains_and_says_why_it_stopped(files, tmp_path, capsys, explains, reasons):
    explains(lambda i: i % 2)
    out = tmp_path / "run"
    found = run(capsys, arguments(files, output_dir=out, top=4, rounds=2))
    assert found["stopped"] == "rounds: 2 are done" and found["rounds"] == 2
    assert (found["asked"], found["positives"]) == (8, 8)
    assert found["tokens_by_purpose"] == {"revise": found["teacher_tokens"]}
    assert found["teacher_tokens"] <= 20_000 and found["n"] == 4 and found["evaluated_on"] == "test"
    for number in (1, 2):
        folder = out / f"round-{number:03d}"
        rows = read(folder / "revisions.jsonl")
        for row in rows:
            faulty = int(row["id"][1:]) % 2
            assert row["result"] == ("kept" if faulty else "no fault")
            assert (row["wrong_step"], row["requests"]) == ((2, 2) if faulty else (None, 2))
            first = row["explanation"].partition(".")[0] + ".  "
            assert row["text"].startswith(first)  # byte for byte, with both spaces
            assert row["nll"] > 0 and row["nll_explanation"] > 0
        learnt = read(folder / "train.jsonl")
        assert len(learnt) == 4 * number
        assert all(bool(q["negatives"]) == (q["positives"][0]["source"] == "teacher (repair)") for q in learnt)
        assert {n["wrong_step"] for q in learnt for n in q["negatives"]} <= {2}
    assert len({row["id"] for n in (1, 2) for row in read(out / f"round-{n:03d}" / "revisions.jsonl")}) == 8
    assert json.loads((out / "eval_results.json").read_text()) == found
    assert len(read(out / "predictions.jsonl")) == 4
    again = run(capsys, [*arguments(files, output_dir=out, top=4, rounds=2), "--resume", "auto"])
    assert again == found


def test_it_stops_at_the_budget(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)
    found = run(capsys, arguments(files, output_dir=tmp_path / "run", budget_tokens=1600, top=12))
    assert found["stopped"].startswith("budget: ") and 0 < found["teacher_tokens"] <= 1600
    assert 0 < found["asked"] < 12 and found["rounds"] == 1  # what was asked is learnt


def test_it_stops_where_the_teacher_finds_no_fault(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: i == 0)
    found = run(capsys, arguments(files, output_dir=tmp_path / "run", no_fault_share=0.75))
    assert found["stopped"].startswith("no fault: the teacher found none in") and found["rounds"] == 1
    assert found["results"]["no fault"] >= 3


def test_it_stops_where_validation_is_flat(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)
    found = run(capsys, arguments(files, output_dir=tmp_path / "run", flat_rounds=1, rounds=3))
    assert found["stopped"].startswith("flat: no validation of the last 1 rounds was better") and found["rounds"] == 1
    assert found["best_round"] == 0  # the earlier of equals


def test_it_stops_where_all_questions_were_asked(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)
    found = run(capsys, arguments(files, output_dir=tmp_path / "run", top=50, rounds=5))
    assert found["stopped"] == "pool: 12 of 12 questions were asked" and found["asked"] == 12


def test_a_student_that_does_not_reason_yet_gets_fresh_rationales_first(files, tmp_path, capsys, untrained):
    out = tmp_path / "run"
    found = run(capsys, arguments(files, output_dir=out, by="known", rounds=1))
    assert [*found["tokens_by_purpose"]] == ["label"]
    assert json.loads((out / "round-001" / "picked.json").read_text())["by"] == "random"
    assert {row["mode"] for row in read(out / "round-001" / "revisions.jsonl")} == {"new"}


@pytest.mark.parametrize("by", ["step-uncertainty", "answer-entropy", "ifd", "known", "naturalness", "quality"])
def test_every_score_picks_questions(files, tmp_path, capsys, explains, reasons, untrained, by):
    explains(lambda i: i % 2)
    out = tmp_path / "run"
    run(
        capsys,
        arguments(files, output_dir=out, by=by, rounds=1, top=3, num_samples=2, num_continuations=1, max_steps=1),
    )
    picked = json.loads((out / "round-001" / "picked.json").read_text())
    assert picked["by"] == by and len(picked["ids"]) == len(picked["scores"]) == 3
    assert None not in picked["scores"]


def test_earlier_samples_test_the_loop_and_not_the_revision(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)
    rows = [json.loads(line) for line in Path(files["pool"]).read_text().splitlines()]
    rng = random.Random(0)
    for row in rows[:10]:
        row["samples"] = [{"rationale": f"It is {row['answer']}.", "answer": row["answer"]}]
        row["samples"].append({"rationale": "No.", "answer": "0"})
        rng.shuffle(row["samples"])
    replay = write(tmp_path / "samples.jsonl", rows[:10])
    out = tmp_path / "run"
    found = run(capsys, arguments(files, output_dir=out, teacher=f"replay:{replay}", top=20, rounds=1))
    assert found["asked"] == 10 and found["results"]["kept"] == found["positives"] < 10
    assert "no verdicts to look up" in (out / "run.log").read_text()


def test_a_server_revises_and_malformed_verdicts_are_counted(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)

    def say(seen, _):
        first = "There is no step before" in seen.prompt
        if "p" in seen.prompt and seen.prompt.count("7") % 2:
            return "I think that this may be right."
        return "right" if first else "wrong: no\nSo 0 are left.\nAnswer: 0"

    with fake_teacher.serving(fake_teacher.samples(texts=say)) as server:
        options = dict(
            teacher=server.url, teacher_model="m", concurrency=3, top=12, rounds=1, output_dir=tmp_path / "run"
        )
        found = run(capsys, arguments(files, **options))
    assert found["results"].get("unreadable verdict", 0) > 0
    assert sum(found["results"].values()) == found["asked"] == 12


# Resumes


class Cut(BaseException):
    """A kill, as far as a test within the process can have one."""


@pytest.mark.parametrize("name, at", [("write_json", 2), ("write_lines", 4), ("train", 1)])
def test_a_run_goes_on_bit_for_bit_where_it_was_cut(files, tmp_path, capsys, monkeypatch, explains, reasons, name, at):
    explains(lambda i: i % 3)
    out = tmp_path / "run"
    args = arguments(files, output_dir=out, by="known", num_samples=2, rounds=2, top=3, max_steps=2)
    run(capsys, args)
    whole = contents(out)
    shutil.rmtree(out)
    real, calls = getattr(loop, name), iter(range(100))

    def cut(*given, **options):
        if next(calls) == at:
            raise Cut
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, cut)
        with pytest.raises(Cut):
            entry(args)
    assert not (out / "eval_results.json").exists()
    run(capsys, [*args, "--resume", "auto"])
    assert contents(out) == whole


def test_the_student_is_asked_in_the_view_of_a_question(files, tmp_path, capsys, monkeypatch, untrained):
    """Explained, scored, weighed and validated alike, by the table of this run where the student brings none."""
    views = tmp_path / "views.yaml"
    views.write_text("verse: In verse.\n")
    changed = {
        name: write(tmp_path / f"{name}.jsonl", [row | {"view": "verse"} for row in read(Path(files[name]))])
        for name in ("pool", "eval_data", "test_data")
    }
    asked = []
    real = Prompter.source_ids

    def source_ids(self, prefix, question, view=None):
        ids = real(self, prefix, question, view)
        asked.append((prefix, view, self.text(ids)))
        return ids

    monkeypatch.setattr(Prompter, "source_ids", source_ids)
    options = dict(rounds=2, by="step-uncertainty", views=views, output_dir=tmp_path / "run", num_continuations=0)
    run(capsys, arguments({**files, **changed}, **options))
    assert len(asked) > 30 and {(prefix, view) for prefix, view, _ in asked} == {("reason: ", "verse")}
    run(capsys, [*arguments({**files, **changed}, **options), "--resume", "auto"])
    views.write_text("verse: In rhymes.\n")
    assert "--views" in run(capsys, [*arguments({**files, **changed}, **options), "--resume", "auto"], 2)
    (tmp_path / "poem.jsonl").write_text(json.dumps(read(Path(files["test_data"]))[0] | {"view": "poem"}))
    options |= {"output_dir": tmp_path / "other", "test_data": tmp_path / "poem.jsonl"}
    assert "'poem' is in no table" in run(capsys, arguments({**files, **options}), 2)


def test_another_view_is_another_pool(files, tmp_path, capsys, untrained):
    args = arguments(files, output_dir=tmp_path / "run", rounds=1, max_steps=1)
    run(capsys, args)
    other = write(tmp_path / "other.jsonl", [row | {"view": "short"} for row in read(Path(files["pool"]))])
    assert "with other questions" in run(capsys, [*args, "--resume", "auto", "--pool", str(other)], 2)


def test_a_signal_stops_it_and_it_goes_on(files, tmp_path, capsys, monkeypatch, explains, reasons, untrained):
    explains(lambda i: 1)
    args = arguments(files, output_dir=tmp_path / "run", rounds=1)
    real = loop.asking.Asking.hold

    def hold(self, *given):
        self.signals.signum = 15
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(loop.asking.Asking, "hold", hold)
        assert entry(args) == 143
    assert "continue with --resume auto" in capsys.readouterr().err
    assert run(capsys, [*args, "--resume", "auto"])["stopped"] == "rounds: 1 are done"
    assert signals.StopSignals().signum == 0


def test_another_setting_or_pool_is_refused(files, tmp_path, capsys, explains, reasons, untrained):
    explains(lambda i: 1)
    out = tmp_path / "run"
    args = arguments(files, output_dir=out, rounds=1, max_steps=1)
    run(capsys, args)
    assert "is not empty" in run(capsys, args, 2)
    more = [*args, "--resume", "auto"]
    assert "--by 'random', now it is 'known'" in run(capsys, [*more, "--by", "known"], 2)
    assert "--learning-rate 0.001, now it is 0.1" in run(capsys, [*more, "--learning-rate", "0.1"], 2)
    same = write(tmp_path / "same.jsonl", read(Path(files["pool"])))
    run(capsys, [*more, "--pool", str(same)])
    other = write(tmp_path / "other.jsonl", read(Path(files["pool"]))[:-1])
    assert "with other questions" in run(capsys, [*more, "--pool", str(other)], 2)
    assert yaml.safe_load((out / "active.resolved.yaml").read_text())["active"]["by"] == "random"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pool": "/none/pool.jsonl"}, "--pool: /none/pool.jsonl does not exist"),
        ({"pool": None}, "active needs --pool"),
        ({"budget_tokens": None}, "active needs --budget-tokens"),
        ({"budget_tokens": 64}, "--budget-tokens 64 is not above --max-tokens 64"),
        ({"teacher": "http://127.0.0.1:1/v1"}, "--teacher-model is needed"),
        ({"teacher_model": "m"}, "--teacher-model names the model of an endpoint"),
        ({"teacher": "oracle:/none"}, "/none is no readable UTF-8 file"),
        ({"teacher": "127.0.0.1:8000/v1"}, "begins with http"),
        ({"eval_data": None}, "active needs --eval-data"),
        ({"student": None}, "active needs --student"),
        ({"by": "agree"}, "'agree' is not one of"),
        ({"data": "x.jsonl"}, "--data is not for active"),
        ({"max_samples": 3}, "--max-samples is not for active"),
        ({"method": "gkd"}, "--method gkd is not for active, whose teacher writes text"),
        ({"no_reasoning_task": True}, "--reasoning-task: in an active run it is always true"),
        ({"resume": "somewhere"}, "--resume"),
        ({"prompts": "/none"}, "--prompts: /none holds none of"),
    ],
)
def test_what_is_refused_before_anything_is_written(files, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    err = run(capsys, arguments(files, output_dir=out, **options), 2)
    assert message in err, err
    assert not out.exists()


def test_the_help_offers_what_active_takes(capsys):
    assert entry(["active", "--help-all"]) == 0
    told = capsys.readouterr().out
    assert [name for name in REFUSED if f"--{name.replace('_', '-')} " in told] == []
    assert "a share of --data" not in told and "or a checkpoint folder" not in told


def test_options_that_nothing_reads_are_named():
    common = {"pool": "p", "budget_tokens": 999}
    oracle = ActiveConfig(**common, teacher="oracle:x", by="known", num_samples=3, temperature=0.5, timeout=3.0)
    assert idle_options(oracle) == ["temperature", "timeout"]
    server = ActiveConfig(**common, teacher="http://x", teacher_model="m", by="ifd", num_samples=3, timeout=3.0)
    assert idle_options(server) == ["num_samples"]
    assert idle_options(ActiveConfig(**common, teacher="/model", revise="new", show="all", by="ifd")) == ["show"]


def test_questions_without_an_answer_or_of_the_test_set_are_set_aside(files, tmp_path, capsys):
    rows = read(Path(files["pool"]))[:3] + read(Path(files["test_data"]))[:1] + read(Path(files["eval_data"]))[:1]
    rows[0] |= {"answer": None}
    rows = [row | {"id": f"x{i}"} for i, row in enumerate(rows)]
    pool = write(tmp_path / "pool.jsonl", rows)
    plan = run(capsys, [*arguments(files, output_dir=tmp_path / "run", pool=pool), "--dry-run"])
    assert plan["pool"] == 2 and not (tmp_path / "run").exists()
    rows[1], rows[2] = rows[1] | {"split": "train"}, rows[2] | {"split": "test"}
    again = rows[1] | {"id": "again", "question": rows[1]["question"].replace(". ", ".  ")}
    pool = write(tmp_path / "pool.jsonl", [*rows, again])
    plan = run(capsys, [*arguments(files, output_dir=tmp_path / "run", pool=pool), "--dry-run"])
    assert plan["pool"] == 1  # neither of another split nor the same under another id
    assert "Question: " in plan["prompt"]
