"""The ledger of a collection: an append-only JSONL file in which every request and every reply is written down.

    {"kind": "start", ...}    one for each run of the collector: settings, process, prices
    {"kind": "intent", ...}   written and synced before a request is sent; `request` is also sent as its
    X-Client-Request-Id
    {"kind": "reply", ...}    samples, tokens and faults of a request, or of a batch of a local model or a replay
    {"kind": "failure", ...}  a request that brought no sample, and why

It is the truth from which everything else is made again: an intent without an end was in flight when the collector was
killed. The file is locked while a collector has it; the lock dies with the process.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.files import append_whole, open_locked, printable, read_records

log = logging.getLogger(__name__)

FIXED = ("model", "api", "temperature", "max_tokens")  # what samples of one file have in common
Reread = Callable[[str, dict[str, Any]], dict[str, Any]]
EXPECTED_TOKENS = 128  # of a sample, before any has come


@dataclasses.dataclass
class Totals:
    """Counts of requests, samples, tokens and cost over all runs of the collector."""

    requests: int = 0
    replies: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest: float = 0.0  # tokens a sample of the reply with the most
    reported_cost: float = 0.0  # by servers that say what a request cost
    estimated: int = 0  # replies and failures whose tokens the server did not report
    lost: int = 0  # requests in flight when a collector was killed; charged as they were expected to come out
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any currency."""

    input: float = 0.0
    output: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class Ledger:
    """An open, locked ledger; use as a context manager.

    `samples` holds what was collected: {question id: [sample, ...]} in the order it came, each with rationale, answer
    and source, perhaps reasoning, and, where it was cut before an answer, `cut`: the maximum length that it was asked
    with. `prompts` holds the digest of the prompt that each question was asked with. `reread` is given the samples that
    were read with another `thinking`.

    Raises `InputError` when the file cannot be written, is no ledger, or belongs to a running collector (named by its
    PID).
    """

    option = "--output"  # that named the file, for messages

    def __init__(self, path: Path, thinking: str = "auto", reread: Reread | None = None):
        self.path, self.thinking, self.reread = path, thinking, reread
        self.totals = Totals()
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.prompts: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self.open: dict[str, dict[str, Any]] = {}  # intents without an end, by request
        self.lost: dict[str, dict[str, Any]] = {}
        self._bound = False  # samples of which there is no text to be read again
        self._file = -1
        self._session = uuid.uuid4().hex[:12]

    def __enter__(self) -> Ledger:
        try:
            self._file = open_locked(self.path, os.O_APPEND)
        except BlockingIOError:
            raise InputError(
                f"{self.option}: {printable(self.path)} is in use by process {self._owner()}; choose another"
            ) from None
        except OSError as error:
            raise InputError(f"{self.option}: cannot write {printable(self.path)}: {error.strerror}") from error
        try:
            self.read(repair=True)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _owner(self) -> str:
        """The process that started last, by the file."""
        started = [record for record in read_records(self.path, "skip") if record.get("kind") == "start"]
        return str(started[-1].get("pid")) if started else "unknown"

    # Reading

    def read(self, *, repair: bool = False) -> None:
        """Read the file. A line cut by a kill is ignored and, with `repair`, removed.

        Raises `InputError` for a line that is no record of a ledger.
        """
        with open(self.path, "rb") as file:
            end = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if repair:
                        log.warning(
                            "%s:%d: the cut line of a killed collector is dropped", printable(self.path), number
                        )
                        os.ftruncate(self._file, end)
                    break
                end += len(line)
                try:
                    record = json.loads(line)
                    self._take(record)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise InputError(
                        f"{printable(self.path)}:{number}: no record of a ledger; move it away, or choose another "
                        f"{self.option}"
                    ) from None
        self.lost, self.open = self.open, {}
        self.totals.lost = len(self.lost)
        for intent in self.lost.values():
            self._charge(intent)

    def _take(self, record: dict[str, Any]) -> None:
        kind, totals = record["kind"], self.totals
        for name in ("prompt_tokens", "completion_tokens") if kind in ("intent", "reply", "failure") else ():
            if type(record[name]) is not int or record[name] < 0:
                raise ValueError(name)
        if kind == "start":
            self.settings = record
        elif kind == "intent":
            totals.requests += 1
            self.open[record["request"]] = record
        elif kind == "done":
            self.open.pop(record["request"], None)
        elif kind in ("reply", "failure"):
            self.open.pop(record.get("request") or "", None)
            self._charge(record)
            totals.faults.update(record.get("faults", {}))
            if kind == "failure":
                totals.failures[record["reason"]] += 1
                return
            totals.replies += 1
            found = [self._kept(record["id"], sample) for sample in record["samples"]]
            totals.samples += len(found)
            if came := len(found) + record.get("faults", {}).get("surplus", 0):
                totals.longest = max(totals.longest, record["completion_tokens"] / came)
            self.samples.setdefault(record["id"], []).extend(found)
            self.prompts[record["id"]] = record["prompt"]
        else:
            raise ValueError(kind)

    def _kept(self, id: str, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a sample that stay in memory."""
        cut = bool(sample.get("cut"))
        if self.reread and self.settings.get("thinking", "auto") != self.thinking:
            self._bound |= "text" not in sample
            sample = {**sample, **(self.reread(id, sample) if "text" in sample else {})}
        kept = {key: sample[key] for key in ("rationale", "answer", "source")}
        if isinstance(sample.get("reasoning"), str):
            kept["reasoning"] = sample["reasoning"]
        if cut and sample["answer"] is None:
            limit = self.settings.get("max_tokens")
            kept["cut"] = limit if isinstance(limit, int) else 0
        return kept

    def _charge(self, record: dict[str, Any]) -> None:
        self.totals.prompt_tokens += record["prompt_tokens"]
        self.totals.completion_tokens += record["completion_tokens"]
        self.totals.estimated += bool(record.get("estimated"))
        usage = record.get("usage")
        cost = usage.get("cost") if isinstance(usage, dict) else None
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 1e9:
            self.totals.reported_cost += cost

    # Writing

    def _append(self, record: dict[str, Any]) -> None:
        """One record, on the disk before this returns. Raises `RunError` where it could not be written."""
        line = (json.dumps({**record, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n").encode(
            "utf-8", "replace"
        )
        try:
            append_whole(self._file, line)
        except OSError as error:
            raise RunError(
                f"cannot write {printable(self.path)}: {error.strerror}; run the same command again to continue"
            ) from error
        self._take(record)

    def start(self, settings: dict[str, Any], *, longer: bool = False) -> None:
        """Record a run's start. Raises `InputError` if an earlier run used other settings.

        `longer`: a higher maximum length is allowed.
        """
        if self._bound:
            raise InputError(
                f"{printable(self.path)}: its samples cannot be read with another --thinking; choose another --output"
            )
        for name in FIXED:
            before = self.settings.get(name)
            if name == "max_tokens" and longer and isinstance(before, int) and before < settings[name]:
                continue
            if self.samples and name in self.settings and before != settings[name]:
                raise InputError(
                    f"{printable(self.path)}: sampled with {name} {before!r}, now it is {settings[name]!r}; "
                    f"choose another {self.option}"
                )
        self._append({"kind": "start", "version": 1, "pid": os.getpid(), **settings})

    def intent(self, *, prompt_tokens: int, completion_tokens: int, **what: Any) -> str:
        """Write down that a request is about to be sent; the tokens are those it is expected to use."""
        request = f"{self._session}-{self.totals.requests + 1}"
        tokens = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "estimated": True}
        self._append({"kind": "intent", "request": request, **what, **tokens})
        return request

    def reply(
        self, request: str | None, question_id: str, prompt: str, samples: list[dict[str, Any]], **what: Any
    ) -> None:
        self._append(
            {"kind": "reply", "request": request, "id": question_id, "prompt": prompt, "samples": samples, **what}
        )

    def done(self, request: str) -> None:
        """A request that was not for samples has ended well."""
        self._append({"kind": "done", "request": request})

    def failure(self, request: str, reason: str, *, charged: bool, **what: Any) -> None:
        """Record a failure. `reason`: one of a few countable words. A request that may have run is charged as
        expected."""
        intent = self.open.get(request, {})
        tokens = {key: intent.get(key, 0) if charged else 0 for key in ("prompt_tokens", "completion_tokens")}
        estimate = {"estimated": True} if charged else {}
        self._append({"kind": "failure", "request": request, "reason": reason, **what, **tokens, **estimate})

    def expected_tokens(self, max_tokens: int) -> float:
        """Tokens of the next sample: the mean so far, or a guess."""
        if self.totals.samples and self.totals.completion_tokens:
            return min(max_tokens, self.totals.completion_tokens / self.totals.samples)
        return min(max_tokens, EXPECTED_TOKENS)
