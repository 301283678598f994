"""The study's students: a small decoder and a small T5, trained once on neutral text so that seeds agree; kept by a
hash."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qcrd_fast.demo import build_tokenizer
from qcrd_fast.models.padding import pad_right

from . import problems

log = logging.getLogger("qcrd_fast.bench")
FAMILIES = ("decoder", "t5")
PHASES = ("symbol_pairs", 1500, 0), ("lookup_pairs", 600, 0)  # text, steps, seed
BATCH, LEARNING_RATE, WIDTH = 64, 3e-3, 64
RECIPE = 1  # counts changes of `_build` and `pretrain`, which make other students
IGNORED = -100


@functools.cache
def student_folder(family: str, cache: Path) -> Path:
    """The pretrained student of a family; made, in minutes, where the cache does not hold it yet."""
    folder = cache / f"{family}-{_digest(family)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            pretrain(family, Path(temporary) / "student", PHASES)
            if folder.is_dir():  # another process was faster
                return folder
            os.replace(Path(temporary) / "student", folder)
    return folder


def _digest(family: str) -> str:
    """Of all that a student depends on."""
    text = [problems.vocabulary(), *(getattr(problems, name)(200, random.Random(0)) for name, _, _ in PHASES)]
    settings = (text, RECIPE, family, PHASES, BATCH, LEARNING_RATE, WIDTH, torch.__version__)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def _build(family: str, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    ends = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                d_model=WIDTH, d_kv=16, d_ff=192, num_layers=2, num_decoder_layers=3, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=tokenizer.pad_token_id, **ends,  # type: ignore[call-arg]
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, **ends,
        )
    )  # fmt: skip


def pretrain(family: str, folder: Path, phases: Sequence[tuple[str, int, int]]) -> None:
    """Write a student trained on neutral text, phase by phase: a function of `problems` and the number of steps."""
    tokenizer = build_tokenizer([" ".join(problems.vocabulary())])
    torch.manual_seed(0)
    model = _build(family, tokenizer)
    for name, steps, seed in phases:
        _train(model, tokenizer, family, getattr(problems, name), steps, seed, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: Any, tokenizer: Any, family: str, draw: Callable[..., Any], steps: int, seed: int, name: str) -> None:
    rng, mean = random.Random(seed), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / 100), 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * left
        loss = _loss(model, tokenizer, family, draw(BATCH, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if step % 100 == 99:
            log.info("the %s student, %s: step %d of %d, loss %.3f", family, name, step + 1, steps, mean)


def _loss(model: Any, tokenizer: Any, family: str, pairs: list[tuple[str, str, str]]) -> torch.Tensor:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sources = [ids(prefix + prompt) for prefix, prompt, _ in pairs]
    targets = [[*ids(target), eos] for _, _, target in pairs]
    if family == "t5":
        ids_BL, mask_BL = pad_right([[*s, eos] for s in sources], pad, "cpu")
        labels_BL = pad_right(targets, IGNORED, "cpu")[0]
        return model(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss
    newline = ids("\n")
    rows = [[*s, *newline, *t] for s, t in zip(sources, targets, strict=True)]
    labels = [[IGNORED] * (len(r) - len(t)) + t for r, t in zip(rows, targets, strict=True)]
    ids_BL, mask_BL = pad_right(rows, pad, "cpu")
    return model(input_ids=ids_BL, attention_mask=mask_BL, labels=pad_right(labels, IGNORED, "cpu")[0]).loss
