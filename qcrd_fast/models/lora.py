"""LoRA for `train` (`--use-peft`): PEFT adapters beside every linear layer except the head, in place.

A checkpoint holds the merged model, which `from_pretrained` reads as any other, and the matrices by themselves in
`lora.safetensors`: a resume puts them beside the student that the run began with, and goes on bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError

ADAPTER = "lora.safetensors"
MARK = ".lora_"  # in the name of each of its weights


def require_peft() -> None:
    """Raises `InputError` where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("--use-peft needs PEFT: pip install 'qcrd-fast[peft]'")


def add_lora(model: Any, config: TrainConfig) -> None:
    """Freeze the model and add LoRA matrices to its linear layers, seeded."""
    require_peft()
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=find_target_modules(model, config.lora_target_modules),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        get_peft_model(model, settings)


def find_target_modules(model: Any, wanted: str) -> str | list[str]:
    """Resolve `--lora-target-modules` for PEFT.

    Raises `InputError` for a name that is not a linear layer, and for the head: the loss reads its weight.
    """
    if wanted == "all-linear":
        return wanted
    head = model.get_output_embeddings()
    layers = {name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names or [wanted]:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            known = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
            raise InputError(
                f"--lora-target-modules: no linear layer of the student is called {name!r}; there are: {known}"
            )
    return names


def save_model(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """`save_pretrained`; with LoRA the merged weights, with the matrices beside them.

    `weights`: the full state dict of a sharded model.
    """
    weights = model.state_dict() if weights is None else weights
    adapter = {name: tensor for name, tensor in weights.items() if MARK in name}
    if not adapter:
        model.save_pretrained(folder, state_dict=weights)
        return
    model.save_pretrained(folder, state_dict=merged(model, weights))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}, folder / ADAPTER)


@torch.no_grad()
def merged(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights with each low-rank product added, under the names that they have without LoRA."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if MARK not in name}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight"):
            plain[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    return plain


def load_adapter(folder: Path, model: Any) -> None:
    """Load a checkpoint's matrices into a model after `add_lora`. Raises `InputError` for other settings."""
    saved, own = load_file(folder / ADAPTER), {n: t for n, t in model.state_dict().items() if MARK in n}
    wrong = [
        n for n in sorted(saved.keys() | own.keys()) if n not in saved or n not in own or saved[n].shape != own[n].shape
    ]
    if wrong:
        raise InputError(f"--use-peft: {folder / ADAPTER} does not fit this student and --lora-r, e.g. {wrong[0]}")
    model.load_state_dict(saved, strict=False)


def base_name(student: str) -> str:
    """How an adapter names its base model: a hub id, or a folder by its whole path."""
    return os.path.abspath(student) if os.path.isdir(student) else student


def count_parameters(checkpoint: Path) -> int:
    """Of a checkpoint's matrices."""
    return sum(tensor.numel() for tensor in load_file(checkpoint / ADAPTER).values())


def write_adapter(checkpoint: Path, folder: Path, base: str, config: dict[str, Any], model: Any) -> None:
    """Write a checkpoint's matrices in PEFT's format.

    Files: adapter_config.json and adapter_model.safetensors, for the base model `base` of `model`'s architecture.
    """
    require_peft()
    from peft import LoraConfig

    saved = load_file(checkpoint / ADAPTER)
    layers = {name.partition(MARK)[0] for name in saved}
    kinds = {layer.rpartition(".")[2] for layer in layers}
    of_kinds = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds}
    settings = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=base,
        r=next(tensor.shape[0] for name, tensor in saved.items() if ".lora_A." in name),
        lora_alpha=config.get("lora_alpha", TrainConfig.lora_alpha),
        lora_dropout=config.get("lora_dropout", TrainConfig.lora_dropout),
        target_modules=sorted(kinds if of_kinds == layers else layers),
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in saved.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
