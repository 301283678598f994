"""Heads read off tiny Hugging Face models, built from configurations: no download."""

import subprocess
import sys

import pytest
import torch
import transformers as hf

from qcrd_fast import QCRDLoss, linear_logprob
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import backbone, check_head, read_head

V = 61
LLAMA = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
T5 = dict(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
GEMMA = dict(LLAMA, head_dim=8, pad_token_id=0)
COHERE = dict(LLAMA, logit_scale=0.25, pad_token_id=0, eos_token_id=1, bos_token_id=2)
BART = dict(
    vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
)
CASES = {  # name: (configuration, scale, softcap, whether there is a bias)
    "t5-tied": (lambda: hf.T5Config(**T5), 0.25, None, False),
    "t5-untied": (lambda: hf.T5Config(**T5, tie_word_embeddings=False), 1.0, None, False),
    "mt5": (lambda: hf.MT5Config(**T5), 1.0, None, False),
    "umt5": (lambda: hf.UMT5Config(**T5), 0.25, None, False),
    "llama": (lambda: hf.LlamaConfig(**LLAMA), 1.0, None, False),
    "llama-tied": (lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True), 1.0, None, False),
    "qwen2": (lambda: hf.Qwen2Config(**LLAMA), 1.0, None, False),
    "gemma2": (lambda: hf.Gemma2Config(**GEMMA, final_logit_softcapping=3.0), 1.0, 3.0, False),
    "gemma3": (lambda: hf.Gemma3TextConfig(**GEMMA), 1.0, None, False),
    "gemma3-softcap": (lambda: hf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=3.0), 1.0, 3.0, False),
    "phi": (lambda: hf.PhiConfig(**LLAMA), 1.0, None, True),
    "gpt2": (lambda: hf.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2), 1.0, None, False),
    "granite": (lambda: hf.GraniteConfig(**LLAMA, logits_scaling=8.0), 0.125, None, False),
    "cohere": (lambda: hf.CohereConfig(**COHERE), 0.25, None, False),
    "bart": (lambda: hf.BartConfig(**BART, encoder_ffn_dim=16, decoder_ffn_dim=16), 1.0, None, True),
}


def build(name):
    torch.manual_seed(0)
    config = CASES[name][0]()
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    output = model.get_output_embeddings()
    with torch.no_grad():
        output.weight.normal_()
        if getattr(output, "bias", None) is not None:
            output.bias.normal_()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


def model_call(model, ids):
    """(the model's own logits, its last hidden states)."""
    seen = []
    handle = backbone(model).register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits
    handle.remove()
    return logits, seen[-1]


@pytest.mark.parametrize("name", CASES)
def test_head_gives_the_models_log_probs(name, float64):
    """The loss of hidden states and head is the cross entropy of the model's own logits; so is its gradient."""
    _, scale, softcap, has_bias = CASES[name]
    model = build(name)
    head = read_head(model)
    check_head(model, head)
    assert head.scale == pytest.approx(scale) and head.softcap == softcap and (head.bias is not None) == has_bias
    assert head.weight is model.get_output_embeddings().weight
    ids, target = torch.arange(6)[None] + 3, torch.tensor([[5, 0, 60, 2, 7, 7]])
    logits, hidden = model_call(model, ids)
    options = dict(bias=head.bias, scale=head.scale, softcap=head.softcap)
    for impl in ("eager", "torch"):
        logprob = linear_logprob(hidden, head.weight, target, **options, impl=impl)
        expected = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        torch.testing.assert_close(logprob, expected, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(logprob.sum(), head.weight, retain_graph=True)[0]
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), head.weight)[0], rtol=1e-10, atol=1e-10)


def test_for_model_uses_the_models_bias_without_owning_it():
    model = build("phi")
    loss_fn = QCRDLoss.for_model(model, beta=0.1, delta=2.0, scheme="mean")
    assert (loss_fn.beta, loss_fn.delta, loss_fn.scheme) == (0.1, 2.0, "mean") and not list(loss_fn.parameters())
    hidden, head = torch.randn(4, 16), read_head(model)
    batch = (torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]), torch.tensor([True, False]))
    out, explicit = loss_fn(hidden, head.weight, *batch), loss_fn(hidden, head.weight, *batch, bias=head.bias)
    without = QCRDLoss(0.1, 2.0, "mean")(hidden, head.weight, *batch)
    assert out.loss == explicit.loss and out.loss != without.loss
    out.loss.backward()
    assert head.bias.grad is not None


def test_training_mode_is_restored():
    model = build("llama").train()
    QCRDLoss.for_model(model)
    assert model.training


def test_a_head_that_differs_is_refused():
    model = build("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 1.5 * forward(x)
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*is not supported.*another way"):
        QCRDLoss.for_model(model)


def test_a_model_without_output_embedding_is_refused():
    with pytest.raises(InputError, match="LlamaModel has no output embedding"):
        read_head(build("llama").model)


def test_the_loss_needs_torch_alone():
    """What belongs to trainers, models and the command line may be missing."""
    code = """
import sys
for name in "transformers safetensors tokenizers click numpy yaml jinja2 peft accelerate datasets".split():
    sys.modules[name] = None
import torch
from qcrd_fast import LogProbOutput, QCRDLoss, contrastive_loss, linear_logprob
hidden = torch.randn(3, 4, requires_grad=True)
batch = (torch.tensor([0, 0, 1]), torch.tensor([0, 0]), torch.tensor([True, False]))
QCRDLoss()(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]), *batch).loss.backward()
assert hidden.grad.abs().sum() > 0
assert not [name for name, module in sys.modules.items() if name.startswith("qcrd_fast.models") and module]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_import_is_light():
    """The command line takes its lock before torch is imported."""
    code = (
        "import sys, qcrd_fast; assert 'torch' not in sys.modules and qcrd_fast.version.__version__; qcrd_fast.QCRDLoss"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
