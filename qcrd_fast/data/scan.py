"""Scan one input: recognise file type and format, and yield good and bad rows, before pooling."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qcrd_fast.data.files import is_hub_name, open_rows
from qcrd_fast.data.formats import batch, dss
from qcrd_fast.data.formats.fields import ROLES, Parsed, Row, nearest, plain, role_of
from qcrd_fast.data.formats.golds import GOLD
from qcrd_fast.data.formats.registry import NAMES, Context, Format, find_format
from qcrd_fast.data.formats.turns import as_list
from qcrd_fast.data.input_report import SAMPLE_ROLES, InputReport, keys_not_read, keys_text, misspelt
from qcrd_fast.data.pooling import Record
from qcrd_fast.data.schema import BadRow, Question, RowError, require, text_key
from qcrd_fast.data.splits import split_name
from qcrd_fast.data.tables import is_dataset_folder
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable

AHEAD_ROWS = 64  # whose keys tell what a file is
AHEAD_CHARACTERS = 1024 * 1024
_BESIDE = {
    *(
        "context",
        "contexts",
        "passages",
        "facts",
        "fact",
        "document",
        "documents",
        "paragraph",
        "paragraphs",
        "story",
        "table",
    ),
    *("premise", "background", "evidence", "support", "supportingfacts", "articles"),
}  # plain names of what a question may be about; those in `fields.ROLES` come on top


@dataclasses.dataclass
class Scanner:
    """Options for reading inputs. One scanner reads all inputs of a command, so that ids agree.

    `split` must be there; `part` is what a folder of several splits is read for. `mapping` is role: key, as `--map`
    says.

    Raises:
        InputError: an unknown format or role.
    """

    format: str = "auto"
    split: str | None = None
    part: str | None = None
    config_name: str | None = None
    mapping: Mapping[str, str] | str | None = None
    batch_input: str | Path | None = None

    def __post_init__(self) -> None:
        if self.format not in NAMES:
            raise InputError(f"--format is one of {', '.join(NAMES)}; got {self.format!r}")
        self.mapping = parse_mapping(self.mapping)
        self.reports: list[InputReport] = []
        self._ids: dict[bytes, str] = {}  # id of the question with a text, where rows are told apart by it
        # where a key beside a question was first seen, with what value
        self.beside: dict[bytes, tuple[str, bytes]] = {}
        self._owners: dict[bytes, bytes] = {}  # the text that an id of another tool was first seen with
        self._batch: Mapping[str, str] | None = None
        self._answered: set[str] = set()  # requests of the batch that have a line of output

    def scan(self, path: Path) -> Iterator[Record | BadRow]:
        """The rows of one input with their samples as they are.

        Raises:
            InputError: the input cannot be read, or is read with an option that is missing.
        """
        folder = os.path.isdir(path) and not is_dataset_folder(path)
        if folder and self.format not in ("auto", "dss"):
            raise InputError(f"{printable(path)}: a folder is read with --format dss or auto, not {self.format}")
        plain_file = self.format in ("auto", "dss") and not is_dataset_folder(path) and not is_hub_name(path)
        files = dss.find_dss(path, self.split or self.part) if plain_file else None
        name = printable(files.rows if files else path)
        report = InputReport(name)
        self.reports.append(report)
        if dss.is_sample_list(path):
            yield BadRow(name, 1, "a list of samples; name its folder or NAME_{split}.json")
            return
        yield from _Scan(self, path, files, report).records("dss" if folder else self.format)

    def batch(self) -> Mapping[str, str] | None:
        """The questions of `--batch-input`, read once."""
        if self.batch_input is not None and self._batch is None:
            self._batch = batch.questions(self.batch_input)
        return self._batch

    @property
    def warnings(self) -> list[str]:
        """Return warnings about all inputs together."""
        missing = [identity for identity in self._batch or () if identity not in self._answered]
        if not missing:
            return []
        named = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        return [
            f"{len(missing):,} of {len(self._batch or ()):,} requests of --batch-input have no line of output: {named}"
        ]

    def answered(self, identity: Any) -> None:
        """Count a request of the batch as one with a line of output."""
        self._answered.add(str(identity))

    def question_id(self, question: Question) -> tuple[str, bool]:
        """Return the id shared by all rows with this text, and whether this row's id belongs to another question.

        It is the first row's own, or one made of the text, also where another question has that id.
        """
        digest = text_digest(question)
        text = bytes.fromhex(digest)[:16]
        owner = self._owners.setdefault(_short(question.id), text) if question.id else text
        return self._ids.setdefault(text, (question.id if owner == text else "") or digest[:16]), owner != text


class _Scan:
    """The reading of one input."""

    def __init__(self, scanner: Scanner, path: Path, files: dss.DssFiles | None, report: InputReport):
        self.scanner, self.files, self.report = scanner, files, report
        self.rows = files.rows if files else path
        self.found: Format | None = None
        self.kind = "question"
        self.ids: dict[bytes, tuple[int, str]] = {}  # where an id was first seen, with what text
        self.mapped: set[str] = set()  # keys of --map that were there
        self.beside: dict[str, Any] = {}  # what looks like a part of the last row's question and was not read

    def records(self, format: str) -> Iterator[Record | BadRow]:
        where, files = self.report.path, self.files
        samples = dss.iter_samples(files) if files and files.samples else None
        opened = open_rows(
            self.rows, split=self.scanner.split, part=self.scanner.part, config_name=self.scanner.config_name
        )
        head = list(_first_rows(iter(opened)))
        self._decide([value for _, value in head if isinstance(value, dict)], format)
        line, count, unpaired = 1, 0, 0
        for line, value in itertools.chain(head, opened):
            sample = next(samples, None) if samples else None
            unpaired += sample is None
            count += 1
            self.report.has_split = bool(files or opened.split)
            self.report.file_type, self.report.rows, self.report.blank_lines = opened.kind, count, opened.blank_lines
            if isinstance(value, BadRow):
                yield value._replace(path=where, line=line)
                continue
            try:
                parsed = self._parse(require(value), format)
                if isinstance(sample, str) and parsed.kind == "dss":
                    parsed = parsed._replace(samples=(dss.dss_sample(sample, f"{self.rows.parent.name}/llm"),))
                question = self._identify(parsed, line)
                own = bool(parsed.question.id) and not parsed.by_text
                yield Record(question, parsed.samples, parsed.kind == "prepared", where, line, own)
            except RowError as error:
                yield BadRow(where, line, str(error))
            if isinstance(sample, BadRow):
                yield sample
        self.report.blank_lines = opened.blank_lines
        if self.kind != "sampled":
            self.report.without_sample = 0
        total = count - unpaired + sum(1 for _ in samples) if samples else count
        if total != count:
            raise Mismatch(
                BadRow(where, line, f"{count} rows, but {total} samples in {printable(self.rows.parent / 'llm')}")
            )
        assert not isinstance(self.scanner.mapping, str)
        for role, key in (self.scanner.mapping or {}).items():
            if count and key not in self.mapped:
                raise InputError(f"{where}: no row has a key {key!r}, which --map {role}={key} names")

    def _decide(self, rows: list[dict[str, Any]], format: str) -> None:
        """Find the format of the first rows: that of the first; without samples there, that of all their keys."""
        if not rows:
            return
        union: dict[str, Any] = {}
        for values in rows:
            union |= {key: value for key, value in values.items() if union.get(key) in (None, "")}
        if format == "auto" and self.files and self.files.samples and "choices" in union:
            format = "dss"
        first, every = self._row(rows[0]), self._row(union)
        found = find_format(format, first)
        if found and self.scanner.format != "auto" and found.name not in ("native", "dss"):
            self._check_claim(found, every)
        if format == "auto" and (found is None or not self._has_samples(found, first)):
            found = find_format(format, every) or found
        self._take(found)

    def _check_claim(self, forced: Format, row: Row) -> None:
        """Raises `InputError` where the format that `--format` names is not that of the rows."""
        usual = find_format("auto", row)
        other = forced.name in ("questions", "multiple-choice", "worked") and usual and self._has_samples(usual, row)
        if forced.claims(row) and (not other or usual is forced):
            return
        keys = ", ".join(f"{printable(key)[:80]!r}" for key in list(row.values)[:20])
        hint = f"; they look like {usual.name!r} ({usual.title})" if usual else ""
        raise InputError(
            f"{self.report.path}: --format {forced.name} is for {forced.title}, but its rows have {keys}{hint}"
        )

    def _has_samples(self, found: Format, row: Row) -> bool:
        """Return whether a row has samples in this format, or the format stores samples elsewhere."""
        if found.name in ("openai-batch", "openai-batch-input", "dss"):
            return True
        try:
            parsed = found.read(row, Context(self.rows.stem, self.files, None))
        except RowError:
            return False
        return parsed.kind == "prepared" or any(sample.source != GOLD for sample in parsed.samples)

    def _take(self, found: Format | None) -> None:
        if found:
            self.found = found
            self.report.format, self.report.title = found.name, found.title

    def _row(self, values: dict[str, Any]) -> Row:
        mapping = self.scanner.mapping
        assert not isinstance(mapping, str)
        mapping = mapping or {}
        values = _dug(values, mapping)
        for key, value in values.items():
            is_context = isinstance(value, list) and (mapping.get("context") == key or role_of(key) == "context")
            if is_context and value and all(isinstance(item, str) for item in value):
                values = values | {key: "\n".join(value)}
        return Row(values, mapping)

    def _parse(self, values: dict[str, Any], format: str) -> Parsed:
        """Parse a row with the file's format; if unknown yet, with the first format that accepts it."""
        row = self._row(values)
        self.mapped |= row.values.keys() & set(row.mapping.values())
        if self.found is None:
            self._take(find_format(format, row))
        if self.found is None:
            raise RowError(_no_question(row))
        asked = self.scanner.batch() if self.found.name == "openai-batch" else None
        if asked is not None:
            self.scanner.answered(row.values.get("custom_id"))
        try:
            parsed = self.found.read(row, Context(self.rows.stem, self.files, asked))
        except InputError as error:
            raise InputError(f"{self.report.path}: {error}") from None
        except RowError as error:
            if (
                str(error).startswith("missing key 'question'")
                and not row.has("question")
                and "positives" not in row.values
            ):
                raise RowError(_no_question(row)) from None
            raise
        self.report.add_unread(parsed.unread)
        self.beside = {} if {"question", "context"} & row.mapping.keys() else _beside(row, parsed.unread)
        if not parsed.samples and parsed.kind not in ("prepared", "dss") and not row.mapping.keys() & set(SAMPLE_ROLES):
            lost = sorted(key for key in parsed.unread if role_of(key) in SAMPLE_ROLES)
            if lost:
                taken = f"the file was taken for {self.found.name!r} by its first rows, which have none"
                role = role_of(lost[0])
                raise RowError(f"{lost[0]!r} looks like a sample, but {taken}; --map {role}={lost[0]} reads it")
        return parsed

    def _compare(self, question: Question, line: int) -> None:
        """Raise `RowError` if rows of one question differ in values that look like part of it."""
        if not self.beside:
            return
        text = text_digest(question)
        for key, value in self.beside.items():
            digest = hashlib.blake2b(f"{value!r}".encode("utf-8", "replace"), digest_size=8).digest()
            first, other = self.scanner.beside.setdefault(
                _short(f"{text} {key}"), (f"{self.report.path}:{line}", digest)
            )
            if other == digest:
                continue
            if key.endswith("[system]"):
                self.report.other_system += 1
                continue
            role = "question" if role_of(key) == "question" and plain(key) not in ("input", "inputs") else "context"
            raise RowError(
                f"the same question as at {first}, but another {key!r}, which is not read: if this is a part of the "
                f"question, --map {role}={key}; if not, --map question=KEY names the key that has it all"
            )

    def _identify(self, parsed: Parsed, line: int) -> Question:
        """The question with its id, and its split by the usual name.

        Raises:
            RowError: a row without samples after rows with some, or an id that another question has.
        """
        question, kind = dataclasses.replace(parsed.question, split=split_name(parsed.question.split)), parsed.kind
        if kind == "question":
            self.report.without_sample += 1
        among_samples = (
            parsed.by_text and self.kind == "sampled" and not misspelt({key: nearest(key) for key in parsed.unread})
        )
        if kind == "question" != self.kind and not among_samples:
            key = {"prepared": "'positives'", "sampled": "'samples'"}.get(self.kind, "of a sample")
            what = f"missing key {key}" if not parsed.by_text else "no sample"
            raise RowError(f"{what}, which the rows above have")
        self.kind = self.kind if kind == "question" else kind
        given = bool(question.id) and not parsed.by_text
        if not given:
            id, taken = self.scanner.question_id(question)
            self.report.repeated_ids += taken
            self._compare(question, line)
            question = dataclasses.replace(question, id=id)
        if given or kind == "prepared":
            key_of_id = _short(question.id)
            text = text_digest(question)[:16]
            if key_of_id not in self.ids:
                self.ids[key_of_id] = line, text
                return question
            first, other = self.ids[key_of_id]
            if other != text:
                raise RowError(f"id {question.id!r} is another question on line {first}")
            if kind in ("prepared", "question"):
                raise RowError(f"duplicate id {question.id!r}, first on line {first}")
        return question


def _first_rows(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Return the first rows, as many as identify the format, within a bounded number of characters."""
    room = AHEAD_CHARACTERS
    for row in itertools.islice(rows, AHEAD_ROWS):
        yield row
        room -= _size(row[1])
        if room < 0:
            return


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 8


class Mismatch(InputError):
    """The sample file has another number of rows than its questions, so none can be assigned."""

    def __init__(self, row: BadRow):
        super().__init__(str(row))
        self.row = row


def _short(id: str) -> bytes:
    return hashlib.blake2b(id.encode(), digest_size=16).digest()


def text_digest(question: Question) -> str:
    """Return the sha256 of what different spellings of one question share."""
    return hashlib.sha256(text_key(question).encode()).hexdigest()


def parse_mapping(text: Mapping[str, str] | str | None) -> dict[str, str]:
    """{role: key} of `question=instruction,samples=generations`; a role may go by any of its names.

    Raises:
        InputError: an unknown role, a role twice, or no `NAME=KEY`.
    """
    if not text:
        return {}
    pairs = (
        list(text.items())
        if isinstance(text, Mapping)
        else [tuple(part.partition("=")[::2]) for part in text.split(",")]
    )
    found: dict[str, str] = {}
    for name, key in pairs:
        name, key = name.strip(), key.strip()
        role = name if name in ROLES else role_of(name)
        if not key:
            raise InputError(f"--map expects NAME=KEY,NAME=KEY such as question=instruction,gold=answer; got {name!r}")
        if role is None:
            close = difflib.get_close_matches(name, ROLES, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"--map: {name!r} is none of {', '.join(ROLES)}{hint}")
        if role in found:
            raise InputError(f"--map: {role} is given twice, as {found[role]!r} and as {key!r}")
        found[role] = key
    return found


def _beside(row: Row, unread: Iterable[str]) -> dict[str, Any]:
    """Return unread values that look like part of the question, by key."""
    found: dict[str, Any] = {}
    for key in sorted(unread):
        name, bracket, part = key.partition("[")
        if part == "system]" and name in row.values:
            found[key] = [
                turn for turn in as_list(row.values[name]) if isinstance(turn, dict) and _speaks(turn) == "system"
            ]
        elif not bracket and (role_of(key) in ("question", "context") or plain(key) in _BESIDE):
            found[key] = row.values.get(key)
    return found


def _speaks(turn: dict[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _dug(values: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """`values` with the inner values that `--map gold=metadata.answer` names."""
    found = {}
    for key in mapping.values():
        inner: Any = values
        for part in key.split(".") if key not in values and "." in key else ():
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not values and inner is not None:
            found[key] = inner
    return values | found if found else values


def _no_question(row: Row) -> str:
    report = InputReport("")
    report.add_unread(key for key in row.values)
    keys = keys_text(keys_not_read([report])) or "the row has no keys"
    if (named := row.mapping.get("question")) and named not in row.values:
        return f"missing key 'question': --map question={named}, but there is no {named!r}; {keys}"
    for key, value in row.values.items():
        rows = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        if rows and key.isidentifier() and role_of(key) is None and "positives" not in row.values:
            keys += f"; if the rows stand in it: jq -c '.{key}[]' FILE > ROWS.jsonl"
            break
    return f"missing key 'question'; {keys}; --map question=KEY says which it is"
