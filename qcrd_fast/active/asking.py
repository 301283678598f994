"""Hold the conversations of a round with the teacher, within its budget, so written down that a kill loses what was in
flight.

A teacher that answers at once is asked in the order of the questions, so that a resume meets the end of the budget at
the same request; an endpoint by several workers, each with one question at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Generator, Iterator, Sequence

from qcrd_fast.active.ledger import ActiveLedger, key_of, tokens_of
from qcrd_fast.active.prompts import Prompts
from qcrd_fast.active.revision import FAILED, Explanation, Outcome, Request, revise
from qcrd_fast.active.teachers import Teacher
from qcrd_fast.collect.endpoint import Endpoint, EndpointSettings, Failed, Interrupted, refusal
from qcrd_fast.collect.reply import Choice, Reply
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import RunError, Stopped
from qcrd_fast.utils.signals import StopSignals

log = logging.getLogger(__name__)
TICK_S = 0.05
MAX_FAILURES = 10  # questions in a row


@dataclasses.dataclass(frozen=True)
class Limits:
    """`budget`: tokens of the run; `round`: of one round; `max_tokens`: of a reply."""

    budget: int
    round: int | None
    max_tokens: int


class Conversation:
    """One question's revision: the request that waits for a reply, or what came of it."""

    def __init__(
        self, round: int, question: Question, said: Explanation, mode: str, prompts: Prompts, show: str = "one"
    ):
        self.round, self.question = round, question
        self.replies: list[Reply] = []
        self.outcome: Outcome | None = None
        self._said, self._mode = said, mode
        self._talk: Generator[Request, Choice, Outcome] = revise(question, said, mode, prompts, show)
        self.request: Request | None = next(self._talk)

    @property
    def key(self) -> str:
        return key_of(self.round, self.question.id, len(self.replies))

    def answer(self, reply: Reply) -> None:
        self.replies.append(reply)
        try:
            self.request = self._talk.send(reply.choices[0])
        except StopIteration as end:
            self._end(end.value)

    def fail(self) -> None:
        """No reply will come to the request."""
        self._end(Outcome(self.question.id, self._mode, self._said.text, self._said.answer, result=FAILED))

    def _end(self, outcome: Outcome) -> None:
        self.request, self.outcome = None, outcome
        outcome.requests = len(self.replies)
        outcome.prompt_tokens, outcome.completion_tokens = tokens_of(self.replies)

    def replay(self, ledger: ActiveLedger) -> None:
        """Take the replies that an earlier process wrote down."""
        while self.request is not None and (reply := ledger.found(self.key, self.request)):
            self.answer(reply)


class Asking:
    """The conversations of one round. `exhausted`: the limit that ended it early, `budget` or `round`, or None."""

    def __init__(self, round: int, ledger: ActiveLedger, limits: Limits, signals: StopSignals):
        self.round, self.ledger, self.limits, self.signals = round, ledger, limits, signals
        self.exhausted: str | None = None
        self._last: Failed | None = None  # why the last question that failed did
        ends = {"budget": limits.budget}
        if limits.round is not None:
            ends["round"] = ledger.before(round) + limits.round
        self.name, self.end = min(ends.items(), key=lambda item: item[1])
        self._spent = ledger.before(round)  # and by `hold` in this round, as its replies are read, old ones too

    def check_signals(self) -> None:
        if self.signals.signum:
            raise Stopped(self.signals.signum)

    # At once

    def hold(self, conversations: Sequence[Conversation], teacher: Teacher) -> None:
        """Ask a teacher that answers at once, `teacher.batch` conversations side by side.

        What a batch may take is decided before any of it is asked, from what was spent before it: a resume decides
        alike.
        """
        for at in range(0, len(conversations), teacher.batch):
            some = conversations[at : at + teacher.batch]
            while self.exhausted is None and (open_ := [c for c in some if c.request is not None]):
                self.check_signals()
                self._wave(open_, teacher)
            if self.exhausted is not None:
                return

    def _wave(self, some: Sequence[Conversation], teacher: Teacher) -> None:
        ledger = self.ledger
        asked = [(c, c.request, c.key) for c in some if c.request is not None]
        known = {key: ledger.found(key, request) for _, request, key in asked}
        within, spent = [], self._spent
        for conversation, request, key in asked:
            spent += ledger.most(request, self.limits.max_tokens)
            if spent > self.end:
                self.exhausted = self.name
                break
            within.append((conversation, request, key))
        if any(known[key] is None for *_, key in within):
            drawn = teacher.replies([(c.question, request, key) for c, request, key in within])
            for (_, request, key), reply in zip(within, drawn, strict=True):
                if known[key] is None:
                    ledger.take(None, self.round, key, request, reply)
                    known[key] = reply
        for conversation, _, key in within:
            found = known[key]
            assert found is not None
            self._spent += found.prompt_tokens + found.completion_tokens
            conversation.answer(found)

    # An endpoint

    async def converse(self, conversations: Sequence[Conversation], settings: EndpointSettings) -> None:
        """Ask an endpoint, `settings.concurrency` conversations at a time.

        Raises `RunError` where no request can succeed, too many questions in a row fail, or no request of the run has
        brought a reply; `Stopped` after a signal.
        """
        for conversation in conversations:
            conversation.replay(self.ledger)
        waiting = iter([c for c in conversations if c.request is not None])
        self.why: Exception | None = None
        self._failures, self._last = 0, None
        async with Endpoint(settings) as endpoint:
            tasks = {asyncio.create_task(self._work(endpoint, waiting)) for _ in range(settings.concurrency)}
            while tasks:
                done, tasks = await asyncio.wait(tasks, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled() and (error := task.exception()) is not None:
                        if not isinstance(error, Exception):
                            raise error
                        self.why = self.why or error
                if self.signals.signum and self.why is None:
                    self.why = Stopped(self.signals.signum)
                if self.why is not None:
                    for task in tasks:  # what is in flight counts as reserved
                        task.cancel()
        if self.why is not None:
            raise self.why
        if self._last is not None and not self.ledger.samples:
            raise RunError(
                f"no request has brought a reply, the last one: {self._last}; continue with --resume auto"
            ) from self._last

    async def _work(self, endpoint: Endpoint, waiting: Iterator[Conversation]) -> None:
        for conversation in waiting:
            try:
                while conversation.request is not None:
                    journal = _Journal(self, conversation, conversation.request)
                    conversation.answer(await endpoint.ask(conversation.request.prompt, 1, journal))
                self._failures = 0
            except Interrupted:
                return
            except Failed as error:
                if refused := refusal(error, endpoint.base, endpoint.settings.api):
                    raise refused from error
                self._failures, self._last = self._failures + 1, error
                log.warning("question %r: %s", conversation.question.id, error)
                conversation.fail()
                if self._failures >= MAX_FAILURES:
                    raise RunError(
                        f"{self._failures} questions in a row failed, the last one: {error}; continue with --resume "
                        f"auto"
                    ) from error


class _Journal:
    """Writes the requests of one conversation down; holds them back where the budget could be passed."""

    def __init__(self, asking: Asking, conversation: Conversation, request: Request):
        self.asking, self.conversation, self.request = asking, conversation, request

    async def before(self, attempt: int, n: int) -> str:
        asking, ledger, most = self.asking, self.asking.ledger, self.asking.limits.max_tokens
        while asking.exhausted is None and asking.why is None:
            if ledger.total + ledger.reserved + ledger.most(self.request, most) <= asking.end:
                return ledger.send(asking.round, self.conversation.key, self.request, most, attempt)
            if not ledger.open:
                asking.exhausted = asking.name
            else:
                await asyncio.sleep(TICK_S)  # what is in flight may turn out shorter
        raise Interrupted

    def failed(self, request: str, error: Failed, seconds: float) -> None:
        what = {"id": self.conversation.key, "round": self.asking.round, "purpose": self.request.purpose}
        detail = {"detail": error.detail, "seconds": round(seconds, 3)}
        self.asking.ledger.failure(request, error.reason, charged=error.charged, **what, **detail)

    def came(self, request: str, reply: Reply) -> None:
        asked, reserved = self.conversation, self.asking.ledger.most(self.request, self.asking.limits.max_tokens)
        if reply.prompt_tokens + reply.completion_tokens > reserved:
            log.warning(
                "%s: the server counts %d tokens where %d were reserved: --max-tokens is not kept, so the budget may "
                "be passed",
                asked.key, reply.prompt_tokens + reply.completion_tokens, reserved,
            )  # fmt: skip
        self.asking.ledger.take(request, self.asking.round, asked.key, self.request, reply)
