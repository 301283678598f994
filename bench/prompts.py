"""Benchmark of shared prompts against one sequence per rationale: tokens through the model and time.

    python -m qcrd_fast.bench.prompts --data svamp.jsonl --student SmolLM2-135M --questions 2,4 [--shape t5-small]
    [--append]

Each round takes other questions of the (prepared) data and runs both ways on them, in turns: the scoring pass alone and
a whole step (scoring, training what was selected, backward; no optimizer, no sampling). Each question also gets one
negative of the student's own: a rationale of another question. `--shape t5-small` keeps the student's tokenizer, and so
its lengths and its head, and puts T5-small's body with random weights in between. Only statistics are kept, never text.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.load import load_questions
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import Example, make_examples
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.utils.device import make_autocast, resolve_device

from .record import append, describe_machine
from .timing import quantile, time_ms

RESULTS = Path(__file__).parent / "results" / "prompts.csv"
PASSES = ("score", "step")
COLUMNS = (
    "student", "data", "questions", "pass", "tokens_shared", "tokens_alone", "tokens_quotient", "ms_shared", "ms_alone",
    "time_quotient", "time_quotient_p20", "time_quotient_p80", "prompt_tokens", "rationale_tokens", "rationales",
    "mask",
    "dtype", "repeats", "transformers", "device", "threads", "cuda", "torch", "triton", "commit", "time",
)  # fmt: skip
T5_SMALL = dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)


def load_student(folder: str, shape: str | None, device: torch.device) -> Student:
    student = Student.load(folder, PromptSettings(), device)
    if shape is None:
        return student
    rows, ids = student.head.weight.shape[0], {"decoder_start_token_id": 0, "pad_token_id": 0}
    config = T5Config(vocab_size=rows, **T5_SMALL, **ids)  # type: ignore[arg-type]
    model: Any = T5ForConditionalGeneration(config)
    return Student(model.to(device), student.tokenizer, student.prompts)


def make_objectives(student: Student, bf16: bool) -> dict[str, Objective]:
    """Return {shared, alone}: the same objective with and without shared prompts.

    Every hinge is active, so two of each question's rationales are trained.
    """
    config = TrainConfig(delta=1e3, discriminator="none", scheme="minmax", negative_source="lagged")
    autocast = make_autocast(student.device, bf16)
    return {
        name: Objective(student, dataclasses.replace(config, shared_prompts=name == "shared"), None, autocast)
        for name in ("shared", "alone")
    }


def run(objective: Objective, what: str, batch: Sequence[Example], lagged: dict[str, Negative]) -> int:
    """Run one pass or step; return the tokens that ran through the model."""
    if what == "step":
        _, stats = objective.step(MicroBatch(batch, lagged, len(batch)))
        objective.student.model.zero_grad(set_to_none=True)
        return stats["body_tokens"]
    candidates = [(c.tokens, q) for q, example in enumerate(batch) for c in example.candidates(lagged)]
    objective.student.model.eval()
    with torch.no_grad():
        packed, _ = objective.score([e.explain for e in batch], [t for t, _ in candidates], [q for _, q in candidates])
    objective.student.model.train()
    return packed.body_tokens


def measure(
    objectives: dict[str, Objective], examples: list[Example], questions: int, repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return {pass: tokens per step and milliseconds of both ways, and the quotient of times by round}."""
    draw = random.Random(0)
    own = {
        e.id: other.positives[-1]
        for e, other in zip(examples, examples[1:] + examples[:1], strict=True)
        if other.positives
    }
    lagged = {i: Negative(c.tokens[:128], c.text) for i, c in own.items()}
    seen: dict[str, dict[str, list[float]]] = {what: defaultdict(list) for what in PASSES}
    for number in range(repeats + 1):
        batch = draw.sample(examples, questions)
        for what in PASSES:
            for name in list(objectives)[:: -1 if number % 2 else 1]:
                tokens = 0

                def call(objective: Objective = objectives[name], what: str = what) -> None:
                    nonlocal tokens
                    tokens = run(objective, what, batch, lagged)  # noqa: B023 (called at once)

                spent = milliseconds(call, device)
                if number:  # the first batch pays for what every process pays for once
                    seen[what][f"tokens_{name}"].append(tokens)
                    seen[what][f"ms_{name}"].append(spent)
    return {what: summarise(values) for what, values in seen.items()}


def milliseconds(call: Callable[[], None], device: torch.device) -> float:
    """Time on the device; on a CPU, CPU time of this process, so that other processes do not count."""
    if device.type == "cuda":
        return time_ms(call, device)
    started = time.process_time()
    call()
    return 1e3 * (time.process_time() - started)


def summarise(values: dict[str, list[float]]) -> dict[str, Any]:
    quotients = [s / a for s, a in zip(values["ms_shared"], values["ms_alone"], strict=True)]
    row: dict[str, Any] = {n: round(sum(values[n]) / len(values[n])) for n in ("tokens_shared", "tokens_alone")}
    row["tokens_quotient"] = round(sum(values["tokens_shared"]) / sum(values["tokens_alone"]), 3)
    row |= {n: round(quantile(values[n], 0.5), 1) for n in ("ms_shared", "ms_alone")}
    return row | {
        f"time_quotient{end}": round(quantile(quotients, q), 3) for end, q in (("", 0.5), ("_p20", 0.2), ("_p80", 0.8))
    }


def lengths(examples: list[Example]) -> dict[str, float]:
    """Mean lengths over the data [tokens], without the student's own negatives."""
    candidates = [c for e in examples for c in e.candidates({})]
    return {
        "prompt_tokens": round(sum(len(e.explain) for e in examples) / len(examples), 1),
        "rationale_tokens": round(sum(len(c.tokens) for c in candidates) / len(candidates), 1),
        "rationales": round(len(candidates) / len(examples) + 1, 2),
    }


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prepared rows")
    parser.add_argument("--student", required=True, help="decoder-only student: folder or hub id")
    parser.add_argument("--shape", choices=("t5-small",), help="another body under the same tokenizer")
    parser.add_argument("--questions", default="2,4", help="questions of a micro-batch, one case each")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, each with other questions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--append", action="store_true", help=f"add the rows to {RESULTS.name} of this checkout")
    given = parser.parse_args(args)
    try:
        device = resolve_device(given.device)
        questions_of_data = load_questions(given.data, split="train").questions
        student = load_student(given.student, given.shape, device)
    except InputError as error:
        parser.error(str(error))
    student.model.train()
    objectives = make_objectives(student, given.bf16)
    examples = make_examples(questions_of_data, student, TrainConfig(negative_source="minority"))
    for questions in map(int, given.questions.split(",")):
        for what, row in measure(objectives, examples, questions, given.repeats, device).items():
            case = {
                "student": given.shape or Path(given.student).name,
                "data": Path(given.data).stem,
                "questions": questions,
            }
            how = {
                "mask": student.sharing,
                "dtype": "bf16" if given.bf16 else "fp32",
                "repeats": given.repeats,
            }
            line = {**case, "pass": what, **row, **lengths(examples), **how, **describe_machine(device)}
            print(line, flush=True)
            if given.append:
                append(RESULTS, COLUMNS, [line])


if __name__ == "__main__":
    main()
