"""The ledger of an active run: that of `collect`, with tokens by round and purpose, and a budget that is never
passed."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.active.revision import Request
from qcrd_fast.collect.ledger import Ledger
from qcrd_fast.collect.prompts import prompt_digest
from qcrd_fast.collect.reply import Choice, Reply
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable

FRAME_TOKENS = 64  # that a server may put around a prompt: roles, a system message of its own


class ActiveLedger(Ledger):
    """Requests and replies of an active run, by (round, question, turn). The file is locked while a run has it.

    Tokens of requests that a kill left in flight, or that failed when the server may have worked on them, count as
    reserved.
    """

    option = "--output-dir"

    def __init__(self, path: Path):
        super().__init__(path)
        self.spent = collections.Counter[tuple[int, str]]()  # tokens by (round, purpose), prompts included
        self.frame = FRAME_TOKENS  # the most that a prompt had beyond its bytes

    def __enter__(self) -> ActiveLedger:
        super().__enter__()
        return self

    def _kept(self, id: str, sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    def _charge(self, record: dict[str, Any]) -> None:
        super()._charge(record)
        self.spent[record["round"], record["purpose"]] += record["prompt_tokens"] + record["completion_tokens"]
        self.frame = max(self.frame, record["prompt_tokens"] - record.get("prompt_bytes", record["prompt_tokens"]))

    @property
    def total(self) -> int:
        """Tokens spent so far, those in flight left out."""
        return sum(self.spent.values())

    @property
    def reserved(self) -> int:
        """Tokens that what is in flight may use at most."""
        return sum(intent["prompt_tokens"] + intent["completion_tokens"] for intent in self.open.values())

    def before(self, round: int) -> int:
        """Tokens spent in the rounds before one."""
        return sum(tokens for (of, _), tokens in self.spent.items() if of < round)

    def by_purpose(self, round: int | None = None) -> dict[str, int]:
        """Tokens by purpose, of one round or of all."""
        found = collections.Counter[str]()
        for (of, purpose), tokens in sorted(self.spent.items()):
            if round in (None, of):
                found[purpose] += tokens
        return dict(found)

    def most(self, request: Request, max_tokens: int) -> int:
        """The most tokens that a request can take: a token of a prompt is at least one byte."""
        return _bytes(request) + self.frame + max_tokens

    def send(self, round: int, key: str, request: Request, max_tokens: int, attempt: int) -> str:
        """Write the intent of a request; its reservation is counted until its end is written. Returns its id."""
        what = {"id": key, "round": round, "purpose": request.purpose, "n": 1, "attempt": attempt}
        return self.intent(prompt_tokens=_bytes(request) + self.frame, completion_tokens=max_tokens, **what)

    def found(self, key: str, request: Request) -> Reply | None:
        """The reply that was written down for a request. Raises `InputError` where that was asked with another
        prompt."""
        samples = self.samples.get(key)
        if not samples:
            return None
        if self.prompts[key] != prompt_digest(request.prompt):
            raise InputError(
                f"{printable(self.path)}: {key} was asked with another prompt; choose another --output-dir"
            )
        one = samples[0]
        return Reply([Choice(one["text"], bool(one.get("cut")))], one["prompt_tokens"], one["completion_tokens"])

    def take(self, request_id: str | None, round: int, key: str, request: Request, reply: Reply) -> None:
        """Write a reply down."""
        choice = reply.choices[0]
        tokens = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        sample: dict[str, Any] = {"text": choice.text, **tokens} | ({"cut": True} if choice.cut else {})
        self.reply(
            request_id, key, prompt_digest(request.prompt), [sample],
            round=round, purpose=request.purpose, prompt_bytes=_bytes(request), seconds=_rounded(reply.seconds),
            estimated=reply.estimated, faults=dict(reply.faults), **tokens,
        )  # fmt: skip


def key_of(round: int, question_id: str, turn: int) -> str:
    """What a request of a run goes by."""
    return json.dumps([round, question_id, turn], ensure_ascii=False)


def _bytes(request: Request) -> int:
    return len(request.prompt.encode("utf-8", "replace"))


def _rounded(seconds: float) -> float:
    return round(seconds, 3)


def tokens_of(replies: Sequence[Reply]) -> tuple[int, int]:
    """(prompt, completion) tokens of replies."""
    return sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
