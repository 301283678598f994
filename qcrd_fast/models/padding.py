"""Padding of token ids into batches. Shapes: B rows, L padded length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcrd_fast.models.prompts import TokenIds


def pad_right(rows: Sequence[TokenIds], fill: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] padded on the right with `fill`, and the mask [B, L] (1: token), int64 on `device`."""
    length = max(map(len, rows), default=0)
    ids = [list(row) + [fill] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return _matrix(ids, length, device), _matrix(mask, length, device)


def pad_left(rows: Sequence[TokenIds], fill: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """As `pad_right`, with the padding on the left, where `generate` wants it."""
    length = max(map(len, rows), default=0)
    ids = [[fill] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return _matrix(ids, length, device), _matrix(mask, length, device)


def _matrix(rows: list[list[int]], length: int, device: torch.device | str | None) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), length)
