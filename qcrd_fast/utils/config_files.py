"""Read JSON and YAML files as mappings of plain values, written by a run or by a user."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from qcrd_fast.errors import InputError


def is_plain(path: Path) -> bool:
    """Return whether `path` is a regular file: no symlink (it may leave the run), no pipe (it may never end)."""
    return path.is_file() and not path.is_symlink()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if is_plain(path) else None
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_options(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file that a run wrote; empty where there is none, or it cannot be read."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if is_plain(path) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue  # a list or a mapping, which is refused as one
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """The mapping in a user's YAML file; tags that would build Python objects are refused, never run.

    Raises `InputError` naming the file, and the line where there is one.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise InputError(f"{where}: {error.problem}; only plain YAML values are read") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path}: not readable as YAML: {reason[0]}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of options, got {type(values).__name__}")
    return values


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
