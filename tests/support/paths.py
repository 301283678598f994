"""Where things are in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
DATA = Path(os.environ.get("QCRD_FAST_DATA") or ROOT.parent / "shared" / "data")  # published teacher data
