"""Folds of a discriminator: who has seen what, calibration, the check on held-out questions, exact resume."""

import math
import random

import numpy as np
import pytest
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, Rationale, question_text
from qcrd_fast.discriminator.cross_fit import CrossFitTrainer, build_judge, is_right
from qcrd_fast.discriminator.metrics import calibration, platt
from qcrd_fast.discriminator.trainer import DiscriminatorTrainer
from qcrd_fast.errors import InputError

from .test_discriminator import WORDS, make_t5, make_tokenizer

OPTIONS = dict(discriminator_learning_rate=2e-2, discriminator_batch_size=8)


def make_questions(count, told_by=None, seed=0):
    """Questions with two right and one wrong rationale of random words. `told_by`: the word that right ones begin
    with."""
    rng = random.Random(seed)

    def text(right):
        return " ".join([*([told_by if right else "zero"] if told_by else []), *rng.choices(WORDS[1:], k=6)])

    def rationales(count, right):
        return tuple(Rationale(text(right), "1" if right else "2") for _ in range(count))

    return [
        Question(f"q{i}", " ".join(rng.choices(WORDS, k=8)), None, "1", "1", {"1": 2, "2": 1}, "number",
                 positives=rationales(2, True), negatives=rationales(1, False))
        for i in range(count)
    ]  # fmt: skip


def make(folds, **options):
    config = TrainConfig(**{"discriminator_folds": folds, **OPTIONS, **options})
    tokenizer = make_tokenizer(pad_token="<pad>", eos_token="<eos>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = build_judge(config.resolved().to_dict(), make_t5(), tokenizer)
    return CrossFitTrainer(judge, config)


def pairs_of(questions):
    return [(question_text(q), r.text) for q in questions for r in (*q.positives, *q.negatives)]


def test_no_discriminator_sees_the_questions_that_it_scores(monkeypatch):
    seen = {}

    def spy(self, batch, when):
        seen.setdefault(self._of_fold[1], set()).update(example.id for example in batch)
        return 0.0

    monkeypatch.setattr(DiscriminatorTrainer, "_step", spy)
    trainer, questions = make(3), make_questions(40)
    trainer.pretrain(questions, 20)
    trainer.update(questions, {q.id: ["one two"] for q in questions}, 1)
    fold = {q.id: trainer.discriminator.fold(question_text(q)) for q in questions}
    assert set(fold.values()) == {0, 1, 2} and min(sum(f == k for f in fold.values()) for k in range(3)) >= 8
    for k in range(3):
        assert seen[k] == {i for i, f in fold.items() if f != k}
    other = make(3, seed=1)
    assert any(other.discriminator.fold(question_text(q)) != fold[q.id] for q in questions)


def test_spellings_of_a_question_are_in_one_fold():
    judge = make(7).discriminator
    for question in make_questions(20):
        text = question.question
        assert judge.fold(text) == judge.fold(text.upper().replace(" ", "  ") + " ?")


def test_each_pair_is_scored_by_its_own_fold_and_in_order():
    trainer, questions = make(3), make_questions(12)
    trainer.pretrain(questions, 3)
    judge, pairs = trainer.discriminator, pairs_of(questions)
    judge.platt = [(2.0, 0.5), (1.0, 0.0), (0.5, -1.0)]
    alone = []
    for question, rationale in pairs:
        k = judge.fold(question)
        z = judge.models[k].logits([(question, rationale)]).detach()
        alone.append(torch.sigmoid(judge.platt[k][0] * z + judge.platt[k][1]))
    judge.train()
    torch.testing.assert_close(judge.score(pairs), torch.cat(alone), atol=1e-6, rtol=0)
    assert judge.training and not judge.score(pairs).requires_grad and judge.score([]).shape == (0,)


def test_a_single_discriminator_is_the_printed_one():
    """--discriminator-folds 0: the same weights, scores and file as a discriminator by itself."""
    trainer, questions = make(0, paper=True), make_questions(12)
    alone = DiscriminatorTrainer(make(0, paper=True).discriminator.models[0], trainer.config)
    assert trainer.pretrain(questions, 6) == alone.pretrain(questions, 6)
    lagged = {q.id: ["one two"] for q in questions}
    assert trainer.update(questions, lagged, 1) == alone.update(questions, lagged, 1)
    trainer.check(questions, questions)
    ours, theirs = trainer.tensors(), alone.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(trainer.discriminator.score(pairs_of(questions)), alone.discriminator.score(pairs_of(questions)))


@pytest.mark.parametrize("folds", [1, 3])
def test_resume_is_exact(folds):
    questions, lagged = make_questions(16), {f"q{i}": ["one two three"] for i in range(16)}
    whole, resumed = make(folds), make(folds)
    whole.pretrain(questions, 4)
    whole.check(questions, questions[:8])
    tensors, (moments, rest) = whole.tensors(), whole.optimizer_tensors()
    resumed.load({n: t.clone() for n, t in tensors.items()}, {n: t.clone() for n, t in moments.items()}, rest)
    assert resumed.discriminator.platt == whole.discriminator.platt
    for trainer in (whole, resumed):
        trainer.set_alpha(0.45)
    assert whole.update(questions, lagged, 1) == resumed.update(questions, lagged, 1)
    after, again = whole.tensors(), resumed.tensors()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert torch.equal(whole.discriminator.score(pairs_of(questions)), resumed.discriminator.score(pairs_of(questions)))
    with pytest.raises(InputError, match=r"weights are not those|the calibration is of shape"):
        make(2).load(tensors, moments, rest)


def test_in_sample_scores_repeat_their_labels_and_folds_do_not():
    """Rationales of random words: nothing can be learnt but by heart."""
    questions = make_questions(24)
    single, several = make(0, discriminator_min_auc=0.6), make(3)
    for trainer in (single, several):
        trainer.pretrain(questions, 40)
    by_heart = single.check(questions, questions)
    honest = several.check(questions, [])
    assert by_heart.auc_low > 0.75 and not by_heart.refused
    assert abs(honest.auc - 0.5) < 0.2 and honest.refused and honest.auc_low < 0.6
    assert single.check(questions, []).auc is None and single.check(questions, []).refused  # nothing is held out


def test_what_can_be_told_is_told_out_of_fold_and_calibrated():
    questions = make_questions(30, told_by="nine")
    trainer = make(3)
    trainer.pretrain(questions, 15)
    check = trainer.check(questions, [])
    assert check.auc_low > 0.75 and not check.refused and check.questions == 30 and check.rationales == 90
    score = np.array(trainer.discriminator.score(pairs_of(questions)).tolist())
    right = np.array([True, True, False] * 30)
    assert check.calibration_error == pytest.approx(calibration(score, right)["expected_calibration_error"], abs=1e-6)
    assert check.calibration_error < 0.1 and score[right].mean() - score[~right].mean() > 0.4
    assert "held-out AUC" in check.text
    assert not make(3, paper=True).check(questions, questions).refused  # as printed: it is never asked


def test_no_gold_and_the_split():
    row = make_questions(1)[0]
    wrong = Question(
        row.id, row.question, None, "2", "1", row.votes, "number", positives=row.positives, negatives=row.negatives
    )
    assert is_right(row, row.positives[0], True) and not is_right(wrong, wrong.positives[0], True)
    assert is_right(wrong, wrong.negatives[0], False)  # the majority erred
    assert is_right(Question("q", "?"), Rationale("x"), True) and not is_right(
        Question("q", "?"), Rationale("x"), False
    )


# ---- Platt scaling ----


def test_platt_finds_the_line_that_made_the_labels():
    rng = np.random.default_rng(0)
    z = rng.normal(3, 2, 20000)
    label = rng.random(20000) < 1 / (1 + np.exp(-(0.7 * z - 1.5)))
    slope, offset = platt(z, label)
    assert slope == pytest.approx(0.7, abs=0.03) and offset == pytest.approx(-1.5, abs=0.1)
    moved_slope, moved_offset = platt(10 * z - 50, label)  # of any scale
    assert moved_slope == pytest.approx(slope / 10, rel=1e-6)
    assert moved_offset == pytest.approx(offset + 50 * moved_slope, rel=1e-5)


def test_platt_at_its_limits():
    assert platt([], []) == (1.0, 0.0) and platt([1.0, 2.0], [True, True]) == (1.0, 0.0)
    slope, offset = platt([-3.0, -2.0, 2.0, 3.0], [False, False, True, True])  # told apart: the slope stays finite
    assert 0 < slope < 10 and 1 / (1 + math.exp(-(3 * slope + offset))) > 0.7
    slope, offset = platt([3.0, 2.0, -2.0, 1.0], [False, False, True, True])  # the wrong way round
    assert slope == 0 and offset == pytest.approx(0)
    assert platt([1.0, 1.0, 1.0], [True, True, False])[0] == 0
