"""How the demo's students answer and reason: figures in each run's `eval_results.json`, a table, and the page
`report.html`."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcrd_fast.demo.problems import is_sound
from qcrd_fast.errors import InputError
from qcrd_fast.report.run_view import MEASURES
from qcrd_fast.runs.folder import RESULTS
from qcrd_fast.utils.files import printable, write_json

log = logging.getLogger(__name__)
REPORT = "report.html"


def compare_runs(runs: Sequence[str]) -> dict[str, Any]:
    """Let the student of each finished run, and first the untrained one, reason about the test questions; returns the
    first run's results with `comparison`: a row a student of its name and its `MEASURES`, shares of the questions.

    Sound: it holds an equation, every equation holds, every number comes from the question or an earlier result, and it
    ends in the gold answer.
    """
    told: list[dict[str, Any]] = []
    for run in runs:
        path = Path(run) / RESULTS
        results = json.loads(path.read_text(encoding="utf-8"))
        if "sound_reasoning" not in results:
            results |= _judge(run)
            before = told[0] if told else _judge(run, untrained=True)
            for name in (*MEASURES, "sound_reasoning"):
                if (key := f"{name}_untrained") not in results and (
                    value := before.get(key, before.get(name))
                ) is not None:
                    results[key] = value
            write_json(path, results)
        told.append(results)
    rows = [_row(told[0], "untrained", "_untrained"), *(_row(r, str(r["method"])) for r in reversed(told))]
    report = _write_report(runs)
    return told[0] | {"comparison": rows} | ({"report": report} if report else {})


def _row(results: Mapping[str, Any], student: str, suffix: str = "") -> dict[str, Any]:
    return {"student": student} | {name: results.get(name + suffix) for name in MEASURES}


def _judge(run: str, untrained: bool = False) -> dict[str, float]:
    """Shares of a run's test questions that its final student, or the untrained one, answers rightly behind its
    reasoning, and reasons soundly about."""
    from qcrd_fast.config import TrainConfig
    from qcrd_fast.data.load import load_questions
    from qcrd_fast.evaluate import accuracy, explain, predict
    from qcrd_fast.models.student import Student
    from qcrd_fast.runs.load import load_student
    from qcrd_fast.utils.device import choose_threads, threads_kept

    student, state = load_student(run)
    config = TrainConfig.from_dict(state["config"])
    if untrained:
        student = Student.load(str(config.student), student.prompts, student.device)
    questions = load_questions(str(config.test_data)).questions
    options: dict[str, Any] = {"batch_size": config.eval_batch_size, "impl": config.impl}
    found = {}
    with threads_kept():
        choose_threads(student.device, sum(p.numel() for p in student.model.parameters()))
        if config.reasoning_task:
            records = predict(student, questions, "number", reasoning=True, **options)
            said = [record["output"].partition("Answer:")[0] for record in records]
            found["accuracy_reasoned"] = accuracy(records) or 0.0
        else:
            asked = [{"question": q.question} for q in questions]
            said = explain(student, asked, max_new_tokens=config.max_target_length, **options)
    sound = [is_sound(text, q.question, str(q.gold)) for text, q in zip(said, questions, strict=True)]
    return found | {"sound_reasoning": sum(sound) / len(sound)}


def _write_report(runs: Sequence[str]) -> str | None:
    from qcrd_fast.report.page import write_report

    output = str(Path(runs[0]) / REPORT)
    try:
        write_report(runs, output)
    except InputError as error:
        log.info("no %s: %s", REPORT, error)
        return None
    return output


def table_text(comparison: Sequence[Mapping[str, Any]], n: int) -> str:
    """The rows of `compare_runs` for a person."""
    heads = [f"of {n} new questions", *MEASURES.values()]
    lines = [heads] + [
        [str(row["student"]), *("" if row[name] is None else f"{row[name]:.3f}" for name in MEASURES)]
        for row in comparison
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary_text(results: Mapping[str, Any], output_dir: str) -> str:
    """The table, what is sound, and the commands that are likely next."""
    run = shlex.quote(output_dir.rstrip("/") or "/")
    question = "Ann has 5 keys, finds 6 and sells 3. How many are left?"
    reason = "--reasoning " if results.get("accuracy_reasoned") is not None else ""
    lines = [
        table_text(results["comparison"], results["n"]),
        "sound: every equation holds, every number comes from the question or an earlier result, and the end is right",
        "",
        *([f"charts: {printable(results['report'])}"] if "report" in results else []),
        "next:",
        f'  qcrd-fast generate {run} {reason}"{question}"',
        "  qcrd-fast prepare samples.jsonl --output train.jsonl    # your own teacher's samples",
        "  qcrd-fast train --data train.jsonl --student NAME_OR_PATH --output-dir runs/one",
    ]
    return "\n".join(lines)
