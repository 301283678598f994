"""`export`: a run's model as a folder that `from_pretrained` reads, with generation settings and a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.models.loading import save_tokenizer
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.runs.checkpoints import require_whole, step_of
from qcrd_fast.runs.folder import CONFIG, MANIFEST, RESULTS, STATE
from qcrd_fast.runs.load import find_model, load_student
from qcrd_fast.sweep.intervals import wilson
from qcrd_fast.utils.config_files import number, read_object, read_options
from qcrd_fast.utils.files import remove_tree, require_writable, write_json, write_text
from qcrd_fast.version import __version__

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CITATION = """@inproceedings{wang2025qcrd,
  title  = {QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models},
  author = {Wang and others},
  year   = {2025},
  note   = {EMNLP 2025; arXiv:2405.13014},
}"""
HYPER_PARAMETERS = (
    "scheme", "positive_select", "negative_select", "beta", "delta", "alpha_pred", "alpha_cl", "alpha_d", "alpha_d_decay",
    "negative_source", "negative_lag", "iteration_steps", "negative_temperature", "negative_top_k", "negative_top_p",
    "max_new_tokens", "discriminator", "discriminator_loss", "discriminator_learning_rate", "num_positives", "label",
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "warmup_ratio", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_source_length", "max_target_length", "bf16",
    "seed",
)  # fmt: skip


def export_run(run: str, output: str, *, checkpoint: str | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Write the model of `run` (its final checkpoint, or `checkpoint`, a name or path within the run) to the new folder
    `output`.

    A LoRA adapter is merged into its base model. Returns what was, or with `dry_run` would be, written. Raises `InputError`
    for a run without a whole checkpoint, or an `output` that is not empty; `RunError` when writing fails, and leaves nothing
    behind.
    """
    folder, target = _source(run, checkpoint), Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output: {output} is not an empty folder; choose another")
    require_writable(target.parent, "--output")
    student, state, merged = _load(folder)
    config = read_options(Path(run) / CONFIG) or state.get("config", {})
    results = read_object(Path(run) / RESULTS) if _is_final(Path(run), folder) else {}
    card = model_card(student, config, state, results, step_of(folder.resolve()), merged)
    summary = {
        "model": str(folder.resolve()),
        "output": output,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "adapter_merged": merged,
        "accuracy": results.get("accuracy"),
        "n": results.get("n"),
    }
    if dry_run:
        return summary
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        student.model.generation_config = _generation_config(student)
        student.model.save_pretrained(temporary)
        save_tokenizer(student.tokenizer, temporary)
        write_json(temporary / STATE, {"prompt": state["prompt"], "task": state.get("task"), "method": state.get("method")})
        write_text(temporary / "README.md", card)
        for weights in temporary.glob("*.safetensors"):  # written for their owner alone, and a server may be another user
            weights.chmod((temporary / "README.md").stat().st_mode)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        raise RunError(f"cannot write {output}: {getattr(error, 'strerror', None) or error} ({free} bytes free)") from error
    finally:
        remove_tree(temporary)
    return summary | {"files": sorted(p.name for p in target.iterdir())}


def _source(run: str, checkpoint: str | None) -> Path:
    """The checkpoint folder to export."""
    if checkpoint is not None:
        found = next((p for p in (Path(run) / checkpoint, Path(checkpoint)) if (p / MANIFEST).is_file()), None)
        if found is None or found.resolve().parent != Path(run).resolve():
            raise InputError(f"--checkpoint: {run} has no whole checkpoint {checkpoint!r}")
        return found
    if not Path(run).is_dir():
        raise InputError(f"{run}: no such run folder")
    folder = Path(find_model(run))
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{run} is not a run folder with a checkpoint: {folder / MANIFEST} is missing")
    return folder


def _is_final(run: Path, folder: Path) -> bool:
    """Whether `eval_results.json` speaks of this checkpoint."""
    return (run / "final").exists() and (run / "final").resolve() == folder.resolve()


def _load(folder: Path) -> tuple[Student, dict[str, Any], bool]:
    """(student, its state, whether an adapter was merged) of a checkpoint."""
    if not (folder / ADAPTER).is_file():
        return *load_student(str(folder), "cpu"), False
    require_whole(folder)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder} holds a LoRA adapter; merging it needs peft: pip install peft") from error
    base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{folder / ADAPTER} does not name its base model")
    state = read_object(folder / STATE)
    try:
        prompts = PromptSettings(**state["prompt"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE}: no readable prompt: {error}") from error
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder}: {ADAPTER_WEIGHTS} is needed; a pickle is never loaded")
    student = Student.load(base, prompts)
    try:
        model = PeftModel.from_pretrained(student.model, str(folder))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an adapter of anybody's can make a library raise
        raise InputError(f"{folder}: the adapter does not fit {base!r}: {' '.join(str(error).split())[:300]}") from error
    _check_adapter(model, folder)
    student.model = model.merge_and_unload()
    return student, state, True


def _check_adapter(model: Any, folder: Path) -> None:
    """Raises `InputError` unless the adapter's file holds the LoRA matrices that its configuration asks for, and no others."""
    from peft import get_peft_model_state_dict

    wanted = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in name}
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        held = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (no mapping)
    if differing := sorted(wanted ^ held):
        what = "lacks" if differing[0] in wanted else "has, and its configuration does not ask for,"
        raise InputError(f"{folder}: the adapter {what} {differing[0]} ({len(differing)} such tensors)")


def _generation_config(student: Student) -> GenerationConfig:
    """Greedy, as the accuracy was measured, with this model's own special tokens."""
    model, tokenizer = student.model, student.tokenizer
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=student.prompts.max_target_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )


# ---- the card ----


def model_card(
    student: Student, config: dict[str, Any], state: dict[str, Any], results: dict[str, Any], step: int, merged: bool
) -> str:
    """README.md of an exported model: method, data and counts, the exact prompt, settings, figures with n, limits, citation."""
    known = TrainConfig().to_dict() | config
    known["discriminator"] = _name(known["discriminator"])
    base, method = _name(known.get("student")), str(state.get("method", known["method"]))
    kind = "text2text-generation" if student.is_encoder_decoder else "text-generation"
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": kind,
        "tags": ["qcrd-fast", "distillation", method],
    }
    if not Path(str(known.get("student"))).exists() and str(known.get("student")).count("/") == 1:
        front["base_model"] = str(known["student"])
    settings = [f"| `{name}` | {_cell(known.get(name))} |" for name in HYPER_PARAMETERS if known.get(name) is not None]
    sections = [
        f"# {base}, distilled with {method}",
        f"`{base}` trained by qcrd-fast {__version__} with `--method {method}` on a teacher's rationales: prompted with "
        f"`predict: ` it answers, with `explain: ` it gives a rationale. These are the weights of step {step}"
        + (", the LoRA adapter merged into them." if merged else "."),
        "## Prompt",
        _prompt_text(student),
        f"```python\n{usage(student)}```",
        "## Training data",
        _data_text(known, state, results),
        "## Figures",
        _figures(results, known),
        "## Settings",
        "| option | value |\n|---|---|\n" + "\n".join(settings),
        "## Limitations",
        "- The teacher's rationales were split into right and wrong by a vote among its samples, which can be wrong; a mistake "
        "that the teacher makes consistently is taught.\n"
        "- A rationale is generated apart from the answer: it need not lead to it, and is no proof of it.\n"
        f"- Trained and measured on the data named above alone ({_cell(state.get('task'))} answers).\n"
        "- The limits and biases of the base model and of the teacher carry over; see their own cards and licences.",
        "## Citation",
        f"The method is that of [arXiv 2405.13014](https://arxiv.org/abs/2405.13014):\n\n```bibtex\n{CITATION}\n```",
    ]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def usage(student: Student) -> str:
    """Code that gives `input_ids` exactly as in training, for `folder` and `question`, and an answer."""
    template, seq2seq = student.prompts.template, student.is_encoder_decoder
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    lines = [
        "import torch",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder, question = ".", "Tom has 3 bags of 4 nuts. How many nuts?"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder)",
        'prompt = "predict: " + question.strip()  # or "explain: " for a rationale',
    ]
    if template == "chat":
        lines += [
            'chat = [{"role": "user", "content": prompt}]',
            "text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
            "input_ids = tokenizer(text, add_special_tokens=False).input_ids",
        ]
    else:
        text = "prompt" if template == "raw" else f'{template!r}.replace("{{prompt}}", prompt)'
        lines.append(f"input_ids = tokenizer({text}).input_ids")
        if not seq2seq:
            lines += ["if input_ids[-1:] == [tokenizer.eos_token_id]:", "    input_ids.pop()"]
            if template == "raw":
                lines.append('input_ids += tokenizer("\\n", add_special_tokens=False).input_ids')
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
        return f"The tokenizer's chat template around `predict: ` (or `explain: `) + question, as one user turn. {limit}"
    if template != "raw":
        return f"`{{prompt}}` is `predict: ` (or `explain: `) + question, in this template. {limit}\n\n{_fence(template)}"
    newline = "" if student.is_encoder_decoder else " + a newline, tokenised apart"
    return f"`predict: ` (or `explain: `) + question{newline}. {limit}"


def _data_text(config: dict[str, Any], state: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [f"- training rows: {_cell(_name(config.get('data')))}"]
    if "train_questions" in results:
        lines.append(f"- {results['train_questions']} training questions; {results.get('dropped_from_train', 0)} dropped "
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
        return "Not evaluated: this is not the checkpoint that the run evaluated at its end, or it had nothing to evaluate on."
    low, high = wilson(accuracy, n)
    if results.get("evaluated_on") == "test":
        where = f"test: {_cell(_name(config.get('test_data')))}"
    else:
        where = "validation, on which this checkpoint was also chosen"
    rows = [f"| accuracy, greedy ({where}) | {accuracy:.4f} | {n} | {low:.4f} to {high:.4f} |"]
    for name, text in (
        ("accuracy_untrained", "the same, before training"),
        ("accuracy_validation", "validation, best checkpoint"),
    ):
        if (value := _share(results.get(name))) is not None:
            same = name == "accuracy_untrained"
            low, high = wilson(value, n)
            span = f"{n} | {low:.4f} to {high:.4f}" if same else "| "
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
