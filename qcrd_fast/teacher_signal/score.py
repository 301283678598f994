"""`score-teacher`: a teacher's log-probs of texts that one already has, in files beside the rows (`shards`)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.data.splits import label_of
from qcrd_fast.errors import InputError, Stopped
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, Prompter, PromptSettings, TokenIds
from qcrd_fast.teacher_signal.server import ServerScorer
from qcrd_fast.teacher_signal.shards import Entry, Writer, text_digest
from qcrd_fast.teacher_signal.tokenizers import check_same_tokenizer, tokenizer_hash
from qcrd_fast.utils.device import resolve_device
from qcrd_fast.utils.files import printable
from qcrd_fast.utils.signals import StopSignals

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """What to score, by whom, and where it goes. temperature: of the softmax whose log-probs are kept."""

    data: str
    teacher: str
    output: str
    top_logprobs: int = 16
    teacher_model: str = ""
    student: str | None = None
    temperature: float = 1.0
    prompt_template: str = "raw"
    system_prompt: str | None = None
    views: str | None = None
    max_source_length: int = 1024
    max_target_length: int = 256
    label: str | None = None
    task: str | None = None
    batch_size: int = 16
    concurrency: int = 8
    device: str = "auto"
    on_bad_row: str = "error"

    @property
    def is_url(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))


class Target(NamedTuple):
    """A text to score: its key, its prompt and its own tokens."""

    key: str
    source: TokenIds
    tokens: TokenIds


def score_teacher(settings: ScoreSettings, *, dry_run: bool = False) -> tuple[dict[str, Any], Exception | None]:
    """(summary, why it stopped before the end, if it did). The same call again goes on where it was stopped or killed.

    Scored are each question's label, behind the prompt of the label task, and its positives, behind that of the
    rationale task, as `train` reads them.

    Raises:
        InputError: a file, an option, a teacher or an output of another teacher does not fit.
        RunError: the server does not answer, or the disk is full; what was scored is kept.
    """
    if settings.is_url and settings.temperature != 1:
        raise InputError("--temperature: a server gives the log-probs at temperature 1")
    if settings.is_url and not settings.student:
        raise InputError("--student is needed: its tokens are what a server is asked to score")
    if settings.teacher_model and not settings.is_url:
        raise InputError("--teacher-model names a model of a server; --teacher is no URL")
    loaded = load_questions(settings.data, split="train", task=settings.task, on_bad_row=settings.on_bad_row)
    log.info("%s", loaded.taken_for)
    for row in loaded.skipped:
        log.warning("set aside %s", row)
    prompts = PromptSettings.from_option(
        settings.prompt_template, settings.max_source_length, settings.max_target_length, settings.system_prompt,
        settings.views,
    )  # fmt: skip
    scorer = _Server(settings, prompts) if settings.is_url else _Local(settings, prompts)
    targets = list(_targets(loaded.questions, settings, scorer.prompter))
    if not targets:
        raise InputError(f"--data: {printable(settings.data)}: no question has a label or a rationale to score")
    tokens = sum(len(t.tokens) for t in targets)
    plan = {"texts": len(targets), "tokens": tokens, "prompt_tokens": sum(len(t.source) for t in targets)}
    begun, why, mass, count = time.monotonic(), None, 0.0, 0
    digest = tokenizer_hash(scorer.prompter.tokenizer)
    writer = Writer(
        Path(settings.output), digest, scorer.name, settings.top_logprobs, settings.temperature,
        prompts_digest(scorer.prompter.prompts), scorer.weights,
    )  # fmt: skip
    if dry_run:
        writer.check()
        return plan | {"output": settings.output, "bytes_at_most": tokens * (8 + 8 * settings.top_logprobs)}, None
    with writer, StopSignals() as signals:
        todo = list({t.key: t for t in targets if t.key not in writer.known}.values())
        log.info("to score: %d of %d texts, %d tokens", len(todo), len(targets), sum(len(t.tokens) for t in todo))
        said = begun
        for at in range(0, len(todo), settings.batch_size):
            if signals.signum:
                why = Stopped(signals.signum, "the same command goes on")
                break
            batch = todo[at : at + settings.batch_size]
            for target, entry in zip(batch, scorer.score(batch), strict=True):
                writer.add(target.key, entry)
                mass += sum(min(sum(map(math.exp, row)), 1.0) for row in entry.top)
                count += len(entry.tokens)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                log.info("scored %d of %d texts", at + len(batch), len(todo))
        if why is None:
            writer.flush()
        known = len(writer.known)
    summary = {**plan, "scored": known, "mean_mass_of_top": round(mass / count, 6) if count else None}
    return {
        **summary,
        "seconds": round(time.monotonic() - begun, 1),
        "tokenizer": digest,
        "output": settings.output,
    }, why


def prompts_digest(prompts: PromptSettings) -> str:
    """sha256 of what makes prompts of questions; the day that a chat template is told is left out."""
    return hashlib.sha256(repr(dataclasses.replace(prompts, date="")).encode("utf-8", "surrogatepass")).hexdigest()


def _targets(questions: Sequence[Question], settings: ScoreSettings, prompter: Prompter) -> Iterator[Target]:
    for question in questions:
        text, label = question_text(question), label_of(question, settings.label)
        texts: list[tuple[str, str | None, str]] = [] if label is None else [(PREDICT, None, label)]
        texts += [(EXPLAIN, r.view or question.view, r.text) for r in question.positives]
        sources = {asked: prompter.source_ids(asked[0], text, asked[1]) for asked in {(p, v) for p, v, _ in texts}}
        for prefix, view, said in texts:
            yield Target(text_digest(text, prefix, said, view), sources[prefix, view], prompter.target_ids(said))


class _Local:
    """Local weights."""

    def __init__(self, settings: ScoreSettings, prompts: PromptSettings):
        from qcrd_fast.teacher_signal.local import LocalTeacher, load_model

        self.settings, self.name = settings, settings.teacher
        self.model = load_model(settings.teacher, prompts, resolve_device(settings.device))
        self.prompter: Prompter = self.model
        if settings.student:
            check_same_tokenizer(
                load_tokenizer(settings.student, "--student"), self.model.tokenizer, f"--teacher {settings.teacher}"
            )
        self.teacher = LocalTeacher(self.model)
        self.weights: str | None = self.teacher.digest

    def score(self, batch: Sequence[Target]) -> list[Entry]:
        s = self.settings
        sources = {tuple(t.source): t.source for t in batch}
        number = {key: i for i, key in enumerate(sources)}
        tokens = [t.tokens for t in batch]
        source_of = [number[tuple(t.source)] for t in batch]
        logprob_T, top = self.teacher.top(list(sources.values()), tokens, source_of, s.top_logprobs, s.temperature)
        lengths = [len(t) for t in tokens]
        parts = (x.cpu().split(lengths) for x in (logprob_T, top.ids_TK, top.logprob_TK))
        return [Entry(t, *(x.tolist() for x in each)) for t, *each in zip(tokens, *parts, strict=True)]


class _Server:
    """A server that scores prompts; of its weights nothing is known."""

    weights: str | None = None

    def __init__(self, settings: ScoreSettings, prompts: PromptSettings):
        from transformers import AutoConfig

        assert settings.student
        self.k, self.name = settings.top_logprobs, settings.teacher_model or settings.teacher
        tokenizer = load_tokenizer(settings.student, "--student")
        if AutoConfig.from_pretrained(settings.student, trust_remote_code=False).is_encoder_decoder:
            raise InputError(
                "--student: a server scores prompts made of the student's tokens; it needs a decoder-only student"
            )
        self.prompter = Prompter(tokenizer, prompts, False)
        self.scorer = ServerScorer(
            settings.teacher, settings.teacher_model, tokenizer, concurrency=settings.concurrency
        )

    def score(self, batch: Sequence[Target]) -> list[Entry]:
        tokens = [t.tokens for t in batch]
        found = self.scorer.score([t.source for t in batch], tokens, self.k)
        return [Entry(t, *each) for t, each in zip(tokens, found, strict=True)]


def load_tokenizer(name: str, option: str) -> Any:
    """The tokenizer of a folder or hub id. Raises `InputError` naming `option`."""
    from transformers import AutoTokenizer

    from qcrd_fast.models.loading import read_config

    read_config(name, option)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{option}: cannot load the tokenizer of {name!r}: {' '.join(str(error).split())[:200]}"
        ) from error
