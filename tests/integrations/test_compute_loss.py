"""The loss as a `compute_loss_func` of Hugging Face's Trainer: the equations, with the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

from qcrd_fast import RationaleCollator, attach, detach, make_compute_loss_func
from qcrd_fast.errors import InputError
from tests.integrations.test_attach import ROWS
from tests.support.eager_equations import assert_same, gradients

QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0}


@pytest.fixture(params=["t5", "llama"])
def student(request, t5_folder, llama_folder, float64):
    """(model without dropout, tokenizer)."""
    folder, auto = (t5_folder, AutoModelForSeq2SeqLM) if request.param == "t5" else (llama_folder, AutoModelForCausalLM)
    model = auto.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_trainers_gradients_are_those_of_the_equations(student, accumulation, tmp_path):
    """N is the questions of all micro-batches; the plain Trainer, whose model is as it was."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    model, tokenizer = student
    collate = RationaleCollator(tokenizer, model, quality="score")
    loss, expected = gradients(copy.deepcopy(model), collate.prompter, ROWS, 3)
    found = {}

    class Probe(torch.optim.SGD):
        def step(self, closure=None):
            found.update(
                {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            )

    args = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, max_steps=1, per_device_train_batch_size=3 // accumulation,
        gradient_accumulation_steps=accumulation, logging_steps=1, **QUIET,
    )  # fmt: skip
    compute = make_compute_loss_func(model)
    optimizers = (Probe(model.parameters(), lr=0.0), None)
    trainer = Trainer(model, args, collate, ROWS, compute_loss_func=compute, optimizers=optimizers)
    trainer.train()
    assert "forward" not in vars(model) and "_qcrd_fast" not in vars(model)
    assert_same(expected, found)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)  # which it rounds
    compute.remove()
    assert not model._forward_pre_hooks
    assert attach(model)(**collate(ROWS)).loss.item() == pytest.approx(loss.item(), rel=1e-10)


def test_evaluation_and_calls_without_rationales(student, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    model, tokenizer = student
    collate, plain = RationaleCollator(tokenizer, model), copy.deepcopy(model)
    args = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, prediction_loss_only=True, per_device_eval_batch_size=3, **QUIET
    )
    compute = make_compute_loss_func(model)
    trainer = Trainer(model, args, collate, eval_dataset=ROWS, compute_loss_func=compute)
    expected = attach(copy.deepcopy(plain), two_pass=False)(**collate(ROWS)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(InputError, match="has not run on a RationaleCollator's batch"):
        compute(None, None)


def test_one_of_the_two_is_enough(student):
    model, _ = student
    attach(model)
    with pytest.raises(InputError, match=r"call qcrd_fast\.detach\(model\) first"):
        make_compute_loss_func(model)
    make_compute_loss_func(detach(model)).remove()
