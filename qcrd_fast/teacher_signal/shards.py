"""A teacher's log-probs in files, beside the rows that they belong to: for each scored text its tokens, and at each
place the K likeliest tokens with their log-probs.

A folder holds `shard-00000.safetensors.gz`, ... of `SHARD` texts each, and `pending.jsonl` with those that fill no
shard yet. A text is on the disk when `Writer.add` returns. A shard is written under another name, synced and renamed
before its texts leave the pending ones, so whenever a process is killed each text is in one of the two, or in both.

    tokens [T] int32, logprob [T] float32 (of the token itself), ids [T, K] int32 (-1: none), top [T, K] float32 (-inf:
    none), start [N + 1] int64 of each text; metadata: version, tokenizer, teacher, temperature, keys (JSON)

Suffixes: N texts, T tokens, K likeliest tokens.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from qcrd_fast.data.schema import one_line
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.teacher_signal.local import TopK
from qcrd_fast.teacher_signal.tokenizers import tokenizer_hash
from qcrd_fast.utils.files import append_whole, open_locked, printable, read_records, replacing, sync, write_json

log = logging.getLogger(__name__)

SHARD = 256  # texts
PENDING, META, LOCK = "pending.jsonl", "meta.json", ".lock"
VERSION = 1
ADDED = ("prompts", "weights")  # to the metadata, after the first folders were written
_NAME = re.compile(r"shard-(\d{5})\.safetensors\.gz")


class Entry(NamedTuple):
    """One scored text. `ids` and `top`: at each place up to K likeliest tokens and their log-probs [nats]."""

    tokens: list[int]
    logprob: list[float]
    ids: list[list[int]]
    top: list[list[float]]


def text_digest(question: str, prefix: str, text: str, view: str | None = None) -> str:
    """What a text is found by: its question, its task (the prompt's prefix), itself, whatever their white space, and
    its view, if it has one."""
    named = (question, prefix, text) if view is None else (question, prefix, text, view)
    return hashlib.sha256("\0".join(map(one_line, named)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Writer:
    """Adds scored texts to a folder; use as a context manager. `known`: the keys that are there.

    Raises `InputError` for a folder of another teacher, tokenizer, temperature, K, prompts or weights (digests, where
    they are known), or one that another process writes; `RunError` where the disk is full, with everything that was
    added still there.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: str,
        teacher: str,
        k: int,
        temperature: float = 1.0,
        prompts: str | None = None,
        weights: str | None = None,
    ):
        self.folder, self.k = folder, k
        self.meta = {"version": VERSION, "tokenizer": tokenizer, "teacher": teacher, "k": k, "temperature": temperature}
        self.meta |= {name: found for name, found in (("prompts", prompts), ("weights", weights)) if found}
        self.known: set[str] = set()
        self._pending: dict[str, Entry] = {}
        self._file = self._lock = -1

    def __enter__(self) -> Writer:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(self.folder / LOCK)
        except BlockingIOError:
            raise InputError(
                f"--output: {printable(self.folder)} is in use by another process; choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"--output: cannot write to {printable(self.folder)}: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def check(self) -> bool:
        """Whether the folder was begun. Raises `InputError` as entering does, save for another process."""
        meta = self.folder / META
        if meta.exists():
            before = read_meta(self.folder)
            for name, value in self.meta.items():
                if before.get(name) != value and (name in before or name not in ADDED):
                    raise InputError(
                        f"{printable(self.folder)}: begun with {name} {before.get(name)!r}, now it is {value!r}; "
                        "choose another folder"
                    )
            return True
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        if others := [p.name for p in there if p.name not in (LOCK, f".{META}.tmp")]:
            raise InputError(
                f"--output: {printable(self.folder)} holds {sorted(others)[0]} and no {META}; choose another folder"
            )
        return False

    def _open(self) -> None:
        if not self.check():
            write_json(self.folder / META, self.meta)
        for temporary in self.folder.glob(".shard-*.tmp"):
            temporary.unlink()
        for path in shard_paths(self.folder):
            self.known.update(_keys(read_shard(path)[1], path))
        path = self.folder / PENDING
        kept = [r for r in read_records(path) if _is_entry(r)]
        self._pending = {
            r["key"]: Entry(*(r[name] for name in Entry._fields)) for r in kept if r["key"] not in self.known
        }
        self.known.update(self._pending)
        self._rewrite()

    def _rewrite(self) -> None:
        """The pending file with what is pending, whole; and open for more."""
        if self._file >= 0:
            os.close(self._file)
        path = self.folder / PENDING
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(_line(key, entry) for key, entry in self._pending.items()))
        sync(self.folder)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND)

    def add(self, key: str, entry: Entry) -> None:
        """Keep one text; it is on the disk when this returns."""
        if key in self.known:
            return
        if any(len(part) != len(entry.tokens) for part in entry[1:]):
            raise ValueError(f"{len(entry.tokens)} tokens, but {[len(part) for part in entry[1:]]} log-probs")
        with self._writing():
            append_whole(self._file, _line(key, entry))
            self.known.add(key)
            self._pending[key] = entry
            if len(self._pending) >= SHARD:
                self.flush()

    def flush(self) -> None:
        """Make a shard of what is pending."""
        if not self._pending:
            return
        with self._writing():
            number = max((int(m[1]) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))), default=-1) + 1
            path = self.folder / f"shard-{number:05d}.safetensors.gz"
            metadata = {name: str(value) for name, value in self.meta.items()} | {
                "keys": json.dumps(list(self._pending))
            }
            data = save_tensors(_tensors(list(self._pending.values()), self.k), metadata)
            with replacing(path) as temporary:
                temporary.write_bytes(gzip.compress(data, 6, mtime=0))
            sync(self.folder)
            self._pending = {}
            self._rewrite()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{printable(self.folder)}: {error.strerror}"
            raise RunError(f"cannot write {where}; what was scored before is kept, the same command goes on") from error

    def _close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1


def _line(key: str, entry: Entry) -> bytes:
    return (json.dumps({"key": key, **entry._asdict()}) + "\n").encode()


def _is_entry(row: dict[str, Any]) -> bool:
    parts: list[Any] = [row.get(name) for name in Entry._fields]
    if not isinstance(row.get("key"), str) or not all(isinstance(p, list) and len(p) == len(parts[0]) for p in parts):
        return False
    tokens, logprobs, ids, top = parts
    pairs = list(zip(ids, top, strict=True))
    return (
        all(type(token) is int for token in tokens)
        and all(isinstance(x, int | float) for x in logprobs)
        and all(isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in pairs)
        and all(type(id) is int for row in ids for id in row)
        and all(isinstance(x, int | float) for row in top for x in row)
    )


def _tensors(entries: Sequence[Entry], k: int) -> dict[str, Tensor]:
    def padded(rows: list[Any], fill: float) -> list[Any]:
        return [[*row[:k], *[fill] * (k - len(row))] for row in rows]

    lengths = [len(e.tokens) for e in entries]
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64).cumsum(0)])
    ids = [row for e in entries for row in padded(e.ids, -1)]
    top = [row for e in entries for row in padded(e.top, float("-inf"))]
    return {
        "start": start,
        "tokens": torch.tensor([t for e in entries for t in e.tokens], dtype=torch.int32),
        "logprob": torch.tensor([x for e in entries for x in e.logprob], dtype=torch.float32),
        "ids": torch.tensor(ids, dtype=torch.int32).reshape(-1, k),
        "top": torch.tensor(top, dtype=torch.float32).reshape(-1, k),
    }


# Reading


class Text(NamedTuple):
    """What is known of one text."""

    tokens: list[int]
    top: TopK


class LogProbs(NamedTuple):
    """Everything of a folder, by key. temperature: of the softmax that the log-probs are of."""

    texts: dict[str, Text]
    temperature: float
    k: int


def shard_paths(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def read_meta(folder: Path) -> dict[str, Any]:
    """Raises `InputError` for a folder that holds no log-probs."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
        if found["version"] == VERSION and isinstance(found["k"], int) and isinstance(found["temperature"], float):
            return dict(found)
        reason = f"version {found['version']!r}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
    raise InputError(f"{printable(folder)} holds no log-probs of a teacher: {META}: {reason}")


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises `InputError` for a file that is damaged."""
    try:
        data = gzip.decompress(path.read_bytes())
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        start, T = tensors["start"], len(tensors["tokens"])
        whole = start[0] == 0 and start[-1] == T and bool((start[1:] >= start[:-1]).all())
        if whole and all(len(tensors[name]) == T for name in ("logprob", "ids", "top")):
            return tensors, header["__metadata__"]
        reason = "its texts do not fit its tokens"
    except (OSError, EOFError, zlib.error, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__} {error}"
    raise InputError(
        f"{printable(path)} is damaged: {reason}; delete it, and the command that wrote it writes it again"
    )


def _keys(metadata: dict[str, str], path: Path) -> list[str]:
    try:
        return list(json.loads(metadata["keys"]))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{printable(path)} is damaged: its keys are unreadable") from error


def read_logprobs(folder: Path, tokenizer: Any) -> LogProbs:
    """All texts of a folder. Raises `InputError` for a folder of another tokenizer, one without log-probs, a damaged
    shard."""
    meta = read_meta(folder)
    if meta["tokenizer"] != (own := tokenizer_hash(tokenizer)):
        raise InputError(
            f"--teacher-logprobs: {printable(folder)} is of another tokenizer than the student's (sha256 of the tokens "
            f"{str(meta['tokenizer'])[:12]}, here {own[:12]}): its token ids mean other tokens"
        )
    texts: dict[str, Text] = {}
    for path in shard_paths(folder):
        tensors, metadata = read_shard(path)
        tokens, start = tensors["tokens"].tolist(), tensors["start"].tolist()
        for key, a, b in zip(_keys(metadata, path), start, start[1:], strict=False):
            texts[key] = Text(tokens[a:b], TopK(tensors["ids"][a:b], tensors["top"][a:b]))
    for row in read_records(folder / PENDING):
        if _is_entry(row) and row["key"] not in texts:
            found = _tensors([Entry(*(row[name] for name in Entry._fields))], meta["k"])
            texts[row["key"]] = Text(found["tokens"].tolist(), TopK(found["ids"], found["top"]))
    return LogProbs(texts, meta["temperature"], meta["k"])


def find_top(
    files: LogProbs, question: str, prefix: str, text: str, tokens: Sequence[int], view: str | None = None
) -> TopK:
    """The likeliest tokens at each place of `tokens` [T, K]; -inf where they are not known.

    The scored text may hold more than these tokens, such as a reply with the answer behind the rationale: they are
    looked for within it, and what of them lies outside (the end of the text, a first token that a space changed) is not
    known.
    """
    ids_TK = torch.zeros(len(tokens), files.k, dtype=torch.int64)
    logprob_TK = torch.full((len(tokens), files.k), -torch.inf)
    known = files.texts.get(text_digest(question, prefix, text, view))
    if known is not None:
        here, there, count = align(list(tokens), known.tokens)
        found_TK = known.top.logprob_TK[there : there + count]
        logprob_TK[here : here + count] = found_TK
        ids_TK[here : here + count] = known.top.ids_TK[there : there + count].long().clamp(min=0)
    return TopK(ids_TK, logprob_TK)


def align(tokens: list[int], within: list[int]) -> tuple[int, int, int]:
    """(start in `tokens`, start in `within`, count) of the longest run that both have; count 0 unless it is at least
    half of `tokens`, since a shorter one may be of another place."""
    if tokens == within:
        return 0, 0, len(tokens)
    best = 0, 0, 0
    previous = [0] * (len(within) + 1)
    for i, token in enumerate(tokens, 1):
        current = [0] * (len(within) + 1)
        for j, other in enumerate(within, 1):
            if token == other:
                current[j] = previous[j - 1] + 1
                if current[j] > best[2]:
                    best = i - current[j], j - current[j], current[j]
        previous = current
    return best if 2 * best[2] >= len(tokens) else (0, 0, 0)
