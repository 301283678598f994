"""Whether two models read the same tokens: compared by content, since a name or a size says little. Imports no
torch."""

from __future__ import annotations

import hashlib
from typing import Any

from qcrd_fast.errors import InputError


def base_vocabulary(tokenizer: Any) -> dict[int, str]:
    """{id: token} without the tokens that were added to it, which models of one family add differently."""
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    return {id: token for token, id in tokenizer.get_vocab().items() if id not in added}


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the tokenizer's own tokens by id; what was added to them, and rows that pad a model's head, are not in
    it."""
    return hashlib.sha256(repr(sorted(base_vocabulary(tokenizer).items())).encode("utf-8", "surrogatepass")).hexdigest()


def check_same_tokenizer(student: Any, teacher: Any, option: str) -> None:
    """Raises `InputError`, naming `option` and the first token at fault, unless ids mean the same tokens to both.

    Tokens that only one of them has are none's fault where they were added behind the vocabulary that both share.
    """
    ours, theirs = base_vocabulary(student), base_vocabulary(teacher)
    if ours == theirs:
        every, other = ({id: t for t, id in each.get_vocab().items()} for each in (student, teacher))
        ours, theirs = ({id: t for id, t in one.items() if id in every and id in other} for one in (every, other))
    if ours != theirs:
        at = min(id for id in ours.keys() | theirs.keys() if ours.get(id) != theirs.get(id))
        raise InputError(
            f"{option}: it has another tokenizer than the student, so its probabilities are of other tokens: token "
            f"{at} is {theirs.get(at)!r}, the student's {ours.get(at)!r} ({len(theirs)} and {len(ours)} tokens)"
        )
