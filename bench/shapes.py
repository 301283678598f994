"""Students of known shapes with random weights, and ragged prompts, for the benchmarks.

Nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, LlamaConfig, T5Config

from qcrd_fast.models.cpu_linear import CPULinear
from qcrd_fast.models.prompts import PromptSettings, TokenIds
from qcrd_fast.models.student import Student

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1}
START: dict[str, Any] = SPECIAL | {"decoder_start_token_id": 0, "dropout_rate": 0.0}
SHAPES: dict[str, Any] = {
    "t5-base": T5Config(
        vocab_size=32_128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, **START
    ),
    "t5-small": T5Config(vocab_size=32_128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, **START),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=None, **SPECIAL,
    ),
    "tiny-t5": T5Config(
        vocab_size=2048, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, **START,
    ),
    "tiny-llama": LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, **SPECIAL,
    ),
}  # fmt: skip


class NumberTokenizer:
    """A tokenizer of texts that are numbers separated by spaces; the tokens are the numbers."""

    eos_token_id, pad_token_id, chat_template = SPECIAL["eos_token_id"], SPECIAL["pad_token_id"], None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def make_student(shape: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Student:
    """Build a student with random weights; only parameters are in `dtype`, rotary frequencies need fp32."""
    config = SHAPES[shape]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = auto.from_config(config).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.generation_config = GenerationConfig()
    return Student(model.eval(), NumberTokenizer(config.vocab_size), PromptSettings())


def plain_layers(model: Any) -> Any:
    """Return the model with torch's own linear layers, as without this package."""
    for module in model.modules():
        if type(module) is CPULinear:
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    return model


def draw_lengths(count: int, low: int, high: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(count)]


def draw_from_quantiles(count: int, quantiles: Sequence[int], seed: int) -> list[int]:
    """Lengths whose quantiles, from the shortest to the longest at equal steps, are these."""
    rng, last = random.Random(seed), len(quantiles) - 1

    def one(share: float) -> int:
        at = min(int(share * last), last - 1)
        low, high = quantiles[at], quantiles[at + 1]
        return round(low + (share * last - at) * (high - low))

    return [one(rng.random()) for _ in range(count)]


def draw_tokens(shape: str, lengths: Sequence[int], seed: int) -> list[TokenIds]:
    """Draw tokens, none of them special."""
    rng = random.Random(seed)
    return [[rng.randrange(3, SHAPES[shape].vocab_size) for _ in range(length)] for length in lengths]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Format lines of aligned columns, text to the left and numbers to the right."""

    def show(value: Any) -> str:
        return "-" if value is None else format(value, ".4g") if isinstance(value, float) else str(value)

    cells = [list(columns), *([show(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    text = [all(row.get(column) is None or isinstance(row.get(column), str) for row in rows) for column in columns]
    return [
        "  ".join(c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text, strict=True)).rstrip()
        for line in cells
    ]
