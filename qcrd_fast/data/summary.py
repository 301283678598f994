"""The summary that `prepare` reports."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from qcrd_fast.data.answers import parse_choices
from qcrd_fast.data.formats.golds import GOLD
from qcrd_fast.data.input_report import InputReport, keys_not_read
from qcrd_fast.data.replies import DEFAULT, Reader
from qcrd_fast.data.schema import Question
from qcrd_fast.data.voting import Vote

EXAMPLES = 5  # of unreadable samples
EXAMPLE_LENGTH = 160  # characters, of their end


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """Counts and shares of `prepare`. Means are over questions with samples."""

    questions: int
    with_samples: int
    with_gold: int
    positives: int
    negatives: int
    mean_positives: float
    mean_negatives: float
    share_without_minority: float
    majority_wrong_against_gold: int
    wrong_by_tie: int
    ties: int
    duplicates: int
    answers_dropped: int
    skipped_rows: int
    samples: int = 0
    without_rationale: int = 0
    unreadable: int = 0
    unreadable_examples: tuple[dict[str, str], ...] = ()
    format: str = ""  # what the inputs were taken for
    keys_not_read: dict[str, str | None] = dataclasses.field(default_factory=dict)  # each with the nearest that is read
    inputs: tuple[dict[str, Any], ...] = ()
    taken: tuple[str, ...] = ()  # for people: a line an input
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "taken"}

    def text(self) -> str:
        """One `name: value` line for each field."""
        notes = {
            "majority_wrong_against_gold": "of the questions with both",
            "wrong_by_tie": "of these, the ones that a tie decided",
            "ties": "settled by a seeded hash",
            "duplicates": "same rationale and answer, counted once",
            "answers_dropped": "samples without a readable answer",
            "without_rationale": "samples that vote, but teach nothing",
            "unreadable": "the first of them below" if self.unreadable else "samples without a readable answer",
        }
        lines = []
        for name, value in self.to_dict().items():
            if not isinstance(value, int | float):
                continue
            figure = f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
            note = f"  ({notes[name]})" if name in notes else ""
            lines.append(f"{name.replace('_', ' ') + ':':<30}{figure:>10}{note}")
        for example in self.unreadable_examples:
            lines.append(f"  unreadable in {example['id']}: {example['text']!r}: {example['why']}")
        return "\n".join(lines)


class Tally:
    """The figures of questions as they go by; `vote` is None where a prepared row was taken as it is."""

    def __init__(self, split_by: str, reader: Reader = DEFAULT):
        self.split_by, self.reader = split_by, reader
        self.skipped = 0  # rows set aside, by whoever sets them aside
        self.reports: list[InputReport] = []
        self.notes: list[str] = []  # warnings of whoever reads
        self._count: collections.Counter[str] = collections.Counter()
        self._unreadable: list[dict[str, str]] = []

    def add(self, question: Question, vote: Vote | None = None) -> None:
        sampled = bool(question.positives or question.negatives)
        alone = len(question.votes) < 2 if self.split_by == "gold" else not question.negatives
        tie = vote.tied if vote else _is_tie(question)
        rationales = question.positives + question.negatives
        samples = len(rationales) + (vote.duplicates + vote.dropped if vote else 0)
        wrong = (
            question.majority is not None
            and question.gold is not None
            and not self.reader.same(
                question.majority, question.gold, question.task or "text", parse_choices(question.question)
            )
        )
        self._count.update(
            questions=1,
            with_samples=sampled,
            with_gold=question.gold is not None,
            gold_words=len((question.gold or "").split()),
            positives=len(question.positives),
            negatives=len(question.negatives),
            alone=sampled and alone,
            wrong=wrong,
            wrong_by_tie=wrong and tie,
            ties=tie,
            duplicates=vote.duplicates if vote else 0,
            dropped=vote.dropped if vote else 0,
            several=samples > 1,
            worked=sum(rationale.source == GOLD for rationale in rationales),
            samples=len(vote.readings) if vote else len(question.positives) + len(question.negatives),
            without=vote.without_rationale if vote else 0,
        )
        for sample, reading in vote.readings if vote and vote.dropped else ():
            if reading.answer is None and len(self._unreadable) < EXAMPLES:
                text = " ".join((sample.text if sample.answer is None else sample.answer).split())
                short = text if len(text) <= EXAMPLE_LENGTH else "..." + text[3 - EXAMPLE_LENGTH :]
                self._unreadable.append({"id": question.id, "text": short, "why": reading.why})

    @property
    def summary(self) -> PrepareSummary:
        count, sampled = self._count, max(self._count["with_samples"], 1)
        return PrepareSummary(
            questions=count["questions"],
            with_samples=count["with_samples"],
            with_gold=count["with_gold"],
            positives=count["positives"],
            negatives=count["negatives"],
            mean_positives=count["positives"] / sampled,
            mean_negatives=count["negatives"] / sampled,
            share_without_minority=count["alone"] / sampled,
            majority_wrong_against_gold=count["wrong"],
            wrong_by_tie=count["wrong_by_tie"],
            ties=count["ties"],
            duplicates=count["duplicates"],
            answers_dropped=count["dropped"],
            skipped_rows=self.skipped,
            samples=count["samples"],
            without_rationale=count["without"],
            unreadable=count["dropped"],
            unreadable_examples=tuple(self._unreadable),
            format=", ".join(dict.fromkeys(report.format for report in self.reports if report.format)),
            keys_not_read=keys_not_read(self.reports),
            inputs=tuple(report.to_dict() for report in self.reports),
            taken=tuple(report.text for report in self.reports),
            warnings=tuple(self._warnings()),
        )

    def _warnings(self) -> Iterator[str]:
        count = self._count
        for report in self.reports:
            yield from report.warnings
        yield from self.notes
        if count["worked"]:
            return  # the golds' own solutions, which `inspection` speaks of
        if count["with_samples"] and not count["several"]:
            yield (
                "no question has more than one sample: there is nothing to vote on, "
                "and qcrd has no minority to learn from"
            )
        elif count["questions"] and not count["samples"] and not count["with_samples"] and not count["dropped"]:
            words = count["gold_words"] / max(count["with_gold"], 1)
            hint = (
                f"; golds have {words:.0f} words: if they are worked solutions, --map solution=KEY" if words > 8 else ""
            )
            yield f"no question has a sample: these rows serve eval, collect and --method finetune{hint}"


def _is_tie(question: Question) -> bool:
    counts = sorted(question.votes.values())
    return len(counts) > 1 and counts[-1] == counts[-2]
