"""How likely the student finds a rationale: with the question, without it, a step at a time. Suffixes: T tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qcrd_fast.models.branches import branch_hidden
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import PackedHidden, Student
from qcrd_fast.ops.linear_logprob import linear_logprob
from qcrd_fast.select.asking import rationale_prompt_ids
from qcrd_fast.select.score import Block
from qcrd_fast.select.steps import split_steps


def ifd(block: Block) -> list[list[float | None]]:
    """Instruction-following difficulty of each positive r of a question x, nll the mean over r's tokens, EOS among
    them.

    `loss`: nll(r | x) / nll(r) (Cherry_LLM, arXiv 2308.12032); `ppl`: exp(nll(r | x) - nll(r)) (Superfiltering). Both
    are above 1 where the question makes the rationale less likely; their orders differ. nll(r) is of r by itself: a
    decoder reads r behind its BOS token, or EOS where it has none; an encoder reads EOS alone.
    """
    student = _student(block)
    given, alone = mean_logprobs(student, block), mean_logprobs(student, block, alone=True)
    form = block.options.ifd_form
    return [[_ifd(-a, -b, form) for a, b in zip(*pair, strict=True)] for pair in zip(given, alone, strict=True)]


def _ifd(given: float, alone: float, form: str) -> float | None:
    if form == "loss":
        return given / alone if alone > 0 else None
    return math.exp(min(given - alone, 700.0))


def naturalness(block: Block) -> list[list[float]]:
    """Mean log p of each positive's tokens given its question [nats/token] (GRAPE)."""
    return mean_logprobs(_student(block), block)


def local_naturalness(block: Block) -> list[list[float]]:
    """Mean log p of each positive's tokens, each step seeing only the `window` tokens before it [nats/token] (LALP).

    What is before a step is the prompt and the steps until then; of an encoder-decoder the encoder reads what of the
    window is in the prompt, or EOS alone, and the decoder the rest.
    """
    student, window = _student(block), block.options.window
    sources: list[TokenIds] = []
    trunks: list[TokenIds] = []
    steps: list[TokenIds] = []
    sizes: list[list[int]] = []  # steps of each positive of each row
    for row in block.rows:
        sizes.append([])
        for rationale in row.positives:
            prompt = rationale_prompt_ids(student, row, rationale.view, block.options.ask)
            pieces = [student.piece_ids(step) for step in split_steps(rationale.text.strip())]
            pieces[-1] = [*pieces[-1], student.tokenizer.eos_token_id]
            sizes[-1].append(len(pieces))
            said: TokenIds = []
            for piece in pieces:
                of_prompt = prompt[max(len(prompt) - max(window - len(said), 0), 0) :]
                sources.append(of_prompt or (empty_prompt(student) if student.is_encoder_decoder else []))
                trunks.append(said[-window:])
                steps.append(piece)
                said = said + piece
    if not steps:
        return [[] for _ in block.rows]
    lengths = list(map(len, steps))
    with torch.no_grad(), eval_mode(student.model):
        hidden = branch_hidden(
            student, sources, trunks, steps, list(range(len(steps))), list(map(len, trunks)), packed=False
        )
        sums = target_sums(student, hidden, lengths, impl=block.options.impl)
    pairs = iter(zip(sums, lengths, strict=True))
    found = []
    for of_row in sizes:
        means = []
        for count in of_row:
            some = [next(pairs) for _ in range(count)]
            means.append(sum(s for s, _ in some) / sum(n for _, n in some))
        found.append(means)
    return found


def mean_logprobs(student: Student, block: Block, *, alone: bool = False) -> list[list[float]]:
    """Mean log p of the tokens of each row's positives, EOS among them, given its prompt, or nothing (`alone`)
    [nats/token]."""
    pairs = [(row, rationale) for row in block.rows for rationale in row.positives]
    targets = [student.target_ids(rationale.text) for _, rationale in pairs]
    asked = [
        empty_prompt(student) if alone else rationale_prompt_ids(student, row, rationale.view, block.options.ask)
        for row, rationale in pairs
    ]
    at = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, asked)))}  # one that is shared is read once
    prompts, source_of = [list(prompt) for prompt in at], [at[tuple(prompt)] for prompt in asked]
    if not targets:
        return [[] for _ in block.rows]
    lengths = list(map(len, targets))
    with torch.no_grad(), eval_mode(student.model):
        sums = target_sums(student, student.hidden(prompts, targets, source_of), lengths, impl=block.options.impl)
    means = iter(total / length for total, length in zip(sums, lengths, strict=True))
    return [[next(means) for _ in row.positives] for row in block.rows]


def target_sums(
    student: Student,
    packed: PackedHidden,
    lengths: Sequence[int],
    skipped: Sequence[int] | None = None,
    *,
    impl: str = "auto",
) -> list[float]:
    """Sum of log p over each target's tokens, without the first `skipped` of each, added up in float64 on the host, so
    that no order of additions is left to the device."""
    head = student.head
    logprob_T = linear_logprob(packed.hidden, head.weight, packed.target, **head.options, impl=impl)
    parts = logprob_T.double().cpu().split(list(lengths))
    return [float(part[skip:].sum()) for part, skip in zip(parts, skipped or [0] * len(parts), strict=True)]


def empty_prompt(student: Student) -> TokenIds:
    """What a model reads where there is nothing to read."""
    tokenizer = student.tokenizer
    if student.is_encoder_decoder or tokenizer.bos_token_id is None:
        return [tokenizer.eos_token_id]
    return [tokenizer.bos_token_id]


def _student(block: Block) -> Student:
    assert block.student is not None
    return block.student
