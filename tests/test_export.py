"""`export`: what from_pretrained reads back, the card and its code, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.export import export_run, usage
from qcrd_fast.models.chat_template import tokens_sent
from qcrd_fast.models.lora import count_parameters, write_adapter
from qcrd_fast.models.prompts import EXPLAIN, PREDICT
from qcrd_fast.runs.load import load_student
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.files import sha256, write_json
from qcrd_fast.utils.intervals import wilson

OPTIONS = dict(
    max_steps=2, save_steps=1, negative_source="minority", discriminator="none", eval_batch_size=8, max_answer_tokens=2
)


@pytest.fixture(scope="module", params=["t5", "llama"])
def run(request, tmp_path_factory, rows_file) -> Path:
    """A run of two steps, on either kind of student; the decoder's prompts stand in a template."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = dict(OPTIONS, data=str(rows_file), student=str(request.getfixturevalue(f"{request.param}_folder")))
    if request.param == "llama":
        template = folder.parent / "template.txt"
        template.write_text("Question: {prompt}\nReply:", encoding="utf-8")
        options["prompt_template"] = str(template)
    train(TrainConfig(**options, output_dir=str(folder)))
    return folder


def test_what_is_exported_loads_and_is_the_final_model(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    summary = export_run(str(run), str(output))
    auto = AutoModelForSeq2SeqLM if run.name == "t5" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    trained = auto.from_pretrained(run / "final")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert tokenizer("2 + 3").input_ids == AutoTokenizer.from_pretrained(run / "final")("2 + 3").input_ids
    assert model.generation_config.do_sample is False and model.generation_config.max_new_tokens == 256
    assert model.generation_config.eos_token_id == 1
    names = {p.name for p in output.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"optimizer.safetensors", "discriminator.safetensors", "MANIFEST.json"}
    assert summary["parameters"] == model.num_parameters() and sorted(names) == summary["files"]
    assert [p.name for p in output.parent.iterdir()] == ["model"]  # no temporary folder is left
    # eval and generate ask with the same prompt
    before, after = load_student(str(run))[0], load_student(str(output))[0]
    assert before.prompts == after.prompts


def test_the_card(run: Path, tmp_path: Path) -> None:
    export_run(str(run), str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == ("text2text-generation" if run.name == "t5" else "text-generation")
    results = json.loads((run / "eval_results.json").read_text())
    low, high = wilson(results["accuracy"], results["n"])
    assert f"| {results['accuracy']:.4f} | {results['n']} | {low:.4f} to {high:.4f} |" in card
    for wanted in (
        "`--method qcrd`",
        "`rows.jsonl`",
        f"{results['train_questions']} training",
        "2405.13014",
        "## Limitations",
    ):
        assert wanted in card, wanted
    assert "| `learning_rate` | 5e-05 |" in card and str(run.parent) not in card  # no path of this machine
    if run.name == "llama":
        assert "Question: {prompt}\nReply:" in card


def test_the_code_in_the_card_asks_as_training_did(run: Path, tmp_path: Path) -> None:
    export_run(str(run), str(tmp_path / "model"))
    student, _ = load_student(str(run), "cpu")
    code = usage(student).replace('folder, question = "."', f"folder, question = {str(tmp_path / 'model')!r}")
    assert code != usage(student)
    made: dict = {}
    exec(code.replace("model.generate(", "model.generate(max_new_tokens=3, inputs="), made)
    assert made["input_ids"] == student.source_ids(PREDICT, made["question"])
    assert isinstance(made["answer"], str)
    exec(code.replace('"predict: "', '"explain: "').partition("output =")[0], made)
    assert made["input_ids"] == student.source_ids(EXPLAIN, made["question"])


def test_a_named_checkpoint_has_no_figures_of_another(run: Path, tmp_path: Path) -> None:
    final = (run / "final").resolve().name
    other = next(p.name for p in run.glob("checkpoint-*") if p.name != final)
    summary = export_run(str(run), str(tmp_path / "model"), checkpoint=other)
    assert summary["model"].endswith(other) and summary["accuracy"] is None
    assert "Not evaluated" in (tmp_path / "model" / "README.md").read_text()
    assert export_run(str(run), str(tmp_path / "again"), checkpoint=final)["accuracy"] is not None


def test_what_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        export_run(str(run), str(full))
    assert [p.name for p in full.iterdir()] == ["kept"]
    with pytest.raises(InputError, match="no intact checkpoint 'checkpoint-9'"):
        export_run(str(run), str(tmp_path / "x"), checkpoint="checkpoint-9")
    with pytest.raises(InputError, match="no such run folder"):
        export_run(str(tmp_path / "nothing"), str(tmp_path / "x"))
    with pytest.raises(InputError, match="not a run folder"):
        export_run(str(full), str(tmp_path / "x"))
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged, symlinks=True)
    with open(damaged / "final" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert entry(["export", str(damaged), "--output", str(tmp_path / "x")]) == 2
    assert "model.safetensors does not match" in capsys.readouterr().err
    assert entry(["export", str(run), "--output", str(tmp_path / "x"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter_merged"] is False
    assert not (tmp_path / "x").exists()


def test_where_no_folder_can_be_put(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcrd_fast.export.load_student", None)  # each is said before the model is loaded
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nothing")
    for output, said in (
        (".", "is the current folder"),
        (str(tmp_path), "is the current folder"),
        ("link", "is a link"),
        ("a\0b", "no name of a folder"),
        ("n" * 250, "too long"),
        (str(run / "final" / "x"), "is a checkpoint"),
    ):
        with pytest.raises(InputError, match=f"--output: .*{said}"):
            export_run(str(run), output)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_full_disk_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*No space left.*bytes free"):
        export_run(str(run), str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_whoever_may_read_the_card_may_read_the_weights(run: Path, tmp_path: Path) -> None:
    export_run(str(run), str(tmp_path / "model"))
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def adapted(llama_folder: Path, run: Path, changes: dict | None = None, tensors: tuple[str, ...] = ()):
    """A run whose checkpoint is a LoRA adapter, and the model it was made of; its file may hold other `tensors`."""
    peft = pytest.importorskip("peft", reason="needs peft, which makes and merges LoRA adapters")
    checkpoint = run / "checkpoint-1"
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(checkpoint)
    config, weights = checkpoint / "adapter_config.json", checkpoint / "adapter_model.safetensors"
    write_json(config, json.loads(config.read_text()) | (changes or {}))
    if tensors:
        save_file({name: torch.ones(2, 2) for name in tensors}, weights)
    write_json(checkpoint / "state.json", {"step": 1, "method": "qcrd", "prompt": {"template": "raw"}})
    shutil.copy(llama_folder / "config.json", checkpoint)
    (checkpoint / "optimizer.safetensors").write_bytes(b"")
    write_json(checkpoint / "MANIFEST.json", {"files": {p.name: sha256(p) for p in checkpoint.iterdir()}})
    (run / "config.resolved.yaml").write_text("method: qcrd\n")
    return model


def test_an_adapter_is_merged(llama_folder: Path, tmp_path: Path, float64: None) -> None:
    model = adapted(llama_folder, tmp_path / "run")
    assert export_run(str(tmp_path / "run"), str(tmp_path / "model"))["adapter_merged"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(
        merged(ids).logits, AutoModelForCausalLM.from_pretrained(llama_folder)(ids).logits, atol=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "tensors", "said"),
    [
        ({}, ("nothing",), "the adapter lacks"),
        ({}, ("base_model.model.lora_A.weight",), "tensors"),
        ({"target_modules": ["zzz"]}, (), "does not fit"),
        ({"peft_type": "XYZ"}, (), "does not fit"),
        ({"r": 3}, (), "does not fit"),
        ({"r": -4}, (), "does not fit"),
        ({"lora_alpha": "x"}, (), "does not fit"),
        ({"target_modules": ["q_proj"]}, (), "does not ask for"),
    ],
)
def test_an_adapter_that_does_not_fit(changes, tensors, said, llama_folder: Path, tmp_path: Path) -> None:
    adapted(llama_folder, tmp_path / "run", changes, tensors)
    with pytest.raises(InputError, match=said):
        export_run(str(tmp_path / "run"), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_wilson_against_the_textbook() -> None:
    low, high = wilson(0.5, 100)
    assert math.isclose(low, 0.40383, abs_tol=1e-5) and math.isclose(high, 0.59617, abs_tol=1e-5)
    assert math.isclose(wilson(0.0, 150)[0], 0, abs_tol=1e-12) and math.isclose(
        wilson(0.0, 150)[1], 0.02497, abs_tol=1e-5
    )


@pytest.mark.parametrize(
    "figures", [{"accuracy": 7, "n": 3}, {"accuracy": 0.5, "n": 10**400}, {"accuracy": 0.5, "n": -3}]
)
def test_figures_that_are_none(figures, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "eval_results.json").write_text(json.dumps(figures))
    export_run(str(tmp_path / "run"), str(tmp_path / "model"))
    assert "Not evaluated" in (tmp_path / "model" / "README.md").read_text()


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, rows_file: Path, llama_folder: Path) -> Path:
    """A run of one step with LoRA, whose learning rate makes the adapter matter."""
    pytest.importorskip("peft", reason="needs peft, which trains LoRA adapters")
    folder = tmp_path_factory.mktemp("lora") / "run"
    options = dict(OPTIONS, data=str(rows_file), student=str(llama_folder), max_steps=1, use_peft=True, lora_r=4)
    train(TrainConfig(**options, learning_rate=0.1, output_dir=str(folder)))
    return folder


def test_an_adapter_alone_is_the_merged_model(lora_run: Path, llama_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    planned = export_run(str(lora_run), str(tmp_path / "adapter"), adapter=True, dry_run=True)
    summary = export_run(str(lora_run), str(tmp_path / "adapter"), adapter=True)
    assert planned == {name: value for name, value in summary.items() if name != "files"}
    assert summary["adapter_merged"] is False
    assert export_run(str(lora_run), str(tmp_path / "merged"), dry_run=True)["adapter_merged"] is True
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    assert "config.json" not in names and "model.safetensors" not in names  # a base model's
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32 and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(llama_folder)
    export_run(str(lora_run), str(tmp_path / "merged"))
    ids = torch.tensor([[5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert not torch.allclose(base(ids).logits, merged, atol=1e-2)
    for model in (
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        load_student(str(tmp_path / "adapter"), "cpu")[0].model,  # eval and generate take the folder
    ):
        assert torch.allclose(model(ids).logits, merged, atol=1e-4)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert summary["parameters"] == sum(tensor.numel() for tensor in held.values())
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    made: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0].replace('"."', f'"{tmp_path / "adapter"}"'), made)
    assert made["input_ids"] == load_student(str(lora_run), "cpu")[0].source_ids(PREDICT, made["question"])
    assert made["model"].generation_config.eos_token_id == 1 and not made["model"].generation_config.do_sample
    assert "library_name: peft" in card and "--max-lora-rank 4" in card and f"cp {llama_folder}/config.json" in card


def test_an_adapter_of_one_layer_names_it_in_full(lora_run: Path, llama_folder: Path, tmp_path: Path) -> None:
    one = "model.layers.0.self_attn.q_proj"
    run = Path(shutil.copytree(lora_run, tmp_path / "run", symlinks=True))
    held = load_file(run / "final" / "lora.safetensors")
    assert any(name.startswith(f"{one}.lora_A") for name in held)
    save_file({name: t for name, t in held.items() if name.startswith(f"{one}.")}, tmp_path / "lora.safetensors")
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path, tmp_path / "out", str(llama_folder), config, base)
    assert count_parameters(tmp_path) == 4 * (32 + 32)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [one]


def test_an_adapter_that_cannot_be_written_alone(lora_run: Path, run: Path, tmp_path: Path, capsys) -> None:
    assert entry(["export", str(run), "--output", str(tmp_path / "x"), "--adapter"]) == 2
    assert "has no lora.safetensors; it takes a run of train --use-peft" in capsys.readouterr().err
    assert entry(["export", str(lora_run), "--output", str(tmp_path / "x"), "--adapter", "--push-to-hub", "a/b"]) == 2
    assert "is a folder of this machine, which others cannot load" in capsys.readouterr().err
    moved = Path(shutil.copytree(lora_run, tmp_path / "moved", symlinks=True))
    config = yaml.safe_load((moved / "config.resolved.yaml").read_text())
    (moved / "config.resolved.yaml").write_text(yaml.safe_dump(config | {"student": "./base"}))  # of another folder
    assert entry(["export", str(moved), "--output", str(tmp_path / "x"), "--adapter"]) == 2
    assert "--adapter: the base model: folder './base' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_the_card_says_of_serving(run: Path, tmp_path: Path) -> None:
    export_run(str(run), str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    serving = card.partition("## Serving")[2].partition("\n## ")[0]
    template = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    if run.name == "t5":
        assert template is None and "An encoder-decoder takes no chat" in serving and "qcrd-fast generate ." in serving
        assert not (tmp_path / "model" / "Modelfile").exists()
        return
    for tool in (
        "transformers serve .",
        "vllm serve .",
        "mlx_lm.server --model .",
        "convert_hf_to_gguf.py .",
        "ollama create",
    ):
        assert tool in serving, tool
    body = serving.partition("-d '")[2].partition("'\n")[0]
    assert json.loads(body)["max_tokens"] == 256 and json.loads(body)["temperature"] == 0
    assert (
        (tmp_path / "model" / "Modelfile")
        .read_text()
        .startswith('FROM .\nTEMPLATE """Question: predict: {{ .Prompt }}\nReply:"""')
    )
    student, _ = load_student(str(run), "cpu")
    assert tokens_sent(student.tokenizer, template, "2 + 3?") == student.source_ids(PREDICT, "2 + 3?")


def test_a_prompt_that_no_template_sends(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcrd_fast.export.chat_template", lambda *_: None)
    assert export_run(str(run), str(tmp_path / "model"))["chat_template"] == "none"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template is None  # rather none than another prompt
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "transformers serve ." not in card and ("No chat template gives" in card or run.name == "t5")
