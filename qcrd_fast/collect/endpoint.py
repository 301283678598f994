"""A teacher behind an OpenAI-compatible endpoint: single requests, and all retries.

The key comes from OPENAI_API_KEY, or from a header of the user's own, and goes to the endpoint's own host alone:
redirects are not followed, and nothing that a server says is written down or raised before the key is taken out of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx

from qcrd_fast.collect import events, refusals
from qcrd_fast.collect.credentials import is_credential, looks_secret, may_be_secret, secret_parts, secrets_within
from qcrd_fast.collect.reply import Reply, parse_reply
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.redact import SHORTEST, hide_also, redact
from qcrd_fast.version import __version__

log = logging.getLogger(__name__)

KEY_NAME = "OPENAI_API_KEY"
MAX_REPLY_BYTES = 16 * 1024 * 1024  # after decompression
CONNECT_S = 10.0
BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
BAD_REPLIES = 3  # replies without a sample that one ask puts up with
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Failed(Exception):
    """A request without a sample. `reason`: a countable word or two; `detail`: the server's text.

    `charged`: the server may have done the work. `fatal`: no other request will do better. `advice` is for the user.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        retry: bool = True,
        charged: bool = False,
        retry_after_s: float | None = None,
        fatal: bool = False,
        advice: str = "",
        body: refusals.ErrorBody | None = None,
    ):
        super().__init__("; ".join(filter(None, (f"{reason}: {detail}" if detail else reason, advice))))
        self.reason, self.detail, self.retry, self.charged, self.retry_after_s = (
            reason,
            detail,
            retry,
            charged,
            retry_after_s,
        )
        self.fatal, self.advice, self.body = fatal, advice, body


class Refused(RunError):
    """401, 403, 404, a quota that is used up: no request will do better, so the collection stops."""


class Interrupted(Exception):
    """The collection is being stopped; no further request is begun."""


class Journal(Protocol):
    """Who writes requests down, before they are sent and when they end."""

    async def before(self, attempt: int, n: int) -> str:
        """Wait until a request may be sent, write the intent, return its id; raises `Interrupted` when none may."""

    def failed(self, request: str, error: Failed, seconds: float) -> None: ...

    def came(self, request: str, reply: Reply) -> None: ...


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """Where and how to ask. `timeout_s` limits one request, `deadline_s` one ask with all retries."""

    url: str
    api: str = "chat"
    model: str = ""
    temperature: float = 0.7
    max_tokens: int = 512
    timeout_s: float = 180.0
    deadline_s: float = 600.0
    concurrency: int = 8
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    headers: Sequence[tuple[str, str]] = dataclasses.field(default=(), repr=False)
    query: Sequence[tuple[str, str]] = dataclasses.field(default=(), repr=False)
    allow_plain_http: bool = False
    top_logprobs: int = 0


class Endpoint:
    """An endpoint with its connections; use as an asynchronous context manager.

    What a server refuses by name is left out of further requests, or sent under its newer name, and said once: the
    number of samples, the temperature, max_tokens, a system prompt.

    Raises `InputError` for a URL that is none, that carries credentials or a query, or that would take a key over plain
    http to another machine.
    """

    def __init__(self, settings: EndpointSettings):
        self.settings = settings
        self.base = base_url(settings.url)
        self.path = "/chat/completions" if settings.api == "chat" else "/completions"
        self.key = os.environ.get(KEY_NAME, "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise InputError(f"{KEY_NAME} has characters that no HTTP header can carry")
        if any(is_credential(name) for name, _ in settings.headers):
            self.key = ""  # a header of the user's own is the key
        given = (*settings.headers, *settings.query)
        self._secrets = {self.key} | {
            part for name, value in given if looks_secret(name, value) for part in secret_parts(value)
        }
        within = dict(secrets_within(settings.extra))
        self._secrets |= set(within)
        self._secrets |= {form for secret in self._secrets for form in _encoded(secret)}
        self._secrets = {secret for secret in self._secrets if len(secret) >= SHORTEST}
        hide_also(self._secrets, {value for name, value in settings.headers if may_be_secret(name)})
        host = urlsplit(self.base).hostname
        names = [name for name, value in given if looks_secret(name, value)] + list(within.values())
        carries = KEY_NAME if self.key else next(iter(names), "")
        if carries and self.base.startswith("http:") and host not in LOOPBACK and not settings.allow_plain_http:
            other = "unset it" if self.key else "leave it out"
            raise InputError(
                f"--teacher: {carries} would go to {host} unencrypted; use https, {other}, or say --allow-plain-http"
            )
        self._not_before = 0.0  # a server that asked for patience asked it of all
        self._one_at_a_time = self._streams = False
        self._system_apart = True
        self._renamed: dict[str, str] = {}  # parameters that were refused: the name they go by, or nothing
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Endpoint:
        headers = httpx.Headers({"Accept": "application/json", "User-Agent": f"qcrd-fast/{__version__}"})
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        headers.update(self.settings.headers)
        headers["Accept-Encoding"] = "gzip"
        s = self.settings
        self._client = httpx.AsyncClient(
            headers=headers,
            params=list(s.query) or None,
            follow_redirects=False,
            timeout=httpx.Timeout(s.timeout_s, connect=min(CONNECT_S, s.timeout_s)),
            limits=httpx.Limits(max_connections=s.concurrency, max_keepalive_connections=s.concurrency),
            # never through a proxy
            mounts={f"all://{f'[{host}]' if ':' in host else host}": None for host in LOOPBACK},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.aclose()

    def body(self, prompt: str, n: int) -> dict[str, Any]:
        """Return the JSON body that asks for `n` samples. A null in `extra` removes a field."""
        s = self.settings
        if s.api == "chat" and s.system and self._system_apart:
            said: dict[str, Any] = {
                "messages": [{"role": "system", "content": s.system}, {"role": "user", "content": prompt}]
            }
        else:
            prompt = f"{s.system}\n\n{prompt}" if s.system else prompt
            said = {"messages": [{"role": "user", "content": prompt}]} if s.api == "chat" else {"prompt": prompt}
        wanted: dict[str, Any] = {
            "n": n,
            "temperature": s.temperature,
            "max_tokens": s.max_tokens,
            "stream": self._streams,
        }
        if s.top_logprobs:
            wanted |= (
                {"logprobs": True, "top_logprobs": s.top_logprobs} if s.api == "chat" else {"logprobs": s.top_logprobs}
            )
        wanted |= {"stream_options": {"include_usage": True}} if self._streams else {}
        sampling = {self._renamed.get(name, name) or "": value for name, value in wanted.items()}
        body = {"model": s.model, **said, **sampling, **s.extra}
        return {key: value for key, value in body.items() if key and value is not None}

    def without_key(self, text: str) -> str:
        """Remove keys from a sample, and nothing else.

        A placeholder key, as servers without keys get, may be any word of a sample and is not removed.
        """
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def hide(self, text: str) -> str:
        """Remove the key and other secrets from `text`."""
        return redact(self.without_key(text))

    async def ask(self, prompt: str, n: int, journal: Journal) -> Reply:
        """Up to `n` samples: the first reply that holds one. Every retry happens here, under one deadline.

        Raises:
            Failed: no sample within `deadline_s`, a reply that a repetition would not change, or `BAD_REPLIES` bad
            ones.
            Interrupted: by the journal.
        """
        s = self.settings
        bad = attempt = 0
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
        begun = time.monotonic()
        while True:
            attempt += 1
            asked = 1 if self._one_at_a_time else n
            request = await journal.before(attempt, asked)
            sent, body = time.monotonic(), self.body(prompt, asked)
            left_s = s.deadline_s - (sent - begun)
            try:
                reply = await self._request(request, body, prompt, min(s.timeout_s, max(left_s, 0.1)))
                journal.came(request, reply)
                return reply
            except Failed as error:
                journal.failed(request, error, time.monotonic() - sent)
                bad += error.reason.startswith("bad reply")
                if error.reason in ("400", "422", "500", "501") and self._adapt(error, body, asked, prompt):
                    continue
                wait_s = self._wait_s(attempt, error)
                left_s = s.deadline_s - (time.monotonic() - begun)
                if not error.retry or bad >= BAD_REPLIES or wait_s >= left_s:
                    raise
                log.info("%s; trying again in %.1f s", error, wait_s)
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                journal.failed(request, Failed("cancelled", charged=True), time.monotonic() - sent)
                raise

    def _adapt(self, error: Failed, body: Mapping[str, Any], asked: int, prompt: str) -> bool:
        """Whether another request has a chance, since a parameter that was refused is changed."""
        if self.body(prompt, 1 if self._one_at_a_time else asked) != body:
            return True  # another worker met it first
        said = error.body or refusals.ErrorBody(error.detail, "", "")
        own = [name for name in refusals.refused_names(body) if name not in self.settings.extra]
        own = own if error.reason in ("400", "422") else []  # of a fault of the server's own, only what is said in full
        name = refusals.refused_parameter(said, own, prompt)
        if not self._streams and "stream" in own and refusals.wants_stream(said):
            self._streams = self._one_at_a_time = True
            log.warning("the teacher answers in a stream alone, one sample a request: %s", error.detail)
        elif name == "max_tokens":
            self._renamed[name] = "max_completion_tokens"
            log.warning("the teacher refuses max_tokens, so max_completion_tokens is sent: %s", error.detail)
        elif name in ("temperature", "stream", "stream_options"):
            self._renamed[name] = ""
            value = f" {self.settings.temperature:g}, so its own is used" if name == "temperature" else ""
            log.warning("the teacher refuses %s%s: %s", name, value, error.detail)
        elif asked > 1 and refusals.refuses_several(said, prompt):
            self._one_at_a_time = True
            log.warning("the teacher takes one sample a request: %s", error.detail)
        elif name == "n":
            self._renamed[name] = ""
            log.warning("the teacher refuses n: %s", error.detail)
        elif (
            self.settings.system
            and self._system_apart
            and self.settings.api == "chat"
            and refusals.refuses_system(said)
        ):
            self._system_apart = False
            log.warning("the teacher takes no system prompt, so it is put before each question: %s", error.detail)
        else:
            return False
        return True

    async def models(self, journal: Journal) -> list[str]:
        """The names at /models. Raises what `ask` raises."""
        request, sent = await journal.before(1, 0), time.monotonic()
        try:
            found = await self._exchange("GET", "/models", request, None, min(30.0, self.settings.timeout_s))
            rows = found.get("data") if isinstance(found, dict) else found
            if not isinstance(rows, list):
                raise Failed("bad reply: not a list of models", retry=False)
        except Failed as error:
            journal.failed(request, error, time.monotonic() - sent)
            raise
        journal.came(request, Reply([], 0, 0, seconds=time.monotonic() - sent))
        names = [row.get("id") for row in rows if isinstance(row, dict)]
        return [self.hide(name) for name in names if isinstance(name, str)]

    async def post(self, path: str, body: Mapping[str, Any], request: str) -> Any:
        """The JSON of a request that asks for no sample; repeated like one, under one deadline. Raises `Failed`."""
        s, attempt, begun = self.settings, 0, time.monotonic()
        while True:
            attempt += 1
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            left_s = s.deadline_s - (time.monotonic() - begun)
            try:
                return await self._exchange("POST", path, request, body, min(s.timeout_s, max(left_s, 0.1)))
            except Failed as error:
                wait_s = self._wait_s(attempt, error)
                if not error.retry or wait_s >= s.deadline_s - (time.monotonic() - begun):
                    raise
                log.info("%s; trying again in %.1f s", error, wait_s)
                await asyncio.sleep(wait_s)

    def _wait_s(self, attempt: int, error: Failed) -> float:
        """Return the server's waiting time, else exponential backoff; always with jitter, to spread workers."""
        jitter = random.uniform(0.5, 1.0)
        own_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(attempt - 1, 10)) * jitter
        if error.retry_after_s is None:
            return own_s
        if error.retry_after_s < self.settings.deadline_s:
            self._not_before = max(self._not_before, time.monotonic() + error.retry_after_s)
        asked_s = error.retry_after_s + 0.2 * jitter
        return max(asked_s, own_s) if error.retry_after_s < BACKOFF_S else asked_s  # some always say 0

    async def _request(self, request: str, body: dict[str, Any], prompt: str, limit_s: float) -> Reply:
        begun = time.monotonic()
        value = await self._exchange("POST", self.path, request, body, limit_s)
        reply = parse_reply(value, self.settings.system + prompt, self.without_key, self.settings.max_tokens)
        if not reply.choices:
            raise self._no_sample(value, reply)
        return dataclasses.replace(reply, seconds=time.monotonic() - begun)

    def _no_sample(self, value: Any, reply: Reply) -> Failed:
        """Interpret a reply without a sample, perhaps an error: a router that has started cannot change the status."""
        faults, detail = ", ".join(reply.faults) or "nothing in it", ""
        if within := refusals.error_within(value):
            with contextlib.suppress(RecursionError):
                text = json.dumps(within, ensure_ascii=False)
                error = refusals.read_error(text)
                detail = self._shown(error.message)
                if (status := refusals.status_within(within, error)) is not None:
                    failed = self._failed(status, text, {})
                    if failed.fatal or status == 429 or not value.get("choices"):
                        return failed  # else a choice broke off, which may have been paid
        return Failed(f"bad reply: {faults}", detail, charged=True)

    def _shown(self, text: str) -> str:
        """Format a server's text as one line of a message."""
        text = " ".join(self.hide(text).split())[:300]
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    async def _exchange(self, method: str, path: str, request: str, body: Any, limit_s: float) -> Any:
        """The JSON of one exchange, whole within `limit_s` however slowly it drips."""
        try:
            return await asyncio.wait_for(self._transfer(method, path, request, body), limit_s)
        except asyncio.TimeoutError:
            words = f"no complete reply within {limit_s:.1f} s"
            raise Failed("timeout", words, charged=True, advice="a higher --timeout may help") from None
        except httpx.TimeoutException as error:
            sent = not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            raise Failed("timeout", type(error).__name__, charged=sent) from None
        except httpx.ConnectError as error:
            raise Failed("no connection", self.hide(str(error))[:200]) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed("broken off", self.hide(f"{type(error).__name__}: {error}")[:200], charged=True) from None

    async def _transfer(self, method: str, path: str, request: str, body: Any) -> Any:
        assert self._client is not None, "use `async with`"
        headers = {"X-Client-Request-Id": request}
        async with self._client.stream(method, self.base + path, json=body, headers=headers) as response:
            status = response.status_code
            if 300 <= status < 400:
                host = urlsplit(response.headers.get("location", "")).hostname or "the same host"
                advice = "if --teacher has moved there, give it that address"
                raise Failed(
                    "redirect", f"{status} to {self.hide(host)[:100]}, not followed", retry=False, advice=advice
                )
            if status != 200:
                text = ""
                with contextlib.suppress(Failed, httpx.HTTPError):
                    text = (await _read(response, 1_048_576)).decode("utf-8", "replace")
                raise self._failed(status, text, response.headers)
            raw = await _read(response, MAX_REPLY_BYTES)
        try:
            if events.is_events(response.headers.get("content-type", ""), raw):
                return events.assemble(raw)
            try:
                return json.loads(raw)
            except UnicodeDecodeError:  # a sample may be cut within a character
                return json.loads(raw.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            page = raw.lstrip()[:1] == b"<"
            advice = "check --teacher (usually it ends in /v1)" if page else ""
            raise Failed(f"bad reply: {'HTML' if page else 'not JSON'}", charged=True, advice=advice) from None

    def _failed(self, status: int, text: str, headers: Mapping[str, str]) -> Failed:
        """Interpret an error: what it means for this request and for the others."""
        error = refusals.read_error(text)
        detail = self._shown(error.message)
        wait_s = refusals.wait_s(headers, text)
        if refusals.wants_money(status, error, wait_s):
            advice = refusals.advice_on_money(error, self.settings.max_tokens)
            return Failed(str(status), detail, retry=False, fatal=True, advice=advice, body=error)
        if refusals.refuses_key(status, error):
            return Failed(str(status), detail, retry=False, fatal=True, advice=_advice_on_key(), body=error)
        if status in (403, 404) and not refusals.flags_prompt(status, error):
            return Failed(str(status), detail, retry=False, fatal=True, body=error)
        retry = status in (408, 409, 429) or status >= 500
        advice = "" if retry else refusals.advice_on_length(error, self.settings.max_tokens)
        return Failed(str(status), detail, retry=retry, retry_after_s=wait_s, advice=advice, body=error)


def refusal(error: Failed, url: str, api: str) -> Refused | None:
    """Return the advice for a state in which no request can succeed."""
    advice = {
        "403": f"may {KEY_NAME} use this model?",
        "404": "check --teacher, the name of the deployment in it, and --query api-version=..."
        if "/deployments/" in url
        else f"check --teacher (usually it ends in /v1), --teacher-model and --api {api}",
    }.get(error.reason, "")
    if error.fatal and not error.advice:
        return Refused(f"{url} says {error}; {advice}")
    return Refused(f"{url} says {error}") if error.fatal else None


def _encoded(secret: str) -> set[str]:
    """Return a secret as it may appear in a URL."""
    forms = {quote(secret, safe=safe) for safe in ("", "/", "/+=")}
    return forms | {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), form) for form in forms}


def _advice_on_key() -> str:
    if os.environ.get(KEY_NAME):
        return f"is {KEY_NAME}, or the key in --header, right?"
    return f"set {KEY_NAME}, or check the key in --header"


def base_url(url: str) -> str:
    """The address to which /chat/completions is appended. Raises `InputError`."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"--teacher: not a URL: {redact(url)}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"--teacher: a URL without credentials and query is expected; the key goes into {KEY_NAME} or --header, a "
            "query such as api-version into --query"
        )
    path = re.sub(r"/(?:chat/)?completions$", "", parts.path.rstrip("/"))
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


async def _read(response: httpx.Response, limit: int) -> bytes:
    """The body, decompressed no further than `limit` bytes."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise Failed("bad reply: unknown encoding", encoding[:40], charged=True)
    inflate = None if encoding in ("identity", "") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    body = bytearray()
    async for block in response.aiter_raw():
        try:
            body += inflate.decompress(block, limit + 1 - len(body)) if inflate else block
        except zlib.error:
            raise Failed("bad reply: broken compression", charged=True) from None
        if len(body) > limit:
            raise Failed("bad reply: too large", f"more than {limit:,} bytes", charged=True)
    return bytes(body)
