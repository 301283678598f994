"""Decode one token a row through a Hugging Face model's backbone, each row at its own position.

The caches are buffers [rows, heads, slots, width] that are written in place: a row's token number p stands in slot p,
so there is no padding to the left, a row can be given to another prompt at any time, and the addresses that a captured
CUDA graph knows stay. Suffixes: B rows, L tokens of a prompt, S slots, H hidden, h heads, d width of a head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from qcrd_fast.generation.kv_cache import LayerCache, SlotCache, States, row_bytes, states_of
from qcrd_fast.models.lm_head import backbone
from qcrd_fast.models.padding import pad_right
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # ||logits - model's|| / ||model's||; 5e-2 in other types


class Decoder:
    """A student's backbone with KV caches for `rows` prompts of at most `prompt` tokens and `new` tokens after each.

    `most_bytes` lowers the number of rows until the caches fit. `style`: the form of mask that the backbone expects,
    one tensor or one for each type of layer. The caller disables gradients, sets eval mode and enters `autocast`.
    """

    def __init__(
        self, student: Student, rows: int, prompt: int, new: int, style: str = "tensor", most_bytes: int | None = None
    ):
        self.student, self.prompt, self.new, self.style = student, prompt, new, style
        self.backbone, config = backbone(student.model), student.model.config
        text = config.get_text_config(decoder=True)
        takes = inspect.signature(self.backbone.forward).parameters  # transformers renames the argument, model by model
        self.cache_name = "cache" if "cache" in takes else "past_key_values"
        self.window: int | None = getattr(text, "sliding_window", None)
        self.shared = student.is_encoder_decoder  # a prompt is read by an encoder, not by the body
        # For one token a row, products and a softmax take half the time of torch's fused attention on a CPU
        self.plain = self.shared and student.device.type == "cpu"
        self.additive = self.plain or text._attn_implementation == "eager"  # else masks are boolean
        self.slots = new if self.shared else prompt + new - 1  # the last token is never fed
        probe = self._read([[student.pad_id, student.pad_id]])
        if most_bytes:
            rows = max(1, min(rows, most_bytes // (row_bytes(probe[0], self.slots) + row_bytes(probe[1], prompt))))
        self.rows = rows
        self.cache = SlotCache.like(probe[0], rows, self.slots)
        self.slot_S = torch.arange(self.slots, device=student.device)
        if self.shared:
            self.cross = SlotCache.like(probe[1], rows, prompt)
            self.memory: Any = EncoderDecoderCache(self.cache, DynamicCache())
            self.memory.is_updated = dict.fromkeys(range(len(self.cross.buffers)), True)
            self.cross_mask = torch.zeros(rows, prompt, dtype=torch.bool, device=student.device)
            self.start: int = student.start_id
            self.biased = [m for m in self.backbone.modules() if getattr(m, "has_relative_attention_bias", False)]
            self.tables = [torch.empty(0)] * len(self.biased)
            self.refresh()

    def refresh(self) -> None:
        """Recompute the position bias [h, S] in place after a change of weights; the largest distance comes first."""
        for i, module in enumerate(self.biased if self.shared else ()):
            table = module.compute_bias(1, self.slots, device=self.student.device, past_seen_tokens=self.slots - 1)[
                0, :, 0
            ]
            self.tables[i] = self.tables[i].copy_(table) if len(self.tables[i]) else table.clone()

    # Prompts

    def prefill(
        self, sources: Sequence[TokenIds], rows: Sequence[int], of: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Prefill row `rows[i]` with the prompt `sources[of[i]]`; a prompt of several rows runs once. Return each
        row's first input token and its position."""
        device = self.student.device
        rows_N, of_N = torch.tensor(rows, device=device), torch.tensor(of, device=device)
        if self.shared:
            length_U = torch.tensor([len(s) for s in sources], device=device)
            self.cross.fill(rows_N, self._read(sources)[1], of_N)
            self.cross_mask[rows_N] = torch.arange(self.prompt, device=device) < length_U[of_N, None]
            return [self.start] * len(rows), [0] * len(rows)
        if max(map(len, sources)) > 1:
            self.cache.fill(rows_N, self._read([s[:-1] for s in sources])[0], of_N)
        return [sources[u][-1] for u in of], [len(sources[u]) - 1 for u in of]

    def _read(self, sources: Sequence[TokenIds]) -> tuple[States, States]:
        """Compute self-attention and cross-attention keys and values for right-padded prompts.

        Padding is harmless: a causal backbone never attends to later positions.
        """
        ids_BL, mask_BL = pad_right(sources, self.student.pad_id, self.student.device)
        own, cross = DynamicCache(), DynamicCache()
        if not self.shared:
            self.backbone(input_ids=ids_BL, use_cache=True, **{self.cache_name: own})
            return states_of(own), states_of(cross)
        states_BLH = self.student.model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        self.backbone(
            input_ids=torch.full_like(ids_BL[:, :1], self.student.start_id),
            encoder_hidden_states=states_BLH,
            encoder_attention_mask=mask_BL,
            use_cache=True,
            **{self.cache_name: EncoderDecoderCache(own, cross)},
        )
        return states_of(own), states_of(cross)

    def move(self, to: list[int], source: list[int]) -> None:
        """Copy row `source[i]` of the caches to row `to[i]`."""
        to_N, source_N = (torch.tensor(rows, device=self.student.device) for rows in (to, source))
        self.cache.move(to_N, source_N)
        if self.shared:
            self.cross.move(to_N, source_N)
            self.cross_mask[to_N] = self.cross_mask[source_N]

    # Tokens

    def step(self, token_B: Tensor, position_B: Tensor, kv_length: int, width: int) -> Tensor:
        """Feed `token_B` at `position_B` to the first B rows; return their hidden states [B, H].

        Attends to the first `kv_length` slots, which must include every position, and to the first `width` encoder
        tokens.
        """
        B = len(token_B)
        self.cache.at(B, kv_length, position_B)
        slot_S = self.slot_S[:kv_length]
        seen_BS = slot_S <= position_B[:, None]
        inputs: dict[str, Any] = {"input_ids": token_B[:, None], "use_cache": True}
        with contextlib.ExitStack() as stack:
            if self.shared:
                self.memory.cross_attention_cache.layers = [
                    LayerCache(k[:B, :, :width], v[:B, :, :width]) for k, v in self.cross.buffers
                ]
                inputs |= {
                    "attention_mask": self._mask(seen_BS),
                    self.cache_name: self.memory,
                    "encoder_hidden_states": self.backbone.get_input_embeddings().weight[:1, None].expand(B, width, -1),
                    "encoder_attention_mask": self._mask(self.cross_mask[:B, :width]),
                }
                stack.enter_context(self._own_bias(self.slots - 1 - position_B[:, None] + slot_S))
                if self.plain:
                    stack.enter_context(_plain_attention(self.backbone.config))
            else:
                near_BS = seen_BS & (slot_S > position_B[:, None] - self.window) if self.window else seen_BS
                masks = {"full_attention": seen_BS, "sliding_attention": near_BS}
                inputs |= {self.cache_name: self.cache, "position_ids": position_B[:, None]}
                if self.style == "tensor":
                    inputs["attention_mask"] = self._mask(near_BS)
                else:
                    inputs["attention_mask"] = {kind: self._mask(seen) for kind, seen in masks.items()}
            hidden_B1H: Tensor = self.backbone(**inputs).last_hidden_state
        return hidden_B1H[:, 0]

    def _mask(self, seen_BS: Tensor) -> Tensor:
        mask = seen_BS[:, None, None, :]
        if not self.additive:
            return mask
        dtype = self.student.model.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    @contextlib.contextmanager
    def _own_bias(self, entry_BS: Tensor) -> Iterator[None]:
        """T5's modules think that all rows are at one position; here each row looks up its own distances."""
        entry_BS = entry_BS.clamp(max=self.slots - 1)  # a slot ahead of its row is masked

        def bias(table_hS: Tensor) -> Callable[..., Tensor]:
            return lambda *_, **__: table_hS[:, entry_BS].transpose(0, 1)[:, :, None]

        try:
            for module, table in zip(self.biased, self.tables, strict=True):
                module.compute_bias = bias(table)
            yield
        finally:
            for module in self.biased:
                module.__dict__.pop("compute_bias", None)


@contextlib.contextmanager
def _plain_attention(config: Any) -> Iterator[None]:
    kept = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = kept


@torch.no_grad()
def find_style(student: Student, longest: int) -> str:
    """Find the form of mask that the backbone expects by comparing logits with the model's own on a few tokens.

    Uses more tokens than a sliding window holds if a sequence of `longest` tokens would exceed the window.

    Raises `ValueError` saying what goes wrong where this body cannot decode row by row. Call it without autocast, in
    eval mode.
    """
    window = getattr(student.model.config.get_text_config(decoder=True), "sliding_window", None) or 0
    first = window + 2 if window and longest > window else 5
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, len(student.tokenizer), (n,), generator=generator).tolist() for n in (first, 3)]
    replies = [torch.randint(2, len(student.tokenizer), (4,), generator=generator).tolist() for _ in rows]
    wanted = torch.stack([_own_logits(student, source, reply) for source, reply in zip(rows, replies, strict=True)])
    found = []
    for style in ("tensor",) if student.is_encoder_decoder else ("tensor", "by type"):
        try:
            got = teacher_forced(Decoder(student, 2, first, len(replies[0]) + 1, style), rows, replies)
        except Exception as error:  # architectures fail in many ways
            found.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
        if difference <= TOLERANCE.get(student.head.weight.dtype, 5e-2):
            return style
        found.append(f"its logits differ by {difference:.2g}")
    raise ValueError("; ".join(dict.fromkeys(found)))


@torch.no_grad()
def teacher_forced(decoder: Decoder, sources: Sequence[TokenIds], replies: Sequence[TokenIds]) -> Tensor:
    """Decode the replies (all L long) one token at a time; return fp32 logits [B, L + 1, V].

    Row b starts b steps late, so that no two rows are at the same position.
    """
    device, B, steps = decoder.student.device, len(sources), len(replies[0]) + 1
    fed, at = decoder.prefill(sources, list(range(B)), list(range(B)))
    logits: list[list[Tensor]] = [[] for _ in sources]
    for t in range(steps + B - 1):
        done = [min(max(t - b, 0), steps - 1) for b in range(B)]  # a row waits, then repeats its last step
        token_B = torch.tensor(
            [reply[n - 1] if n else f for reply, n, f in zip(replies, done, fed, strict=True)], device=device
        )
        position_B = torch.tensor([a + n for a, n in zip(at, done, strict=True)], device=device)
        hidden_BH = decoder.step(token_B, position_B, decoder.slots, decoder.prompt)
        for b in range(B):
            if 0 <= t - b < steps:
                logits[b].append(decoder.student.head.logits(hidden_BH[b]).float())
    return torch.stack([torch.stack(row) for row in logits])


def _own_logits(student: Student, source: TokenIds, reply: TokenIds) -> Tensor:
    """The model's own logits [L + 1, V] for a reply, in one pass."""
    model, device = student.model, student.device
    ids_1L = torch.tensor([source], device=device)
    if student.is_encoder_decoder:
        fed = torch.tensor([[student.start_id, *reply]], device=device)
        return model(input_ids=ids_1L, decoder_input_ids=fed).logits[0].float()
    return model(input_ids=torch.tensor([source + reply], device=device)).logits[0, len(source) - 1 :].float()
