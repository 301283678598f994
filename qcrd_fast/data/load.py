"""Files to questions: read mixed inputs, pool samples by question, vote, split, and write.

    result = load_questions(["svamp_3_train.json", "svamp_aug_t5_large.json"])
    write_prepared("train.jsonl", result.questions)

Inputs: prepared and sampled JSONL, Mentor-KD's JSON, Distilling Step-by-Step's folders (see `formats`). No torch here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.config import TASKS
from qcrd_fast.data.formats import dss
from qcrd_fast.data.input_report import InputReport, keys_text, misspelt
from qcrd_fast.data.pooling import Pool, Record
from qcrd_fast.data.replies import DEFAULT, Reader
from qcrd_fast.data.scan import Mismatch, Scanner
from qcrd_fast.data.schema import BadRow, Question
from qcrd_fast.data.splits import split_name
from qcrd_fast.data.summary import PrepareSummary, Tally
from qcrd_fast.data.voting import Vote
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.files import own_temporary_name, printable, replacing
from qcrd_fast.utils.memory import require_room

MAX_SPLITS = 20  # names of splits that a message lists
MAX_SKIPPED = 10_000  # bad rows that are kept by name; all are counted


class LoadResult(NamedTuple):
    questions: list[Question]
    summary: PrepareSummary
    skipped: list[BadRow]

    @property
    def taken_for(self) -> str:
        """Format on one line what the inputs were recognised as and which keys were not read."""
        return "; ".join([*self.summary.taken, *filter(None, [keys_text(self.summary.keys_not_read)])])


def load_questions(
    paths: Sequence[str | Path] | str | Path,
    *,
    format: str = "auto",
    split_by: str = "majority",
    split: str | None = None,
    part: str | None = None,
    seed: int = 0,
    on_bad_row: str = "error",
    task: str | None = None,
    config_name: str | None = None,
    mapping: Mapping[str, str] | str | None = None,
    batch_input: str | Path | None = None,
    reader: Reader = DEFAULT,
) -> LoadResult:
    """The questions of one or more inputs, in the order of their first appearance.

    Samples are pooled by id, or by the question's text where a row has no id, and voted on (see `voting.vote`). One
    prepared file alone is taken as it is; pooled with others, its rationales vote again. Of rows that carry a `split`,
    `split` keeps those, and those without one. `part` (default: `split`, else train) is the part of a Distilling
    Step-by-Step folder to read, and filters nothing.
    `split_by="gold"` splits by agreement with the gold answer instead of the majority, and every sampled question must
    have one. `task` overrides the answer type, which is otherwise the row's own, or guessed from the answers of its
    file. `reader` reads and compares replies and answers.

    Raises:
        InputError: an unknown option, a file that cannot be read or is larger than the memory that is free, no question
        at
            all, or, unless `on_bad_row="skip"` sets them aside in `skipped`, the first bad row, as `file:line: reason`.
    """
    for path in _inputs(paths):
        require_room(path)
    tally, skipped = Tally(split_by, reader), list[BadRow]()
    questions = _read(
        _inputs(paths),
        tally,
        skipped,
        format=format,
        split_by=split_by,
        split=split,
        part=part,
        seed=seed,
        on_bad_row=on_bad_row,
        task=task,
        config_name=config_name,
        mapping=mapping,
        batch_input=batch_input,
        reader=reader,
    )
    return LoadResult(list(questions), tally.summary, skipped)


def prepare(
    paths: Sequence[str | Path] | str | Path, output: str | Path, *, dry_run: bool = False, **options: Any
) -> tuple[PrepareSummary, list[BadRow]]:
    """Write the questions of `load_questions(paths, **options)` to `output`; return (summary, rejected rows).

    Works for files larger than memory: rows wait in an unnamed file, and memory grows by about 400 bytes a row.

    Raises:
        InputError: as `load_questions`; or `output` is a device or pipe.
        RunError: the disk is full; nothing is left behind.
    """
    tally = Tally(options.get("split_by", "majority"), options.get("reader", DEFAULT))
    skipped: list[BadRow] = []
    questions = _read(_inputs(paths), tally, skipped, folder=Path(output).parent, must_split=True, **options)
    questions = _trainable(questions, tally, _inputs(paths))
    if not dry_run:
        write_prepared(output, questions)
        return tally.summary, skipped
    try:
        collections.deque(questions, maxlen=0)
    except OSError as error:
        raise RunError(f"cannot keep rows beside {printable(output)}: {error.strerror or error}") from error
    return tally.summary, skipped


def _trainable(questions: Iterator[Question], tally: Tally, inputs: list[Path]) -> Iterator[Question]:
    """Yield the questions. Raises `InputError` after the last if nothing can be learnt from any."""
    yield from questions
    summary = tally.summary
    lost = misspelt(summary.keys_not_read) if not summary.samples else []
    if (
        summary.positives
        or summary.samples > summary.unreadable
        or (summary.with_gold and not summary.samples and not lost)
    ):
        return
    reason = "no question has a sample" + (" (is a key misspelt?)" if lost else " or a gold answer")
    if summary.samples:
        reason = f"of {summary.samples:,} samples none has an answer that can be read"
    if summary.unreadable_examples:
        first = summary.unreadable_examples[0]
        reason += f"; the first: {first['text']!r}: {first['why']} (--show N prints more)"
    told = [
        f"{', '.join(map(printable, inputs))}: nothing to train on: {reason}",
        *summary.taken,
        keys_text(summary.keys_not_read),
    ]
    raise InputError("; ".join(filter(None, told)))


def _inputs(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]


def _read(
    inputs: Sequence[Path],
    tally: Tally,
    skipped: list[BadRow],
    *,
    format: str = "auto",
    split_by: str = "majority",
    split: str | None = None,
    part: str | None = None,
    seed: int = 0,
    on_bad_row: str = "error",
    task: str | None = None,
    config_name: str | None = None,
    mapping: Mapping[str, str] | str | None = None,
    batch_input: str | Path | None = None,
    folder: Path | None = None,
    must_split: bool = False,
    reader: Reader = DEFAULT,
    watch: Callable[[Question, Vote | None], None] | None = None,
) -> Iterator[Question]:
    """Yield the questions of `load_questions`, counted in `tally`; rows wait in `folder` if given."""
    scanner = Scanner(format, split, split or part, config_name, mapping, batch_input)
    tally.reports = scanner.reports
    for name, value, known in (
        ("split-by", split_by, ("majority", "gold")),
        ("on-bad-row", on_bad_row, ("error", "skip")),
        ("task", task, (None, *TASKS)),
    ):
        if value not in known:
            raise InputError(f"--{name} is one of {', '.join(filter(None, known))}; got {value!r}")

    def bad(row: BadRow) -> None:
        if on_bad_row == "error":
            raise InputError(str(row))
        tally.skipped += 1
        if len(skipped) < MAX_SKIPPED:
            skipped.append(row)

    splits, wanted = dict[str, None](), split_name(split)
    with Pool(bad, task, folder, reader) as pool:
        for path in inputs:
            pool.begin()
            for row in scanner.scan(path):
                if isinstance(row, BadRow):
                    bad(row)
                    continue
                own = row.question.split
                if wanted is not None and own is not None and len(splits) < MAX_SPLITS:
                    splits.setdefault(own)
                if wanted is None or own in (None, wanted):
                    pool.add(row)
        if wanted is not None and wanted not in splits and not any(report.has_split for report in scanner.reports):
            there = f" (there: {', '.join(splits)})" if splits else ": neither a file nor a row has a split"
            if splits or must_split:
                raise InputError(f"{', '.join(map(printable, inputs))}: no questions of --split {split}{there}")
        for report, guess in zip(scanner.reports, pool.guesses, strict=True):
            report.task = guess or ""
        for question, vote in pool.questions(split_by, seed):
            tally.add(question, vote)
            if watch:
                watch(question, vote)
            yield question
    tally.notes += scanner.warnings
    if pool.renamed:
        tally.notes.append(
            f"{pool.renamed:,} questions have the id of another question in another file; they got new ids"
        )
    if pool.in_several_splits:
        tally.notes.append(
            f"{pool.in_several_splits:,} questions are in several splits; each is kept in the one that is held out "
            "(test before validation before train), with that split's samples"
        )
    if not tally.summary.questions:
        reason = f"; the first of {tally.skipped} bad rows: {skipped[0]}" if skipped else ""
        raise InputError(f"{', '.join(map(printable, inputs)) or 'no input'}: no questions{reason}")
    if batch_input is not None and not any(report.format == "openai-batch" for report in scanner.reports):
        raise InputError(
            f"--batch-input is for the output of a batch, which no input is: {'; '.join(tally.summary.taken)}"
        )


def iter_records(path: str | Path, format: str = "auto", split: str | None = None) -> Iterator[Record | BadRow]:
    """Every row of one input with its samples as they are, before any pooling or vote.

    Raises:
        InputError: the file cannot be read.
    """
    return Scanner(format, split, split).scan(Path(path))


def validate_file(
    path: str | Path, format: str = "auto", *, reports: list[InputReport] | None = None, **options: Any
) -> Iterator[BadRow]:
    """Yield every bad row of a file, or of all splits of a folder, and what `prepare` would refuse of its questions:
    rows that contradict each other.

    Works for files larger than memory, as `prepare` does; rows wait in an unnamed temporary file. Adds to `reports`
    what the file was recognised as; `options` are those of `Scanner`.

    Raises:
        InputError: the file cannot be read.
        RunError: the disk of temporary files is full.
    """
    path = Path(path)
    splits: list[str | None] = [options.pop("split", None)]
    if os.path.isdir(path) and splits == [None]:
        splits = [s for s in dss.SPLITS if (path / f"{path.resolve().name}_{s}.json").is_file()] or [None]
    for split in splits:
        scanner = Scanner(format, split, split, **options)
        contradictions: list[BadRow] = []
        try:
            with Pool(contradictions.append, folder=Path(tempfile.gettempdir())) as pool:
                pool.begin()
                for row in scanner.scan(path):
                    if isinstance(row, BadRow):
                        yield row
                    else:  # of its samples only that there are some
                        pool.add(row._replace(samples=row.samples[:1]))
                pool.check()
            yield from contradictions
        except Mismatch as error:
            yield error.row
        except OSError as error:
            raise RunError(f"cannot keep rows in {tempfile.gettempdir()}: {error.strerror or error}") from error
        finally:
            if reports is not None:
                reports += scanner.reports


def write_prepared(path: str | Path, questions: Iterable[Question | dict[str, Any]]) -> None:
    """Write questions, or rows of them, as JSONL atomically: readers see the whole file or none.

    Raises:
        InputError: `path` is a device or pipe.
        RunError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    try:
        with (
            replacing(path, own_temporary_name()) as temporary,
            open(temporary, "x", encoding="utf-8", newline="\n") as file,
        ):
            for question in questions:
                row = to_row(question) if isinstance(question, Question) else question
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def to_row(question: Question) -> dict[str, Any]:
    """The row as it is written: keys in the documented order, absent optional ones left out."""
    row = dataclasses.asdict(question)
    row["votes"] = dict(question.votes)
    for side in ("positives", "negatives"):
        row[side] = [
            {k: v for k, v in item.items() if k == "answer" or (v is not None and k not in ("reply", "truncated"))}
            for item in row[side]
        ]
    return {k: v for k, v in row.items() if v is not None or k == "majority"}
