"""`score`: rate every rationale by votes, text or a discriminator; train a discriminator alone.

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
from qcrd_fast.data.load import load_questions, to_row
from qcrd_fast.data.schema import BadRow, Question, Rationale, question_text
from qcrd_fast.data.splits import hold_out
from qcrd_fast.discriminator.cross_fit import Check, CrossFitted, CrossFitTrainer, build_judge
from qcrd_fast.discriminator.trainer import judge_questions
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.quality.cases import Case, same, student_case, teacher_cases
from qcrd_fast.quality.judges import Judge, make_judge
from qcrd_fast.quality.samples import load_samples, with_expected
from qcrd_fast.runs.folder import DISCRIMINATOR
from qcrd_fast.runs.load import find_model, load_student
from qcrd_fast.train.judging import DiscriminatorJudge
from qcrd_fast.utils.device import make_autocast
from qcrd_fast.utils.files import write_json, write_lines

log = logging.getLogger(__name__)

SETTINGS_FILE = "discriminator.json"
QUALITY_SCORES = "quality_scores.jsonl"  # in a run folder: what the densities of `report` are made from


def load_discriminator(run: str, device: str = "auto") -> tuple[CrossFitted, Student, dict[str, Any]]:
    """Load (discriminator, its student, settings) of a run, a checkpoint or a `train_alone` folder.

    Raises `InputError` where there is none: a method or `--discriminator none` that has none, or a damaged folder.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise InputError(f"{run}: no such folder; score reads a run folder, a checkpoint, or what score --train wrote")
    alone = (folder / SETTINGS_FILE).is_file()
    if alone:
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            config = settings["config"]
            student, _ = load_student(config["student"], device)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / SETTINGS_FILE}: unreadable: {error}") from error
    else:
        folder = Path(find_model(run))
        student, settings = load_student(str(folder), device)
        config = settings.get("config", {})
        if not (folder / DISCRIMINATOR).is_file():
            told = settings.get("discriminator_check") or {}
            why = f" (it was trained with --method {settings['method']})" if "method" in settings else ""
            if settings.get("method") == "qcrd":
                why = " (it was trained without --quality discriminator)"
            if told.get("refused"):
                why = f" (it was rejected, since its held-out AUC {Check(**told).low_text}; the vote weighed)"
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


def plan(run: str | None, questions: Sequence[Question], train: str | None, device: str = "auto") -> dict[str, Any]:
    """Run the checks of scoring and return what it would do."""
    if train:
        new_folder(train, "--train")
    elif run is not None:
        load_discriminator(run, device)
    return {"would_score": sum(len(q.positives) + len(q.negatives) for q in questions), "questions": len(questions)}


def score_run(
    run: str,
    questions: Sequence[Question],
    *,
    temperatures: Sequence[float] = (),
    seed: int = 0,
    device: str = "auto",
    quality: str = "discriminator",
) -> tuple[list[Question], dict[str, Any]]:
    """Return questions with scores by the run's discriminator or `--quality`, and a summary.

    With `temperatures`, the student says one rationale a question at each, and the scores of all kinds go to the run's
    `quality_scores.jsonl` (`report` draws their densities, Fig. 6), the student's with whether they agree with the
    majority.
    """
    judge: Judge
    if quality == "discriminator":
        discriminator, student, settings = load_discriminator(run, device)
        scored, judge = score_questions(discriminator, questions), DiscriminatorJudge(discriminator)
    else:
        student, settings = load_student(run, device)
        judge = make_judge(quality, questions)
        scored = score_teacher(judge, questions)
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
            cases = _say(student, scored, temperature, settings.get("config", {}), seed)
            values = list(judge.scores(cases))
            kind = f"student at {temperature:g}"
            records += [
                {
                    "kind": kind,
                    "id": case.question.id,
                    "question": question_text(case.question),
                    "text": case.rationale.text,
                }
                | {"score": round(value, 6), "agrees": case.agrees}
                for case, value in zip(cases, values, strict=True)
            ]
            summary[f"mean_score_{kind.replace(' ', '_')}"] = math.fsum(values) / len(values)
        try:
            write_lines(folder / QUALITY_SCORES, records)
        except OSError as error:
            raise RunError(f"cannot write {folder / QUALITY_SCORES}: {error.strerror or error}") from error
        summary["quality_scores"] = str(folder / QUALITY_SCORES)
    return scored, summary


def score_teacher(judge: Judge, questions: Sequence[Question]) -> list[Question]:
    """The questions, each rationale with its score."""

    def scored(question: Question) -> Question:
        scores = iter(judge.scores(teacher_cases(question)))
        sides = (question.positives, question.negatives)
        positives, negatives = (
            tuple(dataclasses.replace(r, score=round(next(scores), 6)) for r in side) for side in sides
        )
        return dataclasses.replace(question, positives=positives, negatives=negatives)

    return [scored(question) for question in questions]


def score_by_votes(
    quality: str, questions: Sequence[Question], samples: str | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return rows scored by `--quality vote` or `text`, and a summary; needs no run and no model.

    With `samples`, a file of a student's samples, each question's are scored against its votes: they are the row's
    `student`, and the summary is theirs. Right and wrong are told by the gold answer; without one, or a conclusion, a
    rationale is counted in `without_gold` or `without_answer` alone.

    Raises `InputError` for a file of samples that cannot be read, or of other questions.
    """
    judge = make_judge(quality, questions)
    said = load_samples(samples, questions) if samples else None
    rows = []
    for question in score_teacher(judge, questions):
        row = to_row(question)
        if said is not None:
            own = said.cases.get(question.id, [])
            row["student"] = [
                {
                    "text": case.rationale.text,
                    "answer": case.rationale.answer,
                    "score": round(s, 6),
                    "agrees": case.agrees,
                }
                for case, s in zip(own, judge.scores(own), strict=True)
            ]
        rows.append(row)
    judged = [case for q in questions for case in (teacher_cases(q) if said is None else said.cases.get(q.id, []))]
    counts = {"rationales": len(judged)} | ({} if said is None else {"of_other_questions": said.strangers})
    if without := sum(not q.votes for q in questions):
        counts["without_votes"] = without
        log.warning("%d of %d questions have no votes: their positives score 1, all else 0", without, len(questions))
    return rows, measure(judged, judge.scores(judged)) | counts


def measure(cases: Sequence[Case], scores: Sequence[float]) -> dict[str, Any]:
    """Measure scores against the gold answer: AUC with 95% interval (bootstrap over questions), calibration.

    `weight_on_right`: the share of the weights 1 - s, as negatives, on right rationales.
    """
    from qcrd_fast.discriminator.metrics import score_report

    rows, counts = [], {"without_gold": 0, "without_answer": 0}
    for case, s in zip(cases, scores, strict=True):
        right = is_right(case)
        if right is None:
            counts["without_gold" if case.question.gold is None else "without_answer"] += 1
        else:
            rows.append((case.question.id, float(s), right))
    found = score_report([s for _, s, _ in rows], [right for *_, right in rows], [i for i, *_ in rows])
    weight = math.fsum(1 - s for _, s, _ in rows)
    on_right = math.fsum(1 - s for _, s, right in rows if right)
    sizes = {"right": found["positives"], "wrong": found["negatives"], "questions": found["questions"]}
    share = {"weight_on_right": on_right / weight if weight else None}
    return _figures(found, rows) | sizes | share | counts | {"reliability": found["reliability"]}


def summarize_scores(scored: Sequence[Question]) -> dict[str, Any]:
    """Summarise scored questions: means by side, AUC with interval, calibration.

    Right against wrong by the gold answer; positive against negative if a rationale has no answer.
    """
    from qcrd_fast.discriminator.metrics import score_report

    rows, of_sides = [], {"positives": list[float](), "negatives": list[float]()}
    for case in (case for q in scored for case in teacher_cases(q)):
        score, right = case.rationale.score, is_right(case)
        if score is not None:
            rows.append((case.question.id, float(score), case.positive if right is None else right))
            of_sides["positives" if case.positive else "negatives"].append(float(score))
    means = {f"mean_score_{side}": _mean(values) for side, values in of_sides.items()}
    found = score_report([score for _, score, _ in rows], [right for *_, right in rows], [i for i, *_ in rows])
    return means | found | {side: len(values) for side, values in of_sides.items()} | _figures(found, rows)


def _figures(found: dict[str, Any], rows: Sequence[tuple[str, float, bool]]) -> dict[str, Any]:
    """The keys that every kind of score has; `rows`: (question, score, whether right)."""
    low, high = found["auc_95"] or (None, None)
    figures = {"auc": found["auc"], "auc_low": low, "auc_high": high, "ece": found["expected_calibration_error"]}
    return figures | {f"mean_{name}": _mean([s for _, s, good in rows if good is wanted]) for name, wanted in KINDS}


KINDS = (("right", True), ("wrong", False))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def is_right(case: Case) -> bool | None:
    """Whether a rationale ends in the gold answer; None where either is not known."""
    answer = case.question.majority if case.positive and case.rationale.answer is None else case.rationale.answer
    if case.question.gold is None or answer is None:
        return None
    return same(case.question, answer, case.question.gold)


def train_alone(
    model: str, questions: Sequence[Question], config: TrainConfig, output: str, held_out: float
) -> dict[str, Any]:
    """Pretrain a discriminator on `questions`, save it in `output`, and return its held-out results.

    `model` is the student, a run or a model folder, whose encoder or vocabulary it takes. Raises `InputError` when
    nothing can be learnt from the questions.
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

    def log_step(step: int) -> None:
        if (step + 1) % 50 == 0 or step + 1 == all_steps:
            log.info("discriminator: step %d of %d", step + 1, all_steps)

    loss = trainer.pretrain(train, steps, log_step)
    if loss is None:
        raise InputError(
            "--train: no question has a positive rationale, and a negative or --discriminator-augment to make one"
        )
    check = trainer.check(train, test)
    log.info("discriminator: %s", check.text)
    summary = {"train_questions": len(train), "train_loss": loss, "check": check.to_dict()}
    summary |= judge_questions(discriminator, test) if test else {}
    kept = {n: v for n, v in config.resolved().to_dict().items() if n.startswith("discriminator") or n == "seed"}
    kept["student"] = str(Path(model).resolve()) if Path(model).exists() else model
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.cpu() for n, t in trainer.tensors().items()}, folder / DISCRIMINATOR)
        write_json(folder / SETTINGS_FILE, {"config": kept, "held_out": summary})
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {error}") from error
    return summary


def new_folder(path: str, option: str) -> Path:
    """`path` as a folder that is not there yet, or empty. Raises `InputError` naming the option."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{option}: {path} is not an empty folder; choose another")
    return folder


def _say(
    student: Student, questions: Sequence[Question], temperature: float, config: dict[str, Any], seed: int
) -> list[Case]:
    """Sample one rationale a question from the student as the run does, except for the temperature."""
    known = TrainConfig().to_dict() | config
    settings = SampleSettings(
        temperature,
        known["negative_top_k"],
        known["negative_top_p"],
        known["max_new_tokens"],
        known["sample_batch_size"],
    )
    sources = [student.source_ids(EXPLAIN, question_text(q), q.view) for q in questions]
    keys = [key_words(seed, q.id) for q in questions]
    said = sample(student, sources, keys, settings, autocast=make_autocast(student.device, None))
    eos = student.tokenizer.eos_token_id
    cases = [student_case(q, student.text(t), cut=eos not in t[-1:]) for q, t in zip(questions, said, strict=True)]
    return with_expected(cases, questions)
