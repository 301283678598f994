"""The log file of a run, and silence for the other processes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from qcrd_fast.utils.redact import RedactingFormatter


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Only errors are logged: for the processes beside the one that keeps the log."""
    logger = logging.getLogger("qcrd_fast")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Log(logging.FileHandler):
    """A log that a full disk does not end; where anything is lost by it, the run ends."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """The package's log lines go to a file too, without secrets."""
    logger = logging.getLogger("qcrd_fast")
    handler = _Log(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
