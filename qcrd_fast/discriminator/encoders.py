"""Encoders for the discriminator: a small one of ours, and any of Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput

from qcrd_fast.errors import InputError
from qcrd_fast.models.loading import load_pretrained

MAX_LENGTH = 512  # tokens of question + separator + rationale


class SmallEncoder(nn.Module):
    """Bidirectional pre-norm Transformer with learned positions, for students without an encoder to copy."""

    def __init__(self, vocab_size: int, width: int = 256, layers: int = 4, heads: int = 4, dropout: float = 0.1):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(MAX_LENGTH, width)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        for parameter in self.layers.parameters():  # nn.TransformerEncoder starts all layers as copies of one
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        position_L = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_BLH = self.dropout(self.embed(input_ids) + self.position(position_L))
        hidden_BLH = self.layers(hidden_BLH, src_key_padding_mask=attention_mask == 0)
        return BaseModelOutput(last_hidden_state=hidden_BLH)


def load_encoder(name: str) -> tuple[Any, Any]:
    """Load (encoder, tokenizer) from a folder or hub id. Raises `InputError` if it is not an encoder."""
    model, tokenizer = load_pretrained(name, "--discriminator", lambda _: AutoModel, whole=False)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise InputError(
            f"--discriminator {name!r} is no text encoder: {type(encoder).__name__} has no single hidden size"
        )
    return encoder, tokenizer


def length_limit(encoder: Any, tokenizer: Any = None) -> int:
    """Return the encoder's maximum length, at most `MAX_LENGTH`. RoBERTa's positions start after the padding index."""
    limit = getattr(encoder.config, "max_position_embeddings", None) or MAX_LENGTH
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    return min(MAX_LENGTH, limit, getattr(tokenizer, "model_max_length", None) or MAX_LENGTH)
