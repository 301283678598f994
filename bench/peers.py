"""Who is timed. All do the same work: the loss of the same candidates, and its gradients for hidden states and head.

score: log p of every token and the selection, without gradients.
plain: log p of every token, then the contrastive loss over it, differentiated through both.
composed: score every token without gradients, select, then train on the selected tokens alone with the weights now
known.
joint: one differentiable pass that skips the losers in its backward.
every, on a CPU: the mean -log p of all tokens, each with a gradient, as fine-tuning has it; every-kept: ours with a
workspace.

The contrastive part, selection and all, is qcrd-fast's for everyone: it is small, and none of the others has one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_fast import QCRDLoss, contrastive_loss, linear_logprob
from qcrd_fast.losses import ContrastiveOutput, weighted_rationale_loss
from qcrd_fast.models.cpu_linear import _Linear
from qcrd_fast.ops.cpu_products import onednn_is_faster
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.rationale_loss import linear_rationale_loss

from .cases import BETA, DELTA, EVERY, Batch

KEPT_SHARE = 0.75  # of the logits, in fp32, that `every-kept` keeps: the peak is then at most 0.4 of eager's
PerToken = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # hidden, weight, target, scale -> -log p of each token


class Provider(NamedTuple):
    """One implementation of the loss."""

    name: str
    mode: str  # score | plain | composed | joint
    step: Callable[[Batch], tuple[Tensor, Tensor]]  # -> (loss, selected_R); the caller differentiates the loss
    units_all: float  # cost in U for every token
    units_selected: int  # and for the selected ones
    note: str = ""
    kept_units: int | None = None  # instead, where the selected tokens' logits fit a workspace of KEPT_BYTES

    def units(self, selected_share: float, kept: bool) -> float:
        selected = self.kept_units if kept and self.kept_units else self.units_selected
        return self.units_all + selected * selected_share

    @property
    def full_name(self) -> str:
        return f"{self.name} {self.mode}"


class Source(NamedTuple):
    """The origin of a provider's per-token loss; `load` raises if it cannot run here."""

    load: Callable[[torch.device, torch.dtype], PerToken]
    # of U, for each token that has a gradient: 4 if the logits are kept, 6 if they are computed again
    backward_units: int
    note: str = ""


# ---- per-token losses
# ---------------------------------------------------------------------------------------------------


def eager_nll(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float) -> Tensor:
    """The usual eager code: logits in the operands' dtype, then a float32 log-softmax of all of them."""
    logits_TV = F.linear(hidden_TH * scale if scale != 1 else hidden_TH, weight_VH)
    return F.cross_entropy(logits_TV.float(), target_T, reduction="none")


def load_eager(*_: Any) -> PerToken:
    return eager_nll


def load_eager_onednn(device: torch.device, dtype: torch.dtype) -> PerToken:
    """Eager with its products by oneDNN, as ours are; where torch's own are slow, as on AMD's processors."""
    if device.type != "cpu" or dtype != torch.float32 or not onednn_is_faster():
        raise ImportError("torch's own products are as fast here")

    def nll(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float) -> Tensor:
        logits_TV = _Linear.apply(hidden_TH * scale if scale != 1 else hidden_TH, weight_VH, None)  # type: ignore
        return F.cross_entropy(logits_TV, target_T, reduction="none")

    return nll


def load_compiled(*_: Any) -> PerToken:
    torch._dynamo.reset()  # each case has shapes of its own, and past a limit compiled code is silently left for eager
    return torch.compile(eager_nll, dynamic=False)


def scaled(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> PerToken:
    """Scale the hidden states beforehand for a peer without a scale, as T5's own code does."""
    return lambda hidden, weight, target, scale: call(hidden * scale if scale != 1 else hidden, weight, target)


def load_torch_fused(*_: Any) -> PerToken:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return scaled(lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="none", options=options))


def load_liger(device: torch.device, _: torch.dtype) -> PerToken:
    module = _peer("liger-kernel", "liger_kernel.transformers.functional", device)
    # Without accum_dtype it adds up dWeight in bf16.
    return scaled(
        lambda h, w, t: module.liger_fused_linear_cross_entropy(h, w, t, reduction="none", accum_dtype=torch.float32)
    )


def load_liger_scaled(device: torch.device, _: torch.dtype) -> PerToken:
    module = _peer("liger-kernel", "liger_kernel.ops.fused_linear_scaled_cross_entropy", device)
    return scaled(lambda h, w, t: module.LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t))


def load_cce(device: torch.device, _: torch.dtype) -> PerToken:
    return _cce(device, "auto")


def load_cce_exact(device: torch.device, _: torch.dtype) -> PerToken:
    return _cce(device, None)


def _cce(device: torch.device, filter_eps: str | None) -> PerToken:
    module = _peer("cut-cross-entropy", "cut_cross_entropy", device)
    return scaled(lambda h, w, t: module.linear_cross_entropy(h, w, t, reduction="none", filter_eps=filter_eps))


def load_quack(device: torch.device, _: torch.dtype) -> PerToken:
    module = _peer("quack-kernels", "quack.linear_cross_entropy", device)
    return scaled(lambda h, w, t: module.linear_cross_entropy_func(h, w, None, t, reduction="none"))


def _peer(distribution: str, module: str, device: torch.device) -> Any:
    """Import the module, or raise an ImportError that names in one line what is missing."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed") from None
    if device.type != "cuda":
        raise ImportError(f"{distribution} needs a GPU")
    return importlib.import_module(module)


def load_ours(impl: str) -> Callable[[torch.device, torch.dtype], PerToken]:
    def load(device: torch.device, dtype: torch.dtype) -> PerToken:
        choose_impl(impl, device, dtype)  # a ValueError that says why it cannot run
        return lambda h, w, t, scale: -linear_logprob(h, w, t, scale=scale, impl=impl)

    return load


def keeping(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float) -> Tensor:
    workspace_bytes = int(KEPT_SHARE * 4 * len(hidden_TH) * len(weight_VH))
    return -linear_logprob(hidden_TH, weight_VH, target_T, scale=scale, impl="torch", workspace_bytes=workspace_bytes)


SOURCES = {
    "eager": Source(load_eager, 4),
    "eager-onednn": Source(load_eager_onednn, 4, "eager with its products by oneDNN"),
    "compiled": Source(load_compiled, 4, "torch.compile of eager"),
    "torch-fused": Source(load_torch_fused, 6, "torch.nn.functional.linear_cross_entropy, reduction none"),
    "liger": Source(load_liger, 6, "fused linear cross-entropy, reduction none, fp32 accumulation"),
    "liger-scaled": Source(load_liger_scaled, 6, "fused linear scaled cross-entropy"),
    "cce": Source(load_cce, 6, "gradient filter on: costs at most this"),
    "cce-exact": Source(load_cce_exact, 6, "gradient filter off"),
    "quack": Source(load_quack, 4, "keeps the logits: its chunked op has no per-token loss"),
    "qcrd-torch": Source(load_ours("torch"), 6),
    "qcrd-triton": Source(load_ours("triton"), 6),
}


# ---- from per-token losses to a step
# ------------------------------------------------------------------------------------


def plain(per_token: PerToken) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        nll_T = per_token(batch.hidden_TH, batch.weight_VH, batch.target_T, batch.scale)
        out = contrastive_loss(-nll_T, *batch.segments, beta=BETA, delta=DELTA)
        return out.loss, out.selected_R

    return step


def scored(per_token: PerToken, batch: Batch) -> ContrastiveOutput:
    with torch.no_grad():
        nll_T = per_token(batch.hidden_TH.detach(), batch.weight_VH.detach(), batch.target_T, batch.scale)
        return contrastive_loss(-nll_T, *batch.segments, beta=BETA, delta=DELTA)


def score(per_token: PerToken) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        out = scored(per_token, batch)
        return out.loss, out.selected_R

    return step


def composed(per_token: PerToken) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        out = scored(per_token, batch)
        rows_S = out.selected_R[batch.rationale_T].nonzero()[:, 0]
        nll_S = per_token(batch.hidden_TH[rows_S], batch.weight_VH, batch.target_T[rows_S], batch.scale)
        loss, *_ = weighted_rationale_loss(
            -nll_S, batch.rationale_T[rows_S], batch.positive_R, out.weight_R, beta=BETA, delta=DELTA
        )
        return loss, out.selected_R

    return step


def composed_of_ours(per_token: PerToken, impl: str) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Score, select and train; the training pass makes its gradients in forward where that pays."""

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        out = scored(per_token, batch)
        rows_S = out.selected_R[batch.rationale_T].nonzero()[:, 0]
        loss, _ = linear_rationale_loss(
            batch.hidden_TH[rows_S], batch.weight_VH, batch.target_T[rows_S], batch.rationale_T[rows_S],
            batch.positive_R, out.weight_R, beta=BETA, delta=DELTA, scale=batch.scale, impl=impl,
        )  # fmt: skip
        return loss, out.selected_R

    return step


def joint(impl: str) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        loss_fn = QCRDLoss(BETA, DELTA, scale=batch.scale, impl=impl)
        out = loss_fn(batch.hidden_TH, batch.weight_VH, batch.target_T, *batch.segments)
        return out.loss, out.selected_R

    return step


def every(per_token: PerToken) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        nll_T = per_token(batch.hidden_TH, batch.weight_VH, batch.target_T, batch.scale)
        return nll_T.mean(), torch.ones_like(batch.positive_R)

    return step


def find_providers(
    device: torch.device, dtype: torch.dtype, names: tuple[str, ...]
) -> tuple[list[Provider], dict[str, str]]:
    """Return (providers that can run, {name: why it cannot})."""
    found: list[Provider] = []
    absent: dict[str, str] = {}
    for name in names:
        source = SOURCES[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                per_token = source.load(device, dtype)
        except Exception as error:  # a peer may fail in any way of its own
            absent[name] = one_line(error)
            continue
        again = source.backward_units
        found.append(Provider(name, "score", score(per_token), 2, 0, source.note))
        if device.type == "cpu":
            found.append(Provider(name, EVERY[0], every(per_token), 2 + again, 0, source.note))
        if device.type == "cpu" and name == "qcrd-torch":
            found.append(Provider(name, EVERY[1], every(keeping), 8 - 2 * KEPT_SHARE, 0, source.note))
        if name.startswith("qcrd-"):
            impl = name.removeprefix("qcrd-")
            found.append(Provider(name, "joint", joint(impl), 2, again, source.note))
            found.append(
                Provider(name, "composed", composed_of_ours(per_token, impl), 2, 2 + again, source.note, kept_units=6)
            )
        else:
            found.append(Provider(name, "plain", plain(per_token), 2 + again, 0, source.note))
            found.append(Provider(name, "composed", composed(per_token), 2, 2 + again, source.note))
    return found, absent


def one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
