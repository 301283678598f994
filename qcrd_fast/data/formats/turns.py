"""Parse conversations: turns with role and content (chat APIs), or from and value (ShareGPT)."""

from __future__ import annotations

import json
import re
from typing import Any

from qcrd_fast.data.messages import is_reasoning_part, is_text_part, read_message
from qcrd_fast.data.schema import RowError, check_text

_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_TEMPLATES = (  # of chat models: the role and what was said
    re.compile(r"<\|im_start\|>\s*(\w+)[ \t]*\n?(.*?)(?:<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL),
    re.compile(
        r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|(?=<\|start_header_id\|>)|\Z)",
        re.DOTALL,
    ),
    re.compile(r"<start_of_turn>\s*(\w+)[ \t]*\n?(.*?)(?:<end_of_turn>|(?=<start_of_turn>)|\Z)", re.DOTALL),
    re.compile(
        r"<\|start\|>\s*(\w+)[^<]*(?:<\|channel\|>\w+)?<\|message\|>(.*?)(?:<\|end\|>|(?=<\|start\|>)|\Z)", re.DOTALL
    ),
    re.compile(
        r"<[|\uff5c](user|assistant|system)[|\uff5c]>(.*?)(?=<[|\uff5c]\w+[|\uff5c]>|</s>|\Z)",
        re.DOTALL | re.IGNORECASE,
    ),
)
_INST = re.compile(r"(?:<s>)?\s*\[INST\]\s*(<<SYS>>.*?<</SYS>>)?((?:(?!\[/?INST\]).)*)\[/INST\]\s*", re.DOTALL)


def is_turns(value: Any) -> bool:
    """Return whether a value is a conversation: a list of objects with a role and content."""
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict) and any(key in turn for key in _ROLE_KEYS) and any(key in turn for key in _CONTENT_KEYS)
    )


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
            raise RowError(
                f"{where} has {len(said[role])} turns of the {role} in a row; one question and one reply are read"
            )
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
    """Return a message's text, after its separate reasoning.

    Raises:
        RowError: it says nothing, or no text.
    """
    content = next((turn[key] for key in (*_CONTENT_KEYS, "text") if turn.get(key) is not None), None)
    content = [content] if is_text_part(content) else content
    if isinstance(content, list) and not all(is_reasoning_part(part) or is_text_part(part) for part in content):
        raise RowError("content has parts that are not text")
    if not isinstance(content, list | None):
        check_text(content, "content")
    said = read_message({**turn, "content": content})
    if content is None and not said.reasoning:
        raise RowError("content is null" if turn.keys() & set(_CONTENT_KEYS) else "missing key 'content'")
    check_text(said.content or "", "content")
    check_text(said.reasoning, "reasoning")
    return said.text


def unwrap_template(text: str, where: str) -> tuple[str, bool]:
    """Return the user's turn of a rendered chat template and whether it has a system prompt; else the text.

    Raises:
        RowError: it holds no turn of the user, several, or a reply.
    """
    found: list[tuple[str, str]] = []
    for pattern in _TEMPLATES:
        if pattern.search(text):
            found = [(match[1].casefold(), match[2].strip()) for match in pattern.finditer(text)]
            break
    else:
        if (match := _INST.fullmatch(text.strip())) is None:
            if "[INST]" in text and "[/INST]" in text:
                raise RowError(f"{where} is a chat template of several turns; one question is read")
            return text, False
        return match[2].strip(), bool(match[1])
    users = [said for role, said in found if _ROLES.get(role) == "user"]
    replies = [said for role, said in found if _ROLES.get(role) == "assistant" and said not in ("", "<think>")]
    if len(users) != 1 or not users[0] or replies:
        raise RowError(
            f"{where} is a chat template with {len(users)} turns of the user and {len(replies)} replies; one question "
            f"is read"
        )
    return users[0], any(_ROLES.get(role) == "system" for role, _ in found)


def as_list(value: Any) -> Any:
    """Convert a columnar or JSON-encoded list of objects to a list; return other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    columns = list(value.values()) if isinstance(value, dict) else []
    if (
        not columns
        or not all(isinstance(column, list) for column in columns)
        or len({len(column) for column in columns}) > 1
    ):
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
