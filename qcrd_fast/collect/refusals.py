"""What a server means by an error: a parameter that it refuses, money that it wants, or patience, and how long."""

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
    r"unknown|unrecogni[sz]ed|unexpected|extra (?:inputs?|fields?)|extra_forbidden|deprecated|incompatible|additional propert|"
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
_CONTEXT = re.compile(r"context|too long|maximum.{0,24}(?:tokens|length)|reduce.{0,40}(?:length|prompt|tokens)", re.IGNORECASE)
_STREAM = re.compile(
    r"only supports? (?:the )?stream|non-?stream|stream(?:ing)?(?: mode)? is required|"
    r"(?:enable|set)\W+(?:the )?.{0,20}\bstream",
    re.IGNORECASE,
)
_LIMITS = ("max_tokens", "max_completion_tokens")


class ErrorBody(NamedTuple):
    """The parts of an error that servers agree on, as text; empty where they are missing."""

    message: str
    code: str  # code and type
    parameter: str

    @property
    def text(self) -> str:
        return f"{self.code} {self.message}"


def read_error(body: str) -> ErrorBody:
    """OpenAI's {"error": {...}}, a bare string at error, message or detail, and FastAPI's list of faults; else the text."""
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


def refused_parameter(error: ErrorBody, sent: Collection[str]) -> str | None:
    """Which of the parameters that were sent a server does not take at all; None where only a value is out of range."""
    text = error.text
    named = error.parameter if error.parameter in sent else None
    if named is None:
        found = [(match.start(), name) for name in sent if (match := _mention(name, text))]
        named = min(found)[1] if found else None
    if named is None or not _UNKNOWN.search(text):
        return None
    if "unsupported" in error.code.lower():
        return named
    return None if _OUT_OF_RANGE.search(error.message) else named


def _mention(name: str, text: str) -> re.Match[str] | None:
    if len(name) < 3:  # `n` is a letter of other words
        return re.search(rf"['\"`\u2018\u201c]{name}['\"`\u2019\u201d]|(?<![\w-]){name}(?![\w'-])", text)
    return re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", text)


def refused_names(body: Mapping[str, Any]) -> list[str]:
    """The parameters of a request that a server may not know; every server knows the others."""
    return [name for name in body if name not in ("model", "messages", "prompt")]


def refuses_several(error: ErrorBody) -> bool:
    """Whether a server gives one choice a request only."""
    return bool(error.parameter in ("n", "best_of") or re.search(r"(?<![\w-])n(?![\w'-])|\bchoices?\b", error.text))


def wants_stream(error: ErrorBody) -> bool:
    """Whether a model is served in streams alone."""
    return bool(_STREAM.search(error.text))


def refuses_system(error: ErrorBody) -> bool:
    """Whether a server, or the template of its model, knows no system prompt."""
    return bool(re.search(r"\bsystem\b", error.text, re.IGNORECASE) and _UNKNOWN.search(error.text))


def wants_money(status: int, error: ErrorBody, wait_s: float | None) -> bool:
    """Whether a quota is used up, which no retry will change; a rate limit that names when to come back is none."""
    if status == 402:
        return True
    if status not in (400, 403, 429) or "rate_limit" in error.code.lower():
        return False
    if _QUOTA_CODES.search(error.code):
        return True
    return status != 400 and wait_s is None and bool(_QUOTA.search(error.text))  # of 400, the text may repeat the question


def wait_s(headers: Mapping[str, str], body: str) -> float | None:
    """Seconds that a server asks for, in Retry-After (a number or a date), retry-after-ms or its words; None: no word of it."""
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


def advice_on_length(error: ErrorBody, max_tokens: int) -> str:
    """What helps where prompt and reply together, or the reply alone, are longer than the model takes; empty: another fault."""
    if error.parameter in _LIMITS or any(name in error.message for name in _LIMITS) or _CONTEXT.search(error.text):
        return f"lower --max-tokens ({max_tokens}) or shorten the prompt: together they are more than the model takes"
    return ""
