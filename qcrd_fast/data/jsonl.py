"""The strict reading of JSON lines and JSON arrays.

Reading is streamed with a bound on every row, so a hostile or broken file costs a bounded amount of memory, and every
fault becomes a `BadRow` that names the line.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qcrd_fast.data.schema import BadRow, RowError
from qcrd_fast.utils.files import printable

MAX_ROW_BYTES = 16 * 1024 * 1024
_CHUNK = 1024 * 1024


def line_rows(path: str | Path, file: io.BufferedReader, on_blank: Callable[[], None]) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of JSONL; a faulty line gives a `BadRow`. `on_blank` counts blank lines."""
    for line in itertools.count(1):
        raw = file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        try:
            if len(raw) > MAX_ROW_BYTES:
                length = len(raw) + _skip_line(file, raw)
                raise RowError(f"a line of {length:,} bytes; at most {MAX_ROW_BYTES:,} are read")
            if raw.isspace():
                on_blank()
                continue
            yield line, _parse_line(raw)
        except RowError as error:
            yield line, BadRow(printable(path), line, str(error))


def _skip_line(file: BinaryIO, raw: bytes) -> int:
    length = 0
    while not raw.endswith(b"\n"):
        raw = file.readline(_CHUNK)
        if not raw:
            break
        length += len(raw)
    return length


def _parse_line(raw: bytes) -> Any:
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    if b"\0" in raw:
        raise RowError(f"a NUL byte at column {raw.index(0) + 1}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from None
    try:
        value, end = _decode(text, 0)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise RowError(f"the line is cut: {error.msg} at column {error.colno}") from None
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    if isinstance(value, BadRow):
        raise RowError(value.reason)
    if text[end:].strip():
        raise RowError(f"more than one JSON value, from column {end + 1}")
    return value


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, or a BadRow without a place, and where it ends.

    Raises:
        RowError: a fault after which the end of the value is not known.
        JSONDecodeError: no JSON, or incomplete.
    """
    faults: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            counts = collections.Counter(key for key, _ in items)
            faults.append(f"duplicate key {counts.most_common(1)[0][0]!r}")
        return result

    def constant(name: str) -> float:
        faults.append(f"{name} is not JSON")
        return 0.0

    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    try:
        value, end = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant).raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise RowError(str(error).split(";")[0]) from None
    return (BadRow("", 0, faults[0]) if faults else value), end


class _ArrayText:
    """Text of a JSON array, read on demand, with the current line number."""

    def __init__(self, file: BinaryIO):
        self.file = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        self.text, self.position, self.line = "", 0, 1

    def more(self) -> bool:
        self.text, self.position = self.text[self.position :], 0
        if len(self.text) > MAX_ROW_BYTES:
            raise RowError(f"no complete row within {MAX_ROW_BYTES:,} characters")
        try:
            chunk = self.file.read(max(_CHUNK, len(self.text)))
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from None
        self.text += chunk
        return bool(chunk)

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.advance(self.position + 1)
            if not self.more():
                return ""

    def value(self) -> Any:
        while True:
            try:
                value, end = _decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if not self.more():
                    raise RowError(f"not JSON, or cut: {error.msg}; nothing after it is read") from None
                continue
            self.advance(end)
            return value


def array_rows(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Each row of a JSON array as (line, value). After a fault of syntax an array cannot be read further."""
    text = _ArrayText(file)
    try:
        text.peek()
        text.advance(text.position + 1)
        if text.peek() == "]":
            raise RowError("the array is empty")
        while True:
            text.peek()
            line, value = text.line, text.value()
            yield line, value._replace(path=printable(path), line=line) if isinstance(value, BadRow) else value
            mark = text.peek()
            if mark == "]":
                return
            if mark != ",":
                raise RowError("the array is cut" if not mark else f"expected ',' or ']', got {mark!r}")
            text.advance(text.position + 1)
    except RowError as error:
        yield text.line, BadRow(printable(path), text.line, str(error))
