"""log p of targets from hidden states and a head, as a torch operator with autograd; no logits are held.

Shape suffixes as in `reference`.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.ops import chunked, reference, vocab_parallel
from qcrd_fast.ops.checks import check_head, require, require_no_tangent
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.reference import HeadOptions


class LogProbOutput(tuple[Tensor, ...]):
    """Named tuple that `linear_logprob` returns with extras: log p and the extras asked for, in this order.

        out = linear_logprob(hidden, weight, target, return_lse=True, return_entropy=True)
        out.logprob, out.lse, out.entropy
        logprob, lse, entropy = out

    An extra that was not asked for is None and takes no place in the tuple. All have the shape of the targets, and are
    0 where ignored.
    """

    __slots__ = ()
    _fields: tuple[str, ...] = ("logprob", "lse", "entropy", "is_top1", "sum_p2")
    logprob: Tensor  # log p of each target [nats], differentiable
    lse: Tensor | None = None  # log-sum-exp of the logits [nats], differentiable
    entropy: Tensor | None = None  # of p [nats], differentiable
    is_top1: Tensor | None = None  # bool: no logit is above the target's
    sum_p2: Tensor | None = None  # sum of p^2 over the vocabulary, detached

    def __new__(
        cls,
        logprob: Tensor,
        lse: Tensor | None = None,
        entropy: Tensor | None = None,
        is_top1: Tensor | None = None,
        sum_p2: Tensor | None = None,
    ) -> LogProbOutput:
        values = (logprob, lse, entropy, is_top1, sum_p2)
        given = [(name, x) for name, x in zip(LogProbOutput._fields, values, strict=True) if x is not None]
        return _named_output(tuple(name for name, _ in given), [x for _, x in given])

    def __reduce__(self) -> tuple[Any, ...]:
        return _named_output, (self._fields, tuple(self))


EXTRAS = LogProbOutput._fields[1:]
_OUTPUTS = {
    names: type(
        "LogProbOutput",
        (namedtuple("LogProbOutput", names), LogProbOutput),
        {"__slots__": (), "__doc__": LogProbOutput.__doc__},
    )
    for n in range(len(EXTRAS) + 1)
    for names in (("logprob", *extras) for extras in itertools.combinations(EXTRAS, n))
}  # made here, since neither torch.compile nor pickle can make a class


def _named_output(names: tuple[str, ...], values: Sequence[Tensor]) -> LogProbOutput:
    return _OUTPUTS[names](*values)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_top1: bool = False,
    return_sum_p2: bool = False,
    impl: str = "auto",
    max_rows: int | None = None,
    workspace_bytes: int = 0,
    process_group: Any = None,
    vocab_start: int | None = None,
) -> Any:
    """Compute log p(target) in nats [...] without holding logits.

    fp32 (float64 for float64 operands), never above 0; 0 and no gradient for ignored targets.

    hidden [..., H]; weight [V, H]; target [...] int64, already shifted; bias [V].
    logits = softcap * tanh(a / softcap) / temperature, a = scale * hidden weight^T + bias; temperature: a number, or
    one for each token [...].

    With any `return_...` a `LogProbOutput`: log p, and from the same pass the log-sum-exp and the entropy, in nats and
    differentiable too, whether the target has the largest logit, and the sum of p^2, both without gradient. The last
    two and a temperature for each token are not in the kernels: `triton` computes such a call as `torch` does, a chunk
    at a time.

    The product is taken in hidden's type (under autocast, autocast's) and accumulated in fp32. The backward pass visits
    only rows whose gradient is not 0; `max_rows`, a bound on their number, saves it one host sync on a GPU; a bound
    that is exceeded raises in backward (on a GPU, asserts). `workspace_bytes`: how many bytes of logits `torch` may
    keep for the backward pass (T V 4 for all in fp32), which then does not compute them again; the kernels always do.

    process_group: of the ranks over which the head's rows are split, one after another: `weight` and `bias` are this
    rank's slice, which begins at row `vocab_start` of the whole (default: rank times V, for slices of one size), and
    hidden and target are the same on all ranks, as is what is returned. There is no `return_top1` then.

    Raises `ValueError` naming what was expected and what came, also under forward-mode AD and for a scale, softcap or
    temperature that requires grad; `TypeError` for an argument that is no tensor.
    """
    require(max_rows is None or max_rows >= 0, lambda: f"max_rows must be at least 0 or None, got {max_rows}")
    require(workspace_bytes >= 0, lambda: f"workspace_bytes must be at least 0, got {workspace_bytes}")
    if process_group is not None:
        require(not return_top1, lambda: "return_top1 is not available with a process_group")
        settings: Any = dict(
            bias=bias, scale=scale, softcap=softcap, temperature=temperature, ignore_index=ignore_index
        )
        settings |= dict(impl=impl, max_rows=max_rows, workspace_bytes=workspace_bytes)
        settings |= dict(return_entropy=return_entropy, return_sum_p2=return_sum_p2)
        logprob, lse, entropy, sum_p2 = _over_slices(hidden, weight, target, process_group, vocab_start, **settings)
        wants = (True, return_lse, return_entropy, False, return_sum_p2)
        return _returned([logprob, lse, entropy, None, sum_p2], wants)
    hidden_TH, target_T, options = check_head(hidden, weight, target, bias, scale, softcap, temperature, ignore_index)
    chosen = choose_impl(impl, hidden.device, hidden_TH.dtype)[0]
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "eager":
            out = reference.linear_logprob_eager(hidden_TH, weight, target_T, bias, options, ignore_index)
        else:
            require_no_tangent(hidden, weight, bias)
            scale, softcap, temperature = options
            each_T1 = temperature if isinstance(temperature, Tensor) else None
            triton = chosen == "triton" and each_T1 is None and not (return_top1 or return_sum_p2)
            numbers = (scale, softcap, temperature if each_T1 is None else 1.0, each_T1)
            head = (hidden_TH, weight, target_T, bias, *numbers)
            differentiated = torch.is_grad_enabled() and any(
                x is not None and x.requires_grad for x in (hidden, weight, bias)
            )
            kept_bytes = workspace_bytes if differentiated and not triton else 0
            out = _linear_logprob(*head, ignore_index, return_entropy, return_sum_p2, triton, max_rows, kept_bytes)
    wants = (True, return_lse, return_entropy, return_top1, return_sum_p2)
    return _returned([x.reshape(target.shape) if want else None for x, want in zip(out[:5], wants, strict=True)], wants)


def _returned(values: Sequence[Any], wants: Sequence[bool]) -> Any:
    """Return log p alone, or a `LogProbOutput` with the extras asked for."""
    wanted = list(itertools.compress(values, wants))
    return (
        wanted[0] if len(wanted) == 1 else _named_output(tuple(itertools.compress(("logprob", *EXTRAS), wants)), wanted)
    )


def _over_slices(
    hidden: Tensor, weight: Tensor, target: Tensor, group: Any, start: int | None, *, ignore_index: int,
    return_entropy: bool,
    return_sum_p2: bool, **settings: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (log p, log-sum-exp, entropy or None, sum p^2 or None) over all ranks' vocabulary, in the target's
    shape."""
    start = torch.distributed.get_rank(group) * len(weight) if start is None else start
    valid = target != ignore_index
    here = valid & (target >= start) & (target < start + len(weight))
    out = linear_logprob(
        vocab_parallel.ToSlices.apply(hidden, group), weight,
        (target - start).where(here, 0).where(valid, ignore_index),
        ignore_index=ignore_index, return_lse=True, return_entropy=return_entropy, return_sum_p2=return_sum_p2,
        **settings,
    )  # fmt: skip
    slice_ = vocab_parallel.Slice(out.logprob, out.lse, out.entropy, out.sum_p2)
    return vocab_parallel.combine(slice_, here, valid, group)


@torch.library.custom_op("qcrd_fast::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    temperature_T1: Tensor | None,
    ignore_index: int,
    want_entropy: bool,
    want_sum_p2: bool,
    triton: bool,
    max_rows: int | None,
    kept_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p, log-sum-exp, entropy or [0], is top 1 ([0] by triton), sum p^2 or [0], rest and kept logits as
    `chunked_forward` gives them)."""
    options = HeadOptions(scale, softcap, temperature if temperature_T1 is None else temperature_T1)
    arguments = (hidden_TH, weight_VH, target_T, bias_V, options, ignore_index, want_entropy)
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        if triton:
            from csrc_triton.linear_logprob import forward

            logprob_T, lse_T, entropy_T, rest_T = forward(*arguments)
            nothing = lse_T.new_empty(0)
            return (
                logprob_T,
                lse_T,
                entropy_T,
                target_T.new_empty(0, dtype=torch.bool),
                nothing,
                rest_T,
                nothing.clone(),
            )
        return chunked.chunked_forward(*arguments, want_sum_p2, kept_bytes)


@_linear_logprob.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, want_entropy, want_sum_p2, triton, _max_rows, kept_bytes = rest
    T = hidden_TH.shape[0]

    def out(want: bool, dtype: torch.dtype) -> Tensor:
        return hidden_TH.new_empty(T if want else 0, dtype=dtype)

    dtype = reference.accumulation_dtype(hidden_TH.dtype)
    wants = (True, True, want_entropy, not triton, want_sum_p2, want_entropy)
    columns = chunked.kept_columns(len(weight_VH), T, dtype, kept_bytes) if kept_bytes else 0
    kept = hidden_TH.new_empty(T * columns, dtype=dtype)
    return *(out(want, torch.bool if i == 3 else dtype) for i, want in enumerate(wants)), kept


@torch.library.custom_op("qcrd_fast::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    bias_V: Tensor | None,
    lse_T: Tensor,
    onehot_T: Tensor,
    prob_T: Tensor,
    problog_T: Tensor | None,
    kept: Tensor,
    scale: float,
    softcap: float,
    temperature: float,
    temperature_T1: Tensor | None,
    triton: bool,
    max_rows: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dHidden, dWeight, dBias), each [0] where not needed; the three coefficients are those of `chunked_backward`."""
    twin: Any = chunked.chunked_backward
    if triton:
        from csrc_triton.linear_logprob import backward as twin  # type: ignore[no-redef]
    T = len(target_T)
    wanted_T = (onehot_T != 0) | (prob_T != 0)
    if problog_T is not None:
        wanted_T = wanted_T | (problog_T != 0)
    rows_S, real_S = compact(wanted_T, max_rows)

    def take(x_T: Tensor) -> Tensor:
        return x_T[rows_S] if real_S is None else x_T[rows_S].where(real_S, 0)

    options = HeadOptions(scale, softcap, temperature if temperature_T1 is None else temperature_T1[rows_S])
    coefficients = (take(onehot_T), take(prob_T), None if problog_T is None else take(problog_T))
    of_kept = (kept, rows_S, T) if len(kept) else ()
    with torch.autocast(hidden_TH.device.type, enabled=False), torch.cuda.device_of(hidden_TH):
        head = (hidden_TH[rows_S], weight_VH, target_T[rows_S], bias_V, lse_T[rows_S])
        dhidden_SH, dweight_VH, dbias_V = twin(*head, coefficients, options, tuple(needs), *of_kept)
    dhidden_TH, empty = None, hidden_TH.new_empty(0)
    if dhidden_SH is not None:
        dhidden_TH = scatter_rows(dhidden_SH.to(hidden_TH.dtype), rows_S, real_S, T)
    grads = (dhidden_TH, dweight_VH, dbias_V)
    return tuple(empty.clone() if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_linear_logprob_backward.register_fake
def _(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, bias_V: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return tuple(
        empty_gradient(x, need, hidden_TH) for x, need in zip((hidden_TH, weight_VH, bias_V), needs, strict=True)
    )


def empty_gradient(x: Tensor | None, need: bool, other: Tensor) -> Tensor:
    """Allocate an operator's gradient of `x`, without values; [0] if not needed."""
    return torch.empty_like(x).contiguous() if need and x is not None else other.new_empty(0)


def compact(wanted_T: Tensor, max_rows: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the indices of true entries and which are real. With `max_rows`: that many, padded, without a host
    sync."""
    if max_rows is None:
        return wanted_T.nonzero()[:, 0], None
    T = len(wanted_T)
    S = min(max_rows, T)
    count = wanted_T.sum()
    require(
        count <= S,
        lambda: (
            f"max_selected_tokens is {max_rows} (linear_logprob: max_rows), but {int(count)} tokens have a gradient"
        ),
    )
    slot_T = torch.where(wanted_T, wanted_T.cumsum(0) - 1, S).clamp(max=S)
    index_T = torch.arange(T, device=wanted_T.device)
    rows_S = torch.zeros(S + 1, dtype=torch.int64, device=wanted_T.device).scatter(0, slot_T, index_T)[:S]
    return rows_S, torch.arange(S, device=wanted_T.device) < count


def scatter_rows(x_SH: Tensor, rows_S: Tensor, real_S: Tensor | None, T: int) -> Tensor:
    """[T, H] with the rows of `x_SH` where `compact` took them from, 0 elsewhere."""
    x_TH = x_SH.new_zeros((T + 1, x_SH.shape[1]))  # the last row takes what the padding of `rows_S` writes
    x_TH[rows_S if real_S is None else rows_S.where(real_S, T)] = x_SH
    return x_TH[:T]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, scale, softcap, temperature, temperature_T1, ignore_index, _entropy, _sum_p2, triton, max_rows, _kept = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*head, output[1], output[2], output[5], output[6], temperature_T1)
    ctx.settings = (scale, softcap, temperature, triton, max_rows)
    ctx.ignore_index = ignore_index


def _linear_backward(
    ctx: Any, dlogprob_T: Tensor | None, dlse_T: Tensor | None, dentropy_T: Tensor | None, *_: None
) -> tuple[Any, ...]:
    hidden_TH, weight_VH, target_T, bias_V, lse_T, entropy_T, rest_T, kept, temperature_T1 = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    # With z a row's logits and H its entropy: d log p_t / dz_j = [j = t] - p_j; d lse / dz_j = p_j;
    # d H / dz_j = -p_j (log p_j + H), and log p_j = z_j - lse - rest: near p_j = 1 the rounding of a large lse is all
    # there is.
    zero_T = torch.zeros_like(lse_T)
    onehot_T = zero_T if dlogprob_T is None else dlogprob_T
    prob_T = -onehot_T if dlse_T is None else dlse_T - onehot_T
    problog_T = None
    if dentropy_T is not None and len(entropy_T) == len(lse_T):
        prob_T = prob_T - dentropy_T * (entropy_T - rest_T)
        problog_T = -dentropy_T
    valid_T = target_T != ctx.ignore_index
    onehot_T, prob_T = onehot_T.where(valid_T, 0), prob_T.where(valid_T, 0)
    problog_T = None if problog_T is None else problog_T.where(valid_T, 0)
    scale, softcap, temperature, triton, max_rows = ctx.settings
    head = (hidden_TH, weight_VH, target_T, bias_V, lse_T)
    numbers = (scale, softcap, temperature, temperature_T1)
    grads = _linear_logprob_backward(*head, onehot_T, prob_T, problog_T, kept, *numbers, triton, max_rows, needs)
    dhidden, dweight, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 10


_linear_logprob.register_autograd(_linear_backward, setup_context=_save_linear)
