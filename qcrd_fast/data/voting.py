"""Self-consistency: a question's majority answer splits its samples into positives and negatives (section 2)."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from qcrd_fast.data.answers import groups
from qcrd_fast.data.replies import DEFAULT, Reader, Reading
from qcrd_fast.data.schema import CHOSEN, REJECTED, Rationale


@dataclasses.dataclass(frozen=True, slots=True)
class Vote:
    """The vote of one question's samples. `votes` is ordered by count, then by answer."""

    majority: str | None
    votes: dict[str, int]
    positives: tuple[Rationale, ...]
    negatives: tuple[Rationale, ...]
    duplicates: int = 0
    dropped: int = 0
    tied: bool = False
    readings: tuple[tuple[Rationale, Reading], ...] = ()
    without_rationale: int = 0


def vote(
    samples: Iterable[Rationale],
    *,
    seed: int = 0,
    question_id: str = "",
    task: str = "text",
    choices: Sequence[str] = (),
    gold: str | None = None,
    reader: Reader = DEFAULT,
) -> Vote:
    """The majority answer, the votes of each answer, and the samples on either side.

    - A sample without an answer that can be read as one of `task` does not vote, is on neither side, and is counted in
      `dropped`. Where that leaves none, the majority is None and both sides are empty.
    - A sample without a rationale votes, but is on neither side; it is counted in `without_rationale`.
    - The same rationale with the same answer counts once; the further ones are counted in `duplicates`.
    - Answers are equal as `answers.groups` says: numbers also where they agree rounded.
    - A tie goes to the answer with the smallest sha256 of (seed, question id, answer): it depends neither on the order
    of
      the samples nor on chance, and favours no answer. All answers distinct is a tie of all of them. Fewer samples than
      K are no special case: one sample is a majority of one.
    - `votes` and the answers of the returned rationales are spelled one way for each answer: numbers and yes/no in
      canonical form, other answers as most samples write them (the smallest such spelling), so `votes[majority]` holds.
    - Where samples are of preference pairs, the majority is that of the chosen ones; where none of these is readable,
    no
      rejected reply takes their place: the majority is None, and both sides are empty but for `gold`.
    - With `gold` the sides are split by agreement with it instead; the majority stays the vote's.

    Both sides keep the order of the samples; `readings` holds what was read of each.
    """
    samples = list(samples)
    readings = [reader.sample(sample, task, choices) for sample in samples]
    read = [
        None if reading.answer is None else reading.value or reader.value(reading.answer, task, choices)
        for reading in readings
    ]
    led = iter(groups([value for value in read if value is not None], task, reader.tolerance))
    values = [value for value in read if value is not None]
    seen: set[tuple[str, str]] = set()
    kept: list[tuple[str, Rationale]] = []
    duplicates = dropped = without = 0
    for sample, reading, value in zip(samples, readings, read, strict=True):
        if value is None:
            dropped += 1
            continue
        key = values[next(led)].key
        mark = (unicodedata.normalize("NFC", reading.rationale.strip()), key)
        if mark[0] and mark in seen:
            duplicates += 1
            continue
        seen.add(mark)
        without += not mark[0]
        kept.append(
            (
                key,
                dataclasses.replace(
                    sample, text=reading.rationale, answer=reading.answer, reply=False, truncated=False
                ),
            )
        )
    told = tuple(zip(samples, readings, strict=True))
    if not kept:
        return Vote(None, {}, (), (), duplicates, dropped, readings=told)

    counts = collections.Counter(key for key, _ in kept)
    ballot = collections.Counter(key for key, rationale in kept if rationale.source == CHOSEN)
    if not ballot and any(sample.source == CHOSEN for sample in samples):
        ballot = collections.Counter(key for key, rationale in kept if rationale.source != REJECTED)
    elif not ballot:
        ballot = counts
    if not ballot and gold is None:
        return Vote(None, {}, (), (), duplicates, dropped + len(kept), readings=told)  # a pair without its better half
    most = max(ballot.values(), default=0)
    tied = [key for key, count in ballot.items() if count == most]
    winner = min(tied, key=lambda key: _tie_rank(seed, question_id, key), default=None)
    spelling = {key: _spelling(rationale.answer or "" for other, rationale in kept if other == key) for key in counts}
    right = {key: key == winner if gold is None else reader.same(spelling[key], gold, task, choices) for key in counts}
    return Vote(
        majority=None if winner is None else spelling[winner],
        votes={spelling[key]: counts[key] for key in sorted(counts, key=lambda key: (-counts[key], key))},
        positives=tuple(rationale for key, rationale in kept if right[key] and rationale.text.strip()),
        negatives=tuple(rationale for key, rationale in kept if not right[key] and rationale.text.strip()),
        duplicates=duplicates,
        dropped=dropped,
        tied=len(tied) > 1,
        readings=told,
        without_rationale=without,
    )


def _tie_rank(seed: int, question_id: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{question_id}\0{key}".encode()).digest()


def _spelling(answers: Iterable[str]) -> str:
    counts = collections.Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
