"""Prompts of the student's tasks, and tokenization of prompts and targets."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcrd_fast.errors import InputError
from qcrd_fast.models.views import read_views, view_text

PREDICT, EXPLAIN, REASON = "predict: ", "explain: ", "reason: "
TokenIds = list[int]
_TEXT_FILE = re.compile(r"\S+\.(txt|md|jinja2?)")  # a name of a file, and no system prompt


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Settings that turn a question into a prompt. Saved with every checkpoint, for serving."""

    template: str = "raw"  # raw, chat, or a text containing {prompt}
    max_source_length: int = 1024
    max_target_length: int = 256
    system: str = ""  # text of the system message; with the chat template alone
    # how texts become tokens; 1: a raw prompt's newline by itself, and texts of special tokens as tokens
    version: int = 2
    views: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of `--views`: what asks for each view
    date: str = ""  # the day, as YYYY-MM-DD, that a chat template which writes the date is told; empty: today

    def __post_init__(self) -> None:
        lengths = self.max_source_length, self.max_target_length
        if not isinstance(self.template, str) or any(type(length) is not int or length < 1 for length in lengths):
            raise InputError(f"a prompt has a text as template and two lengths above 0; got {self}")
        if self.template not in ("raw", "chat") and "{prompt}" not in self.template:
            raise InputError(
                f"a prompt's template is raw, chat or a text with {{prompt}} in it; got {self.template[:80]!r}"
            )
        if not isinstance(self.system, str) or (self.system and self.template != "chat"):
            raise InputError("--system-prompt needs --prompt-template chat; a template FILE holds such a text itself")
        if not all(isinstance(text, str) for pair in self.views.items() for text in pair):
            raise InputError(f"a prompt's views are a table of texts; got {self.views!r}")
        if type(self.version) is not int or self.version not in (1, 2):
            raise InputError(f"a prompt's version is 1 or 2, or that of a newer qcrd-fast; got {self.version!r}")
        try:
            _ = self.date and datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            raise InputError(f"a prompt's date is YYYY-MM-DD; got {self.date!r}") from error

    @classmethod
    def of_state(cls, saved: Mapping[str, Any]) -> PromptSettings:
        """Read what a `state.json` holds under `prompt`. An older file has no version: 2 if it has system prompts,
        else 1."""
        unsaid: dict[str, Any] = {"version": 2 if "system" in saved else 1}
        return cls(**unsaid | dict(saved))

    @classmethod
    def from_option(
        cls,
        value: str,
        max_source_length: int,
        max_target_length: int,
        system: str | None = None,
        views: str | None = None,
    ) -> PromptSettings:
        """Read `--prompt-template raw|chat|FILE`, `--system-prompt TEXT|FILE` and `--views FILE`. Raises `InputError`
        for a missing file, one without {prompt} or one that is not UTF-8, and for a system prompt without the chat
        template."""
        if value not in ("raw", "chat"):
            path = Path(value)
            if not os.path.isfile(path):
                raise InputError(f"--prompt-template: {value!r} is neither raw, chat, nor a file")
            value = _read_text(path, "--prompt-template")
            if "{prompt}" not in value:
                raise InputError(f"--prompt-template: {path} does not contain {{prompt}}")
        if system and (system.startswith("@") or os.path.isfile(system) or _TEXT_FILE.fullmatch(system)):
            path = Path(system.removeprefix("@"))
            system = _read_text(path, "--system-prompt").strip()
            if not system:
                raise InputError(f"--system-prompt: {path} is empty")
        date = datetime.date.today().isoformat() if value == "chat" else ""
        return cls(value, max_source_length, max_target_length, system or "", views=read_views(views), date=date)


def _read_text(path: Path, option: str) -> str:
    """A text file. Raises `InputError` naming `option` where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{option}: cannot read {path}: {error}") from error


class Lengths(NamedTuple):
    """Tokens of prompts (without their template) and of targets (with EOS)."""

    prompts: list[int]
    targets: list[int]


class Prompter:
    """Tokenizer and prompt template: text to tokens, for encoder-decoders (T5) and decoder-only models.

    Raises `InputError` when the tokenizer has no end-of-sequence token, no chat template where one is asked for, or one
    that leaves the system prompt out.
    """

    def __init__(self, tokenizer: Any, prompts: PromptSettings, is_encoder_decoder: bool):
        self.tokenizer, self.prompts, self.is_encoder_decoder = tokenizer, prompts, is_encoder_decoder
        self._special_texts = special_texts(tokenizer)
        self._lengths: Lengths | None = None
        if tokenizer.eos_token_id is None:
            raise InputError("student: the tokenizer has no end-of-sequence token")
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if prompts.template == "chat" and (is_encoder_decoder or not tokenizer.chat_template):
            raise InputError("--prompt-template chat: the student has no chat template")
        if prompts.system:
            self._check_system()

    def _check_system(self) -> None:
        try:
            rendered, why = self.chat_text("x"), "it leaves it out"
        except Exception as error:  # templates raise what they like, such as "System role not supported"
            rendered, why = "", str(error)
        if self.prompts.system.strip() not in rendered:
            raise InputError(f"--system-prompt: the student's chat template takes no system message: {why}")

    def chat_text(self, text: str) -> str:
        """The chat template's text of a user message, after the system message if there is one."""
        system = [{"role": "system", "content": self.prompts.system}] if self.prompts.system else []
        chat = [*system, {"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(
                chat, chat_template=self.own_template(), add_generation_prompt=True, tokenize=False
            )
        )

    def own_template(self) -> str:
        """The tokenizer's chat template, which takes the date of training for today's."""
        own = str(self.tokenizer.get_chat_template())
        forms = (
            {form for _, form in re.findall(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)", own)}
            if self.prompts.date
            else set()
        )
        if not forms:
            return own
        date = datetime.datetime.fromisoformat(self.prompts.date)
        dates = ", ".join(f"{quoted(form)}: {quoted(date.strftime(form))}" for form in sorted(forms))
        return "{%- macro strftime_now(form) -%}{{- {" + dates + "}[form] -}}{%- endmacro -%}{{- '' }}" + own

    def source_ids(self, prefix: str, question: str, view: str | None = None) -> TokenIds:
        """Tokens of a task's input; `view`: it asks for a rationale of this view (`models.views`). A text over the
        maximum length loses its beginning, which is the context, or else the story before the question; the template,
        the prefix and the question at its end stay.

        Raises `InputError` where a decoder would have nothing to go on from.
        """
        template, limit, tokenizer = self.prompts.template, self.prompts.max_source_length, self.tokenizer
        prefix += view_text(view, self.prompts.views)
        question = self._without_specials(question.strip())
        text = prefix + question
        length = len(self._plain_ids(text))
        if self._lengths:
            self._lengths.prompts.append(length)
        if length > limit:
            room = max(limit - len(self._plain_ids(prefix)), 1)
            text = prefix + tokenizer.decode(self._plain_ids(question)[-room:]).lstrip()
        if template == "chat":
            ids = self._plain_ids(self.chat_text(text))
        else:
            ids = list(tokenizer(text if self.newline_apart else self.form.replace("{prompt}", text)).input_ids)
            if self.is_encoder_decoder:
                return ids
            if ids and ids[-1] == tokenizer.eos_token_id:  # a prompt goes on
                ids.pop()
            # the template's own, and the tokenizer's
            if ids[:2] == [tokenizer.bos_token_id] * 2 and self.prompts.version > 1:
                ids.pop(0)
            ids += self._plain_ids("\n") if self.newline_apart else []
        if not ids:
            raise InputError(f"the prompt {text[:80]!r} has no token in the model's vocabulary")
        return ids

    @property
    def form(self) -> str:
        """Return the text around `{prompt}` of a custom template.

        It is tokenized together with the prompt, so that servers send the same tokens.
        """
        if self.prompts.template != "raw":
            return self.prompts.template
        return "{prompt}" if self.is_encoder_decoder else "{prompt}\n"

    @property
    def newline_apart(self) -> bool:
        """Return whether the newline after a raw prompt is a token of its own."""
        return self.prompts.version == 1 and self.prompts.template == "raw" and not self.is_encoder_decoder

    @property
    def special_texts(self) -> list[str]:
        """The special tokens of the tokenizer that are broken up where a text spells them."""
        return self._special_texts if self.prompts.version > 1 else []

    def target_ids(self, text: str) -> TokenIds:
        """Tokens of a label or rationale with EOS; a text cut at the maximum length gets no EOS."""
        ids, limit = self._plain_ids(self._without_specials(text.strip())), self.prompts.max_target_length
        if self._lengths:
            self._lengths.targets.append(len(ids) + 1)
        return [*ids, self.tokenizer.eos_token_id] if len(ids) < limit else ids[:limit]

    def piece_ids(self, text: str) -> TokenIds:
        """Tokens of a piece of a target as it stands: white space kept, no EOS, nothing cut."""
        return self._plain_ids(self._without_specials(text))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Lengths]:
        """Inside, the length of every prompt and target is noted, as it is before anything is cut."""
        before, self._lengths = self._lengths, Lengths([], [])
        try:
            yield self._lengths
        finally:
            self._lengths = before

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _without_specials(self, text: str) -> str:
        """`text` with a space within each special token that it spells, so that none of them acts as one."""
        for special in self.special_texts:
            text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _plain_ids(self, text: str) -> TokenIds:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def special_texts(tokenizer: Any) -> list[str]:
    """Return the texts of a tokenizer's special tokens, longest first. A text that contains one would be read as it."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", []))
    return sorted((text for text in found if len(text) > 1), key=lambda text: (-len(text), text))


def quoted(text: str) -> str:
    """A Jinja string."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f"'{text}'"
