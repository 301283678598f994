"""`qcrd-fast bench loss`: the contrastive loss, forward and backward, in every way that is installed, on the same work.

Each provider is first compared with float64, then timed in turn with the others. The floor is (2 + 6s) U at the rate of
plain products of the same shape, timed in the same rounds: U = T V H, s the share of tokens that are selected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.config import nearest
from qcrd_fast.errors import InputError
from qcrd_fast.ops import cpu_products
from qcrd_fast.ops.rationale_loss import KEPT_BYTES

from . import timing
from .cases import DTYPES, EVERY, HEADS, LOGITS, Batch, Case, Truth, find_truth, make_batch
from .peers import SOURCES, Provider, find_providers, joint, one_line
from .record import VERSIONED, append, check_appendable, describe_machine

RESULTS = Path(__file__).parent / "results" / "loss.csv"
FOUR_HEADS = ("t5-base", "smollm2-135m", "gemma-3-270m", "llama-3-8b")
LIMITS = {"fp32": 1e-3, "bf16": 2e-2}  # ||out - ref|| / ||ref|| of a gradient; beyond it a provider is wrong
CHECKED_ON_CPU = 256  # tokens: float64 is slow there
RATE_ROWS = 4096  # of the products that set the floor, so that theirs is no T x V matrix either
QUOTIENTS = {  # column: what a time is divided by, in the modes of the contrastive loss and of `every`
    "of_eager": ("eager plain", "eager every"),
    "of_composed": ("eager composed", ""),
    "of_torch": ("torch-fused composed", "torch-fused every"),
}
ERRORS = ("loss_error", "dhidden_error", "dweight_error")

log = logging.getLogger("qcrd_fast.bench")


def find_cases(
    device: torch.device,
    *,
    full: bool = False,
    heads: Sequence[str] = (),
    tokens: Sequence[int] = (),
    candidates: Sequence[str] = (),
    logits: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Case]:
    """What was asked for; the rest from the grid (`full`), the headline set of a GPU or one tiny case on a CPU."""
    gpu = device.type == "cuda"
    heads = _known("head", heads, HEADS) or (FOUR_HEADS if gpu or full else ("tiny",))
    logits = _known("kind of logits", logits, LOGITS) or LOGITS
    dtypes = _known("dtype", dtypes, DTYPES) or (tuple(DTYPES) if full else ("bf16",) if gpu else ("fp32",))
    tokens = tokens or ((1024, 4096, 16384) if full else (16384,) if gpu else (1024,))
    pairs = [_pair(text) for text in candidates or (("1+1", "1+2", "5+1", "5+2") if full else ("5+2",))]
    for count, (m, k) in itertools.product(tokens, pairs):
        if count < 8 * (m + k):
            raise InputError(f"--tokens: {count} are too few for {m + k} candidates; take at least {8 * (m + k)}")
    grid = itertools.product(heads, tokens, pairs, logits, dtypes)
    return [Case(head, count, m, k, kind, dtype) for head, count, (m, k), kind, dtype in grid]


def find_names(device: torch.device, providers: Sequence[str]) -> tuple[str, ...]:
    """The providers asked for, or all; on a CPU `compiled` only where asked for, since it compiles for half a
    minute."""
    every = tuple(name for name in SOURCES if device.type == "cuda" or name != "compiled")
    return _known("provider", providers, SOURCES) or every


def run_bench(
    cases: Sequence[Case],
    device: torch.device,
    *,
    providers: Sequence[str] = (),
    repeats: int | None = None,
    append_to: Path | None = None,
) -> dict[str, Any]:
    """{"where", "cases": [{"case", "selected_share", "rate_tflops", "floor_ms", "product_ms", "rows", "absent"}]}.

    With `append_to`, each case's rows are added to that CSV file as soon as they are measured.
    """
    if os.environ.get("QCRD_FAST_IMPL"):
        raise InputError("QCRD_FAST_IMPL overrides which implementation runs; unset it to compare them")
    if append_to:
        check_appendable(append_to, COLUMNS)
    names = find_names(device, providers)
    repeats = repeats or (30 if device.type == "cuda" else 7)
    results: dict[str, Any] = {"where": describe_machine(device), "repeats": repeats, "cases": []}
    for number, case in enumerate(cases, 1):
        log.info("case %d of %d: %s", number, len(cases), case)
        measured = run_case(case, device, names, repeats)
        results["cases"].append(measured)
        if append_to:
            append(append_to, COLUMNS, csv_rows({**results, "cases": [measured]}))
    return results


def run_case(case: Case, device: torch.device, names: tuple[str, ...], repeats: int) -> dict[str, Any]:
    found, absent = find_providers(device, DTYPES[case.dtype], names)
    checked = dataclasses.replace(case, tokens=min(case.tokens, CHECKED_ON_CPU)) if device.type == "cpu" else case
    rows = check_all(found, make_batch(checked, device), LIMITS[case.dtype], device)
    _free(device)
    measured = time_all(found, rows, make_batch(case, device), case.unit, repeats, device)
    _free(device)
    return {"case": dataclasses.asdict(case), "name": str(case), **measured, "rows": rows, "absent": absent}


def check_all(found: list[Provider], batch: Batch, limit: float, device: torch.device) -> list[dict[str, Any]]:
    truths = {every: find_truth(batch, every=every) for every in {provider.mode in EVERY for provider in found}}
    return [check(provider, batch, truths[provider.mode in EVERY], limit, device) for provider in found]


def time_all(
    found: list[Provider], rows: list[dict[str, Any]], batch: Batch, unit: float, repeats: int, device: torch.device
) -> dict[str, float]:
    """Fills the rows of the providers that have not failed; returns what is common to them."""
    alive, calls = [], []
    for provider, row in zip(found, rows, strict=True):
        call = functools.partial(forward_backward, provider, batch)
        with _failure_into(row, device):
            if not row["status"].startswith("failed"):
                if device.type == "cuda":  # the first call at this size is not timed; on a CPU the next is it
                    call()
                batch.hidden_TH.grad = batch.weight_VH.grad = None
                row["peak_mib"] = timing.peak_mib(call, device)
                alive.append((provider, row))
                calls.append(call)
    log.info("timing %s, %d times each", ", ".join(p.full_name for p, _ in alive) or "nothing", repeats)
    share = selected_share(batch)
    T, V = len(batch.target_T), len(batch.weight_VH)
    kept = share * T * V * batch.hidden_TH.element_size() <= KEPT_BYTES
    product, products, flops = the_products(batch)
    products()
    product_ms, products_ms, *times = timing.rounds([product, products, *calls], repeats, device)
    rate = flops / timing.quantile(products_ms, 0.5)  # per millisecond
    floor_ms = (2 + 6 * share) * unit / rate
    scoring_ms = timing.quantile(product_ms, 0.5) * max(1.0, T / RATE_ROWS)
    named = {provider.full_name: ms for (provider, _), ms in zip(alive, times, strict=True)}
    for (provider, row), ms in zip(alive, times, strict=True):
        median = timing.quantile(ms, 0.5)
        units = provider.units(share, kept)
        row |= {"ms": median, "ms_p20": timing.quantile(ms, 0.2), "ms_p80": timing.quantile(ms, 0.8), "units": units}
        row |= {"tflops": units * unit / median / 1e9}
        floors = {"score": scoring_ms, **dict.fromkeys(EVERY, 6 * unit / rate)}
        row |= {"floor_share": floors.get(provider.mode, floor_ms) / median}
        for column, (whole, every) in QUOTIENTS.items():
            if base_ms := named.get(every if provider.mode in EVERY else whole):
                row[column] = timing.quantile([x / y for x, y in zip(ms, base_ms, strict=True)], 0.5)
    return {"selected_share": share, "rate_tflops": rate / 1e9, "floor_ms": floor_ms, "product_ms": scoring_ms}


def forward_backward(provider: Provider, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, selected_R); the gradients are in the leaves, unless it only scores."""
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    loss, selected_R = provider.step(batch)
    if provider.mode != "score":
        loss.backward()
    return loss.detach(), selected_R


def check(provider: Provider, batch: Batch, truth: Truth, limit: float, device: torch.device) -> dict[str, Any]:
    """The row of a provider: ok, wrong or failed, and how far its loss and gradients are from float64."""
    log.info("%s: against float64", provider.full_name)
    row: dict[str, Any] = {"provider": provider.name, "mode": provider.mode, "status": "ok", "note": provider.note}
    with _failure_into(row, device):
        out: list[tuple[Tensor, Tensor]] = []
        row["first_call_s"] = round(
            timing.time_once_ms(lambda: out.append(forward_backward(provider, batch)), device) / 1e3, 3
        )
        loss, selected_R = out[0]
        grads = {
            "dhidden": (batch.hidden_TH.grad, truth.dhidden_TH),
            "dweight": (batch.weight_VH.grad, truth.dweight_VH),
        }
        row["loss_error"] = abs(float(loss) - truth.loss) / abs(truth.loss)
        for name, (got, want) in grads.items() if provider.mode != "score" else ():
            row[f"{name}_error"] = 1.0 if got is None else float((got.double() - want).norm() / want.norm())
        if not torch.equal(selected_R, truth.selected_R):
            row["status"] = "wrong: selects other rationales"
        elif not all(row[name] <= limit for name in ERRORS if name in row):  # a NaN is wrong too
            row["status"] = f"wrong: beyond {limit:g}"
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    return row


@torch.no_grad()
def selected_share(batch: Batch) -> float:
    """s, the share of the tokens that are selected, from the plain-torch twin."""
    selected_R = joint("torch")(batch)[1]
    return float(selected_R[batch.rationale_T].double().mean())


def the_products(batch: Batch) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """(the first, and all three products of a loss with kept logits, of at most 4,096 rows, written to memory; their
    flops). On a CPU by the fastest library that torch carries for them."""
    hidden_CH, weight_VH = batch.hidden_TH.detach()[:RATE_ROWS], batch.weight_VH.detach()
    if hidden_CH.device.type == "cpu":
        logits_CV = cpu_products.product(hidden_CH, weight_VH.T)
        return (
            lambda: cpu_products.product(hidden_CH, weight_VH.T),
            lambda: [
                cpu_products.product(a, b)
                for a, b in ((hidden_CH, weight_VH.T), (logits_CV, weight_VH), (logits_CV.T, hidden_CH))
            ],
            6.0 * logits_CV.numel() * hidden_CH.shape[1],
        )
    logits_CV = torch.empty(len(hidden_CH), len(weight_VH), dtype=hidden_CH.dtype, device=hidden_CH.device)
    dhidden_CH, dweight_VH = torch.empty_like(hidden_CH), torch.empty_like(weight_VH)

    def product() -> None:
        torch.mm(hidden_CH, weight_VH.T, out=logits_CV)

    def products() -> None:
        product()
        torch.mm(logits_CV, weight_VH, out=dhidden_CH)
        torch.mm(logits_CV.T, hidden_CH, out=dweight_VH)

    return product, products, 6.0 * logits_CV.numel() * hidden_CH.shape[1]


# ---- how it is shown ----------------------------------------------------------------------------------


def as_text(results: dict[str, Any]) -> str:
    """One table a case."""
    where = results["where"]
    known = ", ".join(f"{name} {where[name]}" for name in VERSIONED if name in where)
    lines = [f"{where['device']}; {known}; commit {where['commit']}; median of {results['repeats']}"]
    header = (
        "provider",
        "mode",
        "ms",
        "p20-p80",
        "of eager",
        "of composed",
        "of torch",
        "U",
        "TFLOP/s",
        "floor",
        "peak MiB",
        "first s",
        "error",
        "status",
    )
    for case in results["cases"]:
        lines += [
            "",
            case["name"],
            f"s = {case['selected_share']:.3f}; products of this shape {case['rate_tflops']:.3g} TFLOP/s; "
            f"floor, (2 + 6s) U at that rate: {case['floor_ms']:.3g} ms; "
            f"of scoring, the first product: {case['product_ms']:.3g} ms",
        ]
        table = [header, *(_cells(row) for row in case["rows"])]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
        left = (0, 1, len(header) - 1)
        lines += [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        lines += [f"{name}: not run, {reason}" for name, reason in case["absent"].items()]
    notes = {row["provider"]: row["note"] for case in results["cases"] for row in case["rows"] if row["note"]}
    lines += ["", *(f"{name}: {note}" for name, note in notes.items())]
    lines.append(
        "of eager, composed, torch: time over that of eager plain, eager composed, torch-fused composed, round by "
        "round,"
    )
    lines.append("median; of the modes `every`, over eager and torch-fused in mode `every`")
    lines.append("ms: of the device; on a CPU, user time of all threads")
    lines.append("error: the largest of loss, dHidden and dWeight, ||out - ref|| / ||ref|| with ref in float64")
    lines.append("peak MiB: beyond what was held before the step; the two gradients are part of it")
    return "\n".join(lines)


CASE_COLUMNS = tuple(field.name for field in dataclasses.fields(Case))
ROW_COLUMNS = ("provider", "mode", "status", "ms", "ms_p20", "ms_p80", *QUOTIENTS, "units", "tflops", "floor_share",
               "peak_mib", "first_call_s", *ERRORS)  # fmt: skip
SHAPE_COLUMNS = ("selected_share", "rate_tflops", "floor_ms", "product_ms")
WHERE_COLUMNS = ("device", "threads", "torch", "triton", "commit", "time")
COLUMNS = (*CASE_COLUMNS, *ROW_COLUMNS, *SHAPE_COLUMNS, "repeats", *WHERE_COLUMNS)


def csv_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One a provider and case."""
    common = results["where"] | {"repeats": results["repeats"]}
    return [common | case | case["case"] | row for case in results["cases"] for row in case["rows"]]


def plan_text(cases: Sequence[Case], device: torch.device, providers: Sequence[str]) -> str:
    """What a run would time, and what it could not."""
    found, absent = find_providers(device, DTYPES[cases[0].dtype], find_names(device, providers))
    lines = [f"case      {case}" for case in cases] + [f"provider  {provider.full_name}" for provider in found]
    return "\n".join(lines + [f"absent    {name}: {reason}" for name, reason in absent.items()])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def show(name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) is not None else "-"

    errors = [row[name] for name in ERRORS if name in row]
    return (
        row["provider"],
        row["mode"],
        show("ms", ".4g"),
        f"{row['ms_p20']:.4g}-{row['ms_p80']:.4g}" if "ms" in row else "-",
        show("of_eager", ".3f"),
        show("of_composed", ".3f"),
        show("of_torch", ".3f"),
        show("units", ".2f"),
        show("tflops", ".3g"),
        show("floor_share", ".0%"),
        show("peak_mib", ".0f"),
        show("first_call_s", ".2f"),
        format(max(errors), ".1e") if errors else "-",
        row["status"],
    )


def _known(what: str, names: Sequence[str], known: Any) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise InputError(f"no {what} {name!r}; there are {', '.join(known)}{nearest(name, known)}")
    return tuple(dict.fromkeys(names))


def _pair(text: str) -> tuple[int, int]:
    m, plus, k = text.partition("+")
    if not (plus and m.isdecimal() and k.isdecimal() and int(m) and int(k)):
        raise InputError(f"--candidates: expected positives+negatives, each at least 1, as in 5+2; got {text!r}")
    return int(m), int(k)


@contextlib.contextmanager
def _failure_into(row: dict[str, Any], device: torch.device) -> Iterator[None]:
    """A provider that fails says so in its row, and the others still run."""
    try:
        yield
    except Exception as error:
        row["status"] = f"failed: {one_line(error)}"
        log.info("%s %s %s", row["provider"], row["mode"], row["status"])
        _free(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
