"""The cost model: its limits by hand, what it counts, and the table in the docs."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest

from bench import model, sass
from bench.cases import HEADS
from bench.model import MACHINE, Work, simulate
from csrc_triton.product import Tile, resident_tile
from tests.support.paths import ROOT

TRITON = "3.9.0"  # which the docs' table was made with
FAST = 1e9  # bytes a clock: the L2 cache is no limit
PLAIN = Work(Tile(128, 128, 64, 8, 3), 1, step_bytes=32768, serial=0, shared=0, refills=False)
STEP = 512.0  # clocks of a step: 128 x 128 x 64 / 2048

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or bool(sass.missing_tools()),
    reason="needs to compile, and triton's nvdisasm",
)


def test_peak() -> None:
    assert MACHINE.peak_tflops == pytest.approx(989.4, rel=1e-3)


def test_products_alone_fill_the_tensor_cores() -> None:
    free = PLAIN._replace(tile=PLAIN.tile._replace(num_stages=4))
    assert simulate(free, 576, FAST) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("programs", [1, 2])
def test_bandwidth_alone_is_a_quotient(programs: int) -> None:
    """A step's 32 KiB at 33.5 bytes a clock take 978 clocks, its product 512: 52.3%, however many share."""
    share = simulate(PLAIN._replace(programs=programs), 4096, 33.5)
    assert share == pytest.approx(STEP / (32768 / 33.5), rel=0.01)


def test_one_program_adds_its_epilogue() -> None:
    """Nine steps are 4,608 clocks; an epilogue of 1,152 has nothing to hide behind."""
    assert simulate(PLAIN._replace(serial=152, shared=1000), 576, FAST) == pytest.approx(4608 / 5760, rel=1e-6)


def test_two_programs_hide_it() -> None:
    assert simulate(PLAIN._replace(serial=152, shared=1000, programs=2), 576, FAST) > 0.99


def test_exponentials_are_taken_in_turns() -> None:
    """Two programs whose exponentials take twice as long as their products: those are the limit."""
    assert simulate(PLAIN._replace(shared=9216, programs=2), 576, FAST) == pytest.approx(0.5, rel=0.02)


def test_a_ring_that_refills_waits_for_the_cache() -> None:
    """700 clocks a tile, as one program has nothing else to do."""
    full = PLAIN._replace(shared=1000)
    share = simulate(full._replace(refills=True), 576, FAST)
    assert share == pytest.approx(4608 / (4608 + 1000 + MACHINE.latency), rel=1e-6) and share < simulate(
        full, 576, FAST
    )


def test_operands_of_the_next_tile_come_during_the_epilogue() -> None:
    """Two of nine steps are there when it ends, so that the tile takes the epilogue and seven loads, not nine."""
    share = simulate(PLAIN._replace(shared=2500), 576, 33.5)
    load = 32768 / 33.5
    assert STEP * 9 / (2500 + 9 * load + MACHINE.latency) < share < STEP * 9 / (2500 + 7 * load)


def test_room_of_a_resident_tile() -> None:
    design = next(design for design in model.DESIGNS if design.variant == "hidden resident")
    assert [design.fits(HEADS[head].H) for head in model.ORDER] == [True, True, True, False]
    assert (
        resident_tile(576)[2:5] == (64, 8, 5)
        and resident_tile(640)[2:5] == (64, 8, 4)
        and resident_tile(768)[2:5] == (32, 8, 4)
    )
    assert (
        resident_tile(64).num_stages == 8 and resident_tile(832).num_stages == 2 and resident_tile(840).num_stages < 2
    )


RING = Work(
    Tile(128, 128, 64, 8, 5, True, resident=True),
    2,
    step_bytes=16384,
    serial=0,
    shared=0,
    refills=False,
    shares_ring=True,
)


def test_a_shared_ring_fills_the_tensor_cores() -> None:
    assert simulate(RING, 576, FAST) == pytest.approx(1, abs=1e-9)
    assert simulate(RING._replace(serial=180, shared=528), 256, FAST) > 0.85


def test_a_shared_ring_is_bound_by_its_round_trip() -> None:
    """Of two stages one is given back behind the issue of the other's product, and a step takes a load and the latency;
    at the end of a tile of nine steps both are."""
    share = simulate(RING._replace(tile=RING.tile._replace(num_stages=2)), 576, 33.5)
    assert share == pytest.approx(512 / (16384 / 33.5 + MACHINE.latency), rel=0.1)


def test_a_shared_ring_is_bound_by_bandwidth() -> None:
    """16 KiB serve 512 clocks of products: at 16 bytes a clock they take 1,024."""
    assert simulate(RING, 576, 16.0) == pytest.approx(0.5, rel=0.02)


def test_a_page_is_updated() -> None:
    table = "| design | H |\n|---|---|\n| new | 2 |\n"
    page = "before\n\n| design | H |\n|---|---|\n| old | 1 |\n| older | 0 |\n\nafter\n"
    assert model.updated(page, table) == f"before\n\n{table}\nafter\n"
    with pytest.raises(ValueError):
        model.updated("nothing", table)


@compiles
def test_epilogue_of_the_default_tile() -> None:
    """64 logits a thread: as many exponentials, and one for each of its two rows; a third of the product's time at H =
    576."""
    work, code = model.counted("plain", Tile(128, 128, 64, 8, 3), True, "smollm2-135m")
    counts = sass.count(code)
    assert counts is not None and counts.by_pipe()[1]["mufu"] == 66 and not work.refills
    assert work.shared == 66 * 8 * 32 / 16 and 0.2 < (work.serial + work.shared) / (9 * STEP) < 0.4


@compiles
@pytest.mark.skipif(version("triton") != TRITON, reason=f"the docs' table is of triton {TRITON}")
@pytest.mark.parametrize("only", ["as launched", "128 x 128, cp.async", pytest.param("", marks=pytest.mark.slow)])
def test_the_docs_have_the_table(only: str) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    head, _, *lines = model.markdown(only).splitlines()
    assert head + "\n" in page and lines
    assert "\n".join(lines) + "\n" in page, "python -m qcrd_fast.bench.model --update docs/kernels.md"
