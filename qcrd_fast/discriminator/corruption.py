"""Corrupt right rationales into wrong ones, for the discriminator's pretraining (section 3.3).

Everything random here comes from a key (seed, what, when), never from call order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from qcrd_fast.config import AUGMENTATIONS
from qcrd_fast.utils.keyed import keyed

BLANK = "___"  # stands for a masked word in any tokenizer's alphabet
_NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)"


def augment(
    text: str,
    key: tuple[Any, ...],
    words: Sequence[str],
    kinds: Sequence[str] = ("mask", "replace"),
    answer: str | None = None,
    others: Sequence[str] = (),
) -> str:
    """Corrupt `text` in one of the ways `kinds`; never returns `text` itself.

    A pure function: `key` (seed, question id, index) seeds the random numbers.

    mask, replace: 15 to 50 % of the words (at least one) become `BLANK`, or words of `words`. What is not a word,
    spaces and punctuation, is kept, so that the corruption cannot be told by its layout.
    answer-swap: `answer` becomes another one, wherever it stands: a number near it or of the same text, else one of
    `others`. sentence-drop: one sentence of two or more is missing.
    Where the drawn way changes nothing (no answer in the text, a single sentence) the others are tried, and at last a
    `BLANK` is put at the end.
    """
    if not kinds or set(kinds) - set(AUGMENTATIONS):
        raise ValueError(f"kinds are of {', '.join(AUGMENTATIONS)}; got {kinds!r}")
    rng = random.Random(keyed(*key))
    first = rng.choice(kinds)
    for kind in (first, *(k for k in kinds if k != first)):
        if kind == "answer-swap":
            changed = _swap_answer(text, rng, answer, others)
        elif kind == "sentence-drop":
            changed = _drop_sentence(text, rng)
        else:
            changed = _change_words(text, rng, words if kind == "replace" else ())
        if changed.strip() and changed != text:
            return changed
    return f"{text} {BLANK}".lstrip()


def _change_words(text: str, rng: random.Random, words: Sequence[str]) -> str:
    pieces = re.split(r"(\w+)", text)
    places = list(range(1, len(pieces), 2))
    for place in rng.sample(places, min(len(places), max(1, round(len(places) * rng.uniform(0.15, 0.5))))):
        word = rng.choice(words) if words else BLANK
        pieces[place] = word if word != pieces[place] else BLANK
    return "".join(pieces)


def _swap_answer(text: str, rng: random.Random, answer: str | None, others: Sequence[str]) -> str:
    numbers = re.findall(_NUMBER, text)
    said = (answer or "").strip()
    if re.fullmatch(r"\d+\.0+", said) and said not in numbers:  # "32.0" is 32 in the text
        said = said.partition(".")[0]
    pattern = rf"(?<!\w){re.escape(said)}(?!\w|\.\d)" if said else ""
    if not pattern or not re.search(pattern, text, re.IGNORECASE):
        if not numbers:
            return text
        said = numbers[-1]  # what a chain of arithmetic ends in
        pattern = rf"(?<![\w.]){re.escape(said)}(?!\w|\.\d)"
    if re.fullmatch(r"\d+", said):
        near = [str(n) for d in (1, 2, 10) for n in (int(said) - d, int(said) + d) if n >= 0]
        choices = near + [n for n in numbers if n != said]
    else:
        choices = [other for other in others if other.strip() and other.strip().lower() != said.lower()]
    if not choices:
        return text
    other = rng.choice(choices)
    return re.sub(pattern, lambda _: other, text, flags=re.IGNORECASE)


def _drop_sentence(text: str, rng: random.Random) -> str:
    sentences = re.findall(r"(?:[^.!?\n]|[.!?](?=\S))+[.!?\n]*\s*", text)
    if len(sentences) < 2:
        return text
    del sentences[rng.randrange(len(sentences))]
    return "".join(sentences).strip()
