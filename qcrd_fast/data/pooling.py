"""The samples of one question, wherever its rows stand, brought together and voted on one question at a time.

Rows wait in memory, or, where the questions go to a file, beside that file: what is held then grows with the number of rows
and not with their length.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from qcrd_fast.data.answers import TaskGuess, canonical, parse_choices
from qcrd_fast.data.replies import DEFAULT, Reader, answer_text, is_worked
from qcrd_fast.data.schema import BadRow, NumberText, Question, Rationale, RowError, text_key
from qcrd_fast.data.voting import Vote, vote

SPOOL_BYTES = 16 * 1024 * 1024  # of rows that wait in memory before they go to the disk
_FIELDS = ("id", "question", "context", "gold", "majority", "votes", "task", "domain", "split")


class Record(NamedTuple):
    """One row of an input: its question, its samples, and where it stands."""

    question: Question
    samples: tuple[Rationale, ...]
    prepared: bool
    path: str
    line: int


class Pool:
    """Rows by question; use as a context manager. `bad` is told of each that cannot be used, and may raise.

    With `folder`, rows beyond `SPOOL_BYTES` wait in a file there that has no name: nothing of it is left after a kill.
    Raises `OSError` where that file cannot be written.
    """

    def __init__(
        self, bad: Callable[[BadRow], None], task: str | None = None, folder: Path | None = None, reader: Reader = DEFAULT
    ):
        self.bad, self.task, self.reader = bad, task, reader
        self._spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder)) if folder else None  # noqa: SIM115
        self._end = 0
        self._rows: dict[str, list[Any]] = {}  # by question id: records, or where they stand in the file
        self._guesses: list[tuple[TaskGuess, TaskGuess]] = []  # by input: of gold answers, of samples
        self._paths: list[str] = []
        self.prepared_alone = True  # one input, all of its rows prepared

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._spool:
            self._spool.close()

    def begin(self) -> None:
        """The rows that follow are of another input."""
        self._guesses.append((TaskGuess(), TaskGuess()))
        self._paths.append("")

    def add(self, record: Record) -> None:
        question, (golds, said) = record.question, self._guesses[-1]
        task = self.task or _own_task(question)
        if task is None and question.gold:
            golds.add(_answer_part(question.gold))
        elif task is None and not golds.any:
            for sample in record.samples:
                said.add(answer_text(sample.text) if sample.reply else sample.answer or "")
        self.prepared_alone &= record.prepared
        self._paths[-1] = record.path  # of a folder, the file in it
        record = record._replace(question=dataclasses.replace(question, task=task))
        self._rows.setdefault(question.id, []).append(self._put(record))

    def questions(self, split_by: str, seed: int) -> Iterator[tuple[Question, Vote | None]]:
        """The questions in the order of their first rows; each row is given away once."""
        as_they_are = self.prepared_alone and len(self._paths) == 1 and split_by == "majority"
        for id in list(self._rows):
            group = [self._get(place) for place in self._rows.pop(id)]
            if as_they_are:
                yield from ((record.question, None) for record in group)
                continue
            first, *others = group
            kept = [first]
            for record in others:
                if text_key(first.question) == text_key(record.question):
                    kept.append(record)
                else:
                    place = f"{first.path}:{first.line}"
                    self.bad(BadRow(record.path, record.line, f"id {id!r} is another question at {place}"))
            try:
                yield _merge(kept, split_by, seed, self.reader)
            except RowError as error:
                self.bad(BadRow(first.path, first.line, str(error)))

    def _put(self, record: Record) -> Any:
        source = len(self._paths) - 1
        if self._spool is None:
            return source, record
        question = record.question
        sides = [record.samples] if not record.prepared else [question.positives, question.negatives]
        values = [source, record.line, record.prepared, [_packed(getattr(question, name)) for name in _FIELDS],
                  [[(r.text, _packed(r.answer), r.source, r.score, r.reply) for r in side] for side in sides]]  # fmt: skip
        place = self._end
        self._end += self._spool.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        return place

    def _get(self, place: Any) -> Record:
        if self._spool is None:
            source, record = place
        else:
            self._spool.seek(place)
            source, line, prepared, fields, sides = json.loads(self._spool.readline())
            found = [tuple(Rationale(text, _unpacked(answer), *rest) for text, answer, *rest in side) for side in sides]
            question = Question(*map(_unpacked, fields), *(found if prepared else ()))
            record = Record(question, sum(found, ()), prepared, self._paths[source], line)
        if record.question.task is None:
            golds, said = self._guesses[source]
            task = golds.task if golds.any else said.task
            record = record._replace(question=dataclasses.replace(record.question, task=task))
        return record


def _packed(value: Any) -> Any:
    return [value] if isinstance(value, NumberText) else value


def _unpacked(value: Any) -> Any:
    return NumberText(value[0]) if isinstance(value, list) else value


def _own_task(question: Question) -> str | None:
    """The row's own task, or choice where the question lists choices; None: what the answers of its file look like."""
    choices = parse_choices(question.question)
    if question.task or not choices:
        return question.task
    return "choice" if question.gold is None or canonical(_answer_part(question.gold), "choice", choices) else None


def _answer_part(gold: str) -> str:
    """The answer of a gold that is a worked solution, else the gold."""
    return answer_text(gold) if is_worked(gold) else gold


def _merge(group: list[Record], split_by: str, seed: int, reader: Reader) -> tuple[Question, Vote]:
    """One question from its rows: the first value of each field, and the vote of all samples."""
    first = group[0].question
    fields: dict[str, Any] = {}
    for name in ("context", "gold", "domain", "split"):
        fields[name] = next((v for r in group if (v := getattr(r.question, name)) is not None), None)
    task, choices = first.task or "text", parse_choices(first.question)
    for record in group:
        gold = record.question.gold
        if gold is not None and gold != fields["gold"] and not _same_gold(gold, fields["gold"], task, choices, reader):
            hint = "; if this is what each sample ends in: --map prediction=answer" if record.samples else ""
            raise RowError(f"gold is {fields['gold']!r}, but {gold!r} at {record.path}:{record.line}{hint}")
    solution = None
    if fields["gold"] is not None:
        solution = reader.solution(fields["gold"], task, choices)
        fields["gold"] = _taught_gold(fields["gold"], task, choices, reader)
    samples = [sample for record in group for sample in record.samples]
    if split_by == "gold" and samples:
        if fields["gold"] is None:
            raise RowError(f"question {first.id!r} has no gold answer to split by")
        if canonical(fields["gold"], task, choices) is None:
            gold = fields["gold"]
            raise RowError(f"question {first.id!r}: its gold answer {gold!r} cannot be read as {task}, so not split by")
    result = vote(
        samples,
        seed=seed,
        question_id=first.id,
        task=task,
        choices=choices,
        gold=fields["gold"] if split_by == "gold" else None,
        reader=reader,
    )
    if solution is not None and not samples:
        shown = Rationale(solution.rationale, fields["gold"], "gold")
        result = Vote(fields["gold"], {fields["gold"]: 1}, (shown,), ())
    fields.update(majority=result.majority, votes=result.votes, positives=result.positives, negatives=result.negatives)
    return dataclasses.replace(first, **fields), result


def _same_gold(a: str, b: str, task: str, choices: Sequence[str], reader: Reader) -> bool:
    left, right = reader.answer(a, task, choices)[0], reader.answer(b, task, choices)[0]
    return left is not None and right is not None and reader.same(left, right, task, choices)


def _taught_gold(gold: str, task: str, choices: Sequence[str], reader: Reader) -> str:
    """The gold as it is written, but where only the reader finds the answer in it: then that answer."""
    read, _ = reader.answer(gold, task, choices)
    if read is None or (task == "text" and not is_worked(gold)):
        return gold
    if is_worked(gold):
        return read
    as_written = canonical(gold, task, choices)
    return gold if as_written is not None and as_written == canonical(read, task, choices) else read
