"""Targets that share a prompt give the losses and gradients of one sequence a target, in every family that can."""

from __future__ import annotations

import logging
import random

import pytest
import torch
import transformers as tf

from qcrd_fast.ops import linear_logprob
from qcrd_fast.students import PromptSettings, Student

IDS = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "t5": lambda v: tf.T5ForConditionalGeneration(tf.T5Config(**T5, vocab_size=v, dropout_rate=0.0)),
    "umt5": lambda v: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5, vocab_size=v, dropout_rate=0.0)),
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(**IDS, **SMALL, vocab_size=v)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(**IDS, **SMALL, vocab_size=v)),
    "qwen3": lambda v: tf.Qwen3ForCausalLM(tf.Qwen3Config(**IDS, **SMALL, vocab_size=v, head_dim=8)),
    "gpt2": lambda v: tf.GPT2LMHeadModel(
        tf.GPT2Config(**IDS, vocab_size=v, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
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
ALONE = {  # architectures whose packed rows would be wrong
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
    """(sources, targets, source_of): one target alone, a source without any, targets of 1 and of 40 tokens, mixed order."""
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
    logprob = linear_logprob(packed.hidden, head.weight, packed.target, bias=head.bias, scale=head.scale, softcap=head.softcap)
    nll_R = torch.zeros(len(targets)).index_add(0, packed.segment, -logprob.float())
    student.model.zero_grad(set_to_none=True)
    (nll_R * weight_R).sum().backward()
    gradients = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    return nll_R.detach(), gradients, packed


def check_equal(student, seed, shared, alone, tolerance=1e-5):
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


@pytest.mark.parametrize("kind", FAMILIES)
def test_sharing_changes_no_loss_and_no_gradient(kind, llama_folder):
    student = student_of(FAMILIES[kind], llama_folder)
    assert student.sharing == "dense"
    runs = [check_equal(student, seed, {}, {"shared": False}) for seed in range(4)]
    apart, together = (sum(run[i].body_tokens for run in runs) for i in (0, 1))
    assert student.is_encoder_decoder or together < apart


@pytest.mark.parametrize("kind", ALONE)
def test_models_that_cannot_share_run_one_sequence_a_target(kind, llama_folder, caplog):
    student = student_of(ALONE[kind], llama_folder)
    with caplog.at_level(logging.WARNING, logger="qcrd_fast.sharing"):
        for seed in range(2):
            check_equal(student, seed, {}, {"shared": False})
    assert student.sharing is None
    assert sum("prompts are not shared" in record.message for record in caplog.records) == 1
