"""`csrc_triton/linear_logprob_hopper.py`, compiled for sm_90 and executed on a CPU: results, orders, barriers."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from bench.kernel_checks import (
    DTYPES,
    Errors,
    check_logprob,
    check_rationale_loss,
    doubled,
    error,
    limits,
    make_operands,
)
from cli.main import entry
from csrc_triton import linear_logprob as kernels
from csrc_triton import product
from csrc_triton.product import Tile
from qcrd_fast import linear_logprob
from tests.support.ptx.grid import judge
from tests.support.ptx.launch import executing
from tests.support.ptx.mutations import NOTHING, Change, replaced
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
        pytest.param(
            "bf16", check_logprob, (70, 192, 200), dict(extras=True, scale=-0.4), id="entropy, ragged T and V"
        ),
        pytest.param("bf16", check_keeping, (70, 72, 256), {}, id="ragged H, keeps the exponentials"),
        pytest.param("fp16", check_logprob, (150, 200, 300), dict(temperature=0.7), id="fp16", marks=pytest.mark.slow),
        pytest.param("bf16", check_keeping, (150, 128, 300), {}, id="keeps of a ragged V", marks=pytest.mark.slow),
    ],
)
def test_agrees_with_float64(dtype, check, shape, options, monkeypatch: pytest.MonkeyPatch) -> None:
    """log p, log-sum-exp and entropy, and the gradients made from them; with stages in short supply."""
    monkeypatch.setattr(product, "forced_tile", few_stages(shape[1]))
    with executing(90, shuffle=3) as executed:
        errors = check(DTYPES[dtype], CPU, *shape, **options)
    assert judge(errors, dtype), errors
    assert executed.programs["resident_kernel"] == -(-shape[0] // 128)
    assert ("resident_da_kernel" in executed.programs) == (check is check_logprob)
    assert not {"forward_kernel", "dlogits_kernel"} & set(executed.programs)
    assert executed.metadata["resident_kernel"].enable_fp_fusion


def forward_error(T: int, H: int, V: int, ignored: int = 0, dtype: torch.dtype = torch.bfloat16) -> float:
    leaves, target = make_operands(T, H, V, dtype, CPU, False, ignored)
    expected = linear_logprob(*doubled(leaves), target, impl="eager")
    return error(kernels.forward(*(x.detach() for x in leaves), target, None, PLAIN, -100, False)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("H", [576, 640, 768])
def test_heads_of_small_students(H: int) -> None:
    """At the tile that is launched: stages 64 deep, and at H = 768 32 deep."""
    with executing(90) as executed:
        assert forward_error(130, H, 200) < 1e-6
    assert executed.programs["resident_kernel"] == 2


def test_stages_32_deep_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at H = 768."""
    monkeypatch.setattr(product, "forced_tile", product.resident_tile(768))
    with executing(90):
        assert forward_error(70, 160, 130, dtype=torch.float16) < 1e-6


def test_five_other_orders_leave_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of warps, and of when copies land."""
    monkeypatch.setattr(product, "forced_tile", few_stages(192))
    monkeypatch.setattr("tests.support.ptx.launch.UNORDERED", ("combine_kernel",))
    with executing(90, orders=5) as executed:
        assert forward_error(70, 192, 200) < 1e-6
    assert executed.programs["resident_kernel"] == 1 and len(executed.compared) == 1


def test_a_block_of_ignored_rows_and_parts_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "forced_tile", few_stages(192))
    with executing(90, shuffle=4, multiprocessors=100) as executed:
        assert forward_error(140, 192, 1028, ignored=128) < 1e-6
    assert executed.programs["resident_kernel"] == 4


# ---- does the executor notice?
# --------------------------------------------------------------------------------------------


def not_waited_for(which: int) -> Change:
    """The wait at an mbarrier of this number, in the order of the text, looks once and goes on."""
    return replaced(r"@!complete bra\.uni waitLoop;", NOTHING, which)


def unsynchronised_arrival(text: str) -> str:
    """A warpgroup gives back a stage when its first warp's product has ended."""
    start = text.rindex("bar.sync", 0, text.rindex("mbarrier.arrive.shared::cta.b64"))
    return text[:start] + NOTHING + text[text.index(";", start) + 1 :]


BREAKAGES: dict[str, Change] = {
    "the hidden states are not waited for": not_waited_for(0),
    "a full stage is not waited for": not_waited_for(1),
    "an empty stage is not waited for": not_waited_for(-1),
    "a stage is given back before its product has ended": replaced(
        r"(wgmma\.wait_group\.sync\.aligned\s+)1;", r"\g<1>2;"
    ),
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
    leaves, target = make_operands(70, 192, 260, torch.bfloat16, CPU, bias=False)
    expected = linear_logprob(*doubled(leaves), target, impl="eager")
    return (*(x.detach() for x in leaves), target, None, PLAIN, -100, False), expected


@pytest.mark.parametrize("name", ["nothing", *BREAKAGES])
def test_what_is_broken_is_noticed(name: str, head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "forced_tile", few_stages(192))
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


# ---- when it runs
# ---------------------------------------------------------------------------------------------------------


def takes(H: int = 64, dtype: torch.dtype = torch.bfloat16, T: int = 70, shift: int = 0) -> bool:
    """Whether the forward pass of these operands is this kernel's."""
    hidden, weight = (torch.empty(n * H + shift, dtype=dtype)[shift:].view(n, H) for n in (T, 130))
    return product.choose_tile(hidden, weight, resident=True).resident


def test_what_it_has_not_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes() and takes(H=768) and takes(dtype=torch.float16)
    for other in (dict(H=776), dict(H=68), dict(T=64), dict(dtype=torch.float32), dict(shift=1)):
        assert not takes(**other), other  # type: ignore[arg-type]
    for capability in (80, 100, 120):
        monkeypatch.setattr(product, "architecture", lambda device, capability=capability: capability)
        assert not takes()


@pytest.mark.parametrize("bias, softcap, asked", [(False, 0.0, True), (True, 0.0, False), (False, 2.0, False)])
def test_bias_and_softcap_do_not_ask_for_it(bias, softcap, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def choose(*_: object, resident: bool = False) -> Tile:
        raise Stop(resident)

    monkeypatch.setattr(kernels, "choose_tile", choose)
    hidden, target = torch.zeros(70, 64, dtype=torch.bfloat16), torch.zeros(70, dtype=torch.int64)
    with pytest.raises(Stop, match=str(asked)):
        kernels.forward(hidden, hidden, target, hidden[:, 0] if bias else None, (1.0, softcap, 1.0), -100, False)


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCRD_FAST_GLUON", "0")
    assert not takes()
    monkeypatch.delenv("QCRD_FAST_GLUON")
    assert not takes()
    monkeypatch.setenv("QCRD_FAST_GLUON", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not takes()
    monkeypatch.setenv("QCRD_FAST_GLUON", "yes")
    with pytest.raises(ValueError, match="QCRD_FAST_GLUON=yes: expected 0 or 1"):
        takes()


@pytest.mark.slow
def test_chunks_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in two parts of four tiles, the last of which is ragged."""
    monkeypatch.setattr(product, "forced_tile", few_stages(64))
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1024 * (2 * 66 + 4 * 64))
    leaves, target = make_operands(66, 64, 1100, torch.bfloat16, CPU, bias=False)
    hidden, weight = (x.detach() for x in leaves)
    g = torch.rand(66, generator=torch.Generator().manual_seed(1)) * (target >= 0)
    truth = torch.autograd.grad(
        (linear_logprob(*(twice := doubled(leaves)), target, impl="eager") * g.double()).sum(), twice
    )
    with executing(90, multiprocessors=4) as executed:
        lse = linear_logprob(*twice, target, impl="eager", return_lse=True).lse.detach().float()
        found = kernels.backward(hidden, weight, target, None, lse, (g, -g, None), PLAIN, (True, True, False))[:2]
    assert max(error(got, want) for got, want in zip(found, truth, strict=True) if got is not None) < 5e-3
    assert executed.programs == {"resident_da_kernel": 3}


def test_other_kernels_have_a_tile_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "forced_tile", product.resident_tile(64))
    operand = torch.zeros(70, 64, dtype=torch.bfloat16)
    assert takes() and not product.choose_tile(operand, operand).resident


@pytest.mark.parametrize("lacks", ["gluon", "warp_specialize"])
def test_a_triton_without_gluon(
    lacks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Triton kernel runs, and `doctor` says why; a benchmark that asks for the tile is told."""
    if lacks == "gluon":
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    else:
        monkeypatch.setattr(
            "triton.experimental.gluon.language.warp_specialize", lambda default_args, default_partition: None
        )
    monkeypatch.delitem(sys.modules, "csrc_triton.linear_logprob_hopper", raising=False)
    monkeypatch.delattr("csrc_triton.linear_logprob_hopper", raising=False)
    product.gluon_obstacle.cache_clear()
    try:
        assert not takes()
        assert entry(["doctor"]) == 0
        said = capsys.readouterr().out
        assert "hopper       no: triton" in said and lacks in said and "the Triton kernel runs" in said
        monkeypatch.setattr(product, "forced_tile", product.resident_tile(64))
        with pytest.raises(ImportError):
            forward_error(70, 64, 130)
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
        forward_error(70, 840, 130)


# ---- on a GPU
# -------------------------------------------------------------------------------------------------------------


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
