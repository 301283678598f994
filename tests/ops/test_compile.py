"""What the launchers have compiled for GPUs that are not here: matrix instructions, shared memory, spills, programs
that share a multiprocessor, instructions. `python -m bench.sass` prints the table."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from bench.sass import GPUS, VARIANTS, compile_small, describe, missing_tools, rows_of
from csrc_triton.product import gluon_obstacle

MATRIX = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a program, at most
SPILLS = {"keeps the exponentials, bias": 96}  # bytes, on sm_90, where two programs are worth more
MATRIX_KERNELS = (
    *("forward_kernel", "resident_kernel", "dlogits_kernel", "resident_da_kernel", "product_kernel"),
    *("kl_kernel", "kl_da_kernel", "mixture_kernel"),
)
SLOW = (
    *("KL, every option, ragged H and V", "KL, mixture, every option, ragged H and V", "KL, 32 rows", "KL, fp32"),
    *("plain, fp16", "bias", "softcap", "hidden resident, H = 640, fp16"),
    *("H = 4096, bias", "H = 4096, softcap", "H = 4096, entropy"),
)
QUICK = ("plain", "plain, 32 rows", "keeps the exponentials", "noise, no top-k")
FEWER = {86: QUICK[:2], 89: QUICK[:1]}  # what is compiled for these is much like sm_80's, and sm_89's is sm_86's
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
    """Most of what is launched on an H100, and the most used on the others."""
    names = dict.fromkeys(GPUS, QUICK) | FEWER
    names[90] = tuple(variant.name for variant in VARIANTS if variant.name not in SLOW)
    rows = [row for capability in GPUS for row in rows_of(capability, names=names[capability], counting=has_a_limit)]
    return rows + [describe("small", launch, counting=False) for launch in compile_small(90)]


def check(rows: list[Row]) -> None:
    for row in rows:
        capability = row["capability"]
        assert row["shared"] <= SHARED_KIB[capability] * 1024, row
        allowed = SPILLS if capability == 90 else {"KL, fp32": 16}  # bytes; on sm_86 and sm_89
        assert row["spills"] <= allowed.get(row["variant"], 0), row
        if row["kernel"] in MATRIX_KERNELS and not row["variant"].endswith("fp32"):
            assert row["matrix"] == (MATRIX[capability],), row
        if row["kernel"] in ("forward_kernel", "resident_kernel"):
            assert row["programs"] == row["counted"], row
        if row["kernel"] in ("product_kernel", "kl_kernel", "mixture_kernel", "dlogits_kernel", "resident_da_kernel"):
            assert row["programs"] >= row["counted"], row


def test_what_is_compiled(rows: list[Row]) -> None:
    assert {row["capability"] for row in rows} == set(GPUS)
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_every_variant_on_every_gpu(capability: int) -> None:
    check(list(rows_of(capability, counting=lambda *_: False)))


def test_two_programs_of_an_h100_wherever_tiles_are_narrow(rows: list[Row]) -> None:
    """One's products hide the other's exponentials; the compiler is held to it."""
    narrow = [
        r
        for r in rows
        if r["capability"] == 90 and r["kernel"] in ("forward_kernel", "dlogits_kernel") and r["shared"] < 2**17
    ]
    assert len(narrow) > 12
    for row in narrow:
        assert row["programs"] >= 2 and row["maxnreg"] in (128, 168), row


def test_wide_heads_take_the_copy_engine(rows: list[Row]) -> None:
    wide = [row for row in rows if row["variant"] == "H = 4096, plain"]
    assert {row["kernel"] for row in wide} == {"forward_kernel", "dlogits_kernel"}
    for row in wide:
        assert row["copy_engine"] and row["shared"] >= 144 * 1024 and row["programs"] == 1, row


@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
def test_hidden_states_stay_in_shared_memory(rows: list[Row]) -> None:
    """One program, nearly all of shared memory; 168 registers a thread at its start are all of a multiprocessor's for
    384."""
    resident = [row for row in rows if row["kernel"].startswith("resident_")]
    compiled = Counter(row["kernel"] for row in resident)
    # a ragged last chunk is another
    assert compiled["resident_kernel"] == 4 and compiled["resident_da_kernel"] >= 2, compiled
    for row in resident:
        assert row["copy_engine"] and row["programs"] == 1 and row["registers"] == 168 and row["threads"] == 384, row
        assert row["shared"] >= 224 * 1024 and row["spills"] == 0 and row["step"].get("spill", 0) == 0, row
        assert row["step"]["mma"] in (2, 4) and sum(row["step"].values()) <= 60 and row["tile"]["mufu"] in (64, 66), row
        if row["kernel"] == "resident_kernel" and "," not in row["variant"]:
            assert sum(row["tile"].values()) <= 345, row


def test_what_a_logit_costs(rows: list[Row]) -> None:
    """An exponential and few instructions more; in the loop over the hidden dimension hardly any but the products."""
    for row in rows:
        if row["kernel"] == "forward_kernel" and row["variant"] == "plain":
            assert 64 <= row["tile"]["mufu"] <= 72, row
            assert sum(row["tile"].values()) <= TILE[row["capability"]], row
            assert row["step"].get("mufu", 0) == 0 and row["step"].get("spill", 0) == 0, row
