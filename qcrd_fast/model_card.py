"""The model card of an export: method, data, prompt, serving, figures with n, limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qcrd_fast.config import TEACHER_OPTIONS, USED, TrainConfig
from qcrd_fast.models.prompts import REASON
from qcrd_fast.models.student import Student
from qcrd_fast.utils.config_files import number
from qcrd_fast.utils.intervals import wilson
from qcrd_fast.version import __version__

CITATION = """@inproceedings{wang2025qcrd,
  title  = {QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models},
  author = {Wang and others},
  year   = {2025},
  note   = {EMNLP 2025; arXiv:2405.13014},
}"""
HYPER_PARAMETERS = (
    "scheme", "positive_select", "negative_select", "beta", "delta", "alpha_pred", "alpha_cl", "alpha_d",
    "alpha_d_decay",
    "negative_source", "negative_lag", "iteration_steps", "negative_temperature", "negative_top_k", "negative_top_p",
    "max_new_tokens", "discriminator", "discriminator_loss", "discriminator_learning_rate", "num_positives", "label",
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "warmup_ratio", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_source_length", "max_target_length",
    "bf16",
    "seed",
)  # fmt: skip


class Exported(NamedTuple):
    """What a card is about. `results` is empty if `eval_results.json` belongs to another checkpoint."""

    student: Student
    config: dict[str, Any]
    state: dict[str, Any]
    results: dict[str, Any]
    step: int
    adapter: str | None = None  # merged, alone: a LoRA adapter within the weights, or without its base model
    base: str = ""  # that base model, as it is named in adapter_config.json
    tasks: tuple[str, ...] = ()  # what a message may begin with
    served: bool = False  # whether the tokenizer has a chat template that sends the prompt
    ollama: bool = False  # whether there is a Modelfile
    hub_name: str | None = None


def model_card(exported: Exported) -> str:
    """README.md of an exported model."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    student, state, results = exported.student, exported.state, exported.results
    known = TrainConfig().to_dict() | exported.config
    known["discriminator"] = _name(known["discriminator"])
    base, method = _name(known.get("student")), str(state.get("method", known["method"]))
    on_hub = not Path(str(known.get("student"))).exists() and str(known.get("student")).count("/") == 1
    front: dict[str, Any] = {
        "library_name": "peft" if exported.adapter == "alone" else "transformers",
        "pipeline_tag": "text2text-generation" if student.is_encoder_decoder else "text-generation",
        "tags": ["qcrd-fast", "distillation", method, *(["lora"] if exported.adapter == "alone" else [])],
    } | ({"base_model": str(known["student"])} if on_hub else {})
    folder = exported.hub_name or "."
    environment = Environment(
        loader=PackageLoader("qcrd_fast", "."), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )  # not escaped: `_cell` leaves no markup in what comes from a run
    return environment.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        base=base,
        method=method,
        version=__version__,
        reasons=REASON in exported.tasks,
        step=exported.step,
        adapter=exported.adapter,
        adapter_base=exported.base,
        rank=known["lora_r"],
        fetch_base=_fetch(exported.base, folder),
        prompt=_prompt_text(student),
        usage=usage(student, exported.served, exported.adapter == "alone"),
        encoder_decoder=student.is_encoder_decoder,
        served=exported.served,
        modelfile=exported.ollama,
        folder=folder,
        task_words=" or ".join(f"`{task}`" for task in exported.tasks),
        max_tokens=student.prompts.max_target_length,
        data=_data_text(known, state, results),
        figures=_figures(results, known),
        settings="\n".join(
            f"| `{name}` | {_cell(known.get(name))} |"
            for name in dict.fromkeys((*HYPER_PARAMETERS, *TEACHER_OPTIONS, *USED.get(str(known.get("method")), ())))
            if known.get(name) is not None
        ),
        task=_cell(state.get("task")),
        citation=CITATION,
    )


def _fetch(base: str, folder: str) -> str:
    """Shell that puts the weights of an adapter's base model beside it; what describes the prompt stays the
    adapter's."""
    if os.path.isdir(base):
        return f"cp {base}/config.json {base}/*.safetensors* {folder}/"
    return f'hf download {base} --include config.json "*.safetensors*" --local-dir {folder}'


def usage(student: Student, served: bool = False, adapter: bool = False) -> str:
    """Code that gives `input_ids` exactly as in training, for `folder` and `question`, and an answer; `served`: the
    folder's tokenizer has a template of `chat_template`."""
    template, seq2seq = student.prompts.template, student.is_encoder_decoder
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    lines = [
        "import torch",
        f"from transformers import {auto}, AutoTokenizer{', GenerationConfig' if adapter else ''}",
        "",
        'folder, question = ".", "Tom has 3 bags of 4 nuts. How many nuts?"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder){'  # with its base model; needs peft' if adapter else ''}",
        'prompt = "predict: " + question.strip()  # or "explain: " for a rationale',
    ]
    if served:
        lines += [
            'chat = [{"role": "user", "content": prompt}]',
            "text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
            "input_ids = tokenizer(text, add_special_tokens=False).input_ids",
        ]
    elif template == "chat":  # the base model's, which the folder's tokenizer has not
        lines += [
            f'text = {student.chat_text("{prompt}")!r}.replace("{{prompt}}", prompt)',
            "input_ids = tokenizer(text, add_special_tokens=False).input_ids",
        ]
    else:
        text = (
            "prompt"
            if student.newline_apart or student.form == "{prompt}"
            else f'{student.form!r}.replace("{{prompt}}", prompt)'
        )
        lines.append(f"input_ids = tokenizer({text}).input_ids")
        if not seq2seq:
            lines += ["if input_ids[-1:] == [tokenizer.eos_token_id]:", "    input_ids.pop()"]
        if student.newline_apart:
            lines.append('input_ids += tokenizer("\\n", add_special_tokens=False).input_ids')
    if adapter:  # whose base model may have other settings
        lines.append("model.generation_config = GenerationConfig.from_pretrained(folder)")
    start = "" if seq2seq else "[len(input_ids):]"
    lines += [
        "output = model.generate(torch.tensor([input_ids]))[0]",
        f"answer = tokenizer.decode(output{start}, skip_special_tokens=True)",
    ]
    return "\n".join(lines) + "\n"


def _prompt_text(student: Student) -> str:
    template = student.prompts.template
    limit = f"Questions were cut at {student.prompts.max_source_length} tokens."
    if template == "chat":
        told = (
            f"The base model's chat template around `predict: ` (or `explain: `) + question, as one user turn. {limit}"
        )
        return told + (
            f" Before it stands the system message\n\n{_fence(student.prompts.system)}"
            if student.prompts.system
            else ""
        )
    if template != "raw":
        return (
            f"`{{prompt}}` is `predict: ` (or `explain: `) + question, in this template. {limit}\n\n{_fence(template)}"
        )
    newline = "" if student.is_encoder_decoder else " + a newline"
    return f"`predict: ` (or `explain: `) + question{newline}. {limit}"


def _data_text(config: dict[str, Any], state: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [f"- training rows: {_cell(_name(config.get('data')))}"]
    if "train_questions" in results:
        lines.append(f"- {results['train_questions']} training questions; {results.get('dropped_from_train', 0)} "
            f"dropped "
                     "because they stand in the evaluation sets")  # fmt: skip
    for name in ("eval_data", "test_data"):
        if config.get(name):
            lines.append(f"- {name.replace('_', ' ')}: {_cell(_name(config[name]))}")
    if state.get("data_sha256"):
        lines.append(f"- sha256 of all rows as they were read: `{state['data_sha256']}`")
    return "\n".join(lines)


def _figures(results: dict[str, Any], config: dict[str, Any]) -> str:
    accuracy, n = _share(results.get("accuracy")), results.get("n")
    if accuracy is None or type(n) is not int or not 0 < n < 2**53:
        return (
            "Not evaluated: this is not the checkpoint that the run evaluated at its end, "
            "or it had nothing to evaluate on."
        )
    low, high = wilson(accuracy, n)
    if results.get("evaluated_on") == "test":
        where = f"test: {_cell(_name(config.get('test_data')))}"
    else:
        where = "validation, on which this checkpoint was also chosen"
    rows = [f"| accuracy, greedy ({where}) | {accuracy:.4f} | {n} | {low:.4f} to {high:.4f} |"]
    for name, text in (
        ("accuracy_untrained", "the same, before training"),
        ("accuracy_zero_shot", "the same, before training, asked in words by its chat template"),
        ("accuracy_validation", "validation, best checkpoint"),
    ):
        if (value := _share(results.get(name))) is not None:
            same = name != "accuracy_validation"
            asked = results.get("n_zero_shot") if name == "accuracy_zero_shot" else None
            asked = asked if type(asked) is int and 0 < asked <= n else n
            low, high = wilson(value, asked)
            span = f"{asked} | {low:.4f} to {high:.4f}" if same else "| "
            rows.append(f"| {text} | {value:.4f} | {span} |")
    return "| figure | value | n | 95% interval (Wilson) |\n|---|---|---|---|\n" + "\n".join(rows)


def _share(value: Any) -> float | None:
    """A number from 0 to 1, or None."""
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def _name(path: Any) -> str:
    """A hub id as it is; of a local path its last part alone."""
    text = str(path)
    return Path(text).name if os.path.isabs(text) or os.path.exists(text) or text.count("/") != 1 else text


def _cell(value: Any) -> str:
    """A value in a Markdown table or line: one line, no markup of its own."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|").replace("<", "&lt;")
    return f"`{text}`" if isinstance(value, str) and "&lt;" not in text else text


def _fence(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
