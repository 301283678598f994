"""Sample one token a row from hidden states and a head, by the Gumbel-max rule.

argmax of logits + Gumbel noise is a sample of the softmax. The kernels of `csrc_triton.linear_sample` hold no logits;
the torch implementation holds [B, V].

Suffixes: B rows, H hidden, V vocabulary, K entries kept by top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcrd_fast.ops.checks import is_finite, require, require_tensors
from qcrd_fast.ops.chunked import head_logits, pick_tokens
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.reference import HeadOptions


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
    """Sample one token of each row [B], int64, from softmax(logits).

    logits = softcap * tanh(a / softcap) / temperature with a = scale * hidden weight^T + bias, restricted to the
    `top_k` largest (0: all). Temperature 0: the largest logit.

    hidden [B, H], weight [V, H], bias [V]; key [B, 2], counter [B, 3] = (position, index, iteration): int64 in [0,
    2^32), which with the vocabulary entry are all that the noise depends on (`qcrd_fast.ops.philox`). Equal logits: the
    lowest entry first.

    Raises `ValueError` naming what was expected and what came, `TypeError` for an argument that is no tensor.
    """
    require_tensors(hidden=hidden, weight=weight, key=key, counter=counter, **({} if bias is None else {"bias": bias}))
    require(hidden.dim() == 2, lambda: f"hidden must be [B, H], got {list(hidden.shape)}")
    (B, H), V = hidden.shape, weight.shape[0]
    require(weight.dim() == 2 and weight.shape[1] == H, lambda: f"weight must be [V, {H}], got {list(weight.shape)}")
    require(bias is None or bias.shape == (V,), lambda: f"bias must be [{V}], got {list(bias.shape)}")  # type: ignore[union-attr]
    require(
        all(x is None or x.device == hidden.device for x in (weight, key, counter, bias)),
        lambda: f"weight, key, counter and bias must be on {hidden.device} with hidden",
    )
    require(key.shape == (B, 2), lambda: f"key must be [{B}, 2], got {list(key.shape)}")
    require(counter.shape == (B, 3), lambda: f"counter must be [{B}, 3], got {list(counter.shape)}")
    require(key.dtype == torch.int64, lambda: f"key must be int64, got {key.dtype}")
    require(counter.dtype == torch.int64, lambda: f"counter must be int64, got {counter.dtype}")
    require(is_finite(scale), lambda: f"scale must be finite, got {scale}")
    require(temperature >= 0, lambda: f"temperature must be at least 0, got {temperature}")
    require(
        softcap is None or 0 < softcap < math.inf, lambda: f"softcap must be above 0 and finite, or None, got {softcap}"
    )
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
