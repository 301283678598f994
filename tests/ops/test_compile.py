"""What the kernels compile to for GPUs that are not here: matrix instructions, shared memory, no spills."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from csrc_triton.product import choose_tile, programs_at_once
from tests.support.paths import ROOT, SUPPORT

MATRIX = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
SHARED_KIB = 99  # of the smallest of them, so that one configuration fits all
MULTIPROCESSOR_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
GROUPS = ((80, 86, 120), (90,), (100, 89))  # a process each: as much work in one as in another


def compile_group(capabilities):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "kernel_compiler.py"), *map(str, capabilities)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cases():
    with ThreadPoolExecutor(2) as pool:
        return [case for group in pool.map(compile_group, GROUPS) for case in group]


def describe(case):
    return f"{case['kernel']} sm_{case['capability']} {case['dtype']} {case['flags']} {case.get('rows', '')}: {case}"


def test_matrix_instructions(cases):
    hot = [c for c in cases if c["kernel"] in ("forward_kernel", "da_kernel", "product_kernel") and c["dtype"] != "fp32"]
    assert {c["capability"] for c in hot if c["kernel"] == "forward_kernel"} == set(MATRIX)
    for case in hot:
        assert case["matrix"] == [MATRIX[case["capability"]]], describe(case)


def test_shared_memory_fits_every_gpu(cases):
    for case in cases:
        assert case["shared"] <= SHARED_KIB * 1024, describe(case)


def test_nothing_spills(cases):
    for case in cases:
        assert case["stack"] == 0, describe(case)


def programs(case):
    """That a multiprocessor holds at once, by registers (given in units of 8 a thread) and by shared memory."""
    registers = 65536 // (case["threads"] * ((case["registers"] + 7) // 8 * 8))
    return min(registers, MULTIPROCESSOR_KIB[case["capability"]] * 1024 // (case["shared"] + 1024))


def test_as_many_programs_share_a_multiprocessor_as_the_launchers_count_on(cases):
    """On an H100 a second program's products hide the first one's exponentials."""
    plain = [c for c in cases if c["kernel"] == "forward_kernel" and c["dtype"] == "bf16" and not c["flags"]]
    assert {c["capability"] for c in plain} == set(MATRIX) and {c["rows"] for c in plain} == {32, 4096}
    for case in plain:
        expected = programs_at_once(choose_tile(torch.bfloat16, case["rows"]), case["capability"])
        assert programs(case) == expected or (case["rows"] == 32 and programs(case) >= expected), describe(case)


def test_descriptors_use_the_copy_engine(cases):
    fetched = [c for c in cases if c["kernel"] == "forward_kernel" and c["flags"].get("DESCRIPTORS")]
    assert {c["capability"] for c in fetched} == {90, 100}
    for case in fetched:
        assert case["copy_engine"], describe(case)
