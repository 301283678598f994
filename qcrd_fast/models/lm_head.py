"""Read how a Hugging Face model computes logits from its last hidden states, and verify it once."""

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
    """The head: logits = softcap * tanh(a / softcap), a = scale * hidden weight^T + bias, on the model's own
    tensors."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options for the ops, beside the weight."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}

    def first(self, rows: int) -> Head:
        """The head of the first tokens of the vocabulary alone."""
        if rows == len(self.weight):
            return self
        return dataclasses.replace(
            self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows]
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., H], in their type; what the losses never hold."""
        logits = self.scale * torch.nn.functional.linear(hidden, self.weight)
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def read_head(model: Any) -> Head:
    """Read the head of a language model. Cheap: uses the configuration and the output embedding.

    Of a head inside PEFT it is the weight and bias of the layer that answers as things stand (`plain_layer`).

    Raises `InputError` where there is no output embedding, or where it has an active adapter (LoRA) of its own.
    """
    model = unwrapped(model)
    output, config = plain_layer(output_layer(model)), model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = str(config.model_type)
    scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere
    if scaling := getattr(text, "logits_scaling", None):  # Granite
        scale *= 1 / scaling if kind.startswith(DIVIDED_BY_LOGITS_SCALING) else scaling
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    if getattr(config, "scale_decoder_outputs", kind in T5_LIKE and config.tie_word_embeddings):
        scale *= config.d_model**-0.5
    bias = getattr(output, "bias", None)
    final_bias = getattr(model, "final_logits_bias", None)  # BART: a buffer [1, V]
    if bias is None and final_bias is not None:
        bias = final_bias[0]
    return Head(output.weight, bias, scale, getattr(text, "final_logit_softcapping", None))


def output_layer(model: Any) -> Any:
    """Return the module that computes the logits, also inside PEFT and FSDP1 wrappers."""
    model = unwrapped(model)
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(output, torch.nn.Module):
        raise InputError(
            f"{type(model).__name__} has no output embedding: expected a causal or sequence-to-sequence language model"
        )
    return output


def plain_layer(output: Any) -> Any:
    """Return the layer whose weight currently computes the logits.

    PEFT decides: for `modules_to_save` the active adapter's copy or the original; for a head with LoRA that is
    disabled, merged or inactive, the base layer.

    Raises `InputError` where an active adapter adds to the logits, or where there is no weight.
    """
    while True:
        inside = output._modules
        if wrapped := inside.get("_fsdp_wrapped_module") or inside.get("_checkpoint_wrapped_module"):
            output = wrapped
        elif "modules_to_save" in inside:
            active = _active_adapters(output)
            original = (
                output.disable_adapters or not active or any(name not in output.modules_to_save for name in active)
            )
            output = output.original_module if original else output.modules_to_save[active[0]]
        elif "token_adapter" in inside:
            output = output.token_adapter
        elif "base_layer" in inside:
            here = getattr(output, "_get_available_adapters", lambda output=output: _active_adapters(output))()
            if not (output.disable_adapters or output.merged) and any(
                name in here for name in _active_adapters(output)
            ):
                raise InputError(
                    f"the output head has an adapter of its own ({type(output).__module__}), which the loss would "
                    "leave out; take it out of target_modules, train it in full with modules_to_save, or merge the "
                    "adapter first"
                )
            output = output.base_layer
        else:
            break
    if getattr(output, "weight", None) is None:
        raise InputError(f"the output head ({type(output).__name__}) has no weight of its own")
    return output


def _active_adapters(layer: Any) -> list[str]:
    active = layer.active_adapter
    return [active] if isinstance(active, str) else list(active)


def check_readable(model: Any) -> None:
    """Raise `InputError`, on every rank alike, if the head's weight is missing or partial."""
    name = type(unwrapped(model)).__name__
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise InputError(f"{name} is sharded by FullyShardedDataParallel (FSDP1): call this before wrapping it")
    weight = read_head(model).weight
    if weight.is_meta:
        raise InputError(
            f"{name}: the output head is on the meta device; call this after the weights are there (from_pretrained, "
            "or to_empty and initialising), and keep the head out of offloading (device_map)"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise InputError(
            f"{name}: the output head's weight is {list(weight.shape)}, as ZeRO-3 and FSDP1 leave it between calls; "
            "call this before the model is sharded"
        )
    fsdp2 = any(hasattr(module, "set_reshard_after_forward") for module in model.modules())
    if hasattr(weight, "full_tensor") and not fsdp2:
        raise InputError(
            f"{name}: the output head is split over ranks by tensor parallelism, which is not supported; leave it out "
            "of the plan (tp_plan, parallelize_module)"
        )


@torch.no_grad()
def check_head(model: Any, head: Head) -> torch.dtype | None:
    """Compare the head's logits with the model's own on a few random tokens.

    Returns the type that the model's forward autocasts to by itself (Accelerate's mixed precision), or None.

    Raises `InputError` if they differ: this architecture computes its logits in a way that `Head` cannot express.
    """
    check_readable(model)
    outer, model = model, unwrapped(model)
    while hasattr(outer, "_orig_mod"):  # what only shards or adapts the model is kept; nothing is compiled for this
        outer = outer._orig_mod
    head = dataclasses.replace(head, weight=_whole(head.weight), bias=None if head.bias is None else _whole(head.bias))
    hidden: list[Tensor] = []
    lower: torch.dtype | None = None

    def capture(module: Any, inputs: Any, output: Any) -> None:
        nonlocal lower
        hidden.append(output[0] if isinstance(output, (tuple, list)) else output.last_hidden_state)
        lower = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

    device = head.weight.device
    ids = torch.randint(0, len(head.weight), (1, 5), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    handles = [part.register_forward_hook(capture) for part in hidden_parts(model)]
    try:
        with eval_mode(model):
            expected = outer(input_ids=ids, **inputs).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    if not hidden or hidden[-1].shape[-1] != head.weight.shape[1]:
        raise InputError(f"{_name(model)} is not supported: its last hidden states could not be read")
    if expected.shape[-1] > len(head.weight):
        raise InputError(
            f"{_name(model)}: the output head holds {len(head.weight)} rows of {expected.shape[-1]} logits; a "
            "vocabulary split by tensor parallelism is not supported"
        )
    with torch.autocast(device.type, dtype=lower, enabled=lower is not None):
        actual = head.logits(hidden[-1].to(head.weight.dtype)).float()
    exact = lower is None and {head.weight.dtype, hidden[-1].dtype} <= {torch.float32, torch.float64}
    tolerance = 1e-4 if exact else 3e-2
    error = (
        (actual - expected).norm() / expected.norm().clamp(min=1e-12) if actual.shape == expected.shape else torch.inf
    )
    if not error <= tolerance:
        raise InputError(
            f"{_name(model)} is not supported: it computes its logits in another way than "
            f"softcap * tanh((scale * h W^T + bias) / softcap) with scale {head.scale:g} and softcap {head.softcap} "
            f"(relative difference {float(error):.2g}, expected at most {tolerance:g})"
        )
    return None if torch.is_autocast_enabled(device.type) else lower


def backbone(model: Any) -> Any:
    """Return the module whose output enters the head: the decoder, or the model without its head.

    Raises `InputError` for a model of whole models (`EncoderDecoderModel`), whose decoder has the head inside.
    """
    found = model.base_model
    if model.config.is_encoder_decoder:
        found = model.get_decoder()
    elif found is model:  # Llama 4's text model names an attribute as its base that it has not
        found = getattr(model, "model", model)
    if found is model or getattr(found, "lm_head", None) is not None or model.config.model_type == "encoder-decoder":
        raise InputError(f"{_name(model)} is not supported: no part of it gives the hidden states that enter its head")
    return found


def hidden_parts(model: Any) -> set[Any]:
    """Return the modules of which the last to return gives the hidden states that enter the head.

    These are the backbone and the module that it wraps: OPT calls its decoder directly.
    """
    return {backbone(model), model.get_decoder() if hasattr(model, "get_decoder") else backbone(model)} - {model}


def unwrapped(model: Any) -> Any:
    """Return the Hugging Face model inside DistributedDataParallel, FSDP, torch.compile and PEFT, in any order."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", model))
        if inner is model and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is model:
            return model
        model = inner


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Set eval mode; restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _whole(x: Any) -> Tensor:
    """Gather a tensor that FSDP2 shards."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _name(model: Any) -> str:
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"
