"""A run that is killed and resumed is the run that was left alone, to the last bit (trials 1 to 3 of
docs/reliability.md).

`python -m tests.support.crash_run` does the same hundreds of times, or at every operation on a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.crash_run import Crashes
from tests.support.faults import Fault
from tests.support.warm import differences

SEED = 1
STEP, EDGE, EVAL = (
    "qcrd_fast.train.objective:Objective.step",
    "qcrd_fast.train.trainer:Trainer._begin_iteration",
    "qcrd_fast.train.evaluation:predict",
)
SAMPLE = "qcrd_fast.train.negatives:LaggedNegatives._sample"
KILLED = -9
pytestmark = pytest.mark.slow


class TestTrial1:
    """kill -9 at 20 random moments, half of them within a save or an append: loss curve, weights, optimizer, negatives
    and predictions are those of the unbroken run. So they are when the power fails, and what was not synced is lost."""

    @pytest.mark.parametrize("number", range(20))
    def test_killed_at_a_random_moment(self, crashes: Crashes, number: int) -> None:
        wrong = crashes.random_trial(SEED, number)
        assert wrong is None, f"{wrong}\nagain: python -m tests.support.crash_run --seed {SEED} --only {number}"

    def test_deterministic(self, crashes: Crashes, tmp_path) -> None:
        """`--deterministic` is on while `train` runs, off afterwards, and on a CPU the bits are those without it."""
        import torch

        from qcrd_fast.utils.determinism import deterministic

        with deterministic(True):
            assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not torch.are_deterministic_algorithms_enabled()
        whole = crashes.wholes[0]
        said = Fault("int", 0, "torch:use_deterministic_algorithms")  # it is called: the signal comes
        assert crashes.warm.run(crashes.args(whole.student, tmp_path / "a", deterministic=True), said).code == 130
        done = crashes.warm.run(crashes.args(whole.student, tmp_path / "b", deterministic=True))
        assert done.code == 0, done.err
        assert differences(tmp_path / "b", whole.run) == []

    def test_collect_at_each_of_its_operations(self, crashes: Crashes, tmp_path) -> None:
        """`collect` too: killed at each operation on a file, or without power or room, the same command ends the
        same."""
        rows = [json.loads(line) for line in crashes.rows.read_text().splitlines()[:2]]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"id": row["id"], "question": row["question"]} for row in rows]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))

        def args(out: Path) -> list[str]:
            files = {"questions": tmp_path / "questions.jsonl", "output": out / "s.jsonl"}
            options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
            return ["collect", *options, "--teacher", f"replay:{tmp_path / 'samples.jsonl'}", "--num-samples", "2"]

        (whole := tmp_path / "whole").mkdir()
        done = crashes.warm.run(args(whole), folder=whole)
        assert done.code == 0 and len(done.points) > 12, done.err
        every = range(len(done.points))
        trials = {"kill": every, "power": every[::4], "full": every[1::4]}
        for do, at in ((do, at) for do, chosen in trials.items() for at in chosen):
            where = f"{do} {at} ({done.points[at]})"
            (out := tmp_path / f"{do}-{at}").mkdir()
            ended = crashes.warm.run(args(out), Fault(do, at), folder=out)
            assert do == "full" or ended.code == KILLED, where
            assert "Traceback" not in ended.err and crashes.warm.run(args(out)).code == 0, f"{where}: {ended.err}"
            assert (out / "s.jsonl").read_bytes() == (whole / "s.jsonl").read_bytes(), where
            assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}, where

    def test_killed_as_final_was_pointed(self, crashes: Crashes) -> None:
        """What is left is a link, which nothing else in a run folder may be."""
        whole = crashes.wholes[0]
        wrong = crashes.trial(whole, point=whole.points.index("rename .final.tmp"))
        assert wrong is None, wrong

    @pytest.mark.parametrize(
        "student, what",
        [(0, "rename .tmp-checkpoint-4"), (1, "mkdir .tmp-checkpoint-6")],
    )
    def test_the_power_fails(self, crashes: Crashes, student: int, what: str) -> None:
        whole = crashes.wholes[student]
        wrong = crashes.trial(whole, point=whole.points.index(what), do="power")
        assert wrong is None, wrong


@pytest.mark.parametrize("student", [0, 1], ids=["t5", "llama"])
class TestTrial2:
    """Three kills in one run: between two micro-batches, at the edge of an iteration, in the evaluation."""

    def test_killed_three_times(self, crashes: Crashes, student: int, tmp_path) -> None:
        whole, run = crashes.wholes[student], tmp_path / "run"
        args = crashes.args(whole.student, run, resume="auto")
        assert crashes.warm.run(args, Fault("kill", 3, STEP)).code == KILLED  # step 2, half of its gradient made
        assert not list(run.glob("checkpoint-*"))
        # its snapshot is being written
        assert crashes.warm.run(args, Fault("kill", 1, EDGE, after=True)).code == KILLED
        assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
        assert crashes.warm.run(args, Fault("kill", 0, EVAL, after=True)).code == KILLED
        assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
        done = crashes.warm.run(args)
        assert done.code == 0, done.err
        assert differences(run, whole.run) == []


SINGLE = {"save_total_limit": 1, "save_steps": 1, "eval_steps": 6}  # iteration 2 speaks with the student of iteration 1


@pytest.fixture(scope="module", params=[0, 1], ids=["t5", "llama"])
def single(request, crashes: Crashes):
    """(student, unbroken run) with a single checkpoint."""
    student = crashes.wholes[request.param].student
    run = crashes.folder / f"single-{student.name}"
    done = crashes.warm.run(crashes.args(student, run, **SINGLE))
    assert done.code == 0, done.err
    return student, run


class TestTrial3:
    """Kills around the iteration that first uses a lagged snapshot, with a single checkpoint kept: the same negatives
    token for token, and the snapshot is still there though its checkpoint is gone."""

    @pytest.mark.parametrize(
        "fault, done_steps",
        [
            (Fault("kill", 3, "qcrd_fast.train.trainer:Trainer._train_step", after=True), 3),
            (Fault("kill", 4, SAMPLE, after=True), 4),
            (Fault("kill", 5, "qcrd_fast.train.trainer:Trainer._train_step"), 5),
        ],
        ids=["before", "at", "after"],
    )
    def test_killed_around_the_first_use(
        self, crashes: Crashes, single, fault: Fault, done_steps: int, tmp_path
    ) -> None:
        student, unbroken = single
        args = crashes.args(student, tmp_path / "run", resume="auto", **SINGLE)
        assert crashes.warm.run(args, fault).code == KILLED
        run = tmp_path / "run"
        assert [p.name for p in run.glob("checkpoint-*")] == [f"checkpoint-{done_steps}"]
        assert (run / "snapshots" / "iteration-00001.safetensors").is_file()
        done = crashes.warm.run(args)
        assert done.code == 0, done.err
        assert differences(run, unbroken) == []
        assert len(list((run / "negatives").iterdir())) == 3


@pytest.mark.parametrize("quality", ["vote", "text", "none"])
def test_killed_with_each_quality(crashes: Crashes, quality: str, tmp_path) -> None:
    """By votes, by text, without weights: killed in the middle of an iteration's gradient, and as its negatives are
    drawn."""
    options = {"quality": quality, "discriminator": "auto", "agreeing_negatives": "drop", "max_new_tokens": 20}
    student, runs = crashes.wholes[1].student, [tmp_path / "whole", tmp_path / "run"]
    done = crashes.warm.run(crashes.args(student, runs[0], **options))
    assert done.code == 0, done.err
    args = crashes.args(student, runs[1], resume="auto", **options)
    for fault in (Fault("kill", 7, STEP), Fault("kill", 0, SAMPLE, after=True)):
        assert crashes.warm.run(args, fault).code == KILLED
    done = crashes.warm.run(args)
    assert done.code == 0, done.err
    assert differences(runs[1], runs[0]) == []
