"""Self-consistency: the majority answer of a question's samples splits them into positives and negatives (section 2)."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from qcrd_fast.data.answers import canonical, extract_answer, same_answer, surface
from qcrd_fast.data.schema import CHOSEN, Rationale


@dataclasses.dataclass(frozen=True, slots=True)
class Vote:
    """What the samples of one question say. `votes` is ordered by count, then by answer."""

    majority: str | None
    votes: dict[str, int]
    positives: tuple[Rationale, ...]
    negatives: tuple[Rationale, ...]
    duplicates: int = 0
    dropped: int = 0
    tied: bool = False


def vote(
    samples: Iterable[Rationale],
    *,
    seed: int = 0,
    question_id: str = "",
    task: str = "text",
    choices: Sequence[str] = (),
    gold: str | None = None,
) -> Vote:
    """The majority answer, the votes of each answer, and the samples on either side.

    - A sample without a rationale or without an answer that can be read as one of `task` does not vote, is on neither
      side, and is counted in `dropped`. Where that leaves none, the majority is None and both sides are empty.
    - The same rationale with the same answer counts once; the further ones are counted in `duplicates`.
    - A tie goes to the answer with the smallest sha256 of (seed, question id, answer): it depends neither on the order of
      the samples nor on chance, and favours no answer. All answers distinct is a tie of all of them. Fewer samples than K
      are no special case: one sample is a majority of one.
    - `votes` and the answers of the returned rationales are spelled one way for each answer: numbers and yes/no in
      canonical form, other answers as most samples write them (the smallest such spelling), so `votes[majority]` holds.
    - Where samples are of preference pairs, the majority is that of the chosen ones.
    - With `gold` the sides are split by agreement with it instead; the majority stays the vote's.

    Both sides keep the order of the samples.
    """
    seen: set[tuple[str, str]] = set()
    kept: list[tuple[str, Rationale]] = []
    duplicates = dropped = 0
    for sample in samples:
        said = sample.text if sample.reply else sample.answer
        answer = None if said is None else _read(said, task, choices)
        key = None if answer is None else canonical(answer, task, choices)
        if key is None or not sample.text.strip():
            dropped += 1
            continue
        mark = (unicodedata.normalize("NFC", sample.text.strip()), key)
        if mark in seen:
            duplicates += 1
            continue
        seen.add(mark)
        kept.append((key, dataclasses.replace(sample, answer=answer, reply=False)))
    if not kept:
        return Vote(None, {}, (), (), duplicates, dropped)

    counts = collections.Counter(key for key, _ in kept)
    ballot = collections.Counter(key for key, rationale in kept if rationale.source == CHOSEN) or counts
    most = max(ballot.values())
    tied = [key for key, count in ballot.items() if count == most]
    winner = min(tied, key=lambda key: _tie_rank(seed, question_id, key))
    spelling = {key: _spelling(rationale.answer or "" for other, rationale in kept if other == key) for key in counts}
    right = {key: key == winner if gold is None else same_answer(spelling[key], gold, task, choices) for key in counts}
    return Vote(
        majority=spelling[winner],
        votes={spelling[key]: counts[key] for key in sorted(counts, key=lambda key: (-counts[key], key))},
        positives=tuple(rationale for key, rationale in kept if right[key]),
        negatives=tuple(rationale for key, rationale in kept if not right[key]),
        duplicates=duplicates,
        dropped=dropped,
        tied=len(tied) > 1,
    )


def _read(answer: str, task: str, choices: Sequence[str]) -> str | None:
    return extract_answer(answer, task, choices) or surface(answer, task, choices)


def _tie_rank(seed: int, question_id: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{question_id}\0{key}".encode()).digest()


def _spelling(answers: Iterable[str]) -> str:
    counts = collections.Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
