"""The many-to-one contrastive loss (Eq. 3, 6, 7 of arXiv 2405.13014), as a module and as functions.

T tokens, R rationales. A batch is a packed list of rationales; each belongs to a question and is a positive or a
negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qcrd_fast.config import IMPLS, NEGATIVE_SELECT, POSITIVE_SELECT, SCHEMES, nearest
from qcrd_fast.ops import chunked, contrastive, linear_logprob, reference
from qcrd_fast.ops.checks import is_finite, require, require_constants, require_tensors


class ContrastiveOutput(NamedTuple):
    """`loss = loss_pos - beta * loss_neg`; those three are differentiable scalars, the rest is detached.

    loss_pos = sum over positives of weight_R * l_R, loss_neg = sum over negatives of weight_R * h(l_R): the weight
    holds the quality, the scheme's normalisation and 1/N, and is 0 for what is not selected. `selected_R` is where
    gradient flows.
    """

    loss: Tensor
    loss_pos: Tensor  # the mean of Eq. 6 over questions [nats/token]
    loss_neg: Tensor  # the mean of Eq. 7; never positive
    logprob_T: Tensor  # log p of each token [nats], in the shape of the targets
    nll_R: Tensor  # l(f(x), r) [nats/token]; 0 for a rationale without a valid token
    selected_R: Tensor  # bool
    active_R: Tensor  # bool: a negative with l < delta
    weight_R: Tensor


class QCRDLoss(nn.Module):
    """Hidden states and an output head -> the contrastive loss, without ever holding the logits.

    loss_fn = QCRDLoss(beta=0.2, delta=3.0)
    out = loss_fn(hidden, weight, target, rationale, question, positive, quality)
    out.loss.backward()

    beta: weight of the negative term. delta: margin of the hinge [nats/token]. scheme: `minmax` (the paper's),
    `maxmin`, `sampling`, `mean` or `wmean`; `positive_select` and `negative_select` override its halves. scale,
    softcap, temperature,
    ignore_index, workspace_bytes, process_group, vocab_start: as in `linear_logprob`. seed: of the sampling schemes.
    impl: auto, triton, torch or eager.
    """

    def __init__(
        self,
        beta: float = 0.2,
        delta: float = 3.0,
        scheme: str = "minmax",
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        impl: str = "auto",
        seed: int = 0,
        positive_select: str | None = None,
        negative_select: str | None = None,
        workspace_bytes: int = 0,
        process_group: Any = None,
        vocab_start: int | None = None,
    ):
        super().__init__()
        check_settings(beta, delta, impl)
        self.selects = resolve_selects(scheme, positive_select, negative_select)
        self.beta, self.delta, self.scheme = float(beta), float(delta), scheme
        self.scale, self.softcap, self.temperature = scale, softcap, temperature
        self.ignore_index, self.impl, self.seed = ignore_index, impl, seed
        self.workspace_bytes, self.process_group, self.vocab_start = workspace_bytes, process_group, vocab_start
        self._model: tuple[Any, ...] = ()  # whose bias is used; in a tuple, so that it is no submodule

    @classmethod
    def for_model(cls, model: Any, beta: float = 0.2, delta: float = 3.0, **settings: Any) -> QCRDLoss:
        """With scale, softcap and bias read off a Hugging Face model, and compared with its own logits on one tiny
        input.

        A bias is looked up at each call, in whichever module PEFT has active then. A loss for a model with a bias
        refers to the model, so deep-copy or pickle the two together.

        Raises `InputError` if they differ: the architecture computes its logits in another way.
        """
        from qcrd_fast.models.lm_head import check_head, check_readable, read_head

        check_readable(model)
        head = read_head(model)
        check_head(model, head)
        loss_fn = cls(beta, delta, scale=head.scale, softcap=head.softcap, **settings)
        if head.bias is not None:
            loss_fn._model = (model,)
        return loss_fn

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        rationale: Tensor,
        question: Tensor,
        positive: Tensor,
        quality: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        num_questions: int | Tensor | None = None,
        question_key: Tensor | None = None,
        iteration: int = 0,
        max_selected_tokens: int | None = None,
    ) -> ContrastiveOutput:
        """hidden [..., H], weight [V, H], target [...] (already shifted), rationale [...]: the rationale a token
        belongs to, contiguous and non-decreasing; question [R], positive [R] bool, quality [R] in [0, 1], or None for
        weights of 1.

        num_questions: N of Eq. 3, the count over the whole optimizer batch (default: question.max() + 1, which counts
        gaps between the numbers in `question` too). question_key, int64 by question: what `sampling` is keyed by, with
        the seed and the iteration (default: the question's index). max_selected_tokens: a bound on the tokens selected,
        which saves the backward pass a host sync on a GPU. A quality that is NaN reaches the loss only where it weighs
        in: of a rationale that is selected, and under `wmean` of any candidate of its question and kind.

        Raises `ValueError` naming what was expected and what came, `TypeError` for an argument that is no tensor.
        """
        require_tensors(rationale=rationale, question=question, positive=positive)
        if bias is None and self._model:
            from qcrd_fast.models.lm_head import read_head

            bias = read_head(*self._model).bias
        logprob = linear_logprob.linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            scale=self.scale,
            softcap=self.softcap,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            impl=self.impl,
            max_rows=max_selected_tokens,
            workspace_bytes=self.workspace_bytes,
            process_group=self.process_group,
            vocab_start=self.vocab_start,
        )
        return contrastive_loss(
            logprob,
            rationale,
            question,
            positive,
            quality,
            beta=self.beta,
            delta=self.delta,
            positive_select=self.selects[0],
            negative_select=self.selects[1],
            valid_T=target != self.ignore_index,
            num_questions=num_questions,
            question_key=question_key,
            iteration=iteration,
            seed=self.seed,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        positive, negative = self.selects
        selects = f"positive_select={positive}, negative_select={negative}"
        return f"beta={self.beta}, delta={self.delta}, {selects}, impl={self.impl}"


def contrastive_loss(
    logprob: Tensor,
    rationale: Tensor,
    question: Tensor,
    positive: Tensor,
    quality: Tensor | None = None,
    *,
    beta: float = 0.2,
    delta: float = 3.0,
    scheme: str = "minmax",
    positive_select: str | None = None,
    negative_select: str | None = None,
    valid_T: Tensor | None = None,
    num_questions: int | Tensor | None = None,
    question_key: Tensor | None = None,
    iteration: int = 0,
    seed: int = 0,
    impl: str = "auto",
) -> ContrastiveOutput:
    """The loss of `QCRDLoss` from log p of each token [...] (nats); `valid_T`: which tokens count, default all.

    The other arguments are those of `QCRDLoss`. Raises `ValueError` naming what was expected and what came, `TypeError`
    for an argument that is no tensor.
    """
    optional = {"quality": quality, "valid_T": valid_T, "question_key": question_key}
    given = {name: x for name, x in optional.items() if x is not None}
    require_tensors(logprob=logprob, rationale=rationale, question=question, positive=positive, **given)
    check_settings(beta, delta, impl)
    selects = resolve_selects(scheme, positive_select, negative_select)
    R = question.numel()
    _check_batch(logprob, rationale, question, positive, quality, valid_T, question_key)
    logprob_T, rationale_T = reference.accumulable(logprob.reshape(-1)), rationale.reshape(-1).long()
    question_R, positive_R = question.long(), positive
    if num_questions is None:
        num_questions = question_R.max() + 1 if R else 1
    if isinstance(num_questions, Tensor):
        N = num_questions.to(device=logprob.device, dtype=logprob_T.dtype).reshape(())
        require(N > 0, lambda: f"num_questions must be above 0, got {float(N):g}")
    else:
        require(num_questions > 0, lambda: f"num_questions must be above 0, got {num_questions}")
        N = torch.full((), num_questions, dtype=logprob_T.dtype, device=logprob.device)
    key_R = question_R if question_key is None else question_key.long()[question_R]
    terms = contrastive.contrastive(
        logprob_T,
        rationale_T,
        None if valid_T is None else valid_T.reshape(-1),
        question_R,
        positive_R,
        None if quality is None else quality.detach(),
        key_R,
        selects,
        float(delta),
        N,
        seed,
        iteration,
        impl,
    )
    return ContrastiveOutput(
        loss=terms.loss_pos - beta * terms.loss_neg,  # Eq. 3
        loss_pos=terms.loss_pos,
        loss_neg=terms.loss_neg,
        logprob_T=logprob.detach(),
        nll_R=terms.nll_R,
        selected_R=terms.weight_R != 0,
        active_R=terms.active_R,
        weight_R=terms.weight_R,
    )


def weighted_rationale_loss(
    logprob_T: Tensor,
    rationale_T: Tensor,
    positive_R: Tensor,
    weight_R: Tensor,
    *,
    beta: float,
    delta: float | None,
    valid_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The training pass of score-then-train: (loss, loss_pos, loss_neg, nll_R [detached]) of rationales with known
    weights.

    loss = loss_pos - beta * loss_neg, loss_pos = sum over positives of w l, loss_neg = sum over negatives of w h(l),
    with the hinge h(u) = min(u - delta, 0) of this pass's own l; `delta` None: h(u) = u. `weight_R`: as
    `ContrastiveOutput` gives it.
    """
    require(
        logprob_T.shape == rationale_T.shape,
        lambda: f"rationale must have the shape of log p, {list(logprob_T.shape)}, got {list(rationale_T.shape)}",
    )
    require(
        positive_R.shape == weight_R.shape,
        lambda: f"positive and weight must have one shape, got {list(positive_R.shape)} and {list(weight_R.shape)}",
    )
    R = len(positive_R)
    flat_T, valid_T = reference.accumulable(logprob_T.reshape(-1)), None if valid_T is None else valid_T.reshape(-1)
    nll_R, _ = chunked.rationale_mean(flat_T, rationale_T.reshape(-1).long(), valid_T, R)
    term_R, _ = chunked.hinge_terms(nll_R, positive_R, weight_R.detach().to(nll_R.dtype), delta)
    loss_pos, loss_neg = term_R.where(positive_R, 0).sum(), term_R.where(~positive_R, 0).sum()
    return loss_pos - beta * loss_neg, loss_pos, loss_neg, nll_R.detach()


def resolve_selects(
    scheme: str, positive_select: str | None = None, negative_select: str | None = None
) -> tuple[str, str]:
    """(positive, negative) selection: the scheme's pair, unless overridden. Raises `ValueError` naming the choices."""
    _check_choice("scheme", scheme, tuple(SCHEMES))
    positive = SCHEMES[scheme][0] if positive_select is None else positive_select
    negative = SCHEMES[scheme][1] if negative_select is None else negative_select
    _check_choice("positive_select", positive, POSITIVE_SELECT)
    _check_choice("negative_select", negative, NEGATIVE_SELECT)
    return positive, negative


def check_settings(beta: float, delta: float, impl: str) -> None:
    require_constants(beta=beta, delta=delta)
    require(is_finite(beta) and beta >= 0, lambda: f"beta must be finite and at least 0, got {beta}")
    require(is_finite(delta), lambda: f"delta must be finite, got {delta}")
    _check_choice("impl", impl, IMPLS)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(
        value in choices, lambda: f"{name} is one of {', '.join(choices)}; got {value!r}{nearest(str(value), choices)}"
    )


def _check_batch(
    logprob: Tensor,
    rationale: Tensor,
    question: Tensor,
    positive: Tensor,
    quality: Tensor | None,
    valid_T: Tensor | None,
    question_key: Tensor | None,
) -> None:
    R = question.numel()
    require(logprob.is_floating_point(), lambda: f"log p must be floating point, got {logprob.dtype}")
    T = logprob.numel()
    for name, x in (("rationale", rationale), ("valid_T", valid_T)):
        if x is not None and x.numel() != T:
            raise ValueError(f"{name} must have one entry a token ({T}), got {list(x.shape)}")
    require(question.dim() == 1, lambda: f"question must be [R], got {list(question.shape)}")
    for name, x in (("positive", positive), ("quality", quality)):
        if x is not None and x.shape != (R,):
            raise ValueError(f"{name} must be [{R}] to match question, got {list(x.shape)}")
    for name, x in (("rationale", rationale), ("question", question), ("question_key", question_key)):
        if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
            raise ValueError(f"{name} must be an integer tensor, got {x.dtype}")
    for name, x in (("positive", positive), ("valid_T", valid_T)):
        if x is not None and x.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {x.dtype}")
    tensors = (rationale, question, positive, quality, valid_T, question_key)
    on_device = all(x is None or x.device == logprob.device for x in tensors)
    require(on_device, lambda: f"all tensors must be on {logprob.device} with log p")
    rationale_T = rationale.reshape(-1)
    require(
        (rationale_T[1:] >= rationale_T[:-1]).all(),
        lambda: (
            "rationale must be contiguous and non-decreasing along the tokens, as in [0, 0, 1, 2, 2]; "
            f"it decreases at token {int((rationale_T[1:] < rationale_T[:-1]).int().argmax()) + 1}"
        ),
    )
    require(
        ((rationale_T >= 0) & (rationale_T < R)).all(),
        lambda: f"rationale must lie in [0, {R}), got {int(rationale_T.min())} to {int(rationale_T.max())}",
    )
    upper = None if question_key is None else len(question_key)
    require(
        ((question >= 0) if upper is None else (question >= 0) & (question.long() < upper)).all(),
        lambda: (
            f"question must lie in [0, {'...' if upper is None else upper}), got {int(question.min())} to "
            f"{int(question.max())}"
        ),
    )
    if quality is not None:  # one that is not finite is let through, so that the loss shows it
        require(
            ~(quality.isfinite() & ((quality < 0) | (quality > 1))).any(),
            lambda: f"quality must lie in [0, 1], got {float(quality.min()):g} to {float(quality.max()):g}",
        )
