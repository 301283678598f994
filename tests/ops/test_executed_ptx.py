"""The kernels as they are compiled for GPUs that are not here, executed on the CPU: results, races, bounds. `support.ptx` says
how; `python -m tests.support.ptx.grid` runs the whole grid."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from bench.kernel_checks import DTYPES, SMALL, Check, check_logprob, doubled, error, find_checks, make_operands
from csrc_triton import contrastive, linear_sample, product
from csrc_triton import linear_logprob as kernels
from csrc_triton.product import Tile
from qcrd_fast import linear_logprob
from tests.support.ptx.grid import judge
from tests.support.ptx.launch import Execution, compare_orders, executing
from tests.support.ptx.machine import Block
from tests.support.ptx.mutations import mutants
from tests.support.ptx.values import Fault

CPU = torch.device("cpu")
CHECKS = {check.name: check for check in find_checks(SMALL)}
IN_FP32 = ("log p, every option", "loss of known weights", "tokens, top-k 50")  # and what has no other type
CASES = [
    *((capability, name, check.dtypes[0]) for capability in (80, 90) for name, check in CHECKS.items()),
    *((90, name, "fp32") for name in IN_FP32),
]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("capability, name, dtype", CASES, ids=lambda value: str(value))
def test_compiled_kernels(capability: int, name: str, dtype: str) -> None:
    check: Check = CHECKS[name]
    with executing(capability) as executed:
        errors = check.run(DTYPES[dtype], CPU)
    assert judge(errors, dtype), errors
    assert set(check.kernels) <= set(executed.programs)
    assert all(made.enable_fp_fusion for made in executed.metadata.values())


def test_ragged_batches_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows, a kernel is compiled once a tile."""
    monkeypatch.setattr(Execution, "run", lambda *_: None)
    made = []
    with executing(90, multiprocessors=132):
        weight = torch.empty(4096, 64, dtype=torch.bfloat16)
        for T in (1, 16, 17, 64, 65, 96, 97, 4096):  # up to 64 rows, and beyond
            hidden, target = torch.empty(T, 64, dtype=torch.bfloat16), torch.zeros(T, dtype=torch.int64)
            kernels.forward(hidden, weight, target, None, (1.0, 0.0, 1.0), -100, False)
            made.append([len(k.device_caches[90][0]) for k in (kernels.forward_kernel, kernels.combine_kernel)])
    assert made[:4] == [made[0]] * 4 and made[4:] == [made[4]] * 4, made


@pytest.mark.parametrize("tile", [Tile(64, 128, 64, 4, 3, True), Tile(128, 256, 64, 8, 3, True)], ids=str)
def test_copy_engine_in_any_order(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands through descriptors, with warps and programs in an order drawn at random."""
    monkeypatch.setattr(product, "forced_tile", tile)
    with executing(90, shuffle=1):
        errors = check_logprob(torch.bfloat16, CPU, *SMALL)
    assert judge(errors, "bf16"), errors


def test_parts_of_the_vocabulary_and_chunks_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 40_000)
    with executing(90, shuffle=2, multiprocessors=100) as executed:
        errors = check_logprob(torch.bfloat16, CPU, 70, 72, 1003, bias=True)
    assert judge(errors, "bf16"), errors
    assert executed.programs["forward_kernel"] == 2 and executed.programs["da_kernel"] == 8


@pytest.fixture(scope="module")
def head():
    """(what the forward pass is called with: 130 rows, so that a tile is partly empty; log p in float64)."""
    leaves, target = make_operands(130, 256, 150, torch.bfloat16, CPU, bias=False)
    expected = linear_logprob(*doubled(leaves), target, impl="eager")
    return (*(x.detach() for x in leaves), target, None, (1.0, 0.0, 1.0), -100, False), expected


def name_of(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("name, change", [("nothing", None), *mutants()], ids=name_of)
def test_what_is_broken_is_noticed(name, change, head) -> None:
    call, expected = head
    with executing(90, change=change):
        try:
            found = error(kernels.forward(*call)[0], expected)
        except Fault:
            found = float("inf")
    assert (found < 1e-6) == (change is None), f"{name}: {found:.2e}"


@pytest.mark.parametrize("name, change", list(mutants())[:2], ids=name_of)
def test_races_are_seen_by_the_search_alone(name, change, head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a barrier the numbers are right in the usual order: an executor that looked at those alone would be deaf."""
    monkeypatch.setattr(Block, "check_read", lambda *_: None)
    monkeypatch.setattr(Block, "check_write", lambda *_: None)
    call, expected = head
    with executing(90, change=change):
        assert error(kernels.forward(*call)[0], expected) < 1e-6


def test_other_orders_leave_the_same_bytes(head) -> None:
    """Each kernel's first launch runs in other orders too, and what they left is compared."""
    call, expected = head
    with executing(90, orders=2) as executed:
        first = kernels.forward(*call)[0]
    assert len(executed.compared) == 2 and error(first, expected) < 1e-6


def test_an_order_that_leaves_other_bytes_is_a_fault() -> None:
    tensor, left = np.ones(4, np.uint8), iter((1, 2))
    with pytest.raises(Fault, match="k: order 2 leaves other bytes in argument 0"):
        compare_orders("k", [tensor], [np.zeros(4, np.uint8)], 2, lambda seed: tensor.fill(next(left)))


def test_checks_are_the_whole_of_the_kernels() -> None:
    """A kernel that is added is executed too."""
    names = {name for module in (kernels, contrastive, linear_sample) for name in vars(module)}
    assert {name for check in find_checks(SMALL) for name in check.kernels} == {n for n in names if n.endswith("_kernel")}
