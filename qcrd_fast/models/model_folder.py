"""Check a model name or folder before loading: presence, safetensors, size. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcrd_fast.errors import InputError
from qcrd_fast.utils.network import is_online

WEIGHTS = (".safetensors", ".safetensors.index.json")
# one of them is in the name of one of its files
_TOKENIZER = ("token", "vocab", "spiece", "sentencepiece", "merges", "tekken")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_LONGEST_HEADER = 1 << 26  # bytes


def check_model_name(name_or_path: str, option: str) -> None:
    """Raises `InputError`, naming `option`, for a path without a model, weights that are no safetensors, and an index
    that names files of another folder, for a folder where something is missing, and for a name of the hub where that
    cannot be reached and nothing of it is cached. A name such as `runs/one` is a path where the folder `runs` is here,
    else one of the hub."""
    folder = Path(name_or_path)
    if os.path.isfile(folder):
        raise InputError(
            f"{option}: {name_or_path!r} is a file; name the folder with config.json and model.safetensors"
        )
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if (is_path or os.path.isdir(os.path.dirname(name_or_path))) and not os.path.exists(folder):
        raise InputError(f"{option}: folder {name_or_path!r} does not exist")
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{option}: {name_or_path!r} holds no config.json, so it is not a Hugging Face model folder"
            )
        _check_folder(folder, option)
    elif not is_online() and not _is_cached(name_or_path):
        raise InputError(
            f"{option}: cannot load {name_or_path!r}: there is no such folder here, the hub cannot be reached (no "
            "network?), and nothing of that name is in the cache"
        )


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def count_parameters(folder: Path) -> int | None:
    """Return the number of parameters in a folder's safetensors headers; None if unreadable."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        index, shards = folder / "model.safetensors.index.json", {"model.safetensors"}
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sum(math.prod(shape) for name in shards for shape in _shapes(folder / name))
    return None


def _shapes(path: Path) -> Iterator[list[int]]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LONGEST_HEADER:
            raise ValueError(f"a header of {size} bytes")
        header: dict[str, Any] = json.loads(file.read(size))
    yield from (entry["shape"] for name, entry in header.items() if name != "__metadata__")


def _check_folder(folder: Path, option: str) -> None:
    """Weights are there as safetensors, and an index names files of this folder alone."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        raise InputError(f"{option}: {str(folder)!r} holds an adapter; merge it into its base model first")
    if not any(name.endswith(WEIGHTS) for name in names):
        pickled = sorted(name for name in names if name.endswith(_PICKLED))
        if pickled:
            raise InputError(
                f"{option}: {str(folder)!r} has its weights in {pickled[0]}, a pickle, which is never loaded; convert "
                "them to safetensors"
            )
    for index in sorted(name for name in names if name.endswith(".index.json")):
        try:
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            wrong = sorted({str(s) for s in shards if not isinstance(s, str) or os.path.basename(s) != s or s == ".."})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{option}: {folder / index} is unreadable: {error}") from error
        if wrong:
            raise InputError(f"{option}: {folder / index} names {wrong[0]!r}, which is not a file of this folder")
    if not any(name.endswith(WEIGHTS) for name in names):
        raise InputError(f"{option}: {str(folder)!r} holds no weights, such as model.safetensors")
    if not any(part in name.lower() for part in _TOKENIZER for name in names):
        raise InputError(f"{option}: {str(folder)!r} holds no tokenizer, such as tokenizer.json")
    try:
        if not isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{option}: {folder / 'config.json'} is unreadable: {error}") from error
