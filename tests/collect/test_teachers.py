"""What a teacher is asked and how it is read; teachers without a server; options that make no sense."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.main import entry
from qcrd_fast.collect.local import LocalTeacher
from qcrd_fast.collect.prompts import TEMPLATES, Template, read_reply
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError
from tests.support import fake_teacher as fake
from tests.support.collecting import command, ledger, rows, run, write_questions
from tests.support.paths import ROOT

CHOICE = "Where do trains stop?\nAnswer Choices:\n(a) sea\n(b) train station"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl", 4)


# Prompts


def ask(option: str = "auto", **fields: Any) -> str:
    return Template(option).prompt(Question(**{"id": "q", "question": "Is it {context}?", **fields}))


@pytest.mark.parametrize(
    ("task", "form"),
    [
        ("number", "the number alone"),
        ("equation", "arithmetic expression"),
        ("choice", "letter of the right choice"),
        ("yes-no", "yes or no"),
        ("text", "as short as possible"),
        (None, "as short as possible"),
    ],
)
def test_each_task_has_its_form(task: str | None, form: str) -> None:
    prompt = ask(task=task, context="Two {question} cups.")
    assert form in prompt and "`Answer: `" in prompt
    assert prompt.startswith("Two {question} cups.\nQuestion: Is it {context}?")  # what is put in is not filled again


def test_entailment_is_told_by_its_labels() -> None:
    prompt = ask(question="It rains.", context="It pours.", gold="Entailment", task="text")
    assert prompt.startswith("Premise: It pours.\nHypothesis: It rains.\n") and "neutral or contradiction" in prompt
    assert "Premise" not in ask(context="It pours.", gold="wet", task="text")
    assert all("{question}" in text and "{context}" in text for text in TEMPLATES.values())


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{literally} Q {question} A", encoding="utf-8")
    assert ask(str(path)) == "{literally} Q Is it {context}? A"
    assert ask(str(path), context="C") == "{literally} Q C\nIs it {context}? A"
    path.write_text("{context}|{question}\n", encoding="utf-8")
    assert ask(str(path), context="C") == "C|Is it {context}?" and ask(str(path)) == "|Is it {context}?"
    path.write_text("no place for it", encoding="utf-8")
    for option, says in ((str(path), "does not contain {question}"), (str(tmp_path / "gone"), "neither auto, number")):
        with pytest.raises(InputError, match=says):
            Template(option)


@pytest.mark.parametrize(
    ("text", "task", "rationale", "answer"),
    [
        ("3 + 4 = 7.\nAnswer: 7", "number", "3 + 4 = 7.", "7"),
        ("3 + 4 = 7.\n\n**Final Answer:** $7.00", "number", "3 + 4 = 7.", "7"),
        ("Three and four. So the answer is 7.", "number", "Three and four.", "7"),
        ("Answer: 3? No.\nIt is 7.\nAnswer: 7", "number", "Answer: 3? No.\nIt is 7.", "7"),
        ("3 + 4 = 7", "number", "3 + 4 = 7", "7"),
        ("<think>hm, 9?</think>3 + 4 = 7.\nAnswer: 7", "number", "3 + 4 = 7.", "7"),
        ("<think>hm, 9? and on and on", "number", "", None),
        ("3 + 4 = 7.\nAnswer: 7\n\nQuestion: What is 5?\nAnswer: 5", "number", "3 + 4 = 7.", "7"),
        ("Adding.\r\nAnswer: 3 + 4", "equation", "Adding.", "3 + 4"),
        ("Trains stop there.\nAnswer: (b)", "choice", "Trains stop there.", "train station"),
        ("Trains stop there.\nAnswer: b) train station", "choice", "Trains stop there.", "train station"),
        ("It does.\nAnswer: Yes, it does.", "yes-no", "It does.", "yes"),
        ("Rain is wet.\nAnswer: entailment.", "text", "Rain is wet.", "entailment"),
        ("I cannot say.", "number", "I cannot say.", None),
        ("Answer: 7", "number", "", "7"),
    ],
)
def test_replies_are_taken_apart(text: str, task: str, rationale: str, answer: str | None) -> None:
    assert read_reply(text, Question("q", CHOICE, task=task)) == (rationale, answer)


def test_a_cut_reply_has_only_an_answer_that_is_marked() -> None:
    question = Question("q", "?", task="number")
    assert read_reply("First 3 + 4", question, cut=True) == ("First 3 + 4", None)
    assert read_reply("3 + 4 = 7.\nAnswer: 7", question, cut=True).answer == "7"


def test_without_answers_the_task_is_left_open(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions.write_text(json.dumps({"question": "What is 2 + 2?"}) + "\n")
    shown = run(capsys, command(questions, "http://127.0.0.1:9", "--dry-run"))
    assert "as short as possible" in shown["prompt"]
    shown = run(capsys, command(questions, "http://127.0.0.1:9", "--dry-run", "--task", "number"))
    assert "the number alone" in shown["prompt"]


# Replay


def test_replay(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = tmp_path / "earlier.jsonl"
    said = [{"rationale": f"r{i}", "answer": str(i), "source": "gpt"} for i in range(6)]
    kept = [
        {"id": "other", "question": "What is 0 + 1?", "samples": said},
        {"id": "q0", "question": "Something else?", "samples": said},
        {"question": "What is 1 + 1?", "samples": said[:2]},
    ]
    earlier.write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = run(capsys, command(questions, f"replay:{earlier}"))
    assert (result["samples"], result["missing"], result["requests"]) == (7, 13, 0)
    assert [row["id"] for row in rows(questions)] == ["q0", "q1"] and rows(questions)[0]["samples"] == said[:5]
    assert run(capsys, command(questions, f"replay:{earlier}", "--num-samples", "6"))["samples"] == 8
    assert rows(questions)[0]["samples"] == said and len(ledger(questions, "reply")) == 3


def test_replay_of_what_was_collected_and_of_what_is_none(
    questions: Path, tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "collect",
        "--questions",
        str(rows_file),
        "--output",
        str(tmp_path / "again.jsonl"),
        "--teacher",
        f"replay:{rows_file}",
    ]
    assert run(capsys, args)["samples"] == 24 * 5
    again, first = load_questions(tmp_path / "again.jsonl"), load_questions(rows_file)
    assert [q.votes for q in again.questions] == [q.votes for q in first.questions]
    assert "no samples in this file" in run(capsys, command(questions, f"replay:{questions}"), 2)["log"]
    assert "No such file" in run(capsys, command(questions, "replay:gone"), 2)["log"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a?", "samples": [{"rationale": 5}]}\n')
    assert f"{bad}:1: samples[0]" in run(capsys, command(questions, f"replay:{bad}"), 2)["log"]


# A local model


def test_a_local_model_is_sampled_and_goes_on(
    questions: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(questions, str(llama_folder), "--max-tokens", "6", "--temperature", "1", "--batch-size", "3")
    result = run(capsys, [*args, "--num-samples", "2"])
    assert (result["samples"], result["requests"], result["estimated_replies"]) == (8, 0, 0)
    assert result["completion_tokens"] <= 8 * 6 and result["prompt_tokens"] > 8
    few = rows(questions)
    assert run(capsys, [*args, "--num-samples", "4"])["samples"] == 16
    broken = rows(questions)
    assert [row["samples"][:2] for row in broken] == [row["samples"] for row in few]
    for name in ("samples.jsonl", "samples.jsonl.ledger.jsonl"):
        questions.with_name(name).unlink()
    run(capsys, [*args, "--num-samples", "4"])
    assert rows(questions) == broken  # a sample belongs to (seed, question, index), however often one stops
    texts = [s["text"] for record in ledger(questions, "reply") for s in record["samples"]]
    assert len(set(texts)) > 12
    assert ledger(questions, "start")[0]["api"] == "completions"


def test_a_signal_lets_a_local_model_finish_its_batch(
    questions: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(questions, str(llama_folder), "--max-tokens", "2", "--batch-size", "5")
    with monkeypatch.context() as patch:
        real = LocalTeacher.sample

        def interrupted(self: LocalTeacher, asked: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(self, asked)

        patch.setattr(LocalTeacher, "sample", interrupted)
        assert run(capsys, args, 143)["samples"] == 5
    assert run(capsys, args)["samples"] == 20 and len(ledger(questions, "reply")) == 20


def test_a_system_prompt_of_a_local_model(
    questions: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the chat's first message; without a chat, or where the template knows no such role, it is refused."""
    from transformers import AutoTokenizer

    folder = tmp_path / "chat"
    shutil.copytree(llama_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    options = {"temperature": 1.0, "max_tokens": 2, "seed": 0, "batch_size": 2, "device": "cpu"}
    teacher = LocalTeacher(str(folder), api="", system="Be brief.", **options)
    assert teacher.api == "chat"
    ids = teacher._source("What is 2?")
    assert ids == tokenizer("system: Be brief.\nuser: What is 2?\nassistant:", add_special_tokens=False).input_ids
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"--system-prompt: .*no system here"):
        LocalTeacher(str(folder), api="", system="Be brief.", **options)._source("What is 2?")
    args = command(questions, str(llama_folder), "--system-prompt", "Be brief.", "--max-tokens", "2")
    assert "asked without a chat template" in run(capsys, args, 2)["log"]


def test_a_local_model_that_is_none(questions: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in run(capsys, command(questions, "./no/such/folder"), 2)["log"]
    assert "no chat template" in run(capsys, command(questions, str(llama_folder), "--api", "chat"), 2)["log"]


# Options


@pytest.mark.parametrize(
    ("teacher", "options", "says"),
    [
        ("replay:x", "--temperature 1", "--temperature has no meaning for a replay"),
        ("replay:x", "--seed 1", "--seed has no meaning for a replay"),
        ("folder", "--max-requests 5", "--max-requests has no meaning for a local model"),
        ("https://a.example", "--seed 3", "--seed has no meaning for an endpoint"),
        ("https://a.example", "--max-cost 1", "--max-cost needs --price-input"),
        ("https://a.example", "--max-cost nan --price-input 1", "--max-cost must be finite"),
        ("https://a.example", "--extra-body [1]", "--extra-body: a JSON object"),
        ("https://a.example", "--extra-body {", "--extra-body: not JSON"),
        ("localhost:8000/v1", "", "an address begins with http://"),
        ("https://a.example?x=1", "", "without credentials and query"),
        ("https://a.example", "--template nothing", "--template: 'nothing'"),
        ("https://a.example", "--output /no/such/folder/x.jsonl", "--output: /no/such/folder/x.jsonl is not a file"),
        ("https://a.example", "--questions nothing.jsonl", "nothing.jsonl: No such file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(
    questions: Path, teacher: str, options: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry([*command(questions, teacher), *options.split()]) == 2
    assert says in capsys.readouterr().err
    assert sorted(p.name for p in questions.parent.iterdir()) == ["questions.jsonl"]


def test_bad_questions_are_named_by_line(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with questions.open("a") as file:
        file.write('{"question": 5}\n')
    args = command(questions, "https://a.example", "--dry-run")
    assert f"{questions}:5: question expects a string" in run(capsys, args, 2)["log"]
    result = run(capsys, [*args, "--on-bad-row", "skip"])
    assert result["prediction"]["questions"] == 4 and "set aside" in result["log"]


def test_the_guide_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("\n## A teacher like R1")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if match := re.fullmatch(r"cat > (\S+) <<'END'\n(.*)END\n", block, re.DOTALL):
            Path(match[1]).write_text(match[2], encoding="utf-8")
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    asked = [line[1:] for line in commands if line[:2] == ["qcrd-fast", "collect"]]
    assert len(asked) == 2
    for args in asked:
        extra = ["--template", "template.txt", "--api", "completions", "--dry-run"]
        assert run(capsys, [*args, *extra])["prediction"]["samples"] == 50
    with fake.serving() as server:
        args = asked[0][:-1]
        args[args.index("--teacher") + 1] = server.url
        assert run(capsys, args)["complete"] == 10
    assert entry(["prepare", "samples.jsonl", "--output", "train.jsonl"]) == 0
