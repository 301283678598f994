"""`csrc_triton/linear_logprob_hopper.py`, compiled for sm_90 and executed on a CPU: results, orders, barriers."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

from bench.kernel_checks import DTYPES, Errors, check_logprob, check_rationale_loss, doubled, error, limits, make_operands
from cli.main import entry
from csrc_triton import linear_logprob as kernels
from csrc_triton import product
from csrc_triton.product import Tile
from qcrd_fast import linear_logprob
from tests.support.ptx.grid import judge
from tests.support.ptx.launch import executing
from tests.support.ptx.mutations import NOTHING, Change, nth, replaced
from tests.support.ptx.values import Fault

CPU = torch.device("cpu")
PLAIN = (1.0, 0.0, 1.0)

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled"),
    pytest.mark.skipif(product.gluon_obstacle() is not None, reason=str(product.gluon_obstacle())),
]


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QCRD_FAST_GLUON", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few_stages(H: int, stages: int = 3) -> Tile:
    """So few that the ring goes round within a small vocabulary."""
    return product.resident_tile(H)._replace(num_stages=stages)


def check_keeping(dtype: torch.dtype, device: torch.device, T: int, H: int, V: int) -> Errors:
    return check_rationale_loss(dtype, device, T, H, V, temperature=0.7)


@pytest.mark.parametrize(
    "dtype, check, shape, options",
    [
        pytest.param("bf16", check_logprob, (150, 128, 300), dict(extras=True, scale=-0.4), id="entropy, ragged T and V"),
        pytest.param("fp16", check_logprob, (150, 72, 300), dict(temperature=0.7), id="fp16, ragged H"),
        pytest.param("bf16", check_logprob, (200, 64, 256), dict(ignored=128), id="a block of ignored rows"),
        pytest.param("bf16", check_keeping, (150, 128, 300), {}, id="keeps the exponentials"),
    ],
)
def test_agrees_with_float64(dtype, check, shape, options, monkeypatch: pytest.MonkeyPatch) -> None:
    """log p, log-sum-exp and entropy, and the gradients made from them; with stages in short supply."""
    monkeypatch.setattr(product, "forced_tile", few_stages(shape[1]))
    with executing(90, shuffle=3) as executed:
        errors = check(DTYPES[dtype], CPU, *shape, **options)
    assert judge(errors, dtype), errors
    assert executed.programs["resident_kernel"] == 2 and "forward_kernel" not in executed.programs
    assert executed.metadata["resident_kernel"].enable_fp_fusion


def forward_error(T: int, H: int, V: int, dtype: torch.dtype = torch.bfloat16) -> float:
    leaves, target = make_operands(T, H, V, dtype, CPU, bias=False)
    expected = linear_logprob(*doubled(leaves), target, impl="eager")
    return error(kernels.forward(*(x.detach() for x in leaves), target, None, PLAIN, -100, False)[0], expected)


@pytest.mark.parametrize("H", [576, pytest.param(640, marks=pytest.mark.slow), 768])
def test_heads_of_small_students(H: int) -> None:
    """At the tile that is launched: stages 64 deep, and at H = 768 32 deep."""
    with executing(90) as executed:
        assert forward_error(130, H, 200) < 1e-6
    assert executed.programs["resident_kernel"] == 2


def test_five_other_orders_leave_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of programs, of warps, and of when copies land."""
    monkeypatch.setattr(product, "forced_tile", few_stages(128))
    with executing(90, orders=5) as executed:
        assert forward_error(130, 128, 300) < 1e-6
    assert executed.programs["resident_kernel"] == 2 and len(executed.compared) == 2


def test_parts_of_the_vocabulary() -> None:
    with executing(90, multiprocessors=100) as executed:
        assert forward_error(70, 64, 1100) < 1e-6
    assert executed.programs["resident_kernel"] == 2


# ---- does the executor notice? --------------------------------------------------------------------------------------------


def not_waited_for(which: int) -> Change:
    """The wait at an mbarrier of this number, in the order of the text, looks once and goes on."""
    return replaced(r"@!complete bra\.uni waitLoop;", NOTHING, which)


def unsynchronised_arrival(text: str) -> str:
    """A warpgroup gives back a stage when its first warp's product has ended."""
    return re.sub(r"bar\.sync\s+0, 128;(?=\s*and\.pred[^;]*;\s*@%p\d+ mbarrier\.arrive)", NOTHING, text, count=1)


def without_start(text: str) -> str:
    """The other warps begin before the mbarriers are made: both sides of the first barrier are gone."""
    for before in (r"st\.shared\.b32\s+\[global_smem\+\d+\], %r\d+;\s*", r"setmaxnreg\.dec\.sync\.aligned\.u32\s+\d+;\s*"):
        text = nth(text, rf"({before})barrier\.sync\s+1;", 0, rf"\g<1>{NOTHING}")
    return text


BREAKAGES: dict[str, Change] = {
    "the hidden states are not waited for": not_waited_for(0),
    "a full stage is not waited for": not_waited_for(1),
    "an empty stage is not waited for": not_waited_for(-1),
    "a stage is given back before its product has ended": replaced(r"(wgmma\.wait_group\.sync\.aligned\s+)1;", r"\g<1>2;"),
    "a stage is given back by one warp for four": unsynchronised_arrival,
    "one warpgroup is enough to give back a stage": replaced(r"(mbarrier\.init[^;]*\], )2;", r"\g<1>1;"),
    "fewer bytes are expected than come": replaced(r"(expect_tx[^;]*, )16384;", r"\g<1>8192;", -1),
    "more bytes are expected than come": replaced(r"(expect_tx[^;]*, )16384;", r"\g<1>32768;", -1),
    "the phase does not turn": replaced(r"xor\.b32(\s+%r\d+, %r\d+, )%r\d+;", r"xor.b32\g<1>0;"),
    "a stage is given back twice": replaced(r"(@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1 \1", -1),
    "the fetching warp keeps its registers": replaced(r"(setmaxnreg\.dec\.sync\.aligned\.u32\s+)24;", r"\g<1>120;", -1),
}


@pytest.fixture(scope="module")
def head():
    leaves, target = make_operands(130, 128, 520, torch.bfloat16, CPU, bias=False)
    expected = linear_logprob(*doubled(leaves), target, impl="eager")
    return (*(x.detach() for x in leaves), target, None, PLAIN, -100, False), expected


@pytest.mark.parametrize("name", ["nothing", *BREAKAGES])
def test_what_is_broken_is_noticed(name: str, head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "forced_tile", few_stages(128))
    call, expected = head

    def change(kernel: str, text: str) -> str:
        if kernel != "resident_kernel" or name == "nothing":
            return text
        changed = BREAKAGES[name](text)
        assert changed != text
        return changed

    with executing(90, change=change):
        try:
            found = error(kernels.forward(*call)[0], expected)
        except Fault as fault:
            print(name, fault)
            found = float("inf")
    assert (found < 1e-6) == (name == "nothing"), f"{name}: {found:.2e}"


# ---- when it runs ---------------------------------------------------------------------------------------------------------


def launched(H: int = 64, bias: bool = False, softcap: float = 0.0, dtype: torch.dtype = torch.bfloat16, T: int = 70) -> str:
    """Which forward kernel computes log p."""
    hidden, weight, target = torch.zeros(T, H, dtype=dtype), torch.zeros(130, H, dtype=dtype), torch.zeros(T, dtype=torch.int64)
    with executing(90) as executed:
        kernels.forward(
            hidden, weight, target, torch.zeros(130, dtype=dtype) if bias else None, (1.0, softcap, 1.0), -100, False
        )
    return next(name for name in executed.programs if name != "combine_kernel")


def test_what_it_has_not_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == "resident_kernel"
    for other in (dict(bias=True), dict(softcap=2.0), dict(H=840), dict(T=64), dict(dtype=torch.float32), dict(H=68)):
        assert launched(**other) == "forward_kernel", other  # type: ignore[arg-type]
    monkeypatch.setattr(product, "architecture", lambda device: 100)
    operand = torch.zeros(70, 64, dtype=torch.bfloat16)
    assert not product.choose_tile(operand, operand, resident=True).resident


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", None):
        monkeypatch.setenv("QCRD_FAST_GLUON", "0") if value else monkeypatch.delenv("QCRD_FAST_GLUON")
        assert launched() == "forward_kernel"
    monkeypatch.setenv("QCRD_FAST_GLUON", "yes")
    with pytest.raises(ValueError, match="QCRD_FAST_GLUON=yes: expected 0 or 1"):
        launched()


def test_a_triton_without_gluon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Triton kernel runs, and `doctor` says why; a benchmark that asks for the tile is told."""
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "csrc_triton.linear_logprob_hopper", raising=False)
    monkeypatch.delattr("csrc_triton.linear_logprob_hopper", raising=False)
    product.gluon_obstacle.cache_clear()
    try:
        assert launched() == "forward_kernel"
        assert entry(["doctor"]) == 0
        assert "hopper       no: triton" in capsys.readouterr().out
        monkeypatch.setattr(product, "forced_tile", product.resident_tile(64))
        with pytest.raises(ImportError):
            launched()
    finally:
        product.gluon_obstacle.cache_clear()


def test_doctor_says_whether_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["doctor"]) == 0
    assert "hopper       QCRD_FAST_GLUON=1: the Gluon kernel" in capsys.readouterr().out
    monkeypatch.delenv("QCRD_FAST_GLUON")
    assert entry(["doctor"]) == 0
    assert "hopper" not in capsys.readouterr().out


def test_no_room_is_an_error_of_a_forced_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "forced_tile", product.resident_tile(840))
    with pytest.raises(ValueError, match="no room for 128 rows of H = 840"):
        launched(H=840)


# ---- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no CUDA GPU of capability 9.0"
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("T, H, V", [(700, 576, 49152), (129, 640, 5003), (333, 768, 32128)])
def test_on_a_gpu(T: int, H: int, V: int, dtype: str) -> None:
    for options in ({}, dict(extras=True)):
        errors = check_logprob(DTYPES[dtype], torch.device("cuda"), T, H, V, **options)
        assert all(found <= limits(DTYPES[dtype])[quantity] for quantity, found in errors.items()), errors
