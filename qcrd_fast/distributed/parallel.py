"""Parallel strategies: replicate a model (DDP) or shard it (FSDP2)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qcrd_fast.distributed.comm import SINGLE, Comm

T = TypeVar("T")


class Strategy:
    """Run training passes in one process, with the model unchanged. Base class of the parallel strategies.

    `training(compute)` and `scoring(compute)` call `compute` while the model's weights are gathered. Multiply the loss
    that `training` returns by `scale` before the backward pass.
    """

    sharded = False

    def __init__(self, model: Any, comm: Comm = SINGLE):
        self.model, self.comm, self.scale = model, comm, float(comm.size)

    def training(self, compute: Callable[[], T]) -> T:
        return compute()

    def scoring(self, compute: Callable[[], T]) -> T:
        return compute()

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Context for a micro-batch's forward and backward passes; gradients are all-reduced in the `last` one of a
        step."""
        yield

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather all parameters on every rank; forward passes inside communicate nothing."""
        yield

    def weights(self) -> dict[str, Tensor]:
        """Return the model's state dict. Call it inside `unsharded`."""
        return self.model.state_dict()  # type: ignore[no-any-return]

    def most(self, runs: int) -> int:
        """Return how often every rank must run the model in this pass, if this rank has work for `runs` runs."""
        return runs


class DDPStrategy(Strategy):
    """Replicate the model on every rank and average gradients (DistributedDataParallel).

    DDP rebuilds its buckets after the first pass unless it searches for unused parameters. With three or more ranks the
    order of a sum follows the buckets, and a resumed run has another first pass than an uninterrupted one. So with more
    than two ranks it searches.
    """

    def __init__(self, model: Any, comm: Comm):
        super().__init__(model, comm)
        known = inspect.signature(DistributedDataParallel).parameters  # torch renamed the option
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {option: False, "find_unused_parameters": comm.size > 2 or has_unused(model)}
        self._ddp = DistributedDataParallel(_Pass(model), **options)

    def training(self, compute: Callable[[], T]) -> T:
        return self._ddp(compute)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield


class FSDPStrategy(Strategy):
    """Shard parameters, gradients and optimizer state over ranks (FSDP2, `fully_shard`).

    Each block is gathered for its own call, the rest for the whole pass. Every rank must run the model equally often.
    """

    sharded = True

    def __init__(self, model: Any, comm: Comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(model, comm)
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (comm.size,))
        self._pass = _Pass(model)
        self._units = [*blocks_of(model), self._pass]
        for unit in self._units:
            fully_shard(unit, mesh=mesh)
        self._root: Any = self._pass

    def training(self, compute: Callable[[], T]) -> T:
        return self._root(compute)  # type: ignore[no-any-return]

    scoring = training

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        units: list[Any] = [self._root, *self._units[:-1]]
        try:
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not self._root, recurse=False)
                unit.reshard()

    def weights(self) -> dict[str, Tensor]:
        # state_dict() would shard them
        found = {n: p.detach() for n, p in self.model.named_parameters(remove_duplicate=False)}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}".lstrip(".")] = buffer
        return found

    def most(self, runs: int) -> int:
        return self.comm.max(runs)


class _Pass(nn.Module):
    """Wrap a model so that DDP and FSDP see one forward call a pass: forward runs the given function."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the model's repeated blocks, inner ones first.

    These are the modules that `_no_split_modules` names, else the members of the longest `ModuleList`.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    if found := [module for module in model.modules() if type(module).__name__ in names]:
        return found[::-1]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def has_unused(model: Any) -> bool:
    """Run two tokens forward and backward; return whether a trainable parameter got no gradient."""
    ids_BL = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {}
    model(input_ids=ids_BL, use_cache=False, **inputs).logits.sum().backward()
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return unused


def make_strategy(model: Any, comm: Comm, sharded: bool) -> Strategy:
    """Return the strategy for a model that every rank has loaded. A sharded model must run through it from then on."""
    if comm.size == 1:
        return Strategy(model)
    return FSDPStrategy(model, comm) if sharded else DDPStrategy(model, comm)


def unshard(x: Tensor) -> Tensor:
    """Gather a parameter or norm that FSDP2 shards. Every rank must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[no-any-return]


def like(x: Tensor, parameter: Any) -> Tensor:
    """Move `x` to the device of `parameter`, and shard it in the same way."""
    x = x.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
