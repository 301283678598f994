"""What is wrong with a run is said before torch is loaded, with the option's name, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models import model_folder
from qcrd_fast.models.model_folder import count_parameters
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.train import preflight
from qcrd_fast.train.preflight import check_start


@pytest.fixture
def config(rows_file, t5_folder, tmp_path):
    def make(**changes: Any) -> TrainConfig:
        options = dict(data=str(rows_file), student=str(t5_folder), output_dir=str(tmp_path / "run")) | changes
        return TrainConfig(**options)

    return make


def test_a_run_that_may_begin(config, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "is_online", lambda: True)
    check_start(config(), dry_run=True)
    check_start(config(data="owner/a-data-set-of-the-hub", student="owner/model", test_data=str(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "no.jsonl"}, "--data: no.jsonl does not exist"),
        ({"eval_data": "/no/dev.csv"}, "--eval-data: /no/dev.csv does not exist"),
        ({"test_data": "tests/no"}, "--test-data: tests/no does not exist"),
        ({"student": "./no"}, "student: folder './no' does not exist"),
        ({"student": "tests/no"}, "student: folder 'tests/no' does not exist"),  # no hub id: the folder tests is here
        ({"student": "tests"}, "student: 'tests' holds no config.json"),
        ({"student": "README.md"}, "student: 'README.md' is a file"),
        ({"discriminator": "./no"}, "--discriminator: folder './no' does not exist"),
        ({"prompt_template": "no.txt"}, "--prompt-template: 'no.txt' is neither raw, chat, nor a file"),
        ({"prompt_template": "README.md"}, "--prompt-template: README.md does not contain {prompt}"),
        ({"resume": "no/checkpoint-3"}, "--resume: no/checkpoint-3: no such folder"),
    ],
)
def test_what_is_not_there(config, changes, says, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(InputError) as error:
        check_start(config(**changes))
    assert str(error.value).startswith(says)


def test_a_template_that_is_no_text(config, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xff{prompt}")
    with pytest.raises(InputError, match="--prompt-template: cannot read"):
        check_start(config(prompt_template=str(path)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"report_to": "wandb"}, r"--report-to needs Weights & Biases: pip install 'qcrd-fast\[wandb\]'"),
        ({"report_to": "tensorboard"}, r"--report-to needs TensorBoard: pip install 'qcrd-fast\[tensorboard\]'"),
        ({"use_peft": True}, r"--use-peft needs PEFT: pip install 'qcrd-fast\[peft\]'"),
    ],
)
def test_packages_that_are_not_installed(config, changes, says, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=says):
        check_start(config(**changes))


def test_a_gpu_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(preflight, "_has_gpu_driver", lambda: False)
    with pytest.raises(InputError, match="--device: cuda:1 is not available on this machine: it has no GPU driver"):
        check_start(config(device="cuda:1"))


def test_parameters_are_counted_from_the_headers(t5_folder, tmp_path):
    held = sum(tensor.numel() for tensor in load_file(t5_folder / "model.safetensors").values())
    assert count_parameters(t5_folder) == held
    assert count_parameters(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert count_parameters(tmp_path) is None
    shutil.copy(t5_folder / "model.safetensors", tmp_path / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert count_parameters(tmp_path) == held


def test_too_little_disk_or_memory(config, t5_folder, monkeypatch):
    held = count_parameters(t5_folder)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: usage(10**12, 0, 12 * held - 1))
        with pytest.raises(
            RunError, match=f"--output-dir: .*run: no room for a checkpoint \\({12 * held} bytes needed"
        ):
            check_start(config())
        check_start(config(use_peft=True))  # four bytes of each
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "free_bytes", lambda: 16 * held - 1)
        patched.setattr(preflight, "swap_bytes", lambda: 0)
        with pytest.raises(
            InputError, match=r"--student: 0 million parameters: training takes at least .*; what helps: --use-peft"
        ):
            check_start(config())
        check_start(config(use_peft=True))
        patched.setattr(preflight, "swap_bytes", lambda: 1)
        check_start(config())


def test_an_output_folder_that_cannot_be_written_is_found_by_a_dry_run(config):
    with pytest.raises(InputError, match="--output-dir: cannot write to"):
        check_start(config(output_dir="/proc/run"), dry_run=True)


def test_no_torch_is_loaded_for_a_wrong_option_or_row(rows_file, t5_folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "1", "samples": [{"rationale": 3}]}\n')
    script = "import sys; from cli.main import entry; code = entry(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    for options in (
        ["--data", str(bad)],
        ["--data", str(rows_file), "--test-data", "no.jsonl"],
        ["--eval-data", str(rows_file)],
    ):
        args = ["train", "--data", str(rows_file), "--student", str(t5_folder), "--output-dir", str(tmp_path / "run")]
        args = [*args[:1], *options, *args[3:]] if options[0] == "--data" else [*args, *options]
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
        assert done.stdout == "2 False\n", done.stderr


def test_without_the_network_a_name_of_the_hub_fails_at_once(config, monkeypatch):
    monkeypatch.setattr(model_folder, "is_online", lambda: False)
    with pytest.raises(
        InputError, match="cannot load 'owner/model': there is no such folder here, the hub cannot be reached"
    ):
        check_start(config(student="owner/model"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    check_start(config(student="owner/model"))


@pytest.mark.parametrize(
    ("pattern", "text", "says"),
    [
        ("*.safetensors", None, "holds no weights"),
        ("tokenizer*", None, "holds no tokenizer"),
        ("config.json", "{", "config.json is unreadable"),
        ("config.json", "[]", "config.json is unreadable: no JSON object"),
    ],
)
def test_a_student_folder_with_missing_pieces(config, t5_folder, tmp_path, pattern, text, says):
    shutil.copytree(t5_folder, tmp_path / "student")
    for path in (tmp_path / "student").glob(pattern):
        path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=says):
        check_start(config(student=str(tmp_path / "student")))


def test_a_run_that_is_done_needs_no_room(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: namedtuple("Usage", "total free")(10, 1))
    with pytest.raises(RunError, match="no room"):
        check_start(config(resume="auto"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval_results.json").write_text("{}")
    check_start(config(resume="auto"))


@pytest.mark.parametrize("name", ["", "../x", "/x", "..", "a\\b", "a\x1b[31m", "a\nb"])
def test_a_run_name_stays_in_its_folder(config, name):
    with pytest.raises(InputError, match="--run-name"):
        config(run_name=name)
    assert config(run_name="qcrd, 2nd try").run_name == "qcrd, 2nd try"


def test_a_system_prompt_that_is_a_file_or_nothing(config, tmp_path):
    with pytest.raises(InputError, match="--system-prompt is empty"):
        config(system_prompt=" ", prompt_template="chat")
    (tmp_path / "empty.txt").write_text(" \n")
    for given, says in (
        ("@no", "cannot read no"),
        ("no/such.txt", "cannot read no/such.txt"),
        (str(tmp_path / "empty.txt"), "empty"),
    ):
        with pytest.raises(InputError, match=f"--system-prompt: .*{says}"):
            PromptSettings.from_option("chat", 64, 64, given)
    (tmp_path / "system").write_text("Be brief.\n")
    for given in (f"@{tmp_path / 'system'}", str(tmp_path / "system"), "Be brief."):
        assert PromptSettings.from_option("chat", 64, 64, given).system == "Be brief."
