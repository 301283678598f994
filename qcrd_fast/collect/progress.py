"""Progress of a collection: samples, ETA, cost; log lines, or one line in place on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcrd_fast.collect.collection import Collection

log = logging.getLogger(__name__)

FIRST_S, PROGRESS_S, TERMINAL_S = 3.0, 10.0, 1.0


class Progress:
    """Use as a context manager; `tick` often, it prints when it is time."""

    def __init__(self, run: Collection):
        self.run, self.begun, self.had = run, time.monotonic(), run.ledger.totals.samples
        self.terminal = sys.stderr.isatty()
        self.next = self.begun + (TERMINAL_S if self.terminal else FIRST_S)

    def __enter__(self) -> Progress:
        if self.terminal:
            for handler in logging.getLogger("qcrd_fast").handlers:
                handler.addFilter(self._clear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            for handler in logging.getLogger("qcrd_fast").handlers:
                handler.removeFilter(self._clear)
            self._clear()

    def tick(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (TERMINAL_S if self.terminal else PROGRESS_S)
        if self.terminal:
            sys.stderr.write(f"\r\x1b[K{self.line()[:118]}\r")
            sys.stderr.flush()
        else:
            log.info("%s", self.line())

    def line(self) -> str:
        """Samples, requests, ETA and cost or tokens, in this order."""
        run, totals = self.run, self.run.ledger.totals
        missing = run.samples_missing
        done = run.settings.num_samples * len(run.questions) - missing
        gained, elapsed_s = totals.samples - self.had, time.monotonic() - self.begun
        eta = f"ETA {duration(elapsed_s / gained * missing)}" if gained else "ETA unknown"
        parts = [f"{done:,} of {done + missing:,} samples"]
        if run.settings.is_url:
            parts.append(f"{totals.requests:,} request{'s' if totals.requests != 1 else ''}")
        parts.append(eta)
        if run.has_cost:
            in_all = f" of about {run.cost * (1 + missing / totals.samples):.4g}" if totals.samples else ""
            parts.append(f"cost {run.cost:.4g} so far{in_all}")
        else:
            parts.append(f"{totals.prompt_tokens + totals.completion_tokens:,} tokens so far")
        return ", ".join(parts)

    @staticmethod
    def _clear(record: logging.LogRecord | None = None) -> bool:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
        return True


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
