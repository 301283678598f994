"""How well a discriminator tells a teacher's right chains from its wrong ones, on questions that it has not seen:

    python -m qcrd_fast.bench.discriminator --data svamp_aug_t5_large.json --encoder NAME --student NAME [--append]

Beside it stand two baselines on the same chains: their length, and the mean log-prob that the student gives them. Which sign
of a baseline means good is read off the training questions. One CSV row a run, with the commit.
"""

from __future__ import annotations

import argparse
import json
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
from qcrd_fast.discriminator.metrics import auc, interval, judge, question_weights
from qcrd_fast.discriminator.model import build_discriminator
from qcrd_fast.discriminator.trainer import DiscriminatorTrainer
from qcrd_fast.models.prompts import EXPLAIN, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.utils.environment import commit

from .record import append

RESULTS = Path(__file__).parent / "results" / "discriminator.csv"


def chains(questions: list[Question]) -> list[tuple[str, str, str, bool]]:
    """(question id, question, chain, right) of every chain."""
    return [
        (q.id, question_text(q), r.text, right)
        for q in questions
        for right, side in ((True, q.positives), (False, q.negatives))
        for r in side
    ]


@torch.no_grad()
def student_logprob(student: Student, rows: list[tuple[str, str, str, bool]], batch_size: int = 16) -> list[float]:
    """Mean log-prob of each chain behind `explain: question` [nats/token]."""
    values = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sources = [student.source_ids(EXPLAIN, question) for _, question, _, _ in batch]
        targets = [student.target_ids(chain) for _, _, chain, _ in batch]
        packed = student.hidden(sources, targets, list(range(len(batch))))
        logprob_T = student.head.logits(packed.hidden).log_softmax(-1).gather(1, packed.target[:, None])[:, 0]
        values += [float(logprob_T[packed.segment == i].mean()) for i in range(len(batch))]
    return values


def standardise(score_R: list[float], train_R: list[float], positive_train_R: list[bool]) -> np.ndarray:
    """A baseline's scores, turned so that on the training questions the positives score higher."""
    return np.asarray(score_R) * (1 if auc(train_R, positive_train_R) >= 0.5 else -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--encoder", default="auto", help="auto, or folder or hub id")
    parser.add_argument("--student", required=True, help="whose vocabulary (auto) and log-probs are used")
    parser.add_argument("--loss", default="ratio")
    parser.add_argument("--augment", default="mask,replace")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--baselines", help="JSON file that keeps the student's log-probs between runs")
    parser.add_argument("--append", action="store_true", help=f"add the row to {RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")  # products in bf16 where the CPU has them
    loaded = load_questions(args.data, split_by="gold")
    train, held_out = hold_out(loaded.questions, args.held_out, 0)
    config = TrainConfig(
        discriminator=args.encoder,
        discriminator_loss=args.loss,
        discriminator_augment=args.augment,
        discriminator_learning_rate=args.learning_rate,
        discriminator_batch_size=args.batch_size,
        seed=args.seed,
    )
    student = Student.load(args.student, PromptSettings(), "cpu")
    student.model.eval()
    started = time.perf_counter()
    discriminator = build_discriminator(args.encoder, student.model, student.tokenizer, seed=args.seed)
    assert discriminator is not None
    trainer = DiscriminatorTrainer(discriminator, config)
    trainer.set_alpha(1.0)
    rows = chains(held_out)
    ids, positive = [i for i, *_ in rows], [right for *_, right in rows]

    def scores() -> list[float]:
        return discriminator.score([(question, chain) for _, question, chain, _ in rows]).tolist()

    def watch(step: int) -> None:
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: AUC {auc(scores(), positive):.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    loss = trainer.pretrain(train, args.steps, watch)
    own = scores()
    wall_s = time.perf_counter() - started
    result: dict[str, Any] = judge(own, positive, ids)
    weight_BR = question_weights(ids)
    baselines: dict[str, Any] = {}
    past = chains(train)[:300]  # enough to see which way a baseline points
    right = [r for *_, r in past]
    baselines["length"] = standardise([len(c) for _, _, c, _ in rows], [len(c) for _, _, c, _ in past], right)
    cache = Path(args.baselines) if args.baselines else None
    if cache and cache.exists():
        kept = json.loads(cache.read_text())
    else:
        kept = {"held_out": student_logprob(student, rows), "train": student_logprob(student, past)}
        if cache:
            cache.write_text(json.dumps(kept))
    baselines["student_logprob"] = standardise(kept["held_out"], kept["train"], right)
    row: dict[str, Any] = {
        "data": " ".join(Path(d).stem for d in args.data),
        "encoder": Path(args.encoder.rstrip("/")).name,
        "loss": args.loss,
        "augment": args.augment,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "auc": round(result["auc"], 4),
        "auc_low": round(result["auc_95"][0], 4),
        "auc_high": round(result["auc_95"][1], 4),
        "auc_within_questions": round(result["auc_within_questions"], 4),
        "calibration_error": round(result["expected_calibration_error"], 4),
        "train_loss": None if loss is None else round(loss, 4),
    }
    for name, values in baselines.items():
        low, high = interval(auc(values, positive, weight_BR)) or (None, None)
        gain_low, gain_high = interval(auc(own, positive, weight_BR) - auc(values, positive, weight_BR)) or (None, None)
        row |= {f"{name}_auc": auc(values, positive), f"{name}_low": low, f"{name}_high": high}
        row |= {f"{name}_gain_low": gain_low, f"{name}_gain_high": gain_high}
    row = {k: round(v, 4) if isinstance(v, float) and k != "learning_rate" else v for k, v in row.items()}
    row |= {"questions": len(held_out), "right": sum(positive), "wrong": len(positive) - sum(positive), "wall_s": round(wall_s)}
    row |= {"torch": torch.__version__, "transformers": transformers.__version__, "commit": commit()}
    print(json.dumps(row), flush=True)
    if args.append:
        append(RESULTS, list(row), [row])


if __name__ == "__main__":
    main()
