"""The loss inside a model's own forward, so that whatever wraps the model (DDP, FSDP2, torch.compile, PEFT, a trainer) sees one
ordinary forward call, and a sharded head is whole when the loss reads it."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcrd_fast.errors import InputError
from qcrd_fast.integrations.batch_loss import ATTACHED, IGNORE, Batch, Settings, batch_loss
from qcrd_fast.losses import QCRDLoss
from qcrd_fast.models.lm_head import check_head, output_layer, read_head, unwrapped
from qcrd_fast.ops.checks import require
from qcrd_fast.ops.linear_logprob import linear_logprob

Model = TypeVar("Model")
ORIGINAL = "_qcrd_fast_original"  # the attribute that keeps a module's own forward


def attach(
    model: Model,
    loss_fn: QCRDLoss | None = None,
    *,
    alpha_pred: float = 0.5,
    alpha_cl: float = 0.5,
    two_pass: bool = True,
) -> Model:
    """Teach a Hugging Face language model to compute the loss of a `RationaleCollator`'s batch: `model(**batch).loss`.

        model = attach(AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-small"))

    The result is the same object. Its forward is as before, except that a batch with `rationale` in it is answered with a
    `RationaleOutput` instead of logits: L = alpha_pred L_pred + alpha_cl L_cl (Eq. 8 without the discriminator's term). `N` of
    Eq. 3 is `num_items_in_batch` (which Hugging Face's trainers pass, and which counts questions here), else `num_questions`.

    loss_fn: default `QCRDLoss.for_model(model)`: beta 0.2, delta 3 nats/token. two_pass: with gradient, score all rationales
    first and train those selected (`score_then_train`); otherwise one pass, with gradient through all of them. Without gradient
    it is always one pass.

    Call it before or after wrapping the model in DistributedDataParallel, `fully_shard`, `torch.compile` or PEFT; once more
    changes the settings. The head's weight is read inside the head's own call, where FSDP has made it whole.

    Raises `InputError` where the model has no output embedding, where that has an adapter (LoRA) of its own, where the model's
    logits are not those of its head, and where `loss_fn` scales them otherwise than the model does.
    """
    for name, value in (("alpha_pred", alpha_pred), ("alpha_cl", alpha_cl)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be finite and at least 0, got {value}")
    inner: Any = unwrapped(model)
    if not (hasattr(inner, "config") and hasattr(inner, "base_model")):
        raise InputError(f"{type(inner).__name__} is not a Hugging Face model; call QCRDLoss inside its forward instead")
    head, output = read_head(inner), output_layer(inner)
    if not hasattr(inner, ATTACHED):
        check_head(model, head)
    loss_fn = QCRDLoss(scale=head.scale, softcap=head.softcap) if loss_fn is None else loss_fn
    if not isinstance(loss_fn, QCRDLoss):
        raise InputError(f"loss_fn must be a QCRDLoss or None, got {type(loss_fn).__name__}")
    if (loss_fn.scale, loss_fn.softcap or None) != (head.scale, head.softcap or None):
        raise InputError(
            f"loss_fn has scale {loss_fn.scale:g} and softcap {loss_fn.softcap}, but {type(inner).__name__} has scale "
            f"{head.scale:g} and softcap {head.softcap}; make it with QCRDLoss.for_model(model, ...)"
        )
    if loss_fn.ignore_index != IGNORE:
        raise InputError(f"loss_fn.ignore_index must be {IGNORE}, which the collator writes; got {loss_fn.ignore_index}")
    if not hasattr(inner, ATTACHED):
        setattr(inner, ORIGINAL, inner.forward)
        inner.forward = types.MethodType(_rationales_or(inspect.signature(type(inner).forward)), inner)
        inner.accepts_loss_kwargs = True  # so that Hugging Face's trainers pass N and do not divide by the accumulation steps
    if not hasattr(output, ORIGINAL):
        setattr(output, ORIGINAL, output.forward)
        output.forward = types.MethodType(_head_forward, output)
    setattr(inner, ATTACHED, Settings(loss_fn, float(alpha_pred), float(alpha_cl), bool(two_pass)))
    return model


def _rationales_or(signature: inspect.Signature) -> Any:
    """A method that answers batches of rationales, and passes other calls on to the forward whose signature it shows."""

    def forward(self: Any, *args: Any, rationale: Tensor | None = None, **kwargs: Any) -> Any:
        if rationale is None and not (args and isinstance(args[0], Mapping) and "rationale" in args[0]):
            return getattr(self, ORIGINAL)(*args, **kwargs)
        if args:
            raise ValueError("a batch of rationales is given by keywords: model(**batch)")
        assert rationale is not None
        return _rationale_forward(self, rationale=rationale, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _rationale_forward(
    self: Any,
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
    **others: Any,
) -> Any:
    """`forward` of a batch with `rationale` in it. `labels` was for counting alone; what other arguments wrappers add is
    refused unless it says nothing."""
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
    require((is_label[1:] >= is_label[:-1]).all(), lambda: "is_label: labels must stand behind all rationales")
    settings: Settings = getattr(self, ATTACHED)
    if num_questions is None:
        num_questions = question.max() + 1
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
    )


def _head_forward(self: Any, hidden: Tensor, *args: Any, logprob_target: Tensor | None = None, **options: Any) -> Tensor:
    """The head's own forward; with `logprob_target` [T], log p of each target [T], without logits."""
    if logprob_target is None:
        return getattr(self, ORIGINAL)(hidden, *args, **options)
    loss_fn: QCRDLoss = options["loss_fn"]
    own = getattr(self, "bias", None)
    return linear_logprob(
        hidden,
        self.weight,
        logprob_target,
        bias=options["bias"] if own is None else own,
        scale=loss_fn.scale,
        softcap=loss_fn.softcap,
        temperature=loss_fn.temperature,
        impl=loss_fn.impl,
        max_rows=options["max_rows"],
    )
