"""A student's samples in a file, as cases of the questions that they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.data.load import iter_records
from qcrd_fast.data.schema import BadRow, Question, Rationale, text_key
from qcrd_fast.errors import InputError
from qcrd_fast.quality.cases import Case, Tally, silent_share, student_case
from qcrd_fast.utils.files import read_records

TEACHER_READ = 200  # questions whose positives show how often the teacher ends in no answer


class Samples(NamedTuple):
    """Cases by question id, duplicates merged; `strangers`: samples of questions not among those given."""

    cases: dict[str, list[Case]]
    strangers: int


def load_samples(path: str | Path, questions: Sequence[Question]) -> Samples:
    """Load the samples of a file in any format of `prepare`, or of `negatives/iteration-*.jsonl`.

    A row belongs to the question with its text; one without a text, to the question of its id. Samples that were cut
    before their end take the share of the file's readable ones that agree.

    Raises:
        InputError: the file cannot be read, a row is bad, or no row is of these questions.
    """
    by_id, by_text = {q.id: q for q in questions}, {text_key(q): q for q in questions}
    cases: dict[str, list[Case]] = {}
    seen: set[tuple[str, str, str | None]] = set()
    strangers = found = 0
    for question_id, text, samples in _rows(Path(path)):
        question = by_text.get(text) if text else by_id.get(question_id)
        if question is None:
            strangers += len(samples)
            continue
        for sample in samples:
            case = student_case(question, sample)
            key = question.id, case.rationale.text.strip(), case.rationale.answer
            found += 1
            if key not in seen:
                seen.add(key)
                cases.setdefault(question.id, []).append(case)
    if not found:
        raise InputError(f"--samples: {path}: no sample of a question of --data ({strangers} are of others)")
    filled = iter(with_expected([case for some in cases.values() for case in some], questions))
    return Samples({i: [next(filled) for _ in some] for i, some in cases.items()}, strangers)


def with_expected(cases: Sequence[Case], questions: Sequence[Question]) -> list[Case]:
    """Return the cases; those without an answer get their chance to agree (`Tally.fill_unknown`)."""
    tally = Tally()
    for case in cases:
        tally.add(case)
    silent = silent_share(questions[:TEACHER_READ]) if tally.silent else 0.0
    return [tally.fill_unknown(case, silent) for case in cases]


def _rows(path: Path) -> Iterator[tuple[str, str, Sequence[Rationale]]]:
    """(id, text that tells the question, or an empty one, samples) of each row."""
    if stored := _stored(path):
        yield from (
            (record["id"], "", [Rationale(record["text"], truncated=bool(record.get("cut")))]) for record in stored
        )
        return
    for record in iter_records(path):
        if isinstance(record, BadRow):
            raise InputError(str(record))
        yield record.question.id, text_key(record.question), record.samples


def _stored(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of a run's negatives; none where it is no such file."""
    found = []
    try:
        for record in read_records(path, "raise"):
            if "chunk" not in record or not ("text" in record or "end" in record):
                return []
            if "text" in record:
                found.append(record)
    except (OSError, InputError):
        return []
    return found
