"""Collecting from a fake teacher: commands, their files, waiting for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.collect import endpoint
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of whoever runs the tests, and no long waits."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.02)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl", 6)


def write_questions(path: Path, count: int) -> Path:
    rows = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(questions: Path, teacher: str, *more: str) -> list[str]:
    output = str(questions.with_name("samples.jsonl"))
    args = ["collect", "--questions", str(questions), "--output", output, "--teacher", teacher]
    return [*args, *(["--teacher-model", "m", "--deadline", "20"] if teacher.startswith("http") else []), *more]


def ledger(questions: Path, kind: str = "") -> list[dict[str, Any]]:
    path = questions.with_name("samples.jsonl.ledger.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if not kind or record["kind"] == kind]


def rows(questions: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in questions.with_name("samples.jsonl").read_text(encoding="utf-8").splitlines()]


def run(capsys: pytest.CaptureFixture[str], args: list[str], code: int = 0) -> dict[str, Any]:
    """The summary of a run that ends with `code`; its log is under `log`."""
    assert entry([*args, "--json"]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return {**(json.loads(out) if out else {}), "log": err}


def start(args: list[str], **environment: str) -> subprocess.Popen[str]:

    code = (
        "import sys; from cli.main import entry; code = entry(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
