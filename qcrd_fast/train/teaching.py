"""What a run asks a teacher for: log p of the tokens that the student trains on, or the teacher's likeliest tokens
there.

One `Teaching` a run, made by `make_teaching`, whatever its teacher is: local weights, a server, the student itself with
context, the student as it was, or files of log-probs. Suffixes: T tokens of the candidates or targets, K likeliest
tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcrd_fast.config import TeacherOptions, TrainConfig
from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.distributed.parallel import unshard
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import Head
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.runs.folder import REFERENCE
from qcrd_fast.teacher_signal.local import LocalTeacher, TopK, load_teacher
from qcrd_fast.teacher_signal.server import ServerScorer
from qcrd_fast.teacher_signal.shards import LogProbs, find_top, read_logprobs
from qcrd_fast.train.examples import Candidate, Example
from qcrd_fast.train.methods import method_of
from qcrd_fast.utils.device import Autocast
from qcrd_fast.utils.files import write_json

log = logging.getLogger(__name__)
DEMONSTRATION = "A worked solution:\n{context}\n\nThe question:\n"  # what sdft's teacher reads before the question
REFERENCE_BATCH = 64  # questions whose reference log-probs are made at once


class TargetText(NamedTuple):
    """A target of a pass: whose question, which task's prompt and view, and its tokens."""

    example: Example
    prefix: str
    tokens: TokenIds
    text: str = ""
    view: str | None = None

    @property
    def prompt(self) -> tuple[str, str, str | None]:
        """What targets behind one prompt have in common."""
        return self.example.id, self.prefix, self.view


class Covered(NamedTuple):
    """The teacher's likeliest tokens at each place of the targets [T, K]; where it has none, `covered_T` is False."""

    top: TopK
    covered_T: Tensor


class Whole(NamedTuple):
    """The teacher's distribution at each place of the targets: hidden states [T, G], and the head that makes logits of
    them."""

    hidden_TG: Tensor
    head: Head


class Teaching:
    """Nothing is known of the tokens."""

    moving: torch.nn.Module | None = None  # weights that change while the run trains, and are kept in its checkpoints
    weights: torch.nn.Module | None = None  # that this holds in the device's memory
    sources: Mapping[str, str] = {}  # sha256 of what it reads and no checkpoint holds, by the option that names it

    def scores(self, asked: Sequence[TargetText]) -> Tensor:
        """log p [T] of each token of some targets, one target behind the other [nats], detached."""
        raise NotImplementedError

    def top(self, asked: Sequence[TargetText]) -> Covered:
        """The teacher's likeliest tokens at each place of some targets."""
        raise NotImplementedError

    def whole(self, asked: Sequence[TargetText]) -> Whole:
        """The teacher's distribution at each place of some targets, detached."""
        raise NotImplementedError

    def after_step(self, student: torch.nn.Module) -> None:
        """The student has made a step."""

    def use(self, impl: str) -> None:
        """Score with another implementation from here on."""


class ModelTeaching(Teaching):
    """A local model, which reads each question as it reads any: with its own prompt, and `context` before the question.

    rows: of the student's head; the teacher's may be padded further.
    """

    def __init__(self, model: LocalTeacher, config: TeacherOptions, rows: int | None = None, context: bool = False):
        self.model, self.config, self.context = model, config, context
        self.rows = rows or len(model.head.weight)
        self.weights, self.sources = model.model.model, {"teacher": model.digest}
        self._prompts: dict[tuple[str, str, str | None], TokenIds] = {}

    def use(self, impl: str) -> None:
        self.model.impl = impl

    def source(self, asked: TargetText) -> TokenIds:
        if (key := asked.prompt) not in self._prompts:
            example, text = asked.example, asked.example.text
            if self.context and example.positives:
                text = DEMONSTRATION.format(context=example.positives[0].text.strip()) + text
            self._prompts[key] = self.model.source_ids(asked.prefix, text, asked.view)
        return self._prompts[key]

    def _laid_out(self, asked: Sequence[TargetText]) -> tuple[list[TokenIds], list[TokenIds], list[int]]:
        """(sources, targets, source of each target): a prompt that several targets follow is read once."""
        first = {a.prompt: a for a in reversed(asked)}
        at = {key: i for i, key in enumerate(dict.fromkeys(a.prompt for a in asked))}
        return [self.source(first[key]) for key in at], [a.tokens for a in asked], [at[a.prompt] for a in asked]

    def scores(self, asked: Sequence[TargetText]) -> Tensor:
        return self.model.logprob(*self._laid_out(asked))

    def top(self, asked: Sequence[TargetText]) -> Covered:
        _, found = self.model.top(*self._laid_out(asked), self.config.top_logprobs, self.config.kd_temperature)
        return _within(found, self.rows)

    def whole(self, asked: Sequence[TargetText]) -> Whole:
        return Whole(self.model.hidden(*self._laid_out(asked)).hidden, self.model.head)


class SelfTeaching(ModelTeaching):
    """The student as it began, or a moving average of it, reading a rationale before the question."""

    def __init__(self, model: LocalTeacher, config: TeacherOptions):
        super().__init__(model, config, context=True)
        self.moving = self.weights if config.teacher_ema < 1 else None
        self.sources = {"student": model.digest} if self.moving is None else {}

    @torch.no_grad()
    def after_step(self, student: torch.nn.Module) -> None:
        if self.moving is None:
            return
        own = dict(self.moving.named_parameters())
        for name, parameter in student.named_parameters():
            own[name].lerp_(unshard(parameter.detach()).to(own[name].dtype), 1 - self.config.teacher_ema)


class ServerTeaching(Teaching):
    """A server that scores prompts; it is sent the student's own tokens."""

    def __init__(self, scorer: ServerScorer, device: torch.device):
        self.scorer, self.device = scorer, device

    def scores(self, asked: Sequence[TargetText]) -> Tensor:
        sources = [a.example.explain if a.prefix == EXPLAIN else a.example.predict for a in asked]
        found = self.scorer.score(sources, [a.tokens for a in asked])
        return torch.tensor([x for each in found for x in each.logprob], device=self.device)


class ReferenceTeaching(Teaching):
    """The initial student's log-probs of the teacher's minority, made once (`reference_logprobs`)."""

    def __init__(self, known: Mapping[str, Sequence[Sequence[float]]], device: torch.device):
        self.known, self.device = known, device

    def scores(self, asked: Sequence[TargetText]) -> Tensor:
        """0 for targets that are no minority."""
        found: list[float] = []
        for a in asked:
            at = next((i for i, c in enumerate(a.example.minority) if c.tokens is a.tokens), None)
            found += [0.0] * len(a.tokens) if at is None else self.known[a.example.id][at]
        return torch.tensor(found, dtype=torch.get_default_dtype(), device=self.device)


class FileTeaching(Teaching):
    """Log-probs from files, found by question, task and tokens; what is not there is not covered."""

    def __init__(self, files: LogProbs, config: TeacherOptions, student: Student):
        self.files, self.tau, self.device = files, config.kd_temperature, student.device
        self.rows = len(student.head.weight)
        self._found: dict[tuple[str, str, str, str | None], TopK] = {}

    def digest(self) -> str:
        """sha256 of what was found so far: the same wherever in the folder it is, and whatever else is there."""
        digest = hashlib.sha256()
        for key, found in self._found.items():
            digest.update(repr((key, found.ids_TK.shape)).encode())
            digest.update(found.ids_TK.numpy().tobytes() + found.logprob_TK.numpy().tobytes())
        return digest.hexdigest()

    def _find(self, asked: TargetText) -> TopK:
        key = asked.example.id, asked.prefix, asked.text, asked.view
        if key not in self._found:
            self._found[key] = find_top(
                self.files, asked.example.text, asked.prefix, asked.text, asked.tokens, asked.view
            )
        return self._found[key]

    def top(self, asked: Sequence[TargetText]) -> Covered:
        found = [self._find(a) for a in asked]
        ids_TK = torch.cat([f.ids_TK for f in found]).to(self.device)
        logq_TK = torch.cat([f.logprob_TK for f in found]).to(self.device)
        if self.tau != self.files.temperature:  # known up to a constant, which renormalising takes out
            logq_TK = logq_TK * (self.files.temperature / self.tau)
        return _within(TopK(ids_TK, logq_TK), self.rows)


def _within(top: TopK, rows: int) -> Covered:
    """Without tokens of rows that the student's head has not: they pad the teacher's, and count as the rest."""
    outside_TK = top.ids_TK >= rows
    logq_TK = top.logprob_TK.masked_fill(outside_TK, -torch.inf)
    return Covered(TopK(top.ids_TK.masked_fill(outside_TK, 0), logq_TK), (logq_TK > -torch.inf).any(1))


def make_teaching(
    config: TrainConfig,
    student: Student,
    examples: Sequence[Example],
    autocast: Autocast,
    run: Path,
    digest: str,
    comm: Comm = SINGLE,
    resumed: bool = False,
) -> Teaching | None:
    """The teaching that `config.method` needs; None for a method without one. Before the student is shared among ranks.

    digest: of the training rows. resumed: the student's weights are no longer those that it began with.

    Raises `InputError` for a teacher with another tokenizer, and for files that hold nothing of these rows.
    """
    method = method_of(config)
    if method.reference:
        known = reference_logprobs(config, student, examples, autocast, run, digest, comm, resumed)
        return ReferenceTeaching(known, student.device)
    if method.teacher == "self":
        model = Student.load(str(config.student), student.prompts, student.device, config.attn_implementation)
        return SelfTeaching(LocalTeacher(model, autocast, config.impl), config)
    if method.teacher is None or (method.teacher == "mentor" and not config.kd_lambda):
        return None
    if config.teacher_logprobs:
        return _of_files(config, student, examples)
    if config.teacher_is_url:
        if student.is_encoder_decoder:
            raise InputError(
                "--teacher: a server scores prompts made of the student's tokens; it needs a decoder-only student"
            )
        scorer = ServerScorer(str(config.teacher), config.teacher_model or "", student.tokenizer)
        return ServerTeaching(scorer, student.device)
    teacher = load_teacher(str(config.teacher), student, autocast, config.impl)
    return ModelTeaching(teacher, config, len(student.head.weight))


def _of_files(config: TrainConfig, student: Student, examples: Sequence[Example]) -> FileTeaching:
    files = read_logprobs(Path(str(config.teacher_logprobs)), student.tokenizer)
    if config.teacher_tail and config.kd_temperature != files.temperature:
        raise InputError(
            f"--kd-temperature {config.kd_temperature:g}: {config.teacher_logprobs} holds log-probs at temperature "
            f"{files.temperature:g}, of which the rest of the vocabulary at another one cannot be told; use "
            "--no-teacher-tail, or score-teacher --temperature"
        )
    teaching = FileTeaching(files, config, student)
    targets = [TargetText(e, EXPLAIN, c.tokens, c.text, c.view) for e in examples for c in e.positives]
    covered = [bool(teaching.top([asked]).covered_T.any()) for asked in targets]
    labels = [bool(teaching.top([TargetText(e, PREDICT, e.label, e.answer)]).covered_T.any()) for e in examples]
    if not any(covered) and not any(labels):
        raise InputError(
            f"--teacher-logprobs: {config.teacher_logprobs} holds nothing of these rows: of {len(targets)} rationales "
            f"none, of {len(labels)} labels none; score-teacher --data with the same rows writes them"
        )
    if not all(covered) or not all(labels):
        log.warning(
            "--teacher-logprobs: known are %d of %d rationales and %d of %d labels; the others train by cross-entropy "
            "alone",
            sum(covered), len(covered), sum(labels), len(labels),
        )  # fmt: skip
    teaching.sources = {"teacher_logprobs": teaching.digest()}
    return teaching


def reference_logprobs(
    config: TrainConfig,
    student: Student,
    examples: Sequence[Example],
    autocast: Autocast,
    run: Path,
    digest: str,
    comm: Comm,
    resumed: bool,
) -> dict[str, list[list[float]]]:
    """{question id: log p of each token of each minority rationale} under the initial student, kept in the run
    folder."""
    path, begun = run / REFERENCE, {"data_sha256": digest, "student": str(config.student)}

    def read() -> Any:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if {name: found[name] for name in begun} == begun and _fits(found["logprobs"], examples):
                return found["logprobs"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return None

    if resumed and (known := comm.on_rank0(read)) is not None:
        return dict(known)
    source = student
    if resumed:
        source = Student.load(str(config.student), student.prompts, student.device, config.attn_implementation)
    training = source.model.training
    asked = [e for e in examples if e.minority]
    if not asked:
        log.warning("--method npo: no question has a minority rationale to push away, so this is sft-all")
    own = list(comm.shard(asked))
    found: list[list[list[float]]] = []
    source.model.eval()
    for at in range(0, len(own), REFERENCE_BATCH):
        some = own[at : at + REFERENCE_BATCH]
        targets = [c.tokens for e in some for c in e.minority]
        source_of = [i for i, e in enumerate(some) for _ in e.minority]
        scored = iter(_logprobs(source, [e.explain for e in some], targets, source_of, autocast, config.impl))
        found += [[next(scored) for _ in e.minority] for e in some]
    source.model.train(training)
    known = dict(zip((e.id for e in asked), comm.gather_in_order(found), strict=True))
    comm.on_rank0(lambda: write_json(path, {**begun, "logprobs": known}))
    return known


@torch.no_grad()
def _logprobs(
    model: Student,
    sources: Sequence[TokenIds],
    targets: Sequence[TokenIds],
    source_of: Sequence[int],
    autocast: Autocast,
    impl: str,
) -> list[list[float]]:
    with autocast():
        packed = model.hidden(sources, targets, source_of)
        found = linear_logprob(packed.hidden, model.head.weight, packed.target, **model.head.options, impl=impl)
    return [part.tolist() for part in found.split([len(t) for t in targets])]


def _fits(known: Any, examples: Sequence[Example]) -> bool:
    wanted = {e.id: [len(c.tokens) for c in e.minority] for e in examples if e.minority}
    return {i: [len(each) for each in rows] for i, rows in known.items()} == wanted


def asked_of(batch: Sequence[Example], candidates: Sequence[Candidate], question: Sequence[int]) -> list[TargetText]:
    """The rationales of a pass as a teacher is asked for them."""
    return [TargetText(batch[q], EXPLAIN, c.tokens, c.text, c.view) for c, q in zip(candidates, question, strict=True)]


def padded(asked: Sequence[TargetText], pad: int | None) -> list[TargetText]:
    """The targets at one length; as they are where `pad` is None."""
    if pad is None:
        return list(asked)
    return [a._replace(tokens=t) for a, t in zip(asked, pad_all([a.tokens for a in asked], pad), strict=True)]


def pad_all(targets: Sequence[TokenIds], pad: int) -> list[TokenIds]:
    longest = max(map(len, targets))
    return [[*t, *[pad] * (longest - len(t))] for t in targets]
