"""From a recipe to a table: its data, several seeds, rows, rationales judged, Markdown."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.main import entry
from qcrd_fast.config import PARTS, TrainConfig
from qcrd_fast.data import splits
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.sweep import intervals, results_csv, runner
from qcrd_fast.sweep.job import key, options_text
from qcrd_fast.sweep.rationale_checks import equations, judge_rationale, summarize
from qcrd_fast.train.methods import check_teacher
from qcrd_fast.utils.files import read_records
from tests.support.paths import DATA, ROOT

EVERY_RECIPE = sorted((ROOT / "recipes").glob("*.yaml"))
# of every data set; the others show a teacher's use
RECIPES = [r for r in EVERY_RECIPE if not r.stem.startswith("teacher-")]
STUDENTS = ("smollm2", "t5-small", "t5-base")
MAIN = [f"{name}_{part}.json" for name in ("svamp", "asdiv", "strategy_qa") for part in ("3_train", "test")]
PUBLISHED = {  # where Mentor-KD's repository has the files of the shared folder
    **{f"data/main/{name}": name for name in MAIN},
    **{
        f"data/aug/{mentor}/svamp_rand3_aug3.json": f"svamp_aug_{mentor}.json"
        for mentor in ("t5_large", "flan-t5_large")
    },
    "data/aug/t5_large/strategy_qa_rand3_aug3.json": "strategy_qa_aug_t5_large.json",
}


def commands(recipe: Path) -> list[list[str]]:
    """The `qcrd-fast prepare` commands in a recipe's head."""
    head = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#   ")]
    text = "\n".join(head).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("qcrd-fast prepare")]


# Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_says_how_its_data_is_made(recipe: Path) -> None:
    config = TrainConfig.from_dict(runner.read_recipe(recipe))
    text = recipe.read_text()
    assert f"--config recipes/{recipe.name} " in text and config.output_dir == f"runs/{recipe.stem}"
    for path in (config.data, config.test_data):
        assert path and path.startswith("data/") and not Path(path).is_absolute()
    if recipe.stem != "ci":
        assert [c[c.index("--output") + 1] for c in commands(recipe)] == [config.data, config.test_data]
        assert ("t5" in recipe.stem) == ("Not measured" in text) == ("t5" in str(config.student))
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64


@pytest.mark.parametrize("recipe", [r for r in EVERY_RECIPE if r not in RECIPES], ids=lambda r: r.stem)
def test_a_recipe_with_a_teacher_makes_it_first(recipe: Path) -> None:
    config, text = TrainConfig.from_dict(runner.read_recipe(recipe)), recipe.read_text()
    check_teacher(config)
    assert (
        f"--config recipes/{recipe.name} " in text
        and config.output_dir == f"runs/{recipe.stem}"
        and "Not measured" in text
    )
    assert [c[c.index("--output") + 1] for c in commands(recipe)] == [config.data, config.test_data]
    made = config.teacher or config.teacher_logprobs
    assert made and (f"--output-dir {made}\n" in text or f"--output {made}\n" in text)


def test_every_data_set_has_three_students() -> None:
    names = {r.stem for r in RECIPES} - {"ci"}
    sets = {name.rpartition("-smollm2")[0] for name in names if name.endswith("-smollm2")}
    assert {
        "svamp-equation",
        "svamp",
        "svamp-mentors",
        "asdiv",
        "strategy_qa",
        "strategy_qa-mentors",
        "cqa",
        "pooled",
    } == sets
    assert names == {f"{s}-{student}" for s in sets for student in STUDENTS}
    for s in sets:
        assert len({json.dumps(commands(ROOT / "recipes" / f"{s}-{student}.yaml")) for student in STUDENTS}) == 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not in ../shared/data or QCRD_FAST_DATA")
@pytest.mark.parametrize(
    "data",
    [*("svamp-equation", "svamp", "svamp-mentors", "asdiv", "strategy_qa", "strategy_qa-mentors"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("cqa", "pooled"))],
)  # fmt: skip
def test_the_data_commands_work_and_give_the_questions_they_promise(data, tmp_path, monkeypatch, capsys) -> None:
    for published, ours in PUBLISHED.items():
        (tmp_path / published).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / published).symlink_to(DATA / "mentor-kd" / ours)
    monkeypatch.chdir(tmp_path)
    counted: dict[str, int] = {}
    for recipe in (ROOT / "recipes" / f"{data}-{student}.yaml" for student in STUDENTS):
        for command in commands(recipe):
            if (output := command[-1]) not in counted:
                args = [a.replace("$MENTOR_KD", str(tmp_path)).replace("$DSS", str(DATA / "dss")) for a in command]
                assert entry([*args, "--dry-run", "--json"]) == 0
                counted[output] = json.loads(capsys.readouterr().out)["questions"]
        train, test = re.search(r"([\d,]+) and ([\d,]+) questions", recipe.read_text()).groups()
        made = [counted[c[-1]] for c in commands(recipe)]
        assert made == [int(train.replace(",", "")), int(test.replace(",", ""))], recipe.name


# Several runs


def test_seeds_and_methods_are_read() -> None:
    assert (
        runner.parse_seeds("3") == (0, 1, 2)
        and runner.parse_seeds("4,") == (4,)
        and runner.parse_seeds("2, 0") == (2, 0)
    )
    assert runner.parse_methods("dss, qcrd") == ("dss", "qcrd")
    for text in ("0", "-1", "x", "1,1", "", ",", "1,,2", "2.5"):
        with pytest.raises(InputError, match="--seeds"):
            runner.parse_seeds(text)
    with pytest.raises(InputError, match="did you mean 'qcrd'"):
        runner.parse_methods("dss,qcdr")


FAKE = """
import json, signal, sys, time, pathlib, yaml
c = yaml.safe_load(open(sys.argv[1])); run = pathlib.Path(c["output_dir"]); run.mkdir(exist_ok=True)
if (run.parent / "deaf").exists(): signal.signal(signal.SIGTERM, signal.SIG_IGN)
(run / "config.resolved.yaml").write_text(open(sys.argv[1]).read())
if (run.parent / f"slow-{c['seed']}").exists(): time.sleep(60)
if (run.parent / f"bad-{c['seed']}").exists(): sys.exit("the disk is full")
if (run.parent / "refuse").exists(): sys.exit(2)
rows = [{"id": str(i), "correct": (i + c["seed"]) % 3 == 0} for i in range(9)]
(run / "predictions.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
(run / "checkpoint-1").mkdir(exist_ok=True)
(run / "environment.json").write_text(json.dumps({"gpu": True, "device": "a GPU"}))
(run / "eval_results.json").write_text(json.dumps({"accuracy": 1 / 3, "n": 9, "evaluated_on": "test"}))
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Three seeds whose child is a script of a few lines: it fails beside a file bad-S and hangs beside slow-S."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "out").mkdir()
    real = subprocess.Popen

    def popen(command, **how):
        assert command[1:3] == ["-m", "qcrd_fast.sweep.runner"] and how["start_new_session"]
        assert how["stdin"] is subprocess.PIPE
        return real([command[0], str(tmp_path / "fake.py"), *command[3:]], **how)

    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    config = TrainConfig(
        data=str(tmp_path / "rows.jsonl"), student="tiny", output_dir=str(tmp_path / "out"), method="dss"
    )
    return runner.plan(config, (0, 1, 2), ("dss",), "toy")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_failed_seed_leaves_the_others_alone_and_is_tried_again(jobs, tmp_path) -> None:
    results, bad = tmp_path / "runs.csv", tmp_path / "out" / "bad-1"
    bad.touch()
    with pytest.raises(RunError, match="1 of 3 runs failed: toy dss seed 1; the same command"):
        runner.run_jobs(jobs, results, parallel=2)
    assert [row["seed"] for row in table(results)] == ["0", "2"]
    assert "the disk is full" in (tmp_path / "out" / "seed-1.log").read_text()
    bad.unlink()
    began = (tmp_path / "out" / "seed-0.log").stat().st_mtime_ns
    rows = runner.run_jobs(jobs, results)
    assert [row["seed"] for row in rows] == [0, 1, 2] and sorted(row["seed"] for row in table(results)) == [
        "0",
        "1",
        "2",
    ]
    assert (tmp_path / "out" / "seed-0.log").stat().st_mtime_ns == began  # it was not run again
    attempts = [
        json.loads(x)["exit"] for x in (tmp_path / "out" / "seed-1" / "attempts.jsonl").read_text().splitlines()
    ]
    assert attempts == [1, 0]
    row = table(results)[0]
    assert row["gpu_minutes"] and row["device"] == "a GPU" and row["n"] == "9" and row["method"] == "dss"
    assert results_csv.answers_of(table(results))[0].bits == tuple(i % 3 == 0 for i in range(9))
    assert results_csv.as_text(rows).endswith("dss: 33.3 (12.1 to 64.6) %, seeds: 3")
    runner.run_jobs(jobs, results, keep=False)
    assert len(table(results)) == 3 and not list(tmp_path.glob("out/*/checkpoint-*"))
    results.unlink()
    assert len(runner.run_jobs(jobs, results)) == len(table(results)) == 3  # rows come back from the folders


def cut(text: str) -> str:
    return text[: -len(text.splitlines()[-1]) // 2]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (cut, True),  # what a kill in the midst of a write leaves
        (lambda text: text[:-1], False),  # what an editor leaves
        (lambda text: text.replace("\n", "\r\n"), False),
        (lambda text: text[: -len(text.splitlines()[-1]) - 1] + '"' + text.splitlines()[-1] + "\n", True),
        (lambda text: text + "\udcff\udcfe\n", False),  # bytes that are no UTF-8
        (lambda text: text[:-4] + "zz\n", True),
    ],
    ids=["cut", "no newline", "CRLF", "open quote", "bytes", "no bits"],
)
def test_a_damaged_line_of_the_results_costs_that_line_alone(damage, lost: bool, jobs, tmp_path, caplog) -> None:
    results = tmp_path / "runs.csv"
    runner.run_jobs(jobs[:2], results)
    whole = table(results)
    results.write_bytes(damage(results.read_text()).encode("utf-8", "surrogateescape"))
    assert results_csv.read_csv(results)[0] == whole[0] and len(results_csv.read_csv(results)) == 2 - lost
    for _ in range(2):  # the missing ones come back from their folders, once
        runner.run_jobs(jobs, results)
        rows = [{k: v for k, v in r.items() if k != "wall_s"} for r in results_csv.read_csv(results)]
        assert sorted(r["seed"] for r in rows) == ["0", "1", "2"]
    assert all(len(results_csv.answers_of([row])) == 1 for row in rows)


def test_a_full_disk_leaves_no_half_row_and_the_other_runs_alone(jobs, tmp_path, monkeypatch) -> None:
    results, real = tmp_path / "runs.csv", os.write

    def full(descriptor: int, data: bytes) -> int:
        return (
            real(descriptor, data[: len(data) // 2]) if b"toy" in data and b",1,0." in data else real(descriptor, data)
        )

    monkeypatch.setattr(results_csv.os, "write", full)
    with pytest.raises(RunError, match="1 of 3 runs failed: toy dss seed 1"):
        runner.run_jobs(jobs, results, parallel=3)
    assert sorted(row["seed"] for row in table(results)) == ["0", "2"]
    monkeypatch.undo()
    (jobs[0].folder / "predictions.jsonl").unlink()
    with pytest.raises(RunError, match="1 of 3 runs failed: toy dss seed 0"):  # and seed 1 gets its row
        runner.run_jobs(jobs, results)
    assert sorted(row["seed"] for row in table(results)) == ["0", "1", "2"]


def test_a_run_that_did_not_say_where_it_ran_is_not_finished(jobs, tmp_path) -> None:
    """It was killed behind its last word: its data may be other by now, so it looks again."""
    runner.run_jobs(jobs[:1], tmp_path / "runs.csv")
    (jobs[0].folder / "environment.json").unlink()
    assert jobs[0].state == "begun"
    runner.run_jobs(jobs[:1], tmp_path / "runs.csv")
    assert jobs[0].state == "finished" and len(table(tmp_path / "runs.csv")) == 1
    (jobs[0].folder / "eval_results.json").write_text('{"accu')
    assert jobs[0].state == "begun"
    (jobs[0].folder / "config.resolved.yaml").write_text("")
    with pytest.raises(InputError, match="it holds no options"):
        _ = jobs[0].state


def test_a_run_that_another_command_finished_meanwhile_is_not_run_again(jobs, tmp_path, monkeypatch) -> None:
    results, real = tmp_path / "runs.csv", runner.start

    def start(job, parallel):
        if job is jobs[0]:  # while it runs, another command does the second
            monkeypatch.setattr(runner, "start", real)
            runner.run_jobs(jobs[1:2], results)
        return real(job, parallel)

    monkeypatch.setattr(runner, "start", start)
    runner.run_jobs(jobs[:2], results)
    assert sorted(row["seed"] for row in table(results)) == ["0", "1"]
    assert len((jobs[1].folder / "attempts.jsonl").read_text().splitlines()) == 1


def test_what_a_run_logs_holds_no_secret(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SOME_API_KEY", "supersecretvalue123")
    (tmp_path / "rows.jsonl").write_text("")
    options = {"data": str(tmp_path / "supersecretvalue123.jsonl"), "student": "x", "output_dir": str(tmp_path / "o")}
    (tmp_path / "o.yaml").write_text(json.dumps(options))
    assert runner.child([str(tmp_path / "o.yaml")]) == 2
    monkeypatch.setattr(runner, "read_recipe", lambda path: 1 / len(os.environ["SOME_API_KEY"][:0]))
    assert runner.child([str(tmp_path / "o.yaml")]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "***.jsonl" in said and "supersecret" not in said


def test_runs_of_two_students_with_a_common_name_are_two(jobs) -> None:
    def student(name: str) -> str:
        return key(dataclasses.replace(jobs[0], config=dataclasses.replace(jobs[0].config, student=name)))["student"]

    assert [student(n) for n in ("runs/a/final", "runs/b/final", "runs/b/checkpoint-20")] == [
        "a/final",
        "b/final",
        "b/checkpoint-20",
    ]
    assert student("hub/tiny") == student("models/tiny") == "tiny"


def test_a_signal_stops_all_and_the_same_command_goes_on(jobs, tmp_path) -> None:
    results = tmp_path / "runs.csv"
    for seed in (0, 1):
        (tmp_path / "out" / f"slow-{seed}").touch()
    started = [tmp_path / "out" / f"seed-{seed}" / "config.resolved.yaml" for seed in (0, 1)]

    def interrupt() -> None:
        while not all(path.exists() for path in started):
            timer.finished.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(0.1, interrupt)
    timer.start()
    with pytest.raises(Stopped) as caught:
        runner.run_jobs(jobs, results, parallel=2)
    timer.join()
    assert caught.value.exit_code == 143 and not results.exists()
    assert [job.state for job in jobs] == ["begun", "begun", "new"]
    for path in tmp_path.glob("out/slow-*"):
        path.unlink()
    assert len(runner.run_jobs(jobs, results, parallel=3)) == 3


KILLED = """
import os, signal, sys
from qcrd_fast.config import TrainConfig
from qcrd_fast.sweep import runner
config = TrainConfig(data=sys.argv[1], student="tiny", output_dir=sys.argv[2], method="dss")
job, = runner.plan(config, (0,), ("dss",), "x")
job.folder.mkdir(parents=True)
runner.start(job, 3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_command_leaves_no_run_behind_and_its_time_counts(rows_file, tmp_path) -> None:
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, rows_file, out], cwd=ROOT).returncode == -signal.SIGKILL
    until = time.monotonic() + 60
    while not (found := list(read_records(out / "seed-0" / "attempts.jsonl", "skip"))) and time.monotonic() < until:
        time.sleep(0.05)
    assert [(a["exit"], a["parallel"]) for a in found] == [(1, 3)] and found[0]["seconds"] < 60
    assert "the command that started this run is gone" in (out / "seed-0.log").read_text()


def test_a_second_signal_ends_the_runs_and_their_time_counts(jobs, tmp_path) -> None:
    for name in ("slow-0", "deaf"):
        (tmp_path / "out" / name).touch()
    started = jobs[0].folder / "config.resolved.yaml"

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    timer = threading.Timer(0.1, interrupt)
    timer.start()
    with pytest.raises(SystemExit):
        runner.run_jobs(jobs[:1], tmp_path / "runs.csv", parallel=2)
    timer.join()
    (attempt,) = read_records(jobs[0].folder / "attempts.jsonl")
    assert attempt["exit"] == -signal.SIGKILL and attempt["seconds"] >= 0 and attempt["parallel"] == 2


def test_what_refuses_the_first_three_runs_is_not_tried_on_the_rest(jobs, tmp_path, caplog) -> None:
    (tmp_path / "out" / "refuse").touch()
    more = runner.plan(dataclasses.replace(jobs[0].config, output_dir=str(tmp_path / "out")), range(9), ("dss",), "toy")
    with pytest.raises(RunError, match="3 of 9 runs failed"):
        runner.run_jobs(more, tmp_path / "runs.csv")
    assert "the other 6 are skipped" in caplog.text


def test_seeds_with_other_questions_have_no_mean_and_say_so(jobs, tmp_path, caplog) -> None:
    runner.plan(jobs[0].config, (0, 1), ("dss",), "toy")
    assert "each seed holds out other questions of --data" in caplog.text
    rows = runner.run_jobs(jobs[:2], tmp_path / "runs.csv")
    rows[1]["questions"] = "0123456789ab"
    assert results_csv.as_text(rows).endswith("dss: no mean, no difference: each seed answered other questions")
    caplog.clear()
    runner.plan(dataclasses.replace(jobs[0].config, eval_data=jobs[0].config.data), (0, 1), ("dss",), "toy")
    assert not caplog.text


def test_other_options_or_other_data_are_not_taken_for_the_same_run(jobs, tmp_path) -> None:
    runner.run_jobs(jobs[:1], tmp_path / "runs.csv")
    other = dataclasses.replace(jobs[0], config=dataclasses.replace(jobs[0].config, learning_rate=1.0))
    with pytest.raises(InputError, match=r"began with --learning-rate 5e-05, now it is 1\.0"):
        runner.run_jobs([other], tmp_path / "runs.csv")
    (jobs[0].folder / "environment.json").write_text(json.dumps({"data": "0123"}))
    with pytest.raises(InputError, match="made from other data"):
        runner.run_jobs(jobs[:1], tmp_path / "runs.csv")
    (tmp_path / "old.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        runner.run_jobs(jobs, tmp_path / "old.csv")


def test_options_are_told_apart_but_not_paths() -> None:
    config = TrainConfig(
        data="a", student="b/c", seed=3, method="qcrd", beta=0.3, bf16=False, use_peft=True, negative_lag=3
    )
    ours = "--positive-select softmin --negative-select max --beta 0.3 --negative-source none --negative-lag 3"
    ours += " --positive-quality checks --negative-quality vote --no-bf16 --use-peft"
    assert options_text(config) == ours
    assert options_text(dataclasses.replace(config, **PARTS)) == "--beta 0.3 --negative-lag 3 --no-bf16 --use-peft"
    assert options_text(dataclasses.replace(config, method="dss")) == "--beta 0.3 --negative-lag 3 --no-bf16 --use-peft"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--seeds 2 --seed 1", "--seeds and --seed"),
        ("--methods dss --method qcrd", "--methods and --method"),
        ("--parallel 2", "--parallel is for several runs"),
        ("--results x.csv", "--results is for several runs"),
        ("--seeds none", "--seeds expects how many"),
        ("--seeds=", "--seeds expects how many"),
        ("--seeds 2 --resume runs/x/checkpoint-3", "is for one run"),
        ("--seeds 2", "--data: nowhere.jsonl does not exist"),
    ],
)
def test_wrong_calls_of_several_runs_exit_2(args: str, says: str, tmp_path, capsys) -> None:
    command = ["train", "--data", "nowhere.jsonl", "--student", "x", "--output-dir", str(tmp_path / "o"), *args.split()]
    assert entry(command) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("results", ["/sys/kernel/x.csv", "nowhere/x.csv", "/dev/null"])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_results_that_cannot_be_written_are_refused_before_a_run(results, dry, rows_file, tmp_path, capsys) -> None:
    command = f"train --data {rows_file} --student x --output-dir {tmp_path}/o --seeds 2 --results {results}"
    assert entry([*command.split(), *dry]) == 2
    assert "--results" in (said := capsys.readouterr().err) or "device or pipe" in said
    assert not (tmp_path / "o").exists()


def test_dry_run_lists_the_runs(rows_file, tmp_path, capsys) -> None:
    command = f"train --data {rows_file} --student x --output-dir {tmp_path}/o --seeds 2 --methods dss,mi --dry-run"
    assert entry(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines == [f"{tmp_path}/o/{m}/seed-{s}  new" for s in (0, 1) for m in ("dss", "mi")]
        and not (tmp_path / "o").exists()
    )


# Rationales


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("First 3 + 4 = 7. Then 7 - 2 = 6.", [True, False]),
        ("3 * $4 = $12, so 12/5 = 2.4", [True, True]),
        ("10 / 3 = 3.33 and 10/3 = 3.4", [True, False]),  # to the decimals that are written
        ("5 x 3 = 15 apples, 3 × 8 + 9 = 33", [True, True]),
        ("- 16 - 5 = 11 apps\n- 77 - 23 = 54", [True, True]),  # a dash of a list is no sign
        ("1,000 + 200 = 1,200. In 2019, 3 + 3 = 6", [True, True]),
        ("2r + 3 = 7; 5 books * 3 = 15; x = 9; 9 = 9; no sums", []),  # nothing that can be computed
        ("3 - 5 = -2", [True]),
        ("9" * 600 + " + 1 = 3", []),
    ],
)
def test_arithmetic_is_checked(text: str, holds: list[bool]) -> None:
    assert equations(text) == holds


def test_rationales_are_judged_by_arithmetic_and_conclusion() -> None:
    good = judge_rationale("3 + 4 = 7, so 7 are left.", "number", "7", "8")
    assert (good["equations_right"], good["ends_in_gold"], good["ends_in_answer"]) == (1, True, False)
    bad = judge_rationale("3 + 4 = 8.", "number", "7", "8")
    assert (bad["equations_right"], bad["ends_in_gold"], bad["ends_in_answer"]) == (0, False, True)
    silent = judge_rationale("They were sold. So the answer is no.", "yes-no", "no", None)
    assert (silent["equations"], silent["ends_in_gold"], silent["ends_in_answer"]) == (0, True, False)
    assert judge_rationale("3 + 4 = 7", "equation", "( 3 + 4 )", "3+4")["ends_in_gold"]
    told = summarize([good, bad, silent])
    assert told == pytest.approx(
        {"arithmetic_checked": 2 / 3, "arithmetic_right": 0.5, "ends_in_gold": 2 / 3, "ends_in_answer": 1 / 3}
    )
    assert set(summarize([]).values()) == {None}


def test_answers_of_mixed_data_are_read_each_as_its_own(monkeypatch) -> None:
    from qcrd_fast import evaluate
    from qcrd_fast.data.schema import Question

    questions = [Question("a", "1 + 1?", gold="2", task="number"), Question("b", "Is it?", gold="yes", task="yes-no")]
    assert splits.main_task(questions) == "mixed" and splits.main_task(questions[:1] * 19 + questions[1:]) == "number"
    student = SimpleNamespace(source_ids=lambda *_: [1], text=lambda said: said)
    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: ["2.0", "Yes, it is"])
    assert [r["correct"] for r in evaluate.predict(student, questions, "mixed")] == [True, True]
    assert [r["correct"] for r in evaluate.predict(student, questions, "number")] == [True, False]


# Tables


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A recipe, and a CSV with its methods dss (5 seeds) and qcrd (2), and all of its tuning."""
    from bench import tables

    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "svamp-toy.yaml").write_text(
        "data: train.jsonl\ntest_data: test.jsonl\nstudent: hub/tiny\noutput_dir: runs\n"
    )
    settings = tables.Settings(tmp_path, tmp_path / "runs", (0, 1, 2, 3, 4), (0, 1))
    results = tmp_path / "runs.csv"

    def add(table, variant, seed, share: float, **more) -> None:
        job = settings.job(table, "svamp-toy", variant, seed, results_csv.read_csv(results))
        answers = intervals.Answers.of(
            [{"id": f"{i:03}", "correct": (i * 7 + seed) % 100 < 100 * share} for i in range(100)]
        )
        row = (
            dict.fromkeys(results_csv.COLUMNS) | key(job) | {"accuracy": share, "n": 100, "device": "GPU", "time": seed}
        )
        where = "validation" if table.tune else "test"
        row |= {
            "correct": answers.to_hex(),
            "questions": answers.questions,
            "evaluated_on": where,
            "gpu_minutes": 2,
        } | more
        assert results_csv.append_row(results, row) and not results_csv.append_row(results, row)

    return SimpleNamespace(tables=tables, settings=settings, results=results, add=add)


def test_tables_are_filled_and_the_rest_is_not_run(filled, capsys) -> None:
    methods = next(t for t in filled.tables.TABLES if t.name == "methods")
    for seed in range(5):
        filled.add(methods, filled.tables.METHOD["dss"], seed, 0.5)
        if seed < 2:
            filled.add(methods, filled.tables.METHOD["qcrd"], seed, 0.6)
    command = [
        "--recipe-folder",
        ".",
        "--recipes",
        "svamp-toy",
        "--results",
        str(filled.results),
        "--tables",
        "methods",
    ]
    assert filled.tables.main([*command, "--print-only", "--lines", "finetune,dss,qcrd"]) == 0
    text = capsys.readouterr().out
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    }
    assert lines["finetune"] == ["`--method finetune`", *["not run"] * 5, "63.0"]
    assert lines["dss"][1].startswith("50.0 (") and lines["dss"][2:4] == ["5", ""]
    assert lines["qcrd"][2] == "2" and lines["qcrd"][3].startswith("+10.0 (+") and lines["qcrd"][-1] == "69.0"
    assert filled.tables.main([*command, "--dry-run", "--lines", "dss,qcrd"]) == 0
    out, err = capsys.readouterr()
    assert out.count("to run") == 10 and "10 of 10" in err  # judged rationales are still missing
    assert filled.tables.main(["--tables", "nowhere"]) == 2


def test_tuning_is_used_once_all_methods_have_theirs(filled) -> None:
    tables, settings = filled.tables, filled.settings
    for variant in tables.TABLES[0].variants:
        assert settings.tuned("svamp-toy", results_csv.read_csv(filled.results)) == {}
        for seed in (0, 1):
            best = 1e-4 if tables.arm(variant.options) == "qcrd" else 2e-5
            share = 0.6 if variant.options["learning_rate"] == best else 0.5
            filled.add(tables.TABLES[0], variant, seed, share, accuracy_validation=share)
    rows = results_csv.read_csv(filled.results)
    rates = settings.tuned("svamp-toy", rows)
    assert rates["qcrd"] == {"learning_rate": 1e-4} and {m for m in rates} == set(tables.NAMES)
    assert all(rates[m] == {"learning_rate": 2e-5} for m in rates if m != "qcrd")
    ablation = next(t for t in tables.TABLES if t.name == "schemes")
    config = settings.job(ablation, "svamp-toy", ablation.variants[1], 0, rows).config
    assert (config.scheme, config.learning_rate, config.test_data) == ("maxmin", 1e-4, "test.jsonl")
    assert settings.job(tables.TABLES[0], "svamp-toy", tables.TABLES[0].variants[0], 0, rows).config.test_data is None


def test_no_two_lines_of_a_table_are_one_run_and_lines_of_several_tables_are_shared() -> None:
    from bench import tables

    settings = tables.Settings(ROOT / "recipes", Path("runs"), (0,), (0,))
    folders: list[Path] = []
    for t in tables.TABLES:
        for recipe in t.recipes:
            mine = [settings.job(t, recipe, v, 0, []).folder for v in t.variants]
            assert len(set(mine)) == len(mine), t.name
            folders += mine
    assert len(set(folders)) < len(folders) - 10
    jobs = tables.plan(tables.TABLES, settings, [])
    assert set(jobs) == set(folders) and all(lacks for _, lacks in jobs.values())


def test_exposure_counts_what_each_method_sees(rows_file, t5_folder) -> None:
    from bench.exposure import exposure
    from qcrd_fast.models.prompts import PromptSettings
    from qcrd_fast.models.student import Student
    from qcrd_fast.train.examples import make_examples
    from qcrd_fast.train.questions import Data

    student = Student.load(str(t5_folder), PromptSettings())
    told = {}
    for method in ("finetune", "dss", "sft-all", "redi", "qcrd"):
        config = TrainConfig(
            data=str(rows_file), student=str(t5_folder), method=method, max_new_tokens=9, negative_source="lagged"
        )
        examples = make_examples(Data.load(config).train, student, config)
        told[method] = exposure(method, examples, config)
    tokens = {m: t["rationale tokens with gradient"] for m, t in told.items()}
    assert tokens["finetune"] == (0, 0) and tokens["dss"] < tokens["sft-all"] < tokens["redi"]
    assert tokens["sft-all"][0] == sum(len(p.tokens) for e in examples for p in e.positives)
    assert (
        told["qcrd"]["scored without"] == tokens["redi"][0]
        and tokens["qcrd"][0] < tokens["qcrd"][1] < tokens["redi"][0]
    )
    assert told["dss"]["teacher rationales a question"] == 1 and told["qcrd"]["student's own"] == 1


# The whole path


@pytest.mark.slow
def test_the_ci_recipe_from_data_to_tables(tmp_path) -> None:
    """Two seeds of two methods in processes of their own, rows, rationales judged, Markdown; then nothing is left to
    run."""
    from qcrd_fast.demo.runner import write_demo
    from qcrd_fast.demo.students import Recipe

    (tmp_path / "data").mkdir()
    # the demo's own student takes a minute to make, and its rows say as little
    write_demo(tmp_path / "data" / "demo", 0, Recipe("decoder", (("symbol_pairs", 5, 0),), 8))
    command = [
        sys.executable,
        "-m",
        "qcrd_fast.bench.tables",
        "--recipe-folder",
        str(ROOT / "recipes"),
        "--recipes",
        "ci",
    ]
    command += ["--tables", "methods,rationales,logs", "--lines", "dss,qcrd", "--seeds", "2", "--parallel", "2"]
    command += ["--results", "runs.csv", "--output", "out.md"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for again in (False, True):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert ("starts" in done.stderr) != again
    rows = table(tmp_path / "runs.csv")
    assert sorted((r["method"], r["seed"]) for r in rows) == [(m, s) for m in ("dss", "qcrd") for s in "01"]
    assert all(
        r["n"] == "500" and r["recipe"] == "ci" and r["torch"] and r["commit"] and float(r["wall_s"]) > 0 for r in rows
    )
    assert all(r["gpu_minutes"] == "" or not r["device"].startswith("CPU") for r in rows)
    assert all(r["active_hinge_lagged"] for r in rows if r["method"] == "qcrd")
    text = (tmp_path / "out.md").read_text()
    assert "not run" not in text and "against dss" in text and "arithmetic right" in text
    assert not list(tmp_path.glob("runs/**/checkpoint-*")) and len(list(tmp_path.glob("runs/**/rationales.jsonl"))) == 4
