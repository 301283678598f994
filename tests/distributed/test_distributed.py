"""`train` in two processes (gloo, CPU), replicated and sharded, against one process with the same questions a step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import checkpoint_path
from tests.support.students import make_llama, make_t5

pytestmark = pytest.mark.slow

COMMON = {
    "iteration_steps": 5, "negative_lag": 1, "max_new_tokens": 6, "learning_rate": 5e-4,
    "discriminator_pretrain_steps": 2, "max_target_length": 24,
    "discriminator_folds": 2, "discriminator_min_auc": 0.0, "scheme": "minmax", "negative_source": "lagged",
    "quality": "discriminator",
    "discriminator_update_batches": 1, "sample_batch_size": 4, "max_answer_tokens": 4, "delta": 8.0, "ddp_timeout": 60,
}  # fmt: skip
ONE, TWO = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}
TWICE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    """Without dropout: its mask is a matter of the rank."""
    folders = {"t5": make_t5(tmp_path_factory.mktemp("t5")), "llama": make_llama(tmp_path_factory.mktemp("llama"))}
    for family, make in (("t5", make_t5), ("llama", make_llama)):
        folders[f"teacher of {family}"] = make(tmp_path_factory.mktemp(f"teacher-{family}"), layers=1)
    config = folders["t5"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.0}))
    return folders


@pytest.fixture(scope="module")
def run_all(students, rows_file, warm, tmp_path_factory):
    """Runs named scenarios one after another in a warm process; {name: (exit code by rank, seconds by rank, run
    folder)}."""

    def run(scenarios: dict[str, dict], float64: bool = False) -> dict[str, tuple[list[int], list[float], Path]]:
        root = tmp_path_factory.mktemp("runs")
        listed = []
        for name, (student, size, options, *inject) in scenarios.items():
            config = COMMON | {"data": str(rows_file), "student": str(students[student])} | options
            config = {"output_dir": str(root / name), **config}
            listed.append({"size": size, "config": config, "float64": float64, "inject": inject[0] if inject else None})
        told = warm.call("tests.support.train_ranks:main", listed, timeout=200 * len(listed))
        found = {}
        results = [line for line in told.splitlines() if line.startswith('{"codes": ')]
        for name, scenario, line in zip(scenarios, listed, results, strict=True):
            result = json.loads(line)
            found[name] = result["codes"], result["seconds"], Path(scenario["config"]["output_dir"])
            if not scenario["inject"]:
                assert set(result["codes"]) == {0}, (name, result, told[-3000:])
        return found

    return run


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def said(run: Path) -> list[dict]:
    """The negatives of a run by iteration and question; their chunks are longer with more processes."""
    return [
        {r["id"]: r["tokens"] for r in map(json.loads, path.read_text().splitlines()) if "id" in r}
        for path in sorted(run.glob("negatives/*"))
    ]


def assert_same(one: Path, other: Path, step: int, losses: float = 1e-9, moved: float = 1e-9) -> None:
    """Losses to `losses`, weights to `moved`, the same negatives, accuracies and results."""
    a, b = logged(one), logged(other)
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for x, y in zip(a, b, strict=True):
        if "loss" in x:
            assert y["loss"] == pytest.approx(x["loss"], rel=losses), (x["step"], x["loss"], y["loss"])
            for name in ("loss_pred", "loss_cl", "loss_d", "grad_norm", "quality_positive", "active_hinge_lagged"):
                want = x[name] if x[name] is None else pytest.approx(x[name], rel=100 * losses, abs=losses)
                assert y[name] == want, (x["step"], name)
        else:
            assert y["eval_accuracy"] == x["eval_accuracy"]
    before, after = (load_file(checkpoint_path(run, step) / "model.safetensors") for run in (one, other))
    assert before.keys() == after.keys()
    worst = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert worst <= moved, worst
    for mine, theirs in zip(said(one), said(other), strict=True):  # at a run's end a longer chunk has more questions
        assert {i: theirs[i] for i in mine} == mine
    assert json.loads((one / "eval_results.json").read_text()) == json.loads((other / "eval_results.json").read_text())


@pytest.mark.parametrize("student", ["t5", "llama"])
def test_two_ranks_equal_one_process(run_all, student):
    steps = {"max_steps": 12, "save_steps": 6, "iteration_steps": 4}
    runs = run_all(
        {
            "one": (student, 1, steps | ONE),
            "DDP": (student, 2, steps | TWO),
            "FSDP2": (student, 2, steps | TWO | {"fsdp": True}),
            "DDP, accumulated": (student, 2, steps | TWICE),
        },
        float64=True,
    )
    for name in list(runs)[1:]:
        assert_same(runs["one"][2], runs[name][2], 12)
    shares = sorted(p.name for p in (runs["FSDP2"][2] / "checkpoint-12").glob("optimizer*"))
    assert shares == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]


def test_every_way_of_training_in_two_ranks(run_all):
    """Methods, passes and memory savers. 21 questions, 4 a step: in the last step of an epoch one rank has none."""
    steps = {"max_steps": 7, "save_steps": 7, "iteration_steps": 3, "validation_fraction": 0.125}
    kinds = {
        "dss": ({"method": "dss"}, True),
        "mi": ({"method": "mi"}, False),
        "joint, checkpointing": ({"forward": "joint", "gradient_checkpointing": True}, True),
        "peft, stream": ({"use_peft": True, "lora_r": 2, "overlap": "stream"}, True),
        "by votes": ({"quality": "vote", "agreeing_negatives": "drop", "max_new_tokens": 24}, False),
        "fixed, no quality": ({"negative_source": "fixed", "quality": "none"}, False),
    }
    scenarios = {}
    for name, (options, sharded) in kinds.items():
        options = steps | options
        scenarios[name] = ("llama", 1, options | ONE)
        scenarios[f"{name}, DDP"] = ("llama", 2, options | TWICE)
        if sharded:
            scenarios[f"{name}, FSDP2"] = ("llama", 2, options | TWICE | {"fsdp": True})
    runs = run_all(scenarios, float64=True)
    for name, (_, sharded) in kinds.items():
        for engine in ("DDP", "FSDP2")[: 1 + sharded]:
            # MI's maximum over time sees the padding, so the micro-batch.
            limits = (1e-6, 1e-4) if name == "mi" else (1e-9, 1e-9)
            assert_same(runs[name][2], runs[f"{name}, {engine}"][2], 7, *limits)


TAUGHT = {
    "opd": ("llama", {"method": "opd"}),
    "sdft": ("t5", {"method": "sdft", "teacher_ema": 0.9}),
    "npo": ("llama", {"method": "npo"}),
    "dft": ("t5", {"method": "dft"}),
    "mentor-kd": ("t5", {"method": "mentor-kd", "top_logprobs": 4}),
    "gkd": ("llama", {"method": "gkd"}),
    "gkd t5": ("t5", {"method": "gkd"}),
}


@pytest.mark.parametrize("name", TAUGHT)
def test_methods_with_a_teacher_in_two_ranks(name, run_all, students):
    """Each process has the whole teacher; weights for tokens, a moving teacher, a reference and whole distributions are
    those of one process."""
    student, options = TAUGHT[name]
    steps = {"max_steps": 6, "save_steps": 6, "iteration_steps": 2, "negative_source": "minority", "quality": None}
    teacher = {"teacher": str(students[f"teacher of {student}"])}
    options = steps | options | (teacher if options["method"] in ("opd", "mentor-kd", "gkd") else {})
    scenarios = {
        "one": (student, 1, options | ONE),
        "DDP": (student, 2, options | TWICE),
        "FSDP2": (student, 2, options | TWO | {"fsdp": True}),
    }
    runs = {of: run for of, (_, _, run) in run_all(scenarios, float64=True).items()}
    for engine in ("DDP", "FSDP2"):
        assert_same(runs["one"], runs[engine], 6)
        for a, b in zip(logged(runs["one"]), logged(runs[engine]), strict=True):
            for key in ("teacher_kl", "loss_npo", "loss_cl"):
                if a.get(key) is None:
                    assert b.get(key) is None
                else:
                    assert b[key] == pytest.approx(a[key], rel=1e-9, abs=1e-12), (engine, a["step"])


def test_a_run_goes_on_with_another_number_of_processes(run_all):
    """Trial 13: one process, then two that shard, then one; the questions of each step, and so its loss, stay."""
    steps = {"max_steps": 12, "save_steps": 6}
    whole = run_all({"whole": ("llama", 1, steps | ONE)}, float64=True)["whole"][2]
    out = {"output_dir": str(whole.parent / "moved"), "resume": "auto"}
    term = {"rank": 0, "signal": "SIGTERM"}
    runs = run_all(
        {
            "begun": ("llama", 1, steps | ONE | out, term | {"step": 3}),
            "refused": ("llama", 2, steps | ONE | out, term | {"step": 0}),
            "sharded": ("llama", 2, steps | TWO | out | {"fsdp": True}, term | {"step": 7}),
            "ended": ("llama", 1, steps | ONE | out),
        },
        float64=True,
    )
    assert [codes for codes, _, _ in runs.values()] == [[143], [2, 2], [143, 143], [0]]
    assert_same(whole, Path(out["output_dir"]), step=12)


def test_a_rank_that_is_lost_ends_the_others(run_all):
    """Trial 12: killed, the other ends within ten seconds; stopped, at the timeout; asked to end, both save the same
    step."""
    options = {"max_steps": 8, "save_steps": 2} | TWO
    inject = {"rank": 1, "step": 3}
    runs = run_all(
        {
            "killed": ("llama", 2, options, inject | {"signal": "SIGKILL"}),
            "killed, sharded": ("llama", 2, options | {"fsdp": True}, inject | {"signal": "SIGKILL"}),
            "stopped": ("llama", 2, options | {"ddp_timeout": 3}, inject | {"signal": "SIGSTOP"}),
            "asked": ("llama", 2, options, inject | {"signal": "SIGTERM"}),
            "interrupted": ("llama", 2, options | {"fsdp": True}, inject | {"signal": "SIGINT"}),
        }
    )
    for name in ("killed", "killed, sharded"):
        codes, seconds, run = runs[name]
        assert codes == [1, -signal.SIGKILL] and seconds[0] < 10, (codes, seconds)
        assert checkpoints.find_corruption(run / "checkpoint-2", run) is None
    codes, seconds, _ = runs["stopped"]
    assert codes == [1, -signal.SIGKILL] and 2 < seconds[0] < 13, (codes, seconds)
    for name, code in (("asked", 143), ("interrupted", 130)):
        codes, _, run = runs[name]
        assert codes == [code, code]
        assert checkpoints.latest_checkpoint(run) == run / "checkpoint-4"


def test_three_ranks_killed_and_resumed(run_all, students):
    """The unbroken run of three to the last bit. Three add in an order that DDP's buckets decide; two cannot tell."""
    three = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 1}
    out = {"output_dir": str(students["t5"].parent / "three")}
    killed = {"rank": 1, "step": 3, "signal": "SIGKILL"}
    runs = run_all(
        {
            "whole": ("t5", 3, three),
            "killed": ("t5", 3, three | out, killed),
            "resumed": ("t5", 3, three | out | {"resume": "auto"}),
        }
    )
    assert runs["killed"][0] == [1, -signal.SIGKILL, 1]
    before, after = (load_file(runs[name][2] / "checkpoint-6" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rank_that_fails_and_lives_on_lets_the_others_go(warm):
    """As in a script that catches the error. The same processes train again afterwards."""
    found = json.loads(warm.call("tests.support.failing_ranks:main", timeout=200).splitlines()[-1])
    lost = "RunError: rank 0: another of the 2 processes has ended or was"
    for name, raised in ("input", "InputError: an option"), ("run", "RunError: a step"), ("bug", "KeyError: 'a bug'"):
        assert found[name] == [[lost[:60], True], [raised, True]], (name, found)
    assert found["first"] == found["last"] == [["ended", True]] * 2, found
    assert all(said.startswith("InputError: torch.distributed has a process group") for said, _ in found["owned"]), (
        found
    )


def test_torchrun_starts_it(students, rows_file, tmp_path):
    """The command of the documentation; the results are printed once."""
    options = COMMON | {
        "max_steps": 2,
        "data": rows_file,
        "student": students["t5"],
        "output_dir": tmp_path / "run",
        "seed": 0,
    }
    flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "qcrd_fast",
    ]
    told = subprocess.run([*command, "train", *flags], capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.count("accuracy_untrained") == 1
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    for refused in (["demo", "--output-dir", str(tmp_path / "demo")], ["train", *flags, "--seeds", "2"]):
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
        told = subprocess.run(
            [sys.executable, "-m", "qcrd_fast", *refused], capture_output=True, text=True, env=environment
        )
        assert told.returncode == 2 and "one process" in told.stderr, told.stderr
