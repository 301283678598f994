"""A server that scores prompts as vLLM does, from a small model: what `tests.support.fake_teacher` is to sampling."""

from __future__ import annotations

import threading
from typing import Any

import torch

from qcrd_fast.models.student import Student
from tests.support.fake_teacher import Behaviour, Handler, Seen


def scoring(model: Student, *, decode: Any = None, places: bool = True) -> Behaviour:
    """Log-probs of each token of a prompt after the first, and of the `prompt_logprobs` likeliest at its place.

    decode: what the server says that a token means. places: whether it gives them at all.
    """
    tokenizer, lock = model.tokenizer, threading.Lock()
    decode = decode or (lambda id: tokenizer.decode([id]))

    def behave(handler: Handler, seen: Seen) -> None:
        if "prompt" not in seen.body:
            return handler.send_json({"data": [{"id": "only"}]})
        ids, k = seen.body["prompt"], seen.body["prompt_logprobs"]
        with lock, torch.no_grad():
            logp = model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            best = logp[at].topk(max(k, 1))
            shown = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if k else {}
            ranks = {id: rank for rank, id in enumerate(shown, 1)}
            shown.setdefault(token, float(logp[at, token]))
            rank = int((logp[at] > logp[at, token]).sum()) + 1
            found.append(
                {
                    str(id): {"logprob": lp, "rank": ranks.get(id, rank), "decoded_token": decode(id)}
                    for id, lp in shown.items()
                }
            )
        choice = {"text": "x", "finish_reason": "length"} | ({"prompt_logprobs": found} if places else {})
        handler.send_json({"choices": [choice]})

    return behave
