"""`collect`: what it writes, how it goes on, what it stops for; the server is a fake one on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fake_teacher as fake
import pytest

from cli.main import entry
from qcrd_fast import teacher
from qcrd_fast.data import load_questions, validate_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of whoever runs the tests, and no long waits."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(teacher, "BACKOFF_S", 0.02)


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
    return [*args, *(["--teacher-model", "m"] if teacher.startswith("http") else []), *more]


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


# What it writes


def test_samples_of_every_question_and_a_ledger(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake.serving() as server:
        result = run(capsys, command(questions, server.url, "--price-input", "2", "--price-output", "10"))
    assert (result["questions"], result["complete"], result["samples"], result["missing"]) == (6, 6, 30, 0)
    assert (result["requests"], result["prompt_tokens"], result["completion_tokens"]) == (6, 60, 600)
    assert result["cost"] == pytest.approx((60 * 2 + 600 * 10) / 1e6) and result["estimated_replies"] == 0
    assert [row["id"] for row in rows(questions)] == [f"q{i}" for i in range(6)]
    assert rows(questions)[2]["answer"] == "3" and rows(questions)[2]["task"] == "number"
    sample = rows(questions)[2]["samples"][4]
    assert sample == {"rationale": sample["rationale"], "answer": "4", "source": "m"}
    assert not list(validate_file(questions.with_name("samples.jsonl")))
    assert len(load_questions(questions.with_name("samples.jsonl")).questions) == 6
    kinds = [record["kind"] for record in ledger(questions)]
    assert Counter(kinds) == {"start": 1, "intent": 6, "reply": 6} and kinds[:2] == ["start", "intent"]
    assert {seen.request for seen in server.seen} == {record["request"] for record in ledger(questions, "intent")}
    seen = server.seen[0]
    assert seen.path == "/v1/chat/completions" and "authorization" not in seen.headers
    wanted = {"model": "m", "n": 5, "temperature": 0.7, "max_tokens": 512, "stream": False}
    assert {key: seen.body[key] for key in wanted} == wanted and "What is" in seen.prompt and "Answer: " in seen.prompt
