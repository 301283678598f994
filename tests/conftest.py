"""Small students and rows that the tests build themselves; nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny, and threads that wait for a busy core cost most
os.environ["HF_HUB_OFFLINE"] = "1"


COMPARES = re.compile(r"assert_close|allclose|torch\.float64|\.double\(\)|import doubles|loss_oracle import")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares floats is numeric, in files that do so or by the fixture: `make test-machines` runs it as elsewhere."""
    sources = {path: path.read_text(encoding="utf-8") for path in {item.path for item in items}}
    for item in items:
        if "float64" in getattr(item, "fixturenames", ()) or COMPARES.search(sources[item.path]):
            item.add_marker("numeric")


def sampled_rows(count: int, seed: int = 0) -> list[dict]:
    from qcrd_fast import demo

    rng = random.Random(seed)
    rows = []
    for i, problem in enumerate(demo.draw_problems(count, rng)):
        samples = [dict(zip(("rationale", "answer"), demo.teach(problem, rng), strict=True)) for _ in range(demo.SAMPLES)]
        rows.append({"id": f"q{i}", "question": problem.question, "answer": problem.answer, "samples": samples})
    return rows


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 sampled questions of the demo's kind."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(24)), encoding="utf-8")
    return path


@pytest.fixture
def float64(t5_folder, llama_folder):
    """Every number of the test is float64, those of the library and of its models too; the folders hold fp32 all the same."""
    from doubles import doubles

    with doubles():
        yield


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def crashes(tmp_path_factory):
    """Short runs of a T5 and a decoder in processes of their own, and the unbroken ones to compare with."""
    from crash_run import Crashes
    from warm import Warm

    with Warm() as warm:
        yield Crashes(warm, tmp_path_factory.mktemp("crashes"), device="cpu")


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


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


def make_llama(folder: Path, layers: int = 2) -> Path:
    """A Llama of width 32 with tied embeddings, over the demo's words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
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
