"""Checkpoints of before a raw prompt was tokenised with its newline keep the tokens that they were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.export import export_run, usage
from qcrd_fast.models.chat_template import chat_template, tokens_sent
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, Prompter, PromptSettings
from qcrd_fast.runs.load import load_student
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.files import sha256, write_json
from tests.support.students import sampled_rows
from tests.support.toy_tokenizers import KINDS

OLD = {"template": "raw", "max_source_length": 1024, "max_target_length": 256}
QUESTION = "Tom has 3 bags. How many?"


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_version(kind: str) -> None:
    tokenizer = KINDS[kind]()
    old, new = Prompter(tokenizer, PromptSettings.of_state(OLD), False), Prompter(tokenizer, PromptSettings(), False)
    for question in (QUESTION, "a </s><s> b"):
        apart = [*tokenizer(PREDICT + question).input_ids, *tokenizer("\n", add_special_tokens=False).input_ids]
        assert old.source_ids(PREDICT, question) == apart
    assert old.target_ids("</s> 3") == [
        *tokenizer("</s> 3", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    assert new.source_ids(PREDICT, QUESTION) == tokenizer(PREDICT + QUESTION + "\n").input_ids
    differs = old.source_ids(PREDICT, QUESTION) != new.source_ids(PREDICT, QUESTION)
    assert differs == (kind != "bytes")
    found = chat_template(old, (PREDICT, EXPLAIN))
    assert found is None or tokens_sent(tokenizer, found, "a </s><s> b") == old.source_ids(PREDICT, "a </s><s> b")
    assert differs == (found is None)
    assert (
        PromptSettings.of_state(OLD | {"system": ""}).version
        == 2
        == PromptSettings.of_state(vars(PromptSettings())).version
    )
    with pytest.raises(InputError, match="version is 1 or 2, or that of a newer"):
        PromptSettings.of_state(OLD | {"version": 3})


def test_an_old_run_is_evaluated_exported_and_resumed_with_its_tokens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = KINDS["bytes, BOS"]()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(4)), encoding="utf-8")
    run = tmp_path / "run"
    options = TrainConfig(
        data=str(tmp_path / "rows.jsonl"), validation_fraction=0, student=str(tmp_path / "student"),
        output_dir=str(run),
        method="dss", max_steps=2, save_steps=1, max_answer_tokens=2,
    )  # fmt: skip
    train(options)
    for checkpoint in run.glob("checkpoint-*"):  # as before
        state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "MANIFEST.json"))
        assert [state["prompt"].pop(name) for name in ("version", "system", "date")] == [2, "", ""]
        write_json(checkpoint / "state.json", state)
        manifest["files"]["state.json"] = sha256(checkpoint / "state.json")
        write_json(checkpoint / "MANIFEST.json", manifest)
    student, _ = load_student(str(run), "cpu")
    wanted = [*tokenizer(PREDICT + QUESTION).input_ids, *tokenizer("\n", add_special_tokens=False).input_ids]
    assert student.source_ids(PREDICT, QUESTION) == wanted != tokenizer(PREDICT + QUESTION + "\n").input_ids
    assert export_run(str(run), str(tmp_path / "model"))["chat_template"] == "none"
    assert load_student(str(tmp_path / "model"), "cpu")[0].source_ids(PREDICT, QUESTION) == wanted
    made: dict = {}
    exec(usage(student).replace('"."', f'"{tmp_path / "model"}"').partition("output =")[0], made)
    assert made["input_ids"] == student.source_ids(PREDICT, made["question"])
    for name in ("final", "eval_results.json", "predictions.jsonl"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoint-2")
    train(TrainConfig(**options.to_dict() | {"resume": "auto"}))
    assert json.loads((run / "checkpoint-2" / "state.json").read_text())["prompt"]["version"] == 1
