"""The loss inside a model's own forward.

Wrappers (DDP, FSDP2, torch.compile, PEFT, a trainer) see one ordinary forward call, and a sharded head is gathered when
the loss reads it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcrd_fast.errors import InputError
from qcrd_fast.integrations.batch_loss import (
    ATTACHED,
    IGNORE,
    Batch,
    RationaleOutput,
    Settings,
    answers_rationales,
    batch_loss,
)
from qcrd_fast.losses import QCRDLoss
from qcrd_fast.models.lm_head import check_head, check_readable, read_head, unwrapped
from qcrd_fast.ops.checks import require

Model = TypeVar("Model")


def attach(
    model: Model,
    loss_fn: QCRDLoss | None = None,
    *,
    alpha_pred: float = 0.5,
    alpha_cl: float = 0.5,
    two_pass: bool = True,
) -> Model:
    """Make a Hugging Face model compute the loss of a `RationaleCollator`'s batch: `model(**batch).loss`.

        model = attach(AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-small"))

    The result is the same object. Its forward is as before, except that a batch with `rationale` in it is answered with
    a `RationaleOutput` instead of logits: L = alpha_pred L_pred + alpha_cl L_cl (Eq. 8 without the discriminator's
    term). `N` of Eq. 3 is `num_items_in_batch` (which Hugging Face's trainers pass, and which counts questions here),
    else `num_questions`.

    loss_fn: default `QCRDLoss.for_model(model)`: beta 0.2, delta 3 nats/token. two_pass: with gradient, score all
    rationales first and train those selected (`score_then_train`); otherwise one pass, with gradient through all of
    them. Without gradient it is always one pass.

    Call it before or after wrapping the model in DistributedDataParallel, `fully_shard`, `torch.compile`, PEFT or
    Accelerate, but before FSDP1 and once the weights are there. Once more changes the settings, and heals what replaced
    the model's forward meanwhile (Liger kernels). The head is looked up at each batch, so it may be resized or
    replaced, and PEFT may switch or disable its adapters; its weight is read inside the head's own call, where FSDP has
    made it whole. `detach` undoes it.

    Raises `InputError` where the model has no output embedding, where that has an active adapter (LoRA) of its own,
    where its weight is not there or split (meta device, FSDP1, ZeRO-3, tensor parallelism), where the model's logits
    are not those of its head, where `config.output_router_logits` adds a router's loss, which would be left out, and
    where `loss_fn` scales logits otherwise than the model does.
    """
    settings = read_settings(model, loss_fn, alpha_pred, alpha_cl, two_pass)
    inner: Any = unwrapped(model)
    if not answers_rationales(inner):
        inner.forward = _Forward(inner)
    # so that Hugging Face's trainers pass N and do not divide by the accumulation steps
    inner.accepts_loss_kwargs = True
    setattr(inner, ATTACHED, settings)
    for wrapper in _peft_wrappers(model):
        if _refuse_prompt_tuning not in wrapper._forward_pre_hooks.values():
            wrapper.register_forward_pre_hook(_refuse_prompt_tuning, with_kwargs=True)
    return model


def read_settings(model: Any, loss_fn: QCRDLoss | None, alpha_pred: float, alpha_cl: float, two_pass: bool) -> Settings:
    """Check that the loss supports the model's head; return the settings. Raises the errors of `attach`."""
    for name, value in (("alpha_pred", alpha_pred), ("alpha_cl", alpha_cl)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be finite and at least 0, got {value}")
    inner: Any = unwrapped(model)
    if not (hasattr(inner, "config") and hasattr(inner, "base_model")):
        raise InputError(
            f"{type(inner).__name__} is not a Hugging Face model; call QCRDLoss inside its forward instead"
        )
    _check_router(inner)
    before: Settings | None = vars(inner).get(ATTACHED)
    known = before is not None and answers_rationales(inner)
    if not known:
        check_readable(model)
    head = read_head(inner)
    lower = before.lower if before is not None and known else check_head(model, head)
    loss_fn = QCRDLoss(scale=head.scale, softcap=head.softcap) if loss_fn is None else loss_fn
    if not isinstance(loss_fn, QCRDLoss):
        raise InputError(f"loss_fn must be a QCRDLoss or None, got {type(loss_fn).__name__}")
    if (loss_fn.scale, loss_fn.softcap or None) != (head.scale, head.softcap or None):
        raise InputError(
            f"loss_fn has scale {loss_fn.scale:g} and softcap {loss_fn.softcap}, but {type(inner).__name__} has scale "
            f"{head.scale:g} and softcap {head.softcap}; make it with QCRDLoss.for_model(model, ...)"
        )
    if loss_fn.ignore_index != IGNORE:
        raise InputError(
            f"loss_fn.ignore_index must be {IGNORE}, which the collator writes; got {loss_fn.ignore_index}"
        )
    accepts = vars(inner).get("accepts_loss_kwargs") if before is None else before.accepts_loss_kwargs
    return Settings(loss_fn, float(alpha_pred), float(alpha_cl), bool(two_pass), lower, accepts)


def detach(model: Model) -> Model:
    """Undo `attach`: the model has the forward and attributes that it had before. Returns the same object.

    Does nothing to a model that was not attached to. Where something wrapped the forward since (Accelerate), the
    wrapper stays and passes every call on to the model's own forward.
    """
    inner: Any = unwrapped(model)
    settings: Settings | None = vars(inner).pop(ATTACHED, None)
    if settings is None:
        return model
    if settings.accepts_loss_kwargs is None:
        del inner.accepts_loss_kwargs
    else:
        inner.accepts_loss_kwargs = settings.accepts_loss_kwargs
    forward = vars(inner).get("forward")
    if isinstance(forward, _Forward):
        forward.restore()
    for wrapper in _peft_wrappers(model):
        for key, hook in list(wrapper._forward_pre_hooks.items()):
            if hook is _refuse_prompt_tuning:
                del wrapper._forward_pre_hooks[key], wrapper._forward_pre_hooks_with_kwargs[key]
    return model


class _Forward:
    """Forward of an attached model: computes the loss for rationale batches and delegates other calls.

    An object rather than a closure, so that a deep copy or a pickle of the model has one of its own.
    """

    answers_rationales = True

    def __init__(self, model: Any):
        self.model = model
        replaced = vars(model).get("forward")  # None: the class's own
        # kept as a function, so that a copy of the model calls it with itself
        self.is_method = hasattr(replaced, "__func__")
        self.replaced: Callable[..., Any] | None = getattr(replaced, "__func__", replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # Accelerate's unwrap_model makes a method of it
            args = args[1:]
        return self.answer(self.model, *args, **kwargs)

    def answer(self, model: Any, *args: Any, rationale: Tensor | None = None, **kwargs: Any) -> Any:
        in_place = args and isinstance(args[0], Mapping) and "rationale" in args[0]
        if (rationale is None and not in_place) or ATTACHED not in vars(model):
            kwargs = kwargs if rationale is None else {"rationale": rationale, **kwargs}
            if self.replaced is None:
                return type(model).forward(model, *args, **kwargs)
            return self.replaced(model, *args, **kwargs) if self.is_method else self.replaced(*args, **kwargs)
        if args:
            raise ValueError("a batch of rationales is given by keywords: model(**batch)")
        assert rationale is not None
        return rationale_forward(model, getattr(model, ATTACHED), rationale=rationale, **kwargs)

    def restore(self) -> None:
        """Restore the original forward."""
        if self.replaced is None:
            del self.model.forward
        else:
            self.model.forward = types.MethodType(self.replaced, self.model) if self.is_method else self.replaced

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's class, which trainers read their columns from."""
        return inspect.signature(types.MethodType(type(self.model).forward, self.model))

    @property
    def __func__(self) -> Callable[..., Any]:
        """The forward as a function of the model, which Accelerate wraps and makes a method of."""

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return self.answer(model, *args, **kwargs)

        forward.__signature__ = inspect.signature(type(self.model).forward)  # type: ignore[attr-defined]
        forward.answers_rationales = True  # type: ignore[attr-defined]
        return forward


def _check_router(model: Any) -> None:
    """Raises `InputError` where the model would add the auxiliary loss of its experts' router."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(config, "output_router_logits", False) or getattr(text, "output_router_logits", False):
        raise InputError(
            f"{type(model).__name__}: config.output_router_logits is on, but the router's auxiliary loss would be "
            "left out; set model.config.output_router_logits = False (the experts are then trained without it)"
        )


def _peft_wrappers(model: Any) -> Iterator[Any]:
    """The PEFT models around the Hugging Face model, from the outside in."""
    inner = unwrapped(model)
    for module in model.modules():
        if module is inner:
            return
        if hasattr(module, "active_peft_config"):
            yield module


def _refuse_prompt_tuning(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A PEFT model's own forward would put virtual tokens in front of the batch."""
    if "rationale" in kwargs and "forward" not in vars(module) and module.active_peft_config.is_prompt_learning:
        raise InputError(
            f"{module.active_peft_config.peft_type.value}: prompt tuning, prefix tuning and other virtual tokens are "
            "not supported for a batch of rationales; use LoRA"
        )


def rationale_forward(
    self: Any,
    settings: Settings,
    *,
    rationale: Tensor,
    target: Tensor,
    question: Tensor,
    positive: Tensor,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    source: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    is_label: Tensor | None = None,
    quality: Tensor | None = None,
    question_key: Tensor | None = None,
    num_questions: int | Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    max_selected_tokens: int | None = None,
    iteration: int = 0,
    two_pass: bool | None = None,
    labels: Tensor | None = None,
    hidden: Tensor | None = None,
    **others: Any,
) -> RationaleOutput:
    """`forward` for a batch with `rationale`.

    `labels` only serves counting. Other arguments that wrappers add are rejected unless they have no effect.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in ("return_dict", "use_cache")]
    if unknown:
        raise ValueError(f"a batch of rationales takes no {', '.join(unknown)}")
    if input_ids is None or attention_mask is None:
        raise ValueError("a batch of rationales needs input_ids and attention_mask; prompt tuning is not supported")
    B = len(target)
    is_label = torch.zeros_like(positive) if is_label is None else is_label
    sizes = {"rationale": rationale, "question": question, "positive": positive, "is_label": is_label}
    for name, x in sizes.items():
        if len(x) != B:
            raise ValueError(f"{name} must have one entry a sequence ({B}), got {list(x.shape)}")
    if rationale.shape != target.shape:
        raise ValueError(f"rationale must be {list(target.shape)} to match target, got {list(rationale.shape)}")
    require(
        (rationale[:, 0] == torch.arange(B, device=rationale.device)).all(),
        lambda: f"rationale must number the sequences from 0 to {B - 1}; nn.DataParallel cannot split a batch",
    )
    require((is_label[1:] >= is_label[:-1]).all(), lambda: "is_label: labels must come after all rationales")
    _check_router(self)
    if num_questions is None:
        num_questions = question.max() + 1
    with settings.autocast(target.device):
        return batch_loss(
            self,
            settings,
            Batch(input_ids, attention_mask, target, source, decoder_input_ids),
            question,
            positive,
            is_label,
            quality,
            question_key,
            num_questions if num_items_in_batch is None else num_items_in_batch,
            iteration,
            max_selected_tokens,
            settings.two_pass if two_pass is None else two_pass,
            hidden,
        )
