"""A collection: its settings, its questions with the samples still missing, its ledger and its output.

The ledger is the truth (see `ledger`); the output has a row for each question, appended when its last sample came and
written whole, in the order of the questions, when the collector ends in any orderly way. No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qcrd_fast.collect.credentials import Pairs
from qcrd_fast.collect.ledger import Ledger, Prices
from qcrd_fast.collect.prompts import Template, prompt_digest, take_apart, written
from qcrd_fast.collect.reply import Choice, Reply, estimate_tokens
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.files import append_lines, printable, require_place, write_lines
from qcrd_fast.utils.redact import redact

log = logging.getLogger(__name__)

REPLAY = "replay:"
Keep = Callable[[Question, str, Choice], bool]  # keeps the log-probs of a rationale's reply; False where it has none
_ADDRESS = re.compile(r"(?:[^/@\s]*@)?(?:[\w.-]+:\d+(?:[/?]|$)|[\w-]+(?:\.[\w-]+)+/(?:\w+/)*v\d\w*(?:[/?]|$))")
EARLY = 5  # questions after which a teacher that repeats itself is reported


@dataclasses.dataclass(frozen=True)
class CollectSettings:
    """What to collect, from which teacher, and when to stop. Prices are per million tokens."""

    questions: str
    output: str
    teacher: str
    teacher_model: str = ""
    api: str = ""
    num_samples: int = 5
    temperature: float = 0.7
    max_tokens: int = 512
    template: str = "auto"
    system_prompt: str = ""
    thinking: str = "auto"
    task: str | None = None
    split: str | None = None
    concurrency: int = 8
    timeout_s: float = 180.0
    deadline_s: float = 600.0
    grace_s: float = 30.0
    max_failures: int = 10
    price_input: float | None = None
    price_output: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    header: Pairs = dataclasses.field(default=(), repr=False)
    query: Pairs = dataclasses.field(default=(), repr=False)
    allow_plain_http: bool = False
    top_logprobs: int = 0
    student: str | None = None
    seed: int = 0
    batch_size: int = 16
    device: str = "auto"
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{field.name.removesuffix('_s').replace('_', '-')} must be finite; got {value}")
        check_teacher(self.teacher)
        for name in ("teacher_model", "system_prompt", "extra_body"):
            try:
                json.dumps(getattr(self, name), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise InputError(f"--{name.replace('_', '-')} has characters that are no UTF-8") from None

    @property
    def is_url(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))

    @property
    def is_replay(self) -> bool:
        return self.teacher.startswith(REPLAY)

    @property
    def logprobs(self) -> Path:
        """The folder of log-probs."""
        return Path(self.output + ".logprobs")

    @property
    def ledger(self) -> Path:
        return Path(self.output + ".ledger.jsonl")

    @property
    def prices(self) -> Prices:
        return Prices(self.price_input or 0.0, self.price_output or 0.0)


def check_teacher(teacher: str) -> None:
    """Raises `InputError` for an address without its scheme."""
    if _ADDRESS.match(teacher) and not Path(teacher).exists():
        raise InputError("--teacher: an address begins with http:// or https://")


class Collection:
    """The questions with their missing samples, the ledger, and the reason to stop, if any."""

    def __init__(self, settings: CollectSettings):
        self.settings = settings
        if settings.max_cost is not None and settings.price_input is None and settings.price_output is None:
            raise InputError("--max-cost needs --price-input and --price-output, the prices of a million tokens")
        if settings.system_prompt and settings.api == "completions":
            raise InputError("--system-prompt belongs to a chat; with --api completions put it into --template")
        output = Path(settings.output)
        require_place(output, "--output")
        if output.resolve() == Path(settings.questions).resolve():
            raise InputError(f"--output: {printable(output)} is also --questions; choose another name")
        if _holds_something(output) and not _holds_something(settings.ledger):
            raise InputError(f"--output: {printable(output)} exists and has no ledger beside it; choose another name")
        template = Template(settings.template)
        loaded = load_questions(
            settings.questions,
            split=settings.split,
            part=settings.split,
            task=settings.task,
            on_bad_row=settings.on_bad_row,
        )
        log.info("%s", loaded.taken_for)
        for row in loaded.skipped:
            log.warning("set aside %s", row)
        self.questions = loaded.questions
        guessed = settings.task is None and not any(question.gold for question in self.questions)
        self.unknown_task = guessed and all(question.task == "text" for question in self.questions)
        self.prompts = {question.id: template.prompt(question) for question in self.questions}
        self._by_id = {question.id: question for question in self.questions}
        self.ledger = Ledger(settings.ledger, settings.thinking, self._reread)
        self.model = settings.teacher_model or settings.teacher.removeprefix(REPLAY)
        self.keep: Keep | None = None  # takes a sample's log-probs
        self.why: Exception | None = None
        self.given_up: dict[str, str] = {}
        self.begun = time.monotonic()

    # What is there and what is missing

    def samples(self, question: Question) -> list[dict[str, Any]]:
        """Return the samples that count. A truncated one counts until a higher `--max-tokens` allows another try."""
        found = self.ledger.samples.get(question.id, [])
        return [s for s in found if "cut" not in s or s["cut"] >= self.settings.max_tokens or self.settings.is_replay]

    def missing(self, question: Question) -> int:
        return max(0, self.settings.num_samples - len(self.samples(question)))

    @property
    def samples_missing(self) -> int:
        return sum(map(self.missing, self.questions))

    def digest(self, question: Question) -> str:
        return prompt_digest(self.prompts[question.id], self.settings.system_prompt)

    def prompt_tokens(self, question: Question) -> int:
        """Of one request, estimated."""
        return estimate_tokens(self.prompts[question.id]) + estimate_tokens(self.settings.system_prompt)

    def check_ledger(self) -> None:
        """Raise `InputError` if the ledger's samples come from other prompts or a larger `max_tokens` than this run's,
        or if it holds questions that the output would leave out."""
        before, most = self.ledger.settings.get("max_tokens"), self.settings.max_tokens
        if self.settings.is_url and self.ledger.samples and isinstance(before, int) and before > most:
            path = printable(self.ledger.path)
            raise InputError(f"{path}: sampled with max_tokens {before}, now it is {most}; choose another --output")
        digests = {question.id: self.digest(question) for question in self.questions}
        for id, digest in self.ledger.prompts.items():
            if id not in digests:
                what = f"has samples of question {id!r}, which is not in --questions"
            elif digest != digests[id]:
                what = (
                    f"asked question {id!r} with another prompt (text, --task, --template or --system-prompt changed)"
                )
            else:
                continue
            raise InputError(f"{printable(self.ledger.path)} {what}; choose another --output")

    def predict(self) -> dict[str, Any]:
        """Estimate requests and tokens for the missing samples."""
        todo = [(question, self.missing(question)) for question in self.questions if self.missing(question)]
        samples = sum(count for _, count in todo)
        tokens = [self.prompt_tokens(question) for question, _ in todo]
        each = sum(t * count for t, (_, count) in zip(tokens, todo, strict=True))
        expected = round(samples * self.ledger.expected_tokens(self.settings.max_tokens))
        prediction: dict[str, Any] = {"questions": len(todo), "samples": samples}
        if self.settings.is_replay:
            return prediction
        if self.settings.is_url:
            prediction |= {"requests": len(todo), "requests_if_n_is_ignored": samples}
        prediction |= {
            "prompt_tokens": sum(tokens) if self.settings.is_url else each,
            "prompt_tokens_if_n_is_ignored": each,
            "completion_tokens": expected,
            "tokens_a_sample": round(self.ledger.expected_tokens(self.settings.max_tokens)),
            "completion_tokens_at_most": samples * self.settings.max_tokens,
        }
        if self.has_prices:
            cost = self.settings.prices.cost
            prediction["cost"] = cost(sum(tokens), expected)
            prediction["cost_at_most"] = cost(each, samples * self.settings.max_tokens)
        return prediction

    @property
    def has_prices(self) -> bool:
        return self.settings.price_input is not None or self.settings.price_output is not None

    @property
    def has_cost(self) -> bool:
        return self.has_prices or self.ledger.totals.reported_cost > 0

    @property
    def cost(self) -> float:
        """By the prices that were given; else as the server reported it."""
        totals = self.ledger.totals
        if not self.has_prices:
            return totals.reported_cost
        return self.settings.prices.cost(totals.prompt_tokens, totals.completion_tokens)

    # Writing

    def row(self, question: Question) -> dict[str, Any]:
        task = None if self.unknown_task else question.task
        row = {"id": question.id, "question": question.question, "context": question.context, "answer": question.gold}
        row |= {"task": task, "domain": question.domain, "split": question.split, "view": question.view}
        row = {key: value for key, value in row.items() if value is not None}
        samples = self.samples(question)[: self.settings.num_samples]
        return row | {"samples": [{**s, "cut": True} if "cut" in s else s for s in samples]}

    def write(self, *, whole_only: bool = False) -> None:
        """The output, whole: every question with samples, or with all of its samples."""
        kept = [q for q in self.questions if self.samples(q) and not (whole_only and self.missing(q))]
        if kept or Path(self.settings.output).exists():
            with self._writing():
                write_lines(Path(self.settings.output), map(self.row, kept))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{printable(self.settings.output)}: {error.strerror}"
            raise RunError(f"cannot write {where}; nothing is lost, the same command continues") from error

    def take(self, request: str | None, question: Question, reply: Reply, texts: list[dict[str, Any]]) -> None:
        """Append a reply's samples to the ledger, and the question's row to the output once it is complete."""
        faults = dict(reply.faults)
        for sample, choice in zip(texts[: self.missing(question)], reply.choices, strict=False):
            if self.keep and not self.keep(question, sample["rationale"], choice):
                faults["no log-probs"] = faults.get("no log-probs", 0) + 1
        if len(texts) > self.missing(question):
            faults["surplus"] = len(texts) - self.missing(question)
        for sample in texts:
            if sample["answer"] is None:
                faults["no readable answer"] = faults.get("no readable answer", 0) + 1
            if sample.get("cut"):
                faults["cut at the maximum length"] = faults.get("cut at the maximum length", 0) + 1
        self.ledger.reply(
            request,
            question.id,
            self.digest(question),
            texts[: self.missing(question)],
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            estimated=reply.estimated,
            faults=faults,
            seconds=round(reply.seconds, 3),
            **({"usage": reply.usage} if reply.usage else {}),
        )
        if not self.missing(question):
            with self._writing():
                append_lines(Path(self.settings.output), [self.row(question)])
            done = sum(not self.missing(q) for q in self.questions) if len(self.ledger.samples) <= 2 * EARLY else 0
            if done == EARLY:
                self.warn()

    def read(self, question: Question, choice: Choice) -> dict[str, Any]:
        """A sample as the ledger has it: read, as it came, and its message where that holds more."""
        sample = self._read(question, choice.text, choice.cut) | {"text": choice.text}
        sample |= {"message": choice.message} if choice.message and choice.message.get("content") != choice.text else {}
        return sample | ({"cut": True} if choice.cut else {})

    def _read(self, question: Question, text: str, cut: bool) -> dict[str, Any]:
        thinking = self.settings.thinking
        return written(take_apart(text, question, cut=cut, thinking=thinking), self.model, thinking)

    def _reread(self, id: str, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample of the ledger read with another `--thinking`; nothing is asked for again."""
        if (question := self._by_id.get(id)) is None:
            return {}
        again = self._read(question, sample["text"], bool(sample.get("cut")))
        return {"reasoning": None, **again, "source": sample["source"]}

    # Ends

    def stop(self, why: Exception) -> None:
        """No further request is begun; the first reason counts."""
        if self.why is None:
            self.why = why

    def identical(self) -> tuple[int, int]:
        """Count questions whose samples are all equal, and questions with two complete samples or more."""
        same = several = 0
        for question in self.questions:
            answered = [s for s in self.samples(question) if s["answer"] is not None and s["rationale"].strip()]
            said = [(s["rationale"], s.get("reasoning")) for s in answered]
            several += len(said) > 1
            same += len(said) > 1 and len(set(said)) == 1
        return same, several

    def cut(self) -> int:
        """Samples that were cut before they came to an answer."""
        return sum("cut" in s for question in self.questions for s in self.samples(question))

    def advice_on_cuts(self) -> str:
        most = self.settings.max_tokens
        return (
            f"raise --max-tokens ({most}); a teacher that thinks may need {max(8192, 4 * most)} and more. "
            "The same command then asks again for these alone"
        )

    def warn(self) -> None:
        """Warn about faults that most samples have, with advice."""
        samples = [s for question in self.questions for s in self.samples(question)]
        answered = [s for s in samples if s["answer"] is not None]
        cut = self.cut()
        if cut and (cut < len(samples) or self.samples_missing or not self.settings.is_url):
            log.warning("%d of %d samples were cut before an answer: %s", cut, len(samples), self.advice_on_cuts())
        same, several = self.identical()
        if several and 2 * same > several:
            log.warning(
                "all samples of a question are the same for %d of %d questions: the teacher seems to ignore the "
                "temperature (%g), so there is nothing to vote on",
                same,
                several,
                self.settings.temperature,
            )
        silent = sum(not s["rationale"].strip() for s in answered)
        if 2 * silent > len(answered):
            log.warning(
                "%d of %d samples have an answer and no rationale: a teacher that hides its reasoning has to be asked "
                "for an explanation (--template), or to show its reasoning (--extra-body)",
                silent,
                len(answered),
            )
        unread = len(samples) - len(answered) - cut
        if unread and 2 * unread > len(samples):
            log.warning(
                "%d of %d samples have no answer that can be read: look at `text` in %s",
                unread,
                len(samples),
                printable(self.ledger.path),
            )

    def summary(self) -> dict[str, Any]:
        """Summarise the ledger over all runs."""
        totals, samples = self.ledger.totals, [s for q in self.questions for s in self.samples(q)]
        result: dict[str, Any] = {
            "questions": len(self.questions),
            "complete": sum(not self.missing(q) for q in self.questions),
            "samples": len(samples),
            "missing": self.samples_missing,
            "unreadable_answers": sum(s["answer"] is None for s in samples),
            "cut_before_an_answer": self.cut(),
            "without_rationale": sum(not s["rationale"].strip() for s in samples),
            "questions_all_the_same": self.identical()[0],
            "requests": totals.requests,
            "lost_in_flight": totals.lost,
            "failures": dict(totals.failures),
            "faults": dict(totals.faults),
            "prompt_tokens": totals.prompt_tokens,
            "completion_tokens": totals.completion_tokens,
            "estimated_replies": totals.estimated,
        }
        if self.has_cost:
            result["cost"] = round(self.cost, 6)
        result |= {"seconds": round(time.monotonic() - self.begun, 1), "output": self.settings.output}
        return result | {"ledger": str(self.ledger.path), "stopped": redact(str(self.why)) if self.why else None}


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
