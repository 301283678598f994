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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.distributed.parallel import Strategy
from qcrd_fast.errors import RunError
from qcrd_fast.losses import ContrastiveOutput, contrastive_loss, weighted_rationale_loss
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prompts import PREDICT, REASON, TokenIds
from qcrd_fast.models.student import PackedHidden, Student
from qcrd_fast.ops.linear_kl import linear_kl
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.rationale_loss import KEPT_BYTES, linear_rationale_loss, loss_terms
from qcrd_fast.ops.topk_kl import topk_kl
from qcrd_fast.teacher_signal.local import TopK
from qcrd_fast.train.audit import Audit
from qcrd_fast.train.examples import Candidate, Example, longest_text
from qcrd_fast.train.judging import weight_kind
from qcrd_fast.train.methods import method_of
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.run_state import RunState
from qcrd_fast.train.teaching import Covered, TargetText, Teaching, Whole, asked_of, pad_all, padded
from qcrd_fast.train.token_weights import TokenScores, log_ratio
from qcrd_fast.utils.oom import explains_oom, for_training

MI_WEIGHT = 0.1


Losses = dict[str, Tensor]  # 0-d, by name; those of micro-batches add up
Stats = Counter[str]  # counts and sums of a micro-batch, for the log


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Questions of one pass, and what the pass has to know of its optimizer step.

    lagged: the student's samples, by question id. num_questions: N, of the whole optimizer batch. weight: scales the
    loss; 0 for a rank without questions here. sampled_tokens: of all samples of the step, on all ranks: the normaliser
    of on-policy methods. domain_factors: what a question of a domain counts, beside its own weight. audit: watches the
    pass.
    """

    examples: Sequence[Example]
    lagged: Mapping[str, Negative]
    num_questions: int
    step: int = 0
    iteration: int = 0
    weight: float = 1.0
    sampled_tokens: int = 0
    domain_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    audit: Audit | None = None

    def counts(self, example: Example) -> float:
        """What a question counts: its own weight and its domain's; both are 1 unless set."""
        return example.weight * self.domain_factors.get(example.domain, 1.0)


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


class Pass(NamedTuple):
    """A training pass's targets: which are not negatives, their weights with the factors of Eq. 8, and the negatives'
    terms."""

    positive_R: Tensor
    weight_R: Tensor
    beta: float
    delta: float | None


class Signal(NamedTuple):
    """What a teacher says of a pass: log p of the candidates' tokens, its distribution at those, or its likeliest
    tokens at those of all targets."""

    other_T: Tensor | None = None
    covered: Covered | None = None
    whole: Whole | None = None


class Objective:
    """Compute the loss of a micro-batch, run its backward pass and return metrics.

    `step` returns ({loss, loss_pred, loss_cl: 0-d tensors that add up over micro-batches}, counts and sums of the
    scored candidates). Its `loss` is Eq. 8 without the discriminator's term, which has no gradient here.

    state: what may change during the run; default: `config`'s impl and no judges. teaching: the teacher or reference
    that a pass queries, for methods with one.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        state: RunState | None,
        autocast: Callable[[], torch.autocast],
        warmup_steps: int = 0,
        strategy: Strategy | None = None,
        teaching: Teaching | None = None,
    ):
        self.student, self.config, self.autocast = student, config, autocast
        self.state = state or RunState(config.impl)
        self.strategy = strategy or Strategy(student.model)
        self.warmup_steps, self.teaching = warmup_steps, teaching
        self.method = method_of(config)
        self.alpha_pred = config.alpha_pred if self.method.teaches_rationales else 1.0

    @explains_oom("a training step", for_training, lambda _, micro: longest_text(micro.examples))
    def step(self, micro: MicroBatch) -> tuple[Losses, Stats]:
        """Run a micro-batch: forward pass and backward pass."""
        training, stats = self.strategy.training, Stats()
        if self.method.contrastive and self.config.forward == "joint":
            losses, passed = training(lambda: self._joint(micro))
        elif self.method.mutual_information:
            losses, passed = training(lambda: self._mutual_information(micro))
        else:
            weighted, stats = self.weigh(micro)
            signal = self._ask_teacher(micro, weighted)
            losses, passed = training(lambda: self._train(micro, weighted, signal))
        if losses["loss"].requires_grad:
            (losses["loss"] * (micro.weight * self.strategy.scale)).backward()
        stats.update(passed)
        return {name: micro.weight * value.detach() for name, value in losses.items()}, (
            stats if micro.weight else Stats()
        )

    def largest_pass(self, micro: MicroBatch, weighted: Weighted) -> Tensor:
        """Return the loss of the pass with the most activations for these candidates, without querying a teacher."""
        if self.method.mutual_information:
            return self._mutual_information(micro)[0]["loss"]
        if self.method.contrastive and self.config.forward == "joint":
            loss = self._train(micro, Weighted([], [], []))[0]["loss"]
            return loss + self.score_candidates(micro, weighted).sum()
        return self._train(micro, weighted)[0]["loss"]

    def score_candidates(self, micro: MicroBatch, weighted: Weighted) -> Tensor:
        """log p of the tokens of these candidates [T], each after its question's prompt."""
        targets = [c.tokens for c in weighted.candidates]
        return self.score([e.explain for e in micro.examples], targets, weighted.question)[1]

    def label_losses(self, prompts: Sequence[TokenIds], labels: Sequence[TokenIds]) -> list[float]:
        """-log p of each label given its prompt [nats], without gradient, in eval mode."""
        with torch.no_grad(), eval_mode(self.student.model):
            logprob_T = self.score(list(prompts), list(labels), list(range(len(labels))))[1]
        return [-float(part.sum()) for part in logprob_T.double().cpu().split([len(label) for label in labels])]

    # Weights

    def weigh(self, micro: MicroBatch) -> tuple[Weighted, Stats]:
        """Return the candidates that get gradient; the contrastive method scores all of them first."""
        if self.method.contrastive:
            return self._score_and_select(micro)
        batch, lagged, stats = micro.examples, micro.lagged, Stats()
        if self.method.on_policy:
            own = [(q, lagged[e.id]) for q, e in enumerate(batch) if e.id in lagged]
            candidates = [Candidate(n.text, n.tokens, "sampled", n.case, view=batch[q].view) for q, n in own]
            tokens = max(micro.sampled_tokens, 1)
            shares = [len(n.tokens) / tokens * micro.counts(batch[q]) for q, n in own]
            return Weighted(candidates, [q for q, _ in own], shares), stats
        warm = self.method.warmup is not None and micro.step < self.warmup_steps
        weights = self.method.warmup if warm and self.method.warmup else self.method.weights
        beta = self.config.beta if self.method.reference else self.method.beta
        chosen = Weighted([], [], [], beta=0.0 if warm else beta)
        judged = self.state.judges.positive is not None and weights is self.method.weights
        own_share = self.config.gkd_lambda if self.method.divergence else 0.0
        for q, example in enumerate(batch):
            counts = micro.counts(example) / micro.num_questions
            share = (1 - own_share) * counts
            of_positives, of_minority = (
                weights(share, len(example.positives), len(example.minority)) if share else ([], [])
            )
            if judged and of_positives:
                of_positives, found_stats = self._shared_by_quality(sum(of_positives), example)
                stats.update(found_stats)
            for of_kind, found in ((example.positives, of_positives), (example.minority, of_minority)):
                for candidate, weight in zip(of_kind, found, strict=False):
                    chosen.add(candidate, q, weight)
            if own_share and (said := lagged.get(example.id)):
                sampled = Candidate(said.text, said.tokens, "sampled", said.case, view=example.view)
                chosen.add(sampled, q, own_share * counts)
        return chosen, stats

    def _score_and_select(self, micro: MicroBatch) -> tuple[Weighted, Stats]:
        """First pass: score every candidate without gradient in eval mode, select, and drop inactive hinges."""
        batch = micro.examples
        candidates, question = _candidates(micro)
        chosen = Weighted([], [], [], self.config.beta, self.config.delta)
        (sources, scored), targets = _prompts(batch, candidates, question), [c.tokens for c in candidates]
        if not candidates:
            if not self.strategy.sharded:
                return chosen, Stats()
            targets, scored = [batch[0].label], [0]  # as many passes as the other ranks run
        with torch.no_grad(), eval_mode(self.student.model):
            packed, logprob_T = self.strategy.scoring(lambda: self.score(sources, targets, scored, micro.audit))
        stats = Stats(body_tokens=packed.body_tokens)
        if not candidates:
            return chosen, stats
        out, contrasted = self._contrast(micro, candidates, question, packed, logprob_T)
        stats.update(contrasted)
        for c, q, weight, selected in zip(
            candidates, question, out.weight_R.tolist(), out.selected_R.tolist(), strict=True
        ):
            if selected:
                chosen.add(c, q, weight * micro.counts(batch[q]))
        return chosen, stats

    def _contrast(
        self,
        micro: MicroBatch,
        candidates: list[Candidate],
        question: list[int],
        packed: PackedHidden,
        logprob_T: Tensor,
    ) -> tuple[ContrastiveOutput, Stats]:
        """Eq. 3, 6 and 7 over all candidates, and the counts that are logged."""
        device = logprob_T.device
        quality_R = self.quality(micro.examples, candidates, question)
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
            num_questions=micro.num_questions,
            question_key=torch.tensor([e.key for e in micro.examples], device=device),
            iteration=micro.iteration,
            seed=self.config.seed,
            impl=self.state.impl,
        )
        return out, _counted(candidates, question, out, quality_R)

    def quality(self, batch: Sequence[Example], candidates: list[Candidate], question: list[int]) -> Tensor | None:
        """s [R] of the candidates; None: every weight is 1."""
        judges = self.state.judges
        if judges.positive is None and judges.negative is None:
            return None
        device = self.student.device
        score_R = torch.tensor([float(c.positive) for c in candidates], device=device)
        for judge in dict.fromkeys(j for j in judges if j is not None):
            judged = [i for i, c in enumerate(candidates) if judges[not c.positive] is judge]
            cases = [case for i in judged if (case := candidates[i].case) is not None]
            assert len(cases) == len(judged)
            found = torch.tensor(list(judge.scores(cases)), dtype=score_R.dtype, device=device)
            score_R[torch.tensor(judged, dtype=torch.long, device=device)] = found
        if not torch.isfinite(score_R).all():
            ids = ", ".join(
                sorted({batch[question[i]].id for i in (~torch.isfinite(score_R)).nonzero()[:, 0].tolist()})
            )
            raise RunError(f"{judges.name} gave a score that is not finite; questions {ids}")
        return score_R

    def _shared_by_quality(self, share: float, example: Example) -> tuple[list[float], Stats]:
        """Divide `share` among a question's positives by quality. All weights are 0 if every quality is 0."""
        quality_R = self.quality([example], list(example.positives), [0] * len(example.positives))
        assert quality_R is not None
        found, stats = quality_R.tolist(), Stats()
        for name in ("quality_positive", "weight_majority"):
            stats[name] += sum(found)  # type: ignore[assignment]
        for name in ("num_positive", "weighed_majority"):
            stats[name] += len(found)
        return [share * s / sum(found) if sum(found) else 0.0 for s in found], stats

    # Losses with gradient

    def _ask_teacher(self, micro: MicroBatch, weighted: Weighted) -> Signal | None:
        """What the teacher says of the tokens that `_train` trains on; None where nobody is asked."""
        if self.teaching is None:
            return None
        chosen = asked_of(micro.examples, weighted.candidates, weighted.question)
        if self.method.token_weights:
            return Signal(other_T=self.teaching.scores(chosen) if chosen else None)
        if self.method.divergence:
            return Signal(whole=self.teaching.whole(chosen) if chosen else None)
        return Signal(covered=self.teaching.top(padded(self._label_asked(micro.examples) + chosen, self._pad)))

    @property
    def _pad(self) -> int | None:
        """The token that targets are padded with to one length, as the released code of mentor-kd does."""
        return self.student.pad_id if self.config.mentor_kd_literal else None

    def _train(self, micro: MicroBatch, weighted: Weighted, signal: Signal | None = None) -> tuple[Losses, Stats]:
        """Second pass: labels, the optional reasoning task and the chosen candidates in one forward pass."""
        batch = micro.examples
        sources, targets, source_of, weights = self.label_targets(micro)
        labels = len(targets)
        explain_at: dict[tuple[int, tuple[int, ...]], int] = {}
        for c, q in zip(weighted.candidates, weighted.question, strict=True):
            prompt = c.prompt or batch[q].explain
            if (q, tuple(prompt)) not in explain_at:
                explain_at[q, tuple(prompt)] = len(sources)
                sources.append(prompt)
            targets.append(c.tokens)
            source_of.append(explain_at[q, tuple(prompt)])
        lengths = [len(t) for t in targets]
        device = self.student.device
        positive_R = torch.tensor([True] * labels + [c.positive for c in weighted.candidates], device=device)
        weight_R = torch.tensor(weights + weighted.weight, dtype=torch.float32, device=device)
        is_label_R = torch.arange(len(targets), device=device) < labels
        scaled_R = weight_R * torch.where(is_label_R, self.alpha_pred, self.config.alpha_cl)  # Eq. 8 less a3 L_D
        pass_ = Pass(positive_R, scaled_R, weighted.beta, weighted.delta)
        mentor = self.method.teacher == "mentor" and self.config.kd_lambda > 0
        if mentor and self._pad is not None:
            targets = pad_all(targets, self._pad)
        with self.autocast():
            packed = self._hidden(sources, targets, source_of)
            if self.method.token_weights:
                loss, value_R, extras = self._token_weighted(micro, packed, pass_, labels, signal)
            elif mentor:
                loss, value_R, extras = self._mentor_kd(micro, packed, pass_, lengths, signal)
            elif self.method.divergence:
                loss, value_R, extras = self._divergence(micro, packed, pass_, sum(lengths[:labels]), signal)
            else:
                loss, value_R, extras = self._cross_entropy(micro, packed, pass_)
        losses = {"loss": loss, **self._shares(value_R, is_label_R, weight_R, pass_), **extras}
        return losses, Stats(tokens=sum(lengths), body_tokens=packed.body_tokens)

    def _cross_entropy(self, micro: MicroBatch, packed: PackedHidden, of: Pass) -> tuple[Tensor, Tensor, Losses]:
        """(loss, l of each target, nothing more to log) by the fused training pass."""
        head = self.student.head
        loss, nll_R, logprob_T = linear_rationale_loss(
            packed.hidden,
            head.weight,
            packed.target,
            packed.segment,
            of.positive_R,
            of.weight_R,
            beta=of.beta,
            delta=of.delta,
            **head.options,
            impl=self.state.impl,
            return_logprob=True,
        )
        if micro.audit:
            dnll_R = loss_terms(nll_R, *of)[1]
            dlogprob_T = (-dnll_R / torch.bincount(packed.segment, minlength=len(nll_R)))[packed.segment]
            micro.audit.watch(packed.hidden, head, packed.target, logprob_T, loss, dlogprob_T)
        return loss, nll_R, {}

    def _shares(self, nll_R: Tensor, is_label_R: Tensor, weight_R: Tensor, of: Pass) -> Losses:
        """The loss's two terms, without their factors a1 and a2."""
        parts = {"loss_pred": is_label_R, "loss_cl": ~is_label_R}
        return {
            name: loss_terms(nll_R, of.positive_R, weight_R * which, of.beta, of.delta)[0]
            for name, which in parts.items()
        }

    def _token_weighted(
        self, micro: MicroBatch, packed: PackedHidden, of: Pass, labels: int, signal: Signal | None
    ) -> tuple[Tensor, Tensor, Losses]:
        """(loss, weighted l of each target, more to log): the tokens of labels weigh 1, those of rationales as the
        method says.

        What is logged beside the loss sums over micro-batches as the loss does: of on-policy methods the mean over
        sampled tokens of log pi_S - log pi_T, an unbiased estimate of KL(pi_S || pi_T); of npo its own loss, of its
        negatives.
        """
        assert self.method.token_weights
        logprob_T = self._logprob(packed, micro.audit, KEPT_BYTES)
        detached_T, is_label_T = logprob_T.detach(), packed.segment < labels
        other_T = torch.zeros_like(detached_T)
        if signal is not None and signal.other_T is not None:
            other_T = other_T.masked_scatter(~is_label_T, signal.other_T.to(detached_T.dtype))
        scores = TokenScores(detached_T, other_T, packed.segment, of.positive_R, self.config.npo_beta)
        token_weight_T = self.method.token_weights(scores).masked_fill(is_label_T, 1.0)
        loss, _, _, nll_R = weighted_rationale_loss(
            logprob_T,
            packed.segment,
            of.positive_R,
            of.weight_R,
            beta=of.beta,
            delta=of.delta,
            token_weight_T=token_weight_T,
        )
        extras: Losses = {}
        if self.method.on_policy:
            gap_T = (detached_T - other_T).masked_fill(is_label_T, 0)
            extras["teacher_kl"] = gap_T.double().sum().to(gap_T.dtype) / max(micro.sampled_tokens, 1)
        elif self.method.reference:
            b, count_R = self.config.npo_beta, torch.bincount(packed.segment, minlength=len(nll_R)).clamp(min=1)
            npo_R = 2 / (b * count_R) * F.softplus(b * log_ratio(scores))
            scale = self.config.alpha_cl or 1.0
            extras["loss_npo"] = (npo_R * of.weight_R / scale).masked_fill(of.positive_R, 0).sum()
        return loss, nll_R, extras

    def _mentor_kd(
        self, micro: MicroBatch, packed: PackedHidden, of: Pass, lengths: list[int], signal: Signal | None
    ) -> tuple[Tensor, Tensor, Losses]:
        """(1 - lambda) CE + lambda KL(teacher || student) over the tokens of labels and rationales, both means over a
        target's tokens with the same weights; with `--mentor-kd-literal` the KL is a mean over all positions of the
        padded targets.

        lengths: of the targets, before they were padded.
        """
        config, head = self.config, self.student.head
        literal = self._pad is not None
        segment_T, T = packed.segment, len(packed.segment)
        valid_T = torch.ones(T, dtype=torch.bool, device=segment_T.device)
        if literal:
            valid_T = torch.tensor([t < n for n in lengths for t in range(max(lengths))], device=segment_T.device)
        options: dict[str, Any] = dict(**head.options, impl=self.state.impl, workspace_bytes=KEPT_BYTES)
        out = linear_logprob(packed.hidden, head.weight, packed.target, return_lse=True, **options)
        if micro.audit:
            micro.audit.watch(packed.hidden.detach(), head, packed.target, out.logprob.detach())
        ce, _, _, nll_R = weighted_rationale_loss(
            out.logprob, segment_T, of.positive_R, of.weight_R, beta=0.0, delta=None, valid_T=valid_T
        )
        lse_T, tau = out.lse, config.kd_temperature
        if tau != 1:
            lse_T = linear_logprob(
                packed.hidden, head.weight, packed.target, return_lse=True, temperature=tau, **options
            ).lse
        covered = signal.covered if signal and signal.covered else _unknown(T, config.top_logprobs, packed.hidden)
        kl_T = topk_kl(
            packed.hidden, head.weight, lse_T, *covered.top, **head.options, temperature=tau, tail=config.teacher_tail
        ).where(covered.covered_T, 0)
        if literal:
            kl = len(micro.examples) / micro.num_questions * kl_T.mean()
        else:
            kl = weighted_rationale_loss(
                -kl_T, segment_T, of.positive_R, of.weight_R, beta=0.0, delta=None, valid_T=covered.covered_T
            )[0]
        loss = (1 - config.kd_lambda) * ce + config.kd_lambda * kl
        return loss, nll_R, {"teacher_kl": kl.detach()}

    def _divergence(
        self, micro: MicroBatch, packed: PackedHidden, of: Pass, label_tokens: int, signal: Signal | None
    ) -> tuple[Tensor, Tensor, Losses]:
        """(loss, the value of each target, nothing more to log).

        The value is the mean -log p over the tokens of labels, which come first, and the mean divergence from the
        teacher over those of rationales; in `loss_cl` the divergence stands in for l.
        """
        config, head, ours_TH = self.config, self.student.head, packed.hidden[label_tokens:]
        labels = dataclasses.replace(packed, hidden=packed.hidden[:label_tokens], target=packed.target[:label_tokens])
        value_T = -self._logprob(labels, micro.audit, KEPT_BYTES)
        if len(ours_TH):
            # the student's own where a pass is only counted
            whole = (signal and signal.whole) or Whole(ours_TH.detach(), head)
            rows = min(len(head.weight), len(whole.head.weight))  # what pads the longer head is nobody's token
            mine, theirs = head.first(rows), whole.head.first(rows)
            kl_T = linear_kl(
                ours_TH, mine.weight, whole.hidden_TG, theirs.weight, beta=config.gkd_beta,
                temperature=config.kd_temperature,
                **mine.options, **{f"teacher_{name}": x for name, x in theirs.options.items()},
                impl=self.state.impl, workspace_bytes=KEPT_BYTES,
            )  # fmt: skip
            value_T = torch.cat([value_T, kl_T])
        loss, _, _, value_R = weighted_rationale_loss(
            -value_T, packed.segment, of.positive_R, of.weight_R, beta=0.0, delta=None
        )
        return loss, value_R, {}

    def _label_asked(self, batch: Sequence[Example]) -> list[TargetText]:
        """`label_targets` as a teacher is asked for them."""
        labels = [TargetText(e, PREDICT, e.label, e.answer) for e in batch]
        return labels + [TargetText(e, REASON, e.reason[1], view=e.reason_view) for e in batch if e.reason]

    def label_targets(self, micro: MicroBatch) -> tuple[list[TokenIds], list[TokenIds], list[int], list[float]]:
        """(prompts, targets, which prompt each target follows, weights with 1/N) of labels and the reasoning task."""
        batch = micro.examples
        sources, targets = [e.predict for e in batch], [e.label for e in batch]
        counts = [micro.counts(e) for e in batch]
        for e in batch:
            if e.reason:
                sources.append(e.reason[0])
                targets.append(e.reason[1])
                counts.append(micro.counts(e))
        return sources, targets, list(range(len(sources))), [count / micro.num_questions for count in counts]

    def _joint(self, micro: MicroBatch) -> tuple[Losses, Stats]:
        """The paper's single pass: gradient flows through every candidate, selected or not."""
        batch = micro.examples
        labels, stats = self._train(micro, Weighted([], [], []))
        candidates, question = _candidates(micro)
        if not candidates:
            if self.strategy.sharded:  # as many passes as the other ranks run
                idle, idle_T = self.score([batch[0].explain], [batch[0].label], [0], micro.audit)
                labels["loss"] = labels["loss"] + 0.0 * idle_T.sum()
                stats["body_tokens"] += idle.body_tokens
            return labels, stats
        sources, source_of = _prompts(batch, candidates, question)
        packed, logprob_T = self.score(sources, [c.tokens for c in candidates], source_of, micro.audit)
        stats["body_tokens"] += packed.body_tokens
        out, contrasted = self._contrast(micro, candidates, question, packed, logprob_T)
        stats.update(contrasted)
        loss = labels["loss"] + self.config.alpha_cl * out.loss
        return {"loss": loss, "loss_pred": labels["loss_pred"], "loss_cl": out.loss}, stats

    def _mutual_information(self, micro: MicroBatch) -> tuple[Losses, Stats]:
        """`dss` and MI's extra term, from one pass over each task.

        The term is as in the released code: softmax on softmax, maximum over time with padding unmasked. A decoder-only
        student's prompt is left out of the maximum; the released code has an encoder for it.
        """
        batch, none = micro.examples, torch.zeros((), device=self.student.device)
        loss_pred, predicted_QV, stats = self._task([(e.predict, e.label) for e in batch], micro)
        if reason := [e.reason for e in batch if e.reason]:
            loss_reason, _, more = self._task(reason, micro)
            loss_pred = loss_pred + loss_reason
            stats.update(more)
        if not (have := [q for q, e in enumerate(batch) if e.positives]):
            losses = {"loss": self.alpha_pred * loss_pred, "loss_pred": loss_pred, "loss_cl": none, "loss_mi": none}
            return losses, stats
        pairs = [(batch[q].positives[0].prompt or batch[q].explain, batch[q].positives[0].tokens) for q in have]
        loss_cl, explained_QV, more = self._task(pairs, micro)
        stats.update(more)
        loss_mi = F.cross_entropy(explained_QV, predicted_QV[have].detach(), reduction="sum") / micro.num_questions
        loss = self.alpha_pred * loss_pred + self.config.alpha_cl * loss_cl + MI_WEIGHT * loss_mi
        return {"loss": loss, "loss_pred": loss_pred, "loss_cl": loss_cl, "loss_mi": loss_mi}, stats

    def _task(self, pairs: Sequence[tuple[TokenIds, TokenIds]], micro: MicroBatch) -> tuple[Tensor, Tensor, Stats]:
        """Return 1/N of the sum of l over (prompt, target), the maximum over time of each softmax [pairs, V], and
        counts."""
        head, (prompts, targets) = self.student.head, zip(*pairs, strict=True)
        with self.autocast():
            packed = self.student.decode(self.student.encode(prompts), targets, range(len(pairs)))
            logprob_T = self._logprob(packed, micro.audit)
            assert packed.padded is not None and packed.first is not None
            logits_BLV = head.logits(packed.padded)
        position_L = torch.arange(logits_BLV.shape[1], device=logits_BLV.device)
        of_prompt_BL = position_L < torch.tensor(packed.first, device=logits_BLV.device)[:, None]
        pooled_BV = logits_BLV.float().softmax(-1).masked_fill(of_prompt_BL[:, :, None], 0).amax(1)
        every_R = torch.ones(len(pairs), device=logprob_T.device)
        loss = weighted_rationale_loss(
            logprob_T, packed.segment, every_R > 0, every_R / micro.num_questions, beta=0.0, delta=None
        )[0]
        return loss, pooled_BV, Stats(tokens=len(logprob_T), body_tokens=packed.body_tokens)

    def score(
        self, sources: list[TokenIds], targets: list[TokenIds], source_of: list[int], audit: Audit | None = None
    ) -> tuple[PackedHidden, Tensor]:
        """Hidden states at the targets' tokens, and log p of each [T]."""
        with self.autocast():
            packed = self._hidden(sources, targets, source_of)
            return packed, self._logprob(packed, audit)

    def _hidden(self, sources: list[TokenIds], targets: list[TokenIds], source_of: list[int]) -> PackedHidden:
        return self.student.hidden(sources, targets, source_of, shared=self.config.shared_prompts)

    def _logprob(self, packed: PackedHidden, audit: Audit | None, workspace_bytes: int = 0) -> Tensor:
        head = self.student.head
        result = linear_logprob(
            packed.hidden,
            head.weight,
            packed.target,
            **head.options,
            impl=self.state.impl,
            workspace_bytes=workspace_bytes,
        )
        assert isinstance(result, Tensor)
        if audit:
            audit.watch(packed.hidden, head, packed.target, result)
        return result


def _unknown(T: int, k: int, hidden_TH: Tensor) -> Covered:
    """A teacher's K tokens that weigh nothing, for a pass that is only counted."""
    ids_TK = torch.zeros(T, k, dtype=torch.long, device=hidden_TH.device)
    none_T = torch.zeros(T, dtype=torch.bool, device=hidden_TH.device)
    return Covered(TopK(ids_TK, torch.zeros(T, k, dtype=torch.float32, device=hidden_TH.device)), none_T)


def _candidates(micro: MicroBatch) -> tuple[list[Candidate], list[int]]:
    candidates, question = [], []
    for q, example in enumerate(micro.examples):
        for candidate in example.candidates(micro.lagged):
            candidates.append(candidate)
            question.append(q)
    return candidates, question


def _prompts(
    batch: Sequence[Example], candidates: Sequence[Candidate], question: Sequence[int]
) -> tuple[list[TokenIds], list[int]]:
    """(prompts, which of them each candidate follows): a prompt a question, and those of views of their own behind
    them."""
    sources, source_of = [e.explain for e in batch], list(question)
    at: dict[tuple[int, tuple[int, ...]], int] = {}
    for i, candidate in enumerate(candidates):
        if candidate.prompt is not None:
            key = question[i], tuple(candidate.prompt)
            if key not in at:
                at[key] = len(sources)
                sources.append(candidate.prompt)
            source_of[i] = at[key]
    return sources, source_of


def _counted(
    candidates: list[Candidate], question: list[int], out: ContrastiveOutput, quality_R: Tensor | None
) -> Stats:
    """Active hinges by source, masked minorities, quality sums and weights by kind, for the log."""
    stats = Stats()
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
    return stats
