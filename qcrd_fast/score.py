"""`score`: the discriminator's score of every rationale, beside the data; and the discriminator trained alone.

A discriminator's folder is a checkpoint of a run, or what `train_alone` writes: discriminator.safetensors and
discriminator.json, which names the student whose encoder or vocabulary it was built on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import BadRow, Question, Rationale, question_text
from qcrd_fast.data.splits import hold_out
from qcrd_fast.discriminator.cross_fit import CrossFitted, CrossFitTrainer, build_judge
from qcrd_fast.discriminator.trainer import judge_questions
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.runs.folder import DISCRIMINATOR
from qcrd_fast.runs.load import find_model, load_student
from qcrd_fast.utils.device import make_autocast
from qcrd_fast.utils.files import write_json, write_lines

log = logging.getLogger(__name__)

ALONE = "discriminator.json"
QUALITY_SCORES = "quality_scores.jsonl"  # in a run folder: what the densities of `report` are made from


def load_discriminator(run: str, device: str = "auto") -> tuple[CrossFitted, Student, dict[str, Any]]:
    """(discriminator, the student beside it, settings) of a run, of one of its checkpoints, or of a `train_alone` folder.

    Raises `InputError` where there is none: a method or `--discriminator none` that has none, or a damaged folder.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; score reads a run folder, a checkpoint, or what score --train wrote")
    alone = (folder / ALONE).is_file()
    if alone:
        try:
            settings = json.loads((folder / ALONE).read_text(encoding="utf-8"))
            config = settings["config"]
            student, _ = load_student(config["student"], device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / ALONE}: unreadable: {error}") from error
    else:
        folder = Path(find_model(run))
        student, settings = load_student(str(folder), device)
        config = settings.get("config", {})
        if not (folder / DISCRIMINATOR).is_file():
            told = settings.get("discriminator_check") or {}
            why = f" (it was trained with --method {settings['method']})" if "method" in settings else ""
            if told.get("refused"):
                low = "is unknown" if told.get("auc_low") is None else f"has a lower bound of {told['auc_low']:.3f}"
                why = f" (it was refused: its held-out AUC {low}; the vote weighed)"
            raise InputError(f"{folder} has no discriminator{why}; --train DIR trains one on --data")
    discriminator = build_judge(config, student.model, student.tokenizer)
    if discriminator is None:
        raise InputError(f"{folder}: --discriminator none has no scores")
    try:
        discriminator.load_tensors(load_file(folder / DISCRIMINATOR))
    except (OSError, SafetensorError, InputError) as error:
        raise InputError(f"{folder / DISCRIMINATOR}: {error}") from error
    return discriminator, student, settings


def score_questions(discriminator: CrossFitted, questions: Sequence[Question]) -> list[Question]:
    """The questions, each rationale with its score."""
    pairs = [(question_text(q), r.text) for q in questions for r in (*q.positives, *q.negatives)]
    scores = iter(discriminator.score(pairs).tolist())

    def scored(rationales: tuple[Rationale, ...]) -> tuple[Rationale, ...]:
        return tuple(dataclasses.replace(r, score=round(next(scores), 6)) for r in rationales)

    return [dataclasses.replace(q, positives=scored(q.positives), negatives=scored(q.negatives)) for q in questions]


def load_rationales(data: str, **options: Any) -> tuple[list[Question], list[BadRow]]:
    """(questions, rows set aside) of a file. Raises `InputError` if no question has a rationale."""
    loaded = load_questions(data, **options)
    if not any(q.positives or q.negatives for q in loaded.questions):
        raise InputError(f"{data}: no question has a rationale to score")
    return loaded.questions, loaded.skipped


def plan(run: str, questions: Sequence[Question], train: str | None, device: str = "auto") -> dict[str, Any]:
    """What scoring would do, after the checks that it would make."""
    if train:
        new_folder(train, "--train")
    else:
        load_discriminator(run, device)
    return {"would_score": sum(len(q.positives) + len(q.negatives) for q in questions), "questions": len(questions)}


def score_run(
    run: str, questions: Sequence[Question], *, temperatures: Sequence[float] = (), seed: int = 0, device: str = "auto"
) -> tuple[list[Question], dict[str, Any]]:
    """The questions with scores, and their summary.

    With `temperatures`, the student says one rationale a question at each, and the scores of all kinds go to the run's
    `quality_scores.jsonl` (`report` draws their densities, Fig. 6).
    """
    discriminator, student, settings = load_discriminator(run, device)
    scored = score_questions(discriminator, questions)
    summary: dict[str, Any] = summarize_scores(scored)
    if temperatures:
        folder = Path(run)
        records = [
            {"kind": kind, "id": q.id, "question": question_text(q), "text": r.text, "score": r.score}
            for q in scored
            for kind, side in (("teacher positive", q.positives), ("teacher minority", q.negatives))
            for r in side
        ]
        for temperature in temperatures:
            texts = _say(student, scored, temperature, settings.get("config", {}), seed)
            values = discriminator.score([(question_text(q), t) for q, t in zip(scored, texts, strict=True)]).tolist()
            kind = f"student at {temperature:g}"
            records += [
                {"kind": kind, "id": q.id, "question": question_text(q), "text": text, "score": round(value, 6)}
                for q, text, value in zip(scored, texts, values, strict=True)
            ]
            summary[f"mean_score_{kind.replace(' ', '_')}"] = math.fsum(values) / len(values)
        try:
            write_lines(folder / QUALITY_SCORES, records)
        except OSError as error:
            raise RunError(f"cannot write {folder / QUALITY_SCORES}: {error.strerror or error}") from error
        summary["quality_scores"] = str(folder / QUALITY_SCORES)
    return scored, summary


def summarize_scores(scored: Sequence[Question]) -> dict[str, Any]:
    """Means by kind, AUC with its interval and calibration of questions that carry scores."""
    from qcrd_fast.discriminator.metrics import judge

    rows = [(q.id, r.score, right) for q in scored for right, side in ((True, q.positives), (False, q.negatives)) for r in side]
    means = {}
    for name, wanted in (("positives", True), ("negatives", False)):
        values = [float(score) for _, score, right in rows if right is wanted and score is not None]
        means[f"mean_score_{name}"] = math.fsum(values) / len(values) if values else None
    return means | judge([score for _, score, _ in rows], [right for *_, right in rows], [i for i, *_ in rows])


def train_alone(model: str, questions: Sequence[Question], config: TrainConfig, output: str, held_out: float) -> dict[str, Any]:
    """Pretrain a discriminator on the rationales of `questions`, keep it in the folder `output`, and return how it does on the
    share `held_out` of the questions, which it has not seen.

    `model` is the student, a run or a model folder, whose encoder or vocabulary it takes. Raises `InputError` when nothing can
    be learnt from the questions.
    """
    folder = new_folder(output, "--train")
    train, test = hold_out(questions, held_out, config.seed)
    student, _ = load_student(model, config.device)
    discriminator = build_judge(config.resolved().to_dict(), student.model, student.tokenizer)
    if discriminator is None:
        raise InputError("--train needs a discriminator; --discriminator none has none")
    trainer = CrossFitTrainer(discriminator, config)
    trainer.set_alpha(1.0)
    steps, all_steps = config.discriminator_pretrain_steps, config.discriminator_pretrain_steps * config.folds

    def said(step: int) -> None:
        if (step + 1) % 50 == 0 or step + 1 == all_steps:
            log.info("discriminator: step %d of %d", step + 1, all_steps)

    loss = trainer.pretrain(train, steps, said)
    if loss is None:
        raise InputError("--train: no question has a positive rationale, and a negative or --discriminator-augment to make one")
    check = trainer.check(train, test)
    log.info("discriminator: %s", check.text)
    summary = {"train_questions": len(train), "train_loss": loss, "check": check.to_dict()}
    summary |= judge_questions(discriminator, test) if test else {}
    kept = {n: v for n, v in config.resolved().to_dict().items() if n.startswith("discriminator") or n == "seed"}
    kept["student"] = str(Path(model).resolve()) if Path(model).exists() else model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu() for n, t in trainer.tensors().items()}, folder / DISCRIMINATOR)
        write_json(folder / ALONE, {"config": kept, "held_out": summary})
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {error}") from error
    return summary


def new_folder(path: str, option: str) -> Path:
    """`path` as a folder that is not there yet, or empty. Raises `InputError` naming the option."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{option}: {path} is not an empty folder; choose another")
    return folder


def _say(student: Student, questions: Sequence[Question], temperature: float, config: dict[str, Any], seed: int) -> list[str]:
    """One rationale a question from the student, sampled as the run samples its negatives but for the temperature."""
    known = TrainConfig().to_dict() | config
    settings = SampleSettings(
        temperature,
        known["negative_top_k"],
        known["negative_top_p"],
        known["max_new_tokens"],
        known["sample_batch_size"],
    )
    sources = [student.source_ids(EXPLAIN, question_text(q)) for q in questions]
    keys = [key_words(seed, q.id) for q in questions]
    return [student.text(t) for t in sample(student, sources, keys, settings, autocast=make_autocast(student.device, None))]
