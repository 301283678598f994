"""The command qcrd-fast, also as `python -m qcrd_fast`: quiet on Ctrl-C from its first moment on."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from types import FrameType


def _leave(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"qcrd-fast: interrupted\n")
    os._exit(128 + signum)


def _end(codes: list[int]) -> None:
    """End the process before the interpreter is torn down.

    FSDP2's caches keep gloo's threads alive beyond `destroy_process_group`. One of them that is late in dropping a
    tensor asks for the GIL of an interpreter that has gone, and the process, which had succeeded, dies by SIGABRT.
    """
    if codes:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(codes[0])


def main() -> int:
    """Run the command; return its exit code. Ctrl-C during imports ends the process without a traceback."""
    codes: list[int] = []
    if "WORLD_SIZE" in os.environ:  # torchrun's
        atexit.register(_end, codes)  # the first to be registered is the last to be called
    before = signal.signal(signal.SIGINT, _leave)
    from qcrd_fast.cli.main import entry

    signal.signal(signal.SIGINT, before)
    codes.append(entry())
    return codes[0]


if __name__ == "__main__":
    sys.exit(main())
