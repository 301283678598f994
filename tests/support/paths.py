"""Where things are in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
DATA = Path(os.environ.get("QCRD_FAST_DATA") or ROOT.parent / "shared" / "data")  # published teacher data
PACKAGES = ("csrc_triton", "qcrd_fast", "bench", "cli")


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module that is shipped."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found
