"""The command qcrd-fast, also as `python -m qcrd_fast`: quiet on Ctrl-C from its first moment on."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"qcrd-fast: interrupted\n")
    os._exit(128 + signum)


def main() -> int:
    """Run the command; return its exit code. Ctrl-C during imports ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, _leave)
    from qcrd_fast.cli.main import entry

    signal.signal(signal.SIGINT, before)
    return entry()


if __name__ == "__main__":
    sys.exit(main())
