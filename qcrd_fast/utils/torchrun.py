"""The environment that torchrun sets. Imports no torch."""

from __future__ import annotations

import os

from qcrd_fast.errors import InputError


def world_size() -> int:
    """Return the number of processes that torchrun started, else 1. Raises `InputError` if WORLD_SIZE is invalid."""
    return _read("WORLD_SIZE", 1, 1)


def rank() -> int:
    """This process's number among them, from 0. Raises `InputError` where RANK is no such number."""
    size = world_size()
    number = _read("RANK", 0, 0) if size > 1 else 0
    if number >= size:
        raise InputError(f"RANK: expected a whole number below WORLD_SIZE {size}, got {number}")
    return number


def only_process(what: str) -> None:
    """Raise `InputError` under torchrun: `what` runs in one process."""
    if world_size() > 1:
        raise InputError(f"{what} runs in one process; start it without torchrun (WORLD_SIZE is {world_size()})")


def _read(name: str, default: int, low: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or int(text) < low:
        raise InputError(f"{name}: expected a whole number from {low}, got {text!r}")
    return int(text)
