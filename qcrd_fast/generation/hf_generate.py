"""Sampling through Hugging Face's `generate` with keyed noise, for models that the engine does not support."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qcrd_fast.generation.engine import Cancelled, SampleSettings, nucleus
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.padding import pad_left
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.chunked import pick_tokens
from qcrd_fast.utils.device import Autocast


class KeyedSampling(LogitsProcessor):
    """Logits processor that samples like `Sampler`: only the drawn token keeps a score above -inf."""

    def __init__(
        self, key_B2: Tensor, index_B: Tensor, iteration: int, start: int, temperature: float, top_k: int, top_p: float
    ):
        self.key_B2, self.index_B, self.iteration, self.start = key_B2, index_B, iteration, start
        self.temperature, self.top_k, self.top_p = temperature, top_k, nucleus(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.start
        rest = (torch.full_like(self.index_B, position), self.index_B, torch.full_like(self.index_B, self.iteration))
        chosen_B = pick_tokens(scores, self.key_B2, torch.stack(rest, 1), self.top_k, warp=self._warp)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def _warp(self, scores_BV: Tensor) -> Tensor:
        """After top-k, which ranks the scores as they come: divided, two of them could round to one."""
        scores_BV = scores_BV.double() / self.temperature
        return self.top_p(scores_BV) if self.top_p else scores_BV


class ForcedPrefix(LogitsProcessor):
    """Leaves the next token of each row's prefix alone above -inf, until the prefix ends."""

    def __init__(self, prefixes: Sequence[TokenIds], start: int):
        self.prefixes, self.start = prefixes, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self.start
        for b, prefix in enumerate(self.prefixes):
            if at < len(prefix):
                scores[b] = -torch.inf
                scores[b, prefix[at]] = 0.0
        return scores


class GenerateSampler:
    """`Sampler`'s interface over the model's own `generate`: padded batches that wait for their longest row."""

    def __init__(self, student: Student, settings: SampleSettings, autocast: Autocast | None = None):
        self.student, self.settings, self.autocast = student, settings, autocast
        self.drawn_tokens = 0

    def use(self, impl: str) -> None:
        """Nothing to do: the model's own head runs."""

    def warm_up(self) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def generate(
        self,
        sources: Sequence[TokenIds],
        keys: Sequence[tuple[int, int]],
        indices: Sequence[int] | None = None,
        iteration: int = 0,
        stop: threading.Event | None = None,
        limits: Sequence[int] | None = None,
        prefixes: Sequence[TokenIds] | None = None,
    ) -> list[TokenIds]:
        """As `Sampler.generate`; looks at `stop` between batches."""
        if limits and min(limits) < 1:
            raise ValueError(f"limits must be at least 1, got {min(limits)}")
        student, settings, model, device = self.student, self.settings, self.student.model, self.student.device
        results: list[TokenIds] = [[] for _ in sources]
        eos = student.tokenizer.eos_token_id
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=student.pad_id,
            decoder_start_token_id=student.start_id if student.is_encoder_decoder else None,
        )
        order = sorted(range(len(sources)), key=lambda i: (len(sources[i]), i))
        with eval_mode(model), contextlib.ExitStack() as stack:
            stack.callback(setattr, model, "generation_config", model.generation_config)
            # else its penalties and beams would fill what `config` leaves open
            model.generation_config = GenerationConfig()
            for at in range(0, len(order), settings.batch_size):
                if stop is not None and stop.is_set():
                    raise Cancelled
                rows = order[at : at + settings.batch_size]
                if limits:
                    config.max_new_tokens = min(settings.max_new_tokens, max(limits[i] for i in rows))
                width = max(len(sources[i]) for i in rows)
                ids, mask = pad_left([sources[i] for i in rows], student.pad_id, device)
                start = 1 if student.is_encoder_decoder else width
                processors = LogitsProcessorList()
                if settings.temperature > 0:
                    key_B2 = torch.tensor([keys[i] for i in rows], device=device)
                    index_B = torch.tensor([indices[i] if indices else 0 for i in rows], device=device)
                    processors.append(
                        KeyedSampling(
                            key_B2, index_B, iteration, start, settings.temperature, settings.top_k, settings.top_p
                        )
                    )
                if prefixes:
                    processors.append(ForcedPrefix([prefixes[i] for i in rows], start))
                with self.autocast() if self.autocast else torch.autocast(device.type, enabled=False):
                    out = model.generate(
                        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
                    )
                for i, tokens in zip(rows, out[:, start:].tolist(), strict=True):
                    tokens = tokens[: limits[i]] if limits else tokens
                    results[i] = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
                    self.drawn_tokens += len(results[i])
        return results
