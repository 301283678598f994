"""The training objectives (Eq. 8 and the methods it is compared with), one micro-batch at a time.

L = a1 L_pred + a2 L_cl with L_pred = sum_label w l and L_cl = sum_pos w l - beta * sum_neg w h(l), where l is a
target's mean -log p per token. A method is a choice of the weights w (1/N included, N the questions of the whole
optimizer batch): QCRD finds them by scoring all candidates first, the others know theirs beforehand.

Suffixes: Q questions of the micro-batch, R rationales, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.distributed.parallel import Strategy
from qcrd_fast.errors import RunError
from qcrd_fast.losses import ContrastiveOutput, contrastive_loss, weighted_rationale_loss
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import PackedHidden, Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.rationale_loss import linear_rationale_loss, loss_terms
from qcrd_fast.train.audit import Audit
from qcrd_fast.train.examples import Candidate, Example, longest_text
from qcrd_fast.train.judging import Judges, weight_kind
from qcrd_fast.train.methods import method_of
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.utils.oom import explains_oom, for_training

MI_WEIGHT = 0.1


@dataclasses.dataclass
class Weighted:
    """Candidates that get gradient, each with its question (index in the micro-batch) and weight (1/N included)."""

    candidates: list[Candidate]
    question: list[int]
    weight: list[float]
    beta: float = 0.0
    delta: float | None = None

    def add(self, candidate: Candidate, question: int, weight: float) -> None:
        self.candidates.append(candidate)
        self.question.append(question)
        self.weight.append(weight)


class Objective:
    """Compute the loss of a micro-batch, run its backward pass and return metrics.

    `step` returns ({loss, loss_pred, loss_cl: 0-d tensors that add up over micro-batches}, counts and sums of the
    scored candidates). Its `loss` is Eq. 8 without the discriminator's term, which has no gradient here.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        judges: Judges | None,
        autocast: Callable[[], torch.autocast],
        warmup_steps: int = 0,
        strategy: Strategy | None = None,
    ):
        self.student, self.config, self.judges, self.autocast = student, config, judges or Judges(), autocast
        self.strategy = strategy or Strategy(student.model)
        self.warmup_steps = warmup_steps
        self.audit: Audit | None = None  # what watches the passes of the next step
        self.method = method_of(config)
        self.alpha_pred = config.alpha_pred if self.method.teaches_rationales else 1.0

    @explains_oom("a training step", for_training, longest_text)
    def step(
        self,
        batch: Sequence[Example],
        lagged: Mapping[str, Negative],
        num_questions: int,
        step: int,
        iteration: int,
        weight: float = 1.0,
    ) -> tuple[dict[str, Tensor], Counter[str]]:
        """Run a micro-batch. `weight` scales the loss; 0 for a rank without questions in this micro-batch."""
        stats: Counter[str] = Counter()
        training = self.strategy.training
        if self.method.contrastive and self.config.forward == "joint":
            losses = training(lambda: self._joint(batch, lagged, num_questions, iteration, stats))
        elif self.method.mutual_information:
            losses = training(lambda: self._mutual_information(batch, num_questions, stats))
        else:
            weighted = self._weigh(batch, lagged, num_questions, step, iteration, stats)
            losses = training(lambda: self._train(batch, weighted, num_questions, stats))
        if losses["loss"].requires_grad:
            (losses["loss"] * (weight * self.strategy.scale)).backward()
        return {name: weight * value.detach() for name, value in losses.items()}, stats if weight else Counter()

    # Weights

    def _weigh(
        self,
        batch: Sequence[Example],
        lagged: Mapping[str, Negative],
        num_questions: int,
        step: int,
        iteration: int,
        stats: Counter[str],
    ) -> Weighted:
        if self.method.contrastive:
            return self._score_and_select(batch, lagged, num_questions, iteration, stats)
        warm = self.method.warmup is not None and step < self.warmup_steps
        weights = self.method.warmup if warm and self.method.warmup else self.method.weights
        chosen = Weighted([], [], [], beta=0.0 if warm else self.method.beta)
        judged = self.judges.positive is not None and weights is self.method.weights
        for q, example in enumerate(batch):
            of_positives, of_minority = weights(1 / num_questions, len(example.positives), len(example.minority))
            if judged and of_positives:
                of_positives = self._shared_by_quality(sum(of_positives), example, stats)
            for candidates, found in ((example.positives, of_positives), (example.minority, of_minority)):
                for candidate, weight in zip(candidates, found, strict=False):
                    chosen.add(candidate, q, weight)
        return chosen

    def _score_and_select(
        self,
        batch: Sequence[Example],
        lagged: Mapping[str, Negative],
        num_questions: int,
        iteration: int,
        stats: Counter[str],
    ) -> Weighted:
        """First pass: score every candidate without gradient in eval mode, select, and drop inactive hinges."""
        candidates, question = _candidates(batch, lagged)
        chosen = Weighted([], [], [], self.config.beta, self.config.delta)
        sources, targets, scored = [e.explain for e in batch], [c.tokens for c in candidates], question
        if not candidates:
            if not self.strategy.sharded:
                return chosen
            targets, scored = [batch[0].label], [0]  # as many passes as the other ranks run
        with torch.no_grad(), eval_mode(self.student.model):
            packed, logprob_T = self.strategy.scoring(lambda: self.score(sources, targets, scored, stats))
        if not candidates:
            return chosen
        out = self._contrast(batch, candidates, question, packed, logprob_T, num_questions, iteration, stats)
        for c, q, weight, selected in zip(
            candidates, question, out.weight_R.tolist(), out.selected_R.tolist(), strict=True
        ):
            if selected:
                chosen.add(c, q, weight)
        return chosen

    def _contrast(
        self,
        batch: Sequence[Example],
        candidates: list[Candidate],
        question: list[int],
        packed: PackedHidden,
        logprob_T: Tensor,
        num_questions: int,
        iteration: int,
        stats: Counter[str],
    ) -> ContrastiveOutput:
        """Eq. 3, 6 and 7 over all candidates, and the counts that are logged."""
        device = logprob_T.device
        quality_R = self._quality(batch, candidates, question)
        positive_select, negative_select = self.config.selects
        out = contrastive_loss(
            logprob_T,
            packed.segment,
            torch.tensor(question, device=device),
            torch.tensor([c.positive for c in candidates], device=device),
            quality_R,
            beta=self.config.beta,
            delta=self.config.delta,
            positive_select=positive_select,
            negative_select=negative_select,
            num_questions=num_questions,
            question_key=torch.tensor([e.key for e in batch], device=device),
            iteration=iteration,
            seed=self.config.seed,
            impl=self.config.impl,
        )
        _count(stats, candidates, question, out, quality_R)
        return out

    def _quality(self, batch: Sequence[Example], candidates: list[Candidate], question: list[int]) -> Tensor | None:
        """s [R] of the candidates; None: every weight is 1."""
        if self.judges.positive is None and self.judges.negative is None:
            return None
        device = self.student.device
        score_R = torch.tensor([float(c.positive) for c in candidates], device=device)
        for judge in dict.fromkeys(j for j in self.judges if j is not None):
            judged = [i for i, c in enumerate(candidates) if self.judges[not c.positive] is judge]
            cases = [case for i in judged if (case := candidates[i].case) is not None]
            assert len(cases) == len(judged)
            found = torch.tensor(list(judge.scores(cases)), dtype=score_R.dtype, device=device)
            score_R[torch.tensor(judged, dtype=torch.long, device=device)] = found
        if not torch.isfinite(score_R).all():
            ids = ", ".join(
                sorted({batch[question[i]].id for i in (~torch.isfinite(score_R)).nonzero()[:, 0].tolist()})
            )
            raise RunError(f"{self.judges.name} gave a score that is not finite; questions {ids}")
        return score_R

    def _shared_by_quality(self, share: float, example: Example, stats: Counter[str]) -> list[float]:
        """Divide `share` among a question's positives by quality. All weights are 0 if every quality is 0."""
        quality_R = self._quality([example], list(example.positives), [0] * len(example.positives))
        assert quality_R is not None
        found = quality_R.tolist()
        for name in ("quality_positive", "weight_majority"):
            stats[name] += sum(found)  # type: ignore[assignment]
        for name in ("num_positive", "weighed_majority"):
            stats[name] += len(found)
        return [share * s / sum(found) if sum(found) else 0.0 for s in found]

    # Losses with gradient

    def _train(
        self, batch: Sequence[Example], weighted: Weighted, num_questions: int, stats: Counter[str]
    ) -> dict[str, Tensor]:
        """Second pass: labels, the optional reasoning task and the chosen candidates in one forward pass."""
        sources, targets, source_of, weights = self._label_targets(batch, num_questions)
        labels = len(targets)
        explain_at: dict[int, int] = {}
        for c, q in zip(weighted.candidates, weighted.question, strict=True):
            if q not in explain_at:
                explain_at[q] = len(sources)
                sources.append(batch[q].explain)
            targets.append(c.tokens)
            source_of.append(explain_at[q])
        stats["tokens"] += sum(map(len, targets))
        device, head = self.student.device, self.student.head
        positive_R = torch.tensor([True] * labels + [c.positive for c in weighted.candidates], device=device)
        weight_R = torch.tensor(weights + weighted.weight, dtype=torch.float32, device=device)
        is_label_R = torch.arange(len(targets), device=device) < labels
        scaled_R = weight_R * torch.where(is_label_R, self.alpha_pred, self.config.alpha_cl)  # Eq. 8 less a3 L_D
        with self.autocast():
            packed = self._hidden(sources, targets, source_of, stats)
            loss, nll_R, logprob_T = linear_rationale_loss(
                packed.hidden,
                head.weight,
                packed.target,
                packed.segment,
                positive_R,
                scaled_R,
                beta=weighted.beta,
                delta=weighted.delta,
                **head.options,
                impl=self.config.impl,
                return_logprob=True,
            )
            if self.audit:
                dnll_R = loss_terms(nll_R, positive_R, scaled_R, weighted.beta, weighted.delta)[1]
                dlogprob_T = (-dnll_R / torch.bincount(packed.segment, minlength=len(nll_R)))[packed.segment]
                self.audit.watch(packed.hidden, head, packed.target, logprob_T, loss, dlogprob_T)

        def part_of_loss(which_R: Tensor) -> Tensor:
            return loss_terms(nll_R, positive_R, weight_R * which_R, weighted.beta, weighted.delta)[0]

        return {"loss": loss, "loss_pred": part_of_loss(is_label_R), "loss_cl": part_of_loss(~is_label_R)}

    def _label_targets(
        self, batch: Sequence[Example], num_questions: int
    ) -> tuple[list[TokenIds], list[TokenIds], list[int], list[float]]:
        sources, targets = [e.predict for e in batch], [e.label for e in batch]
        for prompt, worked in (e.reason for e in batch if e.reason):
            sources.append(prompt)
            targets.append(worked)
        return sources, targets, list(range(len(sources))), [1 / num_questions] * len(targets)

    def _joint(
        self,
        batch: Sequence[Example],
        lagged: Mapping[str, Negative],
        num_questions: int,
        iteration: int,
        stats: Counter[str],
    ) -> dict[str, Tensor]:
        """The paper's single pass: gradient flows through every candidate, selected or not."""
        labels = self._train(batch, Weighted([], [], []), num_questions, stats)
        candidates, question = _candidates(batch, lagged)
        if not candidates:
            if self.strategy.sharded:  # as many passes as the other ranks run
                idle_T = self.score([batch[0].explain], [batch[0].label], [0], stats)[1]
                labels["loss"] = labels["loss"] + 0.0 * idle_T.sum()
            return labels
        packed, logprob_T = self.score([e.explain for e in batch], [c.tokens for c in candidates], question, stats)
        out = self._contrast(batch, candidates, question, packed, logprob_T, num_questions, iteration, stats)
        loss = labels["loss"] + self.config.alpha_cl * out.loss
        return {"loss": loss, "loss_pred": labels["loss_pred"], "loss_cl": out.loss}

    def _mutual_information(
        self, batch: Sequence[Example], num_questions: int, stats: Counter[str]
    ) -> dict[str, Tensor]:
        """`dss` and MI's extra term, from one pass over each task.

        The term is as in the released code: softmax on softmax, maximum over time with padding unmasked. A decoder-only
        student's prompt is left out of the maximum; the released code has an encoder for it.
        """
        none = torch.zeros((), device=self.student.device)
        loss_pred, predicted_QV = self._task([(e.predict, e.label) for e in batch], num_questions, stats)
        if reason := [e.reason for e in batch if e.reason]:
            loss_pred = loss_pred + self._task(reason, num_questions, stats)[0]
        if not (have := [q for q, e in enumerate(batch) if e.positives]):
            return {"loss": self.alpha_pred * loss_pred, "loss_pred": loss_pred, "loss_cl": none, "loss_mi": none}
        pairs = [(batch[q].explain, batch[q].positives[0].tokens) for q in have]
        loss_cl, explained_QV = self._task(pairs, num_questions, stats)
        loss_mi = F.cross_entropy(explained_QV, predicted_QV[have].detach(), reduction="sum") / num_questions
        loss = self.alpha_pred * loss_pred + self.config.alpha_cl * loss_cl + MI_WEIGHT * loss_mi
        return {"loss": loss, "loss_pred": loss_pred, "loss_cl": loss_cl, "loss_mi": loss_mi}

    def _task(
        self, pairs: Sequence[tuple[TokenIds, TokenIds]], num_questions: int, stats: Counter[str]
    ) -> tuple[Tensor, Tensor]:
        """Return 1/N of the sum of l over (prompt, target), and the maximum over time of each softmax [pairs, V]."""
        head, (prompts, targets) = self.student.head, zip(*pairs, strict=True)
        with self.autocast():
            packed = self.student.decode(self.student.encode(prompts), targets, range(len(pairs)))
            logprob_T = self._logprob(packed)
            assert packed.padded is not None and packed.first is not None
            logits_BLV = head.logits(packed.padded)
        stats["tokens"] += len(logprob_T)
        stats["body_tokens"] += packed.body_tokens
        position_L = torch.arange(logits_BLV.shape[1], device=logits_BLV.device)
        of_prompt_BL = position_L < torch.tensor(packed.first, device=logits_BLV.device)[:, None]
        pooled_BV = logits_BLV.float().softmax(-1).masked_fill(of_prompt_BL[:, :, None], 0).amax(1)
        every_R = torch.ones(len(pairs), device=logprob_T.device)
        loss = weighted_rationale_loss(
            logprob_T, packed.segment, every_R > 0, every_R / num_questions, beta=0.0, delta=None
        )[0]
        return loss, pooled_BV

    def score(
        self, sources: list[TokenIds], targets: list[TokenIds], source_of: list[int], stats: Counter[str]
    ) -> tuple[PackedHidden, Tensor]:
        """Hidden states at the targets' tokens, and log p of each [T]."""
        with self.autocast():
            packed = self._hidden(sources, targets, source_of, stats)
            return packed, self._logprob(packed)

    def _hidden(
        self, sources: list[TokenIds], targets: list[TokenIds], source_of: list[int], stats: Counter[str]
    ) -> PackedHidden:
        packed = self.student.hidden(sources, targets, source_of, shared=self.config.shared_prompts)
        stats["body_tokens"] += packed.body_tokens
        return packed

    def _logprob(self, packed: PackedHidden) -> Tensor:
        head = self.student.head
        result = linear_logprob(packed.hidden, head.weight, packed.target, **head.options, impl=self.config.impl)
        assert isinstance(result, Tensor)
        if self.audit:
            self.audit.watch(packed.hidden, head, packed.target, result)
        return result


def _candidates(batch: Sequence[Example], lagged: Mapping[str, Negative]) -> tuple[list[Candidate], list[int]]:
    candidates, question = [], []
    for q, example in enumerate(batch):
        for candidate in example.candidates(lagged):
            candidates.append(candidate)
            question.append(q)
    return candidates, question


def _count(
    stats: Counter[str],
    candidates: list[Candidate],
    question: list[int],
    out: ContrastiveOutput,
    quality_R: Tensor | None,
) -> None:
    """Active hinges by source, masked minorities, quality sums and weights by kind, for the log."""
    active_R, selected_R = out.active_R.tolist(), out.selected_R.tolist()
    minority_active, pushed = set(), set()
    for r, (c, q) in enumerate(zip(candidates, question, strict=True)):
        if c.positive:
            continue
        stats[c.source] += 1
        stats[f"{c.source}_active"] += active_R[r]
        if c.source == "minority" and active_R[r]:
            minority_active.add(q)
        if selected_R[r]:
            pushed.add(q)
    stats["minority_questions"] += len(minority_active)
    stats["masked_minorities"] += len(minority_active - pushed)
    if quality_R is not None:
        for c, s in zip(candidates, quality_R.tolist(), strict=True):
            weight, side = (s, "positive") if c.positive else (1 - s, "negative")  # Eq. 6 and 7
            stats[f"quality_{side}"] += s
            stats[f"num_{side}"] += 1
            kind = weight_kind(c)
            for suffix in ("", f"_{kind}"):
                stats[f"weighed{suffix}"] += 1
                stats[f"weight{suffix}"] += weight
    stats["tokens"] += sum(len(c.tokens) for c in candidates)
