"""Attention masks for packed rows: how to pass them to a model, and a test on a few tokens that it obeys them.

Models differ in how they take a mask, in what they do with position ids and in which layers look at a window; some
ignore a mask that is not theirs, and some carry a state along the row. What counts is that packed targets get the
hidden states they would get alone.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import backbone
from qcrd_fast.models.prefix_packing import Layout, block_mask, dense_mask, find_texts

log = logging.getLogger(__name__)
ATTENTION = "qcrd_fast"  # our name among transformers' attention functions
FLEX_DEVICES = ("cuda",)  # flex_attention has no backward pass on a CPU
VARLEN_DEVICES = ("cpu",)  # where a call for each text costs little beside its products
FLEX_WIDTH = 16  # of a head, at least, in flex_attention's kernels
# with and without gradient, one row and several, new shapes; behind torch's 8 it would run unfused
FLEX_RECOMPILES = 64
KINDS = {"full_attention", "sliding_attention"}
Hidden = Callable[[str | None], Tensor]  # mode -> hidden states [T, H] of the same few targets


def attention_inputs(model: Any, layout: Layout, mode: str | None) -> dict[str, Any]:
    """Return mask and position ids for a batch of rows. `mode`: dense, flex, varlen, or None (one prompt and target a
    row)."""
    if mode is None or layout.plain:  # causal attention never looks at the padding on the right
        return {} if model.config.is_encoder_decoder else {"attention_mask": (layout.group_BL >= 0).long()}
    config = model.config.get_text_config(decoder=True)
    dtype = next(model.parameters()).dtype
    if mode == "varlen":
        return {"attention_mask": text_mask(layout), "position_ids": layout.position_BL}
    masks = {}
    for kind in _kinds(config):
        window = config.sliding_window if kind == "sliding_attention" else None
        masks[kind] = block_mask(layout, window) if mode == "flex" else dense_mask(layout, window, dtype)
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask} | ({} if model.config.is_encoder_decoder else {"position_ids": layout.position_BL})


def probe_packed_attention(model: Any, hidden: Hidden) -> str | None:
    """Return varlen, flex, dense, or None (logged once) if packed hidden states differ from those of single sequences.

    `hidden(mode)` computes the same few targets' states, None being one sequence a target.
    """
    config, name, training = model.config.get_text_config(decoder=True), type(model).__name__, model.training
    tolerance = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
    model.eval()
    try:
        with _small_window(config):
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                if fault := _strange_layers(config) or _fault(hidden, "dense", tolerance):
                    log.warning("%s: prompts are not shared, each target runs on its own: %s", name, fault)
                    return None
            if _may_varlen(model, config):
                model.set_attn_implementation(ATTENTION)
                with torch.enable_grad():
                    parameters = [p for p in model.parameters() if p.requires_grad]
                    fault = _fault(hidden, "varlen", tolerance, parameters)
                if fault is None:
                    return "varlen"
                log.debug("%s: attention runs under a dense mask: %s", name, fault)
                model.set_attn_implementation("sdpa")
            if not _may_flex(model, config):
                return "dense"
            model.set_attn_implementation(ATTENTION)
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, FLEX_RECOMPILES)
            tolerance = 5e-2 if torch.is_autocast_enabled(model.device.type) else max(tolerance, 1e-3)
            with torch.enable_grad():
                if fault := _fault(hidden, "flex", tolerance, [p for p in model.parameters() if p.requires_grad]):
                    log.warning("%s: flex_attention is not used: %s", name, fault)
                    model.set_attn_implementation("sdpa")
                    return "dense"
            return "flex"
    finally:
        model.train(training)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise `InputError` if a hidden state depends on later tokens, which would leak targets."""
    device, training = model.device, model.training
    rows, pad = model.get_input_embeddings().weight.shape[0], getattr(model.config, "pad_token_id", None) or 0
    # T5Gemma masks padding by its id
    ids = (torch.arange(1, 7, device=device) + pad).remainder(rows).expand(2, 6).clone()
    ids[1, -1] = ids[1, 0]
    try:
        model.eval()
        if model.config.is_encoder_decoder:
            states = model.get_encoder()(input_ids=ids[:1].expand(2, -1)).last_hidden_state
            hidden = model.get_decoder()(input_ids=ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
        else:
            hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(training)
    apart = float((hidden[0, :-1] - hidden[1, :-1]).norm() / hidden[0, :-1].norm().clamp(min=1e-12))
    if not apart <= 1e-2:
        raise InputError(
            f"student: in {type(model).__name__} tokens see what comes after them (hidden states move by {apart:.2g} "
            "of their norm), so it cannot learn to predict it; transformers 5.17 does so to UMT5, 5.23 does not"
        )


def _fault(hidden: Hidden, mode: str, tolerance: float, parameters: Sequence[Tensor] = ()) -> str | None:
    """Return what is wrong with a mode, or None. With parameters, the backward pass is tested too."""
    try:
        expected, actual = hidden(None).detach(), hidden(mode)
        if parameters:
            torch.autograd.grad(actual.sum(), parameters, allow_unused=True)
            actual = actual.detach()
    except Exception as error:  # whatever a model raises at a mask that it does not know
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    apart = float((actual - expected).norm() / expected.norm().clamp(min=1e-12))
    return None if apart <= tolerance else f"hidden states of packed targets differ by {apart:.2g} of their norm"


def _kinds(config: Any) -> list[str]:
    """Return the kinds of attention layers."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return sorted(set(layers))
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def _strange_layers(config: Any) -> str | None:
    """Return layers that our masks cannot describe, or whose reach the test's few tokens cannot show."""
    if kinds := set(_kinds(config)) - KINDS:
        return f"it has layers of {', '.join(sorted(kinds))}"
    known = re.compile("sliding_window|max_window_layers")
    reach = {n: v for n, v in config.to_dict().items() if re.search("window|chunk", n) and not known.search(n)}
    strange = sorted(n for n in reach if type(reach[n]) is int and reach[n] > 0)
    return f"it sets {', '.join(strange)}" if strange else None


@contextlib.contextmanager
def _small_window(config: Any) -> Iterator[None]:
    """Set a sliding window of three tokens, shorter than the test's sequence."""
    own = getattr(config, "sliding_window", None)
    if own:
        config.sliding_window = 3
    try:
        yield
    finally:
        if own:
            config.sliding_window = own


# flex_attention


def _may_flex(model: Any, config: Any) -> bool:
    dropout = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # flex_attention has none
    return (
        model.device.type in FLEX_DEVICES
        and not model.config.is_encoder_decoder
        and model._supports_flex_attn
        and config._attn_implementation == "sdpa"
        and not any(getattr(config, name, None) for name in dropout)
        and (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) >= FLEX_WIDTH
    )


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Use flex_attention for a BlockMask, a call for each text for an index of texts, and sdpa otherwise, so generation
    and plain batches are unchanged."""
    if isinstance(attention_mask, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave them in fp32
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.long:
        return _varlen_attention(query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# A call for each text


def _may_varlen(model: Any, config: Any) -> bool:
    return (
        model.device.type in VARLEN_DEVICES
        and not model.config.is_encoder_decoder
        and config._attn_implementation == "sdpa"
        and _kinds(config) == ["full_attention"]
    )


def text_mask(layout: Layout) -> Tensor:
    """Return `find_texts` as a model takes a mask: [1, 1, 3, W] int64, `first`, `at` and `lengths` padded with 0."""
    texts, device = find_texts(layout), layout.ids_BL.device
    W = max(len(texts.first), len(texts.at))
    rows = [part + [0] * (W - len(part)) for part in (texts.first, texts.at, texts.lengths)]
    mask = torch.tensor([[rows]], dtype=torch.long, device=device)
    mask.lengths = texts.lengths  # type: ignore[attr-defined]  # so that fake tensors need not be read
    return mask


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """Causal attention of each of N texts on its own: [B, L, h, d] for query [B, h, L, d], key and value [B, g, L, d].

    `mask`: of `text_mask`. A token of several texts takes what it gets in the first; padding takes anything finite.
    """
    (B, h, L, _d), g = query.shape, key.shape[1]
    first_M, at_M, length_N = mask[0, 0]
    lengths = getattr(mask, "lengths", None) or [n for n in length_N.tolist() if n]
    at_M = at_M[: sum(lengths)]
    texts = [
        x.transpose(1, 2).flatten(0, 1).index_select(0, at_M).transpose(0, 1)[None].split(lengths, 2)
        for x in (query, key, value)
    ]
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=h != g)
        for q, k, v in zip(*texts, strict=True)
    ]
    out_MhE = torch.cat(parts, 2)[0].transpose(0, 1)
    return out_MhE.index_select(0, first_M[: B * L]).view(B, L, h, value.shape[3])


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
