"""One sample, in the forms in which samples stand in lists: text, an object, a message, an API's choice, a chat."""

from __future__ import annotations

from typing import Any

from qcrd_fast.data.formats.fields import plain
from qcrd_fast.data.formats.turns import as_list, exchange, is_turns, reply_text
from qcrd_fast.data.schema import Rationale, RowError, check_text, get_answer, get_text, kind_of

_TEXTS = (
    "text", "content", "completion", "response", "output", "generation", "generated_text", "generated_solution", "solution",
)  # fmt: skip
_THOUGHTS = ("rationale", "reasoning", "reasoning_content", "explanation", "chain_of_thought", "cot", "thinking")
_ANSWERS = ("answer", "prediction", "predicted_answer", "final_answer", "extracted_answer", "pred")
_OTHERS = ("source", "cut", "index", "finish_reason", "stop_reason", "role", "logprobs", "token_ids", "cumulative_logprob")
_KNOWN = {plain(name): name for name in (*_TEXTS, *_THOUGHTS, *_ANSWERS, *_OTHERS)}
_OWN = {"rationale", "answer", "source", "text", "cut"}


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
        return Rationale(reply, reply=True)
    if not isinstance(item, dict):
        raise RowError(f"{where} expects a string or an object")
    try:
        if isinstance(item.get("message"), dict):  # a choice of a chat API
            return Rationale(reply_text(item["message"]), reply=True)
        return _object(item, where, unread)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None


def _object(item: dict[str, Any], where: str, unread: set[str]) -> Rationale:
    keys = {_KNOWN[name]: key for key in item if (name := plain(key)) in _KNOWN} if item.keys() - _OWN else {k: k for k in item}
    unread |= {f"{where.partition('[')[0]}[].{key}" for key in item if key not in keys.values() and item[key] is not None}

    def first(names: tuple[str, ...]) -> str | None:
        return next((keys[name] for name in names if name in keys and item[keys[name]] is not None), None)

    thought, text = first(_THOUGHTS), first(_TEXTS)
    answer = next((keys[name] for name in _ANSWERS if name in keys), None)
    source = get_text(item, "source")
    if thought is None and text is None:
        named = ", ".join(repr(key) for key in list(item)[:5])
        raise RowError(
            f"missing key 'rationale' (there: {named[:200] or 'nothing'})" if "rationale" not in item else "rationale is null"
        )
    if answer is not None:
        return Rationale(get_text(item, thought or text or "") or "", get_answer(item, answer), source)
    if thought is not None and text is not None:
        return Rationale(with_thinking(get_text(item, thought), get_text(item, text) or ""), None, source, reply=True)
    return Rationale(get_text(item, thought or text or "") or "", None, source, reply=True)


def with_thinking(thinking: str | None, reply: str) -> str:
    """A reply that begins with its reasoning, as chat models write it."""
    return f"<think>\n{thinking}\n</think>\n\n{reply}" if thinking and thinking.strip() else reply


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
