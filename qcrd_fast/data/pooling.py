"""Pool the samples of each question over all rows, and vote one question at a time.

Rows wait in memory, or, where the questions go to a file, beside that file: what is held then grows with the number of
rows and not with their length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
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
_FIELDS = (
    "id", "question", "context", "gold", "majority", "votes", "task", "domain", "split", "view", "critique", "weight",
)  # fmt: skip
_rest = operator.attrgetter(*(field.name for field in dataclasses.fields(Rationale)[2:]))  # of a sample, as a tuple


class Record(NamedTuple):
    """One row of an input: question, samples, and place."""

    question: Question
    samples: tuple[Rationale, ...]
    prepared: bool
    path: str
    line: int
    own: bool = False  # a row of the project's with an id: no other id of such a row means this question


class Pool:
    """Rows by question, as a context manager. `bad` is called for each unusable row, and may raise.

    With `folder`, rows beyond `SPOOL_BYTES` wait in a file there that has no name: nothing of it is left after a kill.
    Raises `OSError` where that file cannot be written.
    """

    def __init__(
        self,
        bad: Callable[[BadRow], None],
        task: str | None = None,
        folder: Path | None = None,
        reader: Reader = DEFAULT,
    ):
        self.bad, self.task, self.reader = bad, task, reader
        self._spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder)) if folder else None  # noqa: SIM115
        self._end = 0
        self._rows: dict[str, list[Any]] = {}  # by id, after NUL where text tells: records, or their place
        self._guesses: list[tuple[TaskGuess, TaskGuess]] = []  # by input: of gold answers, of samples
        self._paths: list[str] = []
        self._own: set[str] = set()  # ids of our rows, where other rows have to be told from them
        self.renamed = 0  # questions of other tools with the id of another question of ours
        self.in_several_splits = 0  # questions
        self.prepared_alone = True  # one input, all of its rows prepared

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool:
            self._spool.close()

    def begin(self) -> None:
        """The rows that follow are of another input."""
        self._guesses.append((TaskGuess(self.reader.decimal), TaskGuess(self.reader.decimal)))
        self._paths.append("")

    def add(self, record: Record) -> None:
        question, (golds, said) = record.question, self._guesses[-1]
        task, decimal = self.task or _own_task(question), self.reader.decimal
        if task is None and question.gold:
            golds.add(_answer_part(question.gold, decimal))
        elif task is None and not golds.any:
            for sample in record.samples:
                said.add(answer_text(sample.text, decimal) if sample.reply else sample.answer or "")
        self.prepared_alone &= record.prepared
        self._paths[-1] = record.path  # of a folder, the file in it
        record = record._replace(question=dataclasses.replace(question, task=task))
        self._rows.setdefault(question.id if record.own else f"\0{question.id}", []).append(self._put(record))

    @property
    def guesses(self) -> list[str | None]:
        """By input, the task of its rows that name none; None where all do or no answer is there."""
        return [_guessed(golds, said) for golds, said in self._guesses]

    def questions(self, split_by: str, seed: int) -> Iterator[tuple[Question, Vote | None]]:
        """The questions in the order of their first rows; each row is given away once."""
        if self._voted_on and split_by == "majority":
            yield from ((record.question, None) for record in self._records())
            return
        for group in self._groups():
            mine = _held_out(group)
            if len(mine) < len(group):
                self.in_several_splits += 1
                mine[0] = mine[0]._replace(question=dataclasses.replace(mine[0].question, id=group[0].question.id))
            try:
                yield _merge(mine, split_by, seed, self.reader)
            except RowError as error:
                self.bad(BadRow(group[0].path, group[0].line, str(error)))

    def check(self) -> None:
        """Tell `bad` of rows that contradict each other, without a vote. In place of `questions`."""
        for group in () if self._voted_on else self._groups():
            try:
                _merged_fields(_held_out(group), self.reader)
            except RowError as error:
                self.bad(BadRow(group[0].path, group[0].line, str(error)))

    @property
    def _voted_on(self) -> bool:
        """Whether the rows are those of one prepared file: they stay as they are."""
        return self.prepared_alone and len(self._paths) == 1

    def _records(self) -> Iterator[Record]:
        self._join()
        for id in list(self._rows):
            yield from map(self._get, self._rows.pop(id))

    def _groups(self) -> Iterator[list[Record]]:
        """The rows of each question; those of another question are told of and left out."""
        self._join()
        for id in list(self._rows):
            group = [self._get(place) for place in self._rows.pop(id)]
            first, *others = group
            if not id.startswith("\0") or id[1:] in self._own:
                if id.startswith("\0"):  # the id of another tool, which one of our rows has for another question
                    id = hashlib.sha256(text_key(first.question).encode()).hexdigest()[:16]
                    self.renamed += 1
                first = first._replace(question=dataclasses.replace(first.question, id=id))
            kept = [first]
            for record in others:
                if text_key(first.question) == text_key(record.question):
                    kept.append(record)
                else:
                    place = f"{first.path}:{first.line}"
                    self.bad(BadRow(record.path, record.line, f"id {id!r} is another question at {place}"))
            yield kept

    def _join(self) -> None:
        """Pool rows keyed by text with rows that have an id for the same question."""
        told = [key for key in self._rows if key.startswith("\0")]
        self._own = {key for key in self._rows if not key.startswith("\0")} if told else set()
        if not self._own:
            return
        ids: dict[bytes, list[str]] = {}
        for id in self._rows:
            if id in self._own:
                ids.setdefault(_digest(self._get(self._rows[id][0])), []).append(id)
        for key in told:
            first = self._get(self._rows[key][0])
            same = ids.get(_digest(first), [])
            if len(same) == 1:
                self._rows[same[0]] += self._rows.pop(key)
                self._rows[same[0]].sort(key=_order)
            elif same:
                named = " and ".join(map(repr, same[:2]))
                self.bad(
                    BadRow(
                        first.path, first.line, f"this question has the ids {named}; give the row the one that is meant"
                    )
                )
                del self._rows[key]
        self._rows = dict(sorted(self._rows.items(), key=lambda item: _order(item[1][0])))

    def _put(self, record: Record) -> Any:
        source = len(self._paths) - 1
        if self._spool is None:
            return source, record
        question = record.question
        sides = [record.samples] if not record.prepared else [question.positives, question.negatives]
        packed = [[(r.text, _packed(r.answer), *_rest(r)) for r in side] for side in sides]
        values = [source, record.line, record.prepared, [_packed(getattr(question, name)) for name in _FIELDS], packed]
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
            own: dict[str, Any] = dict(zip(_FIELDS, map(_unpacked, fields), strict=True))
            question = Question(**own | (dict(zip(("positives", "negatives"), found, strict=True)) if prepared else {}))
            record = Record(question, sum(found, ()), prepared, self._paths[source], line)
        if record.question.task is None:
            task = _guessed(*self._guesses[source]) or "text"
            record = record._replace(question=dataclasses.replace(record.question, task=task))
        return record


def _guessed(golds: TaskGuess, said: TaskGuess) -> str | None:
    guess = golds if golds.any else said
    return guess.task if guess.any else None


def _digest(record: Record) -> bytes:
    return hashlib.blake2b(text_key(record.question).encode(), digest_size=16).digest()


def _order(place: Any) -> Any:
    """Return the sort key of a place: the rows' order."""
    return place if isinstance(place, int) else (place[0], place[1].line)


def _packed(value: Any) -> Any:
    return [value] if isinstance(value, NumberText) else value


def _unpacked(value: Any) -> Any:
    return NumberText(value[0]) if isinstance(value, list) else value


def _own_task(question: Question) -> str | None:
    """Return the row's task, or choice if it lists choices; None: guess from its file's answers."""
    choices = parse_choices(question.question)
    if question.task or not choices:
        return question.task
    return "choice" if question.gold is None or canonical(_answer_part(question.gold), "choice", choices) else None


def _answer_part(gold: str, decimal: str = "point") -> str:
    """The answer of a gold that is a worked solution, else the gold."""
    return answer_text(gold, decimal) if is_worked(gold) else gold


def _held_out(group: list[Record]) -> list[Record]:
    """A question's rows of one split and those without: of several splits, the one that is trained on last."""
    splits = {record.question.split for record in group} - {None}
    if len(splits) < 2:
        return group
    ranked = ("test", "validation", *(record.question.split for record in group if record.question.split != "train"))
    chosen = next(split for split in ranked if split in splits)
    return [record for record in group if record.question.split in (None, chosen)]


def _merged_fields(group: list[Record], reader: Reader) -> dict[str, Any]:
    """The first value of each field of a question's rows. Raises `RowError` where they differ in the gold answer."""
    first = group[0].question
    fields: dict[str, Any] = {}
    for name in ("context", "gold", "domain", "split", "critique", "weight"):
        fields[name] = next((v for r in group if (v := getattr(r.question, name)) is not None), None)
    for record in group:
        gold = record.question.gold
        if gold is None or gold == fields["gold"]:
            continue
        if not reader.same_golds(gold, fields["gold"], first.task or "text", parse_choices(first.question)):
            hint = "; if this is what each sample ends in: --map prediction=answer" if record.samples else ""
            if is_worked(gold) and not record.samples:
                hint = "; if these are samples: --map completion=KEY"
            raise RowError(f"gold is {fields['gold']!r}, but {gold!r} at {record.path}:{record.line}{hint}")
    return fields


def _merge(group: list[Record], split_by: str, seed: int, reader: Reader) -> tuple[Question, Vote]:
    """One question from its rows: `_merged_fields`, and the vote of all samples."""
    first, fields = group[0].question, _merged_fields(group, reader)
    task, choices = first.task or "text", parse_choices(first.question)
    solution = None
    if fields["gold"] is not None:
        solution = reader.solution(fields["gold"], task, choices)
        fields["gold"] = _taught_gold(fields["gold"], task, choices, reader)
    views = {record.question.view for record in group}
    fields["view"] = views.pop() if len(views) == 1 else None  # rows of several styles: each sample keeps its own
    samples = [_viewed(sample, record.question.view) for record in group for sample in record.samples]
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
        golds = [record.question.gold for record in group if record.question.gold is not None]
        # all of one answer, as above
        solutions = [found for gold in golds if (found := reader.solution(gold, task, choices))]
        texts = tuple(dict.fromkeys(found.rationale for found in solutions))
        shown = tuple(Rationale(text, fields["gold"], "gold") for text in texts)
        result = Vote(fields["gold"], {fields["gold"]: len(shown)}, shown, ())
    fields.update(majority=result.majority, votes=result.votes, positives=result.positives, negatives=result.negatives)
    return dataclasses.replace(first, **fields), result


def _viewed(sample: Rationale, view: str | None) -> Rationale:
    """The sample with the view of its row, unless it has its own."""
    return sample if view is None or sample.view is not None else dataclasses.replace(sample, view=view)


def _taught_gold(gold: str, task: str, choices: Sequence[str], reader: Reader) -> str:
    """The gold as it is written, but where only the reader finds the answer in it: then that answer."""
    read, _ = reader.answer(gold, task, choices)
    if read is None or (task == "text" and not is_worked(gold)):
        return gold
    if is_worked(gold):
        return read
    as_written = canonical(gold, task, choices)
    return gold if as_written is not None and as_written == canonical(read, task, choices) else read
