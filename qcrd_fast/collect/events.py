"""Assemble a reply from server-sent events, for models that are only streamed."""

from __future__ import annotations

import json
import re
from typing import Any

_FIRST = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:(?:data|event|id|retry)?:|(\{))")
_TEXTS = ("text", "thinking", "summary", "reasoning", "reasoning_content")  # of a part
_LINE_END = re.compile(r"\r\n|\n|\r")  # and no other: a text may hold what Unicode takes for a line's end


def is_events(content_type: str, body: bytes) -> bool:
    """Decide by the body's beginning; by content type if that is neither an event nor an object."""
    if first := _FIRST.match(body):
        return not first[1]
    return content_type.strip().lower().startswith("text/event-stream")


def assemble(body: bytes) -> dict[str, Any]:
    """The completion that the events of `body` amount to; an event that is an error is the reply.

    Raises:
        ValueError: an event is not readable, or a choice has no end.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, _Choice] = {}
    for line in _LINE_END.split(body.decode("utf-8-sig", "replace")):
        field, _, data = line.partition(":")
        if field != "data" or not data.strip() or data.strip() == "[DONE]":
            continue
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is no object")
        if event.get("error"):
            return {"error": event["error"]}
        if event.get("object") == "error" or ("message" in event and "choices" not in event):
            return {"error": event}
        whole |= {key: value for key, value in event.items() if key not in ("choices", "object") and value is not None}
        for part in event.get("choices") or []:
            index = part.get("index", 0) if isinstance(part, dict) else None
            if not isinstance(index, int):
                raise ValueError("a choice is no object")
            choices.setdefault(index, _Choice()).add(part)
    if not choices or not all(choice.ended for choice in choices.values()):
        raise ValueError("the events have no end")
    return {**whole, "choices": [choices[index].merged() for index in sorted(choices)]}


class _Choice:
    """Parts of one choice: the values of each key, in order."""

    def __init__(self) -> None:
        self.own: dict[str, list[Any]] = {}
        self.message: dict[str, list[Any]] = {}

    @property
    def ended(self) -> bool:
        return "finish_reason" in self.own

    def add(self, part: dict[str, Any]) -> None:
        delta = part.get("delta")
        for key, value in delta.items() if isinstance(delta, dict) else ():
            if value is not None:
                self.message.setdefault(key, []).append(value)
        for key in ("text", "finish_reason", "stop_reason"):
            if part.get(key) is not None:
                self.own.setdefault(key, []).append(part[key])

    def merged(self) -> dict[str, Any]:
        message = {key: _joined(key, values) for key, values in self.message.items()}
        own = {key: _joined(key, values) for key, values in self.own.items()}
        return own | ({"message": message} if message else {})


def _joined(key: str, values: list[Any]) -> Any:
    """Texts one after the other, lists of parts as if each part had come whole, of anything else the last."""
    if key not in ("role", "finish_reason", "stop_reason"):
        if all(isinstance(value, str) for value in values):
            return "".join(values)
        if all(isinstance(value, list | str) for value in values):
            parts: list[Any] = []
            for value in values:
                for part in value if isinstance(value, list) else [{"type": "text", "text": value}] if value else []:
                    if parts and _continues(parts[-1], part):
                        parts[-1] = {
                            name: _both(name, parts[-1].get(name), part.get(name)) for name in {**parts[-1], **part}
                        }
                    else:
                        parts.append(part)
            return parts
    return values[-1]


def _continues(before: Any, part: Any) -> bool:
    """Whether two parts are pieces of one; parts without a text of their own are not."""
    return (
        isinstance(before, dict)
        and isinstance(part, dict)
        and all(before.get(name) == part.get(name) for name in ("type", "index"))
        and any(before.get(name) and part.get(name) for name in _TEXTS)
    )


def _both(name: str, before: Any, after: Any) -> Any:
    if before is None or after is None:
        return after if before is None else before
    return _joined("", [before, after]) if name in _TEXTS else after
