"""Output of `prepare --show` and `--inspect`: questions, samples, and how each was read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from qcrd_fast.data.choices import parse_choices
from qcrd_fast.data.replies import Reader, Reading
from qcrd_fast.data.schema import Question, Rationale, question_text
from qcrd_fast.data.voting import Vote
from qcrd_fast.errors import RunError
from qcrd_fast.utils.files import own_temporary_name, printable, replacing, require_file

PAGE_QUESTIONS = 200
PAGE_TEXT = 20_000  # characters of a sample on the page
SHOW_TEXT = 400  # characters of a sample on the terminal
_COMMA_GOLD = re.compile(r"-?\d{1,3}(?:\.\d{3})*,\d{1,2}|-?\d{1,3}(?:\.\d{3}){2,}|-?[1-9]\d{0,2}\.000")


class Inspection:
    """Collects questions from a stream, and keeps those to display: `show` as text, the first 200 for a `page`."""

    def __init__(self, reader: Reader, *, show: int = 0, page: bool = False):
        self.reader = reader
        self.show = show
        self.limit = max(show, PAGE_QUESTIONS if page else 0)
        self.records: list[dict[str, Any]] = []
        self.total = 0
        self._golds = self._comma_golds = self._solutions = self._sampled = self._samples = self._comma_samples = 0

    def add(self, question: Question, vote: Vote | None) -> None:
        self.total += 1
        self._sampled += vote is not None and bool(vote.readings)
        self._solutions += (
            bool(vote) and any(r.source == "gold" for r in question.positives) and not (vote and vote.readings)
        )
        if question.gold is not None and re.search(r"\d", question.gold):
            self._golds += 1
            self._comma_golds += _COMMA_GOLD.fullmatch(question.gold.strip(" $\u20ac%")) is not None
        for sample, reading in vote.readings if vote and self.reader.decimal == "point" else ():
            self._samples += 1
            self._comma_samples += self._has_comma(question, sample, reading)
        if len(self.records) < self.limit:
            self.records.append(self._record(question, vote))

    @property
    def warnings(self) -> list[str]:
        """Return warnings worth a look."""
        found = []
        seen = ((self._comma_golds, self._golds, "golds"), (self._comma_samples, self._samples, "samples' answers"))
        said = [f"{count:,} of {of:,} {what}" for count, of, what in seen if count > 0.05 * of]
        if said and self.reader.decimal == "point":
            found.append(
                f"{' and '.join(said)} look like 1.234,5; read them with --decimal comma "
                "if 3.000 is three thousand here"
            )
        if self._solutions and not self._sampled:
            found.append(
                f"no samples: {self._solutions:,} golds' own solutions are the positives, and there are no negatives"
            )
        return found

    def _has_comma(self, question: Question, sample: Rationale, reading: Reading) -> bool:
        """Whether a sample's answer is a number in German spelling: read with a decimal comma alone, or as a text."""
        if reading.answer is not None:
            return _COMMA_GOLD.fullmatch(reading.answer.strip(" $\u20ac%")) is not None
        if not re.search(r"\d,\d", sample.answer or sample.text):
            return False
        task = question.task if question.task in ("equation", "math") else "number"
        return dataclasses.replace(self.reader, decimal="comma").sample(sample, task).answer is not None

    def _record(self, question: Question, vote: Vote | None) -> dict[str, Any]:
        task, choices = question.task or "text", parse_choices(question.question)
        samples = []
        for sample, reading in vote.readings if vote else ():
            agrees = reading.answer is not None and question.majority is not None
            side = "unreadable" if reading.answer is None else "minority"
            if agrees and self.reader.same(reading.answer or "", question.majority or "", task, choices):
                side = "majority"
            samples.append(
                {
                    "text": sample.text,
                    "given": sample.answer,
                    "reasoning": reading.reasoning,
                    "rationale": reading.rationale,
                    "answer": reading.answer,
                    "why": reading.why,
                    "side": side,
                    "source": sample.source,
                }
            )
        if not samples:
            for side, rationales in (("majority", question.positives), ("minority", question.negatives)):
                samples += [
                    {"text": r.text, "given": r.answer, "reasoning": "", "rationale": r.text, "answer": r.answer,
                     "why": "as prepared" if vote is None else "the gold's own solution", "side": side,
                     "source": r.source}
                    for r in rationales
                ]  # fmt: skip
        both = question.gold is not None and question.majority is not None
        return {
            "id": question.id,
            "question": question_text(question),
            "task": task,
            "gold": question.gold,
            "majority": question.majority,
            "votes": dict(question.votes),
            "right": self.reader.same(question.majority or "", question.gold or "", task, choices) if both else None,
            "samples": samples,
        }

    @property
    def text(self) -> str:
        """The first `show` questions, as lines."""
        out: list[str] = []
        for record in self.records[: self.show]:
            out += [f"question {record['id']} ({record['task']})", *_indented(record["question"], 2)]
            for number, sample in enumerate(record["samples"], 1):
                out += [f"  sample {number}: {sample['side']}", *_indented(_short(sample["text"]), 4)]
                out.append(
                    f"    read: {sample['answer']!r}, from {sample['why']}"
                    if sample["answer"] is not None
                    else f"    unreadable: {sample['why']}"
                )
                if sample["rationale"].strip() != sample["text"].strip():
                    out += ["    rationale:", *_indented(_short(sample["rationale"]) or "(none)", 6)]
            votes = ", ".join(f"{answer}: {count}" for answer, count in record["votes"].items())
            out += [f"  vote: {record['majority']!r} ({votes or 'none'}); gold: {record['gold']!r}", ""]
        return "\n".join(_printable(line) for line in out).rstrip()

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            InputError: `path` is a device or pipe.
            RunError: it cannot be written.
        """
        from jinja2 import Environment, PackageLoader, StrictUndefined

        path = Path(path)
        require_file(path)
        environment = Environment(
            loader=PackageLoader("qcrd_fast.data", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        template = environment.get_template("inspection.html.j2")
        records = [_clipped(record) for record in self.records[:PAGE_QUESTIONS]]
        page = template.render(records=records, total=self.total, warnings=self.warnings)
        try:
            with (
                replacing(path, own_temporary_name()) as temporary,
                open(temporary, "x", encoding="utf-8", errors="replace") as file,
            ):
                file.write(page)
        except OSError as error:
            raise RunError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def _clipped(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= PAGE_TEXT else value[:PAGE_TEXT] + " [...]"
    if isinstance(value, dict):
        return {_clipped(key): _clipped(item) for key, item in value.items()}
    return [_clipped(item) for item in value] if isinstance(value, list) else value


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOW_TEXT else text[: SHOW_TEXT // 2] + " [...] " + text[-SHOW_TEXT // 2 :]


def _indented(text: str, width: int) -> list[str]:
    return [" " * width + line for line in text.strip().split("\n")]


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\u3000" else "?" for c in line.replace("\t", " "))
