"""Parse an endpoint's reply: samples with their messages, tokens, and counted faults."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qcrd_fast.data.formats.samples import is_cut
from qcrd_fast.data.messages import read_message

DEEPEST = 32  # nesting of a message that is kept
_FILTERED = re.compile(r"content_?filter|safety|recitation|prohibited|blocklist|spii|sensitive|refusal", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One sample as it came; `cut` at the maximum length. `logprobs`: of its tokens, where they were asked for.

    `text` is the whole reply, its reasoning in <think> tags before what was said; `message` is the message of a chat,
    whole.
    """

    text: str
    cut: bool = False
    message: Mapping[str, Any] | None = None
    logprobs: Sequence[TokenLogProb] = ()


class TokenLogProb(NamedTuple):
    """One token of a sample, as the teacher spells it or as its id, with its log p and the likeliest tokens of its
    place."""

    token: str | int
    logprob: float
    top: list[tuple[str | int, float]]


@dataclasses.dataclass(frozen=True)
class Reply:
    """Samples of one request with tokens used (`estimated` if the server did not say) and fault counts.

    `usage` is what the server said of tokens, and perhaps of cost.
    """

    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    usage: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_reply(value: Any, prompt: str, clean: Callable[[str], str] = str, max_tokens: int = 0) -> Reply:
    """Return the choices of a decoded reply, each text through `clean`; other values are counted as faults.

    Tokens that the server does not say are estimated, of a choice that was cut as `max_tokens`: its thoughts may be
    hidden.
    """
    value = value if isinstance(value, dict) else {}
    faults: dict[str, int] = {}
    choices = []

    def fault(name: str) -> None:
        faults[name] = faults.get(name, 0) + 1

    found = value.get("choices")
    if not isinstance(found, list) or not found:
        fault("error in it" if value.get("error") else "empty choices" if found == [] else "no choices")
        found = []
    for item in found:
        item = item if isinstance(item, dict) else {}
        choice = _choice(_cleaned(item, clean))
        if choice is None and item.get("finish_reason") == "error":
            fault("error in it")
        elif choice is None:
            message = item.get("message")
            said = message.get("content") if isinstance(message, dict) else item.get("text")
            fault("null content" if said is None else "empty content")
        else:
            choices.append(choice)
    usage = value.get("usage")
    usage = _cleaned(usage, clean) if isinstance(usage, dict) else {}
    prompt_tokens, completion_tokens, total = (
        next((count for name in names if (count := _count(usage.get(f"{name}_tokens"))) is not None), None)
        for names in (("prompt", "input"), ("completion", "output"), ("total",))
    )
    estimated = prompt_tokens is None or completion_tokens is None
    if estimated:  # but at least what it does say
        prompt_tokens = max(prompt_tokens or 0, estimate_tokens(prompt))
        estimates = (max(estimate_tokens(choice.text), max_tokens if choice.cut else 0) for choice in choices)
        completion_tokens = max(completion_tokens or 0, sum(estimates))
    assert prompt_tokens is not None and completion_tokens is not None
    if total is not None:  # some servers count reasoning in the total alone
        completion_tokens = max(completion_tokens, total - prompt_tokens)
    return Reply(choices, prompt_tokens, completion_tokens, estimated, faults, usage=usage)


def _choice(item: Mapping[str, Any]) -> Choice | None:
    """Return a choice that was paid for and that no retry improves: one with text, or one that ended too early.

    What a teacher refused, or a filter broke off, answers nothing: it has no text, and its message says what came.
    """
    if item.get("finish_reason") == "error":  # of a router whose server broke off
        return None
    message = item.get("message")
    said = read_message(message if isinstance(message, dict) else {**item, "content": item.get("text")})
    text, cut = said.text, is_cut(item)
    refused = _FILTERED.match(str(item.get("finish_reason"))) is not None
    if isinstance(message, dict) and not (said.content or "").strip():
        refused |= isinstance(message.get("refusal"), str) and bool(message["refusal"].strip())
    if refused:
        return Choice("", False, message if isinstance(message, dict) else {"content": text})
    if not text.strip() and not cut:
        return None
    return Choice(
        text if text.strip() else "", cut, message if isinstance(message, dict) else None, read_logprobs(item)
    )


def read_logprobs(item: Mapping[str, Any]) -> list[TokenLogProb]:
    """The log-probs of a choice, of a chat or of a completion; [] where it has none, or some that cannot be read."""
    found = item.get("logprobs")
    if not isinstance(found, dict):
        return []
    try:
        if isinstance(found.get("content"), list):
            return [TokenLogProb(*_pair(t), list(map(_pair, t["top_logprobs"]))) for t in found["content"]]
        each = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        return [
            TokenLogProb(_token(token), _nats(logprob), [(_token(t), _nats(x)) for t, x in (top or {}).items()])
            for token, logprob, top in each
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _pair(item: Mapping[str, Any]) -> tuple[str | int, float]:
    return _token(item["token"]), _nats(item["logprob"])


def _token(text: Any) -> str | int:
    """A token's text; its id where the server gives that (vLLM's return_tokens_as_token_ids)."""
    if not isinstance(text, str):
        raise TypeError(text)
    return int(text[9:]) if text.startswith("token_id:") else text


def _nats(value: Any) -> float:
    return min(float(value), 0.0)


def _cleaned(value: Any, clean: Callable[[str], str], depth: int = 0) -> Any:
    """Apply `clean` to every text in `value`; null for non-finite numbers and for values nested too deep."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list | dict) and depth > DEEPEST:
        return None
    if isinstance(value, list):
        return [_cleaned(item, clean, depth + 1) for item in value]
    if isinstance(value, dict):
        return {clean(key): _cleaned(item, clean, depth + 1) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _count(value: Any) -> int | None:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None


def estimate_tokens(text: str) -> int:
    """Four bytes a token, as a rule of thumb for English."""
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)
