"""Read CSV, TSV, parquet and `datasets` rows as objects without empty columns.

pyarrow and datasets are imported where they are needed; the extra `datasets` installs both.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import importlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qcrd_fast.data.formats.fields import ROLES, plain
from qcrd_fast.data.jsonl import MAX_ROW_BYTES
from qcrd_fast.data.schema import MISSING, BadRow, RowError
from qcrd_fast.data.splits import SPLITS
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable
from qcrd_fast.utils.memory import free_bytes
from qcrd_fast.utils.network import is_online

BATCH_ROWS = 64  # of a parquet file or a dataset that are converted at a time
_OPTION = re.compile(r"(?:(?:option|choice|answer|opt)?[ _-]?[a-j]|(?:option|choice|opt)[ _-]?\d{1,2})", re.IGNORECASE)
_DELIMITERS = ",;\t|"
_WORDS = ("None", "N/A", "N/a", "n/a")  # of `MISSING`, which a gold that is an option may be
_GOLDS, _CHOICES = (frozenset(map(plain, ROLES[role])) for role in ("gold", "choices"))


def csv_rows(
    path: str | Path, file: io.BufferedReader, delimiter: str, on_blank: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a CSV or TSV file. The header decides which of `,;|` and tab delimits."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(file)
    header: list[str] | None = None
    reader: Any = None
    start, count = 1, 0
    while True:
        try:
            if reader is None:
                first = next(lines, None)
                if first is None:
                    yield 1, BadRow(printable(path), 1, "the file is empty")
                    return
                if not first.strip():
                    on_blank()
                    continue
                lines.push(first)
                reader = csv.reader(lines, delimiter=_delimiter(first, delimiter), strict=True)
            start = lines.number + 1
            lines.room = MAX_ROW_BYTES
            cells = next(reader, None)
            if cells is None:
                break
            if not cells or (header is not None and not any(map(str.strip, cells))):
                on_blank()
            elif header is None:
                header = _header(cells)
            else:
                count += 1
                yield start, _csv_row(header, cells)
        except RowError as error:
            yield start, BadRow(printable(path), start, str(error))
            if header is None or lines.room < 0:
                return
        except csv.Error as error:
            yield start, BadRow(printable(path), start, f"not CSV: {error}; nothing after it is read")
            return
    if header is not None and not count:
        yield 1, BadRow(printable(path), 1, "a header line and no rows")


class _Lines:
    """Physical lines of a text file, with a bound on one row's size."""

    def __init__(self, file: io.BufferedReader):
        self.file, self.number, self.room = file, 0, MAX_ROW_BYTES
        self._pushed: list[str] = []

    def push(self, line: str) -> None:
        self._pushed.append(line)
        self.number -= 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._pushed:
            self.number += 1
            return self._pushed.pop()
        raw = self.file.readline(self.room + 1)
        self.room -= len(raw)
        if self.room < 0:
            raise RowError(
                f"a row of more than {MAX_ROW_BYTES:,} bytes (or a quote that is not closed); nothing after it is read"
            )
        if not raw:
            raise StopIteration
        self.number += 1
        text = raw.decode("utf-8", "surrogateescape")
        return text[:-2] + "\n" if text.endswith("\r\n") else text


def _delimiter(header: str, default: str) -> str:
    """The delimiter that splits the header into most columns."""
    counts = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in _DELIMITERS}
    return default if counts[default] == max(counts.values()) else max(counts, key=counts.__getitem__)


def _header(cells: list[str]) -> list[str]:
    names = [_utf8(cell).strip() for cell in cells]
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise RowError(f"two columns are named {min(twice)!r}")
    if not any(names):
        raise RowError("the header line names no columns")
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise RowError(f"{len(cells)} cells, but the header has {len(header)}")
    return _present({name: _utf8(cell) for name, cell in zip(header, cells, strict=True) if name})


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """The cells that are not empty, nor say that they are."""
    return {name: value for name, value in row.items() if not _is_missing(name, value, row)}


def _is_missing(name: str, value: Any, row: dict[str, Any]) -> bool:
    """Return whether a cell is empty or says so; in an option column such words are options, and a gold may be one."""
    if not isinstance(value, str):
        return value is None
    word = value.strip()
    if word not in MISSING or _OPTION.fullmatch(name):
        return not word
    return word not in _WORDS or plain(name) not in _GOLDS or not any(_offers(*cell, word) for cell in row.items())


def _offers(name: str, value: Any, word: str) -> bool:
    """Whether a cell holds an option that is `word`: of its own, or in a list of them."""
    if isinstance(value, str) and _OPTION.fullmatch(name):
        return value.strip() == word
    return plain(name) in _CHOICES and any(f"{mark}{word}{mark}" in str(value) for mark in "'\"")


def _utf8(cell: str) -> str:
    if not cell.isascii() and (odd := next((c for c in cell if "\udc80" <= c <= "\udcff"), None)):
        raise RowError(f"not UTF-8: byte 0x{ord(odd) - 0xDC00:02x}; save the file as UTF-8")
    return cell


def parquet_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Each row of a parquet file, with its number."""
    parquet = _library("pyarrow.parquet", path)
    lines = iter(range(1, sys.maxsize))
    try:
        with parquet.ParquetFile(path) as file:
            meta = file.metadata
            largest = max((meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)), default=0)
            if largest > free_bytes():
                raise RowError(
                    f"a row group of {largest:,} bytes, more than the memory that is free; write smaller row groups"
                )
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                yield from _arrow_rows(path, batch, lines)
            if not meta.num_rows:
                yield 1, BadRow(printable(path), 1, "no rows")
    except RowError:
        raise
    except (OSError, ValueError) as error:  # what pyarrow raises
        line = next(lines)
        yield (
            line,
            BadRow(printable(path), line, f"not readable as parquet: {_first_line(error)}; nothing after it is read"),
        )


def _arrow_rows(path: str | Path, batch: Any, lines: Iterator[int]) -> Iterator[tuple[int, Any]]:
    parts: Iterable[Any] = [batch]
    if batch.nbytes > MAX_ROW_BYTES:
        parts = (batch.slice(i, 1) for i in range(batch.num_rows))
    for part in parts:
        if part.num_rows == 1 and part.nbytes > MAX_ROW_BYTES:
            line = next(lines)
            yield (
                line,
                BadRow(printable(path), line, f"a row of {part.nbytes:,} bytes; at most {MAX_ROW_BYTES:,} are read"),
            )
            continue
        for row in part.to_pylist():
            # a column is there for every row; a null means that this row lacks the key
            found = {key: _plain(value) for key, value in row.items()}
            yield next(lines), _present(found) | {key: found[key] for key in found.keys() & {"majority"}}


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    return value


def is_dataset_folder(path: str | Path) -> bool:
    """Return whether `save_to_disk` of a Dataset or DatasetDict wrote `path`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def load_dataset(
    path: str | Path, split: str | None, part: str | None, config_name: str | None, *, folder: bool
) -> tuple[Any, str, list[str]]:
    """(dataset, name of its split or "", the other splits) of a folder or of a data set of the hub.

    Raises:
        InputError: `datasets` is not installed, the data set is not readable, or has no such split.
    """
    if not folder and not is_online():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # from the cache or not at all, without its retries
    datasets = _library("datasets", path)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        name = os.fspath(path)
        found = datasets.load_from_disk(name) if folder else datasets.load_dataset(name, config_name)
    except Exception as error:  # whatever the library, the network or the builder raise
        what = "not readable as a `datasets` folder" if folder else "no such file here, and not readable from the hub"
        raise InputError(f"{printable(path)}: {what}: {_first_line(error)}") from error
    if not isinstance(found, dict):
        own = str(getattr(found, "split", None) or "")
        names = {own, os.path.basename(os.path.abspath(path))} if folder else {own}
        return found, split if split and split in names else "", []
    chosen = _split(list(found), split, part, path)
    return found[chosen], chosen, [name for name in found if name != chosen]


def _split(names: list[str], split: str | None, part: str | None, path: str | Path) -> str:
    wanted = split or part or "train"
    if wanted in names:
        return wanted
    usual = next((usual for usual in SPLITS.values() if wanted in usual), ()) if not split else ()
    if close := [name for name in usual if name in names]:
        return close[0]
    if len(names) == 1 and not split:
        return names[0]
    how = (
        f"--split NAME picks one, or name {printable(path)}/SPLIT" if os.path.isdir(path) else "--split NAME picks one"
    )
    raise InputError(f"{printable(path)}: no split {wanted!r} (there: {', '.join(names)}); {how}")


def dataset_rows(path: str | Path, dataset: Any) -> Iterator[tuple[int, Any]]:
    """Each row of a `datasets.Dataset`, with its number."""
    lines = iter(range(1, sys.maxsize))
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):  # as arrow: no image or sound is decoded
        yield from _arrow_rows(path, table, lines)
    if not len(dataset):
        yield 1, BadRow(printable(path), 1, "no rows")


def _library(name: str, path: str | Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise InputError(
            f"{printable(path)}: reading this needs {package}, which is not installed ({error}); "
            "install it with: pip install 'qcrd-fast[datasets]'"
        ) from None


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return "".join(c if c.isprintable() else " " for c in text)[:300]
