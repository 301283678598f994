"""A reply that came as server-sent events, put together as if it had come whole: some models are served in no other way."""

from __future__ import annotations

import json
from typing import Any


def is_events(content_type: str, body: bytes) -> bool:
    return content_type.strip().lower().startswith("text/event-stream") or body.lstrip()[:5] == b"data:"


def assemble(body: bytes) -> dict[str, Any]:
    """The completion that the events of `body` amount to; an event that is an error is the reply.

    Raises:
        ValueError: an event is not readable, or a choice has no end.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, _Choice] = {}
    for line in body.decode("utf-8", "replace").splitlines():
        field, _, data = line.partition(":")
        if field != "data" or not data.strip() or data.strip() == "[DONE]":
            continue
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is no object")
        if event.get("error"):
            return {"error": event["error"]}
        whole |= {key: value for key, value in event.items() if key not in ("choices", "object") and value is not None}
        for part in event.get("choices") or []:
            index = part.get("index", 0) if isinstance(part, dict) else None
            if not isinstance(index, int):
                raise ValueError("a choice is no object")
            choices.setdefault(index, _Choice()).add(part)
    if not choices or not all(choice.ended for choice in choices.values()):
        raise ValueError("the events have no end")
    return {**whole, "choices": [choices[index].whole() for index in sorted(choices)]}


class _Choice:
    """The parts of one choice: what each key was given, in order."""

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

    def whole(self) -> dict[str, Any]:
        message = {key: _joined(key, values) for key, values in self.message.items()}
        own = {key: _joined(key, values) for key, values in self.own.items()}
        return own | ({"message": message} if message else {})


def _joined(key: str, values: list[Any]) -> Any:
    """Texts and lists one after the other, of anything else the last."""
    if key not in ("role", "finish_reason", "stop_reason"):
        if all(isinstance(value, str) for value in values):
            return "".join(values)
        if all(isinstance(value, list) for value in values):
            return [item for value in values for item in value]
    return values[-1]
