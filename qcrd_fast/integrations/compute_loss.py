"""The loss as `compute_loss_func` of Hugging Face's Trainer, for a model with its forward unchanged."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.errors import InputError
from qcrd_fast.integrations.attach import rationale_forward, read_settings
from qcrd_fast.integrations.batch_loss import ATTACHED, Settings
from qcrd_fast.losses import QCRDLoss
from qcrd_fast.models.lm_head import hidden_parts, unwrapped

KEPT = ("input_ids", "attention_mask", "decoder_input_ids")  # what the model itself is given of a batch of rationales


def make_compute_loss_func(
    model: Any, loss_fn: QCRDLoss | None = None, *, alpha_pred: float = 0.5, alpha_cl: float = 0.5
) -> ComputeLoss:
    """Return a `compute_loss_func` for `transformers.Trainer` with a `RationaleCollator`, instead of `attach`.

        Trainer(model, args, RationaleCollator(tokenizer, model), rows, compute_loss_func=make_compute_loss_func(model))

    The model's forward is not replaced: hooks take from the batch what the model does not know, and read the hidden
    states that its own call computes. Hence one pass, with gradient through all rationales, and logits of one position
    a sequence where the model can be told so (`logits_to_keep`; T5 cannot, and computes them all); `attach` has two
    passes and never any logits. The head is read outside of the model's forward, so not under FSDP. `remove()` of the
    result takes the hooks out.

    loss_fn, alpha_pred, alpha_cl: as in `attach`, which raises the same errors. N of Eq. 3 is `num_items_in_batch`.
    """
    if hasattr(unwrapped(model), ATTACHED):
        raise InputError("the model computes its loss already: call qcrd_fast.detach(model) first, or leave this out")
    return ComputeLoss(unwrapped(model), read_settings(model, loss_fn, alpha_pred, alpha_cl, two_pass=False))


class ComputeLoss:
    """`compute_loss_func(outputs, labels, num_items_in_batch)` of the batch that the model ran on last."""

    def __init__(self, model: Any, settings: Settings):
        self.model, self.settings = model, settings
        self.short = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.batch: dict[str, Any] | None = None
        self.hidden: Tensor | None = None
        self.lower: torch.dtype | None = None
        self.hooks = [model.register_forward_pre_hook(self._take, with_kwargs=True)]
        self.hooks += [part.register_forward_hook(self._see) for part in hidden_parts(model)]

    def __call__(self, outputs: Any, labels: Any = None, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss [scalar]. Raises `InputError` where the model did not run on a batch of rationales before."""
        batch, hidden = self.batch, self.hidden
        self.batch = self.hidden = None
        if batch is None or hidden is None:
            raise InputError(
                "compute_loss_func: the model has not run on a RationaleCollator's batch since the last call"
            )
        batch = {"num_items_in_batch": num_items_in_batch, **batch}
        settings = dataclasses.replace(self.settings, lower=self.lower)
        loss = rationale_forward(self.model, settings, **batch, hidden=hidden, two_pass=False).loss
        assert loss is not None
        return loss

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self.hooks:
            hook.remove()

    def _take(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Store the rationale batch and pass on the model's own arguments; each sequence has its own prompt copy."""
        self.batch = self.hidden = None
        if "rationale" not in kwargs:
            return None
        self.batch = {
            name: value for name, value in kwargs.items() if name not in ("num_items_in_batch", "return_dict")
        }
        given = {name: kwargs[name] for name in KEPT if name in kwargs}
        if "source" in kwargs:
            given |= {name: given[name].index_select(0, kwargs["source"]) for name in KEPT[:2]}
        return args, {**given, "use_cache": False, **({"logits_to_keep": 1} if self.short else {})}

    def _see(self, module: Any, args: Any, output: Any) -> None:
        if self.batch is not None:
            self.hidden = output[0] if isinstance(output, (tuple, list)) else output.last_hidden_state
            kind = self.hidden.device.type
            self.lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
