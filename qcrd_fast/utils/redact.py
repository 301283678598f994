"""Keeps secrets out of logs and tracebacks. Standard library only."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8  # a shorter value is more likely a word than a secret
_PATTERNS = (
    (re.compile(r"\b(hf_|sk-|ghp_)[\w-]{12,}"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"(?i)\b((?:api[_-]?key|password|secret)\s*[=:]\s*['\"]?)[^\s'\"&,;]{6,}"), r"\1***"),
    (re.compile(r"://[^\s/@]+@"), "://***@"),
)
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_given: set[str] = set()  # values that options gave


def hide_also(*values: Iterable[str]) -> None:
    """Let `redact` also remove these values, such as those of headers; short ones are taken for words."""
    _given.update(value for group in values for value in group if len(value) >= SHORTEST)


def redact(text: str) -> str:
    """Remove secrets from `text`: secret environment values, `hide_also`, keys, tokens and URL passwords."""
    for value in sorted(_given, key=len, reverse=True):
        text = text.replace(value, "***")
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, "***")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Log formatter that removes secrets and escapes control characters: rows and models may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(redact(super().format(record)))


def harmless(text: str) -> str:
    """Escape control characters except newline and tab, and characters that change the writing direction."""
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
