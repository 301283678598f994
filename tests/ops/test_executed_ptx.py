"""The kernels as they are compiled for GPUs that are not here, executed on the CPU: results, races, bounds.
`support.ptx` says how; `python -m tests.support.ptx.grid` runs the whole grid."""

from __future__ import annotations

import os
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench.kernel_checks import DTYPES, SMALL, Check, check_logprob, doubled, error, find_checks, make_operands
from csrc_triton import contrastive, linear_kl, linear_sample, product
from csrc_triton import linear_logprob as kernels
from csrc_triton.product import Tile
from qcrd_fast import linear_logprob
from qcrd_fast.ops.linear_sample import linear_sample as sampled
from qcrd_fast.ops.philox import gumbel
from tests.support.ptx import arithmetic
from tests.support.ptx.grid import judge
from tests.support.ptx.launch import Execution, compare_orders, executing
from tests.support.ptx.machine import Block
from tests.support.ptx.mutations import mutants
from tests.support.ptx.program import Instruction
from tests.support.ptx.values import Fault

CPU = torch.device("cpu")
CHECKS = {check.name: check for check in find_checks(SMALL)}
IN_FP32 = ("log p, every option", "loss of known weights", "tokens, top-k 50")  # and what has no other type
# on sm_80 other options and sizes of kernels that other cases have there
SLOW = (
    *("log p", "log p, softcap", "log p, log-sum-exp and entropy", "log p, sizes that tiles divide"),
    *("log p, a tile of ignored rows", "log p of few rows"),
    *("loss of known weights, bias", "KL, reverse", "tokens, greedy"),
)
CASES = [
    *(
        pytest.param(80, name, check.dtypes[0], marks=[pytest.mark.slow] * (name in SLOW))
        for name, check in CHECKS.items()
    ),
    *((90, name, check.dtypes[0]) for name, check in CHECKS.items()),
    *(pytest.param(90, name, "fp32", marks=pytest.mark.slow) for name in IN_FP32),
]

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"
)


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
    products = [
        made
        for kernel, made in executed.metadata.items()
        if kernel in ("forward_kernel", "dlogits_kernel", "product_kernel")
    ]
    assert all((made.maxnreg is not None) == (capability == 90) for made in products)


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


def test_copy_engine_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands through descriptors, with warps and programs in an order drawn at random; the tile of few rows."""
    monkeypatch.setattr(product, "forced_tile", Tile(64, 128, 64, 4, 3, True))
    with executing(90, shuffle=1):
        errors = check_logprob(torch.bfloat16, CPU, *SMALL)
    assert judge(errors, "bf16"), errors


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_wide_heads_on_hopper(dtype: str) -> None:
    """From H = 1024 on: 128 x 256, operands by the copy engine; in an order drawn at random."""
    with executing(90, shuffle=1) as executed:
        errors = check_logprob(DTYPES[dtype], CPU, 128, 1024, 300)
    assert judge(errors, dtype), errors
    for kernel in ("forward_kernel", "dlogits_kernel"):
        assert (
            144 * 1024 <= executed.metadata[kernel].shared <= 227 * 1024 and executed.metadata[kernel].maxnreg is None
        )


def test_operands_that_the_copy_engine_cannot_fetch() -> None:
    with executing(90) as executed:
        assert product.choose_tile(*torch.empty(2, 128, 1024, dtype=torch.bfloat16)) == Tile(128, 256, 64, 8, 3, True)
        # a row's bytes, the first one's, few rows
        for rows, H, shift in ((128, 1028, 0), (128, 1024, 1), (64, 1024, 0)):
            operand = torch.empty(rows * H + shift, dtype=torch.bfloat16)[shift:].view(rows, H)
            assert not product.choose_tile(operand, operand).descriptors
        errors = check_logprob(torch.bfloat16, CPU, 66, 1028, 130)
    assert judge(errors, "bf16"), errors
    assert executed.metadata["forward_kernel"].maxnreg == 128


@triton.jit
def both_noises(word_ptr, gumbel_ptr, most_ptr, N: tl.constexpr):
    at_n = tl.arange(0, N)
    word_n = tl.load(word_ptr + at_n).to(tl.uint32)
    tl.store(gumbel_ptr + at_n, linear_sample._gumbel(word_n))
    tl.store(most_ptr + at_n, linear_sample._most_gumbel(word_n))


def test_no_noise_is_above_its_bound() -> None:
    """At the edges of every power of two, where the bound is nearest, and between."""
    edges = [2**k + d for k in range(33) for d in (-2, -1, 0, 1, 2)] + [3 * 2**k for k in range(31)]
    edges = [word for word in edges if 0 <= word < 2**32]
    some = torch.randint(0, 2**32, (1024 - len(edges),), generator=torch.Generator().manual_seed(0))
    word = torch.cat([torch.tensor(edges), some])
    gumbel, most = torch.empty(2, 1024)
    with executing(90):
        both_noises[(1,)](word, gumbel, most, N=1024, **product.LAUNCH)
    above = most - gumbel
    assert above.min() > 5e-4 and above[(word >= 64) & (word < 2**20)].max() < 0.07


def nearly_tied(B: int, V: int) -> tuple[torch.Tensor, ...]:
    """(hidden, weight, key, counter): logits of a trained head's spread, and half of them so large that their noisy
    sums, in fp32, are equal for many entries."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.zeros(B, 16, dtype=torch.bfloat16)
    hidden[:, 0], hidden[::2, 1] = 1, 1
    weight = torch.zeros(V, 16, dtype=torch.bfloat16)
    weight[:, 0] = torch.randint(0, 8, (V,), generator=generator) * (torch.rand(V, generator=generator) < 0.1)
    weight[:, 1] = 2**23
    return hidden, weight, *(torch.randint(0, 2**32, (B, n), generator=generator) for n in (2, 3))


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_noise_is_left_out_where_it_cannot_win(capability: int) -> None:
    """Among them ties, of which the first entry wins; with a bound that is 3 too low, some winners are lost."""
    call = nearly_tied(6, 2051)
    noisy = (call[0].double() @ call[1].double().T).float() + gumbel(*call[2:], size=len(call[1])).float()
    largest = noisy == noisy.max(1, keepdim=True).values
    assert largest.sum(1).max() > 2
    expected = torch.stack([row.nonzero()[0, 0] for row in largest])
    with executing(capability, multiprocessors=16, shuffle=1) as executed:
        assert torch.equal(sampled(*call, impl="triton"), expected) and executed.programs["product_kernel"] > 4

    def lower(kernel: str, ptx: str) -> str:
        bound = struct.pack(">f", 110.212).hex().upper()
        assert f"0f{bound}" in ptx
        return ptx.replace(f"0f{bound}", "0f" + struct.pack(">f", 107.212).hex().upper())

    with executing(capability, multiprocessors=16, shuffle=1, change=lower):
        assert not torch.equal(sampled(*call, impl="triton"), expected)


def test_parts_of_the_vocabulary_and_chunks_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 40_000)
    with executing(90, shuffle=2, multiprocessors=100) as executed:
        errors = check_logprob(torch.bfloat16, CPU, 70, 72, 1003, bias=True)
    assert judge(errors, "bf16"), errors
    assert executed.programs["forward_kernel"] == 2 and executed.programs["dlogits_kernel"] == 8


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
    """Without a barrier the numbers are right in the usual order: an executor that looked at those alone would be
    deaf."""
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


def test_a_register_pair_may_lack_the_half_that_nothing_reads() -> None:
    """As on sm_120 in top-k; the missing half is a NaN, so that a result which does depend on it is noticed."""
    pack = Instruction("mov", ("mov", "b64"), ("%rd1", "{%r1, %r2}"), None, False, "")
    warp: Any = SimpleNamespace(registers={"%r1": np.full(32, 7, np.uint32)})
    arithmetic.move(pack)(warp)
    assert (warp.registers["%rd1"] == 0xFFFFFFFF_00000007).all()


def test_checks_are_the_whole_of_the_kernels() -> None:
    """A kernel that is added is executed too, and none by slow tests alone."""
    quick = {kernel for name, check in CHECKS.items() if name not in SLOW for kernel in check.kernels}
    assert quick == {kernel for check in CHECKS.values() for kernel in check.kernels}
    names = {name for module in (kernels, contrastive, linear_kl, linear_sample) for name in vars(module)}
    assert {name for check in find_checks(SMALL) for name in check.kernels} == {
        n for n in names if n.endswith("_kernel") or n == "dlogits_from_saved"
    }
