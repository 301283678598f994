"""Interpret a server's errors: rejected parameters, missing credit, rate limits and waiting times."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

_UNKNOWN = re.compile(
    r"unsupported|not (?:be )?(?:supported|permitted|allowed|accepted|available)|"
    r"(?:does|do)(?:n't| not) (?:support|accept|allow|take)|"
    r"unknown|unrecogni[sz]ed|unexpected|extra (?:inputs?|fields?)|extra_forbidden|deprecated|incompatible|additional "
    r"propert|"
    r"\bonly\b|\binstead\b|must be (?:1|one)\b|at most 1\b",
    re.IGNORECASE,
)
_OUT_OF_RANGE = re.compile(
    r"too (?:large|big|high|small|low|many)|between|less than|greater|at (?:most|least) (?!1\b)|[<>]=|range|context",
    re.IGNORECASE,
)
_QUOTA = re.compile(
    r"insufficient[_ ]?(?:quota|balance|credit|fund)|exceeded[_ ]current[_ ]quota|exceeded your current quota|"
    r"(?:credit|balance|quota)s?\b.{0,40}(?:exhausted|too low|used up|run out|depleted)|"
    r"(?:out of|no|add|more|used all).{0,24}credits?\b|"
    r"billing|arrearage|overdue|payment|monthly spending limit|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39",
    re.IGNORECASE,
)
_QUOTA_CODES = re.compile(r"insufficient_|exceeded_current_quota|billing|arrearage|\b1113\b|credit", re.IGNORECASE)
_AGAIN = re.compile(
    r"(?:try again|retry|reset)\w*\s+(?:in|after)\s+"
    r"((?:\d+(?:\.\d+)?\s*(?:ms|milliseconds?|h|hours?|m|min|minutes?|s|seconds?)\s*)+)",
    re.IGNORECASE,
)
_DELAY = re.compile(r"\"?retry_?delay\"?\s*:\s*\"?(\d+(?:\.\d+)?s)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|milli|h|m|s)", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "milli": 0.001, "h": 3600.0, "m": 60.0, "s": 1.0}
_CONTEXT = re.compile(
    r"context|too long|maximum.{0,24}(?:tokens|length)|reduce.{0,40}(?:length|prompt|tokens)", re.IGNORECASE
)
_STREAM = re.compile(
    r"only supports? (?:the )?stream|non-?stream|stream(?:ing)?(?: mode)? is required|"
    r"(?:enable|set)\W+(?:the )?.{0,20}\bstream",
    re.IGNORECASE,
)
_LIMITS = ("max_tokens", "max_completion_tokens")
_CHOICES = re.compile(
    r"\b(?:one|single|several|multiple|number of|more than \w+) (?:\w+ ){0,2}choices?\b", re.IGNORECASE
)
_REFUSES = re.compile(
    r"not\b|n't\b|only|must|should|most|maximum|greater|more than|exceed|exactly|single|\b(?:1|one)\b", re.IGNORECASE
)
_SYSTEM = re.compile(
    r"['\"`\u2018\u201c]system['\"`\u2019\u201d]|system (?:role|prompt|message|instruction)|"
    r"role\W{0,3}system|\bsystem\b.{0,20}\brole",
    re.IGNORECASE,
)
_NO_SYSTEM = re.compile(
    r"developer instruction is not|roles must alternate|only (?:the )?user and assistant roles", re.IGNORECASE
)
_FLAGGED = re.compile(
    r"flagged|moderation|content[ _-](?:policy|filter|management)|data_inspection|inappropriate|prohibited|sensitive",
    re.IGNORECASE,
)
_BAD_KEY = re.compile(
    r"(?:invalid|incorrect|wrong|expired|missing) api[ _-]?key|"
    r"api[ _-]?key (?:is )?(?:not valid|invalid|expired|missing|not found)|API_KEY_INVALID",
    re.IGNORECASE,
)
_TITLE = re.compile(r"<title[^>]{0,80}>(.{1,300}?)</title>", re.IGNORECASE | re.DOTALL)


class ErrorBody(NamedTuple):
    """The parts of an error that servers agree on, as text; empty where they are missing."""

    message: str
    code: str  # code and type
    parameter: str

    @property
    def text(self) -> str:
        return f"{self.code} {self.message}"


def read_error(body: str) -> ErrorBody:
    """Read an error: OpenAI's {"error": {...}}, a string at error, message or detail, FastAPI's list, or plain text.

    Of an HTML page the title.
    """
    body = body.removeprefix("\ufeff")
    if body.lstrip()[:1] == "<":
        title = _TITLE.search(body)
        return ErrorBody(title[1].strip() if title else "an HTML page", "", "")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ErrorBody(body, "", "")
    if isinstance(value, list) and value:  # as Gemini wraps it
        value = value[0]
    value = value if isinstance(value, dict) else {}
    inner = next((value[key] for key in ("error", "detail", "errors") if value.get(key)), value)
    if isinstance(inner, list):
        faults = [fault for fault in inner if isinstance(fault, dict)]
        where = [str(part) for fault in faults for part in _list(fault.get("loc")) if part != "body"]
        message = "; ".join(f"{fault.get('msg')} ({fault.get('type')})" for fault in faults)
        return ErrorBody(message or body, "", where[0] if where else "")
    if isinstance(inner, str):
        return ErrorBody(inner, _words(value, "code", "type"), _words(value, "param"))
    inner = inner if isinstance(inner, dict) else {}
    message = next((inner[key] for key in ("message", "msg", "detail") if isinstance(inner.get(key), str)), "")
    raw = inner.get("metadata")
    if isinstance(raw, dict) and isinstance(raw.get("raw"), str):  # what a router was told
        message = f"{message}: {raw['raw']}"
    return ErrorBody(message or body, _words(inner, "code", "type", "status"), _words(inner, "param"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _words(value: Mapping[str, Any], *keys: str) -> str:
    return " ".join(str(value[key]) for key in keys if isinstance(value.get(key), str | int))


def error_within(value: Any) -> dict[str, Any] | None:
    """Return the error inside a successful reply or its first choice; None if it has choices and no error."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    if value.get("error") or not isinstance(choices, list):
        return {name: item for name, item in value.items() if name != "choices"}
    errors = (choice.get("error") for choice in choices if isinstance(choice, dict))
    return next(({"error": error} for error in errors if error), None)


def status_within(value: Mapping[str, Any], error: ErrorBody) -> int | None:
    """The status that an error names, or means, which came as a reply with status 200."""
    for found in (value.get("error"), value):
        if not isinstance(found, Mapping):
            continue
        for name in ("code", "status", "status_code"):
            said = str(found[name]) if isinstance(found.get(name), str | int) else ""
            if re.fullmatch(r"[45]\d\d", said):
                return int(said)
    return 429 if _QUOTA_CODES.search(error.code) or "rate_limit" in error.code.lower() else None


def refused_parameter(error: ErrorBody, sent: Collection[str], prompt: str = "") -> str | None:
    """Return which sent parameter the server does not support; None if only a value is out of range.

    A word of the `prompt`, which an error may repeat, names a parameter only between quotation marks.
    """
    text = error.text
    named = error.parameter if error.parameter in sent else None
    if named is None:
        found = [(match.start(), name) for name in sent if (match := _mention(name, text, prompt))]
        named = min(found)[1] if found else None
    if named is None or not _UNKNOWN.search(text):
        return None
    if "unsupported" in error.code.lower():
        return named
    return None if _OUT_OF_RANGE.search(error.message) else named


def _mention(name: str, text: str, prompt: str) -> re.Match[str] | None:
    # `n` is also a letter
    bare = rf"(?<![\w\\-]){name}(?![\w'-])" if len(name) < 3 else rf"(?<!\w){re.escape(name)}(?!\w)"
    quoted = rf"['\"`\u2018\u201c]{re.escape(name)}['\"`\u2019\u201d]"
    return re.search(quoted if re.search(bare, prompt) else f"{quoted}|{bare}", text)


def refused_names(body: Mapping[str, Any]) -> list[str]:
    """The parameters of a request that a server may not know; every server knows the others."""
    return [name for name in body if name not in ("model", "messages", "prompt")]


def refuses_several(error: ErrorBody, prompt: str = "") -> bool:
    """Whether a server gives one choice a request only."""
    if error.parameter in ("n", "best_of"):
        return True
    named = _mention("n", error.text, prompt) or _CHOICES.search(
        error.text.replace(prompt, "") if prompt else error.text
    )
    return bool(named and _REFUSES.search(error.text))


def wants_stream(error: ErrorBody) -> bool:
    """Whether a model is served in streams alone."""
    return bool(_STREAM.search(error.text))


def refuses_system(error: ErrorBody) -> bool:
    """Whether a server, or the template of its model, knows no system prompt."""
    if _NO_SYSTEM.search(error.text):
        return True
    return bool(_SYSTEM.search(f"{error.parameter} {error.text}") and _UNKNOWN.search(error.text))


def flags_prompt(status: int, error: ErrorBody) -> bool:
    """Whether it is this prompt that a server will not answer, as opposed to this key."""
    return status == 403 and bool(_FLAGGED.search(error.text))


def refuses_key(status: int, error: ErrorBody) -> bool:
    """Return whether the key was rejected; some servers say so with status 400."""
    return status == 401 or (status == 400 and bool(_BAD_KEY.search(error.text)))


def wants_money(status: int, error: ErrorBody, wait_s: float | None) -> bool:
    """Return whether a quota is used up, which no retry changes; a rate limit with a waiting time is not."""
    if status == 402:
        return True
    if status not in (400, 403, 429) or "rate_limit" in error.code.lower():
        return False
    if _QUOTA_CODES.search(error.code):
        return True
    # of 400, the text may repeat the question
    return status != 400 and wait_s is None and bool(_QUOTA.search(error.text))


def wait_s(headers: Mapping[str, str], body: str) -> float | None:
    """Return the seconds to wait from Retry-After (number or date), retry-after-ms or the message; None if absent."""
    asked: float | None
    try:
        asked = float(headers["retry-after-ms"]) / 1000
    except (KeyError, ValueError):
        asked = _retry_after_s(headers.get("retry-after"))
    if asked is None and (found := _AGAIN.search(body) or _DELAY.search(body)):
        asked = sum(float(number) * _SECONDS[unit.lower()] for number, unit in _DURATION.findall(found[1]))
    return max(0.0, asked) if asked is not None and math.isfinite(asked) else None


def _retry_after_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None


def advice_on_money(error: ErrorBody, max_tokens: int) -> str:
    """Return advice for an account with too little credit."""
    if any(name in error.message for name in (*_LIMITS, "afford")):
        return (
            f"lower --max-tokens ({max_tokens}), which the server counts in full, or add credit; "
            "the same command continues"
        )
    if re.search(r"per[- ]day|daily", error.message, re.IGNORECASE):
        return "the key has used up what it may ask for in a day; the same command continues when it may ask again"
    return "the account of the key has no credit left; the same command continues when it has"


def advice_on_length(error: ErrorBody, max_tokens: int) -> str:
    """Return advice if prompt and reply exceed the model's length; empty for another fault."""
    if error.parameter in _LIMITS or any(name in error.message for name in _LIMITS) or _CONTEXT.search(error.text):
        return f"lower --max-tokens ({max_tokens}) or shorten the prompt: together they are more than the model takes"
    return ""
