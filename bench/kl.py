"""`qcrd-fast bench kl`: time the divergence of a student from a teacher, forward and backward.

eager: logits of both in memory, log-softmax and `F.kl_div` in fp32, as most training code has it.
liger-formula: what Liger-Kernel's fused JSD does, in torch: chunks of rows by its rule, with fp32 logits of both
models; the gradients are made in forward, dWeight is added up chunk by chunk, and the elementwise loss is a [T, V] fp32
buffer. qcrd-torch, qcrd-triton: `linear_kl`; qcrd-torch-kept: with a workspace that holds all logits.

Every token's divergence is trained on, as a mean. Suffixes: T tokens, H and G hidden sizes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_fast import linear_kl
from qcrd_fast.errors import InputError
from qcrd_fast.ops.dispatch import choose_impl

from . import timing
from .cases import DTYPES
from .peers import one_line
from .record import run_cases
from .shapes import table

RESULTS = Path(__file__).parent / "results" / "kl.csv"
HEADS = {"smollm2": (576, 896, 49_152), "t5-base": (768, 1024, 32_128), "rehearsal": (24, 40, 500)}  # H, G, V
COLUMNS = ("head", "tokens", "beta", "dtype", "provider", "status", "ms", "ms_min", "ms_max", "of_eager", "peak_mib",
           "extra_mib", "extra_of_eager", "loss_error", "dhidden_error", "dweight_error", "repeats", "device",
           "threads",
           "torch", "triton", "commit", "time")  # fmt: skip
CHECKED = 64  # tokens of the comparison with float64

log = logging.getLogger("qcrd_fast.bench")


@dataclasses.dataclass(frozen=True)
class Case:
    head: str
    tokens: int
    beta: float
    dtype: str

    def __str__(self) -> str:
        H, G, V = HEADS[self.head]
        return f"{self.head} T={self.tokens} H={H} G={G} V={V} beta={self.beta:g} {self.dtype}"


class Batch(NamedTuple):
    """Operands of one step; `hidden_TH` and `weight_VH` are leaves that require gradients."""

    hidden_TH: Tensor
    weight_VH: Tensor
    teacher_TG: Tensor
    teacher_VG: Tensor
    beta: float


def make_batch(case: Case, device: torch.device, tokens: int) -> Batch:
    """Draw an unrelated student and teacher, each with logits of standard deviation 2, as after training."""
    H, G, V = HEADS[case.head]
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]

    def draw(rows: int, size: int, spread: float) -> Tensor:
        return (spread * torch.randn(rows, size, generator=generator)).to(device, dtype)

    student = draw(tokens, H, 2.0).requires_grad_(), draw(V, H, 1 / math.sqrt(H)).requires_grad_()
    return Batch(*student, draw(tokens, G, 2.0), draw(V, G, 1 / math.sqrt(G)), case.beta)


# ---- who is timed: the mean divergence, which the caller differentiates ----


def eager(batch: Batch) -> Tensor:
    logp_TV = F.linear(batch.hidden_TH, batch.weight_VH).float().log_softmax(-1)
    logq_TV = F.linear(batch.teacher_TG, batch.teacher_VG).float().log_softmax(-1)
    if batch.beta == 0:
        return F.kl_div(logp_TV, logq_TV, reduction="sum", log_target=True) / len(logp_TV)
    if batch.beta == 1:
        return F.kl_div(logq_TV, logp_TV, reduction="sum", log_target=True) / len(logp_TV)
    beta = batch.beta
    logm_TV = torch.logaddexp(logp_TV + math.log(1 - beta), logq_TV + math.log(beta))
    of_teacher = F.kl_div(logm_TV, logq_TV, reduction="sum", log_target=True)
    of_student = F.kl_div(logm_TV, logp_TV, reduction="sum", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student) / len(logp_TV)


class LigerFormula(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, teacher_TG: Tensor, teacher_VG: Tensor, beta: float
    ) -> Tensor:
        (T, H), V = hidden_TH.shape, len(weight_VH)
        rows = 2 ** math.ceil(math.log2(math.ceil(T / math.ceil(V / H))))
        dhidden_TH, dweight_VH = torch.zeros_like(hidden_TH), torch.zeros_like(weight_VH)
        loss_TV = torch.zeros((T, V), dtype=torch.float32, device=hidden_TH.device)
        for start in range(0, T, rows):
            some = slice(start, start + rows)
            logp_CV = (hidden_TH[some] @ weight_VH.T).float().log_softmax(-1)
            logq_CV = (teacher_TG[some] @ teacher_VG.T).float().log_softmax(-1)
            p_CV, q_CV = logp_CV.exp(), logq_CV.exp()
            if beta == 0:
                loss_TV[some] = q_CV * (logq_CV - logp_CV)
                dlogp_CV = -q_CV
            elif beta == 1:
                loss_TV[some] = p_CV * (logp_CV - logq_CV)
                dlogp_CV = loss_TV[some] + p_CV
            else:
                logm_CV = torch.log((1 - beta) * p_CV + beta * q_CV)
                loss_TV[some] = beta * q_CV * (logq_CV - logm_CV) + (1 - beta) * p_CV * (logp_CV - logm_CV)
                dlogp_CV = (1 - beta) * p_CV * (logp_CV - logm_CV)
            dlogp_CV = dlogp_CV / T
            dz_CV = (dlogp_CV - p_CV * dlogp_CV.sum(-1, keepdim=True)).to(hidden_TH.dtype)
            dhidden_TH[some] = dz_CV @ weight_VH
            dweight_VH.add_(dz_CV.T @ hidden_TH[some])
        ctx.save_for_backward(dhidden_TH, dweight_VH)
        return loss_TV.sum() / T

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden_TH, dweight_VH = ctx.saved_tensors
        return dhidden_TH, dweight_VH, None, None, None


def ours(impl: str, kept: bool = False) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        workspace = 8 * len(batch.hidden_TH) * len(batch.weight_VH) if kept else 0
        return linear_kl(*batch[:4], beta=batch.beta, impl=impl, workspace_bytes=workspace).mean()

    return call


PROVIDERS: dict[str, Callable[[Batch], Tensor]] = {
    "eager": eager,
    "liger-formula": lambda batch: LigerFormula.apply(*batch),  # type: ignore[no-untyped-call]
    "qcrd-torch": ours("torch"),
    "qcrd-torch-kept": ours("torch", kept=True),
    "qcrd-triton": ours("triton"),
}


# ---- cases, measurements ----


def find_cases(
    device: torch.device,
    *,
    heads: Sequence[str] = (),
    tokens: Sequence[int] = (),
    beta: Sequence[float] = (),
    dtypes: Sequence[str] = (),
) -> list[Case]:
    """What was asked for; by default SmolLM2's head, 2,048 tokens, forward KL, in bf16 on a GPU and in fp32 on a
    CPU."""
    heads, dtypes = heads or ("smollm2",), dtypes or ("bf16" if device.type == "cuda" else "fp32",)
    for what, names, known in (("head", heads, HEADS), ("dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise InputError(f"no {what} {name!r}; there are {', '.join(known)}")
    if any(not 0 <= b <= 1 for b in beta):
        raise InputError(f"--beta is 0 (forward KL) to 1 (reverse KL), got {', '.join(f'{b:g}' for b in beta)}")
    return [Case(h, t, b, d) for h in heads for t in tokens or (2048,) for b in beta or (0.0,) for d in dtypes]


def find_providers(device: torch.device, providers: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return (providers that run, {one that does not: why})."""
    for name in providers:
        if name not in PROVIDERS:
            raise InputError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")
    absent = {}
    try:
        choose_impl("triton", device, torch.float32)
    except ValueError as error:
        absent["qcrd-triton"] = str(error)
    return [name for name in providers or PROVIDERS if name not in absent], absent


def forward_backward(name: str, batch: Batch) -> tuple[float, Tensor, Tensor]:
    """Run a provider forward and backward; return (loss, dHidden, dWeight)."""
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    loss = PROVIDERS[name](batch)
    loss.backward()
    dhidden_TH, dweight_VH = batch.hidden_TH.grad, batch.weight_VH.grad
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    assert dhidden_TH is not None and dweight_VH is not None
    return float(loss.detach()), dhidden_TH, dweight_VH


def check(name: str, batch: Batch, truth: tuple[float, Tensor, Tensor], limit: float) -> dict[str, Any]:
    """Compare a provider with float64; return its row: ok, wrong or failed, and its error."""
    row: dict[str, Any] = {"provider": name, "status": "ok"}
    try:
        loss, *grads = forward_backward(name, batch)
    except Exception as failure:  # the others still run
        return row | {"status": f"failed: {one_line(failure)}"}
    row["loss_error"] = abs(loss - truth[0]) / truth[0]
    for what, got, want in zip(("dhidden_error", "dweight_error"), grads, truth[1:], strict=True):
        row[what] = float((got.double() - want).norm() / want.norm())
    if not max(row["loss_error"], row["dhidden_error"], row["dweight_error"]) <= limit:
        row["status"] = f"wrong: beyond {limit:g}"
    return row


def run_case(case: Case, device: torch.device, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    few = make_batch(case, device, min(CHECKED, case.tokens))
    doubled = [x.detach().double().requires_grad_(x.requires_grad) for x in few[:4]]
    truth = find_truth(Batch(doubled[0], doubled[1], doubled[2], doubled[3], case.beta))
    rows = [check(name, few, truth, 2e-2 if case.dtype == "bf16" else 1e-3) for name in names]
    del few, doubled, truth
    batch = make_batch(case, device, case.tokens)
    gradients = (batch.hidden_TH.nbytes + batch.weight_VH.nbytes) / 2**20
    alive = [row for row in rows if row["status"] == "ok"]
    calls: list[Callable[[], Any]] = [functools.partial(forward_backward, row["provider"], batch) for row in alive]
    for row, call in zip(alive, calls, strict=True):
        log.info("%s: memory", row["provider"])
        row["peak_mib"] = timing.peak_mib(call, device)
        row["extra_mib"] = row["peak_mib"] - gradients
    log.info("timing %s, %d times each", ", ".join(row["provider"] for row in alive), repeats)
    times = timing.rounds(calls, repeats, device)
    named = {row["provider"]: (row, ms) for row, ms in zip(alive, times, strict=True)}
    for row, ms in named.values():
        row |= {"ms": timing.quantile(ms, 0.5), "ms_min": min(ms), "ms_max": max(ms)}
        if "eager" in named:
            base, base_ms = named["eager"]
            row["of_eager"] = timing.quantile([x / y for x, y in zip(ms, base_ms, strict=True)], 0.5)
            row["extra_of_eager"] = row["extra_mib"] / base["extra_mib"]
    return [dataclasses.asdict(case) | row for row in rows]


def find_truth(batch: Batch) -> tuple[float, Tensor, Tensor]:
    """Compute the truth in float64 from probabilities, without the library."""
    p_TV = torch.softmax(batch.hidden_TH @ batch.weight_VH.T, -1)
    q_TV = torch.softmax(batch.teacher_TG @ batch.teacher_VG.T, -1)
    beta = batch.beta
    m_TV = (1 - beta) * p_TV + beta * q_TV
    if beta == 0:
        loss_TV = q_TV * (q_TV / p_TV).log()
    elif beta == 1:
        loss_TV = p_TV * (p_TV / q_TV).log()
    else:
        loss_TV = beta * q_TV * (q_TV / m_TV).log() + (1 - beta) * p_TV * (p_TV / m_TV).log()
    loss = loss_TV.sum() / len(p_TV)
    dhidden_TH, dweight_VH = torch.autograd.grad(loss, (batch.hidden_TH, batch.weight_VH))
    return float(loss.detach()), dhidden_TH, dweight_VH


def run_bench(
    cases: Sequence[Case],
    device: torch.device,
    *,
    providers: Sequence[str] = (),
    repeats: int | None = None,
    append_to: Path | None = None,
) -> dict[str, Any]:
    """Return {"where", "repeats", "absent", "rows"}; with `append_to`, add each case's rows to that CSV file."""
    names, absent = find_providers(device, providers)
    repeats = repeats or (30 if device.type == "cuda" else 3)

    def run(case: Case) -> list[dict[str, Any]]:
        return run_case(case, device, names, repeats)

    return run_cases(cases, run, device, COLUMNS, append_to, repeats=repeats) | {"absent": absent}


def as_text(results: dict[str, Any]) -> str:
    shown = ("head", "tokens", "beta", "dtype", "provider", "status", "ms", "ms_min", "ms_max", "of_eager", "extra_mib",
             "extra_of_eager", "loss_error", "dhidden_error", "dweight_error")  # fmt: skip
    lines = table(results["rows"], shown)
    lines += [f"{name}: not run, {reason}" for name, reason in results["absent"].items()]
    lines += [f"{results['where']['device']}; torch {results['where']['torch']}; median of {results['repeats']}"]
    lines.append(
        "ms: of the device; on a CPU, user time of all threads. of_eager: time over that of eager, round by round, "
        "median"
    )
    lines.append(
        "extra_mib: the most held at once beyond operands and their two gradients; extra_of_eager: over eager's"
    )
    return "\n".join(lines)


def plan_text(cases: Sequence[Case], device: torch.device, providers: Sequence[str]) -> str:
    """Describe what a run would time, and what it could not."""
    names, absent = find_providers(device, providers)
    lines = [f"case      {case}" for case in cases] + [f"provider  {name}" for name in names]
    return "\n".join(lines + [f"absent    {name}: {reason}" for name, reason in absent.items()])
