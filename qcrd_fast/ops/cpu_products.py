"""Matrix products on a CPU, by the fastest library that torch carries for them.

torch hands fp32 products to MKL, which on processors that are not Intel's runs code for older ones: on an AMD EPYC with
AVX-512 oneDNN took 0.4 of its time (T = C = 2,048, H = 576, one thread). With AVX2 both are equal, so there MKL stays.
So it does on Intel's: oneDNN took 0.9 to 1.7 of MKL's time for what a layer does forward, and 1.1 to 2.9 for the
gradient of its weight (a Xeon with AVX-512, `bench/LOG.md`).
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in their type, accumulated in fp32 (float64 for float64)."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and onednn_is_faster() and a.numel() and b.numel():
        # a copy that the operator would make unseen; here a memory estimate on fake tensors counts it
        return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.T, None, "none", [], "")
    return torch.mm(a, b)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch has oneDNN's fp32 products here, and MKL's are slower."""
    backend = torch.backends.mkldnn
    usable = backend.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return usable and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()  # Windows


@functools.cache
def has_bf16_products(device: torch.device) -> bool:
    """Whether this is a CPU with instructions that multiply bf16 and add in fp32, and torch uses them."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and supported is not None and supported()
