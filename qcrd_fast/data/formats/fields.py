"""Look up a row's values by role, whatever their keys, and record which keys were read.

`ROLES` is the one list of the names under which other tools write a question, a gold answer, a sample.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qcrd_fast.data.schema import Question, Rationale, RowError

# role: its names, the clearest first; capitals, `_`, `-` and spaces make no difference
ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "qid", "question_id", "problem_id", "custom_id", "unique_id", "uuid"),
    "question": (
        "question", "problem", "query", "prompt", "instruction", "question_stem", "problem_statement", "user_prompt",
        "user", "input", "inputs",
    ),
    "context": ("context", "passage", "body", "article"),
    "choices": ("choices", "options", "answer_choices"),
    "gold": (
        "gold", "gold_answer", "ground_truth", "ground_truth_answer", "expected_answer", "correct_answer",
        "reference_answer",
        "gold_label", "answer", "final_answer", "answer_key", "target", "targets", "reference", "correct_option",
        "label", "answer_index", "answer_idx",
        "correct_index", "correct",
    ),
    "solution": ("solution", "ground_truth_solution", "reference_solution", "gold_solution"),
    "samples": (
        "samples", "generations", "completions", "responses", "outputs", "candidates", "rationales", "model_outputs",
        "model_responses", "generated_solutions", "generated_responses", "solutions", "chains", "cots",
    ),
    "completion": (
        "completion", "response", "output", "generation", "generated_text", "generated_solution", "model_output",
        "model_response", "model_completion", "assistant", "reply", "text",
    ),
    "rationale": (
        "rationale", "reasoning", "reasoning_content", "explanation", "chain_of_thought", "cot", "chain", "thinking",
        "thought",
        "thoughts",
    ),
    "prediction": (
        "prediction", "predicted_answer", "pred", "sample_answer", "model_answer", "extracted_answer",
        "generated_answer",
        "parsed_answer", "student_answer", "teacher_answer", "predictions", "predicted_answers", "preds",
        "sample_answers", "model_answers", "extracted_answers", "generated_answers", "parsed_answers",
        "student_answers",
        "teacher_answers", "answers",
    ),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "dialog"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "task": ("task",),
    "domain": ("domain",),
    "view": ("view",),
    "critique": ("critique",),
    "split": ("split",),
    "source": ("source",),
}  # fmt: skip
EXPLICIT_GOLDS = 8  # of the names of a gold, those that cannot be the answer of a sample


@functools.lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A key without capitals, `_`, `-` and spaces."""
    return "".join(c for c in key.casefold() if c.isalnum())


_PLAIN = {role: tuple(plain(name) for name in names) for role, names in ROLES.items()}
_ROLE_OF = {name: role for role, names in _PLAIN.items() for name in names}
_SAMPLE_NAMES = (
    "sample",
    "solution",
    *(name for role in ("completion", "rationale") for name in _PLAIN[role] if len(name) > 5),
)
_NUMBERED = re.compile(r"([a-z0-9]*[a-z])([0-9]{1,4})")
_ANSWER_NAMES = ("answer", "prediction", "pred")
_OPTION = re.compile(r"(option|choice|answer|opt|)([a-j])|(option|choice|opt)([0-9]{1,2})")
_KNOWN = sorted(
    {name for names in ROLES.values() for name in names} | {"positives", "negatives", "majority", "votes", "answerKey"}
)


class Parsed(NamedTuple):
    """One row as parsed by a format."""

    question: Question
    samples: tuple[Rationale, ...] = ()
    kind: str = "sampled"  # prepared, sampled or question
    unread: frozenset[str] = frozenset()
    by_text: bool = True  # rows with the same text are one question, whatever their ids


class Row:
    """One row of an input, by roles; keeps account of the keys that were read.

    `mapping` is that of `--map`, role: key. A key that it names has that role alone.
    """

    def __init__(self, values: dict[str, Any], mapping: Mapping[str, str] | None = None):
        self.values, self.mapping = values, mapping or {}
        self.read: set[str] = set()
        self.parts: set[str] = set()  # unread parts of values, such as samples[].anwser
        taken = set(self.mapping.values())
        self._keys = {plain(key): key for key in reversed(values) if key not in taken}

    def key(self, role: str) -> str | None:
        """The key with the clearest name of a role that has a value."""
        return next(iter(self.keys(role)), None)

    def keys(self, role: str) -> list[str]:
        """All keys of a role that have a value."""
        if role in self.mapping:
            return [key] if (key := self.mapping[role]) in self.values and not _empty(self.values[key]) else []
        found = [self._keys[name] for name in _PLAIN[role] if name in self._keys]
        return [key for key in found if not _empty(self.values[key])]

    def has(self, *roles: str) -> bool:
        return all(self.key(role) is not None for role in roles)

    def is_called(self, role: str, *names: str) -> bool:
        """Whether the key of a role has one of these names."""
        key = self.key(role)
        return key is not None and plain(key) in map(plain, names)

    def take(self, key: str) -> Any:
        self.read.add(key)
        return self.values[key]

    def take_role(self, role: str) -> Any:
        key = self.key(role)
        return None if key is None else self.take(key)

    def skip(self, *roles: str) -> None:
        """Mark the first key of these roles as read; the format has its content from elsewhere."""
        self.read |= {key for role in roles if (key := self.key(role)) is not None}

    def numbered(self) -> dict[str, list[str]]:
        """Return numbered sample columns such as response_1 and response_2, by name without number."""
        found: dict[str, list[tuple[int, str]]] = {}
        for name, key in self._keys.items():
            match = _NUMBERED.fullmatch(name)
            if match and match[1].endswith(_SAMPLE_NAMES) and not _empty(self.values[key]):
                found.setdefault(match[1], []).append((int(match[2]), key))
        return {name: [key for _, key in sorted(keys)] for name, keys in found.items()}

    def numbered_answers(self, name: str) -> dict[str, str]:
        """{column of a sample: column of its own answer} of rationale_1, answer_1, ..., for the columns called
        `name`."""
        found: dict[str, dict[str, str]] = {}
        for key_name, key in self._keys.items():
            if (match := _NUMBERED.fullmatch(key_name)) and match[1].endswith(_ANSWER_NAMES):
                found.setdefault(match[1], {})[match[2]] = key
        answers = next(iter(found.values()), {}) if len(found) == 1 else {}
        pairs = {self._keys[name + number]: key for number, key in answers.items() if name + number in self._keys}
        return pairs

    def options(self) -> list[tuple[str, str]]:
        """Return (label, key) of option columns such as A, option_b or choice3, in order, without blank ones."""
        found: dict[tuple[str, bool], dict[str, str]] = {}
        for name, key in self._keys.items():
            if match := _OPTION.fullmatch(name):
                label = match[2] or match[4]
                found.setdefault((match[1] or match[3] or "", label.isdigit()), {})[label] = key
        for (prefix, digits), columns in found.items():
            filled = {label: key for label, key in columns.items() if not _empty(self.values[key])}
            in_order = sorted(filled, key=lambda label: (len(label), label))
            whole = in_order == [str(i + 1) if digits else "abcdefghij"[i] for i in range(len(filled))]
            if len(filled) >= (2 if whole and prefix != "answer" else 3):  # answer_a and answer_b may be two replies
                return [(label.upper(), filled[label]) for label in in_order]
        return []

    def known(self) -> set[str]:
        """The keys that have any role, value or not."""
        named = {key for name, key in self._keys.items() if name in _ROLE_OF}
        return named.union(self.mapping.values(), *self.numbered().values(), (key for _, key in self.options()))

    def unread(self) -> frozenset[str]:
        return frozenset(
            {key for key, value in self.values.items() if key not in self.read and not _empty(value)} | self.parts
        )

    def refuse(self, what: str, keys: Iterable[str], role: str) -> RowError:
        """The error for a row in which several keys may be meant."""
        named = " and ".join(map(repr, keys))
        return RowError(f"{named} may each be {what}; say which with --map {role}=KEY")


def _empty(value: Any) -> bool:
    return value is None or value == ""


def nearest(key: str) -> str | None:
    """The name that is read and looks most like `key`, a key that is not read."""
    name = key.rpartition("].")[2]
    close = difflib.get_close_matches(name.casefold(), _KNOWN, n=1, cutoff=0.7)
    return close[0] if close and plain(close[0]) != plain(name) else None


def role_of(name: str) -> str | None:
    """The role that `--map` means by a name."""
    return _ROLE_OF.get(plain(name))
