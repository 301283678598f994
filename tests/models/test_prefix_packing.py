"""Targets that share a prompt give the losses and gradients of one sequence a target, in every family that can."""

from __future__ import annotations

import itertools
import logging
import random

import pytest
import torch
import transformers as tf

from qcrd_fast.errors import InputError
from qcrd_fast.models import packed_attention, prefix_packing
from qcrd_fast.models.prefix_packing import (
    Group,
    dense_mask,
    find_texts,
    first_fit_decreasing,
    group_by_prompt,
    length_batches,
    pack_rows,
)
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.linear_logprob import linear_logprob

pytestmark = pytest.mark.usefixtures("float64")
IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
T5 = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "t5": lambda v: tf.T5ForConditionalGeneration(tf.T5Config(**T5, vocab_size=v, dropout_rate=0.0)),
    "umt5": lambda v: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5, vocab_size=v, dropout_rate=0.0)),
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(**IDS, **SMALL, vocab_size=v)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(**IDS, **SMALL, vocab_size=v)),
    "qwen3": lambda v: tf.Qwen3ForCausalLM(tf.Qwen3Config(**IDS, **SMALL, vocab_size=v, head_dim=8)),
    "gpt2": lambda v: tf.GPT2LMHeadModel(
        tf.GPT2Config(**IDS, vocab_size=v, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0)
    ),
    "gpt-neox": lambda v: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            **IDS, vocab_size=v, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ),
    "gemma3": lambda v: tf.Gemma3ForCausalLM(  # a window far shorter than the texts
        tf.Gemma3TextConfig(**IDS, **SMALL, vocab_size=v, head_dim=8, sliding_window=5, layer_types=MIXED)
    ),
    "gemma2": lambda v: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            **IDS, **SMALL, vocab_size=v, head_dim=8, sliding_window=4, layer_types=MIXED, attn_logit_softcapping=2.0
        )
    ),
    "mistral": lambda v: tf.MistralForCausalLM(tf.MistralConfig(**IDS, **SMALL, vocab_size=v, sliding_window=6)),
}  # fmt: skip
VARLEN = {"llama", "qwen2", "qwen3", "gpt2", "gpt-neox"}  # full attention in every layer, through sdpa
UNPACKABLE = {  # architectures whose packed rows would be wrong
    "recurrent": lambda v: tf.MambaForCausalLM(
        tf.MambaConfig(**IDS, vocab_size=v, hidden_size=32, state_size=4, num_hidden_layers=2)
    ),
    "alibi": lambda v: tf.BloomForCausalLM(tf.BloomConfig(**IDS, vocab_size=v, hidden_size=32, n_layer=2, n_head=4)),
    "local": lambda v: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            **IDS, vocab_size=v, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
    ),
    "absolute-decoder": lambda v: tf.BartForConditionalGeneration(
        tf.BartConfig(
            **IDS, vocab_size=v, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, dropout=0.0,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=1,
        )
    ),
}  # fmt: skip


def student_of(make, llama_folder) -> Student:
    """A student with the words of the demo and weights large enough for every token to matter."""
    tokenizer = tf.AutoTokenizer.from_pretrained(llama_folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(len(tokenizer))
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return Student(model.eval(), tokenizer, PromptSettings())


def ragged(seed: int, vocab: int) -> tuple[list, list, list]:
    """(sources, targets, source_of): one target alone, a source without any, targets of 1 and of 40 tokens, mixed
    order."""
    rng = random.Random(seed)
    sources = [[rng.randrange(2, vocab) for _ in range(rng.choice((1, 3, 9, 17)))] for _ in range(4)]
    wanted = [0] * rng.randint(2, 7) + [1] + [3] * rng.randint(1, 4)
    rng.shuffle(wanted)
    targets = [[rng.randrange(2, vocab) for _ in range(rng.choice((1, 1, 2, 5, 13, 40)))] for _ in wanted]
    return sources, targets, wanted


def losses_and_gradients(student, sources, targets, source_of, weight_R, **kwargs):
    """(negative log-likelihood of each target, every parameter's gradient of a weighted sum of them)."""
    packed = student.hidden(sources, targets, source_of, **kwargs)
    head = student.head
    logprob = linear_logprob(
        packed.hidden, head.weight, packed.target, bias=head.bias, scale=head.scale, softcap=head.softcap
    )
    nll_R = torch.zeros(len(targets)).index_add(0, packed.segment, -logprob)
    student.model.zero_grad(set_to_none=True)
    (nll_R * weight_R).sum().backward()
    gradients = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    return nll_R.detach(), gradients, packed


def check_equal(student, seed, shared, alone, tolerance=1e-9):
    sources, targets, source_of = ragged(seed, len(student.tokenizer))
    weight_R = torch.tensor([(-1.0) ** i * (i + 1) / len(targets) for i in range(len(targets))])
    expected, expected_grads, single = losses_and_gradients(student, sources, targets, source_of, weight_R, **alone)
    actual, actual_grads, packed = losses_and_gradients(student, sources, targets, source_of, weight_R, **shared)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert actual_grads.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        error = (actual_grads[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {error:.2g}"
    assert packed.target.tolist() == single.target.tolist() and packed.segment.tolist() == single.segment.tolist()
    return single, packed


NOT_CAUSAL = {"umt5"} if tf.__version__ < "5.18" else set()  # transformers 5.17 gives UMT5's decoder no causal mask


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - NOT_CAUSAL))
def test_sharing_changes_no_loss_and_no_gradient(kind, llama_folder):
    student = student_of(FAMILIES[kind], llama_folder)
    assert student.sharing == ("varlen" if kind in VARLEN else "dense")
    runs = [check_equal(student, seed, {}, {"shared": False}) for seed in range(4)]
    apart, together = (sum(run[i].body_tokens for run in runs) for i in (0, 1))
    assert student.is_encoder_decoder or together < apart
    if kind in VARLEN:  # every prompt once, and no padding
        sources, targets, source_of = ragged(0, len(student.tokenizer))
        least = sum(len(sources[i]) for i in set(source_of)) + sum(len(t) - 1 for t in targets)
        assert runs[0][1].body_tokens == least


def test_full_attention_shares_under_a_dense_mask_too(llama_folder, monkeypatch):
    """As where attention runs on neither a CPU nor a GPU."""
    monkeypatch.setattr(packed_attention, "VARLEN_DEVICES", ())
    student = student_of(FAMILIES["llama"], llama_folder)
    assert student.sharing == "dense"
    check_equal(student, 0, {}, {"shared": False})


def test_attention_by_texts_that_fails_is_left(llama_folder, monkeypatch):
    def wrong(query, key, value, mask, **_):
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], 2)

    monkeypatch.setattr(packed_attention, "_varlen_attention", wrong)
    student = student_of(FAMILIES["llama"], llama_folder)
    assert student.sharing == "dense" and student.model.config._attn_implementation == "sdpa"
    check_equal(student, 0, {}, {"shared": False})


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_that_cannot_share_run_one_sequence_a_target(kind, llama_folder, caplog):
    student = student_of(UNPACKABLE[kind], llama_folder)
    with caplog.at_level(logging.WARNING, logger="qcrd_fast.models.packed_attention"):
        for seed in range(2):
            check_equal(student, seed, {}, {"shared": False})
    assert student.sharing is None
    assert sum("prompts are not shared" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", ["t5", "gemma3", "llama"])
@pytest.mark.parametrize("max_tokens", [1, 60, 150])
def test_splitting_a_question_over_rows_and_batches_changes_nothing(kind, max_tokens, llama_folder, monkeypatch):
    student = student_of(FAMILIES[kind], llama_folder)
    for seed in range(2):
        check_equal(student, seed, {"max_tokens": max_tokens}, {"shared": False})
    monkeypatch.setattr(prefix_packing, "BIASED_ROW", 20)
    monkeypatch.setattr(prefix_packing, "MAX_ROW", 50)
    monkeypatch.setattr(prefix_packing, "MAX_PAIRS", 50 * 50)
    check_equal(student, 0, {}, {"shared": False})


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_eager_attention_takes_the_same_mask(kind, llama_folder):
    student = student_of(FAMILIES[kind], llama_folder)
    student.model.set_attn_implementation("eager")
    assert student.sharing == "dense"
    check_equal(student, 0, {}, {"shared": False})


def test_only_questions_that_ask_for_something_are_read(llama_folder):
    for kind in ("t5", "llama"):
        student = student_of(FAMILIES[kind], llama_folder)
        packed = student.hidden([[5] * 90, [6, 7, 8]], [[9, 1], [1]], [1, 1])
        inputs = 3 + 3 if kind == "t5" else 3 + 1
        assert packed.body_tokens == inputs and packed.target.tolist() == [9, 1, 1]


def test_trying_out_a_model_leaves_no_trace(llama_folder):
    student = student_of(FAMILIES["gemma3"], llama_folder)
    student.model.train()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    assert student.sharing == "dense"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student.model.training and student.model.config.sliding_window == 5
    assert all(p.grad is None for p in student.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
def test_flex_attention_gives_the_same_states(kind, llama_folder, monkeypatch):
    """Its forward pass, uncompiled and on a CPU, where it has no backward pass; on a GPU it has not been run."""
    student = student_of(FAMILIES[kind], llama_folder)
    monkeypatch.setattr(packed_attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(packed_attention, "FLEX_WIDTH", 8)
    monkeypatch.setattr(packed_attention, "VARLEN_DEVICES", ())
    student.model.requires_grad_(False)
    with torch.compiler.set_stance("force_eager"):
        assert student.sharing == "flex"
        for seed in range(2):
            sources, targets, source_of = ragged(seed, len(student.tokenizer))
            packed = student.hidden(sources, targets, source_of)
            alone = student.hidden(sources, targets, source_of, shared=False)
            torch.testing.assert_close(packed.hidden, alone.hidden, rtol=1e-9, atol=1e-9)
            assert packed.body_tokens % prefix_packing.BLOCK == 0


def test_flex_attention_that_fails_is_said_and_left(llama_folder, monkeypatch, caplog):
    student = student_of(FAMILIES["llama"], llama_folder)
    monkeypatch.setattr(packed_attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(packed_attention, "FLEX_WIDTH", 8)
    monkeypatch.setattr(packed_attention, "VARLEN_DEVICES", ())
    with torch.compiler.set_stance("force_eager"):  # the backward pass is tried out too
        assert student.sharing == "dense"
    assert "flex_attention is not used" in caplog.text
    check_equal(student, 0, {}, {"shared": False})


def test_a_student_that_sees_what_comes_is_refused(llama_folder):
    def both_ways(v):
        model = FAMILIES["llama"](v)
        model.config.is_causal = False  # as EmbeddingGemma and its like
        return model

    with pytest.raises(InputError, match="what comes after"):
        student_of(both_ways, llama_folder)


# The pure parts


@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_mask_is_its_definition(window):
    """Two groups in the first row, padding in the second: against loops over texts."""
    prompts, targets = [[10, 11, 12], [20]], [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    rows = [[Group(0, [0, 1, 2]), Group(1, [3])], [Group(1, [3])]]
    layout = pack_rows(rows, targets, prompts, [], 0, torch.device("cpu"), multiple=4)
    assert layout.ids_BL.tolist() == [[10, 11, 12, 1, 2, 5, 20, 7, 8, 0, 0, 0], [20, 7, 8] + [0] * 9]
    assert layout.position_BL[0, :9].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert layout.order == [0, 1, 2, 3, 3] and layout.sources == [0, 1] and layout.first == [2, 0]
    assert layout.at_T.tolist() == [2, 3, 4, 2, 2, 5, 6, 7, 8, 12, 13, 14] and not layout.plain
    owner = ["a", "a", "a", "a0", "a0", "a2", "b", "b3", "b3"]
    seen = dense_mask(layout, window, torch.float32)[0, 0, :9, :9] == 0
    for q, k in itertools.product(range(9), range(9)):
        text = k <= q and owner[q].startswith(owner[k])
        near = window is None or layout.position_BL[0, q] - layout.position_BL[0, k] < window
        assert seen[q, k] == (text and near), (q, k)
    assert (dense_mask(layout, window, torch.float32) == 0).any(-1).all()  # no softmax over nothing


def test_the_texts_of_rows_are_found():
    """A target of one token has no text of its own; a prompt that no target follows to its end has one."""
    prompts, targets = [[10, 11, 12], [20]], [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    rows = [[Group(0, [0, 1, 2]), Group(1, [3])], [Group(1, [1])]]
    layout = pack_rows(rows, targets, prompts, [], 0, torch.device("cpu"))
    texts = find_texts(layout)
    assert texts.lengths == [5, 4, 3, 1] and texts.at == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert texts.first == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12] + [0] * 8
    layout = pack_rows([[Group(0, [0, 2])]], targets, prompts, [], 0, torch.device("cpu"), depths=[2, 1, 1, 1])
    texts = find_texts(layout)
    assert texts.lengths == [3, 4, 2] and texts.at == [0, 1, 2, 0, 1, 3, 4, 0, 5]


def test_groups_are_balanced_within_their_room():
    lengths, source_of = [50, 10, 10, 10, 40, 30, 300, 5], [0, 2, 0, 0, 0, 0, 2, 2]
    groups = group_by_prompt(lengths, source_of, [80, 100, 60])
    assert sorted(i for g in groups for i in g.targets) == list(range(8)) and {g.source for g in groups} == {0, 2}
    assert all(source_of[i] == g.source for g in groups for i in g.targets)
    first = [sum(lengths[i] for i in g.targets) for g in groups if g.source == 0]
    assert sorted(first) == [70, 70]
    assert [g.targets for g in groups if g.source == 2] in ([[6], [1, 7]], [[1, 6, 7]])  # one target may pass its room


def test_rows_and_batches_are_partitions_within_their_limits():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 20))]
        rows = first_fit_decreasing(lengths, 60)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 60 for row in rows)
        for batch in length_batches(lengths, 200, max_pairs=5000):
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or (longest * len(batch) <= 200 and longest**2 * len(batch) <= 5000)


def test_the_cheapest_row_costs_the_least():
    for prompt, width in itertools.product((1, 20, 45, 300, 1500), (64, 576, 768)):

        def cost(r, p=prompt, h=width):
            return (p + r) * (24 * h * h + 4 * h * (p + r)) / r

        room = prefix_packing.best_room(prompt, width)
        assert prompt + room <= prefix_packing.MAX_ROW
        fits = [r for r in (room // 2 + 1, room, room * 2) if prompt + r <= prefix_packing.MAX_ROW]
        assert min(fits, key=cost) == room or cost(room) <= 1.05 * min(map(cost, fits))
