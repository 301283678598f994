"""Small students, trained once on neutral text so that seeds agree, and kept: the demo's, and those of the study in
`bench`.

Built where they are used, from nothing: torch, transformers and the vocabulary of `problems`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qcrd_fast.demo import problems
from qcrd_fast.models.padding import pad_right
from qcrd_fast.utils.device import choose_threads, threads_kept

log = logging.getLogger(__name__)
FAMILIES = ("decoder", "t5")
LEARNING_RATE, WIDTH = 3e-3, 64
VERSION = 1  # counts changes of `_build` and `pretrain`, which make other students
NUMBERS = 28  # 0 and up, which every tokenizer knows
IGNORED = -100
TOLD_S = 10.0  # between lines of progress


class Recipe(NamedTuple):
    """phases: (function of `problems` that draws neutral text, steps, seed); batch: texts of a step; largest: of
    numbers."""

    family: str
    phases: tuple[tuple[str, int, int], ...] = (("symbol_pairs", 1500, 0), ("lookup_pairs", 600, 0))
    batch: int = 64
    largest: int = problems.LARGEST


DEMO = Recipe("decoder", (("symbol_pairs", 500, 0), ("lookup_pairs", 400, 1)), 32, 20)


def cache_folder() -> Path:
    """Where students are kept: below XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcrd-fast" / "students"


def student_folder(recipe: Recipe, cache: Path) -> Path:
    """The pretrained student of a recipe; made, in a minute or several, where the cache does not hold it yet."""
    folder = cache / f"{recipe.family}-{_digest(recipe)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            pretrain(recipe, Path(temporary) / "student")
            if folder.is_dir():  # another process was faster
                return folder
            os.replace(Path(temporary) / "student", folder)
    return folder


@functools.cache
def _digest(recipe: Recipe) -> str:
    """Of all that a student depends on."""
    drawn = [getattr(problems, name)(200, random.Random(0), recipe.largest) for name, _, _ in recipe.phases]
    settings = (problems.vocabulary(), drawn, recipe, VERSION, LEARNING_RATE, WIDTH, NUMBERS, torch.__version__)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def build_tokenizer(texts: list[str]) -> Any:
    """A word-level tokenizer in which every number is one token, and a decoder that writes readable text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+:|\w+|[^\w\s]|\n"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"])
    numbers = [str(n) for n in range(NUMBERS)]
    tokenizer.train_from_iterator([*texts, *numbers, "predict: explain: reason: Answer:", "\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


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


def pretrain(recipe: Recipe, folder: Path) -> None:
    """Write a student trained on neutral text, phase by phase. Random state and threads of the caller stay as they
    are."""
    tokenizer = build_tokenizer([" ".join(problems.vocabulary())])
    with torch.random.fork_rng(devices=[]), threads_kept():
        torch.manual_seed(0)
        model = _build(recipe.family, tokenizer)
        choose_threads(torch.device("cpu"), sum(p.numel() for p in model.parameters()))
        for name, steps, seed in recipe.phases:
            _train(model, tokenizer, recipe, name, steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: Any, tokenizer: Any, recipe: Recipe, name: str, steps: int, seed: int) -> None:
    draw: Callable[..., Any] = getattr(problems, name)
    rng, mean, told = random.Random(seed), 0.0, time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / 100), 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * left
        loss = _loss(model, tokenizer, recipe.family, draw(recipe.batch, rng, recipe.largest))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if time.monotonic() - told > TOLD_S or step == steps - 1:
            told = time.monotonic()
            log.info(
                "pretraining the %s student, %s: step %d of %d, loss %.3f", recipe.family, name, step + 1, steps, mean
            )


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
