"""Cross-fitting: each question is scored by a discriminator that was trained without it.

A discriminator repeats the labels of what it was trained on, so the scores of a run's own rationales are worth
something out of fold alone. A question's fold is a hash of its text and the seed: another spelling of a question is in
the same fold, and what a checkpoint scores later needs no list of who was trained on what.

Shapes: R rationales, K folds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcrd_fast.config import LEGACY, TrainConfig
from qcrd_fast.data.replies import is_correct, parse_choices
from qcrd_fast.data.schema import Question, Rationale, leak_key, question_text
from qcrd_fast.discriminator.metrics import auc_by_fold, calibration, interval, platt, question_weights
from qcrd_fast.discriminator.model import Discriminator, Pair, build_discriminator
from qcrd_fast.discriminator.trainer import DiscriminatorTrainer
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.student import MAX_TOKENS
from qcrd_fast.utils.keyed import keyed

MAX_CHECKED, RESAMPLES = 1000, 1000  # questions that calibration and held-out AUC are computed on, bootstraps over them
_PLATT = "platt"  # [K, 2] float64 among the tensors, where the scores are calibrated


class CrossFitted(nn.Module):
    """K discriminators, one for each fold of the questions; with K = 1 a single one for all of them.

    `score` is the sigmoid of a_k logit + b_k, where k is the question's fold and (a_k, b_k) is `platt[k]`.
    """

    def __init__(self, models: Sequence[Discriminator], seed: int = 0):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.seed = seed
        self.platt: list[tuple[float, float]] | None = None
        self._fold = functools.lru_cache(maxsize=100_000)(self._hash)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def fold(self, question: str) -> int:
        """The fold of a question, by its text; the discriminator of this number has not seen the question."""
        return self._fold(question) if len(self.models) > 1 else 0

    def _hash(self, question: str) -> int:
        return keyed(self.seed, "fold", leak_key(Question("", question))) % len(self.models)

    @torch.no_grad()
    def logits(self, pairs: Sequence[Pair], max_tokens: int = MAX_TOKENS) -> Tensor:
        """Return uncalibrated logit_R of (question, rationale) pairs, each from its fold's discriminator, in eval
        mode."""
        return self.by_model(pairs, self.fold, max_tokens)

    @torch.no_grad()
    def by_model(self, pairs: Sequence[Pair], which: Callable[[str], int], max_tokens: int = MAX_TOKENS) -> Tensor:
        """Return logit_R of `pairs`, each from discriminator number `which(question)`."""
        return self._of_folds(pairs, lambda k, some: self._model(k).logits(some, max_tokens), which)

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair], max_tokens: int = MAX_TOKENS) -> Tensor:
        """score_R in (0, 1) of `pairs` in their order, on the module's device; eval mode, without gradient."""

        def scored(k: int, some: list[Pair]) -> Tensor:
            logit_R = self._model(k).logits(some, max_tokens)
            if self.platt is not None:
                slope, offset = self.platt[k]
                logit_R = slope * logit_R + offset
            return torch.sigmoid(logit_R)

        return self._of_folds(pairs, scored, self.fold)

    def tensors(self) -> dict[str, Tensor]:
        """The weights of all folds, and the calibration; a single discriminator's under its own names."""
        single = len(self.models) == 1
        found = {
            name if single else f"fold-{k}.{name}": tensor
            for k in range(len(self.models))
            for name, tensor in self._model(k).tensors().items()
        }
        return found | ({_PLATT: torch.tensor(self.platt, dtype=torch.float64)} if self.platt is not None else {})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned. Raises `InputError` if names or shapes are those of another discriminator."""
        own = dict(tensors)
        found = own.pop(_PLATT, None)
        count = len(self.models)
        if found is not None and tuple(found.shape) != (count, 2):
            raise InputError(f"the calibration is of shape {tuple(found.shape)}; {count} folds need ({count}, 2)")
        if count == 1:
            self._model(0).load_tensors(own)
        else:
            prefixes = [f"fold-{k}." for k in range(count)]
            if stray := [name for name in own if not name.startswith(tuple(prefixes))]:
                raise InputError(
                    f"{len(stray)} weights are not those of a discriminator of {count} folds, e.g. {stray[0]}"
                )
            for k, prefix in enumerate(prefixes):
                self._model(k).load_tensors({n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)})
        self.platt = None if found is None else [(float(a), float(b)) for a, b in found.tolist()]

    def _model(self, k: int) -> Discriminator:
        model = self.models[k]
        assert isinstance(model, Discriminator)
        return model

    def _of_folds(
        self, pairs: Sequence[Pair], run: Callable[[int, list[Pair]], Tensor], which: Callable[[str], int]
    ) -> Tensor:
        by_fold: dict[int, list[int]] = {}
        for i, (question, _) in enumerate(pairs):
            by_fold.setdefault(which(question), []).append(i)
        with eval_mode(self):
            parts = [run(k, [pairs[i] for i in rows]) for k, rows in by_fold.items()]
        if not parts:
            return torch.empty(0, device=self.device)
        order = torch.tensor([i for rows in by_fold.values() for i in rows], device=self.device)
        return torch.cat(parts)[order.argsort()]


def build_judge(options: Mapping[str, Any], student_model: Any, student_tokenizer: Any) -> CrossFitted | None:
    """Build the discriminators of a run's options, all equal at first; None for `--discriminator none`.

    Missing options mean what they did in older runs.
    """
    known = TrainConfig().to_dict() | LEGACY | {name: value for name, value in options.items() if value is not None}
    # may be of a file
    TrainConfig.from_dict({name: known[name] for name in ("discriminator", "discriminator_folds", "seed")})
    first = build_discriminator(known["discriminator"], student_model, student_tokenizer, seed=known["seed"])
    if first is None:
        return None
    count, shared = max(known["discriminator_folds"], 1), first.tokenizer
    copies = [copy.deepcopy(first, {id(shared): shared}) for _ in range(count - 1)]
    return CrossFitted([first, *copies], known["seed"])


@dataclasses.dataclass(frozen=True)
class Check:
    """How a discriminator does on rationales of questions that it has not seen.

    auc, auc_low, auc_high: of right against wrong, with the 95 % interval over questions; None where there are not
    both.
    calibration_error: of the scores in use. refused: auc_low is under `--discriminator-min-auc`.
    """

    auc: float | None
    auc_low: float | None
    auc_high: float | None
    calibration_error: float | None
    questions: int
    rationales: int
    refused: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def results(self) -> dict[str, Any]:
        """For `eval_results.json`."""
        return {
            "discriminator_auc": self.auc,
            "discriminator_auc_low": self.auc_low,
            "discriminator_refused": self.refused,
        }

    @property
    def low_text(self) -> str:
        return "cannot be measured" if self.auc_low is None else f"has a lower bound of {self.auc_low:.3f}"

    @property
    def text(self) -> str:
        """For the log."""
        if self.auc is None or self.auc_low is None:
            return (
                f"held-out AUC unknown: {self.questions} held-out questions with {self.rationales} rationales, "
                "not both classes"
            )
        return (
            f"held-out AUC {self.auc:.3f} (95% interval {self.auc_low:.3f} to {self.auc_high:.3f}) on "
            f"{self.rationales} rationales of {self.questions} questions, calibration error "
            f"{self.calibration_error:.3f}"
        )


class CrossFitTrainer:
    """Train the discriminators of a `CrossFitted`, each on the other folds' questions, and check them."""

    def __init__(self, discriminator: CrossFitted, config: TrainConfig):
        self.discriminator, self.config = discriminator, config
        count = len(discriminator.models)
        self.trainers = [
            DiscriminatorTrainer(discriminator._model(k), config, k if count > 1 else None) for k in range(count)
        ]

    @property
    def optimizer_bytes(self) -> int:
        return 2 * sum(p.numel() * p.element_size() for p in self.discriminator.parameters())

    def set_alpha(self, alpha_d: float) -> None:
        """a3 of this iteration."""
        for trainer in self.trainers:
            trainer.set_alpha(alpha_d)

    def pretrain(
        self, questions: Sequence[Question], steps: int, on_step: Callable[[int], None] | None = None
    ) -> float | None:
        """`steps` optimizer steps of each discriminator on the teacher's rationales; mean loss or None.

        `on_step(step)` is called after each step, counted over all folds.
        """

        def train(k: int, trainer: DiscriminatorTrainer) -> float | None:
            said = (lambda step: on_step(k * steps + step)) if on_step else None
            return trainer.pretrain(self._without(k, questions), steps, said)

        return _mean([train(k, trainer) for k, trainer in enumerate(self.trainers)])

    def update(
        self,
        questions: Sequence[Question],
        lagged: Mapping[str, Sequence[str]],
        iteration: int,
        on_step: Callable[[int], None] | None = None,
    ) -> float | None:
        """Train each for at most config.discriminator_update_batches batches; return the mean loss, or None without
        any."""
        return _mean(
            [t.update(self._without(k, questions), lagged, iteration, on_step) for k, t in enumerate(self.trainers)]
        )

    def check(self, questions: Sequence[Question], held_out: Sequence[Question], calibrate: bool = True) -> Check:
        """Calibrate scores on unseen questions, and measure how well they tell right from wrong.

        Out of fold that is `questions`, those trained on; a single discriminator has `held_out` alone. At most
        `MAX_CHECKED` of them, by a hash. Platt scaling learns the split into positives and negatives, as the
        discriminators do. The AUC compares rationales of one fold, whose logits are of one discriminator that saw none
        of their labels; right and wrong is by gold where the row has it (and `--label` is not majority).
        """
        several, config = len(self.trainers) > 1, self.config
        chosen = sorted(questions if several else held_out, key=lambda q: hashlib.sha256(q.id.encode()).digest())[
            :MAX_CHECKED
        ]
        rows = [(q, r, up) for q in chosen for up, side in ((True, q.positives), (False, q.negatives)) for r in side]
        pairs = [(question_text(q), r.text) for q, r, _ in rows]
        logits = self.discriminator.logits(pairs).double().tolist()
        folds = [self.discriminator.fold(text) for text, _ in pairs]
        positive = [up for *_, up in rows]
        if calibrate and config.effective("discriminator_calibration") == "platt":
            of_fold = [[i for i, fold in enumerate(folds) if fold == k] for k in range(len(self.trainers))]
            self.discriminator.platt = [
                platt([logits[i] for i in some], [positive[i] for i in some]) for some in of_fold
            ]
        scales = self.discriminator.platt or [(1.0, 0.0)] * len(self.trainers)
        scores = [_sigmoid(scales[k][0] * z + scales[k][1]) for z, k in zip(logits, folds, strict=True)]
        right = [up if config.label == "majority" else is_right(q, r, up) for q, r, up in rows]
        ids = [q.id for q, *_ in rows]
        value = float(auc_by_fold(logits, right, folds, np.ones((1, len(rows))))[0])
        low, high = interval(auc_by_fold(logits, right, folds, question_weights(ids, resamples=RESAMPLES))) or (
            None,
            None,
        )
        least = config.effective("discriminator_min_auc")
        return Check(
            auc=None if math.isnan(value) else value,
            auc_low=low,
            auc_high=high,
            calibration_error=calibration(scores, right)["expected_calibration_error"],
            questions=len(chosen),
            rationales=len(rows),
            refused=least > 0 and (low is None or low < least),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The discriminators' weights and calibration, for safetensors."""
        return self.discriminator.tensors()

    def optimizer_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """({parameter/moment: tensor} for safetensors, the rest for JSON)."""
        if len(self.trainers) == 1:
            return self.trainers[0].optimizer_tensors()
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for k, trainer in enumerate(self.trainers):
            own, rest = trainer.optimizer_tensors()
            tensors |= {f"fold-{k}.{name}": tensor for name, tensor in own.items()}
        return tensors, rest

    def load(
        self, tensors: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]
    ) -> None:
        """Load the output of `tensors()` and `optimizer_tensors()`. Raises `InputError` if it does not fit."""
        self.discriminator.load_tensors(tensors)
        for k, trainer in enumerate(self.trainers):
            prefix = f"fold-{k}." if len(self.trainers) > 1 else ""
            own = {n.removeprefix(prefix): t for n, t in optimizer_tensors.items() if n.startswith(prefix)}
            trainer.load_optimizer(own, optimizer_state)

    def _without(self, k: int, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions that discriminator k is trained on."""
        if len(self.trainers) == 1:
            return questions
        return [q for q in questions if self.discriminator.fold(question_text(q)) != k]


def is_right(question: Question, rationale: Rationale, positive: bool) -> bool:
    """Return whether a rationale ends in the gold answer; without gold or answer, whether it is a positive."""
    if question.gold is None or rationale.answer is None or question.task is None:
        return positive
    return is_correct(rationale.answer, question.gold, question.task, parse_choices(question_text(question)))


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if known else None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
