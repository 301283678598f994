"""Report what an input was recognised as: file type, format, unread keys."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qcrd_fast.data.formats.fields import nearest, plain, role_of
from qcrd_fast.utils.files import printable

MAX_KEYS = 1000  # different keys that are kept by name
_SHOWN_KEYS = 20
SAMPLE_ROLES = ("samples", "completion", "rationale", "messages", "prediction")


@dataclass
class InputReport:
    """Recognised file type and format of one input; filled in while reading."""

    path: str
    file_type: str = ""
    format: str = ""
    title: str = ""
    task: str = ""  # guessed from the answers of rows that name none
    rows: int = 0
    blank_lines: int = 0
    without_sample: int = 0  # rows, of a file in which others have one
    has_split: bool = False  # it is the split of a data set
    repeated_ids: int = 0  # rows of another tool with the id of another question
    other_system: int = 0  # rows whose question another row asks under another system prompt
    unread: collections.Counter[str] = field(default_factory=collections.Counter)

    def add_unread(self, keys: Iterable[str]) -> None:
        for key in sorted(keys):
            if key in self.unread or len(self.unread) < MAX_KEYS:
                self.unread[key] += 1

    @property
    def text(self) -> str:
        """ "took FILE for TYPE, FORMAT: TITLE; N rows; task TASK (a guess)"."""
        name = f"{self.format}: {self.title}" if self.format else "nothing that is read"
        blank = f", {self.blank_lines:,} blank lines" if self.blank_lines else ""
        task = f"; task {self.task} (a guess; --task says otherwise)" if self.task else ""
        kind = ", ".join(filter(None, (self.file_type, name)))
        return f"took {self.path} for {kind}; {self.rows:,} rows{blank}{task}"

    @property
    def warnings(self) -> list[str]:
        """Return warnings about this input."""
        found = []
        if self.without_sample:
            found.append(
                f"{self.path}: {self.without_sample:,} of {self.rows:,} rows have no sample; their questions count"
            )
        if self.repeated_ids:
            found.append(
                f"{self.path}: {self.repeated_ids:,} rows have the id of another question; samples were pooled by "
                f"question"
            )
        if self.other_system:
            found.append(
                f"{self.path}: {self.other_system:,} rows were pooled with a question under another system prompt"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "file_type": self.file_type,
            "format": self.format,
            "task": self.task,
            "rows": self.rows,
            "blank_lines": self.blank_lines,
        }


def keys_not_read(reports: Iterable[InputReport]) -> dict[str, str | None]:
    """{key that was not read: the nearest that is, or None}, most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    for report in reports:
        counts.update(report.unread)
    return {key: nearest(key) for key, _ in counts.most_common()}


def keys_text(keys: dict[str, str | None]) -> str:
    """The keys of `keys_not_read` for a message; empty where there are none."""
    if not keys:
        return ""
    named = [
        f"{printable(key)[:80]!r}" + (f" (nearest that is read: {near!r})" if near else "")
        for key, near in keys.items()
    ]
    more = f", and {len(named) - _SHOWN_KEYS:,} more" if len(named) > _SHOWN_KEYS else ""
    return f"keys not read: {', '.join(named[:_SHOWN_KEYS])}{more}"


def misspelt(keys: dict[str, str | None]) -> list[str]:
    """Of the keys that were not read, those that look like a key of samples."""
    return [
        key
        for key, near in keys.items()
        if near and (role_of(near) in SAMPLE_ROLES or plain(near) in ("positives", "negatives"))
    ]
