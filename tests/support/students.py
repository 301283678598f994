"""Small students and rows that the tests build themselves; nothing is downloaded."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from tests.support import problems

if TYPE_CHECKING:
    from qcrd_fast.models.student import Student


def sampled_rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for i, problem in enumerate(problems.draw_problems(count, rng)):
        samples = [
            dict(zip(("rationale", "answer"), problems.teach(problem, rng), strict=True))
            for _ in range(problems.SAMPLES)
        ]
        rows.append({"id": f"q{i}", "question": problem.question, "answer": problem.answer, "samples": samples})
    return rows


@contextlib.contextmanager
def narrow_discriminators() -> Iterator[tuple]:
    """Discriminators made for students without an encoder are 32 wide instead of 256; otherwise they are the same.
    Gives what the defaults were."""
    from qcrd_fast.discriminator.encoders import SmallEncoder

    real = SmallEncoder.__init__.__defaults__
    with mock.patch.object(SmallEncoder.__init__, "__defaults__", (32, *real[1:])):
        yield real


def student_and_teacher(folder: str) -> tuple[Student, Student]:
    """The model of a folder, and the same with noise on its weights; both in eval mode."""
    import torch

    from qcrd_fast.models.prompts import PromptSettings
    from qcrd_fast.models.student import Student

    student, teacher = (Student.load(folder, PromptSettings()) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in teacher.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    student.model.eval()
    teacher.model.eval()
    return student, teacher


def make_t5(folder: Path, layers: int = 2) -> Path:
    """A T5 of width 32 with dropout, over the words of `problems`."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer(folder)
    config = T5Config(
        vocab_size=len(tokenizer) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    _save(T5ForConditionalGeneration, config, folder)
    return folder


def make_llama(folder: Path, layers: int = 2) -> Path:
    """A Llama of width 32 with tied embeddings, over the words of `problems`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    _save(LlamaForCausalLM, config, folder)
    return folder


def _tokenizer(folder: Path):
    from qcrd_fast.demo.students import build_tokenizer

    rows = sampled_rows(300)
    texts = [row["question"] for row in rows] + [s["rationale"] for row in rows for s in row["samples"]]
    tokenizer = build_tokenizer([*texts, "\n"])
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save(kind, config, folder: Path) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
