"""Headers and queries of the user's own: how they are given, and which of them are secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qcrd_fast.errors import InputError

Pairs = tuple[tuple[str, str], ...]

_PAIR = re.compile(r"\s*([^\s:=]+)\s*[:=]\s*(.*?)\s*", re.DOTALL)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = ("accept-encoding", "connection", "content-length", "host", "transfer-encoding", "x-client-request-id")
_CREDENTIAL = re.compile(
    r"auth|key|token|secret|password|passwd|cookie|credential|signature|^sig$|^code$", re.IGNORECASE
)
_HARMLESS = re.compile(r"version|title|referer|user-agent|origin|accept|content-type", re.IGNORECASE)
_FIELD = re.compile(r"key$|token$|auth|secret|password|passwd|credential|bearer", re.IGNORECASE)  # of a request's body
_NO_SECRET = re.compile(
    r"(?:stop|eos|bos|eot|pad|sep|mask|unk|begin|start|end|think\w*|cache|author\w*)_?(?:key|token|\b)", re.IGNORECASE
)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_pairs(option: str, given: Any) -> Pairs:
    """Parse `NAME: VALUE` or `NAME=VALUE` pairs, or a mapping; `${NAME}` in a value is an environment variable.

    Raises:
        InputError: a name or a value that cannot be sent, without the value, which may be a key.
    """
    items: Iterable[tuple[str, str]]
    if isinstance(given, Mapping):
        items = [(str(name), str(value)) for name, value in given.items()]
    else:
        found = [(text, _PAIR.fullmatch(text)) for text in given]
        for text, match in found:
            if match is None:
                raise InputError(
                    f"{option}: expected NAME: VALUE or NAME=VALUE; got a text of {len(text)} characters without either"
                )
        items = [(match[1], match[2]) for _, match in found if match]
    return tuple((_name(option, name), _value(option, name, value)) for name, value in items)


def _name(option: str, name: str) -> str:
    if option == "--header" and (not _TOKEN.fullmatch(name) or name.lower() in _OURS):
        raise InputError(f"{option}: {name[:40]!r} is no header that can be given")
    return name


def _value(option: str, name: str, value: str) -> str:
    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{option} {name}: the environment variable {match[1]} is not set")
        return os.environ[match[1]].strip()

    value = _VARIABLE.sub(variable, value)
    if not value or not value.isascii() or not value.isprintable():
        raise InputError(f"{option} {name}: the value is empty or has characters that cannot be sent")
    return value


def is_credential(name: str) -> bool:
    """Whether a header of this name holds a key."""
    return bool(_CREDENTIAL.search(name))


def looks_secret(name: str, value: str) -> bool:
    """Whether a value may be a key: by its name, or by letters and digits without a space."""
    if is_credential(name):
        return True
    mixed = re.search(r"[A-Za-z]", value) and re.search(r"\d", value) and not re.search(r"\s|://|/", value)
    return bool(mixed) and not _HARMLESS.search(name)


def may_be_secret(name: str) -> bool:
    """Return whether a header's name suggests a secret, whatever its value looks like."""
    return is_credential(name) or not _HARMLESS.search(name)


def secret_parts(value: str) -> set[str]:
    """Return a value and its parts, such as the token after Bearer."""
    return {value, *re.split(r"[\s;,=]+", value)}


def secrets_within(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (text, field name) of possible keys in a request's body, at any depth."""
    if isinstance(value, Mapping) and depth < 16:
        for key, item in value.items():
            yield from secrets_within(item, str(key), depth + 1)
    elif isinstance(value, list) and depth < 16:
        for item in value:
            yield from secrets_within(item, name, depth + 1)
    elif (
        isinstance(value, str)
        and _FIELD.search(name)
        and not _NO_SECRET.search(name)
        and not re.search(r"\s", value.strip())
    ):
        yield value, name


def without_secrets(value: Any, name: str = "") -> Any:
    """Return a request's body with secrets masked."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, name) for item in value]
    return "***" if any(secrets_within(value, name)) else value


def masked(pairs: Pairs) -> dict[str, str]:
    """Return names and values with secrets masked."""
    return {name: "***" if looks_secret(name, value) else value for name, value in pairs}
