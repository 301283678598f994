"""How a Hugging Face model turns its last hidden states into logits: read off the model, and checked against it once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.errors import InputError

DIVIDED_BY_LOGITS_SCALING = ("granite", "minicpm")  # beginnings of model types; others multiply by it
T5_LIKE = ("umt5", "switch_transformers")  # they scale when embeddings are tied, and say so nowhere else


@dataclasses.dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(a / softcap), a = scale * hidden weight^T + bias, with the model's own tensors (not copies)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the ops take beside the weight."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., H], in their type; what the losses never hold."""
        logits = self.scale * torch.nn.functional.linear(hidden, self.weight)
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def read_head(model: Any) -> Head:
    """The head of a Hugging Face language model. Cheap: looks at the configuration and the output embedding.

    Raises `InputError` where there is no output embedding, or where it has an adapter (LoRA) of its own.
    """
    model = unwrapped(model)
    output, config = output_layer(model), model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = str(config.model_type)
    scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
    if scaling := getattr(text, "logits_scaling", None):  # Granite
        scale *= 1 / scaling if kind.startswith(DIVIDED_BY_LOGITS_SCALING) else scaling
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    if getattr(config, "scale_decoder_outputs", kind in T5_LIKE and config.tie_word_embeddings):
        scale *= config.d_model**-0.5
    bias = output.bias if getattr(output, "bias", None) is not None else None
    final_bias = getattr(model, "final_logits_bias", None)  # BART: a buffer [1, V]
    if bias is None and final_bias is not None:
        bias = final_bias[0]
    return Head(output.weight, bias, scale, getattr(text, "final_logit_softcapping", None))


def output_layer(model: Any) -> Any:
    """The module that holds the head's weight; of one that PEFT trains in full (`modules_to_save`), the trained copy.

    Raises `InputError` as `read_head` does.
    """
    model = unwrapped(model)
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if hasattr(output, "modules_to_save"):
        output = output.modules_to_save[output.active_adapter]
    if hasattr(output, "base_layer") or hasattr(output, "token_adapter"):
        raise InputError(
            f"{type(model).__name__}: the output head has an adapter of its own ({type(output).__module__}), which the loss "
            "would leave out; take it out of target_modules, train it in full with modules_to_save, or merge the adapter first"
        )
    if getattr(output, "weight", None) is None:
        raise InputError(
            f"{type(model).__name__} has no output embedding: expected a causal or sequence-to-sequence language model"
        )
    return output


@torch.no_grad()
def check_head(model: Any, head: Head) -> None:
    """Compares the head's logits with the model's own on a few random tokens.

    Raises `InputError` if they differ: this architecture computes its logits in a way that `Head` cannot express.
    """
    outer, model = model, unwrapped(model)
    while hasattr(outer, "_orig_mod"):  # what only shards or adapts the model is kept; nothing is compiled for this
        outer = outer._orig_mod
    head = dataclasses.replace(head, weight=_whole(head.weight), bias=None if head.bias is None else _whole(head.bias))
    hidden: list[Tensor] = []

    def capture(module: Any, inputs: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, (tuple, list)) else output.last_hidden_state)

    device = head.weight.device
    ids = torch.randint(0, len(head.weight), (1, 5), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    handle = body(model).register_forward_hook(capture)
    try:
        with evaluating(model):
            expected = outer(input_ids=ids, **inputs).logits.float()
    finally:
        handle.remove()
    if not hidden or hidden[-1].shape[-1] != head.weight.shape[1]:
        raise InputError(f"{_name(model)} is not supported: its last hidden states could not be read")
    actual = head.logits(hidden[-1].to(head.weight.dtype)).float()
    exact = {head.weight.dtype, hidden[-1].dtype} <= {torch.float32, torch.float64}
    tolerance = 1e-4 if exact else 3e-2
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-12) if actual.shape == expected.shape else torch.inf
    if not error <= tolerance:
        raise InputError(
            f"{_name(model)} is not supported: it computes its logits in another way than "
            f"softcap * tanh((scale * h W^T + bias) / softcap) with scale {head.scale:g} and softcap {head.softcap} "
            f"(relative difference {float(error):.2g}, expected at most {tolerance:g})"
        )


def body(model: Any) -> Any:
    """The module whose output is the hidden states that enter the head: the decoder, or the model without its head."""
    return model.get_decoder() if model.config.is_encoder_decoder else model.base_model


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside DistributedDataParallel, FSDP, torch.compile and PEFT, in whatever order they stand."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", model))
        if inner is model and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is model:
            return model
        model = inner


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _whole(x: Any) -> Tensor:
    """A tensor that FSDP2 shards, gathered."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _name(model: Any) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"
