"""hidden states x head -> one sampled token a row, by the Gumbel-max rule: argmax of logits + Gumbel noise is a draw from the
softmax of the logits. On a GPU no logits are held (the kernels of `csrc_triton.linear_sample`); the torch twin holds [B, V].

Suffixes: B rows, H hidden, V vocabulary, K entries kept by top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qcrd_fast.dispatch import choose_impl, require, require_tensors
from qcrd_fast.noise import gumbel
from qcrd_fast.reference import HeadOptions, accumulable


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    key: Tensor,
    counter: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    impl: str = "auto",
) -> Tensor:
    """One token of each row [B], int64, from softmax(logits), logits = softcap * tanh(a / softcap) / temperature,
    a = scale * hidden weight^T + bias, cut to the `top_k` largest (0: all). Temperature 0: the largest logit.

    hidden [B, H], weight [V, H], bias [V]; key [B, 2], counter [B, 3] = (position, index, iteration): int64 in [0, 2^32), which
    with the vocabulary entry are all that the noise depends on (`qcrd_fast.noise`). Equal logits: the lowest entry first.

    Raises `ValueError` naming what was expected and what came, `TypeError` for an argument that is no tensor.
    """
    require_tensors(hidden=hidden, weight=weight, key=key, counter=counter, **({} if bias is None else {"bias": bias}))
    (B, H), V = hidden.shape, weight.shape[0]
    require(weight.dim() == 2 and weight.shape[1] == H, lambda: f"weight must be [V, {H}], got {list(weight.shape)}")
    require(key.shape == (B, 2), lambda: f"key must be [{B}, 2], got {list(key.shape)}")
    require(counter.shape == (B, 3), lambda: f"counter must be [{B}, 3], got {list(counter.shape)}")
    require(key.dtype == torch.int64, lambda: f"key must be int64, got {key.dtype}")
    require(counter.dtype == torch.int64, lambda: f"counter must be int64, got {counter.dtype}")
    require(temperature >= 0, lambda: f"temperature must be at least 0, got {temperature}")
    require(softcap is None or 0 < softcap < math.inf, lambda: f"softcap must be above 0 and finite, or None, got {softcap}")
    require(top_k >= 0, lambda: f"top_k must be at least 0, got {top_k}")
    if temperature == 0:
        softcap = None  # it keeps the order, and rounds large logits to ties
    options = HeadOptions(float(scale), float(softcap or 0), float(temperature))
    if choose_impl(impl, hidden.device, hidden.dtype)[0] == "triton":
        from csrc_triton.linear_sample import MOST_TOP_K, sample

        if top_k <= MOST_TOP_K or top_k >= V:
            with torch.cuda.device_of(hidden):
                return sample(hidden, weight, key, counter, bias, options, top_k)
    return pick_tokens(head_logits(hidden, weight, bias, options), key, counter, top_k, noisy=temperature > 0)


def head_logits(hidden_BH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: HeadOptions) -> Tensor:
    """Logits [B, V], fp32 (float64 for float64 operands); at temperature 0, those of temperature 1."""
    weight_VH = weight_VH.to(hidden_BH.dtype)
    logits_BV = options.scale * (accumulable(hidden_BH) @ accumulable(weight_VH).T)
    if bias_V is not None:
        logits_BV += bias_V
    if options.softcap:
        logits_BV = options.softcap * torch.tanh(logits_BV / options.softcap)
    return logits_BV / (options.temperature or 1.0)


def pick_tokens(
    logits_BV: Tensor,
    key_B2: Tensor,
    counter_B3: Tensor,
    top_k: int = 0,
    *,
    noisy: bool = True,
    warp: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The token [B] that `linear_sample` draws from these logits, already divided by the temperature.

    warp: what is done to the logits [B, V] after top-k, which leaves -inf, and before the noise: a nucleus, say.
    """
    V = logits_BV.shape[1]
    if not noisy:
        return logits_BV.argmax(1)
    if not 0 < top_k < V:
        logits_BV = warp(logits_BV) if warp else logits_BV
        return (logits_BV.double() + gumbel(key_B2, counter_B3, size=V)).argmax(1)
    kept_BK, vocab_BK = largest(logits_BV, top_k)
    if warp:
        kept_BK = warp(torch.full_like(logits_BV, -torch.inf).scatter(1, vocab_BK, kept_BK)).gather(1, vocab_BK)
    best_B1 = (kept_BK.double() + gumbel(key_B2, counter_B3, vocab_BK)).argmax(1, keepdim=True)
    return vocab_BK.gather(1, best_B1)[:, 0]


def largest(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values [B, k], entries [B, k]) of the k largest, ties to the lowest entry. They are ranked as fp32."""
    V = logits_BV.shape[1]
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32)  # adding 0 turns -0 into 0, which it equals
    ordered_BV = (bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    rank_BV = (ordered_BV << 32) + torch.arange(V - 1, -1, -1, device=logits_BV.device)
    vocab_BK = V - 1 - (rank_BV.topk(k, dim=1).values & 0xFFFFFFFF)
    return logits_BV.gather(1, vocab_BK), vocab_BK
