"""The discriminator D(x, r) in (0, 1): quality of rationale r for question x (section 3.3).

Shapes: B sequences of a batch, L padded length, H width of the encoder, R rationales.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcrd_fast.discriminator.encoders import MAX_LENGTH, SmallEncoder, length_limit, load_encoder
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.padding import pad_right
from qcrd_fast.models.prefix_packing import length_batches
from qcrd_fast.models.student import MAX_TOKENS
from qcrd_fast.utils.keyed import own_randomness

Pair = tuple[str, str]  # (question, rationale)


class Discriminator(nn.Module):
    """Encoder, max pooling over tokens, two linear layers, sigmoid.

    `encoder(input_ids=, attention_mask=)` returns an object with `last_hidden_state` [B, L, H].
    """

    def __init__(self, encoder: nn.Module, width: int, tokenizer: Any, max_length: int = MAX_LENGTH):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return score_B in (0, 1), fp32 even under autocast. Every row needs a token with attention mask 1."""
        return torch.sigmoid(self._logit(input_ids_BL, attention_mask_BL))

    def _logit(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        with torch.autocast(input_ids_BL.device.type, enabled=False):
            hidden_BLH = self.encoder(input_ids=input_ids_BL, attention_mask=attention_mask_BL).last_hidden_state
            padding_BL1 = (attention_mask_BL == 0).unsqueeze(-1)
            pooled_BH = hidden_BLH.masked_fill(padding_BL1, float("-inf")).amax(dim=1)
            return self.head(pooled_BH).squeeze(-1)

    def encode(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return (input_ids_BL, attention_mask_BL) of question, separator, rationale, padded on the right.

        Beyond `max_length` the question loses its left end first, then the rationale its right end.
        """
        return pad_right(self._token_ids(pairs), self._pad_id, self.device)

    def rate(self, pairs: Sequence[Pair], max_tokens: int = MAX_TOKENS) -> Tensor:
        """score_R of `pairs` in their order, with gradient, in the current mode; pairs of similar length run
        together."""
        return torch.sigmoid(self.logits(pairs, max_tokens))

    def logits(self, pairs: Sequence[Pair], max_tokens: int = MAX_TOKENS) -> Tensor:
        """logit_R, of which `rate` is the sigmoid."""
        ids = self._token_ids(pairs)
        if not ids:
            return torch.empty(0, device=self.device)
        batches = list(length_batches([len(row) for row in ids], max_tokens))
        logits = [self._logit(*pad_right([ids[i] for i in batch], self._pad_id, self.device)) for batch in batches]
        return torch.cat(logits)[torch.tensor([i for batch in batches for i in batch], device=self.device).argsort()]

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], max_tokens: int = MAX_TOKENS) -> Tensor:
        """score_R of `pairs` in their order, fp32, on the module's device; eval mode, without gradient."""
        with eval_mode(self):
            return self.rate(pairs, max_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return {name: weight}, tied weights once, as safetensors requires."""
        first_name = self._first_names()
        return {
            name: t.detach().contiguous()
            for name, t in self.state_dict(keep_vars=True).items()
            if first_name[name] == name
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the output of `tensors()`. Raises `InputError` if names or shapes do not match."""
        own = self.tensors()
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wrong := [name for name in sorted(expected | actual) if expected.get(name) != actual.get(name)]:
            shapes = f"{wrong[0]}: expected {expected.get(wrong[0])}, got {actual.get(wrong[0])}"
            raise InputError(f"{len(wrong)} weights are not those of this discriminator, e.g. {shapes}")
        self.load_state_dict({name: tensors[first] for name, first in self._first_names().items()})

    def _first_names(self) -> dict[str, str]:
        """{name of a weight: the first name that the same weight has}; they differ where weights are tied."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.state_dict(keep_vars=True).items()}

    def _token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        if not pairs:
            return []
        tokenize = lambda texts: self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        separator = _first_id(self.tokenizer, "sep_token_id", "eos_token_id")
        middle = [separator] if separator is not None else tokenize(["\n"])[0]
        distinct = list(dict.fromkeys(question for question, _ in pairs))
        question_ids = dict(zip(distinct, tokenize(distinct), strict=True))
        rows = []
        for (question, _), rationale in zip(pairs, tokenize(r for _, r in pairs), strict=True):
            rationale = rationale[: self.max_length - len(middle)]
            room = self.max_length - len(middle) - len(rationale)
            left = question_ids[question]
            rows.append(left[max(0, len(left) - room) :] + middle + rationale or [self._pad_id])
        return rows

    @property
    def _pad_id(self) -> int:
        return _first_id(self.tokenizer, "pad_token_id", "eos_token_id") or 0


def build_discriminator(
    name: str, student_model: Any, student_tokenizer: Any, *, seed: int = 0
) -> Discriminator | None:
    """Build the discriminator of `--discriminator name` in fp32. Shares no parameter with the student.

    "none": None. "auto": a copy of an encoder-decoder student's own encoder, else a `SmallEncoder` over the student's
    vocabulary. Anything else: a Hugging Face folder or hub id (of an encoder-decoder, its encoder), from safetensors
    alone and without remote code; raises `InputError` where it cannot be loaded.
    """
    if name == "none":
        return None
    with own_randomness(torch.device("cpu"), seed, "discriminator", "build"):
        max_length, tokenizer = MAX_LENGTH, student_tokenizer
        if name != "auto":
            encoder, tokenizer = load_encoder(name)
            width, max_length = encoder.config.hidden_size, length_limit(encoder, tokenizer)
        elif getattr(student_model.config, "is_encoder_decoder", False):
            encoder = copy.deepcopy(student_model.get_encoder())
            width, max_length = encoder.config.hidden_size, length_limit(encoder)
        else:
            encoder = SmallEncoder(max(student_tokenizer.get_vocab().values()) + 1)
            width = encoder.embed.embedding_dim
        for module in encoder.modules():  # a copy would go on checkpointing as the student does
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        discriminator = Discriminator(encoder, width, tokenizer, max_length)
    device = next(student_model.parameters()).device
    return discriminator.requires_grad_(True).to(device=device, dtype=torch.float32).eval()


def _first_id(tokenizer: Any, *names: str) -> int | None:
    return next((token for name in names if (token := getattr(tokenizer, name, None)) is not None), None)
