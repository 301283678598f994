"""The folder of an active run: every file name once. Each file is there whole or not at all. Imports no torch.

active.resolved.yaml  ledger.jsonl  eval_results.json  predictions.jsonl  run.log
round-000/            round.json predictions.jsonl      <- the initial student
round-001/            explanations.jsonl picked.json asked.json revisions.jsonl train.jsonl train/ predictions.jsonl
round.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import LOG, PREDICTIONS, RESULTS
from qcrd_fast.utils.files import read_records

CONFIG, LEDGER, ROUND = "active.resolved.yaml", "ledger.jsonl", "round.json"
EXPLANATIONS, PICKED, ASKED, REVISIONS = "explanations.jsonl", "picked.json", "asked.json", "revisions.jsonl"
ROWS, TRAIN = "train.jsonl", "train"
__all__ = [
    "ASKED", "CONFIG", "EXPLANATIONS", "LEDGER", "LOG", "PICKED", "PREDICTIONS", "RESULTS", "REVISIONS", "ROUND",
    "ROWS",
    "TRAIN", "read_json", "read_jsonl", "round_path",
]  # fmt: skip


def round_path(run: Path, round: int) -> Path:
    return run / f"round-{round:03d}"


def read_json(path: Path) -> Any:
    """What `write_json` wrote, or None where there is no such file. Raises `InputError` for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is unreadable: {error}; delete it, and what it holds is made again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]] | None:
    """What `write_lines` wrote, or None where there is no such file. Raises `InputError` for a damaged one."""
    try:
        return list(read_records(path, "raise"))
    except FileNotFoundError:
        return None
    except (OSError, InputError) as error:
        raise InputError(f"{path} is unreadable: {error}; delete it, and what it holds is made again") from error
