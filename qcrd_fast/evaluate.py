"""Greedy answers and their accuracy; text from a trained student."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.data import answers, replies
from qcrd_fast.data.load import load_questions
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.data.splits import comparable, label_of, main_task, of_split
from qcrd_fast.errors import InputError, RunError
from qcrd_fast.generation.engine import SampleSettings
from qcrd_fast.generation.sample import sample
from qcrd_fast.models.prompts import EXPLAIN, PREDICT, REASON, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.runs.folder import CONFIG, MANIFEST, PREDICTIONS, RESULTS
from qcrd_fast.runs.load import check_student, find_model, find_state, load_student
from qcrd_fast.utils.config_files import read_object, read_options
from qcrd_fast.utils.device import Autocast, make_autocast, resolve_device
from qcrd_fast.utils.files import printable, require_writable, write_lines
from qcrd_fast.utils.intervals import wilson
from qcrd_fast.utils.oom import explaining_oom, for_answers

log = logging.getLogger(__name__)

ZERO_SHOT = "{question}\n\nThink step by step, in a few short sentences. Then end with a line `Answer: ` and {form}."
FORMS = {
    "choice": "the letter of the right choice",
    "equation": "the arithmetic expression that gives the result",
    "yes-no": "yes or no",
    "number": "the number alone, without units",
}
ZERO_SHOT_TOKENS = 256  # of a reply


def predict(
    student: Student,
    questions: Sequence[Question],
    task: str,
    *,
    batch_size: int = 64,
    max_answer_tokens: int = 48,
    reasoning: bool = False,
    zero_shot: bool = False,
    autocast: Autocast | None = None,
    impl: str = "auto",
    batch_option: str = "--batch-size",
) -> list[dict[str, Any]]:
    """Greedy answers: one record of id, question, gold, output, prediction, correct for each question.

    `gold` is the majority where a question has no gold answer. With `reasoning`, the answer stands behind the rationale
    of the third task, after `Answer:`. With `zero_shot`, the question is asked in words (`ZERO_SHOT`), as of a model
    that was trained on none of the tasks, and the reply is read as a teacher's is.
    """
    settings = SampleSettings(max_new_tokens=max_answer_tokens, batch_size=batch_size, impl=impl)
    if reasoning:
        settings = dataclasses.replace(settings, max_new_tokens=student.prompts.max_target_length)
    kinds = [q.task or "text" if task == "mixed" else task for q in questions]
    if zero_shot:
        settings = dataclasses.replace(settings, max_new_tokens=ZERO_SHOT_TOKENS)
        sources = [student.source_ids("", zero_shot_text(q, kind)) for q, kind in zip(questions, kinds, strict=True)]
    else:
        prefix = REASON if reasoning else PREDICT
        sources = [student.source_ids(prefix, question_text(q), q.view if reasoning else None) for q in questions]

    def longest() -> str:
        at = max(range(len(sources)), key=lambda i: len(sources[i]))
        return f"{questions[at].id}, {len(sources[at])} prompt tokens"

    with explaining_oom(for_answers(batch_option, batch_size, settings.max_new_tokens), "answering", longest):
        outputs = sample(student, sources, [(0, 0)] * len(sources), settings, autocast=autocast)
    records = []
    for question, kind, tokens in zip(questions, kinds, outputs, strict=True):
        output = student.text(tokens)
        choices = answers.parse_choices(question_text(question)) if kind == "choice" else ()
        if reasoning or zero_shot:
            prediction = replies.read_reply(output, kind, choices).answer
        else:
            prediction = replies.extract_answer(output, kind, choices)
        gold = label_of(question, None)
        records.append(
            {
                "id": question.id,
                "question": question_text(question),
                "gold": gold,
                "output": output,
                "prediction": prediction,
                "correct": bool(gold and prediction and replies.is_correct(prediction, gold, kind, choices)),
                **{name: value for name in ("domain", "view") if (value := getattr(question, name))},
            }
        )
    return records


def explain(
    student: Student,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    autocast: Autocast | None = None,
    impl: str = "auto",
    batch_option: str = "--batch-size",
) -> list[str]:
    """The student's greedy rationale for the question of each record of `predict`."""
    settings = SampleSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, impl=impl)
    sources = [student.source_ids(EXPLAIN, record["question"], record.get("view")) for record in records]
    with explaining_oom(for_answers(batch_option, batch_size, settings.max_new_tokens), "explaining"):
        said = sample(student, sources, [(0, 0)] * len(sources), settings, autocast=autocast)
    return [student.text(tokens) for tokens in said]


def zero_shot_text(question: Question, task: str) -> str:
    """Return the prompt for an untrained model."""
    form = FORMS.get(task, "the answer alone, as short as possible")
    return ZERO_SHOT.replace("{form}", form).replace("{question}", question_text(question).strip())


def ask_by_chat_template(student: Student) -> bool:
    """Let a model that was not trained be asked by its own chat template; False where it has none."""
    if student.is_encoder_decoder or not student.tokenizer.chat_template:
        return False
    student.prompts = PromptSettings("chat", student.prompts.max_source_length)
    return True


def by_field(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{accuracy_by_domain, accuracy_by_view: {value: {accuracy, n}}} of records with more than one value of the
    field."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("domain", "view"):
        parts: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            parts.setdefault(record.get(name, "(none)"), []).append(record)
        if len(parts) > 1:
            rows = {value: {"accuracy": accuracy(some), "n": len(some)} for value, some in sorted(parts.items())}
            found[f"accuracy_by_{name}"] = rows
    return found


def accuracy(records: Sequence[dict[str, Any]]) -> float | None:
    """Share of correct records, 0..1; None without records."""
    return sum(r["correct"] for r in records) / len(records) if records else None


def evaluate_run(
    run_or_model: str,
    data: str,
    *,
    output: str | None = None,
    task: str | None = None,
    batch_size: int = 64,
    max_answer_tokens: int = 48,
    reasoning: bool = False,
    zero_shot: bool = False,
    device: str = "auto",
    on_bad_row: str = "error",
) -> dict[str, Any]:
    """Evaluate a run or model on a file; return its accuracy.

    `predictions.jsonl` goes to `output`, else to a run's folder eval-DATA (the run's own predictions stay), else to the
    current folder.

    With `zero_shot` the base model of a run, or the model, is asked by its own chat template; the folder:
    eval-DATA-zero-shot. Raises `InputError` for unreadable data, a folder that cannot be written, or a task that the
    run was not trained on, before the model is loaded; `RunError` where the disk is full at the end.
    """
    folder = _answers_folder(run_or_model, data, output, zero_shot)
    _check_tasks(run_or_model, reasoning, zero_shot)
    loaded, questions = _with_answers(data, task, on_bad_row)
    if zero_shot:
        student, state = _load_zero_shot(run_or_model, device)
    else:
        student, state = load_student(run_or_model, device)
    task = task or state.get("task") or main_task(questions)
    questions = comparable(questions, task, f"--data: {data}")
    with student.measuring() as lengths:
        records = predict(
            student,
            questions,
            task,
            batch_size=batch_size,
            max_answer_tokens=max_answer_tokens,
            reasoning=reasoning,
            zero_shot=zero_shot,
            autocast=make_autocast(student.device, None),
        )
    if count := sum(length > student.prompts.max_source_length for length in lengths.prompts):
        log.warning(
            "%d of %d questions have a prompt over the %d tokens that the student was trained with: its beginning is "
            "cut off",
            count, len(questions), student.prompts.max_source_length,
        )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / PREDICTIONS, records)
    except OSError as error:
        raise RunError(f"cannot write {folder / PREDICTIONS}: {error.strerror}") from error
    unreadable = [record for record in records if record["prediction"] is None]
    if unreadable:
        log.warning(
            "no answer can be read in %d of %d outputs, which count as wrong, such as: %s",
            len(unreadable), len(records), printable(unreadable[0]["output"][:200]) or "(empty)",
        )  # fmt: skip
    share = accuracy(records)
    assert share is not None
    return {
        "accuracy": share,
        "n": len(records),
        "accuracy_95": list(wilson(share, len(records))),
        "unreadable": len(unreadable),
        "task": task,
        **by_field(records),
        "without_answer": loaded - len(questions),
        "predictions": str(folder / PREDICTIONS),
    }


def plan_answers(
    run_or_model: str,
    data: str,
    *,
    output: str | None = None,
    task: str | None = None,
    reasoning: bool = False,
    zero_shot: bool = False,
    on_bad_row: str = "error",
    device: str = "auto",
) -> dict[str, Any]:
    """Run the checks of `evaluate_run` that need no weights; return what it would do."""
    folder = _answers_folder(run_or_model, data, output, zero_shot)
    _check_tasks(run_or_model, reasoning, zero_shot)
    _, questions = _with_answers(data, task, on_bad_row)
    name = base_model(run_or_model) if zero_shot else find_model(run_or_model)
    check_student(name, device)
    return {"would_answer": len(questions), "model": name, "predictions": str(folder / PREDICTIONS)}


def _with_answers(data: str, task: str | None, on_bad_row: str) -> tuple[int, list[Question]]:
    """(how many test questions a file has, those of them that have an answer). Raises `InputError` where none can."""
    loaded = load_questions(data, part="test", on_bad_row=on_bad_row, task=task)
    asked = of_split(loaded.questions, "test", f"--data: {data}")
    questions = [q for q in asked if label_of(q, None) is not None]
    if not questions:
        raise InputError(f"{data}: no question has an answer to compare with; {loaded.taken_for}")
    log.info("%s", loaded.taken_for)
    return len(asked), questions


def base_model(run_or_model: str) -> str:
    """The student that a run began with, or the argument itself."""
    student = read_options(Path(run_or_model) / CONFIG).get("student")
    return student if isinstance(student, str) else run_or_model


def _load_zero_shot(run_or_model: str, device: str) -> tuple[Student, dict[str, Any]]:
    name = base_model(run_or_model)
    student = Student.load(name, PromptSettings(), resolve_device(device))
    if not ask_by_chat_template(student):
        raise InputError(f"--zero-shot: {name} has no chat template to be asked by")
    student.model.eval()
    return student, {}


def _check_tasks(run_or_model: str, reasoning: bool, zero_shot: bool = False) -> None:
    """Raise `InputError` for `reasoning` on a run or export trained without the third task."""
    if reasoning and zero_shot:
        raise InputError("--reasoning asks for a task of a trained run; it does not go with --zero-shot")
    found = find_state(find_model(run_or_model)) if reasoning else None
    state = read_object(found) if found else {}
    config = state.get("config")
    trained = config.get("reasoning_task") if isinstance(config, dict) else state.get("reasoning_task")
    if state and trained is not True:
        raise InputError(f"--reasoning: {run_or_model} was trained without --reasoning-task, so it knows no such task")


def _answers_folder(run_or_model: str, data: str, output: str | None, zero_shot: bool = False) -> Path:
    """Where `evaluate_run` writes. Raises `InputError` for a folder that it must not, or cannot, write to."""
    run = Path(run_or_model)
    if output is not None:
        folder = Path(output)
    else:
        name = f"eval-{Path(data).resolve().stem}{'-zero-shot' if zero_shot else ''}"
        folder = run / name if os.path.isfile(run / CONFIG) else Path(".")
    if (folder / RESULTS).is_file():
        raise InputError(f"--output: {folder} holds a run's own predictions.jsonl; choose another folder")
    if (folder / MANIFEST).is_file():
        raise InputError(f"--output: {folder} is a checkpoint; choose another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"--output: {folder} is a link or no folder; choose another")
    require_writable(folder, "--output")
    return folder


def generate_text(
    run_or_model: str,
    question: str,
    *,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    max_new_tokens: int = 256,
    reasoning: bool = False,
    view: str | None = None,
    device: str = "auto",
) -> list[dict[str, str]]:
    """Rationales and answers to one question: `num_samples` of each, greedy at temperature 0. `view`: the rationale is
    asked for in this view (`models.views`). Raises `InputError` for an empty question and for an unknown view."""
    if not question.strip():
        raise InputError("the question is empty")
    _check_tasks(run_or_model, reasoning)
    student, _ = load_student(run_or_model, device)
    settings = SampleSettings(temperature, max_new_tokens=max_new_tokens)
    indices = list(range(num_samples))

    def say(prefix: str) -> list[str]:
        asked = student.source_ids(prefix, question, None if prefix == PREDICT else view)
        sources = [asked] * num_samples
        keys = [key_words(seed, prefix + question)] * num_samples
        autocast = make_autocast(student.device, None)
        with explaining_oom("--num-samples, --max-new-tokens", "answering"):
            drawn = sample(student, sources, keys, settings, indices=indices, autocast=autocast)
        return [student.text(t) for t in drawn]

    if reasoning:
        parts = [text.rpartition("Answer:") for text in say(REASON)]
        return [{"rationale": before.strip() or after.strip(), "answer": after.strip()} for before, _, after in parts]
    return [{"rationale": r, "answer": a} for r, a in zip(say(EXPLAIN), say(PREDICT), strict=True)]
