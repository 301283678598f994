"""Benchmark of discriminators: AUC of right against wrong chains on unseen questions.

    python -m qcrd_fast.bench.discriminator --data svamp_aug_t5_large.json [--student NAME] [--encoder NAME] [--append]
        [--arms bce-all/none ratio/mask,replace]

An arm is LOSS/AUGMENT of `--discriminator-loss` and `--discriminator-augment`. Each is trained in K folds by question
and judged by gold: out of fold, by the discriminator that has not seen the question, and in-sample, by one that has, as
the printed method scores its own training set. One CSV row an arm, with the commit; `gain` is its AUC less the first
arm's, on the same resamples of the questions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.data.splits import hold_out
from qcrd_fast.demo.students import build_tokenizer
from qcrd_fast.discriminator.cross_fit import CrossFitted, CrossFitTrainer, build_judge, is_right
from qcrd_fast.discriminator.metrics import auc_by_fold, auc_within, calibration, interval, question_weights
from qcrd_fast.discriminator.model import Pair
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.utils.environment import commit

from .record import append, check_appendable

RESULTS = Path(__file__).parent / "results" / "discriminator.csv"
COLUMNS = (
    "data", "encoder", "loss", "augment", "folds", "steps", "learning_rate", "seed", "auc", "auc_low", "auc_high",
    "gain",
    "gain_low", "gain_high", "auc_within_questions", "in_sample_auc", "in_sample_low", "in_sample_high", "error_raw",
    "error_platt", "mean_right", "mean_wrong", "train_loss", "questions", "right", "wrong", "wall_s", "threads",
    "torch",
    "transformers", "commit",
)  # fmt: skip


@torch.no_grad()
def in_sample_logits(judge: CrossFitted, pairs: list[Pair]) -> list[float]:
    """Return logits of a discriminator that was trained on the question: the next fold's, or the only one."""
    count = len(judge.models)
    return judge.by_model(pairs, lambda text: (judge.fold(text) + 1) % count).double().tolist()


def measure(
    arm: str, questions: list[Question], student: Student, args: argparse.Namespace
) -> tuple[dict[str, Any], Any]:
    """Train and test an arm; return (its row, its AUC on each resample of the questions)."""
    loss, _, augment = arm.partition("/")
    config = TrainConfig(
        discriminator=args.encoder,
        discriminator_loss=loss,
        discriminator_augment=augment or "none",
        discriminator_folds=args.folds,
        discriminator_learning_rate=args.learning_rate,
        discriminator_batch_size=args.batch_size,
        seed=args.seed,
    )
    started = time.perf_counter()
    judge = build_judge(config.to_dict(), student.model, student.tokenizer)
    assert judge is not None
    trainer = CrossFitTrainer(judge, config)
    trainer.set_alpha(1.0)

    def watch(step: int) -> None:
        if (step + 1) % 100 == 0:
            print(
                f"{arm}: step {step + 1} of {args.steps * config.folds}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )

    train_loss = trainer.pretrain(questions, args.steps, watch)
    wall_s = time.perf_counter() - started
    trainer.check(questions, [])
    rows = [(q, r, up) for q in questions for up, side in ((True, q.positives), (False, q.negatives)) for r in side]
    pairs = [(question_text(q), r.text) for q, r, _ in rows]
    right, ids = np.array([is_right(q, r, up) for q, r, up in rows]), [q.id for q, *_ in rows]
    weight_BR = question_weights(ids)
    own, seen = judge.logits(pairs).double().tolist(), in_sample_logits(judge, pairs)
    scores = np.array(judge.score(pairs).tolist())
    folds, one = [judge.fold(text) for text, _ in pairs], np.ones((1, len(rows)))
    beside = [(fold + 1) % len(judge.models) for fold in folds]
    auc_B = auc_by_fold(own, right, folds, weight_BR)
    row: dict[str, Any] = {
        "data": " ".join(Path(d).stem for d in args.data),
        "encoder": Path(args.encoder.rstrip("/")).name,
        "loss": loss,
        "augment": config.discriminator_augment,
        "folds": config.folds,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "auc": float(auc_by_fold(own, right, folds, one)[0]),
        "auc_within_questions": auc_within(own, right, ids),
        "in_sample_auc": float(auc_by_fold(seen, right, beside, one)[0]),
        "error_raw": calibration(1 / (1 + np.exp(-np.array(own))), right)["expected_calibration_error"],
        "error_platt": calibration(scores, right)["expected_calibration_error"],
        "mean_right": float(scores[right].mean()),
        "mean_wrong": float(scores[~right].mean()),
        "train_loss": train_loss,
        "questions": len(questions),
        "right": int(right.sum()),
        "wrong": int((~right).sum()),
        "wall_s": round(wall_s),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    row["auc_low"], row["auc_high"] = interval(auc_B) or (None, None)
    row["in_sample_low"], row["in_sample_high"] = interval(auc_by_fold(seen, right, beside, weight_BR)) or (None, None)
    return row, auc_B


def load_student(name: str | None, questions: list[Question], seed: int) -> Student:
    """Load the named student, or build an untrained T5 over the words of the questions and rationales."""
    if name:
        return Student.load(name, PromptSettings(), "cpu")
    texts = [question_text(q) for q in questions] + [r.text for q in questions for r in (*q.positives, *q.negatives)]
    with tempfile.TemporaryDirectory() as folder:
        build_student(Path(folder), texts, seed)
        return Student.load(folder, PromptSettings(), "cpu")


def build_student(folder: Path, texts: list[str], seed: int) -> None:
    """Build an untrained T5 of 2 + 2 layers, 128 wide, over the words of `texts`."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = build_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,  # type: ignore[call-arg]
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        T5ForConditionalGeneration(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument(
        "--student", help="whose vocabulary or encoder auto takes; default: a small T5 of the data's words"
    )
    parser.add_argument("--encoder", default="auto", help="auto, or folder or hub id")
    parser.add_argument("--arms", nargs="+", default=["bce-all/none", "ratio/mask,replace"], metavar="LOSS/AUGMENT")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--questions", type=int, help="of the data, at most, drawn by a seeded hash of their ids")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--append", action="store_true", help=f"add the rows to {RESULTS.name}")
    args = parser.parse_args()
    if args.append:
        check_appendable(RESULTS, COLUMNS)
    torch.set_num_threads(args.threads)
    questions = load_questions(args.data).questions
    if args.questions and args.questions < len(questions):
        questions = hold_out(questions, args.questions / len(questions), args.seed)[1]
    student = load_student(args.student, questions, args.seed)
    base: tuple[float, Any] | None = None  # the first arm's
    for arm in args.arms:
        row, auc_B = measure(arm, questions, student, args)
        base = base or (row["auc"], auc_B)
        if auc_B is not base[1]:
            row["gain"] = row["auc"] - base[0]
            row["gain_low"], row["gain_high"] = interval(auc_B - base[1]) or (None, None)
        print(json.dumps(row), flush=True)
        if args.append:
            append(RESULTS, COLUMNS, [row])


if __name__ == "__main__":
    main()
