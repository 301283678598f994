"""`export`: a run's model or LoRA adapter as a Hugging Face folder with chat template and model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig

from qcrd_fast import hub
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.model_card import Exported, model_card, usage
from qcrd_fast.models import lora
from qcrd_fast.models.chat_template import chat_template, modelfile
from qcrd_fast.models.loading import save_tokenizer
from qcrd_fast.models.model_folder import check_model_name
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, REASON
from qcrd_fast.models.student import Student
from qcrd_fast.runs.checkpoints import step_of
from qcrd_fast.runs.folder import CONFIG, MANIFEST, RESULTS, STATE
from qcrd_fast.runs.load import ADAPTER, find_model, load_student
from qcrd_fast.utils.config_files import read_object, read_options
from qcrd_fast.utils.files import remove_tree, require_writable, write_json, write_text

__all__ = ["export_run", "usage"]
MODELFILE = "Modelfile"


def export_run(
    run: str,
    output: str,
    *,
    checkpoint: str | None = None,
    adapter: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write a run's model to the new folder `output`, and upload it to `push_to_hub` if given.

    Takes the final checkpoint or `checkpoint`, a name or path within the run. The repository is private unless
    `public`.

    A LoRA adapter is merged into its base model; with `adapter` it is written alone. Returns what was, or with
    `dry_run` would be, written. Raises `InputError` for a run without a whole checkpoint, an `output` that is not
    empty, or a repository that cannot be written to; `RunError` when writing fails, which leaves nothing behind, or
    when the upload does, which leaves `output`.
    """
    folder, target = _source(run, checkpoint), Path(output)
    _check_target(target)
    if public and push_to_hub is None:
        raise InputError("--public is for --push-to-hub")
    config = read_options(Path(run) / CONFIG)
    if adapter:
        _check_alone(folder, config, push_to_hub)
    repository = hub.writable_repository(push_to_hub, public=public) if push_to_hub is not None else None
    student, state = load_student(str(folder), "cpu")
    config = config or state.get("config", {})
    tasks = (PREDICT, EXPLAIN, *([REASON] if config.get("reasoning_task") is True else []))
    template = chat_template(student, tasks)
    ollama = modelfile(student, PREDICT) if template else None
    results = read_object(Path(run) / RESULTS) if _is_final(Path(run), folder) else {}
    merged = (folder / ADAPTER).is_file() or (folder / lora.ADAPTER).is_file()
    exported = Exported(
        student,
        config,
        state,
        results,
        step_of(folder.resolve()),
        adapter="alone" if adapter else "merged" if merged else None,
        base=lora.base_name(str(config.get("student"))) if adapter else "",
        tasks=tasks,
        served=template is not None,
        ollama=ollama is not None,
        hub_name=repository,
    )
    summary = {
        "model": str(folder.resolve()),
        "output": output,
        "parameters": lora.count_parameters(folder) if adapter else sum(p.numel() for p in student.model.parameters()),
        "adapter_merged": merged and not adapter,
        "chat_template": "sends the prompt of training" if template else "none",
        "accuracy": results.get("accuracy"),
        "n": results.get("n"),
    } | ({"repository": repository, "public": public} if repository else {})
    card = model_card(exported)
    if dry_run:
        return summary
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        if adapter:
            lora.write_adapter(folder, temporary, exported.base, config, student.model)
            _generation_config(student).save_pretrained(temporary)
        else:
            _save_model(student, temporary)
        student.tokenizer.chat_template = template
        save_tokenizer(student.tokenizer, temporary)
        told = {"prompt": state["prompt"], "task": state.get("task"), "method": state.get("method")}
        write_json(temporary / STATE, told | {"reasoning_task": REASON in tasks})
        write_text(temporary / "README.md", card)
        if ollama and not adapter:
            write_text(temporary / MODELFILE, ollama)
        # written for their owner alone, and a server may be another user
        for weights in temporary.glob("*.safetensors"):
            weights.chmod((temporary / "README.md").stat().st_mode)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        raise RunError(
            f"cannot write {output}: {getattr(error, 'strerror', None) or error} ({free} bytes free)"
        ) from error
    finally:
        remove_tree(temporary)
    if repository is not None:
        summary["url"] = hub.push(target, repository, public=public)
    return summary | {"files": sorted(p.name for p in target.iterdir())}


def _check_target(target: Path) -> None:
    """Raises `InputError` unless a new folder can be put there."""
    if "\0" in str(target) or len(os.fsencode(target.name)) > 200:  # a temporary one has a longer name
        raise InputError(f"--output: {str(target)[:80]!r} is no name of a folder, or too long a one")
    if target.is_symlink():
        raise InputError(f"--output: {target} is a link; choose another")
    if not target.name or target.resolve() == Path.cwd():
        raise InputError(f"--output: {target} is the current folder; name one within it, or call from another")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output: {target} is not an empty folder; choose another")
    if (target.parent / MANIFEST).is_file():
        raise InputError(f"--output: {target.parent} is a checkpoint, which training deletes; choose another folder")
    require_writable(target.parent, "--output")


def _save_model(student: Student, folder: Path) -> None:
    """Save the model with its generation settings; its configuration, which some servers read, gets the same tokens."""
    model = student.model
    model.generation_config = _generation_config(student)
    if not student.is_encoder_decoder:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(model.generation_config, name))
    model.save_pretrained(folder)


def _source(run: str, checkpoint: str | None) -> Path:
    """The checkpoint folder to export."""
    if checkpoint is not None:
        found = next((p for p in (Path(run) / checkpoint, Path(checkpoint)) if (p / MANIFEST).is_file()), None)
        if found is None or found.resolve().parent != Path(run).resolve():
            raise InputError(f"--checkpoint: {run} has no intact checkpoint {checkpoint!r}")
        return found
    if not Path(run).is_dir():
        raise InputError(f"{run}: no such run folder")
    folder = Path(find_model(run))
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{run} is not a run folder with a checkpoint: {folder / MANIFEST} is missing")
    return folder


def _is_final(run: Path, folder: Path) -> bool:
    """Return whether `eval_results.json` belongs to this checkpoint."""
    return (run / "final").exists() and (run / "final").resolve() == folder.resolve()


def _check_alone(folder: Path, config: dict[str, Any], push_to_hub: str | None) -> None:
    """Raise `InputError` for a checkpoint without an adapter, or with a base model that others cannot load."""
    if not (folder / lora.ADAPTER).is_file():
        raise InputError(f"--adapter: {folder} has no {lora.ADAPTER}; it takes a run of train --use-peft")
    student = config.get("student")
    if not isinstance(student, str):
        raise InputError(f"--adapter: the run does not say which base model its adapter is for ({CONFIG})")
    check_model_name(student, "--adapter: the base model")  # a path may be relative to where training began
    if push_to_hub is not None and os.path.exists(student):
        raise InputError(
            f"--adapter: the base model {student} is a folder of this machine, which others cannot load; push the "
            "merged model, without --adapter"
        )


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
