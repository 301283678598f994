"""Batch files of the OpenAI API and compatible servers: replies in the output, questions in the input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcrd_fast.data.files import open_rows
from qcrd_fast.data.formats import golds
from qcrd_fast.data.formats.fields import Parsed, Row
from qcrd_fast.data.formats.samples import read_sample
from qcrd_fast.data.formats.turns import exchange, is_turns
from qcrd_fast.data.schema import BadRow, Rationale, RowError, check_text, get_text, require
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable


def is_output(row: Row) -> bool:
    return "custom_id" in row.values and ("response" in row.values or "error" in row.values)


def is_input(row: Row) -> bool:
    return "custom_id" in row.values and isinstance(row.values.get("body"), dict)


def read_input(row: Row) -> Parsed:
    """A request of a batch: its question, without samples."""
    identity = get_text(row.values, "custom_id", required=True, numbers=True)
    question = _asked(row.values["body"])
    row.read |= {"custom_id", "body", "method", "url"}
    return Parsed(golds.make_question(Row({"id": identity}), question), kind="question", unread=row.unread())


def questions(path: str | Path) -> dict[str, str]:
    """{custom_id: question} of a batch's input file.

    Raises:
        InputError: the file cannot be read, or a row of it, as `file:line: reason`.
    """
    found: dict[str, str] = {}
    for line, value in open_rows(path):
        try:
            if isinstance(value, BadRow):
                raise RowError(value.reason)
            row = Row(require(value))
            if not is_input(row):
                raise RowError("--batch-input expects requests with custom_id and body")
            identity = get_text(row.values, "custom_id", numbers=True) or ""
            if identity in found:
                raise RowError(f"duplicate custom_id {identity!r}")
            found[identity] = _asked(row.values["body"])
        except RowError as error:
            raise InputError(f"{printable(path)}:{line}: {error}") from None
    return found


def read(row: Row, asked: Mapping[str, str] | None) -> Parsed:
    """A reply of a batch with all of its choices.

    Raises:
        InputError: `asked`, the questions of the input, is None.
        RowError: the request failed, or is not in the input.
    """
    if asked is None:
        raise InputError("a batch's output does not hold the questions; name the batch's input with --batch-input FILE")
    identity = get_text(row.values, "custom_id", required=True, numbers=True) or ""
    row.read |= {"custom_id", "response", "error", "id"}
    response = row.values.get("response")
    status = response.get("status_code", 200) if isinstance(response, dict) else None
    if row.values.get("error") or status != 200:
        raise RowError(f"request {identity!r} failed: {_why(row.values, status)}")
    if identity not in asked:
        raise RowError(f"custom_id {identity!r} is not in --batch-input")
    body = response.get("body", response) if isinstance(response, dict) else None
    if not isinstance(body, dict):
        raise RowError("response has no body")
    samples = _replies(body, row.parts)
    question = golds.make_question(Row({"id": identity}), asked[identity])
    return Parsed(question, samples, unread=row.unread())


def _why(values: Mapping[str, Any], status: Any) -> str:
    response = values.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    error = values.get("error") or (body.get("error") if isinstance(body, dict) else None)
    said = error.get("message") or error.get("code") if isinstance(error, dict) else error
    text = " ".join(str(said if said is not None else "no reason given").split())[:200]
    return f"{text}" + (f" (status {status})" if status not in (None, 200) else "")


def _asked(body: Mapping[str, Any]) -> str:
    """The question of a request to chat completions, completions or responses."""
    for key in ("messages", "input", "prompt"):
        value = body.get(key)
        if isinstance(value, list) and is_turns(value):
            question, reply, _ = exchange(value, f"body.{key}")
            if question is None or reply is not None:
                raise RowError(f"body.{key} expects one question of the user")
            return question
        if value is not None:
            return check_text(value, f"body.{key}")
    raise RowError("body has no messages, input or prompt")


def _replies(body: Mapping[str, Any], unread: set[str]) -> tuple[Rationale, ...]:
    model = body.get("model") if isinstance(body.get("model"), str) else None
    if isinstance(body.get("choices"), list):
        found = [read_sample(choice, f"choices[{index}]", unread) for index, choice in enumerate(body["choices"])]
        return tuple(Rationale(sample.text, None, model, reply=True, truncated=sample.truncated) for sample in found)
    if isinstance(body.get("output"), list):  # of the responses endpoint: reasoning, tool calls and messages
        parts = [part for item in body["output"] if isinstance(item, dict) for part in item.get("content") or ()]
        said = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        text = check_text("".join(said), "output")
        return (Rationale(text, None, model, reply=True, truncated=body.get("status") == "incomplete"),)
    raise RowError("the body of the response has no choices")
