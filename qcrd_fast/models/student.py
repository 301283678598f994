"""The student: a Hugging Face model with tokenizer and prompts, and its hidden states at target tokens.

Shapes: B sequences, L padded length, T packed target tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qcrd_fast.errors import InputError
from qcrd_fast.models import prefix_packing
from qcrd_fast.models.cpu_linear import use_fast_products
from qcrd_fast.models.decoder_start import decoder_start
from qcrd_fast.models.lm_head import Head, backbone, check_head, read_head
from qcrd_fast.models.loading import load_pretrained
from qcrd_fast.models.packed_attention import attention_inputs, check_causal, probe_packed_attention
from qcrd_fast.models.padding import pad_right
from qcrd_fast.models.prefix_packing import (
    Group,
    Layout,
    first_fit_decreasing,
    group_by_prompt,
    length_batches,
    pack_rows,
)
from qcrd_fast.models.prompts import Prompter, PromptSettings, TokenIds

MAX_TOKENS = 16_384  # padded tokens that run through the model at once


@dataclasses.dataclass(frozen=True)
class PackedHidden:
    """Hidden states that predict the target tokens, concatenated without padding."""

    hidden: Tensor  # [T, H]
    target: Tensor  # [T]
    segment: Tensor  # [T] which target a token belongs to, non-decreasing
    body_tokens: int = 0  # tokens that ran through the model for it, padding included
    padded: Tensor | None = None  # [B, L, H] the states that hidden was taken from, where one batch held them all
    first: list[int] | None = None  # [B] where each target begins in `padded`


class Student(Prompter):
    """A T5-like or decoder-only model with its tokenizer and prompts.

    Raises `InputError` when the tokenizer has more tokens than the model has rows, when the model's logits are not
    those that its head and hidden states give (`check_head`), or when tokens see what comes after them
    (`check_causal`).
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: PromptSettings):
        super().__init__(tokenizer, prompts, bool(model.config.is_encoder_decoder))
        self.model = model
        self._most: Callable[[int], int] = lambda runs: runs
        rows = model.get_output_embeddings().weight.shape[0]
        highest = max(tokenizer.get_vocab().values(), default=-1)
        if len(tokenizer) > rows or highest >= rows:
            raise InputError(
                f"student: the tokenizer has {max(len(tokenizer), highest + 1)} tokens but the model only {rows} rows"
            )
        self.start_id = self._start(rows) if self.is_encoder_decoder else -1  # the decoder's first input
        use_fast_products(model)
        check_head(model, self.head)
        check_causal(model)

    def _start(self, rows: int) -> int:
        """Return the model's decoder start token; EOS if that is the target's last token."""
        start = decoder_start(self.model)
        start = self.tokenizer.eos_token_id if start == "last" else start
        if not (isinstance(start, int) and 0 <= start < rows):
            raise InputError(
                f"student: decoder_start_token_id is {start} in config.json, but the model has {rows} rows"
            )
        return start

    @classmethod
    def load(
        cls,
        name_or_path: str,
        prompts: PromptSettings,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> Student:
        """Load a local folder or hub id in fp32. Reads only safetensors, and runs only transformers' own code.

        `attention`: eager or sdpa; None is transformers' own choice for the model.
        """

        def choose(config: Any) -> Any:
            return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

        chosen: dict[str, Any] = {"attn_implementation": attention} if attention else {}
        model, tokenizer = load_pretrained(name_or_path, "student", choose, dtype=torch.float32, **chosen)
        return cls(model.to(device), tokenizer, prompts)

    @property
    def head(self) -> Head:
        return read_head(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run_as_often(self, most: Callable[[int], int]) -> None:
        """Run the model `most(runs)` times where this rank's rows need `runs`: ranks that share a model must agree."""
        self._most = most

    # Tokens to hidden states

    @functools.cached_property
    def sharing(self) -> str | None:
        """Kind of attention for prefix packing (varlen, flex or dense), or None if this model cannot. Tested on first
        use."""
        noise = torch.Generator().manual_seed(0)
        rows = self.model.get_input_embeddings().weight.shape[0]
        *sources, a, b, c, d = (torch.randint(0, rows, (n,), generator=noise).tolist() for n in (5, 3, 4, 1, 6, 3))
        return probe_packed_attention(
            self.model, lambda mode: self._hidden(sources, [a, b, c, d], [0, 0, 0, 1], mode, MAX_TOKENS).hidden
        )

    def probe_sharing(self) -> str | None:
        """Find the kind of mask now and return it; later, with sharded weights, it could not be tested."""
        return self.sharing

    def hidden(
        self,
        sources: Sequence[TokenIds],
        targets: Sequence[TokenIds],
        source_of: Sequence[int],
        max_tokens: int = MAX_TOKENS,
        shared: bool = True,
    ) -> PackedHidden:
        """Hidden states at the tokens of `targets`, target i following `sources[source_of[i]]`.

        Each source is read once, its targets side by side behind it (`shared` False: each target has a copy of its own,
        save that an encoder still runs once). Rows of similar length run together, at most `max_tokens` padded tokens
        at a time; the result is in the order of `targets`.
        """
        several = len(set(source_of)) < len(targets)
        return self._hidden(sources, targets, source_of, self.sharing if shared and several else None, max_tokens)

    def _hidden(
        self,
        sources: Sequence[TokenIds],
        targets: Sequence[TokenIds],
        source_of: Sequence[int],
        mode: str | None,
        max_tokens: int,
    ) -> PackedHidden:
        used = {source: n for n, source in enumerate(dict.fromkeys(source_of))}
        encoded = self.encode([sources[i] for i in used])
        source_of = [used[i] for i in source_of]
        prompts = [0 if self.is_encoder_decoder else len(sources[i]) for i in used]
        lengths = list(map(len, targets))
        if mode is None:
            groups = [Group(source, [i]) for i, source in enumerate(source_of)]
        else:
            groups = group_by_prompt(lengths, source_of, [min(self._room(p, mode), max_tokens - p) for p in prompts])
        sizes = [prompts[group.source] + sum(lengths[i] for i in group.targets) for group in groups]
        rows = [[g] for g in range(len(groups))]
        if mode and not self.is_encoder_decoder:  # what the longest row leaves free holds shorter ones
            rows = first_fit_decreasing(sizes, max(sizes) if mode == "dense" else max_tokens)
        widths = [sum(sizes[g] for g in row) for row in rows]
        batches = list(length_batches(widths, max_tokens, prefix_packing.MAX_PAIRS if mode == "dense" else None))
        idle = self._most(len(batches)) - len(batches)
        parts, order, body_tokens = [], [], encoded[1].numel() if self.is_encoder_decoder else 0
        for batch in batches:
            hidden_BLH, layout = self._run(encoded, [[groups[g] for g in rows[b]] for b in batch], targets, mode)
            parts.append(hidden_BLH.flatten(0, 1).index_select(0, layout.at_T))
            order += layout.order
            body_tokens += layout.ids_BL.numel()
        for _ in range(idle):
            idle_BLH, _ = self._run(encoded, [[groups[0]]], targets, mode)
            parts[0] = parts[0] + 0.0 * idle_BLH.sum()
        hidden_TH = parts[0] if len(parts) == 1 else torch.cat(parts)
        if order != list(range(len(targets))):
            start, at = {}, 0
            for i in order:
                start[i], at = at, at + lengths[i]
            order_T = self._tensor([start[i] + t for i in range(len(targets)) for t in range(lengths[i])])
            hidden_TH = hidden_TH.index_select(0, order_T)
        return self._packed(hidden_TH, targets, body_tokens)

    def encode(self, sources: Sequence[TokenIds]) -> Any:
        """Prepare sources for `decode`: encoder states and mask, or the tokens (decoder-only)."""
        if not self.is_encoder_decoder:
            return list(sources)
        ids_BL, mask_BL = pad_right(sources, self.pad_id, self.device)
        return self.model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state, mask_BL

    def decode(self, encoded: Any, targets: Sequence[TokenIds], source_of: Sequence[int]) -> PackedHidden:
        """`hidden` for one padded batch of encoded sources, one sequence a target; also returns the padded states."""
        rows = [[Group(source, [i])] for i, source in enumerate(source_of)]
        hidden_BLH, layout = self._run(encoded, rows, targets, None)
        body_tokens = layout.ids_BL.numel() + (encoded[1].numel() if self.is_encoder_decoder else 0)
        packed = self._packed(hidden_BLH.flatten(0, 1).index_select(0, layout.at_T), targets, body_tokens)
        return dataclasses.replace(packed, padded=hidden_BLH, first=layout.first)

    def _room(self, prompt: int, mode: str) -> int:
        """Return how many target tokens one row may hold."""
        if self.is_encoder_decoder:
            return prefix_packing.BIASED_ROW
        return (
            prefix_packing.MAX_ROW - prompt
            if mode != "dense"
            else prefix_packing.best_room(prompt, self.head.weight.shape[1])
        )

    def _run(
        self, encoded: Any, rows: Sequence[Sequence[Group]], targets: Sequence[TokenIds], mode: str | None
    ) -> tuple[Tensor, Layout]:
        """Return hidden states [B, L, H] of a padded batch of rows."""
        prompts = None if self.is_encoder_decoder else encoded
        start = [self.start_id] if self.is_encoder_decoder else []
        layout = pack_rows(
            rows, targets, prompts, start, self.pad_id, self.device, prefix_packing.BLOCK if mode == "flex" else 1
        )
        inputs = attention_inputs(self.model, layout, mode)
        if not self.is_encoder_decoder:
            return backbone(self.model)(input_ids=layout.ids_BL, use_cache=False, **inputs).last_hidden_state, layout
        states_QLH, mask_QL = encoded
        index = self._tensor(layout.sources)
        output = self.model.get_decoder()(
            input_ids=layout.ids_BL,
            encoder_hidden_states=states_QLH.index_select(0, index),
            encoder_attention_mask=mask_QL.index_select(0, index),
            use_cache=False,
            **inputs,
        )
        return output.last_hidden_state, layout

    def _packed(self, hidden_TH: Tensor, targets: Sequence[TokenIds], body_tokens: int) -> PackedHidden:
        return PackedHidden(
            hidden=hidden_TH,
            target=self._tensor([t for target in targets for t in target]),
            segment=self._tensor([i for i, target in enumerate(targets) for _ in target]),
            body_tokens=body_tokens,
        )

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
