"""`eval` and `generate`: outputs that cannot be read, tasks that a run does not know, and the zero-shot baseline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast import evaluate
from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question
from qcrd_fast.export import export_run
from qcrd_fast.models.student import Student
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.intervals import wilson
from tests.support.toy_tokenizers import KINDS

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("chat") / "student"
    tokenizer = KINDS["bytes"]()
    tokenizer.chat_template = CHAT
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(student: Path, rows_file: Path) -> Path:
    options = dict(data=str(rows_file), student=str(student), max_steps=1, method="finetune", max_answer_tokens=4)
    train(TrainConfig(**options, max_target_length=6, output_dir=str(student.parent / "run")))
    return student.parent / "run"


def replies(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[str]:
    """Let students say `texts`, and see what they are asked."""
    asked: list[str] = []

    def say(student: Student, sources: list[list[int]], *_: object, **__: object) -> list[list[int]]:
        asked.extend(student.tokenizer.decode(ids) for ids in sources)
        return [
            student.tokenizer(texts[i % len(texts)], add_special_tokens=False).input_ids for i in range(len(sources))
        ]

    monkeypatch.setattr(evaluate, "sample", say)
    return asked


def test_what_cannot_be_read_is_counted(run: Path, rows_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    replies(monkeypatch, ["no idea", "", "7"])
    assert entry(["eval", str(run), "--data", str(rows_file), "--output", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["unreadable"] == 16 and told["n"] == 24
    assert told["accuracy_95"] == pytest.approx(wilson(told["accuracy"], 24))
    assert "no answer can be read in 16 of 24 outputs, which count as wrong, such as: no idea" in said.err
    assert entry(["eval", str(run), "--data", str(rows_file), "--output", str(tmp_path / "out")]) == 0
    low, high = told["accuracy_95"]
    line = f"{told['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}, over questions)"
    assert capsys.readouterr().out.splitlines()[0].split(None, 1) == ["accuracy", line]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["prediction"] is None for line in lines) == 16 and lines[0]["output"] == "no idea"


def test_a_gold_that_cannot_be_read_is_no_wrong_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies(monkeypatch, ["7"])
    rows = [{"id": str(i), "question": f"{i}?", "gold": gold} for i, gold in enumerate(("7", "8", "7 or 8"))]
    data = tmp_path / "golds.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(run), "--data", str(data), "--task", "number", "--output", str(tmp_path / "out"), "--json"]
    assert entry(command) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (told["accuracy"], told["n"], told["without_answer"]) == (0.5, 2, 1)
    assert (
        "left out 1 of 3 questions, whose answer cannot be read as number (--task), such as '2': '7 or 8'" in said.err
    )
    data.write_text(json.dumps(rows[2]) + "\n")
    assert entry(command) == 2 and "no answer can be read as number" in capsys.readouterr().err


def test_questions_of_another_split_are_not_without_an_answer(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    replies(monkeypatch, ["7"])
    golds = (("7", "train"), ("7", "train"), ("7", "test"), (None, "test"))
    rows = [{"id": str(i), "question": f"{i}?", "gold": gold, "split": s} for i, (gold, s) in enumerate(golds)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert entry(["eval", str(run), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n"], told["without_answer"]) == (1, 1)


def test_reasoning_needs_a_run_that_was_trained_for_it(run: Path, rows_file: Path, tmp_path: Path, capsys) -> None:
    export_run(str(run), str(tmp_path / "model"))
    for name in (str(run), str(tmp_path / "model")):
        for rest in (["--dry-run"], []):
            assert (
                entry(["eval", name, "--data", str(rows_file), "--reasoning", "--output", str(tmp_path / "out"), *rest])
                == 2
            )
            assert f"--reasoning: {name} was trained without --reasoning-task" in capsys.readouterr().err
        assert entry(["generate", name, "2 + 3?", "--reasoning"]) == 2
        assert "was trained without --reasoning-task" in capsys.readouterr().err
    trained = Path(shutil.copytree(tmp_path / "model", tmp_path / "reasons"))
    state = json.loads((trained / "state.json").read_text())
    (trained / "state.json").write_text(json.dumps(state | {"reasoning_task": True}))
    assert entry(["generate", str(trained), "2 + 3?", "--reasoning", "--max-new-tokens", "3"]) == 0
    assert entry(["eval", str(run), "--data", str(rows_file), "--reasoning", "--zero-shot"]) == 2


def test_generate_asks_for_a_rationale_of_a_view(student: Path, monkeypatch, capsys) -> None:
    asked = replies(monkeypatch, ["5"])
    assert entry(["generate", str(student), "2 + 3?", "--view", "short"]) == 0
    assert ["short sentence" in text for text in asked] == [True, False]  # the rationale's prompt, not the answer's
    assert entry(["generate", str(student), "2 + 3?", "--view", "rhyme"]) == 2
    assert "view 'rhyme' is in no table" in capsys.readouterr().err


def test_the_zero_shot_baseline_asks_in_words(
    run: Path, student: Path, rows_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    asked = replies(monkeypatch, ["3 + 4 = 7.\nAnswer: 7"])
    args = ["--data", str(rows_file), "--zero-shot", "--json"]
    assert entry(["eval", str(run), *args]) == 0  # its base model
    told = json.loads(capsys.readouterr().out)
    assert told["unreadable"] == 0 and told["predictions"] == str(run / "eval-rows-zero-shot" / "predictions.jsonl")
    question = json.loads(rows_file.read_text().splitlines()[0])["question"]
    form = "the number alone, without units"
    assert asked[0] == f"user: {question}\n\n" + evaluate.ZERO_SHOT.split("\n\n")[1].format(form=form) + "\nassistant: "
    monkeypatch.chdir(tmp_path)
    assert entry(["eval", str(student), *args]) == 0  # the same, by its own name
    assert json.loads(capsys.readouterr().out)["accuracy"] == told["accuracy"]


def test_a_model_without_a_chat_template_has_no_zero_shot(
    t5_folder: Path, llama_folder: Path, rows_file: Path, capsys
) -> None:
    for folder in (t5_folder, llama_folder):
        assert (
            entry(["eval", str(folder), "--data", str(rows_file), "--zero-shot", "--output", str(folder / "out")]) == 2
        )
        assert "has no chat template to be asked by" in capsys.readouterr().err


def test_a_run_ends_with_the_baseline_and_rationales(run: Path) -> None:
    results = json.loads((run / "eval_results.json").read_text())
    assert list(results)[:4] == ["accuracy", "accuracy_validation", "accuracy_untrained", "n"]
    assert 0 <= results["accuracy_zero_shot"] <= 1 and 0 < results["n_zero_shot"] <= min(results["n"], 64)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert all(isinstance(line["rationale"], str) for line in lines[:8])  # of a method that taught none, too


def test_zero_shot_text_is_of_the_task() -> None:
    question = Question("a", "Which? {form} (a) x (b) y")
    text = evaluate.zero_shot_text(question, "choice")
    assert text.startswith("Which? {form} (a) x (b) y\n\n") and text.endswith(
        "`Answer: ` and the letter of the right choice."
    )


def test_a_path_comes_before_a_hub_name(run: Path, rows_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "runs").mkdir(exist_ok=True)
    if not (run.parent / "runs" / "one").exists():
        (run.parent / "runs" / "one").symlink_to(run)
    assert entry(["eval", "runs/one", "--data", str(rows_file), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert entry(["eval", "runs/none", "--data", str(rows_file), "--output", str(tmp_path / "out")]) == 2
    assert "folder 'runs/none' does not exist" in capsys.readouterr().err
    assert entry(["eval", "nowhere/none", "--data", str(rows_file), "--output", str(tmp_path / "out")]) == 2
    assert "cannot load 'nowhere/none'" in (said := capsys.readouterr().err) and "there is no such folder here" in said
