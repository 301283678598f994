"""Chat messages: their reasoning, in whichever field or part it stands, is apart from what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcrd_fast.data.load import load_questions
from qcrd_fast.data.messages import read_message
from tests.support.teacher_forms import FORMS

WHY, SAID = "Perhaps the answer is 13? No, I multiply and get 12.", "The answer is 12."


@pytest.mark.parametrize("form", FORMS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("shape", ["messages", "choices"])
def test_chat_logs_in_every_form(form: str, shape: str, tmp_path: Path) -> None:
    question, message = "A bag holds 3 nuts. How many are in 4 bags?", FORMS[form](WHY, SAID)
    row: dict[str, Any] = {"messages": [{"role": "user", "content": question}, message]}
    if shape == "choices":
        row = {"question": question, "samples": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({**row, "answer": "12"}) + "\n", encoding="utf-8")
    (found,) = load_questions(path, task="number").questions
    assert found.votes == {"12": 1} and found.positives[0].text == WHY


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ({"content": "a", "reasoning": "", "reasoning_content": "b"}, "b", "a"),
        ({"content": "a", "reasoning": {"effort": "high"}}, "", "a"),
        ({"content": "a", "reasoning": ["b", {"text": "c"}, 7, None]}, "b\nc", "a"),
        ({"content": None, "reasoning": "b"}, "b", None),
        ({"content": [{"type": "image_url"}], "reasoning": "b"}, "b", None),
        ({"content": "<think>b</think>a", "reasoning": "c"}, "c", "<think>b</think>a"),
        ({"content": "<think> b\nb </think>a", "reasoning": "b b"}, "", "<think> b\nb </think>a"),
        ({"content": "a", "reasoning": "b</think>the answer is 7"}, "bthe answer is 7", "a"),
        ({"content": 7, "thinking": True}, "", None),
        ({}, "", None),
    ],
)
def test_fields(message: dict[str, Any], reasoning: str, content: str | None) -> None:
    assert read_message(message) == (reasoning, content)


def test_reasoning_that_never_ends_is_no_answer() -> None:
    assert read_message({"content": "", "reasoning": "the answer is 7"}).text == "<think>\nthe answer is 7"
    assert read_message({"content": "7", "reasoning": "b"}).text == "<think>\nb\n</think>\n\n7"
    assert read_message({"content": "7"}).text == "7"


def test_reasoning_beside_a_rationale(tmp_path: Path) -> None:
    """As `collect` writes it: the rationale is its own, --thinking may take the reasoning; a short one gives way to
    it."""
    samples = [
        {"rationale": "3 times 4 is 12.", "answer": "12", "source": "t", "reasoning": "I multiply 3 by 4."},
        {"rationale": "", "answer": "12", "source": "t", "reasoning": "I add 4 three times."},
        {"rationale": "", "answer": None, "source": "t", "cut": True},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text(
        json.dumps({"id": "q", "question": "3 bags of 4?", "answer": "12", "samples": samples}) + "\n", encoding="utf-8"
    )
    (found,) = load_questions(path).questions
    assert [r.text for r in found.positives] == ["3 times 4 is 12.", "I add 4 three times."] and found.votes == {
        "12": 2
    }
