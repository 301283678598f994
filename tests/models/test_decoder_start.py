"""What a decoder is fed first is what the model itself feeds it in training."""

import pytest
import torch
import transformers as hf

from qcrd_fast import RationaleCollator
from qcrd_fast.errors import InputError
from qcrd_fast.models.decoder_start import decoder_start
from qcrd_fast.models.prompts import PromptSettings
from qcrd_fast.models.student import Student
from tests.integrations.test_attach import ROWS

T5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
BART = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
BART |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=256)
GEMMA = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8
)
MODELS = {
    "t5": (hf.T5Config, dict(T5, decoder_start_token_id=3)),
    "bart": (hf.BartConfig, dict(BART, decoder_start_token_id=4)),
    "mbart": (hf.MBartConfig, BART),
    "plbart": (hf.PLBartConfig, BART),
    "m2m100": (hf.M2M100Config, dict(BART, decoder_start_token_id=5)),
    "t5gemma": (
        hf.T5GemmaConfig,
        dict(encoder=GEMMA, decoder=dict(GEMMA, cross_attention_hidden_size=16, bos_token_id=6)),
    ),
}


@pytest.fixture
def tokenizer(t5_folder):
    return hf.AutoTokenizer.from_pretrained(t5_folder)


def build(name, tokenizer):
    kind, sizes = MODELS[name]
    if name == "t5gemma":
        sizes = {
            side: dict(sizes[side], vocab_size=len(tokenizer) + 3, pad_token_id=0, eos_token_id=1) for side in sizes
        }
    return hf.AutoModelForSeq2SeqLM.from_config(
        kind(vocab_size=len(tokenizer) + 3, pad_token_id=0, eos_token_id=1, **sizes)
    ).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_collator_shifts_as_the_model_does(name, tokenizer):
    """The whole input of the decoder is that which the model makes of the labels, for targets that were cut too."""
    model = build(name, tokenizer)
    for options in ({}, {"max_target_length": 3}):
        batch = RationaleCollator(tokenizer, model, **options)(ROWS)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
        if shift is None:
            assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * len(
                batch["target"]
            )
            continue
        scored = batch["target"] != -100
        assert torch.equal(batch["decoder_input_ids"][scored], shift(batch["target"].clone())[scored])


def test_what_is_given_wins_and_wrapped_models_are_asked(tokenizer):
    model = build("t5gemma", tokenizer)
    assert decoder_start(model) == 6 and decoder_start(torch.nn.parallel.DataParallel(model)) == 6
    batch = RationaleCollator(tokenizer, model, decoder_start_token_id=7)(ROWS)
    assert set(batch["decoder_input_ids"][:, 0].tolist()) == {7}
    assert decoder_start(build("mbart", tokenizer)) == "last" and decoder_start(build("t5", tokenizer)) == 3


def test_the_trainers_student_asks_too(tokenizer):
    """T5Gemma starts with BOS, whatever the configuration lacks; mBART with the EOS that ends each target."""
    for name, start in (("t5gemma", 6), ("mbart", 1), ("t5", 3)):
        model = build(name, tokenizer)
        student = Student(model, tokenizer, PromptSettings())
        assert student.start_id == start
        targets = [[9, 8, 1], [7, 1]]
        packed = student.hidden([[5, 6, 1]], targets, [0, 0])
        ids, labels = torch.tensor([[5, 6, 1]] * 2), torch.tensor([[9, 8, 1], [7, 1, -100]])
        own = model(input_ids=ids, labels=labels).logits[labels != -100]
        assert torch.allclose(student.head.logits(packed.hidden), own, atol=1e-4)


def test_models_that_cannot_say_are_refused(tokenizer):
    model = build("t5", tokenizer)
    model.config.decoder_start_token_id = None
    with pytest.raises(InputError, match=r"has no start token.*set model.config.decoder_start_token_id"):
        RationaleCollator(tokenizer, model)
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels.flip(1)
    with pytest.raises(InputError, match="is not supported: it makes"):
        RationaleCollator(tokenizer, model)
