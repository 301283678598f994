"""Linear layers on a CPU, by the faster of the libraries that torch carries (`ops/cpu_products.py`).

Suffixes: N rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qcrd_fast.ops.cpu_products import onednn_is_faster, product

LEAST_PRODUCT = 3_000_000  # N I O below which the calls cost more than the product gains (measured on an AMD EPYC)


def use_fast_products(model: nn.Module) -> None:
    """Replace plain `nn.Linear` by `CPULinear` where that is faster on this CPU. Weights and names stay."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CPULinear


class CPULinear(nn.Linear):
    """`nn.Linear` that uses oneDNN for large fp32 products on a CPU, and torch otherwise.

    Values and gradients are those of `nn.Linear` within the rounding of fp32, the same each time; they can be
    differentiated once.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            torch.compiler.is_compiling()
            or not (input.dtype == weight.dtype == torch.float32 and input.device.type == weight.device.type == "cpu")
            or not (type(input) is Tensor and type(weight) in (Tensor, nn.Parameter))
            or input.numel() * self.out_features < LEAST_PRODUCT
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        output: Tensor = _Linear.apply(input, weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight_OI)
        output_NO = product(input.reshape(-1, input.shape[-1]), weight_OI.T)
        if bias_O is not None:
            output_NO += bias_O
        return output_NO.view(*input.shape[:-1], len(weight_OI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight_OI = ctx.saved_tensors
        doutput_NO = doutput.reshape(-1, doutput.shape[-1])
        need_input, need_weight, need_bias = ctx.needs_input_grad
        dinput = product(doutput_NO, weight_OI).view_as(input) if need_input else None
        dweight_OI = product(doutput_NO.T, input.reshape(-1, input.shape[-1])) if need_weight else None
        return dinput, dweight_OI, doutput_NO.sum(0) if need_bias else None
