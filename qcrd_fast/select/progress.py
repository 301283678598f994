"""Scores that are done, in a file beside the output, so that the same command goes on after a kill. Imports no
torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from qcrd_fast.data.schema import Question, later_fields
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.select.options import SelectOptions
from qcrd_fast.select.score import RowScores
from qcrd_fast.utils.files import append_whole, open_locked, printable, read_records


class Progress:
    """The file `.NAME.scores.jsonl` beside the output NAME; use as a context manager, which holds a lock on it.

    Its first line says what is scored; `finished` is what it holds of that. Scores of something else stay until the
    first block of this is there, so that a command that is refused loses none. It is deleted by `done`.

    Raises:
        InputError: another process scores into the same output.
        RunError: it cannot be written.
    """

    def __init__(self, output: str | Path, identity: str):
        output = Path(output)
        self.path, self.identity = output.with_name(f".{output.name}.scores.jsonl"), identity
        self.finished: dict[str, RowScores] = {}
        self._file = -1
        self._begun = False  # whether the file is of this identity

    def __enter__(self) -> Progress:
        try:
            self._file = open_locked(self.path, os.O_APPEND | os.O_NOFOLLOW)
            ends: list[int] = []
            held, *lines = list(read_records(self.path, ends=ends)) or [{}]
            self._begun = held.get("scores_of") == self.identity
            if self._begun:
                self.finished = {line["id"]: RowScores(line["row"], line["positives"]) for line in lines}
                os.ftruncate(self._file, ends[-1])  # without a line that a kill cut
        except BlockingIOError:
            raise InputError(
                f"--output: another process scores for {printable(self.path)}; choose another file"
            ) from None
        except OSError as error:
            self._close()
            raise RunError(
                f"cannot write {printable(self.path)}: {error.strerror}; what it holds is kept, the same command goes "
                "on"
            ) from error
        except (KeyError, TypeError, AttributeError) as error:
            self._close()
            raise RunError(f"cannot use {printable(self.path)}: {error}; delete it to begin anew") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            if not os.fstat(self._file).st_size:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def add(self, scores: Mapping[str, RowScores]) -> None:
        """Keep the scores of a block; they are on the disk when this returns."""
        head = [] if self._begun else [{"scores_of": self.identity}]
        try:
            if not self._begun:
                os.ftruncate(self._file, 0)  # the scores of something else
            self._append([*head, *(self._line(*item) for item in scores.items())])
            self._begun = True
        except OSError as error:
            raise RunError(
                f"cannot write {printable(self.path)}: {error.strerror}; what was scored before is kept, the same "
                "command goes on"
            ) from error

    def done(self) -> None:
        """Delete the file: the output is there."""
        self.path.unlink(missing_ok=True)

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        append_whole(self._file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())

    @staticmethod
    def _line(id: str, scores: RowScores) -> dict[str, Any]:
        return {"id": id, **dataclasses.asdict(scores)}


def identity(
    rows: Sequence[Question],
    names: Sequence[str],
    student: str | None,
    options: SelectOptions,
    views: Mapping[str, str] | None = None,
) -> str:
    """sha256 of what the scores depend on. A student's folder is told by the names, sizes and times of its files."""
    digest = hashlib.sha256(repr((list(names), dataclasses.asdict(options), student)).encode())
    if views:
        digest.update(repr(sorted(views.items())).encode("utf-8", "surrogatepass"))
    for row in sorted(rows, key=lambda row: row.id):
        digest.update((repr(row) + later_fields(row)).encode("utf-8", "surrogatepass"))
    if student is not None and os.path.isdir(student):
        files = sorted(path for path in Path(student).iterdir() if path.is_file())
        digest.update(repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]).encode())
    return digest.hexdigest()
