"""Which library multiplies on a CPU."""

import pytest
import torch

from qcrd_fast.ops import cpu_products


@pytest.mark.parametrize(
    "capability, intel, expected",
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False), ("DEFAULT", False, False)],
)
def test_onednn_is_for_avx512_of_others_than_intel(capability, intel, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_products, "_is_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_products.onednn_is_faster.__wrapped__() == expected
