"""SIGINT and SIGTERM: the first one asks the loop to finish its step and save, the second ends the process."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from qcrd_fast.utils.torchrun import world_size

log = logging.getLogger(__name__)
# within this time a second signal may be the first one, which torchrun passed on to those who had it already
PASSED_ON_S = 2.0


class StopSignals:
    """Within this context `signum` is 0 until a signal came. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.signum = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            if world_size() > 1 and time.monotonic() - self._at < PASSED_ON_S:
                return
            raise SystemExit(128 + signum)
        self.signum, self._at = signum, time.monotonic()
        log.warning("signal %d: finishing the step and saving; a second one ends the run at once", signum)
