"""The loss of a padded batch of rationales and labels: L = a1 L_pred + a2 L_cl (Eq. 8 without L_D).

Two passes: all rationales are scored without gradient, then those that were selected, and the labels, are trained. Or
one, in which every rationale carries gradient through the model. `attach` runs this inside a model's own forward.

Shapes: S sources, B sequences (R rationales, then the labels), L padded length, T target tokens, H hidden, Q questions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from qcrd_fast.errors import InputError
from qcrd_fast.losses import ContrastiveOutput, QCRDLoss, contrastive_loss, weighted_rationale_loss
from qcrd_fast.models.lm_head import backbone, eval_mode, output_layer, plain_layer, read_head, unwrapped
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.selection import SELECTIONS

eagerly = torch.compiler.disable  # where sizes depend on data; what compiles well is the model between such steps
ATTACHED = "_qcrd_fast"  # the attribute of a model that was attached to
ANSWERS = "answers_rationales"  # the attribute of a forward that answers batches of rationales
IGNORE = -100  # a target that is not scored


@dataclasses.dataclass
class RationaleOutput(ModelOutput):
    """Output of an attached model. The losses are differentiable scalars, the rest is detached.

    loss = alpha_pred * loss_pred + alpha_cl * loss_cl (Eq. 8 without the discriminator's term)
    loss_pred: 1/N sum over questions of the label's mean -log p [nats/token]
    loss_cl = loss_pos - beta * loss_neg (Eq. 3), with the terms of Eq. 6 and Eq. 7
    nll_R, selected_R, active_R, weight_R: as in `QCRDLoss`, for the batch's R rationales, from the scoring pass if
    there is one
    """

    loss: Tensor | None = None
    loss_pred: Tensor | None = None
    loss_cl: Tensor | None = None
    loss_pos: Tensor | None = None
    loss_neg: Tensor | None = None
    nll_R: Tensor | None = None
    selected_R: Tensor | None = None
    active_R: Tensor | None = None
    weight_R: Tensor | None = None

    def __getitem__(self, name: Any) -> Any:
        if name == "logits":  # what label smoothing, and metrics of a next-token loss, ask for
            raise InputError(
                "a batch of rationales has a loss but no logits: label smoothing (label_smoothing_factor) is not "
                "supported, nor are metrics of the logits"
            )
        return super().__getitem__(name)


def score_then_train(
    model: Any,
    batch: Mapping[str, Any],
    *,
    num_questions: int | Tensor | None = None,
    quality: Tensor | None = None,
    iteration: int = 0,
) -> RationaleOutput:
    """Run the two-pass step; call `backward` on the result's `loss`.

    Scores all rationales in eval mode without gradient, selects, then runs the selected ones and the labels with
    gradient.

    model: one that `attach` was called on, also inside DistributedDataParallel, FSDP2, torch.compile or PEFT. batch: of
    a `RationaleCollator`. num_questions: N of Eq. 3, the questions of the whole optimizer batch over all micro-batches
    and ranks (default: those of this batch). quality: the scores of the batch's rationales in [0, 1], fp32 [R], in
    place of the batch's own. iteration: what `sampling` is keyed by, beside the seed and the question.

    Micro-batches then add up: each one's `loss` is its share of the whole batch's, so no division by their number is
    due. Where ranks' gradients are averaged (DDP, FSDP), multiply by the number of ranks.

    Raises `InputError` for a model that `attach` was not called on, and `ValueError` for a batch that is not as the
    collator's.
    """
    inner = unwrapped(model)
    if not hasattr(inner, ATTACHED):
        raise InputError(f"{type(inner).__name__}: call qcrd_fast.attach(model) once before score_then_train")
    if not answers_rationales(inner):
        raise InputError(
            f"{type(inner).__name__}: something replaced the model's forward after attach (Liger kernels do); call "
            f"attach again"
        )
    given = {"num_questions": num_questions, "quality": quality}
    batch = {**batch, **{name: value for name, value in given.items() if value is not None}}
    return model(**batch, two_pass=True, iteration=iteration)


@dataclasses.dataclass(frozen=True)
class Settings:
    loss_fn: QCRDLoss
    alpha_pred: float
    alpha_cl: float
    two_pass: bool
    lower: torch.dtype | None = None  # what the model's own forward autocasts to by itself
    accepts_loss_kwargs: bool | None = None  # the model's attribute of this name before

    def autocast(self, device: torch.device) -> Any:
        return contextlib.nullcontext() if self.lower is None else torch.autocast(device.type, dtype=self.lower)


def answers_rationales(model: Any) -> bool:
    """Return whether the model's forward, perhaps wrapped (Accelerate), is still the one from `attach`."""
    forward = vars(model).get("forward")
    while forward is not None and not hasattr(forward, ANSWERS):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward is not None


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of a `RationaleCollator`'s batch that the model and the loss read."""

    input_ids: Tensor
    attention_mask: Tensor
    target: Tensor
    source: Tensor | None = None
    decoder_input_ids: Tensor | None = None

    @eagerly
    def take(self, index_N: Tensor) -> Batch:
        """The sequences of these numbers, without the columns and sources that none of them needs."""
        target = self.target[index_N]
        width = last_column(target != IGNORE)
        if self.source is None or self.decoder_input_ids is None:
            ids, mask = self.input_ids[index_N, :width], self.attention_mask[index_N, :width]
            return Batch(ids, mask, target[:, :width])
        kept_S, source = torch.unique(self.source[index_N], return_inverse=True)
        mask = self.attention_mask[kept_S]
        length = last_column(mask != 0)
        ids, inputs = self.input_ids[kept_S, :length], self.decoder_input_ids[index_N, :width]
        return Batch(ids, mask[:, :length], target[:, :width], source, inputs)


def last_column(wanted_NL: Tensor) -> int:
    """One more than the last column with a true entry; at least 1."""
    columns_L = torch.arange(1, wanted_NL.shape[1] + 1, device=wanted_NL.device)
    return max(int((columns_L * wanted_NL.any(0)).max()), 1)


@torch.compiler.disable(recursive=False)
def batch_loss(
    model: Any,
    settings: Settings,
    batch: Batch,
    question: Tensor,
    positive: Tensor,
    is_label: Tensor,
    quality: Tensor | None,
    question_key: Tensor | None,
    num_questions: int | Tensor,
    iteration: int,
    max_selected_tokens: int | None,
    two_pass: bool,
    hidden_BLH: Tensor | None = None,
) -> RationaleOutput:
    """Compute the loss of a batch inside the forward of `model`, the Hugging Face model itself.

    [B] tensors as the collator's. `hidden_BLH`: hidden states for one pass, if the model has run already.
    """
    loss_fn = settings.loss_fn
    R = int((~is_label).sum())

    @eagerly
    def select(logprob_T: Tensor, rationale_T: Tensor) -> tuple[ContrastiveOutput, Tensor]:
        """Return what is selected, and each sequence's weight [B] with 1/N; a label's is 1/N."""
        kept_T = rationale_T < R
        out = contrastive_loss(
            logprob_T[kept_T],
            rationale_T[kept_T],
            question[:R],
            positive[:R],
            None if quality is None else quality[:R],
            beta=loss_fn.beta,
            delta=loss_fn.delta,
            positive_select=loss_fn.selects[0],
            negative_select=loss_fn.selects[1],
            num_questions=num_questions,
            question_key=question_key,
            iteration=iteration,
            seed=loss_fn.seed,
            impl=loss_fn.impl,
        )
        of_labels = out.weight_R.new_ones(len(question) - R) / torch.as_tensor(num_questions, device=question.device)
        return out, torch.cat([out.weight_R, of_labels.to(out.weight_R.dtype)])

    @eagerly
    def total(
        out: ContrastiveOutput, logprob_T: Tensor, sequence_T: Tensor, weight_B: Tensor, kept_B: Any
    ) -> RationaleOutput:
        def loss_terms_of(weight_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            terms = (logprob_T, sequence_T, positive[kept_B], weight_B[kept_B])
            return weighted_rationale_loss(*terms, beta=loss_fn.beta, delta=loss_fn.delta)

        loss_pred = loss_terms_of(weight_B * is_label)[0]
        loss_cl, loss_pos, loss_neg, _ = loss_terms_of(weight_B * ~is_label)  # Eq. 3, 6, 7
        return RationaleOutput(
            loss=settings.alpha_pred * loss_pred + settings.alpha_cl * loss_cl,  # Eq. 8 less a3 L_D
            loss_pred=loss_pred,
            loss_cl=loss_cl,
            loss_pos=loss_pos,
            loss_neg=loss_neg,
            nll_R=out.nll_R,
            selected_R=out.selected_R,
            active_R=out.active_R,
            weight_R=out.weight_R,
        )

    if two_pass and torch.is_grad_enabled():
        # of the ranks of a group each must run its model, with rationales or without
        with torch.no_grad(), eval_mode(model):
            scored_B = torch.arange(max(R, 1), device=question.device)
            out, weight_B = select(*token_logprobs(model, settings, batch.take(scored_B)))
        kept_B = (weight_B != 0).nonzero()[:, 0]
        kept_B = kept_B if len(kept_B) else torch.zeros_like(question[:1])
        return total(out, *token_logprobs(model, settings, batch.take(kept_B)), weight_B, kept_B)
    bound = max_selected_tokens if all(SELECTIONS[select].single for select in loss_fn.selects) else None
    logprob_T, sequence_T = token_logprobs(model, settings, batch, bound, hidden_BLH)
    out, weight_B = select(logprob_T.detach(), sequence_T)
    return total(out, logprob_T, sequence_T, weight_B, ...)


@torch.compiler.disable(recursive=False)
def token_logprobs(
    model: Any, settings: Settings, batch: Batch, max_rows: int | None = None, hidden_BLH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return log p of each target token [T] and its sequence [T]. Calls the head as a module, so FSDP gathers its
    weight.

    Which module that is, is looked up at each call: heads are resized and replaced, and PEFT switches and disables
    them.
    """
    hidden_BLH = hidden_states(model, batch) if hidden_BLH is None else hidden_BLH
    scored_BL = batch.target != IGNORE
    options = {"head_bias": read_head(model).bias, "loss_fn": settings.loss_fn, "max_rows": max_rows}
    output = output_layer(model)
    layer = plain_layer(output)
    own = vars(layer).get("forward")
    layer.forward = types.MethodType(_head_logprob, layer)
    try:
        logprob_T = output(hidden_BLH[scored_BL], logprob_target=batch.target[scored_BL], **options)
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
    return logprob_T, scored_BL.nonzero()[:, 0]


def _head_logprob(
    self: Any,
    hidden: Tensor,
    *,
    logprob_target: Tensor,
    head_bias: Tensor | None,
    loss_fn: QCRDLoss,
    max_rows: int | None,
) -> Tensor:
    """The head's forward meanwhile: log p of each target [T], without logits."""
    if hasattr(self.weight, "full_tensor"):  # FSDP has made it whole by now
        raise InputError(
            "the output head is split over ranks by tensor parallelism, which is not supported, or, in "
            "make_compute_loss_func, by FSDP: use attach there"
        )
    own = getattr(self, "bias", None)
    return linear_logprob(
        hidden,
        self.weight,
        logprob_target,
        bias=head_bias if own is None else own,
        scale=loss_fn.scale,
        softcap=loss_fn.softcap,
        temperature=loss_fn.temperature,
        impl=loss_fn.impl,
        max_rows=max_rows,
    )


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Return the hidden states [B, L, H] that predict `batch.target`. An encoder reads each source once."""
    if batch.source is None:
        return backbone(model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
    states_SLH = model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return model.get_decoder()(
        input_ids=batch.decoder_input_ids,
        encoder_hidden_states=states_SLH.index_select(0, batch.source),
        encoder_attention_mask=batch.attention_mask.index_select(0, batch.source),
        use_cache=False,
    ).last_hidden_state
