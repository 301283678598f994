"""The built-in demo: two-step arithmetic word problems, a simulated noisy teacher, a small T5 trained from scratch.

The teacher is sampled five times a question, like a real one; now and then it slips, so some answers are wrong and the
vote has something to decide. Everything after that is what real data goes through.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.runs.folder import RunFolder
from qcrd_fast.utils.files import write_lines

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jill")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "shells", "stamps", "stones")
MORE = ("finds", "buys", "gets", "makes")
LESS = ("loses", "sells", "eats", "drops")
SAMPLES = 5
SLIP = 0.12  # chance that the teacher gets one of its two steps wrong
LARGEST = 7  # operands are 2..LARGEST

DEFAULTS: dict[str, Any] = dict(
    task="number",
    learning_rate=5e-4,
    per_device_train_batch_size=32,
    num_train_epochs=7,
    warmup_ratio=0.1,
    negative_lag=1,  # five of the seven iterations learn from a student that was trained
    negative_top_k=5,  # of a vocabulary of about a hundred; 50 would be no truncation at all
    max_new_tokens=32,
    max_source_length=64,
    max_target_length=64,
    max_answer_tokens=4,
    sample_batch_size=512,
    eval_batch_size=512,
    eval_steps=250,
    discriminator_pretrain_steps=60,
    discriminator_update_batches=20,
    discriminator_learning_rate=5e-4,
    validation_fraction=0.05,
    logging_steps=10,
)
QUESTIONS, TEST_QUESTIONS = 4000, 300


@dataclasses.dataclass(frozen=True)
class Problem:
    """`name` has a things, gets b more, then loses c: how many are left?"""

    name: str
    thing: str
    more: str
    less: str
    a: int
    b: int
    c: int

    @property
    def answer(self) -> str:
        return str(self.a + self.b - self.c)

    @property
    def question(self) -> str:
        return (
            f"{self.name} has {self.a} {self.thing}, {self.more} {self.b} and {self.less} {self.c}. How many are left?"
        )


def draw_problems(count: int, rng: random.Random) -> list[Problem]:
    """Distinct problems, in a drawn order."""
    seen: dict[Problem, None] = {}
    while len(seen) < count:
        a, b, c = (rng.randint(2, LARGEST) for _ in range(3))
        problem = Problem(rng.choice(NAMES), rng.choice(THINGS), rng.choice(MORE), rng.choice(LESS), a, b, c)
        if c <= a + b:
            seen[problem] = None
    return list(seen)


def teach(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """One sampled (rationale, answer) of the teacher, in one of several wordings, sometimes with a slip."""
    p = problem
    total = p.a + p.b
    slip = rng.choice(("total", "rest", "sign")) if rng.random() < 2 * SLIP else ""
    if slip == "total":
        total = max(p.c, total + rng.choice((-2, -1, 1, 2)))
    rest, sign = total - p.c, "-"
    if slip == "rest":
        rest = max(0, rest + rng.choice((-2, -1, 1, 2)))
    elif slip == "sign":
        rest, sign = total + p.c, "+"
    first = rng.choice(
        (
            f"First {p.a} + {p.b} = {total}.",
            f"{p.name} {p.more} {p.b}: {p.a} + {p.b} = {total}.",
            f"Now there are {p.a} + {p.b} = {total}.",
            f"Add: {p.a} + {p.b} = {total}.",
        )
    )
    second = rng.choice(
        (
            f"Then {total} {sign} {p.c} = {rest}.",
            f"{p.name} {p.less} {p.c}: {total} {sign} {p.c} = {rest}.",
            f"So {total} {sign} {p.c} = {rest} are left.",
            f"Subtract: {total} {sign} {p.c} = {rest}.",
        )
    )
    return f"{first} {second}", str(rest)


def demo_paths(folder: Path) -> dict[str, str]:
    """Where the demo's data and student stand, as train's options."""
    names = {"data": "train.jsonl", "test_data": "test.jsonl", "student": "student"}
    return {option: str(folder / name) for option, name in names.items()}


def write_demo(folder: Path, seed: int) -> dict[str, str]:
    """Write train.jsonl (sampled rows), test.jsonl and the untrained student; returns their paths as train's
    options."""
    rng = random.Random(seed)
    paths = demo_paths(folder)
    train, test, student = (Path(paths[option]) for option in ("data", "test_data", "student"))
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    problems = draw_problems(QUESTIONS + TEST_QUESTIONS, rng)
    train_problems, test_problems = problems[:QUESTIONS], problems[QUESTIONS:]
    for problem in train_problems:
        samples = [dict(zip(("rationale", "answer"), teach(problem, rng), strict=True)) for _ in range(SAMPLES)]
        row = {"id": f"train-{len(rows)}", "question": problem.question, "answer": problem.answer, "samples": samples}
        rows.append(row)
    write_lines(train, rows)
    write_lines(
        test,
        [
            {"id": f"test-{i}", "question": p.question, "answer": p.answer, "samples": []}
            for i, p in enumerate(test_problems)
        ],
    )
    texts = [row["question"] for row in rows] + [s["rationale"] for row in rows for s in row["samples"]]
    build_student(student, texts, seed)
    return paths


def build_tokenizer(texts: list[str]) -> Any:
    """A word-level tokenizer in which every number is one token, and a decoder that writes readable text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+:|\w+|[^\w\s]|\n"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"])
    numbers = [str(n) for n in range(4 * LARGEST)]
    tokenizer.train_from_iterator([*texts, *numbers, "predict: explain: reason: Answer:", "\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_student(folder: Path, texts: list[str], seed: int) -> None:
    """A T5 of 2 + 2 layers, 128 wide, over the words of `texts`."""
    import torch
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


def run_demo(overrides: dict[str, Any], output_dir: str, *, dry_run: bool = False) -> dict[str, Any]:
    """Make the demo's data and student in `output_dir/demo`, train, and return what `train` returns.

    `overrides` are train's options; data, student and test set are the demo's own.
    """
    folder = Path(output_dir) / "demo"
    paths = demo_paths(folder)
    for name in paths:
        if overrides.get(name) is not None:
            raise InputError(f"demo brings its own --{name.replace('_', '-')}; to use yours, run: qcrd-fast train")
    config = TrainConfig.from_dict(DEFAULTS | overrides | paths | {"output_dir": output_dir})
    idle = {
        flag[2:].replace("-", "_") for flag in config.unused()
    }  # what only an option would bring, such as a discriminator's
    ours = {name: value for name, value in DEFAULTS.items() if name not in idle}
    config = TrainConfig.from_dict(ours | overrides | paths | {"output_dir": output_dir})
    if dry_run:
        return {"questions": QUESTIONS, "test": TEST_QUESTIONS, "config": config.resolved().to_dict()}
    with RunFolder(config) as run:
        if not (folder / "student" / "config.json").exists():
            write_demo(folder, config.seed)
        from qcrd_fast.train.trainer import train  # after the lock: a folder in use is refused before torch is loaded

        return train(config, run)
