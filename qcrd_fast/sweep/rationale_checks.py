"""Check a student's rationales: arithmetic that holds, and a conclusion that is the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from qcrd_fast.data.answers import parse_choices, same_answer
from qcrd_fast.data.expressions import evaluate_expression
from qcrd_fast.data.replies import read_reply

_TIMES = re.compile(r"(?<=[\d)])[ \t]*[xX×][ \t]*(?=[\d($])")
_NUMBER = r"-?[ \t]*\$?\d[\d,]*(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\w%.])(-?[\d($][-+*/÷^().,\d \t$]*)=[ \t]*({_NUMBER})")
_OPERATOR = re.compile(r"(?<=[\d) \t])[-+*/÷^]")
RATIONALES = "rationales.jsonl"  # in a run folder


def equations(text: str) -> list[bool]:
    """Return whether each equation `expression = number` in `text` holds, to its right side's decimals.

    Only what can be computed counts: words or units within the expression, or no operator in it, and it is passed over.
    """
    found = []
    for match in _EQUATION.finditer(_TIMES.sub(" * ", text)):
        value, said = _value(match[1]), evaluate_expression(match[2].strip().rstrip(","))
        if value is not None and said is not None:
            decimals = len(match[2].partition(".")[2])
            found.append(abs(value - said) <= Fraction(1, 2 * 10**decimals) if decimals else value == said)
    return found


def _value(text: str) -> Fraction | None:
    """Return the value of the expression at the end of `text`, after the last full stop or comma."""
    for piece in (text, re.split(r"[.,]\s+", text)[-1]):
        piece = piece.strip().strip(".,").strip()
        if _OPERATOR.search(piece) and (value := evaluate_expression(piece)) is not None:
            return value
    return None


def judge_rationale(
    text: str, task: str, gold: str | None, answer: str | None, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Return {equations, equations_right, conclusion, ends_in_gold, ends_in_answer} of a rationale.

    `answer`: the student's answer without an explanation.
    """
    holds = equations(text)
    kind = "number" if task == "equation" else task
    conclusion = read_reply(text, kind, choices).answer

    def ends_in(other: str | None) -> bool:
        return bool(conclusion and other and same_answer(conclusion, other, task, choices))

    return {
        "equations": len(holds),
        "equations_right": sum(holds),
        "conclusion": conclusion,
        "ends_in_gold": ends_in(gold),
        "ends_in_answer": ends_in(answer),
    }


def summarize(judged: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return shares over the rationales; `arithmetic_right`: of those with equations, all of which hold."""
    checked = [j for j in judged if j["equations"]]
    return {
        "arithmetic_checked": _share(len(checked), len(judged)),
        "arithmetic_right": _share(sum(j["equations"] == j["equations_right"] for j in checked), len(checked)),
        "ends_in_gold": _share(sum(j["ends_in_gold"] for j in judged), len(judged)),
        "ends_in_answer": _share(sum(j["ends_in_answer"] for j in judged), len(judged)),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def judge_run(run: str | Path) -> dict[str, float | None]:
    """Generate and check greedy rationales for a run's predictions.jsonl; write rationales.jsonl.

    Raises `InputError` for a run without a checkpoint or predictions.
    """
    from qcrd_fast.errors import InputError
    from qcrd_fast.generation.engine import SampleSettings
    from qcrd_fast.generation.sample import sample
    from qcrd_fast.models.prompts import EXPLAIN
    from qcrd_fast.runs.folder import PREDICTIONS
    from qcrd_fast.runs.load import load_student
    from qcrd_fast.utils.device import make_autocast
    from qcrd_fast.utils.files import read_records, write_lines

    run = Path(run)
    asked = list(read_records(run / PREDICTIONS))
    if not asked:
        raise InputError(f"{run}: no predictions.jsonl, so no questions to explain")
    student, state = load_student(str(run))
    settings = SampleSettings(max_new_tokens=student.prompts.max_target_length, batch_size=64)
    sources = [student.source_ids(EXPLAIN, r["question"], r.get("view")) for r in asked]
    outputs = sample(student, sources, [(0, 0)] * len(sources), settings, autocast=make_autocast(student.device, None))
    records = []
    for record, tokens in zip(asked, outputs, strict=True):
        text = student.text(tokens)
        task = _kind(state.get("task"), record["gold"])
        choices = parse_choices(record["question"]) if task == "choice" else ()
        judged = judge_rationale(text, task, record["gold"], record["prediction"], choices)
        records.append({"id": record["id"], "rationale": text, **judged})
    write_lines(run / RATIONALES, records)
    return summarize(records)


def _kind(task: str | None, gold: str | None) -> str:
    if task and task != "mixed":
        return task
    from qcrd_fast.data.answers import guess_task

    return guess_task([gold or ""])
