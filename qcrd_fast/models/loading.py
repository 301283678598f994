"""Load untrusted models: configuration, tokenizer and safetensors of one folder; never code.

What would reach for a pickle, another folder or somebody's code is refused before any weight is loaded, and weights
that the configuration does not describe after that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from qcrd_fast.errors import InputError
from qcrd_fast.models.model_folder import WEIGHTS, check_model_name
from qcrd_fast.utils.network import is_online


def read_config(name_or_path: str, option: str) -> Any:
    """The checked configuration of a local folder or hub id.

    Raises `InputError`, naming `option`, for a path without a model, weights that are no safetensors, names that lead
    out of the folder, and a configuration that asks for code.
    """
    check_model_name(name_or_path, option)
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=_only_local(name_or_path)
        )
    except Exception as error:  # whatever a configuration of anybody's can make a library raise
        raise _cannot_load(name_or_path, option, error) from error
    _check_config(config, name_or_path, option)
    return config


def load_pretrained(
    name_or_path: str, option: str, choose: Callable[[Any], Any], *, whole: bool = True, **settings: Any
) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a folder or hub id. `choose` maps the configuration to the model class.

    Raises `InputError` as `read_config` does, and for what cannot be loaded or, with `whole`, does not fit: both shapes
    of a weight that has another than the configuration says, names of weights that it lacks or has too many of.
    """
    config = read_config(name_or_path, option)
    local = _only_local(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, local_files_only=local)
        model, info = choose(config).from_pretrained(
            name_or_path,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # so that they can be named
            output_loading_info=True,
            **settings,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _cannot_load(name_or_path, option, error) from error
    _check_loaded(model, info, name_or_path, option, whole)
    return model, tokenizer


def _only_local(name: str) -> bool:
    """Return whether to read only the folder or the cache, without retries for an unreachable hub."""
    return os.path.isdir(name) or not is_online()


def _check_loaded(model: Any, info: Any, name: str, option: str, whole: bool) -> None:
    says = f"{option}: {name!r}: config.json describes a {type(model).__name__}"
    if info["mismatched_keys"]:
        weight, found, wanted = min(info["mismatched_keys"], key=str)
        raise InputError(
            f"{says} with {weight} of shape {tuple(wanted)}, but in the weights it is {tuple(found)} "
            f"({len(info['mismatched_keys'])} such weights)"
        )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if whole and missing:
        others = f", but hold {unexpected[0]}" if unexpected else ""
        raise InputError(f"{says}; the weights lack {len(missing)} of its tensors, such as {missing[0]}{others}")
    places, there = ({of(name) for name in model.state_dict()} for of in (_place, _layer))
    layers = [name for name in unexpected if _place(name) in places and _layer(name) not in there]
    if whole and layers and not getattr(model.config, "num_nextn_predict_layers", 0):  # which are only for drafting
        raise InputError(
            f"{says} of fewer layers than the weights: it has no place for {len(layers)}, such as {layers[0]}"
        )


def _place(name: str) -> str:
    """Return a weight's name without its layer number."""
    return re.sub(r"\.\d+\.", ".#.", name)


def _layer(name: str) -> str:
    """The layer that a weight is in, such as model.layers.3; empty where it is in none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def _cannot_load(name: str, option: str, error: Exception) -> InputError:
    reason = " ".join(str(error).partition("Model type should be one of")[0].split())[:300] or type(error).__name__
    nowhere = (
        "" if os.path.exists(name) or "/" not in name else "there is no such folder here, and as a model of the hub: "
    )
    return InputError(f"{option}: cannot load {name!r} (safetensors weights are needed): {nowhere}{reason}")


def _check_config(config: Any, name: str, option: str) -> None:
    for key, value in _strings(
        config.to_dict() | {"attn_implementation": getattr(config, "_attn_implementation", None)}
    ):
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in value:
            raise InputError(f"{option}: {name!r} asks for code from the hub ({key} {value!r}), which is never run")
        if key == "transformers_weights" and not (os.path.basename(value) == value and value.endswith(WEIGHTS)):
            raise InputError(
                f"{option}: {name!r} has its weights in {value!r}; safetensors of its own folder are needed"
            )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) of every text in a nested value."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from _strings(item, f"{inner}" if not key.endswith("_implementation") else key)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """`save_pretrained` that raises `OSError` for a full disk, where tokenizers raises a bare `Exception`."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(str(error)) from error
