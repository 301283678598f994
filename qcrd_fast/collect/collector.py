"""`collect`: sample a teacher K times a question; a kill loses only requests in flight.

An endpoint is asked by several workers, each with one question at a time, in one event loop; a local model and a file
of earlier samples are read in turn. No torch here but for a local model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

from qcrd_fast.collect.collection import REPLAY, Collection, CollectSettings, Keep
from qcrd_fast.collect.credentials import masked, without_secrets
from qcrd_fast.collect.endpoint import Endpoint, EndpointSettings, Failed, Interrupted, refusal
from qcrd_fast.collect.progress import Progress
from qcrd_fast.collect.reply import Reply
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError, LimitReached, RunError, Stopped
from qcrd_fast.utils.files import printable
from qcrd_fast.utils.redact import redact
from qcrd_fast.utils.signals import StopSignals

log = logging.getLogger(__name__)

TICK_S = 0.05


def collect(
    settings: CollectSettings, *, dry_run: bool = False, keep: Keep | None = None
) -> tuple[dict[str, Any], Exception | None]:
    """(summary, why it stopped before the end, if it did): `LimitReached`, `Stopped` or `RunError`, for the caller to
    raise.

    `keep` is given the log-probs of each sample (`--top-logprobs`) before the sample itself is written down.
    A dry run sends and writes nothing; its summary has one prompt, the request that would be sent and the prediction.

    Raises:
        InputError: a file, an option or the ledger of an earlier run does not fit.
    """
    run = Collection(settings)
    run.keep = keep
    if dry_run:
        return _dry_run(run), None
    if settings.is_url:
        Endpoint(_endpoint_settings(run, ""))  # a bad address is refused before anything is written
    with run.ledger as ledger, StopSignals() as signals:
        run.check_ledger()
        if not settings.teacher_model and settings.is_url:
            run.model = str(ledger.settings.get("model") or "")
        if run.unknown_task:
            log.warning("no answers to tell the task from, so free text is asked for; --task says what the answers are")
        run.write(whole_only=True)
        if settings.is_replay:
            _replay(run)
        elif settings.is_url:
            asyncio.run(_ask_endpoint(run, signals))
        else:
            _sample_locally(run, signals)
        run.write()
        run.warn()
        for id, reason in list(run.given_up.items())[:5]:
            log.warning("question %r was given up: %s", id, reason)
        summary = run.summary()
        if summary["missing"] and run.why is None:
            if not summary["samples"]:
                last = next(reversed(run.given_up.values()), "nothing fits")
                run.why = RunError(f"no sample came; the last reason: {last}")
            else:
                log.warning("%d samples are missing; the same command asks for them again", summary["missing"])
        if (
            run.why is None
            and settings.is_url
            and summary["samples"]
            and summary["cut_before_an_answer"] == summary["samples"]
        ):
            run.why = RunError(f"every sample was cut before an answer; {run.advice_on_cuts()}")
        if summary["samples"] and run.why is None:
            log.info("next: qcrd-fast prepare %s --output train.jsonl", printable(settings.output))
        return run.summary(), run.why


def _dry_run(run: Collection) -> dict[str, Any]:
    settings = run.settings
    if settings.ledger.exists():
        run.ledger.read()
        run.check_ledger()
    first = next((q for q in run.questions if run.missing(q)), run.questions[0])
    result: dict[str, Any] = {"question": first.id, "prompt": run.prompts[first.id]}
    if settings.is_url:
        endpoint = Endpoint(_endpoint_settings(run, run.settings.teacher_model or "(what the server offers)"))
        query = "&".join(f"{name}={value}" for name, value in masked(settings.query).items())
        result["url"] = endpoint.base + endpoint.path + (f"?{query}" if query else "")
        result |= {"headers": masked(settings.header)} if settings.header else {}
        result["request"] = without_secrets(endpoint.body(run.prompts[first.id], settings.num_samples))
    return result | {"prediction": run.predict(), "output": settings.output}


def _begin(run: Collection, api: str) -> bool:
    """Record the start and log the plan; return False if nothing is missing."""
    s = run.settings
    settings = {"model": run.model, "api": api, "temperature": s.temperature, "max_tokens": s.max_tokens}
    if s.is_replay:
        settings = {"model": run.model, "api": "replay", "temperature": None, "max_tokens": None}
    prices = {"price_input": s.price_input, "price_output": s.price_output}
    more = {"thinking": s.thinking} | ({"system_prompt": redact(s.system_prompt)} if s.system_prompt else {})
    if s.is_url:
        more["extra_body_sha256"] = hashlib.sha256(json.dumps(s.extra_body, sort_keys=True).encode()).hexdigest()
    before, prediction = run.ledger.settings.get("extra_body_sha256"), run.predict()
    run.ledger.start(
        {**settings, "teacher": s.teacher, "num_samples": s.num_samples, **prices, **more}, longer=s.is_url
    )
    if prediction["samples"] and run.ledger.samples and before not in (None, more.get("extra_body_sha256")):
        log.warning("--extra-body is not what the samples that are there were asked with; one file will hold both")
    figures = ", ".join(f"{key.replace('_', ' ')} {_figure(value)}" for key, value in prediction.items())
    log.info("still to collect: %s", figures if prediction["samples"] else "nothing")
    return bool(prediction["samples"])


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


# A file of earlier samples


def _replay(run: Collection) -> None:
    from qcrd_fast.collect.local import Replay

    replay = Replay(run.settings.teacher.removeprefix(REPLAY), run.settings.thinking)
    if not _begin(run, "replay"):
        return
    for question in run.questions:
        fresh = replay.samples(question)[len(run.samples(question)) :][: run.missing(question)]
        if fresh:
            run.take(None, question, Reply([], 0, 0), fresh)
        if run.missing(question):
            run.given_up[question.id] = "not enough samples in the file"


# A local model


def _sample_locally(run: Collection, signals: StopSignals) -> None:
    from qcrd_fast.collect.local import LocalTeacher

    s = run.settings
    todo = [(q, index) for q in run.questions for index in range(len(run.samples(q)), s.num_samples)]
    teacher = LocalTeacher(
        s.teacher,
        api=s.api,
        temperature=s.temperature,
        max_tokens=s.max_tokens,
        seed=s.seed,
        batch_size=s.batch_size,
        device=s.device,
        system=s.system_prompt,
        top_logprobs=s.top_logprobs,
    )
    if not _begin(run, teacher.api):
        return
    with Progress(run) as progress:
        for at in range(0, len(todo), s.batch_size):
            if signals.signum:
                run.stop(Stopped(signals.signum, "the same command continues"))
                return
            batch, begun = todo[at : at + s.batch_size], time.monotonic()
            drawn = teacher.sample([(q, run.prompts[q.id], index) for q, index in batch])
            seconds = (time.monotonic() - begun) / len(batch)
            for (question, _), (choice, prompt_tokens, completion_tokens) in zip(batch, drawn, strict=True):
                reply = Reply([choice], prompt_tokens, completion_tokens, seconds=seconds)
                run.take(None, question, reply, [run.read(question, choice)])
            progress.tick()


# An endpoint


def _endpoint_settings(run: Collection, model: str) -> EndpointSettings:
    s = run.settings
    return EndpointSettings(
        url=s.teacher,
        api=s.api or "chat",
        model=model,
        temperature=s.temperature,
        max_tokens=s.max_tokens,
        timeout_s=s.timeout_s,
        deadline_s=s.deadline_s,
        concurrency=s.concurrency,
        extra=s.extra_body,
        system=s.system_prompt,
        headers=s.header,
        query=s.query,
        allow_plain_http=s.allow_plain_http,
        top_logprobs=s.top_logprobs,
    )


class _Journal:
    """Records the requests for one question; blocks them at a limit or when the collection stops."""

    def __init__(self, run: Collection, flying: set[asyncio.Task[Any]], question: Question | None):
        self.run, self.flying, self.question = run, flying, question
        self.prompt_tokens = run.prompt_tokens(question) if question else 0

    async def before(self, attempt: int, n: int) -> str:
        run, ledger, limit = self.run, self.run.ledger, self.run.settings.max_cost
        while True:
            completion_tokens = round(n * ledger.expected_tokens(run.settings.max_tokens))
            if run.why is not None:
                raise Interrupted
            most = run.settings.max_requests
            if most is not None and ledger.totals.requests >= most:
                run.stop(LimitReached(f"--max-requests {most} is reached; a higher one continues"))
            elif limit is None or self._affordable(limit, n):
                break
            elif not ledger.open:
                run.stop(LimitReached(f"--max-cost {limit:g}: {run.cost:.6g} is spent, the next request could pass it"))
            else:
                await asyncio.sleep(TICK_S)  # what is in flight may turn out cheaper
        what = {"id": self.question.id} if self.question else {"path": "/models"}
        self.flying.add(_task())
        return ledger.intent(
            prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens, n=n, attempt=attempt, **what
        )

    def _affordable(self, limit: float, n: int) -> bool:
        ledger, cost = self.run.ledger, self.run.settings.prices.cost
        if not ledger.totals.requests:
            return limit > 0  # what a request costs is known after the first one
        most = self.run.settings.max_tokens
        each = ledger.totals.longest or most  # a mean would be passed by every second one
        prompts = self.prompt_tokens + sum(intent["prompt_tokens"] for intent in ledger.open.values())
        samples = n + sum(intent.get("n", 0) for intent in ledger.open.values())
        return self.run.cost + cost(prompts, samples * each) <= limit

    def failed(self, request: str, error: Failed, seconds: float) -> None:
        self.flying.discard(_task())
        what = {"id": self.question.id if self.question else None, "detail": error.detail, "seconds": round(seconds, 3)}
        self.run.ledger.failure(request, error.reason, charged=error.charged, **what)

    def came(self, request: str, reply: Reply) -> None:
        self.flying.discard(_task())
        if self.question is None:
            self.run.ledger.done(request)
            return
        question = self.question
        self.run.take(request, question, reply, [self.run.read(question, choice) for choice in reply.choices])


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _ask_endpoint(run: Collection, signals: StopSignals) -> None:
    flying: set[asyncio.Task[Any]] = set()
    if not run.model:
        async with Endpoint(_endpoint_settings(run, "")) as endpoint:
            finding = asyncio.create_task(_find_model(run, endpoint, flying))
            await _watch(run, signals, {finding}, flying)
    if run.why is not None:
        return
    settings = _endpoint_settings(run, run.model)
    if not _begin(run, settings.api):
        return
    async with Endpoint(settings) as endpoint:
        log.info("asking %s for %s, %d requests at a time", endpoint.base, run.model, settings.concurrency)
        waiting = iter([question for question in run.questions if run.missing(question)])
        streak = _Streak(run)
        count = min(settings.concurrency, len(run.questions))
        workers = {asyncio.create_task(_work(run, endpoint, waiting, flying, streak)) for _ in range(count)}
        await _watch(run, signals, workers, flying)


class _Streak:
    """Questions given up, or replies cut before an answer, one after the other; too many of them stop the
    collection."""

    def __init__(self, run: Collection):
        self.run, self.length, self.cut = run, 0, 0

    def given_up(self, question: Question, error: Failed) -> None:
        self.length += 1
        self.run.given_up[question.id] = str(error)
        if self.length >= self.run.settings.max_failures:
            self.run.stop(
                RunError(f"{self.length} questions in a row failed, the last one: {error}; the same command continues")
            )

    def came(self, question: Question, reply: Reply) -> None:
        self.length, run = 0, self.run
        wasted = all(choice.cut and run.read(question, choice)["answer"] is None for choice in reply.choices)
        self.cut = self.cut + 1 if wasted else 0
        if self.cut >= run.settings.max_failures:
            run.stop(RunError(f"{self.cut} replies in a row were cut before an answer; {run.advice_on_cuts()}"))


async def _work(
    run: Collection,
    endpoint: Endpoint,
    waiting: Iterator[Question],
    flying: set[asyncio.Task[Any]],
    streak: _Streak,
) -> None:
    """Take one question after the other and ask until nothing is missing of it."""
    for question in waiting:
        journal = _Journal(run, flying, question)
        try:
            while run.missing(question):
                streak.came(question, await endpoint.ask(run.prompts[question.id], run.missing(question), journal))
        except Interrupted:
            return
        except Failed as error:
            refused = refusal(error, endpoint.base, endpoint.settings.api)
            if refused:
                run.stop(refused)
                return
            streak.given_up(question, error)


async def _find_model(run: Collection, endpoint: Endpoint, flying: set[asyncio.Task[Any]]) -> None:
    """The one model that the server offers."""
    with contextlib.suppress(Interrupted):
        try:
            names = await endpoint.models(_Journal(run, flying, None))
        except Failed as error:
            refused = refusal(error, endpoint.base, endpoint.settings.api) if error.reason != "404" else None
            run.stop(refused or RunError(f"{endpoint.base}/models says {error}; name the model with --teacher-model"))
            return
        if len(names) != 1:
            offered = ", ".join(names[:10]) or "none"
            run.stop(InputError(f"--teacher-model is needed: {endpoint.base} offers {len(names)} models ({offered})"))
            return
        run.model = names[0]


async def _watch(
    run: Collection, signals: StopSignals, tasks: set[asyncio.Task[Any]], flying: set[asyncio.Task[Any]]
) -> None:
    """Until all tasks are done. Once the collection stops, what waits is cancelled, and what is in flight after a
    while."""
    stopped_at = None
    with Progress(run) as progress:
        while tasks:
            done, tasks = await asyncio.wait(tasks, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    if not isinstance(error, Exception):
                        raise error
                    run.stop(error)
            now = time.monotonic()
            if signals.signum:
                run.stop(Stopped(signals.signum, "the same command continues"))
            if run.why is not None:
                stopped_at = stopped_at or now
                for task in tasks:
                    if task not in flying or now - stopped_at > run.settings.grace_s:
                        task.cancel()
            progress.tick()
