"""Random numbers keyed by (seed, question, index, iteration, position), and Gumbel noise from them.

They never depend on the batch, on the order of the questions or on earlier draws: they are Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the question in the key and the rest in the counter.
Suffixes: B rows, K vocabulary entries.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def key_words(seed: int, question_id: str) -> tuple[int, int]:
    """Return two 32-bit words that identify a question under a seed."""
    digest = hashlib.sha256(f"{seed}\0{question_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32, as int64 in [0, 2^32). Arguments are int64 tensors that broadcast
    together."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        # int64 products wrap modulo 2^64; shifting and masking recovers the unsigned high word
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel(key_B2: Tensor, counter_B3: Tensor, vocab_BK: Tensor | None = None, size: int = 0) -> Tensor:
    """Gumbel(0, 1) noise [B, K], float64, of the vocabulary entries `vocab_BK`, or of all `size` of them.

    `key_B2`: `key_words` of each row; `counter_B3`: (position, index, iteration), all int64. Entry v takes word v % 4
    of the counter (v // 4, position, index, iteration), so that one Philox serves four entries.
    """
    columns = (*key_B2.split(1, 1), *counter_B3.split(1, 1))
    if vocab_BK is None:
        quad_BK = torch.arange((size + 3) // 4, device=key_B2.device).expand(len(key_B2), -1)
        word_BK = _words(quad_BK, *columns).flatten(1)[:, :size]
    else:
        word_BK = _words(vocab_BK // 4, *columns).gather(2, (vocab_BK % 4)[:, :, None])[:, :, 0]
    uniform = (word_BK.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def _words(quad: Tensor, k0: Tensor, k1: Tensor, position: Tensor, index: Tensor, iteration: Tensor) -> Tensor:
    """The four words [B, K, 4] of each quad of entries [B, K]."""
    return torch.stack(philox((k0, k1), (quad, position, index, iteration)), 2)
