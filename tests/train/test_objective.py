"""One micro-batch's losses and gradients: with shared prompts as without, and MI's terms as its released code has
them."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import make_examples
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MI_WEIGHT, MicroBatch, Objective
from qcrd_fast.utils.device import make_autocast
from tests.support.short_runs import PARTS

LAGGED = "First 3 + 4 = 9 apples. Then 9 - 2 = 5."


@pytest.fixture(params=["t5_folder", "llama_folder"])
def student(request):
    """Without dropout, unlike the folder's own T5."""
    student = Student.load(str(request.getfixturevalue(request.param)), PromptSettings())
    set_dropout(student.model, 0.0)
    return student


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = p


def batch_of(student, config, rows_file):
    """Three questions, one of them without a rationale, and negatives of the student's own for two."""
    a, b, c = sorted(load_questions(str(rows_file), split="train").questions, key=lambda q: -len(q.negatives))[:3]
    examples = make_examples([a, dataclasses.replace(b, positives=(), negatives=()), c], student, config)
    own = Negative(student.target_ids(LAGGED), LAGGED)
    return examples, {examples[0].id: own, examples[2].id: own}


def step(student, config, rows_file, at_step=0):
    """(losses, gradients, counts) of one micro-batch, in training mode."""
    batch, lagged = batch_of(student, config, rows_file)
    objective = Objective(student, config, None, make_autocast(student.device, config.bf16))
    student.model.train()
    student.model.zero_grad(set_to_none=True)
    losses, stats = objective.step(MicroBatch(batch, lagged, 5, at_step))
    gradients = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    return {n: v.item() for n, v in losses.items()}, gradients, stats


def check_equal(student, config, rows_file, tolerance=1e-9):
    losses, gradients, together = step(student, config, rows_file)
    expected, expected_gradients, apart = step(student, dataclasses.replace(config, shared_prompts=False), rows_file)
    assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 4
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-2), name
    assert {k: v for k, v in together.items() if k != "body_tokens"} == {
        k: v for k, v in apart.items() if k != "body_tokens"
    }
    assert together["body_tokens"] > 0
    assert student.is_encoder_decoder or together["body_tokens"] < apart["body_tokens"]
    return expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"forward": "joint"},
        {"scheme": None},  # the default selections
        {"scheme": "mean", "reasoning_task": True},
        {"method": "sft-all"},
        {"method": "redi", "redi_warmup": 0.0},
    ],
    ids=lambda changes: ",".join(changes) or "two-pass",
)
@pytest.mark.usefixtures("float64")
def test_shared_prompts_change_no_loss_and_no_gradient(changes, student, rows_file):
    losses = check_equal(student, TrainConfig(**{"delta": 9.0, "discriminator": "none", **PARTS, **changes}), rows_file)
    assert losses["loss_pred"] > 0 and losses["loss_cl"] != 0


@pytest.mark.usefixtures("float64")
def test_with_gradient_checkpointing(student, rows_file):
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    check_equal(student, TrainConfig(delta=9.0, **PARTS), rows_file)


def test_in_bf16(student, rows_file):
    check_equal(student, TrainConfig(delta=9.0, bf16=True, **PARTS), rows_file, tolerance=5e-2)


def test_dropout_is_drawn_from_the_seed_alone(student, rows_file):
    set_dropout(student.model, 0.1 if student.is_encoder_decoder else 0.0)
    runs = []
    for _ in range(2):  # the first one also tries out how the student takes packed rows
        torch.manual_seed(3)
        runs.append(step(student, TrainConfig(delta=9.0, **PARTS), rows_file))
    assert runs[0][0] == runs[1][0] and runs[0][2] == runs[1][2]
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])


@pytest.mark.usefixtures("float64")
def test_mutual_information_is_that_of_the_equations(student, rows_file):
    """From the model's own logits, padded and pooled as the released code does."""
    config = TrainConfig(method="mi", reasoning_task=True, alpha_pred=0.3, alpha_cl=0.6)
    losses, gradients, stats = step(student, config, rows_file)
    examples, _ = batch_of(student, config, rows_file)
    model, pad = student.model.eval(), student.pad_id
    model.zero_grad(set_to_none=True)

    def task(pairs):
        """(sum of mean negative log-likelihoods, pooled softmax) of (prompt, target) pairs in one right-padded
        batch."""
        width = max(len(t) + (0 if student.is_encoder_decoder else len(p) - 1) for p, t in pairs)
        total, pooled = 0.0, []
        for prompt, target in pairs:
            if student.is_encoder_decoder:
                inputs = [0, *target[:-1]]
                ids = torch.tensor([inputs + [pad] * (width - len(inputs))])
                logits, first = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0], 0
            else:
                inputs = prompt + target[:-1]
                mask = torch.tensor([[1] * len(inputs) + [0] * (width - len(inputs))])
                ids, first = torch.tensor([inputs + [pad] * (width - len(inputs))]), len(prompt) - 1
                logits = model(input_ids=ids, attention_mask=mask).logits[0]
            logprob = logits.log_softmax(-1)[first : first + len(target)]
            total = total - logprob[range(len(target)), target].mean()
            pooled.append(logits[first:].softmax(-1).amax(0))
        return total, torch.stack(pooled)

    have = [0, 2]
    pred, label = task([(e.predict, e.label) for e in examples])
    reason, _ = task([e.reason for e in examples if e.reason])
    cl, explained = task([(examples[q].explain, examples[q].positives[0].tokens) for q in have])
    mi = torch.nn.functional.cross_entropy(explained, label[have].detach(), reduction="sum") / 5
    expected = {"loss_pred": (pred + reason) / 5, "loss_cl": cl / 5, "loss_mi": mi}
    total = 0.3 * expected["loss_pred"] + 0.6 * expected["loss_cl"] + MI_WEIGHT * mi
    assert losses == pytest.approx({"loss": total.item()} | {n: v.item() for n, v in expected.items()}, rel=1e-9)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (gradients[name] - parameter.grad).norm() <= 1e-9 * parameter.grad.norm().clamp(min=1e-2), name
    assert stats["tokens"] == sum(len(e.label) for e in examples) + sum(
        len(examples[q].positives[0].tokens) + len(examples[q].reason[1]) for q in have
    )


def test_mi_without_a_rationale_teaches_labels_alone(student, rows_file):
    config = TrainConfig(method="mi")
    batch, _ = batch_of(student, config, rows_file)
    losses, _ = Objective(student, config, None, contextlib.nullcontext).step(MicroBatch(batch[1:2], {}, 1))
    assert losses["loss_cl"] == losses["loss_mi"] == 0 and losses["loss_pred"] > 0
