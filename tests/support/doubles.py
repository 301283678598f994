"""What is said of exact numbers is tested in float64, whose rounding is far below any tolerance whatever the processor,
the number of threads or the batch. Models and the library name fp32 in places; here such a place gets float64 as
well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # bytes of a file, or the bits of a number, which are taken as those of an fp32 one
        if func is torch.Tensor.view:
            args = (args[0].to(torch.float32), *args[1:]) if args[1:] == (torch.int32,) else args
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        for x in args:  # few name it, and this is called for every shape that is read
            if x is torch.float32:
                args = tuple(torch.float64 if x is torch.float32 else x for x in args)
                break
        if not kwargs:
            return func(*args)
        return func(*args, **{name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()})


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """In this thread new tensors and models are float64, also where fp32 is asked for; half types stay what they
    are."""
    before, read, run = (
        torch.get_default_dtype(),
        PreTrainedModel.from_pretrained.__func__,
        torch.autograd._engine_run_backward,
    )

    def load(*args: Any, **options: Any) -> Any:
        options.update({"dtype": torch.float64} if options.get("dtype") == torch.float32 else {})
        found = read(*args, **options)
        (found[0] if isinstance(found, tuple) else found).double()
        return found

    def run_widened(*args: Any, **options: Any) -> Any:  # for what checkpointing computes again
        with _Widened():
            return run(*args, **options)

    torch.set_default_dtype(torch.float64)
    try:
        with (
            _Widened(),
            mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load)),
            mock.patch.object(torch.autograd, "_engine_run_backward", run_widened),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
