"""Parse chat messages: content, and reasoning in whatever field or part a server puts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qcrd_fast.data.thinking import drop_tags, split_thinking

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_content", "think", "thought")
# of a part: where its text stands
_INNER = ("thinking", "reasoning_content", "reasoning", "text", "summary", "content")
_DEEPEST = 8


class Message(NamedTuple):
    """One message. `reasoning` may be empty; `content` is None if missing, null or without text."""

    reasoning: str
    content: str | None

    @property
    def text(self) -> str:
        """The reply as a chat model writes it, its reasoning first; without content the reasoning is open."""
        return with_thinking(self.reasoning, self.content or "")


def read_message(message: Mapping[str, Any]) -> Message:
    """Read a message; parts other than text, such as encrypted reasoning or tool calls, are dropped.

    The first field with reasoning counts: servers that fill several repeat themselves. Reasoning that also stands in
    the content, between tags, is taken from there.
    """
    value = message.get("content")
    value = [value] if isinstance(value, Mapping) else value
    thoughts: list[str] = []
    content = None
    if isinstance(value, list):
        parts = [part["text"] if is_text_part(part) else part for part in value]
        said = [part for part in parts if isinstance(part, str)]
        content = "".join(said) if said else None
        thoughts = [text for part in value if is_reasoning_part(part) for text in _texts(part)]
    elif isinstance(value, str):
        content = value
    fields = ("\n".join(_texts(message.get(name))) for name in REASONING_FIELDS)
    reasoning = "\n".join(thoughts) or next((text for text in fields if text.strip()), "")
    reasoning = drop_tags(reasoning).strip()
    if reasoning and content and _same(split_thinking(content).thinking, reasoning):
        reasoning = ""
    return Message(reasoning, content)


def is_reasoning_part(part: Any) -> bool:
    """Whether a part of a message's content is reasoning, be it hidden."""
    return isinstance(part, dict) and part.get("type") in _REASONING_PARTS


def is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and not is_reasoning_part(part)


def with_thinking(thinking: str | None, reply: str) -> str:
    """Return a reply that starts with its reasoning, as chat models write it; without a reply it stays open."""
    if not thinking or not thinking.strip():
        return reply
    closing = f"\n</think>\n\n{reply}" if reply.strip() else ""
    return f"<think>\n{thinking}{closing}"


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts of reasoning: a string, an object that holds one, or a list of either."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < _DEEPEST:
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, dict) and depth < _DEEPEST:
        yield from _texts(next((value[key] for key in _INNER if value.get(key)), None), depth + 1)


def _same(inside: str, field: str) -> bool:
    """Whether the reasoning in a content is that of a field, but for white space."""
    return bool(inside) and " ".join(inside.split()) == " ".join(field.split())
