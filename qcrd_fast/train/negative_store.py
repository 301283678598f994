"""Store sampled negatives on disk: `negatives/iteration-t.jsonl`, a chunk at a time.

Each chunk ends with a record that holds its count and digest. An unfinished or damaged chunk is detected and sampled
again.
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
from qcrd_fast.utils.files import append_lines, read_records, write_lines


@dataclasses.dataclass(frozen=True)
class Negative:
    """A sampled rationale: tokens (with EOS if sampling reached it), text, and its parsed case (see
    `student_answers`)."""

    tokens: TokenIds
    text: str
    truncated: bool = False  # before EOS
    case: Case | None = None


def was_cut(tokens: TokenIds, eos: int) -> bool:
    """Return whether sampling stopped before EOS."""
    return eos not in tokens[-1:]


class NegativeStore:
    """Sampled negatives by iteration, chunk and question id. Rank 0 reads and writes the files for all ranks.

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
        """Return the stored chunks of an iteration, up to the first damaged one; later chunks are sampled again."""
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
        """Store a chunk. It is on disk when this returns."""
        self.chunks(iteration)[chunk] = dict(found)
        records: list[dict[str, Any]] = [
            {"chunk": chunk, "id": i, "tokens": n.tokens, "text": n.text} | ({"cut": True} if n.truncated else {})
            for i, n in found.items()
        ]
        end = {"chunk": chunk, "end": len(records), "sha256": digest(records)}
        self.comm.on_rank0(lambda: append_lines(self.path(iteration), [*records, end], durable=True))

    def truncate_after(self, iteration: int) -> None:
        """Delete the negatives of iterations after this one; -1: all.

        A resumed run may differ from the one that sampled them: in its rows, or in rounding.
        """

        def remove() -> None:
            for path in self.folder.glob("iteration-*.jsonl"):
                number = path.stem.removeprefix("iteration-")
                if number.isdecimal() and int(number) > iteration:
                    path.unlink()

        self.comm.on_rank0(remove)

    def _read(self, iteration: int) -> list[dict[str, Any]]:
        """Read an iteration's intact chunks and truncate the file after them."""
        self.folder.mkdir(exist_ok=True)
        path = self.path(iteration)
        chunks: set[int] = set()
        whole: list[dict[str, Any]] = []
        pending: list[dict[str, Any]] = []
        for record in read_records(path):
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
        """Return whether these records are one intact chunk: all its questions, no other, as written."""
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
    """Return whether a row has the types that `NegativeStore.append` writes, whatever its digest."""
    tokens = row.get("tokens")
    if type(row.get("chunk")) is not int or row["chunk"] != chunk or not isinstance(row.get("text"), str):
        return False
    return isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return the sha256 of a chunk's rows."""
    said = repr([(r.get("chunk"), r.get("id"), r.get("tokens"), r.get("text")) for r in rows])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
