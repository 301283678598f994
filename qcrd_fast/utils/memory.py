"""Free memory, and whether a file of rows fits into it. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable

ROWS_FACTOR = 2.4  # bytes in memory for each byte of a file of rows of 1 kB; measured, see docs/reliability.md
UNKNOWN = 1 << 62  # bytes
_CGROUPS = (("", "memory.max", "anon"), ("memory", "memory.limit_in_bytes", "total_rss"))  # version 2 and 1


def free_bytes() -> int:
    """Return the memory this process may still allocate: limited by the machine, its container and `ulimit -v`.

    `UNKNOWN` where nothing says how much that is.
    """
    found = [UNKNOWN]
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(1024 * _figure(Path("/proc/meminfo"), "MemAvailable:"))
    for name, limit, taken in _CGROUPS:
        group = Path("/sys/fs/cgroup", name)
        with contextlib.suppress(OSError, ValueError, KeyError):  # what is cached of files can be taken back
            found.append(int((group / limit).read_text()) - _figure(group / "memory.stat", taken))
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_bytes != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append(limit_bytes - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found))


def swap_bytes() -> int:
    """Return the free swap of the machine."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return 1024 * _figure(Path("/proc/meminfo"), "SwapFree:")
    return 0


def _figure(path: Path, name: str) -> int:
    """Return the number after a name in a file such as /proc/meminfo."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}[name]


def _unpacked_bytes(path: Path) -> int:
    """Return a file's size; for gzip the size in its trailer, which is modulo 4 GiB."""
    size = path.stat().st_size
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if size > 18 and file.read(2) == b"\x1f\x8b":
            file.seek(-4, os.SEEK_END)
            return max(size, int.from_bytes(file.read(4), "little"))
    return size


def require_room(path: Path) -> None:
    """Raise `InputError` for a file of rows that cannot fit in memory, before the system kills the process."""
    size = _unpacked_bytes(path) if path.is_file() else 0
    needed, free = int(ROWS_FACTOR * size), free_bytes()
    if size > free:  # what fits barely is tried
        raise InputError(
            f"{printable(path)} has {size / 1e9:.2f} GB, which takes about {needed / 1e9:.2f} GB of memory, and "
            f"{free / 1e9:.2f} GB are free; take part of its rows, such as: shuf -n 100000 FILE"
        )
