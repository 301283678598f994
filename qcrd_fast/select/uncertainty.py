"""What the student is unsure of: its answers, and the steps of its own explanation.

Step uncertainty is after ELAD (arXiv 2402.13098), formulas ours. Suffixes: T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from qcrd_fast.generation.sample import sample
from qcrd_fast.models.branches import branch_hidden
from qcrd_fast.models.lm_head import eval_mode
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words
from qcrd_fast.quality.cases import same
from qcrd_fast.select.asking import (
    Explanation,
    entropy,
    explain_greedily,
    groups,
    read_answer,
    sample_settings,
    step_ids,
)
from qcrd_fast.select.likelihood import target_sums
from qcrd_fast.select.score import Block
from qcrd_fast.select.steps import ANSWER
from qcrd_fast.utils.device import make_autocast


def answer_entropy(block: Block) -> list[float]:
    """H = -sum_a p_a log p_a over the M sampled answers [nats]; one that cannot be read is like no other."""
    return [entropy(groups(row, answers)) for row, answers in zip(block.rows, block.answers, strict=True)]


def known(block: Block) -> list[float | None]:
    """Share of the M sampled answers that are the majority's, else the gold one; None where a row has neither.

    Knowledge detection (arXiv 2406.11275) asks an entailment model whether a sample says what the teacher says; here
    answers are compared.
    """
    found: list[float | None] = []
    for row, answers in zip(block.rows, block.answers, strict=True):
        wanted = row.majority if row.majority is not None else row.gold
        right = wanted is not None and sum(answer is not None and same(row, answer, wanted) for answer in answers)
        found.append(None if wanted is None else right / len(answers))
    return found


def step_uncertainty(block: Block) -> list[float]:
    """intra + lambda inter of the student's own greedy explanation (after ELAD, formulas ours) [nats]."""
    student, options = block.student, block.options
    assert student is not None
    explanations = explain_greedily(student, block.rows, options)
    within = intra(student, explanations, impl=options.impl)
    if not options.num_continuations or not options.inter_weight:
        return within
    between = inter(block, explanations)
    return [a + options.inter_weight * b for a, b in zip(within, between, strict=True)]


def intra(
    student: Student, explanations: Sequence[Explanation], *, packed: bool = True, impl: str = "auto"
) -> list[float]:
    """1/n sum_i |l_i - l_(i-1)| with l_i = log p(answer, EOS | x, the first i of n steps, `Answer:`) [nats]; 0 without
    a step.

    All prefixes of an explanation are scored in one pass (`branch_hidden`); `packed` False: one pass a prefix.
    """
    found = []
    for moves in prefix_logprobs(student, explanations, packed=packed, impl=impl):
        steps = [abs(after - before) for before, after in itertools.pairwise(moves)]
        found.append(sum(steps) / len(steps) if steps else 0.0)
    return found


def prefix_logprobs(
    student: Student, explanations: Sequence[Explanation], *, packed: bool = True, impl: str = "auto"
) -> list[list[float]]:
    """l_0, ..., l_n of each explanation; see `intra`."""
    if not explanations:
        return []
    sources, trunks, branches, trunk_of, depths, skipped = branch_tokens(student, explanations)
    with torch.no_grad(), eval_mode(student.model):
        hidden = branch_hidden(student, sources, trunks, branches, trunk_of, depths, packed=packed)
        sums = iter(target_sums(student, hidden, [len(branch) for branch in branches], skipped, impl=impl))
    return [[next(sums) for _ in range(len(e.steps) + 1)] for e in explanations]


def branch_tokens(
    student: Student, explanations: Sequence[Explanation]
) -> tuple[list[TokenIds], list[TokenIds], list[TokenIds], list[int], list[int], list[int]]:
    """(sources, trunks, branches, trunk of each branch, its depth, tokens of its cue) for `branch_hidden`."""
    trunks: list[TokenIds] = []
    branches: list[TokenIds] = []
    trunk_of: list[int] = []
    depths: list[int] = []
    cue = student.piece_ids(f"\n{ANSWER}")
    for u, explanation in enumerate(explanations):
        ids = [student.piece_ids(step) for step in explanation.steps]
        trunks.append([token for step in ids for token in step])
        answer = [*cue, *student.piece_ids(f" {explanation.answer}"), student.tokenizer.eos_token_id]
        for i in range(len(ids) + 1):
            branches.append(answer)
            trunk_of.append(u)
            depths.append(sum(map(len, ids[:i])))
    return [e.prompt for e in explanations], trunks, branches, trunk_of, depths, [len(cue)] * len(branches)


def inter(block: Block, explanations: Sequence[Explanation]) -> list[float]:
    """1/n sum_i (1 - the largest share of one final answer among M continuations from before step i), in [0, 1).

    An explanation without a step is continued from its prompt. Continuations of one prefix share the reading of it.
    """
    student, options = block.student, block.options
    assert student is not None
    M = options.num_continuations
    prompts, prefixes, keys, owners = [], [], [], []
    for r, (row, explanation) in enumerate(zip(block.rows, explanations, strict=True)):
        for i in range(max(len(explanation.steps), 1)):
            prefix = step_ids(student, explanation.steps[:i])
            owners.append((r, prefix))
            prompts += [explanation.prompt] * M
            prefixes += [prefix] * M
            keys += [key_words(options.seed, f"{row.id}\0step {i}")] * M
    drawn = sample(
        student, prompts, keys, sample_settings(options), indices=list(range(M)) * len(owners),
        autocast=make_autocast(student.device, None), prefixes=prefixes,
    )  # fmt: skip
    shares: list[list[float]] = [[] for _ in block.rows]
    for at, (r, prefix) in enumerate(owners):
        some = drawn[at * M : (at + 1) * M]
        answers = [read_answer(student, block.rows[r], prefix + tokens, options.ask) for tokens in some]
        shares[r].append(1 - groups(block.rows[r], answers)[0] / M)
    return [sum(found) / len(found) for found in shares]
