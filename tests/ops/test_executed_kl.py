"""Ways to break the compiled `kl_kernel` of sm_90 that the executor has to notice; `test_executed_ptx.py` has its
numbers."""

from __future__ import annotations

import os

import pytest
import torch

from bench.kernel_checks import error
from csrc_triton import linear_kl as kernels
from qcrd_fast import linear_kl
from tests.support.ptx.launch import executing
from tests.support.ptx.mutations import mutants
from tests.support.ptx.values import Fault

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"
)


@pytest.fixture(scope="module")
def heads():
    """(student, teacher of another scale, the divergence in float64): 66 rows, so that a tile is partly empty."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(n, H, generator=generator).bfloat16() for H in (64, 128) for n in (66, 140)]
    expected = linear_kl(*(x.double() for x in operands), scale=0.3, teacher_scale=0.2, impl="eager")
    student = kernels.Head(*operands[:2], None, (0.3, 0.0, 1.0))
    return student, kernels.Head(*operands[2:], None, (0.2, 0.0, 1.0)), expected


@pytest.mark.parametrize(
    "name, change", [("nothing", None), *mutants(["kl_kernel"])], ids=lambda x: x if type(x) is str else ""
)
def test_what_is_broken_is_noticed(name, change, heads) -> None:
    student, teacher, expected = heads
    with executing(90, change=change):
        try:
            found = error(kernels.forward(student, teacher, torch.ones(66, dtype=torch.bool), 0.0)[0], expected)
        except Fault:
            found = float("inf")
    assert (found < 1e-6) == (change is None), f"{name}: {found:.2e}"
