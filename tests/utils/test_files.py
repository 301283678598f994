"""The reader of JSONL, the atomic writer and the lock: what each does with damaged, failed and held files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import open_locked, read_records, replacing

DAMAGED = b'{"a": 1}\n[2]\n{"b": \n{"c": 3}\n{"d": 4}'


def test_reading_stops_skips_or_raises_at_damage(tmp_path: Path) -> None:
    path, skipped = tmp_path / "x.jsonl", list[int]()
    path.write_bytes(DAMAGED)
    assert list(read_records(path)) == [{"a": 1}]
    assert list(read_records(path, "skip", skipped=skipped)) == [{"a": 1}, {"c": 3}]
    assert skipped == [2, 3, 5]  # the last has no end: its writer may have been killed
    with pytest.raises(InputError, match=r"x\.jsonl:2: no JSON object"):
        list(read_records(path, "raise"))
    path.write_bytes(b'{"a": 1}\n{"d": 4}')
    assert list(read_records(path, "raise")) == [{"a": 1}, {"d": 4}]


def test_a_missing_file_is_empty_unless_damage_raises(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "x")) == list(read_records(tmp_path / "x", "skip")) == []
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "x", "raise"))


def test_a_line_may_have_the_longest_length_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 12}\n{"a": 123}\n' + b'{"a": "' + b"x" * 35 + b'"}\n{"b": 1}\n')
    assert list(read_records(path, "skip", longest=10)) == [{"a": 12}, {"b": 1}]


def test_text_that_is_no_utf8_by_itself_comes_back(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": "\ud800"}\n', encoding="utf-8", errors="surrogatepass")
    assert list(read_records(tmp_path / "x", "raise")) == [{"a": "\ud800"}]


def test_a_failed_write_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x"]
    with replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["x"]


def test_a_temporary_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.tmp").symlink_to("precious")
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "x").is_symlink()


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="device or pipe"), replacing(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    held = open_locked(tmp_path / "lock")
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(BlockingIOError):
        open_locked(tmp_path / "lock")
    if open_files is not None:
        assert len(os.listdir("/proc/self/fd")) == open_files  # the attempt is closed
    os.close(held)
    os.close(open_locked(tmp_path / "lock"))


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_with_a_warning(code: int, tmp_path: Path, monkeypatch, caplog) -> None:
    def flock(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for name in ("a", "b", "a"):
        with open(open_locked(tmp_path / name, os.O_APPEND), "w") as file:
            file.write(name)
    assert (tmp_path / "a").read_text() == "aa"
    (warning,) = caplog.messages  # once a folder
    assert warning == f"{tmp_path}: its file system has no locks (flock: {os.strerror(code)}); going on without one, " \
        "so start nothing else that writes there"  # fmt: skip


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        open_locked(tmp_path / "lock")
