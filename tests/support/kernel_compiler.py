"""Compiles the kernels for GPUs that are not here, and prints one JSON object a kernel: what `ops/test_compile.py` judges.

Usage: python kernel_compiler.py 80 90 ... in a process where TRITON_INTERPRET is not set.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton import contrastive, linear_logprob, linear_sample, product

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT64 = (
    "key_ptr",
    "counter_ptr",
    "entry_ptr",
    "token_ptr",
    "target_ptr",
    "offset_ptr",
    "count_ptr",
    "question_ptr",
    "order_ptr",
    "end_ptr",
    "rationale_ptr",
)
INT32 = ("group_ptr",)
BYTES = ("valid_ptr", "positive_ptr", "active_ptr")
FLOATS = ("scale", "inverse_softcap", "slope", "delta")
DIVISIBLE = ("H", "pitch", "first_col", "part_size")  # by 16, as they are at every size that matters
DIVISIBLE_IF_EVEN = ("V", "last_col")  # as those of every real head


def compile_kernel(kernel, capability, dtype, constants, num_warps=4, num_stages=3):
    """{"shared": bytes, "registers", "stack": bytes spilled, "matrix": instructions}."""
    names = kernel.arg_names
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif constants.get("DESCRIPTORS") and name in ("hidden_ptr", "weight_ptr"):
            rows = constants["BLOCK_T" if name == "hidden_ptr" else "BLOCK_V"]
            signature[name] = f"tensordesc<{dtype}[{rows}, {constants['BLOCK_H']}]>"
        elif name in ("hidden_ptr", "weight_ptr", "bias_ptr", "da_ptr", "kept_ptr"):
            signature[name] = "*" + dtype
        elif name.endswith("_ptr"):
            signature[name] = "*i64" if name in INT64 else "*i32" if name in INT32 else "*i8" if name in BYTES else "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        divisible = name.endswith("_ptr") or name in DIVISIBLE or (name in DIVISIBLE_IF_EVEN and constants.get("EVEN_V"))
        if name not in constants and signature[name][0] != "t" and divisible:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attrs)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(num_warps=num_warps, num_stages=num_stages, **product.LAUNCH))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = dict(item.split(":") for item in usage.stdout.split() if item.count(":") == 1 and item[-1] != ":")
    return {
        "threads": 32 * num_warps,
        "shared": compiled.metadata.shared,
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]) + int(used["LOCAL"]),
        "copy_engine": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "matrix": [m for m in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if m in compiled.asm["ptx"]],
    }


def linear_cases(capability, dtype, rows=4096, tile=None, **flags):
    """The matrix kernels as the launchers would start them; `flags` differ from those of a plain head of even sizes."""
    tile = tile or product.choose_tile(DTYPES[dtype], rows)
    blocks = dict(BLOCK_T=tile.block_t, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h)
    plain = dict(HAS_BIAS=False, HAS_SCALE=False, HAS_SOFTCAP=False, EVEN_H=True, EVEN_V=True)
    plain |= dict(DESCRIPTORS=False, KEEP=False)
    for kernel, extra in ((linear_logprob.forward_kernel, "WANT_ENTROPY"), (linear_logprob.da_kernel, "HAS_PROBLOG")):
        constants = {**blocks, **plain, extra: False, **{k: v for k, v in flags.items() if k in (*plain, extra)}}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        absent = {"bias_ptr": not constants["HAS_BIAS"], "problog_ptr": not constants.get("HAS_PROBLOG")}
        absent |= {"kept_ptr": not constants.get("KEEP"), "kept_max_ptr": not constants.get("KEEP")}
        constants.update({name: None for name, gone in absent.items() if gone and name in kernel.arg_names})
        result = compile_kernel(kernel, capability, dtype, constants, tile.num_warps, tile.num_stages)
        yield {"kernel": kernel.__name__, "capability": capability, "dtype": dtype, "rows": rows, "flags": flags, **result}


def sample_cases(capability, rows):
    """The kernels that draw tokens, for as many rows; SmolLM2's vocabulary, top-k 50, and Gemma's groups."""
    plain = dict(HAS_BIAS=False, HAS_SCALE=False, HAS_SOFTCAP=False, bias_ptr=None, GROUP=linear_sample.GROUP)
    for noisy, grouped in ((True, False), (True, True), (False, False)):
        tile = linear_sample.choose_sample_tile(torch.bfloat16, rows, grouped)
        blocks = dict(BLOCK_T=tile.block_t, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, EVEN_H=True, EVEN_V=True)
        blocks["DESCRIPTORS"] = False
        flags = dict(NOISY=noisy, GROUPED=grouped)
        constants = {**plain, **blocks, **flags}
        result = compile_kernel(linear_sample.product_kernel, capability, "bf16", constants, tile.num_warps, tile.num_stages)
        yield {"kernel": "product_kernel", "capability": capability, "dtype": "bf16", "rows": rows, "flags": flags, **result}
    blocks = [linear_sample._block(n) for n in (49152 // 32, 262144 // 32, 50 * 32)]
    cases = [
        (linear_sample.select_kernel, dict(blocks[0])),
        (linear_sample.select_kernel, dict(blocks[1])),
        (linear_sample.gather_kernel, dict(plain, BLOCK_H=128)),
        (linear_sample.pick_kernel, dict(blocks[2], GROUP=linear_sample.GROUP)),
    ]
    for kernel, constants in cases:
        warps = constants.pop("num_warps", 4)
        result = compile_kernel(kernel, capability, "bf16", constants, warps)
        yield {"kernel": kernel.__name__, "capability": capability, "dtype": "bf16", "flags": constants, **result}


def small_cases(capability):
    flags = dict(HAS_BIAS=True, HAS_SCALE=True, HAS_SOFTCAP=True)
    selects = [("min", "max"), ("softmin", "max"), ("wmean", "max-active"), ("sampling", "mean")]
    cases = [
        (linear_logprob.combine_kernel, dict(**flags, BLOCK_T=16, BLOCK_H=128, WANT_ENTROPY=True)),
        (linear_logprob.combine_kernel, dict(**flags, BLOCK_T=16, BLOCK_H=128, WANT_ENTROPY=False)),
        (linear_logprob.kept_kernel, dict(BLOCK_T=32, BLOCK_V=128)),
        (contrastive.mean_kernel, dict(HAS_VALID=True, BLOCK=512)),
        (contrastive.backward_kernel, dict(HAS_VALID=True, BLOCK=1024)),
        *[(contrastive.question_kernel, dict(POSITIVE=p, NEGATIVE=n, HAS_QUALITY=True, BLOCK=32)) for p, n in selects],
    ]
    for kernel, constants in cases:
        warps = 1 if kernel is contrastive.question_kernel else 4
        result = compile_kernel(kernel, capability, "bf16", constants, warps)
        yield {"kernel": kernel.__name__, "capability": capability, "dtype": "bf16", "flags": constants, **result}


def cases(capability):
    everything = dict(HAS_BIAS=True, HAS_SCALE=True, HAS_SOFTCAP=True, EVEN_H=False, EVEN_V=False)
    yield from linear_cases(capability, "bf16")
    if capability in (80, 90, 100):
        yield from linear_cases(capability, "bf16", **everything)
        yield from linear_cases(capability, "bf16", KEEP=True)
    if capability in (80, 90):
        yield from linear_cases(capability, "fp32")
    if capability in (80, 90, 120):
        yield from linear_cases(capability, "bf16", rows=32)
    if capability in (90, 100):  # not the default: what `bench/tuning.py` times beside it
        tile = product.Tile(64, 128, 64, 4, 3) if capability == 90 else product.choose_tile(torch.bfloat16, 4096)
        yield from linear_cases(capability, "bf16", tile=tile, DESCRIPTORS=True)
    if capability == 90:
        yield from linear_cases(capability, "bf16", HAS_SOFTCAP=True)  # Gemma
        yield from linear_cases(capability, "bf16", WANT_ENTROPY=True, HAS_PROBLOG=True)
        yield from linear_cases(capability, "fp16", rows=1)
        yield from small_cases(capability)
    if capability in (80, 90, 120):
        yield from sample_cases(capability, rows=256 if capability == 90 else 64)


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for case in cases(capability):
            print(json.dumps(case), flush=True)
