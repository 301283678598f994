"""Prefix packing: several targets share one prompt in a row, under one attention mask.

A group is a prompt with targets behind it: every target sees the prompt (or its first tokens, the target's depth) and
itself, as if the others were not there, and its position ids go on where what it sees ends. A row holds one group or
several. An encoder-decoder's groups have no prompt (the encoder has read it), so that they are targets side by side.

Suffixes: B rows, L padded length, T target tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from qcrd_fast.models.prompts import TokenIds

MAX_PAIRS = 2**22  # (query, key) pairs of a batch whose mask is dense
MAX_ROW = 2048  # tokens of a row that is shared
BIASED_ROW = 384  # the same where positions are a bias on the scores, which every layer writes out for every head
BLOCK = 128  # flex_attention's tiles; rows are padded to whole ones, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Group:
    source: int
    targets: list[int]


class Extent(NamedTuple):
    """Tokens of a group in its row: those of its prompt, and of each target how many it sees of them and its own."""

    prompt: int
    targets: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A padded batch of rows. `at_T`: index into the flattened [B * L] hidden states that predict each target token."""

    ids_BL: Tensor
    position_BL: Tensor  # in the text that the token belongs to, not in the row
    group_BL: Tensor  # of its row; -1: padding
    part_BL: Tensor  # 0: prompt, 1...: targets of the group
    at_T: Tensor
    order: list[int]  # the targets, as they stand one behind the other in at_T
    sources: list[int]  # [B] of each row's first group
    first: list[int]  # [B] where in its row the first target's first token is predicted
    plain: bool  # every row is one prompt and one target, so a causal model needs no help
    rows: list[list[Extent]]  # [B] the lengths of each row's groups
    depth_BL: Tensor | None = None  # how many tokens of its prompt a target's token sees; None: all


def best_room(prompt: int, hidden_size: int) -> int:
    """Return how many target tokens to pack after a prompt under a dense mask.

    r tokens behind a prompt of P cost (P + r)(c + a(P + r)) / r each, a = 4H for attention over the whole row, c =
    24H^2 for the other products of a layer; the least is at r^2 = P(P + c/a). Longer rows pay more for hidden pairs
    than they save.
    """
    return max(min(math.isqrt(prompt * (prompt + 6 * hidden_size)), MAX_ROW - prompt), 1)


def group_by_prompt(lengths: Sequence[int], source_of: Sequence[int], rooms: Sequence[int]) -> list[Group]:
    """Group targets by prompt; split a group into several of similar length if it exceeds its row.

    `lengths`: target lengths; `rooms`: target tokens that a row of each source may hold. A source without a target gets
    no group.
    """
    groups = []
    for source in dict.fromkeys(source_of):
        members = sorted((i for i, of in enumerate(source_of) if of == source), key=lambda i: (-lengths[i], i))
        room = max(rooms[source], lengths[members[0]], 1)
        count = -(-sum(lengths[i] for i in members) // room) or 1
        while True:
            bins: list[list[int]] = [[] for _ in range(count)]
            used = [0] * count
            for i in members:  # the longest first, each to where there is least
                least = used.index(min(used))
                bins[least].append(i)
                used[least] += lengths[i]
            if max(used) <= room:
                break
            count += 1
        groups += [Group(source, sorted(members)) for members in bins if members]
    return groups


def length_batches(lengths: Sequence[int], max_tokens: int, max_pairs: int | None = None) -> Iterator[list[int]]:
    """Yield batches of indices of similar length, longest first.

    Each has at most `max_tokens` padded tokens (or one sequence), at most `max_pairs` pairs of them, and no sequence
    shorter than half of its longest.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batch[0]] if batch else 0
        full = longest * (len(batch) + 1) > max_tokens or (max_pairs and longest**2 * (len(batch) + 1) > max_pairs)
        if batch and (full or 2 * lengths[i] < longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack indices into rows of at most `capacity` tokens (or one sequence): longest first, first row that fits."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if fit is None:
            rows.append([])
            room.append(capacity)
            fit = -1
        rows[fit].append(i)
        room[fit] -= lengths[i]
    return rows


def pack_rows(
    rows: Sequence[Sequence[Group]],
    targets: Sequence[TokenIds],
    prompts: Sequence[TokenIds] | None,
    start: TokenIds,
    pad: int,
    device: torch.device,
    multiple: int = 1,
    depths: Sequence[int] | None = None,
) -> Layout:
    """Build the padded batch of `rows`, its length a multiple of `multiple`.

    `start` begins each target: the decoder's start token, or nothing where `prompts` stand in the rows (decoder-only).
    `depths`: of each target, how many tokens of its prompt it follows, 1 or more; None: all.
    """
    packed: list[list[tuple[int, int, int, int, int]]] = []  # (id, position, group, part, depth) of each token
    where, order, first = [], [], []
    extents: list[list[Extent]] = []
    for b, row in enumerate(rows):
        tokens: list[tuple[int, int, int, int, int]] = []
        extents.append([])
        for g, group in enumerate(row):
            prompt = prompts[group.source] if prompts is not None else []
            begin = len(tokens)
            tokens += [(token, t, g, 0, 0) for t, token in enumerate(prompt)]
            extents[-1].append(Extent(len(prompt), []))
            for part, i in enumerate(group.targets, 1):
                piece = start + targets[i][:-1]
                depth = len(prompt) if depths is None else depths[i]
                extents[-1][-1].targets.append((depth, len(piece)))
                predicts_first = [] if start else [begin + depth - 1]  # the last token of the prompt that it sees
                at = predicts_first + [len(tokens) + t for t in range(len(piece))]
                tokens += [(token, depth + t, g, part, depth) for t, token in enumerate(piece)]
                where += [(b, column) for column in at[: len(targets[i])]]
                order.append(i)
                first += at[:1] if g == 0 and part == 1 else []
        packed.append(tokens)
    width = -(-max(map(len, packed)) // multiple) * multiple
    filled = [tokens + [(pad, 0, -1, 0, 0)] * (width - len(tokens)) for tokens in packed]
    ids_BL, position_BL, group_BL, part_BL, depth_BL = torch.tensor(filled, dtype=torch.long, device=device).unbind(-1)
    return Layout(
        ids_BL=ids_BL,
        position_BL=position_BL,
        group_BL=group_BL,
        part_BL=part_BL,
        at_T=torch.tensor([b * width + column for b, column in where], dtype=torch.long, device=device),
        order=order,
        sources=[row[0].source for row in rows],
        first=first,
        rows=extents,
        plain=depths is None and all(len(row) == 1 and len(row[0].targets) == 1 for row in rows),
        depth_BL=None if depths is None else depth_BL,
    )


def make_mask_mod(layout: Layout, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the mask_mod (row, head, query, key) -> bool of packed rows, as in flex_attention.

    `window`: sliding window by position, the query included. Padding attends to padding, so that no softmax is empty.
    """
    group, part, position, depth = layout.group_BL, layout.part_BL, layout.position_BL, layout.depth_BL

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        prompt = part[b, k] == 0
        if depth is not None:
            prompt = prompt & (position[b, k] < depth[b, q])
        same = prompt | (part[b, k] == part[b, q])
        seen = (k <= q) & (group[b, k] == group[b, q]) & same
        return seen if window is None else seen & (position[b, q] - position[b, k] < window)

    return mask_mod


def dense_mask(layout: Layout, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, L, L]: 0 where visible, else the type's lowest value."""
    rows, width = layout.ids_BL.shape
    b = torch.arange(rows, device=layout.ids_BL.device)[:, None, None, None]
    token = torch.arange(width, device=layout.ids_BL.device)
    seen = make_mask_mod(layout, window)(b, b, token[:, None], token[None, :])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class Texts(NamedTuple):
    """Where the texts of rows stand in the flattened [B * L]: what each target follows of its prompt, and the target;
    or a prompt that no target follows to its end."""

    lengths: list[int]  # [N]
    at: list[int]  # [M] of every token of every text, one text after another
    first: list[int]  # [B * L] where in `at` each token stands first; 0: padding


def find_texts(layout: Layout) -> Texts:
    """The texts of rows, group by group."""
    width, texts = layout.ids_BL.shape[1], []
    for b, row in enumerate(layout.rows):
        begin = b * width
        for group in row:
            prompt = list(range(begin, begin + group.prompt))
            begin += group.prompt
            if max((depth for depth, own in group.targets if own), default=0) < group.prompt:
                texts.append(prompt)
            for depth, own in group.targets:
                if own:
                    texts.append(prompt[:depth] + list(range(begin, begin + own)))
                begin += own
    at = [token for text in texts for token in text]
    first = [0] * layout.ids_BL.numel()
    for i in reversed(range(len(at))):
        first[at[i]] = i
    return Texts([len(text) for text in texts], at, first)


def block_mask(layout: Layout, window: int | None) -> Any:
    """Return the mask as flex_attention's BlockMask, which skips empty tiles."""
    rows, width = layout.ids_BL.shape
    compiled = layout.ids_BL.is_cuda  # else the whole mask is made on the way
    return create_block_mask(
        make_mask_mod(layout, window), rows, None, width, width, device=layout.ids_BL.device, _compile=compiled
    )
