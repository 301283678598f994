"""Atomic writes, JSONL files, file locks, checks of output paths. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from qcrd_fast.errors import InputError

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # such as NFS without lockd, Lustre, FUSE


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


@contextlib.contextmanager
def replacing(path: Path, temporary_name: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; after the block sync it and rename it to `path`.

    If the block or the rename fails, `path` is unchanged and the temporary file is deleted. Raises `InputError` if
    `path` is a device or pipe.
    """
    require_file(path)
    temporary = path.with_name(temporary_name or f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link, which is not written through
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8", errors="surrogatepass") as file:
        file.write(text)


def own_temporary_name() -> str:
    """A short temporary name for `replacing` where the final name is a user's and several processes may write it."""
    return f".qcrd-{os.getpid()}.tmp"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file atomically."""
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


def read_records(
    path: Path,
    damaged: Literal["stop", "skip", "raise"] = "stop",
    *,
    longest: int = -1,
    skipped: list[int] | None = None,
    ends: list[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, one a line.

    damaged: what to do at a line that holds no object, or has no end as the last line of a killed writer: stop there,
    skip it, or raise. "raise" accepts a last line without an end, as people write it, and no missing file, which is
    empty for the others.
    longest: bytes of a line; more is damage. -1: no limit.
    skipped: gets the numbers of the lines that were skipped.
    ends: gets the offset of the byte behind each object's line.

    Raises `InputError` as file:line for a damaged line, `OSError` if the file cannot be read.
    """
    if damaged != "raise" and not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: _read_line(file, longest), b""), 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and (line.endswith(b"\n") or damaged == "raise"):
                if ends is not None:
                    ends.append(file.tell())
                yield record
            elif damaged == "raise":
                raise InputError(f"{printable(path)}:{number}: no JSON object")
            elif damaged == "stop":
                return
            elif skipped is not None:
                skipped.append(number)


def _read_line(file: BinaryIO, longest: int) -> bytes:
    """Read a line, and keep at most `longest` bytes of it."""
    line = part = file.readline(longest)
    while len(part) == longest and not part.endswith(b"\n"):
        part = file.readline(longest)
    return line


def open_locked(path: Path, flags: int = 0, *, wait: bool = False) -> int:
    """Open a file for reading and writing, lock it, and return its descriptor. The file is created if absent.

    The lock ends when the descriptor is closed or the process ends, so it is never stale. `flags` such as
    `os.O_APPEND` are added. On a file system without locks the file is opened without one, with a warning.

    Raises `BlockingIOError` if another process has the lock (`wait`: waits for it instead), `OSError` if the file
    cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in NO_LOCKS:
            _warn_of_no_locks(path.parent, str(error.strerror))
        else:
            os.close(descriptor)
            raise
    return descriptor


@functools.cache  # once a folder
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    log.warning(
        "%s: its file system has no locks (flock: %s); going on without one, so start nothing else that writes there",
        printable(folder), reason,
    )  # fmt: skip


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
