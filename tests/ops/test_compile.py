"""What the launchers have compiled for GPUs that are not here: matrix instructions, shared memory, spills, programs
that share a multiprocessor, instructions. `python -m bench.sass` prints the table."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from bench.sass import GPUS, compile_small, describe, missing_tools, rows_of
from csrc_triton.product import gluon_obstacle

MATRIX = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a program, at most
SPILLS = {"keeps the exponentials, bias": 96}  # bytes, on sm_90, where two programs are worth more
MATRIX_KERNELS = (
    *("forward_kernel", "resident_kernel", "dlogits_kernel", "resident_da_kernel", "product_kernel"),
    *("kl_kernel", "kl_da_kernel", "mixture_kernel"),
)
QUICK = ("plain", "plain, 32 rows", "keeps the exponentials", "noise, no top-k")
FEWER = {86: QUICK[:2], 89: QUICK[:1]}  # what is compiled for these is much like sm_80's, and sm_89's is sm_86's
MORE = (  # on an H100: each kernel, and each way of its own to hold operands
    *("every option, ragged H and V", "H = 4096, plain", "KL", "KL, mixture", "top-k"),
    *("hidden resident", "hidden resident, keeps the exponentials"),
)
# instructions of a plain forward tile beside its products
TILE = {80: 490, 86: 490, 89: 490, 90: 470, 100: 260, 120: 520}
Row = dict[str, Any]

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"),
    pytest.mark.skipif(bool(missing_tools()), reason=f"this triton brings no {', '.join(missing_tools())}"),
]


def has_a_limit(variant: str, kernel: str) -> bool:
    """Whether the instructions of its machine code are counted below; to disassemble takes longer than all else."""
    return kernel.startswith("resident_") or (variant, kernel) == ("plain", "forward_kernel")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every kernel as an H100 gets it, and the most used on the others."""
    names = dict.fromkeys(GPUS, QUICK) | FEWER | {90: QUICK + MORE}
    rows = [row for capability in GPUS for row in rows_of(capability, names=names[capability], counting=has_a_limit)]
    return rows + [describe("small", launch, counting=False) for launch in compile_small(90)]


def check(rows: list[Row]) -> None:
    for row in rows:
        capability, kernel = row["capability"], row["kernel"]
        assert row["shared"] <= SHARED_KIB[capability] * 1024, row
        allowed = SPILLS if capability == 90 else {"KL, fp32": 16}  # bytes; on sm_86 and sm_89
        assert row["spills"] <= allowed.get(row["variant"], 0), row
        if kernel in MATRIX_KERNELS and not row["variant"].endswith("fp32"):
            assert row["matrix"] == (MATRIX[capability],), row
        if kernel in ("forward_kernel", "resident_kernel"):
            assert row["programs"] == row["counted"], row
        if kernel in ("product_kernel", "kl_kernel", "mixture_kernel", "dlogits_kernel", "resident_da_kernel"):
            assert row["programs"] >= row["counted"], row
        if capability == 90 and kernel in ("forward_kernel", "dlogits_kernel"):
            if row["shared"] < 2**17:  # one's products hide the other's exponentials; the compiler is held to it
                assert row["programs"] >= 2 and row["maxnreg"] in (128, 168), row
            if row["variant"] == "H = 4096, plain":
                assert row["copy_engine"] and row["shared"] >= 144 * 1024 and row["programs"] == 1, row
        if kernel.startswith("resident_"):
            # 168 registers a thread at its start are all of a multiprocessor's for 384
            assert row["copy_engine"] and row["programs"] == 1 and row["registers"] == 168 and row["threads"] == 384, (
                row
            )
            assert row["shared"] >= 224 * 1024, row
        if kernel.startswith("resident_") and row.get("step"):
            assert row["step"].get("spill", 0) == 0 and sum(row["step"].values()) <= 60, row
            assert row["step"]["mma"] in (2, 4) and row["tile"]["mufu"] in (64, 66), row
            if kernel == "resident_kernel" and "," not in row["variant"]:
                assert sum(row["tile"].values()) <= 345, row


def test_what_is_compiled(rows: list[Row]) -> None:
    assert {row["capability"] for row in rows} == set(GPUS)
    check(rows)
    compiled = Counter(row["kernel"] for row in rows if row["capability"] == 90)
    assert compiled["forward_kernel"] >= 5 and compiled["dlogits_kernel"] >= 4, compiled
    if gluon_obstacle() is None:
        counted = [row["kernel"] for row in rows if row["kernel"].startswith("resident_") and row.get("step")]
        assert sorted(counted) == ["resident_da_kernel", "resident_kernel", "resident_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [capability for capability in GPUS if capability != 89])
def test_every_variant_on_every_gpu(capability: int) -> None:
    """But sm_89, which has sm_86's instructions and shared memory; an H100's resident kernels are disassembled too."""
    check(list(rows_of(capability, counting=lambda _, kernel: kernel.startswith("resident_"))))


def test_what_a_logit_costs(rows: list[Row]) -> None:
    """An exponential and few instructions more; in the loop over the hidden dimension hardly any but the products."""
    for row in rows:
        if row["kernel"] == "forward_kernel" and row["variant"] == "plain":
            assert 64 <= row["tile"]["mufu"] <= 72, row
            assert sum(row["tile"].values()) <= TILE[row["capability"]], row
            assert row["step"].get("mufu", 0) == 0 and row["step"].get("spill", 0) == 0, row
