"""What a person reads of a run: the example, the lines of progress, rationales, the end; on a terminal and piped."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import struct
import termios
import threading
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, Rationale
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.metrics_log import Progress
from qcrd_fast.train.run_text import accuracy_text, duration, example_text, progress_line, rationales_text, summary_text
from qcrd_fast.utils.redact import RedactingFormatter

QUESTION = Question(
    id="q1", question="Ann has 3 coins, finds 4 and sells 2. How many are left?", gold="5", majority="5",
    votes={"5": 2, "9": 1},
    positives=(Rationale("First 3 + 4 = 7. Then 7 - 2 = 5.", "5"),
    Rationale("Add: 3 + 4 = 7. So 7 - 2 = 5 are left.", "5")),
    negatives=(Rationale("First 3 + 4 = 7. Then 7 + 2 = 9.", "9"),),
)  # fmt: skip
RECORD = {
    "step": 12, "loss": 1.23456, "loss_pred": 0.5, "loss_cl": 1.9, "loss_d": None, "active_hinge_lagged": 0.4,
    "active_hinge_minority": None, "lr": 4.1e-5, "tokens_per_s": 3210.4,
}  # fmt: skip


def shown_example(folder: Path, **options) -> str:
    config = TrainConfig(**options)
    student = Student.load(str(folder), PromptSettings(max_target_length=config.max_target_length))
    return example_text(make_examples([QUESTION], student, config)[0], student, config)


def test_an_example_has_every_token_that_the_student_sees(llama_folder):
    text = shown_example(llama_folder, negative_source="lagged")
    assert "  answer, prompt, 18 tokens before each target, masked:\n    | predict: Ann has 3 coins" in text
    assert "  answer, target, 2 tokens:\n    | 5 </s>" in text
    assert (
        "    | explain: Ann has 3 coins, finds 4 and sells 2. How many are left? \n    | \n" in text
    )  # the newline of raw prompts
    assert "rationale, target, teacher (positive), 15 tokens:\n    | First 3 + 4 = 7. Then 7 - 2 = 5. </s>" in text
    assert "rationale, target, minority (negative), 15 tokens:\n    | First 3 + 4 = 7. Then 7 + 2 = 9. </s>" in text


def test_an_example_shows_what_the_method_trains_on(t5_folder):
    assert "for the encoder" in shown_example(t5_folder) and "masked" not in shown_example(t5_folder)
    assert shown_example(t5_folder, method="dss").count("rationale, target") == 1
    assert shown_example(t5_folder, method="redi").count("rationale, target") == 3
    assert "explain" not in shown_example(t5_folder, method="finetune")
    assert "reasoning, prompt" in shown_example(t5_folder, reasoning_task=True)
    assert "8 tokens, cut at --max-target-length" in shown_example(t5_folder, max_target_length=8)


def test_progress_and_durations():
    assert progress_line(RECORD) == (
        "loss 1.2346 (answers 0.500, rationales 1.900); active hinges: lagged 40%; lr 4.1e-05; 3,210 tokens/s"
    )
    assert progress_line(RECORD, short=True) == "loss 1.235, lr 4.1e-05, 3,210 tok/s"
    assert [duration(s) for s in (7.6, 205, 43405)] == ["8 s", "3:25", "12:03:25"]


def test_piped_progress_is_lines_now_and_then(monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    caplog.set_level("INFO", "qcrd_fast")
    progress = Progress(40, 10)
    for step in range(11, 41):
        clock[0] += 1
        progress.step(step, None if step == 11 else RECORD | {"step": step - 1})
    progress.last(RECORD | {"step": 40})
    progress.close()
    lines = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert lines == [
        "step 11/40 (28%), 28 s left", "step 21/40 (52%), 18 s left", "step 31/40 (78%), 8 s left", "step 40/40 (100%)",
    ]  # fmt: skip


def test_rationales_and_hostile_text():
    answers = [{"output": "5", "correct": True, "gold": "5"}]
    text = rationales_text([QUESTION], ["First 3 + 4 = 7.\n\x1b[2JThen " + "7 " * 600], answers)
    assert (
        "the student explains: First 3 + 4 = 7. \\x1b[2JThen 7 7" in text
        and "\x1b" not in text
        and text.endswith("5 (right)")
    )
    assert max(map(len, text.splitlines())) < 700
    wrong = rationales_text([QUESTION], [""], [{"output": "", "correct": False, "gold": "5"}])
    assert wrong.endswith("and answers: (nothing) (wrong, it is 5)")


def test_the_end_names_folder_interval_and_commands():
    assert accuracy_text(0, 12) == "0.000 (95% interval 0.000 to 0.242; 0 of 12)"
    results = {"accuracy": 0.75, "n": 300, "evaluated_on": "test"}
    text = summary_text(results, TrainConfig(output_dir="my runs/one/", test_data="test.jsonl"))
    assert text.splitlines() == [
        "run folder my runs/one: accuracy 0.750 (95% interval 0.698 to 0.796; 225 of 300 test questions)",
        "next:",
        "  qcrd-fast generate 'my runs/one' \"A question?\"",
        "  qcrd-fast eval 'my runs/one' --data test.jsonl",
        "  qcrd-fast report 'my runs/one' --output 'my runs/one/report.html'",
        "  qcrd-fast export 'my runs/one' --output 'my runs/one-model'",
    ]
    assert "accuracy" not in summary_text({"accuracy": None, "n": 0}, TrainConfig(output_dir="x"))


@pytest.fixture
def args(rows_file, t5_folder, tmp_path) -> list[str]:
    options = "--method dss --max-steps 3 --max-new-tokens 6 --max-answer-tokens 4 --eval-steps 2 --batch-size 4"
    options += " --max-target-length 24"
    return [
        "train",
        "--data",
        str(rows_file),
        "--model",
        str(t5_folder),
        "--output-dir",
        str(tmp_path / "run"),
        *options.split(),
    ]


def test_piped_it_is_plain_lines(args, tmp_path, capfd):
    assert entry(args) == 0
    out, err = capfd.readouterr()
    assert "\r" not in err.split("a training example")[1]
    for wanted in (
        "a training example",
        "step 1/3 (33%), ",
        "step 3/3 (100%): loss",
        "validation accuracy 0.",
        "explains:",
    ):
        assert wanted in err
        assert wanted in (tmp_path / "run" / "run.log").read_text()
    assert err.count("the student explains:") == 4  # two at each of two validations
    assert (
        out.splitlines()[0].startswith("accuracy  ")
        and f"qcrd-fast generate {tmp_path}/run" in out
        and "95% interval" in out
    )


def test_on_a_terminal_there_is_a_bar(args, warm):
    """The lines of progress are left to the bar, and other lines stand above it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    seen = bytearray()

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while block := os.read(ours, 1 << 16):
                seen.extend(block)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    done = warm.on_terminal(os.ttyname(theirs), args)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.code == 0
    text = seen.decode()
    assert "3/3 [" in text and "step/s" in text and "step 1/3 (" not in text
    line = next(line for line in text.splitlines() if "validation accuracy" in line)
    assert line.rpartition("\r")[2][2] == ":"  # it begins with the time: nothing of the bar is left on it
    assert "Writing model" not in text


def test_rows_cannot_act_on_a_terminal_or_flood_it():
    question = Question(id="\x1b[31mq\n1", question="\x1b]0;t\x07" + "long " * 2000 + "How many?", gold="5\x1b[0m")
    record = {"correct": False, "gold": question.gold, "output": "\u202e9"}
    text = rationales_text([question], [" "], [record])
    assert all(c.isprintable() or c == "\n" for c in text) and text.count("\n") == 2 and len(text) < 1000
    assert (
        text.startswith("  question \\x1b[31mq\\n1: ... ") and "How many?\n" in text and "explains: (nothing)" in text
    )
    line = logging.LogRecord("qcrd_fast", logging.WARNING, "", 0, "questions \x1b[2J\x9b\u202ex\ty\n全角", (), None)
    assert RedactingFormatter().format(line) == "questions \\x1b[2J\\x9b\\u202ex\ty\n全角"
