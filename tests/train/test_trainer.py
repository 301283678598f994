"""The loop on tiny students: every method, the two-pass trick, refusals. Kills, signals, full disks:
test_reliability_*.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qcrd_fast.config import METHODS, TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.runs import checkpoints
from qcrd_fast.train.objective import Objective
from qcrd_fast.train.trainer import train
from tests.support.short_runs import metrics, same, settings, weights


@pytest.fixture(scope="module", params=["t5_folder", "llama_folder"])
def whole(request, rows_file, tmp_path_factory):
    """(student folder, run folder) of an unbroken run."""
    student, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("whole") / "run"
    train(settings(rows_file, student, out))
    return student, out


def test_run_folder_is_what_the_interface_says(whole, rows_file):
    _, run = whole
    for name in ("config.resolved.yaml", "metrics.jsonl", "eval_results.json", "predictions.jsonl"):
        assert (run / name).is_file(), name
    results = json.loads((run / "eval_results.json").read_text())
    assert list(results)[:4] == ["accuracy", "accuracy_validation", "accuracy_untrained", "n"]
    assert os.readlink(run / "final").startswith("checkpoint-")
    assert len((run / "predictions.jsonl").read_text().splitlines()) == results["n"] == 2  # a tenth of 24 questions
    steps = [m for m in metrics(run) if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6] and [m["iteration"] for m in steps] == [0, 0, 1, 1, 2, 2]
    for m in steps:
        a_d = 0.5 * 0.9 ** m["iteration"]
        assert m["loss"] == pytest.approx(0.5 * m["loss_pred"] + 0.5 * m["loss_cl"] + a_d * m["loss_d"], rel=1e-5)
        assert 0 < m["quality_positive"] < 1 and 0 < m["quality_negative"] < 1
        assert 0 <= m["active_hinge_lagged"] <= 1
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".bin", ".pth", ".pkl")]


def test_checkpoint_loads_with_from_pretrained(whole):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    _, run = whole
    folder = run / "final"
    state = json.loads((folder / "state.json").read_text())
    assert state["prompt"]["template"] == "raw" and state["task"] == "number"
    is_t5 = json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    model = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) > 0 and AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert checkpoints.find_corruption(folder.resolve(), run) is None


def test_negatives_come_from_the_lagged_snapshot(whole):
    """Iterations 0 and 1 (lag 1) speak with the initial student, iteration 2 with the trained one of iteration 1."""
    _, run = whole
    said = {}
    for path in sorted((run / "negatives").iterdir()):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        said[path.stem] = {r["id"]: r["tokens"] for r in records if "id" in r}
        for end in (r for r in records if "end" in r):
            assert end["end"] == sum(r.get("chunk") == end["chunk"] and "id" in r for r in records)
    assert sorted(said) == ["iteration-00000", "iteration-00001", "iteration-00002"]
    assert {p.name for p in (run / "snapshots").iterdir()} >= {
        "iteration-00001.safetensors",
        "iteration-00002.safetensors",
    }


def test_nothing_is_taken_from_a_run_that_had_no_checkpoint(whole, rows_file, tmp_path):
    """Killed before its first one, begun again with other rows of the same ids: what was said to the old ones is not
    theirs."""
    student, unbroken = whole
    out, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text(rows_file.read_text())
    train(settings(rows, student, out))
    for checkpoint_N in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint_N)
    rows.write_text(rows_file.read_text().replace("How many", "Say how many"))
    train(settings(rows, student, out, resume="auto"))
    train(settings(rows, student, tmp_path / "fresh"))
    assert metrics(out) == metrics(tmp_path / "fresh") != metrics(unbroken)
    for path in (out / "negatives").iterdir():
        assert path.read_bytes() == (tmp_path / "fresh" / "negatives" / path.name).read_bytes()


def test_a_run_that_goes_on_says_what_comes_of_that(whole, rows_file, tmp_path):
    """A finished run that lost its last checkpoint is trained and evaluated again, and draws what came after it
    again."""
    student, unbroken = whole
    out = tmp_path / "run"
    shutil.copytree(unbroken, out, symlinks=True)
    shutil.rmtree(out / "checkpoint-6")
    (out / "eval_results.json").write_text('{"accuracy": 0.123}')
    later = out / "negatives" / "iteration-00002.jsonl"
    assert (out / "checkpoint-3").is_dir() and later.is_file()
    later.write_text(later.read_text().replace('"chunk"', '"chunk" '))  # the same, if it is taken as it is
    results = train(settings(rows_file, student, out, resume="auto"))
    assert results["accuracy"] != 0.123 and json.loads((out / "eval_results.json").read_text()) == results
    assert later.read_bytes() == (unbroken / "negatives" / later.name).read_bytes()
    assert same(weights(out), weights(unbroken))


@pytest.mark.parametrize(
    ("score", "delta", "said"),
    [(0.95, 8.0, ["rates negatives 0.95 on average, so they weigh 0.05"]),
    (0.003, 8.0, ["rates positives 0.003 on average"]),
    (0.5, 0.01, ["only 0.0% of the student's own"]),
     (0.5, 8.0, [])],
)  # fmt: skip
def test_rationales_that_teach_little_are_said(
    score, delta, said, llama_folder, rows_file, tmp_path, monkeypatch, caplog
):
    rated = lambda self, batch, candidates, question: torch.full((len(candidates),), score)  # noqa: E731
    monkeypatch.setattr(Objective, "quality", rated)
    with caplog.at_level("WARNING", "qcrd_fast.train.trainer"):
        train(settings(rows_file, llama_folder, tmp_path / "run", max_steps=2, delta=delta))
    found = [r.getMessage() for r in caplog.records if "teach little" in r.getMessage()]
    assert len(found) == len(said) and all(text in message for text, message in zip(said, found, strict=True)), found


def test_drawing_beside_training_is_the_same_run(whole, rows_file, tmp_path, monkeypatch):
    """`--overlap stream`, killed between two saves and resumed in turn: weights, metrics and negatives of the serial
    run."""
    student, unbroken = whole
    out = tmp_path / "run"
    from qcrd_fast.train.trainer import Trainer

    class Killed(BaseException):
        pass

    real = Trainer._train_step

    def dies(self):
        if self.step == 4:
            raise Killed
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", dies)
    with pytest.raises(Killed):
        train(settings(rows_file, student, out, overlap="stream"))
    monkeypatch.setattr(Trainer, "_train_step", real)
    train(settings(rows_file, student, out, overlap="stream", resume="auto"))

    def timeless(run):
        return [{k: v for k, v in line.items() if k != "sample_hidden_share"} for line in metrics(run)]

    assert timeless(out) == timeless(unbroken) and same(weights(out), weights(unbroken))
    for path in (unbroken / "negatives").iterdir():
        assert (out / "negatives" / path.name).read_text() == path.read_text()


def test_a_damaged_best_checkpoint_is_passed_over(whole, rows_file, tmp_path, caplog):
    import shutil

    student, unbroken = whole
    out = tmp_path / "run"
    shutil.copytree(unbroken, out, symlinks=True)
    best = (out / "final").resolve()
    (best / "model.safetensors").unlink()
    (out / "predictions.jsonl").unlink()
    (out / "config.resolved.yaml").unlink()
    with pytest.raises(InputError, match=r"--beta 0\.2, now it is 0\.3"):  # known from the checkpoints too
        train(settings(rows_file, student, out, resume="auto", beta=0.3))
    train(settings(rows_file, student, out, resume="auto"))
    assert "damaged" in caplog.text
    assert checkpoints.find_corruption((out / "final").resolve()) is None
    assert (out / "predictions.jsonl").is_file() and (out / "config.resolved.yaml").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, rows_file, t5_folder, tmp_path):
    teacher = {"teacher": str(t5_folder)} if method in ("opd", "mentor-kd", "gkd") else {}
    config = settings(
        rows_file, t5_folder, tmp_path / "run", method=method, max_steps=2, validation_fraction=0.0, **teacher
    )
    results = train(config)
    last = metrics(tmp_path / "run")[-1]
    assert results["accuracy"] is None and last["loss"] > 0
    eps = 8 * torch.finfo(torch.float32).eps  # what adding up in fp32 costs
    if method in ("finetune", "single-task"):
        assert last["loss_cl"] == 0 and last["loss"] == pytest.approx(last["loss_pred"], rel=eps)
    elif method in ("dss", "sft-all"):
        assert last["loss"] == pytest.approx(0.5 * last["loss_pred"] + 0.5 * last["loss_cl"], rel=eps)
    elif method == "mi":
        rest = last["loss"] - 0.5 * last["loss_pred"] - 0.5 * last["loss_cl"]
        assert rest == pytest.approx(0.1 * last["loss_mi"], abs=eps * last["loss"]) and last["loss_mi"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"negative_source": "fixed"},
        {"negative_source": "minority"},
        {"negative_source": "none", "discriminator": "none"},
        {"scheme": None, "quality": None, "negative_source": "none"},  # the defaults
        {"scheme": "mean"},
        {"scheme": "wmean", "num_positives": 2},
        {"scheme": "sampling"},
        {"positive_select": "mean", "negative_select": "max-active"},
        {"reasoning_task": True, "gradient_checkpointing": True},
        {"label": "majority", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "discriminator_loss": "infonce"},
        {"bf16": True, "impl": "eager"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_switches(changes, rows_file, llama_folder, tmp_path):
    config = settings(rows_file, llama_folder, tmp_path / "run", max_steps=3, validation_fraction=0.0, **changes)
    train(config)
    last = metrics(tmp_path / "run")[-1]
    assert all(torch.isfinite(torch.tensor(last[k])) for k in ("loss", "loss_pred", "loss_cl", "grad_norm"))
    assert (last["active_hinge_lagged"] is None) == (changes.get("negative_source") in ("minority", "none"))


@pytest.fixture(scope="module")
def still_t5(tmp_path_factory, t5_folder):
    """The tiny T5 without dropout."""
    import shutil

    folder = tmp_path_factory.mktemp("still") / "t5"
    shutil.copytree(t5_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dropout_rate"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("student", ["still_t5", "llama_folder"])
@pytest.mark.parametrize("scheme", ["minmax", "mean"])
def test_two_passes_equal_one(student, scheme, rows_file, request, tmp_path, still_t5, float64):
    """Without dropout, scoring first and training what was selected gives the gradients of the paper's single pass."""
    folder = request.getfixturevalue(student)
    runs = {}
    for forward in ("two-pass", "joint"):
        out = tmp_path / forward
        train(settings(rows_file, folder, out, forward=forward, scheme=scheme, max_steps=2, validation_fraction=0.0))
        runs[forward] = metrics(out)
    for a, b in zip(runs["two-pass"], runs["joint"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-10)
        assert a["active_hinge_lagged"] == b["active_hinge_lagged"]
    assert any(m["active_hinge_lagged"] for m in runs["joint"])


@pytest.mark.parametrize("method", ["qcrd", "qcrd-judged", "dss", "sft-all", "redi", "finetune", "single-task"])
def test_golden_step(method, rows_file, llama_folder, tmp_path, float64):
    """One step's loss recomputed from the equations with the model's own logits, in float64."""
    from qcrd_fast.data.load import load_questions
    from qcrd_fast.discriminator.model import build_discriminator
    from qcrd_fast.models.prompts import PromptSettings
    from qcrd_fast.models.student import Student
    from qcrd_fast.train.schedule import Schedule

    beta, delta, a1, a2 = 0.7, 8.0, 0.3, 0.6
    config = settings(
        rows_file, llama_folder, tmp_path / "run", max_steps=1, validation_fraction=0.0, negative_source="minority",
        method=method.removesuffix("-judged"), discriminator="auto" if method == "qcrd-judged" else "none",
        redi_warmup=0.0,
        discriminator_pretrain_steps=0, beta=beta, delta=delta, alpha_pred=a1, alpha_cl=a2, discriminator_folds=0,
        discriminator_calibration="none",
    )  # fmt: skip
    train(config)
    logged = metrics(tmp_path / "run")[0]
    student = Student.load(str(llama_folder), PromptSettings())
    judge = build_discriminator(config.discriminator, student.model, student.tokenizer, seed=config.seed)
    model = student.model.eval()

    def nll(source, target):
        ids = torch.tensor([source + target])
        with torch.no_grad():
            logprob = model(input_ids=ids).logits[0].log_softmax(-1)
        at = range(len(source) - 1, len(source) + len(target) - 1)
        return -sum(logprob[i, t].item() for i, t in zip(at, target, strict=True)) / len(target)

    def plain(text):
        return list(student.tokenizer(text, add_special_tokens=False).input_ids)

    def quality(question, rationales):
        return judge.score([(question.question, r.text) for r in rationales]).tolist() if judge else None

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    questions = load_questions(config.data, split="train").questions
    rows = [questions[i] for i in Schedule(len(questions), config).questions(0)]
    assert any(q.negatives for q in rows)
    newline, eos = plain("\n"), student.tokenizer.eos_token_id
    pred = cl = 0.0
    for q in rows:
        label = q.majority if method == "single-task" else q.gold
        pred += nll([*plain("predict: " + q.question), *newline], [*plain(label), eos]) / len(rows)
        source = [*plain("explain: " + q.question), *newline]
        pos = [nll(source, [*plain(r.text), eos]) for r in q.positives]
        neg = [nll(source, [*plain(r.text), eos]) for r in q.negatives]
        if method.startswith("qcrd"):
            s_pos, s_neg = quality(q, q.positives) or [1.0] * len(pos), quality(q, q.negatives) or [0.0] * len(neg)
            best = pos.index(min(pos))
            term = s_pos[best] * pos[best]  # Eq. 6
            if neg:
                worst = neg.index(max(neg))
                term -= beta * (1 - s_neg[worst]) * min(neg[worst] - delta, 0)  # Eq. 7
        else:
            term = {"dss": pos[0], "sft-all": mean(pos), "redi": mean(pos) - 0.8 * mean(neg)}.get(method, 0.0)
        cl += term / len(rows)
    assert logged["loss_pred"] == pytest.approx(pred, rel=1e-10)
    assert logged["loss_cl"] == pytest.approx(cl, rel=1e-10)
    expected = pred if method in ("finetune", "single-task") else a1 * pred + a2 * cl
    assert logged["loss"] == pytest.approx(expected, rel=1e-10)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["tokens_per_s"] > 0


def test_scoring_runs_without_dropout_and_training_with(rows_file, t5_folder, tmp_path, monkeypatch):
    from qcrd_fast.models.student import Student

    real, modes = Student.hidden, []

    def spy(self, *args, **kwargs):
        modes.append((self.model.training, torch.is_grad_enabled()))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Student, "hidden", spy)
    train(settings(rows_file, t5_folder, tmp_path / "run", max_steps=2, validation_fraction=0.0))
    assert modes == [(False, False), (True, True)] * 2


def test_refusals_come_before_anything_is_written(rows_file, llama_folder, t5_folder, whole, tmp_path):
    student, run = whole
    with pytest.raises(InputError, match=r"is not empty.*--resume auto"):
        train(settings(rows_file, student, run))
    with pytest.raises(InputError, match=r"--beta 0\.2, now it is 0\.3"):
        train(settings(rows_file, student, run, beta=0.3, resume="auto"))
    with pytest.raises(InputError, match="--student is needed"):
        train(TrainConfig(data=str(rows_file), output_dir=str(tmp_path / "a")))
    with pytest.raises(InputError, match="demo"):
        train(TrainConfig(student=str(student), output_dir=str(tmp_path / "b")))
    with pytest.raises(InputError, match="cannot write"):
        train(settings(rows_file, student, Path("/proc/nowhere")))
    with pytest.raises(InputError, match="does not exist"):
        train(settings(rows_file, tmp_path / "typo", tmp_path / "again"))
    train(settings(rows_file, student, tmp_path / "again", max_steps=1))  # a failed start is no obstacle
    with pytest.raises(InputError, match=r"--impl: .*triton"):
        train(settings(rows_file, student, tmp_path / "c", impl="triton"))
    with pytest.raises(InputError, match="--device"):
        train(settings(rows_file, student, tmp_path / "c", device="cuda:77"))
    unlabelled = tmp_path / "unlabelled.jsonl"
    row = json.loads(rows_file.read_text().splitlines()[0])
    unlabelled.write_text(json.dumps(row | {"answer": None}) + "\n")
    with pytest.raises(InputError, match="no question has a gold answer"):
        train(settings(unlabelled, student, tmp_path / "d", method="finetune", validation_fraction=0.0))


@pytest.mark.parametrize("name", ["negatives", "snapshots", "metrics.jsonl", "checkpoint-9"])
def test_links_out_of_the_run_folder_are_refused(name, rows_file, llama_folder, tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{name} is a link"):
        train(settings(rows_file, llama_folder, out, resume="auto"))
    assert not list(elsewhere.iterdir())


def test_other_rows_on_resume_are_refused(whole, rows_file, tmp_path):
    import shutil

    student, _ = whole
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copy(rows_file, rows)
    train(settings(rows, student, out, max_steps=1, validation_fraction=0.0))
    rows.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="rows differ"):
        train(settings(rows, student, out, max_steps=1, validation_fraction=0.0, resume="auto"))


def test_rows_of_other_splits_are_not_trained_on(rows_file, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qcrd_fast.train.trainer.estimate_memory", lambda *_: {})  # most of a dry run's time
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    splits = ["train"] * 10 + ["test"] * 8 + [None] * 6
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        "".join(json.dumps(row | {"split": split}) + "\n" for row, split in zip(rows, splits, strict=True))
    )
    config = settings(mixed, llama_folder, tmp_path / "run", validation_fraction=0.0)
    assert train(config, dry_run=True)["train"] == 16
    trained = tmp_path / "train.jsonl"  # a file of the training split alone may still be evaluated on
    trained.write_text("".join(json.dumps(row | {"split": "train"}) + "\n" for row in rows[:5]))
    plan = train(settings(mixed, llama_folder, tmp_path / "run", eval_data=str(trained)), dry_run=True)
    assert plan["validation"] == 5 and plan["train"] == 11
    splits = ["train"] * 16 + ["validation"] * 4 + ["test"] * 4
    mixed.write_text(
        "".join(json.dumps(row | {"split": split}) + "\n" for row, split in zip(rows, splits, strict=True))
    )
    three = settings(mixed, llama_folder, tmp_path / "run", eval_data=str(mixed), test_data=str(mixed))
    assert {k: train(three, dry_run=True)[k] for k in ("train", "validation", "test")} == {
        "train": 16, "validation": 4, "test": 4,
    }  # fmt: skip
    with pytest.raises(InputError, match="all 5 questions are in the test set"):
        train(
            settings(mixed, llama_folder, tmp_path / "run", eval_data=str(trained), test_data=str(trained)),
            dry_run=True,
        )


def test_questions_of_the_test_set_are_dropped_from_training(rows_file, llama_folder, tmp_path):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps({"id": f"t{i}", "question": r["question"], "answer": r["answer"],
        "samples": []}) + "\n"
                            for i, r in enumerate(rows[:3])))  # fmt: skip
    plan = train(settings(rows_file, llama_folder, tmp_path / "run", test_data=str(test)), dry_run=True)
    assert plan["dropped"] == 3 and plan["test"] == 3 and plan["train"] + plan["validation"] == 21
    assert not (tmp_path / "run").exists()
