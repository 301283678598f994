"""Files that are written whole or not at all, JSONL appends, checks of output paths. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qcrd_fast.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)


def printable(path: str | os.PathLike[str]) -> str:
    """Return `path` as one printable line for a message, whatever bytes it contains."""
    name = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def require_file(path: Path) -> None:
    """Raise `InputError` for a device or pipe such as /dev/null: a rename to its name would replace it."""
    if (path.exists() and not path.is_file()) or path.parent.resolve() == Path("/dev"):
        raise InputError(f"{path} is a device or pipe; name a file")


def require_writable(folder: Path, option: str) -> None:
    """Raise `InputError` naming `option` unless files can be created in `folder`, or in its nearest existing parent.

    Leaves no file behind.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{option}: cannot write to {printable(folder)}: {error.strerror}; choose another folder"
        ) from error


def require_place(path: Path, option: str) -> None:
    """Raises `InputError` naming `option` unless `path` can be a file in a folder that exists."""
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{option}: {printable(path)} is not a file in a folder that exists")
    require_file(path)
    require_writable(path.parent, option)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all (temporary name, fsync, rename)."""
    require_file(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", errors="surrogatepass") as file:  # a link is not written through
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file whole or not at all."""
    write_text(path, _lines(records))


def append_lines(path: Path, records: Iterable[dict[str, Any]], *, durable: bool = False) -> None:
    """Append records to a JSONL file in one write; `durable`: they are on the disk when this returns."""
    with open(path, "ab") as file:
        file.write(_lines(records).encode("utf-8", "surrogatepass"))
        if durable:
            file.flush()
            os.fsync(file.fileno())


def append_whole(descriptor: int, data: bytes) -> None:
    """Append `data` in one synced write. On failure (`OSError`) the file is unchanged."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a JSONL file up to the first damaged line."""
    return (record for record, _ in intact_lines(path))


def intact_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, offset of the byte behind its line) of a JSONL file up to the first damaged line."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not line.endswith(b"\n") or not isinstance(record, dict):
                return
            yield record, end


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_space_text(folder: Path, needed: int) -> str:
    """Format "N bytes needed, M bytes free" of a folder's disk."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return f"{needed} bytes needed, {free} bytes free"


def remove_tree(path: Path) -> None:
    """Delete a folder of ours. A link is unlinked, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
