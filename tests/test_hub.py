"""`export --push-to-hub` against a hub on loopback: private, whole, and without a word of the token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.evaluate import generate_text
from qcrd_fast.train.trainer import train
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows_file: Path, llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "run"
    template = folder.parent / "template.txt"
    template.write_text("nuts? {prompt} apples", encoding="utf-8")
    options = dict(data=str(rows_file), student=str(llama_folder), max_steps=1, method="dss", max_answer_tokens=2)
    options |= dict(max_target_length=24)
    options |= {"prompt_template": str(template)}
    train(TrainConfig(**options, output_dir=str(folder)))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_model_is_uploaded_as_a_user_does_it(run: Path, tmp_path: Path) -> None:
    """In a process of its own, with HF_ENDPOINT and HF_TOKEN in the environment."""
    with FakeHub() as hub:
        own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        export = ["export", str(run), "--output", "model", "--push-to-hub", "small"]
        asking = ["generate", "ann/small", "2 + 3?", "--max-new-tokens", "4", "--json"]
        both = f"from cli.main import entry; code = entry({export}); print('ASKED'); exit(code or entry({asking}))"
        environment = os.environ | own | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", both], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        exported, _, answered = done.stdout.partition("ASKED\n")
        assert f"url             {hub.address}/ann/small" in exported and "public          False" in exported
        assert TOKEN not in done.stdout + done.stderr
        repository = hub.repositories["ann/small"]
        assert "/ann/small/resolve/main/state.json" in hub.paths  # which holds the prompt of training
    assert json.loads(answered) == generate_text(str(run), "2 + 3?", max_new_tokens=4, device="cpu")
    assert repository["private"] is True
    held = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert repository["files"] == held and {"model.safetensors", "README.md", "chat_template.jinja"} <= held.keys()
    assert TOKEN.encode() not in b"".join(held.values())
    assert b"transformers serve ann/small" in held["README.md"]


def test_a_repository_that_is_public_is_not_written_to_by_chance(
    run: Path, tmp_path: Path, hub: FakeHub, capsys
) -> None:
    hub.repositories["ann/open"] = {"private": False, "files": {}}
    args = ["export", str(run), "--output", str(tmp_path / "model"), "--push-to-hub", "ann/open"]
    assert entry(args) == 2
    assert "ann/open exists and is public; add --public" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and hub.repositories["ann/open"]["files"] == {}
    assert entry([*args, "--public", "--dry-run"]) == 0
    assert not (tmp_path / "model").exists() and hub.repositories["ann/open"]["files"] == {}
    assert entry([*args, "--public"]) == 0
    assert "config.json" in hub.repositories["ann/open"]["files"]
    args[-1] = "team/new"
    assert entry([*args[:3], str(tmp_path / "other"), *args[4:], "--public"]) == 0
    assert hub.repositories["team/new"]["private"] is False


def test_an_upload_that_fails_leaves_the_export(run: Path, tmp_path: Path, hub: FakeHub, capsys) -> None:
    hub.fail = 500
    output = tmp_path / "model"
    assert entry(["export", str(run), "--output", str(output), "--push-to-hub", "ann/small"]) == 1
    said = capsys.readouterr().err
    assert f"hf upload ann/small {output} . --private" in said and TOKEN not in said and "Traceback" not in said
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "token", "code", "said"),
    [
        ("ann/small", "hf_" + "wrong" * 6, 2, "the hub refuses the token (401)"),
        ("small", "hf_" + "wrong" * 6, 2, "the hub refuses the token (401)"),
        ("ann/small", None, 2, "no token; run `hf auth login`"),
        ("a b/c", TOKEN, 2, "--push-to-hub: Repo id must"),
        ("a/b/c", TOKEN, 2, "--push-to-hub: Repo id must"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    name: str, token: str | None, code: int, said: str, run: Path, tmp_path: Path, hub: FakeHub, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    assert entry(["export", str(run), "--output", str(tmp_path / "model"), "--push-to-hub", name]) == code
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and (token is None or token not in told)
    assert not (tmp_path / "model").exists() and not hub.repositories


def test_without_a_network(run: Path, tmp_path: Path, hub: FakeHub, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    args = ["export", str(run), "--output", str(tmp_path / "model"), "--push-to-hub", "ann/small"]
    assert entry(args) == 1
    assert "--push-to-hub: cannot ask http://127.0.0.1:9" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert entry(args) == 1
    assert "offline" in capsys.readouterr().err.lower() and not (tmp_path / "model").exists()
    assert entry([*args[:4], "--public"]) == 2
    assert "--public is for --push-to-hub" in capsys.readouterr().err
