"""A teacher of local weights: hidden states and log-probs of texts that others wrote. It is frozen and in eval mode.

Suffixes: T tokens, H hidden, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import Head
from qcrd_fast.models.prompts import PromptSettings, TokenIds, with_views
from qcrd_fast.models.student import PackedHidden, Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.topk_kl import linear_top
from qcrd_fast.runs.load import ADAPTER, find_model, find_state, load_student
from qcrd_fast.teacher_signal.tokenizers import check_same_tokenizer
from qcrd_fast.utils.device import Autocast

SAMPLED = 64  # values of a parameter, in `weights_digest`


class TopK(NamedTuple):
    """The likeliest tokens at each place of some texts, one text behind the other; `logprob_TK` [nats] in falling
    order."""

    ids_TK: Tensor  # int64
    logprob_TK: Tensor


class LocalTeacher:
    """A model that scores what the student is trained on. `model`: a `Student`, whose weights this takes over.

    Everything it returns is detached; `autocast` is the caller's. `narrow`: where `autocast` computes in bf16 on a
    GPU, the weights become bf16 too.
    """

    def __init__(self, model: Student, autocast: Autocast | None = None, impl: str = "auto", narrow: bool = False):
        self.digest = weights_digest(model.model)  # of the weights as they were stored
        if narrow and _autocasts(model.device, autocast):
            _narrow(model)
            autocast = None
        self.model, self.autocast, self.impl = model, autocast, impl
        model.model.requires_grad_(False).eval()

    @property
    def head(self) -> Head:
        return self.model.head

    def source_ids(self, prefix: str, text: str, view: str | None = None) -> TokenIds:
        """A task's prompt as this model reads it: by its own chat template, where that is asked for."""
        return self.model.source_ids(prefix, text, view)

    @torch.no_grad()
    def hidden(
        self, sources: Sequence[TokenIds], targets: Sequence[TokenIds], source_of: Sequence[int]
    ) -> PackedHidden:
        """Hidden states at the tokens of `targets`, target i following `sources[source_of[i]]`, as `Student.hidden`."""
        with self._context():
            return self.model.hidden(sources, targets, source_of)

    @torch.no_grad()
    def logprob(self, sources: Sequence[TokenIds], targets: Sequence[TokenIds], source_of: Sequence[int]) -> Tensor:
        """log p [T] of each token of the targets, one target behind the other [nats]."""
        with self._context():
            packed = self.model.hidden(sources, targets, source_of)
            found = linear_logprob(packed.hidden, self.head.weight, packed.target, **self.head.options, impl=self.impl)
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def top(
        self,
        sources: Sequence[TokenIds],
        targets: Sequence[TokenIds],
        source_of: Sequence[int],
        k: int,
        tau: float = 1.0,
    ) -> tuple[Tensor, TopK]:
        """(log p [T] of each token itself, the k likeliest at its place) of the softmax of logits / tau."""
        with self._context():
            packed = self.model.hidden(sources, targets, source_of)
            options = dict(**self.head.options, temperature=tau)
            logprob_T, ids_TK, logprob_TK = linear_top(packed.hidden, self.head.weight, packed.target, k, **options)
            return logprob_T, TopK(ids_TK, logprob_TK)

    @contextlib.contextmanager
    def _context(self) -> Any:
        with self.autocast() if self.autocast else contextlib.nullcontext():
            yield


def load_model(name: str, prompts: PromptSettings, device: torch.device, option: str = "--teacher") -> Student:
    """A model that is to teach, in fp32: a run, a checkpoint or an export with the prompts that it was trained with;
    any other folder or hub id with `prompts`, whose views it knows in any case. Raises `InputError` naming `option`."""
    try:
        folder = find_model(name)
        if find_state(folder) is not None or os.path.isfile(os.path.join(folder, ADAPTER)):
            found = load_student(folder, str(device))[0]
            found.prompts = with_views(found.prompts, prompts.views)
            return found
        return Student.load(folder, prompts, device)
    except InputError as error:
        raise InputError(f"{option}: {str(error).removeprefix('student: ')}") from error


def weights_digest(model: Any) -> str:
    """sha256 of each parameter's name, shape and up to `SAMPLED` of its values, evenly spread: training moves them
    all, so that other weights under the same path are noticed without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // SAMPLED, 1)][:SAMPLED].float().cpu()
        digest.update(repr((name, tuple(parameter.shape), some.tolist())).encode())
    return digest.hexdigest()


def load_teacher(name: str, student: Student, autocast: Autocast | None = None, impl: str = "auto") -> LocalTeacher:
    """The teacher of `--teacher PATH`, on the student's device and with its prompts.

    On a GPU its weights are in bf16 where the run's autocast is. Raises `InputError` for what is no model, and for one
    with another tokenizer than the student's.
    """
    model = load_model(name, student.prompts, student.device)
    check_same_tokenizer(student.tokenizer, model.tokenizer, f"--teacher {name}")
    return LocalTeacher(model, autocast, impl, narrow=True)


def _autocasts(device: torch.device, autocast: Autocast | None) -> bool:
    if autocast is None or device.type != "cuda":
        return False
    with autocast():
        return torch.is_autocast_enabled(device.type)


def _narrow(model: Student) -> None:
    """Parameters in bf16; buffers stay, since rotary frequencies need fp32."""
    for parameter in model.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
