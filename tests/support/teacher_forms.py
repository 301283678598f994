"""Replies in the forms of today's servers, as behaviours of `fake_teacher`: where each puts its reasoning, how it
refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.support.fake_teacher import Behaviour, Handler, Seen

Form = Callable[[str, str], dict[str, Any]]  # (reasoning, content) -> message


def parts(*items: Any) -> Form:
    return lambda why, said: {"role": "assistant", "content": [item(why, said) for item in items]}


def _text(why: str, said: str) -> Any:
    return {"type": "text", "text": said}


FORMS: dict[str, Form] = {
    "deepseek, sglang, llama.cpp": lambda why, said: {"role": "assistant", "content": said, "reasoning_content": why},
    "vllm, groq, ollama": lambda why, said: {"role": "assistant", "content": said, "reasoning": why, "tool_calls": []},
    "openrouter": lambda why, said: {
        "role": "assistant",
        "content": said,
        "refusal": None,
        "reasoning": why,
        "reasoning_details": [{"type": "reasoning.text", "text": why, "signature": "c2ln", "index": 0}],
    },
    "openrouter, details alone": lambda why, said: {
        "role": "assistant",
        "content": said,
        "reasoning": None,
        "reasoning_details": [
            {"type": "reasoning.summary", "summary": why, "index": 0},
            {"type": "reasoning.encrypted", "data": "AAAA", "index": 1},
        ],
    },
    "litellm": lambda why, said: {
        "role": "assistant",
        "content": said,
        "thinking_blocks": [{"type": "thinking", "thinking": why, "signature": "c2ln"}],
    },
    "mistral": parts(
        lambda why, said: {"type": "thinking", "thinking": [{"type": "text", "text": why}], "closed": True}, _text
    ),
    "anthropic": parts(
        lambda why, said: {"type": "thinking", "thinking": why, "signature": "c2ln"},
        lambda why, said: {"type": "redacted_thinking", "data": "AAAA"},
        _text,
    ),
    "a summary in parts": parts(
        lambda why, said: {"type": "reasoning", "summary": [{"type": "summary_text", "text": why}]},
        lambda why, said: {"type": "output_text", "text": said},
    ),
    "one part": lambda why, said: {
        "role": "assistant",
        "content": {"type": "text", "text": said},
        "reasoning": {"content": why},
    },
    "lm studio, together": lambda why, said: {"role": "assistant", "content": f"<think>\n{why}\n</think>\n\n{said}"},
    "an end tag alone": lambda why, said: {"role": "assistant", "content": f"{why}\n</think>\n\n{said}"},
    "both field and tags": lambda why, said: {
        "role": "assistant",
        "content": f"<think>{why}</think>\n{said}",
        "reasoning_content": f"\n{why}\n",
    },
    "tags within the field": lambda why, said: {
        "role": "assistant",
        "content": said,
        "reasoning": f"<think>\n{why}\n</think>",
    },
    "gpt-oss, raw": lambda why, said: {
        "role": "assistant",
        "content": f"<|channel|>analysis<|message|>{why}<|end|><|start|>assistant<|channel|>final<|message|>{said}",
    },
}


def product(seen: Seen) -> int:
    """The right answer to a question of two numbers."""
    first, second = re.findall(r"\d+", seen.prompt.split("Question:")[-1])[:2]
    return int(first) * int(second)


def thinking(form: Form, why: str, said: str, *, finish: str = "stop", n: bool = True) -> Behaviour:
    """`why` and `said` with {a} for the right answer, {wrong} for another one and {i} for a number of each sample."""

    def behave(handler: Handler, seen: Seen) -> None:
        choices = []
        for index in range(seen.body["n"] if n else 1):
            with handler.server.lock:
                handler.server.count += 1
                values = {"a": product(seen), "wrong": product(seen) + 1, "i": handler.server.count}
            message = form(why.format(**values), said.format(**values))
            choices.append({"index": index, "message": message, "finish_reason": finish})
        usage = {"prompt_tokens": 10, "completion_tokens": 20 * len(choices)}
        handler.send_json({"id": "x", "choices": choices, "usage": usage})

    return behave


def error(status: int, message: str, **more: Any) -> Behaviour:
    """An error as OpenAI's API words it."""
    return lambda handler, seen: handler.send_json({"error": {"message": message, **more}}, status)


def cut(message: dict[str, Any]) -> Behaviour:
    """Replies that ended at the maximum length."""

    def behave(handler: Handler, seen: Seen) -> None:
        choices = [{"message": message, "finish_reason": "length"}] * seen.body.get("n", 1)
        handler.send_json({"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 512 * len(choices)}})

    return behave
