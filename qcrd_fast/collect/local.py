"""Teachers without a server: a local transformers model with keyed noise, or a file of earlier samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.collect.prompts import take_apart, written
from qcrd_fast.collect.reply import Choice, TokenLogProb
from qcrd_fast.data.load import iter_records
from qcrd_fast.data.replies import Reader, parse_choices
from qcrd_fast.data.schema import BadRow, Question, Rationale, text_key
from qcrd_fast.errors import InputError
from qcrd_fast.utils.files import printable


class Sampled(NamedTuple):
    """One sample with its tokens counted."""

    choice: Choice
    prompt_tokens: int
    completion_tokens: int


class LocalTeacher:
    """A transformers model (folder or hub id) in fp32. Raises `InputError` if it is not one.

    `api` is chat, completions, or empty for chat where the model has a template; `system` is a chat's first message.
    Sample `index` of a question depends on (seed, question id, index) and on nothing else, but for the rounding of a
    batch.
    """

    def __init__(
        self,
        name: str,
        *,
        api: str,
        temperature: float,
        max_tokens: int,
        seed: int,
        batch_size: int,
        device: str,
        system: str = "",
        top_logprobs: int = 0,
    ):
        from qcrd_fast.generation.engine import SampleSettings
        from qcrd_fast.generation.sample import sample
        from qcrd_fast.models.prompts import PromptSettings
        from qcrd_fast.models.student import Student
        from qcrd_fast.ops.philox import key_words
        from qcrd_fast.utils.device import resolve_device

        self._key_words, self._sample = key_words, sample
        self.seed, self.max_tokens, self.top_logprobs = seed, max_tokens, top_logprobs
        try:
            model = Student.load(name, PromptSettings("raw", max_source_length=4096), resolve_device(device))
        except InputError as error:
            raise InputError(f"--teacher: {str(error).removeprefix('student: ')}") from error
        has_chat = bool(model.tokenizer.chat_template) and not model.is_encoder_decoder
        if api == "chat" and not has_chat:
            raise InputError(f"--api chat: {name} has no chat template; use --api completions")
        self.api = api or ("chat" if has_chat else "completions")
        if self.api == "chat":
            model.prompts = PromptSettings("chat", max_source_length=4096)
        elif system:
            raise InputError(f"--system-prompt: {name} is asked without a chat template, so there is no place for it")
        self.model, self.system = model, system
        self.settings = SampleSettings(temperature=temperature, max_new_tokens=max_tokens, batch_size=batch_size)

    def sample(self, asked: Sequence[tuple[Question, str, int]]) -> list[Sampled]:
        """One sample for each (question, prompt, index)."""
        sources = [self._source(prompt) for _, prompt, _ in asked]
        keys = [self._key_words(self.seed, question.id) for question, _, _ in asked]
        drawn = self._sample(self.model, sources, keys, self.settings, indices=[index for _, _, index in asked])
        eos = self.model.tokenizer.eos_token_id
        known = self._logprobs(sources, drawn) if self.top_logprobs else [()] * len(drawn)
        return [
            Sampled(
                Choice(self.model.text(ids), cut=not ids or ids[-1] != eos, logprobs=logprobs), len(source), len(ids)
            )
            for source, ids, logprobs in zip(sources, drawn, known, strict=True)
        ]

    def _logprobs(self, sources: list[list[int]], drawn: list[list[int]]) -> Sequence[Sequence[TokenLogProb]]:
        """Of each token that was drawn, at temperature 1, from one more pass."""
        import torch

        from qcrd_fast.models.lm_head import eval_mode
        from qcrd_fast.ops.topk_kl import linear_top

        head = self.model.head
        with torch.no_grad(), eval_mode(self.model.model):
            packed = self.model.hidden(sources, drawn, list(range(len(drawn))))
            found = linear_top(packed.hidden, head.weight, packed.target, self.top_logprobs, **head.options)
        own, ids, top = (x.tolist() for x in found)
        places = ((lp, list(zip(k_ids, k_lps, strict=True))) for lp, k_ids, k_lps in zip(own, ids, top, strict=True))
        return [[TokenLogProb(token, *next(places)) for token in tokens] for tokens in drawn]

    def _source(self, prompt: str) -> list[int]:
        if not self.system:
            return self.model.source_ids("", prompt)
        tokenizer, chat = self.model.tokenizer, [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "system", "content": self.system}, *chat], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template may refuse the role
            raise InputError(f"--system-prompt: the model's chat template says {error}") from error
        return list(tokenizer(text, add_special_tokens=False).input_ids)


class Replay:
    """Earlier samples, from any file that `prepare` reads, found by the question's text.

    Raises `InputError`, as file:line, for a bad row.
    """

    def __init__(self, path: str, thinking: str = "auto"):
        self.reader = Reader.from_options(thinking)
        self.by_text: dict[str, list[Rationale]] = {}
        for record in iter_records(Path(path)):
            if isinstance(record, BadRow):
                raise InputError(str(record))
            self.by_text.setdefault(text_key(record.question), []).extend(record.samples)
        if not any(self.by_text.values()):
            raise InputError(f"--teacher replay:{printable(path)}: no samples in this file")

    def samples(self, question: Question) -> list[dict[str, Any]]:
        """All of a question's samples. Its id does not matter: another file may use it for another question."""
        return [self._read(sample, question) for sample in self.by_text.get(text_key(question)) or []]

    def _read(self, sample: Rationale, question: Question) -> dict[str, Any]:
        """The sample as it is written; a raw reply is taken apart first."""
        if sample.reply:
            cut, thinking = sample.truncated, self.reader.thinking
            return written(take_apart(sample.text, question, cut=cut, thinking=thinking), sample.source, thinking)
        reading = self.reader.sample(sample, question.task or "text", parse_choices(question.question))
        if not reading.reasoning:
            return {"rationale": sample.text, "answer": sample.answer, "source": sample.source}
        return written(reading._replace(answer=sample.answer), sample.source, self.reader.thinking)
