"""Audit: recompute a few rows of a step in float64 torch and compare them with the active implementation.

Every `--audit-every` steps, in one micro-batch and for each of its passes: log p of 64 tokens, and the loss's gradient
by their hidden states, from the same hidden states, head and targets. Which rows is a function of (seed, step, rank),
so a resume audits the same ones. Nothing here touches what is trained. Suffixes: T tokens, S audited rows, H hidden, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.distributed.comm import SINGLE, Comm
from qcrd_fast.errors import RunError
from qcrd_fast.models.lm_head import Head
from qcrd_fast.ops.checks import product_type
from qcrd_fast.ops.chunked import chunk_logits
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.philox import key_words, philox
from qcrd_fast.ops.reference import HeadOptions

log = logging.getLogger(__name__)
Result = TypeVar("Result")

EVERY = 200  # steps, where the kernels run
ROWS = 64
GROUP = 16  # rows whose logits [GROUP, V] are held at once
HEAD_BYTES = 16 * 2**20  # of the head that are held in float64
# A product of H terms that is accumulated in fp32 errs by about sqrt(H) roundings of 2^-24, relative to the sum of the
# terms' sizes: 4e-6 at H = 4096. It is the same for operands of 16 bits, whose products are exact in fp32.
LOGPROB_BUDGET = 1e-5  # of the size of the terms in a row's largest or target logit, plus softcap, plus 1 [nats]
# d loss / d logit is rounded to the operands' type before its product with the head. These are the kernels' tests'
# budgets.
GRADIENT_BUDGET = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclasses.dataclass
class Audit:
    """Results for one micro-batch. Call `watch` with each pass's log p before its backward pass."""

    seed: int
    step: int
    rank: int = 0
    passes: int = 0
    logprob: list[Tensor] = dataclasses.field(default_factory=list)  # per pass: largest error [nats], and of its budget
    gradient: list[Tensor] = dataclasses.field(default_factory=list)  # per pass: relative error, and of its budget

    @torch.no_grad()
    def watch(
        self,
        hidden_TH: Tensor,
        head: Head,
        target_T: Tensor,
        logprob_T: Tensor,
        loss: Tensor | None = None,
        dlogprob_T: Tensor | None = None,
    ) -> None:
        """Record a pass.

        `logprob_T`: the output of the active implementation. `dlogprob_T`: d loss / d log p, if gradients come from a
        fused `loss` instead of from log p.
        """
        rows_S, dtype = self._rows(len(target_T)).to(hidden_TH.device), product_type(hidden_TH)
        if not len(rows_S):
            return
        try:
            with torch.autocast(hidden_TH.device.type, enabled=False):
                groups = [
                    recompute(hidden_TH[some].detach().to(dtype), head, target_T[some]) for some in rows_S.split(GROUP)
                ]
        except torch.OutOfMemoryError:
            log.warning("step %d: not all of it was audited, for want of memory on %s", self.step + 1, hidden_TH.device)
            return
        want_S, slope_SH, size_S, reach_S = (torch.cat(parts) for parts in zip(*groups, strict=True))
        error_S = difference(logprob_T.detach()[rows_S].double(), want_S)
        self.logprob.append(torch.stack([error_S.amax(), ratio(error_S, LOGPROB_BUDGET * size_S).amax()]))
        source = logprob_T if loss is None else loss
        if not (hidden_TH.requires_grad and source.requires_grad):
            return
        upstream: list[Tensor] = []

        def compare(dhidden_TH: Tensor) -> None:
            g_S = upstream[0][rows_S] if dlogprob_T is None else upstream[0] * dlogprob_T[rows_S]
            got_SH, want_SH = dhidden_TH[rows_S].double(), g_S.double()[:, None] * slope_SH
            error = ratio(difference(got_SH, want_SH).norm(), (g_S.double() * reach_S).norm())
            self.gradient.append(torch.stack([error, error / GRADIENT_BUDGET[dtype]]))

        source.register_hook(lambda gradient: upstream.append(gradient.detach()))
        hidden_TH.register_hook(lambda gradient: compare(gradient.detach()))

    def _rows(self, count: int) -> Tensor:
        """Choose the rows to audit of `count` tokens, int64 [S]: all if there are few, else by hash."""
        self.passes += 1
        return (
            torch.arange(count)
            if count <= ROWS
            else words(self.seed, (self.step, self.rank, self.passes), ROWS) % count
        )

    def read(self) -> dict[str, float]:
        """Return `audit_max_err` [nats], `audit_grad_err` (relative) and `audit_budget_used` (above 1: failed).

        Only what was audited is included. Non-finite values count as infinite.
        """
        found = {}
        for name, pairs in (("audit_max_err", self.logprob), ("audit_grad_err", self.gradient)):
            if pairs:
                error, used = torch.stack(pairs).nan_to_num(nan=math.inf, posinf=math.inf).amax(0).tolist()
                found[name] = error
                found["audit_budget_used"] = max(found.get("audit_budget_used", 0.0), used)
        return found


class Audits:
    """Decides when to audit and what to do on failure (`--audit-every`, `--on-audit-failure`)."""

    def __init__(self, config: TrainConfig, device: torch.device, comm: Comm = SINGLE):
        self.seed, self.on_failure, self.comm = config.seed, config.on_audit_failure, comm
        self.impl = choose_impl(config.impl, device, torch.float32)[0]  # the active one
        self.every = config.audit_every if config.audit_every is not None else EVERY if self.impl == "triton" else 0
        self.failed: str | None = None  # the implementation that this run does not go back to

    def run(
        self,
        step: int,
        micro_batches: int,
        compute: Callable[[int, Audit | None], Result],
        fall_back: Callable[[], None],
    ) -> tuple[Result, dict[str, Any]]:
        """Run a step (counted from 0), audited if due; return `compute`'s result and fields for the log.

        `compute` takes the micro-batch to audit and the audit, or None. If the audit fails, `fall_back` is called and
        the step is computed again.

        Raises `RunError` where an audit fails and the run is to stop, or nothing is left to fall back on.
        """
        if not self.every or step % self.every:
            return compute(0, None), {}
        audit = Audit(self.seed, step, self.comm.rank)
        result = compute(int(words(self.seed, (step, 0, 0), 1)) % micro_batches, audit)
        everyone = self.comm.gather(audit.read())
        found = {
            name: max(each.get(name, 0.0) for each in everyone) for name in sorted({n for e in everyone for n in e})
        }
        fields: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in found.items()}
        if found.get("audit_budget_used", 0.0) <= 1:
            return result, fields
        self._give_up(step, found)
        fall_back()
        result, _ = self.run(step, micro_batches, compute, fall_back)
        return result, {**fields, "audit_fallback": self.impl}

    def _give_up(self, step: int, found: dict[str, float]) -> None:
        """Leave the active implementation for torch, or raise."""
        errors = [f"log p is off by {found['audit_max_err']:.3g} nats"]
        if "audit_grad_err" in found:
            errors.append(f"its gradient by a share of {found['audit_grad_err']:.3g}")
        used = found["audit_budget_used"]
        said = f"step {step + 1}: --impl {self.impl} failed its audit: {', '.join(errors)}, {used:.3g} times the budget"
        forced = os.environ.get("QCRD_FAST_IMPL")
        if self.impl == "torch":
            raise RunError(
                f"{said}; that is plain torch: this machine computes wrongly. Existing checkpoints are intact"
            )
        if self.on_failure == "stop":
            raise RunError(
                f"{said}. Existing checkpoints are intact: continue with --resume auto and QCRD_FAST_IMPL=torch"
            )
        if forced:
            raise RunError(
                f"{said}, and QCRD_FAST_IMPL={forced} keeps it from falling back; continue with QCRD_FAST_IMPL=torch"
            )
        log.warning("%s. This step is computed again with --impl torch, and so are all that follow", said)
        self.failed, self.impl = self.impl, "torch"

    def restore(self, failed: str | None) -> bool:
        """Restore the failed implementation from a checkpoint; return whether the run must fall back."""
        self.failed = failed
        if failed is None or failed != self.impl:
            return False
        if forced := os.environ.get("QCRD_FAST_IMPL"):
            log.warning(
                "--impl %s failed an audit earlier in this run; QCRD_FAST_IMPL=%s runs it all the same", failed, forced
            )
            return False
        log.warning("--impl %s failed an audit earlier in this run: it continues with --impl torch", failed)
        self.impl = "torch"
        return True


def recompute(hidden_SH: Tensor, head: Head, target_S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Recompute log p [S] and d log p / d hidden [S, H] in float64; also return two error scales [S].

    They are the size of the terms in the row's largest or target logit plus the softcap plus 1, and the size of the
    target's term in the gradient (or of the whole gradient if that is larger).

    Hidden states come in the type that they are multiplied in, to which the head is rounded as the ops round it. A
    negative target is ignored: 0.
    """
    valid_S, target_S = target_S >= 0, target_S.clamp(min=0)
    options = HeadOptions(head.scale, head.softcap or 0.0, 1.0)
    weight_VH, bias_V = head.weight.detach(), None if head.bias is None else head.bias.detach()
    (V, H), row_SH = weight_VH.shape, hidden_SH.double()
    width = max(1, HEAD_BYTES // (8 * H))

    def rows_of_head(which: Any) -> Tensor:
        return weight_VH[which].to(hidden_SH.dtype).double()

    chunks = [slice(start, start + width) for start in range(0, V, width)]
    z_SV = torch.cat(
        [chunk_logits(row_SH, rows_of_head(c), None if bias_V is None else bias_V[c], options)[0] for c in chunks], 1
    )
    logprob_S = z_SV.gather(1, target_S[:, None])[:, 0] - z_SV.logsumexp(1)
    pair_S2 = torch.stack([target_S, z_SV.argmax(1)], 1)
    weights_S2H = rows_of_head(pair_S2)
    terms_S2 = abs(head.scale) * (row_SH.abs()[:, None] * weights_S2H.abs()).sum(2)
    if bias_V is not None:
        terms_S2 = terms_S2 + bias_V[pair_S2].abs()
    size_S = 1 + options.softcap + terms_S2.amax(1)
    da_SV = z_SV.softmax(1).neg_().scatter_add_(1, target_S[:, None], torch.ones_like(logprob_S)[:, None])
    if head.softcap:
        da_SV *= 1 - (z_SV / head.softcap).square()
    da_SV *= head.scale
    slope_SH = torch.zeros_like(row_SH)
    for c in chunks:
        slope_SH += da_SV[:, c] @ rows_of_head(c)
    reach_S = torch.fmax(abs(head.scale) * weights_S2H[:, 0].norm(dim=1), slope_SH.norm(dim=1))  # not its NaN
    return logprob_S.where(valid_S, 0), slope_SH.where(valid_S[:, None], 0), size_S, reach_S


def difference(got: Tensor, want: Tensor) -> Tensor:
    """Return |got - want|: infinite if only one is finite, 0 if neither is (the input was not finite)."""
    error = (got - want).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(want.isfinite(), error, torch.where(got.isfinite(), math.inf, 0.0))


def ratio(error: Tensor, size: Tensor) -> Tensor:
    """error / size; no error is none of nothing too."""
    return torch.where(error == 0, 0.0, error / size)


def words(seed: int, counter: tuple[int, int, int], count: int) -> Tensor:
    """`count` 32-bit words, int64 [count] on the CPU, that are a function of the arguments alone."""
    key_0, key_1 = (torch.tensor([word]) for word in key_words(seed, "audit"))
    quads = torch.arange(-(-count // 4))
    first, second, third = (torch.full_like(quads, value) for value in counter)
    return torch.stack(philox((key_0, key_1), (quads, first, second, third)), 1).flatten()[:count]
