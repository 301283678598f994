"""`collect --top-logprobs`: the log-probs of each sample, kept beside the samples (`shards`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from qcrd_fast.collect.collection import CollectSettings, Keep
from qcrd_fast.collect.reply import Choice
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import EXPLAIN
from qcrd_fast.runs.load import find_model
from qcrd_fast.teacher_signal.score import load_tokenizer
from qcrd_fast.teacher_signal.shards import Entry, Writer, text_digest
from qcrd_fast.teacher_signal.tokenizers import tokenizer_hash

UNKNOWN = 0.1  # share of the first tokens that may be none of the student's: bytes of a character
FEWEST = 32  # tokens that are looked at before a teacher is refused


@contextlib.contextmanager
def keeping(settings: CollectSettings) -> Iterator[Keep]:
    """What keeps the log-probs of samples in OUTPUT.logprobs, on the disk when it returns; a shard is written at the
    end.

    Raises `InputError` for an endpoint without `--student`, and, as samples come, for one with other tokens.
    """
    if settings.is_url and not settings.student:
        raise InputError(
            "--top-logprobs of an endpoint needs --student: the tokens that come as text are looked up in its own"
        )
    tokenizer = load_tokenizer(
        settings.student or find_model(settings.teacher), "--student" if settings.student else "--teacher"
    )
    name = settings.teacher_model or settings.teacher
    with Writer(settings.logprobs, tokenizer_hash(tokenizer), name, settings.top_logprobs) as writer:
        lookup = Lookup(tokenizer, settings.teacher)

        def keep(question: Question, rationale: str, choice: Choice) -> bool:
            entry = lookup.entry(choice)
            if entry is not None:
                writer.add(text_digest(question_text(question), EXPLAIN, rationale, question.view), entry)
            return entry is not None

        yield keep
        writer.flush()


class Lookup:
    """Tokens as a server spells them, as ids of a tokenizer."""

    def __init__(self, tokenizer: Any, teacher: str):
        self.teacher = teacher
        self.ids: dict[str, int] = {}
        for id in sorted(tokenizer.get_vocab().values(), reverse=True):  # the lowest id of a text wins
            self.ids[tokenizer.decode([id])] = id
        self.ids |= tokenizer.get_vocab()
        self._seen = self._unknown = 0

    def entry(self, choice: Choice) -> Entry | None:
        """None for a sample without log-probs. Raises `InputError` for a teacher with other tokens."""
        if not choice.logprobs:
            return None
        tokens = [self.id_of(t.token) for t in choice.logprobs]
        self._seen += len(tokens)
        self._unknown += sum(id < 0 for id in tokens)
        if self._seen >= FEWEST and self._unknown > UNKNOWN * self._seen:
            raise InputError(
                f"--top-logprobs: {self.teacher} has other tokens than the student: {self._unknown} of {self._seen} "
                "are none of its own (vLLM: --extra-body '{\"return_tokens_as_token_ids\": true}' gives ids)"
            )
        ids, top = [], []
        for place in choice.logprobs:
            known: dict[int, float] = {}
            for token, logprob in sorted(place.top, key=lambda each: -each[1]):
                if (id := self.id_of(token)) >= 0:
                    known.setdefault(id, logprob)
            ids.append(list(known))
            top.append(list(known.values()))
        return Entry(tokens, [t.logprob for t in choice.logprobs], ids, top)

    def id_of(self, token: str | int) -> int:
        return token if isinstance(token, int) else self.ids.get(token, -1)
