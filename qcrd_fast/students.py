"""The student: a Hugging Face model, its tokenizer, its prompts, and its hidden states at the tokens that are scored.

Shapes: B sequences, L padded length, T packed target tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast.errors import InputError
from qcrd_fast.heads import Head, check_head, read_head
from qcrd_fast.prompts import EXPLAIN as EXPLAIN
from qcrd_fast.prompts import PREDICT as PREDICT
from qcrd_fast.prompts import REASON as REASON
from qcrd_fast.prompts import Prompter, TokenIds
from qcrd_fast.prompts import PromptSettings as PromptSettings

MAX_TOKENS = 16_384  # padded tokens that run through the model at once


@dataclasses.dataclass(frozen=True)
class PackedHidden:
    """Hidden states that predict the targets' tokens, targets one behind the other without padding."""

    hidden: Tensor  # [T, H]
    target: Tensor  # [T]
    segment: Tensor  # [T] which target a token belongs to, non-decreasing
    padded: Tensor | None = None  # [B, L, H] the states that hidden was taken from, where one batch held them all
    first: list[int] | None = None  # [B] where each target begins in `padded`


class Student(Prompter):
    """A T5-like or decoder-only model with its tokenizer and prompts.

    Raises `InputError` when the tokenizer has more tokens than the model has rows, or when the model's logits are not
    those that its head and hidden states give (`check_head`).
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: PromptSettings):
        super().__init__(tokenizer, prompts, bool(model.config.is_encoder_decoder))
        self.model = model
        rows = model.get_output_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise InputError(f"student: the tokenizer has {len(tokenizer)} tokens but the model only {rows} rows")
        check_head(model, self.head)

    @classmethod
    def load(cls, name_or_path: str, prompts: PromptSettings, device: torch.device | str = "cpu") -> Student:
        """Load a local folder or hub id in fp32. Only safetensors and code of the transformers package are read."""
        if os.path.sep in name_or_path and not Path(name_or_path).exists() and name_or_path.count("/") != 1:
            raise InputError(f"student: folder {name_or_path!r} does not exist")
        if Path(name_or_path).is_dir() and not (Path(name_or_path) / "config.json").is_file():
            raise InputError(f"student: {name_or_path!r} holds no config.json, so it is not a Hugging Face model folder")
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, info = auto.from_pretrained(  # type: ignore[misc]
                name_or_path,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"student: cannot load {name_or_path!r} (safetensors weights are needed): {reason}") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            bad = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
            raise InputError(f"student: {name_or_path!r} lacks or mis-shapes {len(bad)} weights, such as {bad[0]}")
        return cls(model.to(device), tokenizer, prompts)

    @property
    def head(self) -> Head:
        return read_head(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # Tokens to hidden states

    def hidden(
        self, sources: Sequence[TokenIds], targets: Sequence[TokenIds], source_of: Sequence[int], max_tokens: int = MAX_TOKENS
    ) -> PackedHidden:
        """Hidden states at the tokens of `targets`, target i following `sources[source_of[i]]`.

        An encoder-decoder reads each source once, however many targets it has. Targets of similar length run together,
        at most `max_tokens` padded tokens at a time; the result is in the order of `targets`.
        """
        encoded = self.encode(sources)
        shared = self.is_encoder_decoder
        lengths = [len(t) + (0 if shared else len(sources[i])) for t, i in zip(targets, source_of, strict=True)]
        batches = list(length_batches(lengths, max_tokens))
        parts = [self.decode(encoded, [targets[i] for i in batch], [source_of[i] for i in batch]) for batch in batches]
        if len(batches) == 1 and batches[0] == list(range(len(targets))):
            return parts[0]
        start, at = {}, 0
        for i in (i for batch in batches for i in batch):
            start[i], at = at, at + len(targets[i])
        order_T = self._tensor([start[i] + t for i in range(len(targets)) for t in range(len(targets[i]))])
        return PackedHidden(
            hidden=torch.cat([part.hidden for part in parts]).index_select(0, order_T),
            target=self._tensor([t for target in targets for t in target]),
            segment=self._tensor([i for i, target in enumerate(targets) for _ in target]),
        )

    def encode(self, sources: Sequence[TokenIds]) -> Any:
        """What `decode` needs of the sources: encoder states and mask, or the tokens themselves (decoder-only)."""
        if not self.is_encoder_decoder:
            return list(sources)
        ids_BL, mask_BL = self._pad(sources)
        return self.model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state, mask_BL

    def decode(self, encoded: Any, targets: Sequence[TokenIds], source_of: Sequence[int]) -> PackedHidden:
        """`hidden` for one padded batch of already encoded sources."""
        if self.is_encoder_decoder:
            states_QLH, mask_QL = encoded
            index = self._tensor(list(source_of))
            start = self.model.config.decoder_start_token_id
            inputs_BL, _ = self._pad([[start, *target[:-1]] for target in targets])
            hidden_BLH = self.model.get_decoder()(
                input_ids=inputs_BL,
                encoder_hidden_states=states_QLH.index_select(0, index),
                encoder_attention_mask=mask_QL.index_select(0, index),
                use_cache=False,
            ).last_hidden_state
            first = [0] * len(targets)
        else:
            prompts = [encoded[i] for i in source_of]
            inputs_BL, mask_BL = self._pad([p + t[:-1] for p, t in zip(prompts, targets, strict=True)])
            hidden_BLH = self.model.base_model(input_ids=inputs_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
            first = [len(p) - 1 for p in prompts]  # the prompt's last token predicts the target's first
        width = inputs_BL.shape[1]
        flat_T = self._tensor([b * width + first[b] + t for b, target in enumerate(targets) for t in range(len(target))])
        return PackedHidden(
            hidden=hidden_BLH.flatten(0, 1).index_select(0, flat_T),
            target=self._tensor([t for target in targets for t in target]),
            segment=self._tensor([b for b, target in enumerate(targets) for _ in target]),
            padded=hidden_BLH,
            first=first,
        )

    def _pad(self, sequences: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Right-padded ids [B, L] and mask [B, L]; causal attention never looks at what stands to the right."""
        width = max(map(len, sequences))
        ids = self._tensor([s + [self.pad_id] * (width - len(s)) for s in sequences])
        mask = self._tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        return ids, mask

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: each at most `max_tokens` padded tokens (or one sequence),
    and no sequence shorter than half of its batch's longest."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else 0
        if batch and (longest * (len(batch) + 1) > max_tokens or 2 * lengths[i] < longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
