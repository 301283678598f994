"""Check every kernel of csrc_triton against float64: the first part of `bench.gpu`.

The tests run these checks too.

    python -m qcrd_fast.bench.kernel_checks [--dtypes bf16,fp32] [--small] [--json FILE]

Exits with 1 if one is wrong. On a CPU the kernels need TRITON_INTERPRET=1, and `--small`.

T tokens, H hidden, V vocabulary, R rationales, B rows that are sampled.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcrd_fast import contrastive_loss, linear_kl, linear_logprob
from qcrd_fast.config import NEGATIVE_SELECT, POSITIVE_SELECT
from qcrd_fast.ops.linear_sample import linear_sample
from qcrd_fast.ops.rationale_loss import linear_rationale_loss
from qcrd_fast.utils.files import write_json

from .peers import one_line
from .record import describe_machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Errors = dict[str, float]  # of "out", "grad" (||got - want|| / ||want||) or "tokens" (the share that differs)


class Sizes(NamedTuple):
    """Sizes that no tile divides."""

    T: int
    H: int
    V: int


SMALL, LARGE = Sizes(150, 72, 300), Sizes(700, 584, 5003)


class Check(NamedTuple):
    """A check; `run(dtype, device)` computes by kernels and in float64 from the same rounded operands."""

    name: str
    kernels: tuple[str, ...]
    run: Callable[[torch.dtype, torch.device], Errors]
    dtypes: tuple[str, ...] = tuple(DTYPES)  # those in which it is another computation


def limits(dtype: torch.dtype) -> Errors:
    """Return the allowed error of each result.

    Gradients are rounded to the operands' dtype on their way, and noisy logits may nearly tie.
    """
    grad = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    return {"out": 1e-5, "grad": grad, "tokens": 0.02}


def find_checks(sizes: Sizes) -> list[Check]:
    """Return all checks, the most important first."""
    every = dict(bias=True, scale=0.3, softcap=1.5, temperature=1.4)
    T, H, V = sizes
    logprob, kept = (
        ("forward_kernel", "combine_kernel", "dlogits_kernel"),
        ("forward_kernel", "combine_kernel", "dlogits_from_saved"),
    )
    drawn = ("product_kernel", "select_kernel", "gather_kernel", "pick_kernel")
    whole, few = Sizes(T, 128, 256), Sizes(40, H, V)
    part = Sizes(T // 2, H, V // 2)
    half, fewer = Sizes(T // 2, H, V), Sizes(T // 25, H, V)
    return [
        Check("log p", logprob, _bound(check_logprob, sizes)),
        Check("log p, every option", logprob, _bound(check_logprob, sizes, **every)),
        Check("log p, softcap", logprob, _bound(check_logprob, sizes, softcap=2.0)),
        Check("log p, log-sum-exp and entropy", logprob, _bound(check_logprob, sizes, extras=True, scale=-0.4)),
        Check("log p, sizes that tiles divide", logprob, _bound(check_logprob, whole)),
        Check("log p, a tile of ignored rows", logprob, _bound(check_logprob, sizes, ignored=128)),
        Check("log p of few rows", logprob, _bound(check_logprob, few)),
        Check("loss of known weights", kept, _bound(check_rationale_loss, sizes)),
        Check("loss of known weights, bias", kept, _bound(check_rationale_loss, sizes, bias=True, temperature=0.7)),
        Check("KL", ("kl_kernel", "kl_combine_kernel", "kl_da_kernel"), _bound(check_kl, part)),
        Check("KL, reverse", ("kl_kernel", "kl_da_kernel"), _bound(check_kl, few, beta=1.0, scale=-0.4, softcap=2.0)),
        Check("KL, mixture", ("mixture_kernel", "kl_da_kernel"), _bound(check_kl, part, beta=0.3, **every)),
        Check(
            "selections",
            ("mean_kernel", "question_kernel", "backward_kernel"),
            _bound(check_selections, sizes),
            ("fp32",),
        ),
        Check("tokens", drawn[:1], _bound(check_sample, half, temperature=1.5)),
        Check("tokens, top-k 50", drawn, _bound(check_sample, fewer, bias=True, temperature=1.5, top_k=50)),
        Check("tokens, greedy", drawn[:1], _bound(check_sample, half, temperature=0.0)),
    ]


def _bound(check: Callable[..., Errors], sizes: Sizes, **options: Any) -> Callable[[torch.dtype, torch.device], Errors]:
    return lambda dtype, device: check(dtype, device, *sizes, **options)


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, or the plain norm if that is 0. NaN propagates."""
    want = want.detach().double()
    return float((got.detach().double() - want).norm()) / (float(want.norm()) or 1.0)


def make_operands(
    T: int, H: int, V: int, dtype: torch.dtype, device: torch.device, bias: bool, ignored: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Return ([hidden [T, H], weight [V, H], optional bias [V]], target [T]).

    One row in seven and the first few are ignored.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(T, H, generator=generator),
        0.3 * torch.randn(V, H, generator=generator) * min(1, (72 / H) ** 0.5),
    ]
    leaves += [torch.randn(V, generator=generator)] * bias
    target_T = torch.randint(0, V, (T,), generator=generator)
    target_T[3::7] = target_T[:ignored] = -100
    return [x.to(device, dtype).requires_grad_() for x in leaves], target_T.to(device)


def doubled(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def check_logprob(
    dtype: torch.dtype,
    device: torch.device,
    T: int,
    H: int,
    V: int,
    bias: bool = False,
    extras: bool = False,
    ignored: int = 0,
    **options: Any,
) -> Errors:
    """Check log p and the gradients of a weighted sum that leaves out a third of the rows.

    With `extras`: log-sum-exp and entropy too.
    """
    leaves, target_T = make_operands(T, H, V, dtype, device, bias, ignored)
    weight_T = torch.randn(T, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    weight_T[1::3] = 0
    results = []
    for mine, impl in ((leaves, "triton"), (doubled(leaves), "eager")):
        (hidden_TH, weight_VH), rest = mine[:2], mine[2:]
        extra = dict(return_lse=extras, return_entropy=extras)
        out = linear_logprob(
            hidden_TH, weight_VH, target_T, bias=rest[0] if bias else None, impl=impl, **extra, **options
        )
        out = out if extras else (out,)
        total = sum((x.double() * weight_T).sum() / (i + 1) for i, x in enumerate(out))
        results.append((out, torch.autograd.grad(total, mine)))
    return _compare(*results)


def check_kl(
    dtype: torch.dtype,
    device: torch.device,
    T: int,
    H: int,
    V: int,
    beta: float = 0.0,
    bias: bool = False,
    **options: Any,
) -> Errors:
    """Check the divergence from a teacher of another hidden size, and its gradients.

    The sum leaves out a third of the rows.
    """
    leaves, target_T = make_operands(T, H, V, dtype, device, bias)
    (teacher_TG, teacher_VG, *teacher_bias), _ = make_operands(T, 3 * H // 2 + 4, V, dtype, device, bias)
    weight_T = torch.randn(T, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    weight_T[1::3] = 0
    results = []
    for mine, theirs, impl in (
        (leaves, [teacher_TG, teacher_VG, *teacher_bias], "triton"),
        (doubled(leaves), doubled([teacher_TG, teacher_VG, *teacher_bias]), "eager"),
    ):
        biases: dict[str, Any] = dict(bias=mine[2], teacher_bias=theirs[2]) if bias else {}
        out = linear_kl(mine[0], mine[1], theirs[0], theirs[1], target_T, beta=beta, impl=impl, **biases, **options)
        results.append(((out,), torch.autograd.grad((out.double() * weight_T).sum(), mine)))
    return _compare(*results)


def check_rationale_loss(
    dtype: torch.dtype, device: torch.device, T: int, H: int, V: int, bias: bool = False, **options: Any
) -> Errors:
    """Check the loss of rationales with known weights, and the gradients computed in its forward pass."""
    leaves, target_T = make_operands(T, H, V, dtype, device, bias)
    rationale_T = torch.arange(T, device=device) // 13
    R = int(rationale_T[-1]) + 1
    positive_R = torch.arange(R, device=device) % 2 == 0
    weight_R = torch.rand(R, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    results = []
    for mine, impl in ((leaves, "triton"), (doubled(leaves), "eager")):
        (hidden_TH, weight_VH), rest = mine[:2], mine[2:]
        loss, nll_R = linear_rationale_loss(
            hidden_TH, weight_VH, target_T, rationale_T, positive_R, weight_R if impl == "eager" else weight_R.float(),
            beta=0.2, delta=30.0, bias=rest[0] if bias else None, impl=impl, **options,
        )  # fmt: skip
        results.append(((loss, nll_R), torch.autograd.grad(loss, mine)))
    return _compare(*results)


def check_selections(
    dtype: torch.dtype, device: torch.device, T: int, H: int, V: int, pairs: Sequence[tuple[str, str]] = ()
) -> Errors:
    """Check selections of ragged questions, with quality and ignored tokens.

    `pairs`: default, each selection of a side at least once, since each pair is compiled. log p is fp32 for any dtype
    of the operands, and the sizes are its own.
    """
    generator = torch.Generator().manual_seed(5)
    length_R = torch.randint(1, 9, (40,), generator=generator)
    length_R[3] = 600  # more than a block of tokens
    rationale_T = torch.repeat_interleave(torch.arange(40), length_R)
    question_R = torch.randint(0, 3, (40,), generator=generator) * 2
    question_R[:35] = 0  # more than a block of rationales
    positive_R, quality_R = torch.rand(40, generator=generator) < 0.6, torch.rand(40, generator=generator)
    logprob_T = -6 * torch.rand(len(rationale_T), generator=generator)
    valid_T = torch.rand(len(rationale_T), generator=generator) < 0.9
    segments = [x.to(device) for x in (rationale_T, question_R, positive_R, quality_R)]
    worst: Errors = {"out": 0.0, "grad": 0.0}
    some = itertools.zip_longest(POSITIVE_SELECT, NEGATIVE_SELECT, fillvalue=POSITIVE_SELECT[0])
    for positive, negative in pairs or some:
        results = []
        for impl, of in (("triton", torch.float32), ("eager", torch.float64)):
            leaf = logprob_T.to(device, of).requires_grad_()
            out = contrastive_loss(
                leaf,
                *segments,
                positive_select=positive,
                negative_select=negative,
                valid_T=valid_T.to(device),
                impl=impl,
            )
            results.append(((out.loss, out.nll_R, out.weight_R, out.selected_R), torch.autograd.grad(out.loss, [leaf])))
        found = _compare(*results)
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


def check_sample(
    dtype: torch.dtype, device: torch.device, T: int, H: int, V: int, bias: bool = False, **options: Any
) -> Errors:
    """Check tokens against those drawn from float64 logits with the same random numbers."""
    leaves, _ = make_operands(T, H, V, dtype, device, bias)
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randint(0, 2**32, (T, n), generator=generator).to(device) for n in (2, 3)]
    drawn = []
    for mine, impl in ((leaves, "triton"), (doubled(leaves), "torch")):
        head = [x.detach() for x in mine]
        drawn.append(linear_sample(*head[:2], *draw, bias=head[2] if bias else None, impl=impl, **options))
    return {"tokens": float((drawn[0] != drawn[1]).double().mean())}


def _compare(got: Any, want: Any) -> Errors:
    return {
        name: max(error(a, b) for a, b in zip(mine, truth, strict=True))
        for name, mine, truth in zip(("out", "grad"), got, want, strict=True)
    }


def run_checks(checks: list[Check], dtypes: list[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for each check and dtype as it finishes. A check that raises is wrong."""
    for check, name in ((check, name) for check in checks for name in dtypes if name in check.dtypes):
        row: dict[str, Any] = {"check": check.name, "kernels": check.kernels, "dtype": name, "status": "ok"}
        started, dtype = time.perf_counter(), DTYPES[name]
        try:
            errors = check.run(dtype, device)
            used = {quantity: value / limits(dtype)[quantity] for quantity, value in errors.items()}
            row |= {"errors": errors, "budget_used": max(used.values())}
            if not all(share <= 1 for share in used.values()):  # a NaN is wrong too
                row["status"] = "wrong"
        except Exception as failure:  # the others still run, unless the GPU is lost
            row["status"] = f"failed: {one_line(failure)}"
        yield row | {"seconds": round(time.perf_counter() - started, 2)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"some of {', '.join(DTYPES)}; default: bf16,fp32")
    parser.add_argument("--small", action="store_true", help="sizes for an interpreter or a sanitizer")
    parser.add_argument("--json", type=Path, help="file to write, again after each check")
    given = parser.parse_args(arguments)
    dtypes = given.dtypes.split(",")
    if unknown := set(dtypes) - set(DTYPES):
        parser.error(f"no dtype {sorted(unknown)[0]!r}; there are {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for row in run_checks(find_checks(SMALL if given.small else LARGE), dtypes, device):
        rows.append(row)
        used = f"{row['budget_used']:8.1%} of the budget" if "budget_used" in row else " " * 22
        print(f"{row['check']:32} {row['dtype']:5} {used}  {row['seconds']:6.2f} s  {row['status']}", flush=True)
        if given.json:
            write_json(given.json, {"where": describe_machine(device), "rows": rows})
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
