"""`train --use-peft`: what is trained, what a checkpoint holds, and that a resume goes on where the run stopped."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast.errors import InputError
from qcrd_fast.models.lora import ADAPTER, add_lora, load_adapter, save_model
from qcrd_fast.train.trainer import train
from tests.support.short_runs import settings

PEFT = dict(use_peft=True, lora_r=4, lora_alpha=8, max_steps=4, save_steps=2, learning_rate=0.02)


def load(folder):
    auto = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder)


@pytest.mark.parametrize("student", ["t5_folder", "llama_folder"])
def test_checkpoints_are_merged_and_a_resume_is_exact(student, rows_file, tmp_path, request):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    folder, out = request.getfixturevalue(student), tmp_path / "run"
    train(settings(rows_file, folder, out, **PEFT))
    whole = {name: load_file(out / "checkpoint-4" / name) for name in ("model.safetensors", ADAPTER)}
    before, after = load_file(folder / "model.safetensors"), whole["model.safetensors"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms_and_embeddings = {n for n in before if before[n].ndim < 2 or "embed" in n or "shared" in n or "relative" in n}
    assert changed == before.keys() - norms_and_embeddings
    shutil.rmtree(out / "checkpoint-4")
    (out / "final").unlink()
    train(settings(rows_file, folder, out, **PEFT, resume="auto"))
    for name, expected in whole.items():
        again = load_file(out / "checkpoint-4" / name)
        assert all(torch.equal(again[n], expected[n]) for n in expected), name


def test_the_merged_model_is_the_adapted_one(llama_folder, rows_file, tmp_path, float64):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = load(llama_folder).eval()
    config = settings(rows_file, llama_folder, tmp_path, **PEFT)
    add_lora(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and not any("lm_head" in n for n in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_model(model, tmp_path / "saved")
    ids = AutoTokenizer.from_pretrained(llama_folder)("Ann has 3 pens.", return_tensors="pt").input_ids
    torch.testing.assert_close(load(tmp_path / "saved").eval()(ids).logits, model(ids).logits, rtol=1e-10, atol=1e-10)
    other = load(llama_folder)
    add_lora(other, settings(rows_file, llama_folder, tmp_path, **PEFT | {"lora_r": 2}))
    with pytest.raises(InputError, match=r"lora.safetensors does not fit this student and --lora-r"):
        load_adapter(tmp_path / "saved", other)


def test_without_peft_it_is_said_at_once(llama_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--use-peft needs PEFT: pip install 'qcrd-fast\[peft\]'"):
        train(settings(rows_file, llama_folder, tmp_path / "run", **PEFT))
