"""Count what each method trains on: python -m qcrd_fast.bench.exposure --recipe FILE.

So that training on more of the teacher's text is not mistaken for a better algorithm. For example
--recipe recipes/svamp-mentors-smollm2.yaml [--student FOLDER].
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.models.prompts import Prompter, PromptSettings
from qcrd_fast.sweep.runner import read_recipe
from qcrd_fast.train.examples import Example, make_examples
from qcrd_fast.train.methods import METHODS, label_kind
from qcrd_fast.train.questions import Data

STAGES = {
    "redi": "dss, then positives against the minority",
    "qcrd": "discriminator, then score, select, train",
}
HEAD = ("method", "labels", "stages", "questions", "teacher rationales a question", "student's own",
        "label tokens", "rationale tokens with gradient", "scored without")  # fmt: skip


def lengths(candidates: Sequence[Any]) -> list[int]:
    return [len(c.tokens) for c in candidates]


def exposure(method: str, examples: Sequence[Example], config: TrainConfig) -> dict[str, Any]:
    """Count mean rationales per question and target tokens of one epoch; prompts are not counted.

    For qcrd the tokens with gradient depend on the selection: (fewest, most), the most with a student's negative of
    --max-new-tokens. For redi: of its second stage.
    """

    def total(count: Callable[[Example], int]) -> int:
        return sum(map(count, examples))

    labels = total(lambda e: len(e.label))
    positives, minority = total(lambda e: len(e.positives)), total(lambda e: len(e.minority))
    first = total(lambda e: sum(lengths(e.positives[:1])))
    every, wrong = total(lambda e: sum(lengths(e.positives))), total(lambda e: sum(lengths(e.minority)))
    own = config.max_new_tokens if config.effective("negative_source") in ("lagged", "fixed") else 0
    fewest = total(lambda e: min(lengths(e.positives), default=0))
    most = total(lambda e: max(lengths(e.positives), default=0) + max([own, *lengths(e.minority)]))
    seen, gradient, scored = {
        "finetune": (0, (0, 0), 0),
        "single-task": (0, (0, 0), 0),
        "dss": (total(lambda e: len(e.positives[:1])), (first, first), 0),
        "mi": (total(lambda e: len(e.positives[:1])), (first, first), 0),
        "sft-all": (positives, (every, every), 0),
        "redi": (positives + minority, (every + wrong, every + wrong), 0),
        "qcrd": (positives + minority, (fewest, most), every + wrong),
    }[method]
    return {
        "method": method,
        "labels": {"gold": "gold", "majority": "teacher's majority"}.get(
            str(label_kind(config)), "gold, else majority"
        ),
        "stages": STAGES.get(method, "one"),
        "questions": len(examples),
        "teacher rationales a question": round(seen / len(examples), 2),
        "student's own": int(bool(own)) if method == "qcrd" else 0,
        "label tokens": labels,
        "rationale tokens with gradient": gradient,
        "scored without": scored,
    }


def table(recipe: str, student: str | None = None) -> str:
    """Format a recipe's counts as a Markdown table: seed 0's training questions in the student's tokens."""
    from transformers import AutoConfig, AutoTokenizer

    base = TrainConfig.from_dict(read_recipe(recipe) | ({"student": student} if student else {}))
    name = str(base.student)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        encoder_decoder = AutoConfig.from_pretrained(name, trust_remote_code=False).is_encoder_decoder
    except (OSError, ValueError) as error:
        raise InputError(
            f"student: cannot load the tokenizer of {name!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    settings = PromptSettings.from_option(base.prompt_template, base.max_source_length, base.max_target_length)
    prompter: Any = Prompter(tokenizer, settings, bool(encoder_decoder))
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for method in [name for name, found in METHODS.items() if not (found.token_weights or found.teacher)]:
        config = dataclasses.replace(base, method=method, scheme="minmax", negative_source="lagged")
        found = exposure(method, make_examples(Data.load(config).train, prompter, config), config)
        low, high = found["rationale tokens with gradient"]
        found["rationale tokens with gradient"] = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines.append(_line([f"{v:,}" if isinstance(v, int) else str(v) for v in found.values()]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--student", help="folder with the tokenizer, in place of the recipe's student")
    args = parser.parse_args()
    try:
        print(table(args.recipe, args.student))
    except InputError as error:
        print(f"exposure: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
