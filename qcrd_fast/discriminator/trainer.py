"""The discriminator's loss and training: pretraining, then an update after each iteration (section 3.3).

Shapes: R rationales, Q questions.

Everything random here comes from a key (seed, what, when), never from call order, and inside a fork of torch's
generators: the student's random numbers are left alone and a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcrd_fast.config import DISCRIMINATOR_LOSSES, TrainConfig
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.discriminator.corruption import augment
from qcrd_fast.discriminator.metrics import score_report
from qcrd_fast.discriminator.model import Discriminator
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.utils.keyed import keyed, own_randomness
from qcrd_fast.utils.oom import explains_oom, for_judging

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01
MAX_REPLACEMENT_WORDS = 100_000


def discriminator_loss(
    score_R: Tensor, question_R: Tensor, positive_R: Tensor, kind: str = "bce-all"
) -> tuple[Tensor, Tensor]:
    """Return L_D and the number of questions counted [int64 scalar].

    L_D is the mean over questions with both classes ("bce-all": over all).

    score_R in (0, 1); question_R: index of a rationale's question, in any order; positive_R bool. kind:
    "ratio" Eq. 2, "infonce" the same with the positives in the denominator too, "bce" and "bce-all" the mean binary
    cross entropy of a question's rationales. Without any question to count the loss is 0 and so is its gradient.
    """
    if kind not in DISCRIMINATOR_LOSSES:
        raise ValueError(f"kind is one of {', '.join(DISCRIMINATOR_LOSSES)}; got {kind!r}")
    if score_R.dim() != 1 or question_R.shape != score_R.shape or positive_R.shape != score_R.shape:
        shapes = [tuple(t.shape) for t in (score_R, question_R, positive_R)]
        raise ValueError(f"score_R, question_R and positive_R have one shape [R]; got {shapes}")
    if len(score_R) == 0:
        return score_R.sum(), question_R.new_zeros((), dtype=torch.long)
    positive_R = positive_R.bool()
    member_QR = torch.arange(int(question_R.max()) + 1, device=question_R.device)[:, None] == question_R
    positive_QR, negative_QR = member_QR & positive_R, member_QR & ~positive_R
    counted_Q = member_QR.any(1) if kind == "bce-all" else positive_QR.any(1) & negative_QR.any(1)
    # Rows without a class are filled so that no -inf enters the backward pass; they are dropped at the end.
    positive_QR, negative_QR = positive_QR | ~counted_Q[:, None], negative_QR | ~counted_Q[:, None]
    if kind.startswith("bce"):
        bce_R = F.binary_cross_entropy(score_R, positive_R.to(score_R.dtype), reduction="none")
        loss_Q = (member_QR * bce_R).sum(1) / member_QR.sum(1).clamp(min=1)
    else:
        log_positive_Q = score_R.masked_fill(~positive_QR, float("-inf")).logsumexp(1)
        below_QR = negative_QR if kind == "ratio" else positive_QR | negative_QR
        loss_Q = score_R.masked_fill(~below_QR, float("-inf")).logsumexp(1) - log_positive_Q  # Eq. 2
    count = counted_Q.sum()
    return torch.where(counted_Q, loss_Q, 0.0).sum() / count.clamp(min=1), count


# ---- training ----


class Scorer(Protocol):
    """Interface: scores (question, rationale) pairs."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> Tensor: ...


class _Example(NamedTuple):
    """A question with the texts of both classes."""

    id: str
    text: str
    positives: list[str]
    negatives: list[str]
    answers: list[str | None]  # of the positives


def _longest_example(_: Any, batch: Sequence[_Example], *__: Any) -> str:
    return max(batch, key=lambda e: len(e.text) + max(map(len, (*e.positives, *e.negatives)), default=0)).id


class DiscriminatorTrainer:
    """Train a discriminator with its own AdamW at learning rate config.discriminator_learning_rate * a3 (Eq. 8).

    fold: which of several it is, in the keys of its random numbers.
    """

    def __init__(self, discriminator: Discriminator, config: TrainConfig, fold: int | None = None):
        self.discriminator, self.config = discriminator, config
        self._of_fold: tuple[Any, ...] = () if fold is None else ("fold", fold)
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), weight_decay=WEIGHT_DECAY)
        self.set_alpha(config.alpha_d)

    def set_alpha(self, alpha_d: float) -> None:
        """a3 of this iteration."""
        self.alpha_d = alpha_d
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.discriminator_learning_rate * alpha_d

    def pretrain(
        self, questions: Sequence[Question], steps: int, on_step: Callable[[int], None] | None = None
    ) -> float | None:
        """`steps` optimizer steps on the teacher's rationales, balanced by corrupted positives
        (`discriminator_augment`); mean loss or None.

        Each pass over the questions corrupts anew. `on_step(step)` is called after each step, e.g. to stop the run.
        """
        kinds, words = self.config.augmentations, _words(questions)
        others = list(dict.fromkeys(r.answer for q in questions for r in q.positives if r.answer))
        usable = [q for q in questions if self._teaches(q.positives, q.negatives or (kinds and q.positives))]

        def batches() -> Iterator[list[_Example]]:
            for epoch in itertools.count() if usable else ():
                key = (self.config.seed, "pretrain", epoch, *self._of_fold)
                for batch in self._batches(usable, key):
                    examples = [_example(question) for question in batch]
                    yield [
                        e._replace(negatives=e.negatives + _corrupted(e, (*key, e.id), words, kinds, others))
                        for e in examples
                    ]

        return self._train(itertools.islice(batches(), steps), "pretraining", on_step)

    def update(
        self,
        questions: Sequence[Question],
        lagged: Mapping[str, Sequence[str]],
        iteration: int,
        on_step: Callable[[int], None] | None = None,
    ) -> float | None:
        """Train for at most config.discriminator_update_batches batches; return the mean loss, None without batches.

        Negatives are the teacher's minority and `lagged[question id]`, the student's. Batches are made of the questions
        that have both classes, shuffled by (seed, iteration).
        """
        usable = [q for q in questions if self._teaches(q.positives, q.negatives or lagged.get(q.id))]
        batches = itertools.islice(
            self._batches(usable, (self.config.seed, "update", iteration, *self._of_fold)),
            self.config.discriminator_update_batches,
        )
        examples = ([_example(question, lagged.get(question.id, ())) for question in batch] for batch in batches)
        return self._train(examples, f"iteration {iteration}", on_step)

    def tensors(self) -> dict[str, Tensor]:
        """The discriminator's weights, for safetensors."""
        return self.discriminator.tensors()

    def optimizer_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return ({parameter/moment: tensor} for safetensors, the rest for JSON). Omits parameters never updated."""
        tensors = {
            f"{name}/{moment}": tensor.detach().contiguous()
            for name, parameter in self.discriminator.named_parameters()
            for moment, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return tensors, {"alpha_d": self.alpha_d}

    def load(
        self, tensors: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]
    ) -> None:
        """Load the output of `tensors()` and `optimizer_tensors()`. Raises `InputError` if it does not fit."""
        self.discriminator.load_tensors(tensors)
        self.load_optimizer(optimizer_tensors, optimizer_state)

    def load_optimizer(self, optimizer_tensors: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        """Load the output of `optimizer_tensors()`. Raises `InputError` if it does not fit."""
        parameters = dict(self.discriminator.named_parameters())
        self.optimizer.state.clear()
        for key, tensor in optimizer_tensors.items():
            name, _, moment = key.rpartition("/")
            if name not in parameters or (moment != "step" and tensor.shape != parameters[name].shape):
                raise InputError(f"the discriminator's optimizer state has an unexpected {key} {tuple(tensor.shape)}")
            device = "cpu" if moment == "step" else parameters[name].device  # AdamW counts steps on the CPU
            self.optimizer.state[parameters[name]][moment] = tensor.detach().to(device, copy=True)
        self.set_alpha(float(optimizer_state["alpha_d"]))

    def _teaches(self, positives: Sequence[Any], negatives: Sequence[Any] | None) -> bool:
        """Whether a question with these counts in the loss."""
        return bool(
            positives or negatives
            if self.config.effective("discriminator_loss") == "bce-all"
            else positives and negatives
        )

    def _batches(self, questions: Sequence[Question], key: tuple[Any, ...]) -> Iterator[list[Question]]:
        """The questions, shuffled by `key`, in batches of config.discriminator_batch_size."""
        order, size = list(questions), self.config.discriminator_batch_size
        random.Random(keyed(*key)).shuffle(order)
        return (order[start : start + size] for start in range(0, len(order), size))

    def _train(
        self, batches: Iterator[list[_Example]], when: str, on_step: Callable[[int], None] | None
    ) -> float | None:
        """One optimizer step a batch; the mean loss over questions, or None without a batch."""
        total, count = 0.0, 0
        with own_randomness(self.discriminator.device, self.config.seed, "discriminator", when, *self._of_fold):
            self.discriminator.train()
            try:
                for step, batch in enumerate(batches):
                    total += self._step(batch, f"{when}, step {step}") * len(batch)
                    count += len(batch)
                    if on_step:
                        on_step(step)
            finally:
                self.discriminator.eval()
                self.optimizer.zero_grad(set_to_none=True)  # of several discriminators one has gradients at a time
        return total / count if count else None

    @explains_oom("the discriminator's training", for_judging, _longest_example)
    def _step(self, batch: list[_Example], when: str) -> float:
        pairs, question, positive = [], [], []
        for index, example in enumerate(batch):
            for is_positive, texts in ((True, example.positives), (False, example.negatives)):
                pairs += [(example.text, text) for text in texts]
                question += [index] * len(texts)
                positive += [is_positive] * len(texts)
        device = self.discriminator.device
        score_R = self.discriminator.rate(pairs)
        loss, _ = discriminator_loss(
            score_R,
            torch.tensor(question, device=device),
            torch.tensor(positive, device=device),
            self.config.effective("discriminator_loss"),
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_GRAD_NORM)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            ids = ", ".join(example.id for example in batch)
            raise RunError(f"discriminator, {when}: loss {loss:g}, gradient norm {norm:g}; questions {ids}")
        self.optimizer.step()
        return loss.item()


def judge_questions(discriminator: Scorer, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the `score_report` of positives against negatives, on questions that should be held out."""
    rows = [
        (q, r.text, right)
        for q in questions
        for right, side in ((True, q.positives), (False, q.negatives))
        for r in side
    ]
    scores = discriminator.score([(question_text(q), text) for q, text, _ in rows]).tolist()
    return score_report(scores, [right for *_, right in rows], [q.id for q, *_ in rows])


def _texts(rationales: Sequence[Any]) -> list[str]:
    return [rationale.text for rationale in rationales]


def _example(question: Question, more_negatives: Sequence[str] = ()) -> _Example:
    negatives = [*_texts(question.negatives), *more_negatives]
    answers = [rationale.answer for rationale in question.positives]
    return _Example(question.id, question_text(question), _texts(question.positives), negatives, answers)


def _corrupted(
    example: _Example, key: tuple[Any, ...], words: Sequence[str], kinds: Sequence[str], others: Sequence[str]
) -> list[str]:
    """Corrupted positives, as many as the question lacks negatives for equal counts of both classes."""
    missing = max(0, len(example.positives) - len(example.negatives)) if kinds else 0
    texts = zip(example.positives[:missing], example.answers, strict=False)
    return [augment(text, (*key, i), words, kinds, answer, others) for i, (text, answer) in enumerate(texts)]


def _words(questions: Sequence[Question]) -> list[str]:
    """Return the words of positive rationales with repetition, so that frequent words are drawn more often."""
    words = (w for q in questions for text in _texts(q.positives) for w in re.findall(r"\w+", text))
    return list(itertools.islice(words, MAX_REPLACEMENT_WORDS))
