"""The negatives of past iterations on disk: `negatives/iteration-t.jsonl`, a chunk at a time.

Each chunk ends with a line that counts and digests it, so that what a killed run left unfinished, or damage, is found
and drawn again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.quality.cases import Case
from qcrd_fast.runs.folder import negatives_name
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.utils.files import append_lines, read_lines, write_lines


@dataclasses.dataclass(frozen=True)
class Negative:
    """A sampled rationale: its tokens (with EOS where the sampling reached it), its text, and what it says (see
    `student_answers`)."""

    tokens: TokenIds
    text: str
    truncated: bool = False  # before EOS
    case: Case | None = None


def was_cut(tokens: TokenIds, eos: int) -> bool:
    """Whether the sampling stopped before EOS."""
    return eos not in tokens[-1:]


class NegativeStore:
    """What was said in each iteration, by chunk and question id. Rank 0 reads and writes the files, all ranks know
    them.

    ids: of the training questions, as `schedule` counts them. kept: iterations before the latest that stay in memory.
    """

    def __init__(self, folder: Path, schedule: Schedule, ids: Sequence[str], comm: Comm = SINGLE, kept: int = 1):
        self.folder, self.schedule, self.comm = folder, schedule, comm
        self._ids, self._kept = ids, kept
        # by iteration and chunk, in the order of the file
        self._by_iteration: dict[int, dict[int, dict[str, Negative]]] = {}

    def path(self, iteration: int) -> Path:
        return self.folder / negatives_name(iteration)

    def ids(self, iteration: int, chunk: int) -> list[str]:
        """The questions of a chunk."""
        return [self._ids[i] for i in self.schedule.chunk_questions(iteration, chunk)]

    def chunks(self, iteration: int) -> dict[int, dict[str, Negative]]:
        """The chunks of an iteration that are in the store. What stands behind the first damaged one is drawn again."""
        if iteration in self._by_iteration:
            return self._by_iteration[iteration]
        self._by_iteration = {i: by_chunk for i, by_chunk in self._by_iteration.items() if i >= iteration - self._kept}
        by_chunk = self._by_iteration[iteration] = {}
        for record in self.comm.on_rank0(lambda: self._read(iteration)):
            if "end" not in record:
                by_chunk.setdefault(record["chunk"], {})[record["id"]] = Negative(
                    record["tokens"], record["text"], record.get("cut", False)
                )
        return by_chunk

    def append(self, iteration: int, chunk: int, found: Mapping[str, Negative]) -> None:
        """Keep a chunk that was drawn; it is on the disk when this returns."""
        self.chunks(iteration)[chunk] = dict(found)
        records: list[dict[str, Any]] = [
            {"chunk": chunk, "id": i, "tokens": n.tokens, "text": n.text} | ({"cut": True} if n.truncated else {})
            for i, n in found.items()
        ]
        end = {"chunk": chunk, "end": len(records), "sha256": digest(records)}
        self.comm.on_rank0(lambda: append_lines(self.path(iteration), [*records, end], durable=True))

    def truncate_after(self, iteration: int) -> None:
        """Forget what was said in later iterations than this one; -1: everything. A run that goes on from here may be
        another: of other rows, or not to the bit the one that said it."""

        def remove() -> None:
            for path in self.folder.glob("iteration-*.jsonl"):
                number = path.stem.removeprefix("iteration-")
                if number.isdecimal() and int(number) > iteration:
                    path.unlink()

        self.comm.on_rank0(remove)

    def _read(self, iteration: int) -> list[dict[str, Any]]:
        """The records of an iteration's whole chunks; the file is cut behind them."""
        self.folder.mkdir(exist_ok=True)
        path = self.path(iteration)
        chunks: set[int] = set()
        whole: list[dict[str, Any]] = []
        pending: list[dict[str, Any]] = []
        for record in read_lines(path):
            pending.append(record)
            if "end" in record:
                if not self._is_whole(iteration, pending, chunks):
                    break
                chunks.add(record["chunk"])
                whole += pending
                pending = []
        if path.exists():
            write_lines(path, whole)  # without the tail that a killed run left
        return whole

    def _is_whole(self, iteration: int, records: list[dict[str, Any]], chunks: set[int]) -> bool:
        """Whether these are the records of one chunk, all its questions and no other, as they were written."""
        *rows, end = records
        chunk = end.get("chunk")
        if type(chunk) is not int or not 0 <= chunk < len(self.schedule.first_steps(iteration)) or chunk in chunks:
            return False
        return (
            end["end"] == len(rows)
            and [r.get("id") for r in rows] == self.ids(iteration, chunk)
            and end.get("sha256") == digest(rows)
            and all(_is_said(r, chunk) for r in rows)
        )


def _is_said(row: dict[str, Any], chunk: int) -> bool:
    """Whether a row is of the kind that `NegativeStore.append` writes, whatever the digest says."""
    tokens = row.get("tokens")
    if type(row.get("chunk")) is not int or row["chunk"] != chunk or not isinstance(row.get("text"), str):
        return False
    return isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """sha256 of what a chunk's rows say."""
    said = repr([(r.get("chunk"), r.get("id"), r.get("tokens"), r.get("text")) for r in rows])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
