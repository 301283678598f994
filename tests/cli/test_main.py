"""The command line: options, YAML, exit codes, what goes where; the library behind it is replaced where it would be
slow."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli import main as cli_main
from cli.main import cli, entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.utils import memory
from tests.support.paths import ROOT

RESULTS = {
    "accuracy": 0.5,
    "accuracy_validation": 0.25,
    "accuracy_untrained": 0.0,
    "n": 8,
    "task": "number",
    "comparison": [],
}
VERBS = (
    "active",
    "bench",
    "collect",
    "demo",
    "doctor",
    "eval",
    "export",
    "generate",
    "prepare",
    "report",
    "score",
    "score-teacher",
    "select",
    "train",
    "validate",
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """train, run_demo, evaluate_run and generate_text that record their call, or do what `behave` says."""
    seen = SimpleNamespace(calls=[], behave=lambda: RESULTS)

    def fake(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.calls.append((name, args, options))
            return seen.behave()

        return call

    monkeypatch.setitem(sys.modules, "qcrd_fast.train.trainer", SimpleNamespace(train=fake("train")))
    for name in ("check_start", "check_names"):
        monkeypatch.setattr(f"qcrd_fast.train.preflight.{name}", lambda config, **_: None)
    monkeypatch.setattr("qcrd_fast.train.questions.Data.load", lambda config: None)
    evaluate = SimpleNamespace(evaluate_run=fake("evaluate_run"), generate_text=fake("generate_text"))
    monkeypatch.setitem(sys.modules, "qcrd_fast.evaluate", evaluate)
    monkeypatch.setattr(cli_main, "run_demo", fake("run_demo"))
    return seen


@pytest.fixture
def train_args(tmp_path: Path) -> list[str]:
    return ["train", "--data", "rows.jsonl", "--student", "tiny", "--output-dir", str(tmp_path / "run")]


def trained_with(library: SimpleNamespace) -> TrainConfig:
    return library.calls[-1][1][0]


def fails(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a refused command."""
    assert entry(args) == code
    out, err = capsys.readouterr()
    assert out == "" and err.strip().count("\n") == 0, (out, err)
    return err


# Verbs and options


def test_help_lists_the_verbs_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["--help"]) == 0
    listed = capsys.readouterr().out.split("Commands:\n")[1].split("\n")
    assert tuple(line.split()[0] for line in listed if line) == VERBS == tuple(sorted(cli.commands))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry([verb, "--help"]) == 0
    assert "Usage: qcrd-fast" in capsys.readouterr().out


def test_every_field_is_an_option_with_its_help_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    entry(["train", "--help-all"])
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    for field in dataclasses.fields(TrainConfig):
        for name in (field.name, *field.metadata["aliases"]):
            assert "--" + name.replace("_", "-") in shown
        assert field.metadata["help"][:20] in shown
    assert "[default: 0.9; 0<=x<=1]" in shown  # alpha_d_decay: default and range
    assert "[minmax|maxmin|sampling|mean|wmean]" in shown


@pytest.mark.parametrize("verb", ["train", "demo"])
def test_the_usual_options_fit_one_screen(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert entry([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 50 and max(map(len, shown.splitlines())) <= 82  # two commands of the docstring
    usual = [f.name for f in dataclasses.fields(TrainConfig) if f.metadata["usual"]]
    hidden = {"data", "student", "test_data"} if verb == "demo" else set()
    assert 10 <= len(usual) <= 14
    for name in set(usual) - hidden:
        assert f"--{name.replace('_', '-')}" in shown
    assert "--ddp-timeout" not in shown and f"more: qcrd-fast {verb} --help-all" in shown
    assert "--learning-rate, --lr FLOAT" in shown and "qcrd, sft-all" in shown


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("train --learning-r", "plain,--learning-rate"),
        ("train --lr 1 --data tr", "file,tr"),
        ("eval ru", "file,ru"),
        ("prepare --output o", "file,o"),
        ("train --forward j", "plain,joint"),
        ("train --run-name x", ""),
    ],
)
def test_a_shell_completes_names_and_files(
    words: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"qcrd-fast {words}"
    for name, value in {
        "_QCRD_FAST_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words.split())),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        entry([])
    assert left.value.code == 0 and capsys.readouterr().out.strip() == offered


def test_options_reach_the_config_in_any_spelling(library: SimpleNamespace, train_args: list[str]) -> None:
    extra = (
        "--learning_rate 1e-3 --per-device-train_batch_size 4 --bf16 "
        "--no-gradient-checkpointing --save-total-limit none"
    )
    assert entry([*train_args, *extra.split()]) == 0
    config = trained_with(library)
    assert (config.learning_rate, config.per_device_train_batch_size, config.bf16) == (1e-3, 4, True)
    assert config.save_total_limit is None and config.gradient_checkpointing is False


def test_aliases(library: SimpleNamespace, tmp_path: Path) -> None:
    args = f"train --data a --model_name_or_path b --resume-from-checkpoint auto --output-dir {tmp_path}/run"
    assert entry(f"{args} --epochs 2 --batch_size 3 --lr 0.1 --max-train-samples 9".split()) == 0
    config = trained_with(library)
    assert (config.student, config.resume, config.max_samples) == ("b", "auto", 9)
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.learning_rate) == (2.0, 3, 0.1)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("trian", "did you mean 'train'?"),
        ("banana", "unknown verb 'banana'"),
        ("train --lerning_rate 3", "did you mean '--learning-rate'?"),
        ("train --output x", "did you mean '--output-dir'?"),
        ("eval run --date x", "did you mean '--data'?"),
        ("train --method qcdr", "'qcdr' is not one of 'qcrd'"),
        ("train --load-in-4bit", "unknown option --load-in-4bit; not supported: weights are fp32"),
        ("train --lora_rank 8", "unknown option --lora-rank; here it is --lora-r"),
        ("train --dataset-name x", "here it is --data"),
        ("train --seed x", "'x' is not a valid integer"),
        ("train --beta -1", "-1.0 is not in the range x>=0"),
        ("train --learning-rate nan --data a", "--learning-rate must be finite"),
        ("train stray", "unexpected extra argument (stray)"),
        ("train", "qcrd-fast demo"),
        ("train --data a", "--student"),
        ("train --data a --student b", "--output-dir"),
        ("demo", "--output-dir"),
        ("eval", "RUN_OR_MODEL"),
        ("eval run", "--data"),
        ("prepare", "INPUT"),
        ("validate", "FILE"),
        ("generate run  ", "QUESTION"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails(args.split(), capsys)


def test_no_verb_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Commands:" in err


# --config


def test_options_override_the_file_and_both_override_defaults(
    library: SimpleNamespace, train_args: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning-rate: 1e-4\nbeta: 0.3\nsave_total_limit: null\nmodel_name_or_path: other\njson: true\n")
    assert entry([*train_args, "--config", str(file), "--beta", "0.4"]) == 0
    config = trained_with(library)
    assert (config.learning_rate, config.beta, config.delta, config.save_total_limit) == (1e-4, 0.4, 3.0, None)
    assert config.student == "tiny"


def test_config_serves_other_verbs(library: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: rows.jsonl\nbatch_size: 3\nreasoning: true\n")
    assert entry(["eval", "run", "--config", str(file)]) == 0
    _, args, options = library.calls[-1]
    assert args == ("run", "rows.jsonl") and options["batch_size"] == 3 and options["reasoning"] is True


@pytest.mark.parametrize("value", ["[a.jsonl]", "{a: 1}"])
def test_several_values_of_an_option_of_one_are_refused(value: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    Path("c.yaml").write_text(f"output: {value}")
    assert "c.yaml: --output expects one value, got" in fails(["prepare", "rows.jsonl", "--config", "c.yaml"], capsys)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_resolved_config_can_be_read_back(library: SimpleNamespace, tmp_path: Path) -> None:
    import yaml

    file, run = tmp_path / "config.resolved.yaml", str(tmp_path / "run")
    file.write_text(yaml.safe_dump(TrainConfig(data="a", student="b", output_dir=run, bf16=False).to_dict()))
    assert entry(["train", "--config", str(file)]) == 0
    assert trained_with(library) == TrainConfig(data="a", student="b", output_dir=run, bf16=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lerning_rate: 1", "unknown option 'lerning_rate'; did you mean 'learning_rate'?"),
        ("config: other.yaml", "unknown option 'config'"),
        ("beta: 1\ngamma: !!python/object/apply:os.system ['touch pwned']", ":2: could not determine a constructor"),
        ("beta: !!python/name:os.system", "only plain YAML values"),
        ("seed: 3.7", "--seed expects int, got 3.7"),
        ("seed: true", "--seed expects int, got True"),
        ("bf16: maybe", "--bf16 expects bool, got 'maybe'"),
        ("beta: [1, 2]", "--beta expects float"),
        ("seed: 1\nseed: 2", ":2: duplicate key 'seed'"),
        ("learning_rate: 1\nlearning-rate: 2", "'learning_rate' is given twice"),
        ("- 1", "expected a mapping"),
        ("{", "only plain YAML"),
        ("seed: 2024-13-45", "not readable as YAML"),
        ("[" * 100_000, "not readable as YAML"),
        ("a\x00b: 1", "not readable as YAML"),
    ],
)
def test_bad_config_files_are_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    message = fails(["train", "--data", "a", "--student", "b", "--output-dir", "run", "--config", "c.yaml"], capsys)
    assert says in message
    assert not Path("pwned").exists() and not Path("run").exists()


def test_a_missing_config_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in fails(["train", "--config", "nowhere.yaml"], capsys)


# What is printed


@pytest.mark.parametrize("verb", ["train", "demo", "eval"])
def test_results_on_stdout_and_all_else_on_stderr(
    verb: str, library: SimpleNamespace, train_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty() -> dict[str, Any]:
        print("a library prints")
        logging.getLogger("qcrd_fast.train.trainer").info("a library logs")
        return RESULTS

    library.behave = chatty
    args = {
        "train": train_args,
        "demo": ["demo", "--output-dir", str(tmp_path)],
        "eval": ["eval", "run", "--data", "rows"],
    }
    assert entry(args[verb]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["accuracy", "0.5000"]
    assert out.splitlines()[2].split() == ["accuracy_untrained", "0.0000"]
    assert "prints" not in out and "a library prints" in err and "a library logs" in err
    assert entry([*args[verb], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULTS


def test_generate_prints_rationale_and_answer(
    library: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library.behave = lambda: [{"rationale": "1 + 1 = 2.", "answer": "2"}] * 2
    assert entry(["generate", "run", "1 + 1?", "--num-samples", "2", "--temperature", "0.7"]) == 0
    assert capsys.readouterr().out == "Rationale: 1 + 1 = 2.\nAnswer: 2\n\nRationale: 1 + 1 = 2.\nAnswer: 2\n"
    assert library.calls[-1][2]["temperature"] == 0.7
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("½ of 4?\n".encode())))
    assert entry(["generate", "run", "-", "--json"]) == 0
    assert library.calls[-1][1] == ("run", "½ of 4?")
    assert json.loads(capsys.readouterr().out)[0]["answer"] == "2"


def test_demo_passes_on_only_what_was_given(library: SimpleNamespace, tmp_path: Path) -> None:
    assert entry(["demo", "--output-dir", str(tmp_path), "--seed", "3", "--dry-run"]) == 0
    assert library.calls == [("run_demo", ({"seed": 3}, str(tmp_path)), {"compare": None, "dry_run": True})]


def test_demo_ends_with_the_table_and_the_next_commands(
    library: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"student": name, "accuracy": 0.5, "accuracy_reasoned": 0.25, "sound_reasoning": 0.125}
        for name in ("dss", "qcrd")
    ]
    library.behave = lambda: RESULTS | {"comparison": rows, "accuracy_reasoned": 0.25}
    assert entry(["demo", "--output-dir", str(tmp_path), "--compare", "dss"]) == 0
    assert library.calls[-1][2] == {"compare": "dss", "dry_run": False}
    told = capsys.readouterr().out
    assert re.search(r"^dss +0\.500 +0\.250 +0\.125$", told, re.MULTILINE) and "qcrd-fast generate" in told
    assert entry(["demo", "--output-dir", str(tmp_path), "--compare", "none-such"]) == 2


def test_train_dry_run_writes_nothing(library: SimpleNamespace, train_args: list[str]) -> None:
    assert entry([*train_args, "--dry-run"]) == 0
    assert library.calls[-1][2]["dry_run"] is True
    assert not Path(train_args[-1]).exists()


# Failures


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("rows.jsonl:3: no question"), 2),
        (RunError("loss is nan at step 3"), 1),
        (Stopped(signal.SIGINT), 130),
        (Stopped(signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    library: SimpleNamespace,
    train_args: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    library.behave = fail
    assert (str(error) or "interrupted") in fails(train_args, capsys, code)


def test_sigterm_outside_the_loop_exits_143(
    library: SimpleNamespace, train_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    library.behave = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert "terminated" in fails(train_args, capsys, 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_unexpected_shows_a_traceback_without_secrets(
    library: SimpleNamespace,
    train_args: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "swordfish-1234")
    secrets = "swordfish-1234", "hf_" + "a" * 30, "sk-proj-" + "b" * 30, "https://me:hunter2@host"

    def fail() -> None:
        logging.getLogger("qcrd_fast.train.trainer").warning("trying %s", secrets[0])
        raise LookupError(" ".join(secrets) + " Authorization: Bearer abcdefghijkl")

    library.behave = fail
    assert entry(train_args) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" in err and "LookupError" in err and "trying ***" in err
    for secret in (*secrets, "hunter2", "abcdefghijkl"):
        assert secret not in err


def test_train_refuses_a_folder_in_use_or_not_empty(
    library: SimpleNamespace, train_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(train_args[-1])
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert "--resume auto" in fails(train_args, capsys)
    assert (run / "notes.txt").read_text() == "mine" and not library.calls


# Start-up and the real library


def in_new_process(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, **options
    )


def test_help_prepare_and_validate_import_no_torch(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    sample = {"rationale": "1 + 1 = 2.", "answer": "2"}
    rows.write_text(json.dumps({"id": "a", "question": "1 + 1?", "answer": "2", "samples": [sample]}) + "\n")
    code = f"""
import sys
from cli.main import entry
assert entry(["train", "--help"]) == 0
assert entry(["validate", {str(rows)!r}]) == 0
assert entry(["prepare", {str(rows)!r}, "--output", {str(tmp_path / "out.jsonl")!r}]) == 0
loaded = {{"torch", "transformers", "triton", "numpy"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["majority"] == "2"


def test_prepare_and_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    samples = [{"rationale": f"{n} it is.", "answer": n} for n in ("2", "2", "3")]
    samples[1]["rationale"] = "Surely 2."
    good = json.dumps({"id": "a", "question": "1 + 1?", "answer": "2", "samples": samples})
    rows.write_text(good + "\n")
    args = ["prepare", str(rows), "--output", str(output)]
    assert entry([*args, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 1 and not output.exists()
    assert entry(args) == 0
    assert "questions" in capsys.readouterr().out
    row = json.loads(output.read_text())
    assert (row["majority"], len(row["positives"]), len(row["negatives"])) == ("2", 2, 1)
    assert entry(["validate", str(rows), str(output)]) == 0
    rows.write_text(good + "\n{broken\n")
    capsys.readouterr()
    assert entry(["validate", str(rows)]) == 2
    assert capsys.readouterr().out.startswith(f"{rows}:2: ")
    assert f"{rows}:2" in fails(args, capsys)
    assert entry([*args, "--on-bad-row", "skip"]) == 0
    assert f"set aside {rows}:2" in capsys.readouterr().err


def test_validate_looks_at_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.jsonl").write_text("{\n")
    assert entry(["validate", str(tmp_path / "missing.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert (
        out.startswith(f"{tmp_path}/b.jsonl:1: ")
        and "missing.jsonl: No such file" in err
        and "files read: 1 of 2" in err
    )


def test_prepare_checks_its_output_before_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    assert "also an input" in fails(["prepare", str(rows), "--output", f"{tmp_path}/./rows.jsonl"], capsys)
    for output in (tmp_path, tmp_path / "nowhere" / "out.jsonl"):
        assert f"--output: {output} is not a file" in fails(["prepare", str(rows), "--output", str(output)], capsys)


def test_doctor_tells_what_will_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCRD_FAST_IMPL", "eager")
    assert entry(["doctor"]) == 0
    assert "eager: QCRD_FAST_IMPL=eager" in capsys.readouterr().out
    monkeypatch.setenv("QCRD_FAST_IMPL", "cuda")
    assert entry(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"]["impl"] == "none" and "expected one of" in report["kernels"]["why"]
    assert report["versions"]["torch"] and report["memory_free_gib"] > 0 and report["disk_free_gib"] > 0


def test_doctor_counts_free_memory_as_train_does(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    for free, told in ((3 << 30, 3.0), (memory.UNKNOWN, None)):
        monkeypatch.setattr("qcrd_fast.doctor.free_bytes", lambda free=free: free)
        assert entry(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["memory_free_gib"] == told


@pytest.mark.parametrize(
    ("capability", "impl", "why"), [((7, 5), "torch", "below 8.0"), ((9, 0), "triton", "CUDA GPU")]
)
def test_doctor_names_the_kernels_of_a_gpu(
    capability: tuple[int, int],
    impl: str,
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.delenv("QCRD_FAST_IMPL", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (15 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert entry(["doctor"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"kernels      {impl}: ") and why in first
    assert "Fake GPU, capability {}.{}, 15.0 of 16.0 GiB free".format(*capability) in "\n".join(rest)
