"""Short texts that follow the prefixes of a longer one, all of them scored in one pass over the longer one.

A trunk is a text behind a source, such as an explanation behind its question; a branch follows its first tokens, such
as an answer behind the first steps. The trunk runs through the model once, and each branch sees the prefix that it
follows: n prefixes cost one pass over the trunk and one over the branches, not n passes. Suffixes: B rows, L padded
length, h heads, T branch tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.models import prefix_packing
from qcrd_fast.models.lm_head import backbone
from qcrd_fast.models.packed_attention import attention_inputs, probe_packed_attention
from qcrd_fast.models.prefix_packing import Group, Layout, length_batches, pack_rows
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import MAX_TOKENS, PackedHidden, Student

_modes: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def branch_hidden(
    student: Student,
    sources: Sequence[TokenIds],
    trunks: Sequence[TokenIds],
    branches: Sequence[TokenIds],
    trunk_of: Sequence[int],
    depths: Sequence[int],
    *,
    packed: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> PackedHidden:
    """Hidden states at the tokens of `branches`, in their order: branch i follows the first `depths[i]` tokens of
    `trunks[trunk_of[i]]`, and trunk u follows `sources[u]` (what an encoder reads, of an encoder-decoder).

    Trunks of similar length run together, at most `max_tokens` padded tokens at a time. `packed` False, and a model
    that does not follow the mask (tried once, on a few tokens), runs each prefix by itself. Call it in eval mode,
    without gradient.
    """
    mode = _mode(student) if packed else None
    return _branches(student, sources, trunks, branches, trunk_of, depths, mode, max_tokens)


def _mode(student: Student) -> str | None:
    """flex or dense, or None for a model that must run each prefix by itself."""
    if not student.is_encoder_decoder:
        return student.sharing
    if student.model not in _modes:
        noise = torch.Generator().manual_seed(0)
        rows = student.model.get_input_embeddings().weight.shape[0]
        source, trunk, a, b, c = (torch.randint(0, rows, (n,), generator=noise).tolist() for n in (5, 7, 3, 2, 4))
        _modes[student.model] = probe_packed_attention(
            student.model,
            lambda mode: (
                _branches(student, [source], [trunk], [a, b, c], [0, 0, 0], [0, 3, 7], mode, MAX_TOKENS).hidden
            ),
        )
    return _modes[student.model]


def _branches(
    student: Student,
    sources: Sequence[TokenIds],
    trunks: Sequence[TokenIds],
    branches: Sequence[TokenIds],
    trunk_of: Sequence[int],
    depths: Sequence[int],
    mode: str | None,
    max_tokens: int,
) -> PackedHidden:
    shared = student.is_encoder_decoder
    encoded = student.encode(sources) if shared else None
    before = [[student.start_id] if shared else list(source) for source in sources]  # of the trunk, in its row
    prompts = [head + list(trunk) for head, trunk in zip(before, trunks, strict=True)]
    reach = [len(before[u]) + depth for u, depth in zip(trunk_of, depths, strict=True)]
    source_of: Sequence[int] = range(len(prompts))
    if mode is None:  # a row a prefix
        prompts = [prompts[u][:n] for u, n in zip(trunk_of, reach, strict=True)]
        source_of, groups = trunk_of, [Group(i, [i]) for i in range(len(branches))]
    else:
        members: list[list[int]] = [[] for _ in prompts]
        for i, u in enumerate(trunk_of):
            members[u].append(i)
        groups = [Group(u, found) for u, found in enumerate(members) if found]
    widths = [len(prompts[group.source]) + sum(len(branches[i]) - 1 for i in group.targets) for group in groups]
    parts, order, body_tokens = [], [], encoded[1].numel() if encoded else 0
    for batch in length_batches(widths, max_tokens, prefix_packing.MAX_PAIRS if mode == "dense" else None):
        multiple = prefix_packing.BLOCK if mode == "flex" else 1
        rows = [[groups[g]] for g in batch]
        layout = pack_rows(
            rows, branches, prompts, [], student.pad_id, student.device, multiple, reach if mode else None
        )
        hidden_BLH = _run(student, encoded, layout, [source_of[group.source] for [group] in rows], mode)
        parts.append(hidden_BLH.flatten(0, 1).index_select(0, layout.at_T))
        order += layout.order
        body_tokens += layout.ids_BL.numel()
    start, at = {}, 0
    for i in order:
        start[i], at = at, at + len(branches[i])
    order_T = [start[i] + t for i in range(len(branches)) for t in range(len(branches[i]))]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=student.device)

    return PackedHidden(
        hidden=torch.cat(parts).index_select(0, tensor(order_T)),
        target=tensor([t for branch in branches for t in branch]),
        segment=tensor([i for i, branch in enumerate(branches) for _ in branch]),
        body_tokens=body_tokens,
    )


def _run(student: Student, encoded: Any, layout: Layout, sources: Sequence[int], mode: str | None) -> Tensor:
    """Hidden states [B, L, H] of a batch of rows."""
    inputs = attention_inputs(student.model, layout, mode)
    if not student.is_encoder_decoder:
        hidden: Tensor = backbone(student.model)(input_ids=layout.ids_BL, use_cache=False, **inputs).last_hidden_state
        return hidden
    states_QLH, mask_QL = encoded
    index = torch.tensor(sources, device=student.device)
    with _distances(student.model, layout) if mode else contextlib.nullcontext():
        output = student.model.get_decoder()(
            input_ids=layout.ids_BL,
            encoder_hidden_states=states_QLH.index_select(0, index),
            encoder_attention_mask=mask_QL.index_select(0, index),
            use_cache=False,
            **inputs,
        )
    hidden = output.last_hidden_state
    return hidden


@contextlib.contextmanager
def _distances(model: Any, layout: Layout) -> Iterator[None]:
    """T5's modules take distances from places in the row; here a branch's are those of the text that it belongs to."""
    biased = [m for m in model.get_decoder().modules() if getattr(m, "has_relative_attention_bias", False)]
    distance_BLL = layout.position_BL[:, None, :] - layout.position_BL[:, :, None]

    def bias(module: Any) -> Callable[..., Tensor]:
        def compute(*_: Any, **__: Any) -> Tensor:
            bucket_BLL = module._relative_position_bucket(
                distance_BLL,
                bidirectional=False,
                num_buckets=module.relative_attention_num_buckets,
                max_distance=module.relative_attention_max_distance,
            )
            bias_BLLh: Tensor = module.relative_attention_bias(bucket_BLL)
            return bias_BLLh.permute(0, 3, 1, 2)

        return compute

    try:
        for module in biased:
            module.compute_bias = bias(module)
        yield
    finally:
        for module in biased:
            module.__dict__.pop("compute_bias", None)
