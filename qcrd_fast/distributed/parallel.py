"""How one model is trained by several processes: replicated (DDP) or sharded (FSDP2)."""

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
    """How a training pass runs on the ranks: here in one process, the model as it is.

    `training(compute)` and `scoring(compute)` call `compute`, with the model's weights whole inside; the loss that
    `training` returns is to be multiplied by `scale` before its backward pass.
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
        """Around a micro-batch's forward and backward passes; gradients are summed over ranks in the `last` one of a
        step."""
        yield

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside, the model's parameters are whole on every rank and its forward passes send nothing."""
        yield

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict; to be called within `unsharded`."""
        return self.model.state_dict()  # type: ignore[no-any-return]

    def most(self, runs: int) -> int:
        """How often the model is to run in this pass, where this rank has work for `runs` times."""
        return runs


class DDPStrategy(Strategy):
    """Every rank has the whole model; gradients are averaged over ranks (DistributedDataParallel).

    DDP lays out its buckets anew behind the first pass, unless it looks for unused parameters. Three ranks or more add
    in an order that follows the layout, so there it looks: a run that is resumed has another first pass than the
    unbroken one.
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
    """Every rank has a share of each parameter, its gradient and its optimizer state (FSDP2, `fully_shard`).

    Each block of the model is gathered for its own call, the rest for the pass. All ranks must run the model equally
    often.
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
    """A model whose forward is whatever is to be computed with it, so that DDP and FSDP see one call a pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def blocks_of(model: Any) -> list[nn.Module]:
    """The model's repeated blocks, inner ones first: what its class names as not to be split, else the members of its
    longest module list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    if found := [module for module in model.modules() if type(module).__name__ in names]:
        return found[::-1]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def has_unused(model: Any) -> bool:
    """Whether parameters that are to be trained have no part in the model's output, found by a pass over two tokens."""
    ids_BL = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {}
    model(input_ids=ids_BL, use_cache=False, **inputs).logits.sum().backward()
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return unused


def make_strategy(model: Any, comm: Comm, sharded: bool) -> Strategy:
    """The engine for a model that every rank has loaded; from here on a sharded model runs through it alone."""
    if comm.size == 1:
        return Strategy(model)
    return FSDPStrategy(model, comm) if sharded else DDPStrategy(model, comm)


def unshard(x: Tensor) -> Tensor:
    """A parameter or norm that FSDP2 shards, gathered; every rank has to call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[no-any-return]


def like(x: Tensor, parameter: Any) -> Tensor:
    """`x` where `parameter` is: on its device, and of a sharded one this rank's share."""
    x = x.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
