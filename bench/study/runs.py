"""One run of the study: draw a seed's data, train the student, judge its output."""

from __future__ import annotations

import functools
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question
from qcrd_fast.demo.problems import Problem, draw_problems, is_faithful, is_sound, write_chain, write_rows
from qcrd_fast.demo.problems import result as result_of
from qcrd_fast.demo.students import FAMILIES, Recipe, student_folder
from qcrd_fast.errors import InputError
from qcrd_fast.evaluate import predict
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN, REASON
from qcrd_fast.models.student import Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.ops.philox import key_words
from qcrd_fast.runs.folder import METRICS
from qcrd_fast.runs.load import load_student
from qcrd_fast.train.judging import Judges
from qcrd_fast.train.objective import Objective
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.trainer import train
from qcrd_fast.utils.files import read_records, write_lines

from .arms import ARMS, COMMON, MENTOR
from .judges import find_judge
from .mentors import mentor_folder
from .objective import LimitedObjective, Rules, Spent, StudyObjective

log = logging.getLogger("qcrd_fast.bench")
TEST_QUESTIONS = 1000
STAGES = ("screen", "confirm")
RECIPES = {family: Recipe(family) for family in FAMILIES}  # of the students


class Case(NamedTuple):
    """The key of a CSV row. `screen` and `confirm` share no seeds and no test questions.

    learning_rate, epochs, questions: of the training, the same for all arms that are compared.
    """

    stage: str
    task: str
    family: str
    arm: str
    seed: int
    learning_rate: float = 1.5e-3
    epochs: float = 10
    questions: int = 400


def draw_data(case: Case, folder: Path) -> tuple[Path, dict[str, Problem], list[Problem]]:
    """Draw (training rows, their problems by id, the stage's test problems), for all arms of a seed."""
    taken: set[str] = set()
    tests = {
        stage: draw_problems(case.task, TEST_QUESTIONS, random.Random(f"{case.task} {stage} test"), taken)
        for stage in STAGES
    }
    rng = random.Random(f"{case.task} {case.stage} {case.seed}")
    problems = draw_problems(case.task, case.questions, rng, taken)
    rows = write_rows(case.task, problems, rng)
    write_lines(folder / "train.jsonl", rows)
    return folder / "train.jsonl", {row["id"]: p for row, p in zip(rows, problems, strict=True)}, tests[case.stage]


def run_case(case: Case, cache: Path) -> dict[str, Any]:
    """Train and judge a student; return the CSV row."""
    arm = ARMS[case.arm]
    student = student_folder(RECIPES[case.family], cache)
    teacher = {"teacher": str(mentor_folder(case.task, student, cache))} if arm.options.get("teacher") == MENTOR else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, problems, tests = draw_data(case, folder)
        started = time.process_time()
        common = COMMON | {"data": str(data), "seed": case.seed, "learning_rate": case.learning_rate}
        epochs, begun, records = case.epochs, str(student), []
        if arm.warm:
            options = common | {"method": "sft-all", "num_train_epochs": arm.warm * epochs}
            warmed = folder / "warmed"
            train(TrainConfig.from_dict(options | {"student": begun, "output_dir": str(warmed)}))
            begun, records = str(warmed / "final"), _records(warmed)
        make: Any = Objective
        if arm.equal_tokens:
            tokens, own = _epoch_tokens(data, begun, arm.options, case.seed)
            epochs *= 1 - arm.warm
            make = functools.partial(LimitedObjective, tokens=epochs * tokens)
            epochs *= tokens / own
        rate = arm.rate * case.learning_rate
        options = common | arm.options | teacher | {"num_train_epochs": epochs, "learning_rate": rate}
        config = TrainConfig.from_dict(options | {"student": begun, "output_dir": str(folder / "run")})
        rules = arm.rules or Rules()
        if arm.rules and not arm.product:
            make = functools.partial(
                StudyObjective, rules=rules, total_steps=Schedule(len(problems), config).total_steps
            )
        judged = rules.positive_judge, rules.negative_judge
        judges = Judges(*(find_judge(name, problems) for name in judged)) if any(n != "none" for n in judged) else None
        try:
            train(config, judges=judges, make_objective=make)
            trained, _ = load_student(str(folder / "run"))
        except Spent as spent:
            (trained,) = spent.args
            trained.model.eval()
        train_s = time.process_time() - started
        steps, records = sum("loss" in r for r in records), records + _records(folder / "run")
        row = {**case._asdict(), **judge_student(trained, tests, bool(options.get("reasoning_task")))}
    last = records[-1]
    return row | {
        "steps": steps + last["step"],
        "loss_cl": np.mean([r["loss_cl"] for r in records[-10:]]),
        "active_lagged": last.get("active_hinge_lagged"),
        "active_minority": last.get("active_hinge_minority"),
        "student_tokens": round(sum(r["tokens_per_s"] * r["step_ms"] / 1e3 for r in records if "loss" in r)),
        "train_cpu_s": train_s,
        "cpu_s": time.process_time() - started,
    }


def _records(run: Path) -> list[dict[str, Any]]:
    return list(read_records(run / METRICS, "raise"))


def _epoch_tokens(data: Path, student: str, options: dict[str, Any], seed: int) -> tuple[int, int]:
    """Tokens that an epoch of sft-all trains on, and those of an epoch with one sample a question, as long as what
    `student` says now; gkd trains on positives and samples."""
    model, _ = load_student(student)
    questions = load_questions(str(data), split="train").questions
    labels = sum(len(model.target_ids(str(q.gold or q.majority))) for q in questions)
    positives = sum(len(model.target_ids(r.text)) for q in questions for r in q.positives)
    settings = SampleSettings(1.0, max_new_tokens=COMMON["max_new_tokens"], batch_size=len(questions))
    keys = [key_words(seed, q.id) for q in questions]
    said = sum(map(len, sample(model, [model.source_ids(EXPLAIN, q.question) for q in questions], keys, settings)))
    own = labels + said + (positives if options["method"] == "gkd" else 0)
    return labels + positives, own


@torch.no_grad()
def judge_student(student: Student, tests: list[Problem], reasoning: bool = False) -> dict[str, Any]:
    """Measure a student: right labels, sound and faithful rationales (greedy), likelihoods.

    Shares come with a bit per question; nll of sound and of faulty chains is in nats/token, entropy on the sound ones
    in nats.
    """
    questions = [Question(f"q{i}", p.text, gold=str(p.answer), task="number") for i, p in enumerate(tests)]
    labels = [r["correct"] for r in predict(student, questions, "number", batch_size=1000, max_answer_tokens=4)]
    settings = SampleSettings(max_new_tokens=40, batch_size=1000)
    prefixes = [EXPLAIN, *([REASON] if reasoning else [])]
    sources = [student.source_ids(prefixes[-1], p.text) for p in tests]
    texts = [student.text(tokens) for tokens in sample(student, sources, [(0, 0)] * len(sources), settings)]
    if reasoning:
        answers = [t.partition("Answer:")[2].strip() for t in texts]
        labels = [a == str(p.answer) for a, p in zip(answers, tests, strict=True)]
        texts = [t.partition("Answer:")[0] for t in texts]
    sound = [is_sound(t, p.text, str(p.answer)) for t, p in zip(texts, tests, strict=True)]
    faithful = [is_faithful(t, p) for t, p in zip(texts, tests, strict=True)]
    some, rng = tests[:200], random.Random(0)
    sources = [student.source_ids(EXPLAIN, p.text) for p in some]
    good = [write_chain([(s, result_of(s)) for s in p.steps], rng) for p in some]
    packed = student.hidden(sources, [student.target_ids(t) for t in good], list(range(len(some))), shared=False)
    head = student.head
    found = linear_logprob(packed.hidden, head.weight, packed.target, **head.options, return_entropy=True)
    return {
        "accuracy": np.mean(labels),
        "sound": np.mean(sound),
        "faithful": np.mean(faithful),
        "nll_sound": -float(found.logprob.mean()),
        "entropy": float(found.entropy.mean()),
        "labels": to_hex(labels),
        "sounds": to_hex(sound),
        "faithfuls": to_hex(faithful),
    }


def to_hex(bits: list[bool]) -> str:
    return np.packbits(np.array(bits, bool)).tobytes().hex()


def from_hex(text: str, count: int = TEST_QUESTIONS) -> list[bool]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool).tolist()


def seed_ranges(text: str) -> list[int]:
    """The seeds of `0-7` or `0,3,5`. Raises `InputError` for another text."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            seeds += range(int(low), int(high or low) + 1)
    except ValueError as error:
        raise InputError(f"--seeds: expected such as 0-7 or 0,3,5; got {text!r}") from error
    return seeds
