"""Parse one sample of a list: text, object, message, API choice, or chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcrd_fast.data.formats.fields import Row, plain
from qcrd_fast.data.formats.turns import as_list, exchange, is_turns, reply_text
from qcrd_fast.data.messages import with_thinking
from qcrd_fast.data.schema import Rationale, RowError, check_text, get_answer, get_text, kind_of

_TEXTS = (
    "text", "content", "completion", "response", "output", "generation", "generated_text", "generated_solution",
    "solution",
)  # fmt: skip
_THOUGHTS = ("rationale", "reasoning", "reasoning_content", "explanation", "chain_of_thought", "cot", "thinking")
_ANSWERS = ("answer", "prediction", "predicted_answer", "final_answer", "extracted_answer", "pred")
_STOPS = ("finish_reason", "stop_reason", "done_reason", "finish_reasons", "stop_reasons")
_CUTS = ("cut", "truncated", "is_truncated")
_OTHERS = (
    "source",
    "view",
    "critique",
    "index",
    "role",
    "logprobs",
    "token_ids",
    "cumulative_logprob",
    *_STOPS,
    *_CUTS,
)
_KNOWN = {plain(name): name for name in (*_TEXTS, *_THOUGHTS, *_ANSWERS, *_OTHERS)}
_OWN = {"rationale", "answer", "source", "text", "cut", "view", "critique"}
_REASONING = frozenset(map(plain, ("reasoning", "reasoning_content", "thinking", "thought", "thoughts")))
_BESIDE = tuple(name for name in _THOUGHTS if plain(name) in _REASONING)  # of a rationale of its own
_FLAGS = {plain(name): name for name in (*_STOPS, *_CUTS)}
_SAID = frozenset(map(plain, (*_TEXTS, *_THOUGHTS, *_ANSWERS)))
_LENGTH = ("length", "maxtokens", "maxlength", "maxoutputtokens", "maxcompletiontokens", "modellength")
_SHORT = 3  # words of an answer that is no reply


def is_reasoning(key: str) -> bool:
    """Whether a key is that of reasoning beside a reply, which is never voted on."""
    return plain(key) in _REASONING


def is_cut(values: Mapping[str, Any]) -> bool:
    """Return whether a sample's keys say that it reached its maximum length, such as finish_reason "length"."""
    return any(_says_cut(_FLAGS[name], value) for key, value in values.items() if (name := plain(key)) in _FLAGS)


def row_is_cut(row: Row, index: int | None = None) -> bool:
    """The same of a row's columns; of a list's sample `index`, where they are lists of that many."""
    found = False
    for key, value in row.values.items():
        if (name := plain(key)) in _FLAGS:
            if isinstance(value, list):
                value = value[index] if index is not None and index < len(value) else None
            elif index is not None:
                continue
            row.read.add(key)
            found |= _says_cut(_FLAGS[name], value)
    return found


def _says_cut(name: str, value: Any) -> bool:
    if name in _CUTS:
        return value is True or (isinstance(value, str) and value.strip().casefold() == "true")
    return isinstance(value, str) and plain(value) in _LENGTH


def read_sample(item: Any, where: str, unread: set[str]) -> Rationale:
    """A sample; `reply` is set unless it states its answer apart. Keys that are not read go to `unread`.

    Raises:
        RowError: it has no text, or a value of the wrong type.
    """
    if isinstance(item, str):
        return Rationale(check_text(item, where), reply=True)
    if is_turns(item):
        reply = exchange(item, where)[1]
        if reply is None:
            raise RowError(f"{where}: a conversation without a reply")
        return Rationale(reply, reply=True, truncated=is_cut(item[-1]))
    if not isinstance(item, dict):
        raise RowError(f"{where} expects a string or an object")
    message = item["message"] if isinstance(item.get("message"), dict) else item
    if is_cut(item) and not any(
        isinstance(value, str) and value for key, value in message.items() if plain(key) in _SAID
    ):
        return Rationale("", reply=True, truncated=True)  # cut before it said anything
    try:
        if message is not item:  # a choice of a chat API
            return Rationale(reply_text(item["message"]), reply=True, truncated=is_cut(item))
        found = _object(item, where, unread)
        view, critique = get_text(item, "view") or None, get_text(item, "critique") or None
        return dataclasses.replace(found, truncated=is_cut(item), view=view, critique=critique)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None


def _object(item: dict[str, Any], where: str, unread: set[str]) -> Rationale:
    keys = (
        {_KNOWN[name]: key for key in item if (name := plain(key)) in _KNOWN}
        if item.keys() - _OWN
        else {k: k for k in item}
    )
    unread |= {
        f"{where.partition('[')[0]}[].{key}" for key in item if key not in keys.values() and item[key] is not None
    }

    def first(names: tuple[str, ...]) -> str | None:
        return next((keys[name] for name in names if name in keys and item[keys[name]] is not None), None)

    thought, text = first(_THOUGHTS), first(_TEXTS)
    answer = next((keys[name] for name in _ANSWERS if name in keys), None)
    source = get_text(item, "source")
    if thought is None and text is None:
        if answer is not None and isinstance(item[answer], str) and item.keys() - _OWN:  # all that was said
            return Rationale(get_text(item, answer) or "", None, source, reply=True)
        named = ", ".join(repr(key) for key in list(item)[:5])
        raise RowError(
            f"missing key 'rationale' (there: {named[:200] or 'nothing'})"
            if "rationale" not in item
            else "rationale is null"
        )
    if thought is not None and is_reasoning(thought):
        said = get_text(item, text) if text else None
        return with_reasoning(get_text(item, thought) or "", said, item, answer, source)
    if answer is not None:
        said, beside = get_text(item, thought or text or "") or "", first(_BESIDE) if thought else None
        return Rationale(
            with_thinking(get_text(item, beside) if beside else None, said), get_answer(item, answer), source
        )
    if thought is not None and text is not None:
        return Rationale(with_thinking(get_text(item, thought), get_text(item, text) or ""), None, source, reply=True)
    return Rationale(get_text(item, thought or text or "") or "", None, source, reply=True)


def with_reasoning(
    reasoning: str, reply: str | None, values: Mapping[str, Any], answer: str | None, source: str | None
) -> Rationale:
    """Return a sample with reasoning, which never votes; it ends in the reply or in the answer at key `answer`.

    An answer of more than a few words is itself the reply. Reasoning that came to neither is left open, so unreadable.
    """
    if answer is None or values[answer] is None:
        return Rationale(with_thinking(reasoning, reply or ""), None, source, reply=True)
    said = get_answer(dict(values), answer) or ""
    if reply is None and (len(said.split()) > _SHORT or "\n" in said.strip()):
        return Rationale(with_thinking(reasoning, said), None, source, reply=True)
    return Rationale(with_thinking(reasoning, reply) if reply else reasoning, said or None, source)


def sample_list(value: Any, key: str) -> list[Any]:
    """A list of samples: as it is, a column of lists, JSON text (in CSV), or an API's response.

    Raises:
        RowError: it is none.
    """
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        return value["choices"]
    value = as_list(value)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        raise RowError(f"{key} expects a list; its text is not readable as JSON")
    if not isinstance(value, list):
        raise RowError(f"{key} expects a list, got {kind_of(value)}")
    return value
