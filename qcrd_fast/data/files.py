"""Open input files: JSON lines, JSON arrays, CSV, TSV, parquet, gzip, `datasets` folders, hub names.

Reading is streamed with a bound on every row and on what a gzip file expands to. `jsonl` holds the JSON readers,
`tables` those of CSV, parquet and `datasets`; a new file type is added in `open_rows`.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcrd_fast.data import jsonl, tables
from qcrd_fast.data.schema import BadRow, RowError
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable

MAX_RATIO = 200  # decompressed bytes for each byte of a gzip file; text stays below 50
FREE_BYTES = 64 * 1024 * 1024  # decompressed bytes that are read whatever the ratio

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_MAGIC = {
    b"BZh": "a bzip2 file; decompress it first",
    b"\xfd7zXZ": "an xz file; decompress it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; decompress it first",
    b"PK\x03\x04": "a zip archive (or a torch checkpoint, which is never loaded)",
    b"\x93NUMPY": "a numpy array, which may hold a pickle",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x80\x02": "a pickle, which is never loaded",
    b"\x80\x03": "a pickle, which is never loaded",
    b"\x80\x04": "a pickle, which is never loaded",
    b"\x80\x05": "a pickle, which is never loaded",
}
_PEEK = 4096
_INNER_LIST = re.compile(rb'\s*\{\s*"([A-Za-z_]\w*)"\s*:\s*\[\s*\{')
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILE_NAME = re.compile(r"\.(jsonl?|ndjson|csv|tsv|tab|txt|parquet|arrow|gz|bz2|xz|zst|zip)$", re.IGNORECASE)


class Rows:
    """The rows of one input as (line, value), where the value is a `BadRow` if there is a fault.

    `line` is the line of the file where the row begins; in parquet files and datasets, the number of the row.
    """

    def __init__(self, kind: str = "") -> None:
        self.kind = kind  # the file type, for people
        self.split = ""  # of a data set: the split that is read
        self.blank_lines = 0
        self.pairs: Iterator[tuple[int, Any]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self.pairs

    def blank(self) -> None:
        self.blank_lines += 1


def open_rows(
    path: str | Path, *, split: str | None = None, part: str | None = None, config_name: str | None = None
) -> Rows:
    """The rows of a file, a `datasets` folder or a data set of the hub.

    Of a data set with several splits, `split` is read, which must be there; else `part`, under any of its usual names;
    else train. `config_name` is the configuration of a data set of the hub.

    Raises:
        InputError: the input cannot be opened, or has no such split.
    """
    if tables.is_dataset_folder(path) or is_hub_name(path):
        return _dataset(path, split, part, config_name)
    if config_name is not None:
        raise InputError(f"--config-name is for data sets of the hub; {printable(path)} is none")
    return _file(Path(path))


def is_hub_name(path: str | Path) -> bool:
    """Return whether `path` can only be a hub data set: OWNER/NAME, and neither it nor its parent exists here."""
    name = os.fspath(path)
    if not _HUB_NAME.fullmatch(name) or _FILE_NAME.search(name):
        return False
    return not os.path.lexists(name) and not os.path.isdir(os.path.dirname(name))


def _dataset(path: str | Path, split: str | None, part: str | None, config_name: str | None) -> Rows:
    folder = os.path.isdir(path)
    dataset, chosen, others = tables.load_dataset(path, split, part, config_name, folder=folder)
    rows = Rows("`datasets` folder" if folder else "data set of the hub")
    if chosen:
        rows.split = chosen
        rows.kind += f", split {chosen}" + (f" (not read: {', '.join(others)})" if others else "")
    rows.pairs = tables.dataset_rows(path, dataset)
    return rows


def _file(path: Path) -> Rows:
    raw = _open(path)
    rows, packed, file = Rows(), "", raw
    if raw.peek(2).startswith(_GZIP):
        file, packed = io.BufferedReader(_Inflated(raw, path)), "gzip "
    rows.pairs = _closing(raw, _guarded(path, _start(path, file, rows, packed)))
    return rows


def _start(path: Path, file: io.BufferedReader, rows: Rows, packed: str) -> Iterator[tuple[int, Any]]:
    """Look at the first bytes of a file, set `rows.kind`, and read on."""
    name = path.name.lower()
    suffix = os.path.splitext(name.removesuffix(".gz") if packed else name)[1]
    head = file.peek(16)
    fault = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if fault is None and suffix in _PICKLED and head.lstrip()[:1] not in (b"{", b"["):
        fault = "no JSON; a pickle, as its name says, is never loaded"
    if head.startswith(b"PAR1") and packed:
        fault = "a parquet file inside a gzip file; decompress it first"
    if head.startswith(_GZIP) and packed:
        fault = "a gzip file inside a gzip file; decompress it first"
    if not head:
        yield 1, BadRow(printable(path), 1, "the file is empty")
    elif fault:
        yield 1, BadRow(printable(path), 1, f"this is {fault}; rows are UTF-8 JSON, CSV, TSV or parquet")
    elif head.startswith(b"PAR1"):
        rows.kind = "parquet"
        yield from tables.parquet_rows(path)
    else:
        if head.startswith(_BOM):
            file.read(len(_BOM))
        if suffix in _DELIMITERS:
            rows.kind = packed + suffix[1:].upper()
            yield from tables.csv_rows(path, file, _DELIMITERS[suffix], rows.blank)
        elif file.peek(16).lstrip().startswith(b"[") and suffix not in (".jsonl", ".ndjson"):
            rows.kind = f"{packed}JSON array"
            yield from jsonl.array_rows(path, file)
        else:
            rows.kind = f"{packed}JSONL"
            if reason := _spread(file.peek(_PEEK)):
                yield 1, BadRow(printable(path), 1, reason)
                return
            yield from jsonl.line_rows(path, file, rows.blank)


def _spread(head: bytes) -> str | None:
    """Return the fault of a file whose first line starts JSON that continues on later lines."""
    first, newline, rest = head.lstrip().partition(b"\n")
    if not newline or first[:1] not in (b"{", b"[") or first.rstrip()[-1:] not in (b"{", b"[", b","):
        return None
    if first.strip() == b"{" and rest.lstrip()[:1] not in (b'"', b"}"):
        return None
    if first.startswith(b"["):
        return (
            "a JSON array over several lines, which a file called .json may hold; rows of JSONL are one object a line"
        )
    inner = _INNER_LIST.match(head)
    how = f"jq -c '.{inner[1].decode()}[]'" if inner else "jq -c ."
    return (
        "a JSON object over several lines (pretty-printed); rows are one object a line, or an array of objects "
        f"(such as: {how} FILE > ROWS.jsonl)"
    )


def _open(path: Path) -> io.BufferedReader:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{printable(path)}: not a file, nor a folder that `datasets` saved; name the file in it")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise InputError(f"{printable(path)}: not a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{printable(path)}: {getattr(error, 'strerror', None) or error}") from None


def _closing(file: io.BufferedReader, pairs: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    with file:
        yield from pairs


def _guarded(path: Path, pairs: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """`pairs`, and one `BadRow` where the file as a whole cannot be read further."""
    line = 0
    try:
        for line, value in pairs:
            yield line, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"the gzip file is cut or damaged ({error}); nothing after it is read"
        yield line + 1, BadRow(printable(path), line + 1, reason)
    except RowError as error:
        yield line + 1, BadRow(printable(path), line + 1, str(error))


class _Inflated(io.RawIOBase):
    """A gzip file, decompressed as it is read, up to a bound."""

    def __init__(self, raw: io.BufferedReader, path: Path):
        self._stream = gzip.GzipFile(fileobj=raw, mode="rb")
        self._size, self._limit = 0, max(FREE_BYTES, MAX_RATIO * os.fstat(raw.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._stream.read1(len(view))
        self._size += len(data)
        if self._size > self._limit:
            raise RowError(
                f"the gzip file expands to more than {self._limit:,} bytes, {MAX_RATIO} times its size; not read on"
            )
        view[: len(data)] = data
        return len(data)
