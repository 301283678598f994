"""What a conversation says: turns as chat APIs have them (role and content), and as ShareGPT has them (from and value)."""

from __future__ import annotations

import json
from typing import Any

from qcrd_fast.data.schema import RowError, check_text

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")


def is_turns(value: Any) -> bool:
    """Whether a value is a conversation: a list of objects with a role and what was said."""
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and any(key in turn for key in _ROLE_KEYS) and any(key in turn for key in _CONTENT_KEYS)


def exchange(turns: list[dict[str, Any]], where: str) -> tuple[str | None, str | None, bool]:
    """(question, reply, whether there is a system prompt) of a conversation; either may be missing.

    Raises:
        RowError: several questions or replies, an unknown role, or content that is not text.
    """
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for index, turn in enumerate(turns):
        name, role = _role(turn)
        if role is None:
            raise RowError(f"{where}[{index}] is of {name!r}; read are system, user (human) and assistant (gpt)"[:200])
        if role == "user" and said["assistant"]:
            count = sum(_role(turn)[1] == "user" for turn in turns)
            raise RowError(f"{where} has {count} questions; a conversation of one question and one reply is read")
        try:
            said[role].append(reply_text(turn))
        except RowError as error:
            raise RowError(f"{where}[{index}]: {error}") from None
    for role in ("user", "assistant"):
        if len(said[role]) > 1:
            raise RowError(f"{where} has {len(said[role])} turns of the {role} in a row; one question and one reply are read")
    question, reply = (next(iter(said[role]), None) for role in ("user", "assistant"))
    return question, reply, bool(said["system"])


def has_question(turns: list[dict[str, Any]]) -> bool:
    """Whether a conversation has a question; without one, several turns are several replies."""
    return any(_role(turn)[1] == "user" for turn in turns)


def _role(turn: dict[str, Any]) -> tuple[Any, str | None]:
    """(the role as it is called, as we call it or None)"""
    name = next((turn[key] for key in _ROLE_KEYS if key in turn), None)
    return name, _ROLES.get(name.casefold()) if isinstance(name, str) else None


def reply_text(turn: dict[str, Any]) -> str:
    """What a message says, after its reasoning where that stands apart.

    Raises:
        RowError: it says nothing, or no text.
    """
    content = next((turn[key] for key in (*_CONTENT_KEYS, "text") if turn.get(key) is not None), None)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowError("content has parts that are not text")
        content = "".join(part["text"] for part in content)
    thinking = next((turn[key] for key in _THINKING_KEYS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    if content is None and thinking is None:
        raise RowError("content is null" if turn.keys() & set(_CONTENT_KEYS) else "missing key 'content'")
    text = check_text(content if content is not None else "", "content")
    if thinking is None:
        return text
    closing = "\n</think>\n\n" if text.strip() else ""  # reasoning that never came to a reply is open
    return f"<think>\n{check_text(thinking, 'reasoning')}{closing}{text}"


def as_list(value: Any) -> Any:
    """A list of objects that stands in columns, {"role": [...], "content": [...]}, or in JSON text (in CSV), as a list; else
    `value`."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns) or len({len(column) for column in columns}) > 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
