"""Small students and rows that the tests build themselves; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path


def sampled_rows(count: int, seed: int = 0) -> list[dict]:
    from qcrd_fast import demo

    rng = random.Random(seed)
    rows = []
    for i, problem in enumerate(demo.draw_problems(count, rng)):
        samples = [
            dict(zip(("rationale", "answer"), demo.teach(problem, rng), strict=True)) for _ in range(demo.SAMPLES)
        ]
        rows.append({"id": f"q{i}", "question": problem.question, "answer": problem.answer, "samples": samples})
    return rows


def make_t5(folder: Path, layers: int = 2) -> Path:
    """A T5 of width 32 with dropout, over the demo's words."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer(folder)
    config = T5Config(
        vocab_size=len(tokenizer) + 3, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    _save(T5ForConditionalGeneration, config, folder)
    return folder


def make_llama(folder: Path, layers: int = 2) -> Path:
    """A Llama of width 32 with tied embeddings, over the demo's words."""
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
    from qcrd_fast import demo

    rows = sampled_rows(300)
    texts = [row["question"] for row in rows] + [s["rationale"] for row in rows for s in row["samples"]]
    tokenizer = demo.build_tokenizer([*texts, "\n"])
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save(kind, config, folder: Path) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
