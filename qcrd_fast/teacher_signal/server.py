"""A teacher behind a server that scores prompts: vLLM's `prompt_logprobs`, of prompts that are sent as token ids.

A request is a prompt with its target behind it; what comes back are log-probs at the prompt's places. One token is
generated, since servers generate at least one, and thrown away. Imports no torch.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from qcrd_fast.collect.endpoint import Endpoint, EndpointSettings, Failed, refusal
from qcrd_fast.errors import InputError, RunError

TokenIds = Sequence[int]
OTHERS = 0.1  # share of the first tokens that may read otherwise: bytes of a character, spaces
FEWEST = 8  # tokens that are compared before a server is refused


class Scored(NamedTuple):
    """log p of each token of a target [nats], and the likeliest tokens at its place with theirs, in falling order."""

    logprob: list[float]
    ids: list[list[int]]
    top: list[list[float]]


class ServerScorer:
    """Scores targets behind prompts. `tokenizer`: that of the ids that are sent; what the server says they mean is
    compared with it on the first reply.

    Raises `InputError` for an address that is none, a server with another tokenizer, or one that does not score
    prompts; `RunError` where no reply came within the deadline.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        *,
        concurrency: int = 8,
        timeout_s: float = 180.0,
        deadline_s: float = 600.0,
    ):
        self.tokenizer, self.model = tokenizer, model
        self.settings = EndpointSettings(
            url, "completions", model, timeout_s=timeout_s, deadline_s=deadline_s, concurrency=concurrency
        )
        self.base = Endpoint(self.settings).base
        self._same = self._other = 0  # tokens that mean the same to both

    def score(self, sources: Sequence[TokenIds], targets: Sequence[TokenIds], k: int = 0) -> list[Scored]:
        """One `Scored` a target; `k`: how many of the likeliest tokens, where fewer are known fewer are given."""
        try:
            return asyncio.run(self._score_all(sources, targets, k))
        except Failed as error:
            told = refusal(error, self.base, "completions") or RunError(f"--teacher: {self.base} says {error}")
            raise told from None

    async def _score_all(self, sources: Sequence[TokenIds], targets: Sequence[TokenIds], k: int) -> list[Scored]:
        async with Endpoint(self.settings) as endpoint:
            self.model = self.model or await self._only_model(endpoint)
            gate = asyncio.Semaphore(self.settings.concurrency)

            async def one(source: TokenIds, target: TokenIds) -> Scored:
                async with gate:
                    body = {
                        "model": self.model, "prompt": [*source, *target], "max_tokens": 1, "temperature": 0,
                        "prompt_logprobs": k,
                    }  # fmt: skip
                    reply = await endpoint.post("/completions", body, f"score-{uuid.uuid4().hex[:12]}")
                return self._read(reply, len(source), list(target), k)

            tasks = [asyncio.ensure_future(one(s, t)) for s, t in zip(sources, targets, strict=True)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _only_model(self, endpoint: Endpoint) -> str:
        found = await endpoint._exchange("GET", "/models", "score-models", None, 30.0)
        rows = found.get("data") if isinstance(found, dict) else None
        names = [str(r.get("id")) for r in rows or [] if isinstance(r, dict)]
        if len(names) != 1:
            raise InputError(
                f"--teacher-model is needed: {self.base} offers {len(names)} models ({', '.join(names[:10])})"
            )
        return names[0]

    def _read(self, reply: Any, skipped: int, target: list[int], k: int) -> Scored:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        places = choice.get("prompt_logprobs") or (reply.get("prompt_logprobs") if isinstance(reply, dict) else None)
        if not isinstance(places, list):
            raise InputError(
                f"--teacher: {self.base} answers without prompt_logprobs: it does not score prompts (vLLM does); "
                "sample from it with qcrd-fast collect instead, with --top-logprobs where it has them"
            )
        if len(places) != skipped + len(target):
            raise InputError(
                f"--teacher: {self.base} scored {len(places)} tokens of a prompt of {skipped + len(target)}: it reads "
                "them otherwise"
            )
        logprob, ids, top = [], [], []
        for token, place in zip(target, places[skipped:], strict=True):
            try:
                found = {
                    int(id): (float(x["logprob"]), x.get("rank"), x.get("decoded_token")) for id, x in place.items()
                }
                own = found[token]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise InputError(
                    f"--teacher: {self.base}: prompt_logprobs without token {token}, which was sent"
                ) from None
            for id, (_, _, text) in found.items():
                self._compare(id, text)
            best = sorted((-lp, id) for id, (lp, rank, _) in found.items() if not isinstance(rank, int) or rank <= k)[
                :k
            ]
            logprob.append(min(own[0], 0.0) if math.isfinite(own[0]) else -100.0)
            ids.append([id for _, id in best])
            top.append([min(-negative, 0.0) for negative, _ in best])
        if self._same + self._other >= FEWEST and self._other > OTHERS * (self._same + self._other):
            raise InputError(
                f"--teacher: {self.base} has another tokenizer than the student: {self._other} of "
                f"{self._same + self._other} tokens read otherwise"
            )
        return Scored(logprob, ids, top)

    def _compare(self, id: int, text: Any) -> None:
        if not isinstance(text, str):
            return
        own = self.tokenizer.decode([id])
        if "\ufffd" in own or "\ufffd" in text:  # a part of a character
            return
        piece = self.tokenizer.convert_ids_to_tokens(id)
        same = text.strip() in (own.strip(), str(piece).strip(), str(piece).lstrip("\u2581\u0120"))
        self._same, self._other = self._same + same, self._other + (not same)
