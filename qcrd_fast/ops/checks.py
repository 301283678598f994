"""Checks of the ops' arguments, without a host sync."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from qcrd_fast.ops.reference import HeadOptions, accumulation_dtype

INFINITY = float("inf")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,
    ignore_index: int,
    of: str = "",
) -> tuple[Tensor, Tensor, HeadOptions]:
    """Check and return hidden [T, H] in its product type, target [T] int64, and the head's options.

    A temperature for each token becomes [T, 1] in the options. `of`: what the names of hidden, weight, bias, scale and
    softcap begin with in messages.
    """
    given = {f"{of}hidden": hidden, f"{of}weight": weight, "target": target}
    require_tensors(**given, **({} if bias is None else {f"{of}bias": bias}))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            require_unsharded(of + name, x, hidden.device)
    require_constants(**{f"{of}scale": scale, f"{of}softcap": softcap, "temperature": temperature})
    H, V = hidden.shape[-1], weight.shape[0]
    require(hidden.is_floating_point(), lambda: f"{of}hidden must be floating point, got {hidden.dtype}")
    require(weight.is_floating_point(), lambda: f"{of}weight must be floating point, got {weight.dtype}")
    require(
        weight.dim() == 2 and weight.shape[1] == H,
        lambda: f"{of}weight must be [V, {H}] to match {of}hidden {list(hidden.shape)}, got {list(weight.shape)}",
    )
    require(
        target.shape == hidden.shape[:-1],
        lambda: f"target must be {list(hidden.shape[:-1])} to match {of}hidden, got {list(target.shape)}",
    )
    require(target.dtype in (torch.int64, torch.int32), lambda: f"target must be int64 or int32, got {target.dtype}")
    require(
        bias is None or bias.shape == (V,),
        lambda: f"{of}bias must be [{V}] to match {of}weight, got {list(bias.shape) if bias is not None else None}",
    )
    require(
        all(x is None or x.device == hidden.device for x in (weight, target, bias)),
        lambda: f"{of}weight, target and {of}bias must be on {hidden.device} with {of}hidden",
    )
    require(is_finite(scale), lambda: f"{of}scale must be finite, got {scale}")
    require(
        softcap is None or 0 < softcap < INFINITY,
        lambda: f"{of}softcap must be above 0 and finite, or None, got {softcap}",
    )
    hidden_TH, target_T = hidden.reshape(-1, H), target.reshape(-1).long()
    require(
        ((target_T == ignore_index) | ((target_T >= 0) & (target_T < V))).all(),
        lambda: (
            f"target must lie in [0, {V}) or be ignore_index {ignore_index}, got {int(target.min())} to "
            f"{int(target.max())}"
        ),
    )
    operand_TH = hidden_TH.to(product_type(hidden))
    return (
        operand_TH,
        target_T,
        HeadOptions(float(scale), float(softcap or 0), _temperature(temperature, target, operand_TH)),
    )


def _temperature(temperature: float | Tensor, target: Tensor, hidden_TH: Tensor) -> float | Tensor:
    """Return the temperature as a number, or per token [T, 1] in the type of the logits."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        require(0 < temperature < INFINITY, lambda: f"temperature must be above 0 and finite, got {temperature}")
        return float(temperature)
    require(
        temperature.shape == target.shape and temperature.device == target.device,
        lambda: f"temperature must be a number or {list(target.shape)} to match target, got {list(temperature.shape)}",
    )
    require(
        ((temperature > 0) & temperature.isfinite()).all(),
        lambda: (
            f"temperature must be above 0 and finite, got {float(temperature.min()):g} to {float(temperature.max()):g}"
        ),
    )
    return temperature.reshape(-1, 1).to(accumulation_dtype(hidden_TH.dtype))


def is_finite(x: float) -> bool:
    """`math.isfinite` that torch.compile can trace for a dynamic number."""
    return -INFINITY < x < INFINITY


def require_constants(**arguments: object) -> None:
    """Raise `ValueError` naming the first argument that requires a gradient but would get none."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name} must be a constant: it requires grad, but no gradient for it is computed; detach it"
            )


def require_no_tangent(*arguments: Tensor | None) -> None:
    """Raise `ValueError` under forward-mode AD, where tangents would silently be 0."""
    if torch.compiler.is_compiling():
        return
    for x in arguments:
        if x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError("forward-mode AD is not supported: use reverse mode (backward), or impl='eager'")


def product_type(hidden: Tensor) -> torch.dtype:
    """Return the type in which hidden states are multiplied with the head: their own, or autocast's."""
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype


def require_unsharded(name: str, x: Tensor, device: torch.device) -> None:
    """Raise `ValueError` for a shard (a DTensor) or a weight that FSDP, ZeRO-3 or offloading has emptied."""
    if hasattr(x, "full_tensor"):
        kind = "a DTensor, one rank's shard (of FSDP2; of tensor parallelism, give `to_local()` and the process_group)"
    elif x.numel() == 0:
        kind = "empty, as FSDP and ZeRO-3 leave it between calls"
    elif x.is_meta and device.type != "meta":
        kind = "on the meta device, as offloading leaves it between calls"
    else:
        return
    raise ValueError(
        f"{name} is {kind}; it is whole only inside the model's own forward, where qcrd_fast.attach runs the loss"
    )


def require_tensors(**arguments: object) -> None:
    """Raise `TypeError` naming the first argument that is not a tensor."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {'None' if x is None else type(x).__name__}")


def require(condition: Tensor | bool, message: Callable[[], str]) -> None:
    """Raise `ValueError` unless true. A GPU value is asserted on the device, without a host sync.

    Not checked under torch.compile.
    """
    if not isinstance(condition, Tensor):
        if not condition:
            raise ValueError(message())
    elif torch.compiler.is_compiling() or isinstance(condition, FakeTensor):  # which has no values
        return
    elif condition.is_cuda:
        torch._assert_async(condition, "qcrd_fast: a value is out of range; run on the CPU to see which")
    elif not bool(condition):
        raise ValueError(message())
