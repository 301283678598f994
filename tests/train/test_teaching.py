"""Methods with a teacher in whole runs: what teaches them, what they learn, and that a resume changes no bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcrd_fast.config import TEACHER_OPTIONS, TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.errors import InputError
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.ops.topk_kl import linear_top
from qcrd_fast.runs.folder import checkpoint_path
from qcrd_fast.sweep.runner import plan
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.teacher_signal.score import ScoreSettings, score_teacher
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.methods import METHODS, TEACHERS
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.teaching import ModelTeaching, SelfTeaching, TargetText, pad_all
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.device import make_autocast
from tests.support.short_runs import metrics, same, settings, weights
from tests.support.students import make_llama, make_t5, student_and_teacher
from tests.support.toy_tokenizers import bytes_bpe
from tests.support.warm import differences

PLAIN = dict(quality=None, scheme=None, negative_source=None, iteration_steps=None, delta=3.0)


@pytest.fixture(scope="module")
def mentor(tmp_path_factory) -> Path:
    return sharpened(make_llama(tmp_path_factory.mktemp("mentor"), layers=1))


@pytest.fixture(scope="module")
def mentors(mentor, tmp_path_factory) -> dict[str, Path]:
    """By the fixture of the student's family."""
    return {"llama_folder": mentor, "t5_folder": sharpened(make_t5(tmp_path_factory.mktemp("mentor-t5"), layers=1))}


def sharpened(folder: Path) -> Path:
    """Other weights than the student's, sharper."""
    student = Student.load(str(folder), PromptSettings())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    student.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_mentor(llama_folder, rows_file, tmp_path_factory) -> Path:
    """The student, trained on the teacher's text."""
    out = tmp_path_factory.mktemp("trained") / "run"
    changes = dict(
        max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, validation_fraction=0.0, save_steps=100
    )
    train(config_of("sft-all", rows_file, llama_folder, out, **changes))
    return checkpoint_path(out, 40)


@pytest.fixture(scope="module")
def logprobs(mentor, rows_file, tmp_path_factory) -> Path:
    """The mentor's 5 likeliest tokens of all rows."""
    folder = tmp_path_factory.mktemp("scored") / "lp"
    summary, why = score_teacher(ScoreSettings(str(rows_file), str(mentor), str(folder), top_logprobs=5))
    assert why is None and summary["scored"] > 80 and 0 < summary["mean_mass_of_top"] < 1
    return folder


def config_of(method, rows, student, out, mentor=None, **changes) -> TrainConfig:
    teacher = (
        {"teacher": str(mentor)}
        if method in ("opd", "gkd") or (method == "mentor-kd" and "teacher_logprobs" not in changes)
        else {}
    )
    return settings(rows, student, out, method=method, **{**PLAIN, **teacher, **changes})


# What teaches


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["opd", "mentor-kd"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(method, llama_folder, rows_file, tmp_path):
    """At the first step, before the student moves: to rounding, since both run in batches of their own."""
    out = tmp_path / "run"
    options = dict(max_steps=1, validation_fraction=0.0, alpha_pred=0.0)
    train(config_of(method, rows_file, llama_folder, out, llama_folder, **options, kd_lambda=1.0, top_logprobs=1000))
    assert abs(metrics(out)[0]["teacher_kl"]) < 1e-12 and abs(metrics(out)[0]["loss"]) < 1e-12


def held_out_kl(student, teacher, texts) -> float:
    """KL(pi_S || pi_T) a token [nats], of whole distributions, on what the student says to held-out questions."""
    sources = [student.source_ids(EXPLAIN, text) for text in texts]
    settings = SampleSettings(temperature=1.0, max_new_tokens=6)
    said = sample(student, sources, [key_words(0, text) for text in texts], settings)
    with torch.no_grad():
        logs = []
        for model in (student, teacher):
            packed = model.hidden(sources, said, range(len(said)))
            logs.append(model.head.logits(packed.hidden).log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["opd", "sdft"])
@pytest.mark.parametrize("family", ["llama_folder", "t5_folder"])
def test_an_on_policy_micro_batch_by_hand(method, family, rows_file, request):
    """Eager: -(log pi_T - log pi_S) log pi_S of each sampled token from dense logits, one sequence at a time, over the
    sampled tokens of the optimizer batch; and the labels by cross-entropy."""
    folder = str(request.getfixturevalue(family))
    config = TrainConfig(method=method, teacher=folder if method == "opd" else None, alpha_pred=0.7, alpha_cl=0.8)
    student, teacher = student_and_teacher(folder)
    batch = make_examples(load_questions(str(rows_file), split="train").questions[:3], student, config)
    said = {
        e.id: Negative(student.target_ids(text), text) for e, text in zip(batch, ("So 5.", "It is 4."), strict=False)
    }
    teaching = (ModelTeaching if method == "opd" else SelfTeaching)(LocalTeacher(teacher), config)
    objective = Objective(student, config, None, make_autocast(student.device, None), teaching=teaching)
    # more tokens than these, as if other micro-batches had some
    losses, _ = objective.step(MicroBatch(batch, said, 4, sampled_tokens=20))
    grads = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad()

    def logprob(model, prompt, tokens):
        if student.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            ids = dict(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *tokens[:-1]]]))
            logits = model(**ids).logits[0]
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]

    loss, kl = torch.zeros(()), torch.zeros(())
    for e in batch:
        loss = loss - 0.7 * logprob(student.model, e.predict, e.label).mean() / 4
        if e.id in said:
            prompt = e.explain
            if method == "sdft":
                text = f"A worked solution:\n{e.positives[0].text.strip()}\n\nThe question:\n{e.text}"
                prompt = teacher.source_ids(EXPLAIN, text)
            ours, theirs = (
                logprob(model, p, said[e.id].tokens)
                for model, p in ((student.model, e.explain), (teacher.model, prompt))
            )
            loss = loss - 0.8 * ((theirs - ours).detach() * ours).sum() / 20
            kl = kl + (ours - theirs).detach().sum() / 20
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    assert losses["teacher_kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    loss.backward()
    for name, p in student.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_opd_lowers_the_held_out_kl(seed, trained_mentor, llama_folder, rows_file, tmp_path):
    out = tmp_path / "run"
    changes = dict(
        max_steps=200, per_device_train_batch_size=24, learning_rate=3e-3, alpha_pred=0.0, alpha_cl=1.0, seed=seed
    )
    changes |= dict(validation_fraction=0.0, lr_scheduler_type="constant", save_steps=1000, sample_batch_size=24)
    train(config_of("opd", rows_file, llama_folder, out, trained_mentor, **changes))
    texts = [f"Eve has {i} pens and finds {i + 2}. How many pens does Eve have?" for i in range(24)]
    before, after, teacher = (
        Student.load(str(folder), PromptSettings())
        for folder in (llama_folder, checkpoint_path(out, 200), trained_mentor)
    )
    first, last = held_out_kl(before, teacher, texts), held_out_kl(after, teacher, texts)
    assert last < 0.5 * first, (first, last)
    told = [m["teacher_kl"] for m in metrics(out) if "teacher_kl" in m]
    assert sum(told[-20:]) < 0.5 * sum(told[:20])  # as the log has it, of the questions that it trains on


def test_sdfts_teacher_reads_a_rationale_first(llama_folder, rows_file, tmp_path):
    student = Student.load(str(llama_folder), PromptSettings())
    config = config_of("sdft", rows_file, llama_folder, tmp_path, teacher_ema=0.75)
    example = max(
        make_examples(load_questions(str(rows_file), split="train").questions, student, config),
        key=lambda e: len(e.positives),
    )
    teaching = SelfTeaching(LocalTeacher(Student.load(str(llama_folder), PromptSettings())), config)
    ids = teaching.source(TargetText(example, EXPLAIN, []))
    first = student.target_ids(example.positives[0].text)[:-1]
    assert any(ids[i : i + len(first)] == first for i in range(len(ids))) and ids[-4:] == example.explain[-4:]
    asked = [TargetText(example, EXPLAIN, student.target_ids("So 5."))]
    student.model.eval()
    plain = LocalTeacher(student).logprob([example.explain], [asked[0].tokens], [0])
    assert (teaching.scores(asked) - plain).abs().max() > 1e-4  # it knows more
    name, own = next(iter(teaching.moving.named_parameters()))
    before = own.clone()
    with torch.no_grad():
        dict(student.model.named_parameters())[name].add_(4.0)
    teaching.after_step(student.model)
    assert (own - before - 1.0).abs().max() < 1e-6
    assert SelfTeaching(LocalTeacher(student), dataclasses.replace(config, teacher_ema=1.0)).moving is None


# Mentor-KD


@pytest.mark.parametrize("family", ["llama_folder", "t5_folder"])
def test_lambda_0_is_cross_entropy_to_the_bit(family, rows_file, tmp_path, request):
    student = request.getfixturevalue(family)
    for method in ("sft-all", "mentor-kd"):
        train(config_of(method, rows_file, student, tmp_path / method, student, kd_lambda=0.0, validation_fraction=0.0))
    assert same(weights(tmp_path / "sft-all"), weights(tmp_path / "mentor-kd"))
    a, b = metrics(tmp_path / "sft-all"), metrics(tmp_path / "mentor-kd")
    assert [m["loss"] for m in a] == [m["loss"] for m in b]


@pytest.mark.usefixtures("float64")
def test_files_teach_as_the_model_does(mentor, llama_folder, rows_file, tmp_path):
    """The same K tokens from a file, which holds fp32, and from the model itself."""
    summary, _ = score_teacher(ScoreSettings(str(rows_file), str(mentor), str(tmp_path / "lp"), top_logprobs=5))
    assert summary["texts"] >= summary["scored"] > 80
    common = dict(max_steps=3, validation_fraction=0.0, save_steps=3)
    train(
        config_of("mentor-kd", rows_file, llama_folder, tmp_path / "a", teacher_logprobs=str(tmp_path / "lp"), **common)
    )
    train(config_of("mentor-kd", rows_file, llama_folder, tmp_path / "b", mentor, top_logprobs=5, **common))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["teacher_kl"] == pytest.approx(
            b["teacher_kl"], rel=1e-5
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama_folder", "t5_folder"])
def test_the_literal_form_counts_padding(family, rows_file, tmp_path, request):
    """Of one micro-batch by hand: whole distributions over padded targets, a mean over all of their positions."""
    folder = str(request.getfixturevalue(family))
    config = TrainConfig(
        method="mentor-kd", teacher=folder, mentor_kd_literal=True, kd_temperature=2.0, top_logprobs=1000, kd_lambda=0.3
    )
    student, teacher = student_and_teacher(folder)
    batch = make_examples(load_questions(str(rows_file), split="train").questions[:2], student, config)
    teaching = ModelTeaching(LocalTeacher(teacher), config)
    objective = Objective(student, config, None, make_autocast(student.device, None), teaching=teaching)
    losses, _ = objective.step(MicroBatch(batch, {}, 2))
    plain = Objective(student, TrainConfig(method="sft-all"), None, make_autocast(student.device, None))
    ce = plain.step(MicroBatch(batch, {}, 2))[0]["loss"]
    sources, targets = [], []
    for e in batch:
        for source, target in [(e.predict, e.label), *((e.explain, c.tokens) for c in e.positives)]:
            sources.append(source)
            targets.append(target)
    padded = pad_all(targets, student.pad_id)
    logs = []
    for model in (student, teacher):
        packed = model.hidden(sources, padded, range(len(padded)))
        _, ids, top = linear_top(
            packed.hidden, model.head.weight, packed.target, 1000, **model.head.options, temperature=2.0
        )
        logs.append(torch.zeros_like(top).scatter(1, ids, top))
    logp, logq = logs
    kl = (logq.exp() * (logq - logp)).sum(1).mean()
    assert losses["loss"].item() == pytest.approx(float(0.7 * ce + 0.3 * kl), rel=1e-9)
    assert len(logp) > sum(map(len, targets))  # there was padding


# Resumes


CASES = {
    "opd": {},
    "sdft": {"teacher_ema": 0.9},
    "npo": {},
    "dft": {},
    "mentor-kd": {},
    "gkd": {},
}


@pytest.mark.parametrize("family", ["llama_folder", pytest.param("t5_folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", CASES)
def test_a_resume_changes_no_bit(method, family, mentors, logprobs, rows_file, tmp_path, request):
    student, mentor, extra = str(request.getfixturevalue(family)), mentors[family], CASES[method]
    if (method, family) == ("mentor-kd", "llama_folder"):
        extra = {"teacher_logprobs": str(logprobs)}
    out, again = tmp_path / "a", tmp_path / "b"
    options = dict(**extra, sample_batch_size=8, save_total_limit=None, max_steps=4, save_steps=2)
    train(config_of(method, rows_file, student, out, mentor, **options))
    begun = load_file(Path(student) / "model.safetensors")
    assert not same(begun, {name: x for name, x in weights(out, 4).items() if name in begun})
    shutil.copytree(out, again, symlinks=True)
    shutil.rmtree(checkpoint_path(again, 4))
    for name in ("eval_results.json", "predictions.jsonl", "reference.json"):
        (again / name).unlink(missing_ok=True)
    (again / "final").unlink()
    train(config_of(method, rows_file, student, again, mentor, **options, resume="auto"))
    assert same(weights(out, 4), weights(again, 4)) and metrics(out) == metrics(again)
    if method == "sdft":
        assert (checkpoint_path(again, 4) / "teacher.safetensors").read_bytes() == (
            checkpoint_path(out, 4) / "teacher.safetensors"
        ).read_bytes()
    if method == "npo":
        assert json.loads((out / "reference.json").read_text()) == json.loads((again / "reference.json").read_text())


@pytest.mark.parametrize(("method", "flag"), [("opd", "--teacher"), ("sdft", "--student")])
def test_a_resume_with_another_teacher_is_refused(method, flag, mentor, llama_folder, rows_file, tmp_path):
    folder, out = Path(shutil.copytree(mentor if method == "opd" else llama_folder, tmp_path / "model")), tmp_path / "a"
    student, teacher = (llama_folder, folder) if method == "opd" else (folder, None)
    options = dict(max_steps=1, save_steps=1)
    train(config_of(method, rows_file, student, out, teacher, **options))
    (out / "eval_results.json").unlink()
    train(config_of(method, rows_file, student, out, teacher, **options, resume="auto"))
    sharpened(folder)
    with pytest.raises(InputError, match=f"^{flag}: the contents of .*model differ from those that .*checkpoint-1 was"):
        train(config_of(method, rows_file, student, out, teacher, **options, resume="auto"))


def test_a_resume_with_other_logprobs_of_its_rows_is_refused(mentor, llama_folder, rows_file, tmp_path):
    """More texts in the folder and texts in other shards are no change."""
    rows, folder, out = tmp_path / "few.jsonl", tmp_path / "lp", tmp_path / "a"
    rows.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:12]))
    files = {"teacher_logprobs": str(folder), "max_steps": 1, "save_steps": 1}

    def score(data: Path, teacher: Path) -> None:
        assert score_teacher(ScoreSettings(str(data), str(teacher), str(folder), top_logprobs=5))[1] is None

    score(rows, mentor)
    train(config_of("mentor-kd", rows, llama_folder, out, **files))
    score(rows_file, mentor)
    train(config_of("mentor-kd", rows, llama_folder, out, **files, resume="auto"))
    shutil.rmtree(folder)
    score(rows, llama_folder)
    with pytest.raises(InputError, match=r"^--teacher-logprobs: the contents of .*lp differ from those that .*-1 was"):
        train(config_of("mentor-kd", rows, llama_folder, out, **files, resume="auto"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_folder", "t5_folder"])
@pytest.mark.parametrize("method", CASES)
def test_killed_at_its_files_and_resumed(method, family, crashes, mentors, logprobs, tmp_path, request):
    """kill -9 at four of the run's operations on files: every byte is that of the unbroken run."""
    from tests.support.faults import Fault

    student, extra = request.getfixturevalue(family), dict(CASES[method])
    if method == "mentor-kd":
        extra = {"teacher_logprobs": logprobs} if family == "llama_folder" else {"teacher": mentors[family]}
    options = dict(method=method, discriminator="none", max_steps=4, save_steps=2, sample_batch_size=8, **extra)
    options |= {"teacher": mentors[family]} if method in ("opd", "gkd") else {}
    options |= {"scheme": "minmax", "negative_source": "minority", "iteration_steps": 2}

    def args(out, **more):
        from tests.support.warm import short_run

        return short_run(crashes.rows, student, "none", out, **(options | more))

    whole = tmp_path / "whole"
    done = crashes.warm.run(args(whole), folder=whole)
    assert done.code == 0 and len(done.points) > 20, done.err
    for at in range(7, len(done.points), max(len(done.points) // 4, 1)):
        out = tmp_path / f"at-{at}"
        ended = crashes.warm.run(args(out), Fault("kill", at), folder=out)
        assert ended.code == -9, ended.err
        again = crashes.warm.run(args(out, resume="auto"))
        assert again.code == 0, again.err
        assert differences(out, whole) == [], done.points[at]


# What is refused


def bytes_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = bytes_bpe(bos=False, merging=False)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "opd"}, "--method opd needs --teacher"),
        ({"method": "sdft", "teacher": "x"}, "--teacher: --method sdft is taught by the student itself"),
        ({"method": "sft-all", "teacher": "x"}, "--teacher: .* rows alone; .*opd or mentor-kd or gkd$"),
        ({"method": "npo", "teacher_logprobs": "x"}, "--teacher-logprobs: .*choose --method mentor-kd$"),
        ({"method": "dft", "teacher_model": "m"}, "--teacher-model: .*choose --method opd$"),
        ({"method": "opd", "teacher": "x", "teacher_logprobs": "y"}, "--teacher-logprobs: --method opd takes"),
        ({"method": "gkd"}, "--method gkd needs --teacher PATH"),
        ({"method": "gkd", "teacher": "http://x/v1"}, "--method gkd needs --teacher PATH"),
        ({"method": "mentor-kd"}, "needs either --teacher-logprobs.*neither"),
        ({"method": "mentor-kd", "teacher": "x", "teacher_logprobs": "y"}, "both"),
        ({"method": "mentor-kd", "teacher": "http://x/v1"}, "score-teacher --teacher URL"),
        ({"method": "mentor-kd", "teacher_logprobs": "y", "mentor_kd_literal": True}, "no padding in it"),
        ({"method": "sft-all", "mentor_kd_literal": True}, "is for --method mentor-kd"),
        ({"method": "opd", "teacher": "x", "teacher_model": "m"}, "needs a server"),
        ({"method": "sdft", "teacher_ema": 0.5, "use_peft": True}, "--teacher-ema"),
        ({"method": "mentor-kd", "teacher_logprobs": "/nowhere"}, "/nowhere is no folder"),
    ],
)
def test_options_that_do_not_go_together(changes, message, llama_folder, rows_file, tmp_path):
    with pytest.raises(InputError, match=message):
        train(settings(rows_file, llama_folder, tmp_path / "run", **{**PLAIN, **changes}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_among_several_methods_each_gets_the_teacher_that_it_takes(llama_folder, rows_file, tmp_path):
    config = settings(rows_file, llama_folder, tmp_path / "run", **{**PLAIN, "teacher": "x", "method": "opd"})
    taught = {job.config.method: job.config.teacher for job in plan(config, (0,), ("sft-all", "opd", "sdft"), "recipe")}
    assert taught == {"sft-all": None, "opd": "x", "sdft": None}
    with pytest.raises(InputError, match="--teacher: --method sft-all"):  # which none of them takes
        plan(config, (0,), ("sft-all", "dss"), "recipe")
    with pytest.raises(InputError, match="--method gkd needs --teacher PATH"):
        plan(dataclasses.replace(config, teacher=None), (0,), ("dss", "gkd"), "recipe")


def test_every_kind_of_teacher_is_in_the_table():
    assert {method.teacher for method in METHODS.values()} == set(TEACHERS)
    assert {name for names in TEACHERS.values() for name in names} == set(TEACHER_OPTIONS)


def test_a_teacher_with_another_tokenizer(llama_folder, rows_file, logprobs, tmp_path):
    (tmp_path / "other").mkdir()
    other = bytes_llama(tmp_path / "other")
    with pytest.raises(InputError, match=r"--teacher .*another tokenizer than the student.*token \d+ is"):
        train(config_of("opd", rows_file, llama_folder, tmp_path / "a", other))
    with pytest.raises(InputError, match="another tokenizer than the student's"):
        train(config_of("mentor-kd", rows_file, other, tmp_path / "b", teacher_logprobs=str(logprobs)))
    with pytest.raises(InputError, match="cannot be told; use --no-teacher-tail"):
        train(
            config_of(
                "mentor-kd", rows_file, llama_folder, tmp_path / "c", teacher_logprobs=str(logprobs), kd_temperature=2.0
            )
        )
    rows = tmp_path / "others.jsonl"
    text = rows_file.read_text().replace("apples", "pears").replace("How many", "What number of")
    rows.write_text(text)
    with pytest.raises(InputError, match="holds nothing of these rows"):
        train(config_of("mentor-kd", rows, llama_folder, tmp_path / "d", teacher_logprobs=str(logprobs)))
