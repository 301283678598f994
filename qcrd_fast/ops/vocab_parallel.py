"""`linear_logprob` for a head whose vocabulary is split over ranks (Megatron's tensor parallelism).

Each rank has all hidden states and a contiguous slice of the head's rows; two all-reduces of a few numbers a token make
log p of the whole vocabulary, and in the backward pass one makes dHidden. A shape suffix T is that of the targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from qcrd_fast.ops.checks import require


class Slice(NamedTuple):
    """One rank's slice for each token [T]. Targets of other ranks use its first row and are masked."""

    logprob: Tensor  # log p of the target among the slice's rows
    lse: Tensor
    entropy: Tensor | None
    sum_p2: Tensor | None


class ToSlices(torch.autograd.Function):
    """Identity on hidden states; sums their gradient over ranks, as each rank uses them for its own slice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, None]:
        summed = dhidden.to(torch.promote_types(dhidden.dtype, torch.float32), copy=True)
        dist.all_reduce(summed, group=ctx.group)
        return summed.to(dhidden.dtype), None


class Combine(torch.autograd.Function):
    """(log p, log-sum-exp, entropy or [0]) of the whole vocabulary from each rank's own, [T] each.

    With m = exp(lse_l - lse) the mass of a slice l: lse = log sum exp lse_l, log p = z_target - lse, and the entropy is
    H = lse - sum m (lse_l - H_l). Every rank computes the same loss from these, so that gradients need no exchange:
    d lse / d lse_l = m, d H / d H_l = m, d H / d lse_l = m ((lse - H) - (lse_l - H_l)).
    """

    @staticmethod
    def forward(
        ctx: Any, picked_T: Tensor, lse_l: Tensor, entropy_l: Tensor, slices_T: Tensor, valid_T: Tensor, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        largest_T = lse_l.clone()
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group)
        largest_T.clamp_(min=torch.finfo(lse_l.dtype).min)  # all of a row's logits may be -inf
        share_T = (lse_l - largest_T).exp()
        want_entropy = len(entropy_l) > 0
        sums = [picked_T, share_T, slices_T.to(share_T.dtype)]
        if want_entropy:
            sums.append(share_T * (lse_l - largest_T - entropy_l).where(share_T > 0, 0))
        sums_KT = torch.stack(sums)
        dist.all_reduce(sums_KT, group=group)
        require(
            (sums_KT[2] == valid_T).all(),
            lambda: (
                "each target must be a row of exactly one rank's slice; check vocab_start, which counts the rows "
                "before it"
            ),
        )
        log_sum_T = sums_KT[1].log()
        lse_T = largest_T + log_sum_T
        logprob_T = (sums_KT[0] - lse_T).clamp(max=0)
        entropy_T = log_sum_T - sums_KT[3] / sums_KT[1] if want_entropy else entropy_l.clone()
        mass_T = share_T / sums_KT[1]
        slope_T = (
            mass_T * ((lse_T - entropy_T) - (lse_l - entropy_l)).where(mass_T > 0, 0) if want_entropy else entropy_l
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mass_T, slope_T)
        return logprob_T, lse_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dlogprob_T, dlse_T, dentropy_T = grads
        mass_T, slope_T = ctx.saved_tensors
        zero_T = torch.zeros_like(mass_T)
        dlogprob_T = zero_T if dlogprob_T is None else dlogprob_T
        dlse_l = mass_T * ((zero_T if dlse_T is None else dlse_T) - dlogprob_T)
        dentropy_l = None
        if dentropy_T is not None and len(slope_T):
            dlse_l = dlse_l + dentropy_T * slope_T
            dentropy_l = dentropy_T * mass_T
        return dlogprob_T, dlse_l, dentropy_l, None, None, None


def combine(
    slice_: Slice, here_T: Tensor, valid_T: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(log p, log-sum-exp, entropy, sum p^2) of the whole vocabulary, [T] each, 0 where ignored.

    here_T: whether the target's row is in this rank's slice; the slice's numbers are those of valid tokens.
    """
    picked_T = (slice_.logprob + slice_.lse).where(here_T, 0)
    entropy_l = slice_.lse.new_empty(0) if slice_.entropy is None else slice_.entropy
    logprob_T, lse_T, entropy_T = Combine.apply(picked_T, slice_.lse, entropy_l, here_T, valid_T, group)
    sum_p2_T = None
    if slice_.sum_p2 is not None:
        sum_p2_T = slice_.sum_p2 * (2 * (slice_.lse - lse_T)).detach().exp()
        dist.all_reduce(sum_p2_T, group=group)
        sum_p2_T = sum_p2_T.where(valid_T, 0)
    entropy = None if slice_.entropy is None else entropy_T.where(valid_T, 0)
    return logprob_T.where(valid_T, 0), lse_T.where(valid_T, 0), entropy, sum_p2_T
