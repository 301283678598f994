"""`--method gkd`: its loss by hand from dense logits, a teacher that is the student, and what is refused."""

from __future__ import annotations

import pytest
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.errors import InputError
from qcrd_fast.teacher_signal.local import LocalTeacher
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.teaching import ModelTeaching
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.device import make_autocast
from tests.support.kl_oracle import dense_kl
from tests.support.short_runs import metrics, settings
from tests.support.students import student_and_teacher

PLAIN = dict(quality=None, scheme=None, negative_source=None, iteration_steps=None, delta=3.0)


def config_of(rows, student, out, **changes) -> TrainConfig:
    return settings(rows, student, out, method="gkd", **{**PLAIN, "teacher": str(student), **changes})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama_folder", "t5_folder"])
@pytest.mark.parametrize("own", [0.0, 0.25, 1.0])
def test_the_loss_of_a_micro_batch_by_hand(family, own, rows_file, request):
    """Labels by cross-entropy; each question's rationales, and what the student says, by the divergence of dense
    logits."""
    folder = str(request.getfixturevalue(family))
    config = TrainConfig(method="gkd", teacher=folder, gkd_beta=0.3, gkd_lambda=own, kd_temperature=1.5, alpha_cl=0.8)
    student, teacher = student_and_teacher(folder)
    batch = make_examples(load_questions(str(rows_file), split="train").questions[:3], student, config)
    said = {e.id: Negative(student.target_ids(f"So {i}."), f"So {i}.") for i, e in enumerate(batch[:2])}
    teaching = ModelTeaching(LocalTeacher(teacher), config)
    objective = Objective(student, config, None, make_autocast(student.device, None), teaching=teaching)
    losses, _ = objective.step(MicroBatch(batch, said if own else {}, 3))
    grads = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad()

    def mean_divergence(example, tokens):
        ours, theirs = (model.hidden([example.explain], [tokens], [0]).hidden for model in (student, teacher))
        heads = dict(scale=student.head.scale, teacher_scale=teacher.head.scale)
        zeros = torch.zeros(len(tokens), dtype=torch.int64)
        args = (ours, student.head.weight, theirs, teacher.head.weight.detach(), zeros)
        return dense_kl(*args, beta=0.3, temperature=1.5, **heads).mean()

    expected = torch.zeros(())
    for e in batch:
        for c in e.positives if own < 1 else ():
            expected = expected + (1 - own) / 3 / len(e.positives) * mean_divergence(e, c.tokens)
        if own and e.id in said:
            expected = expected + own / 3 * mean_divergence(e, said[e.id].tokens)
    plain = Objective(student, TrainConfig(method="single-task"), None, make_autocast(student.device, None))
    labels = plain.step(MicroBatch(batch, {}, 3))[0]["loss"]
    assert losses["loss_cl"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert losses["loss"].item() == pytest.approx(float(config.alpha_pred * labels + 0.8 * expected), rel=1e-9)
    for p in student.model.parameters():
        p.grad = None if p.grad is None else config.alpha_pred * p.grad
    (0.8 * expected).backward()
    for name, p in student.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_teacher_that_is_the_student_has_nothing_to_teach(llama_folder, rows_file, tmp_path):
    for own in (0.0, 1.0):
        out = tmp_path / f"{own}"
        options = dict(max_steps=1, validation_fraction=0.0, alpha_pred=0.0, gkd_lambda=own)
        train(config_of(rows_file, llama_folder, out, **options))
        assert abs(metrics(out)[0]["loss"]) < 1e-12
        assert (out / "snapshots").exists() == (own > 0)  # at 0 nothing is sampled


@pytest.mark.parametrize("teacher", [None, "http://localhost:1/v1"])
def test_it_needs_local_weights(teacher, llama_folder, rows_file, tmp_path):
    with pytest.raises(InputError, match="--method gkd needs --teacher PATH: local weights"):
        train(config_of(rows_file, llama_folder, tmp_path / "run", teacher=teacher))
