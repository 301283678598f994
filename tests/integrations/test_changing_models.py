"""`attach` where a model is not as plain as it was: PEFT's states, heads and forwards that are replaced, copies,
wrappers, and architectures that work in a way of their own. What works agrees with the equations; the rest is refused
in words."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
import transformers as hf

from qcrd_fast import QCRDLoss, RationaleCollator, attach, detach, score_then_train
from qcrd_fast.errors import InputError
from qcrd_fast.models.lm_head import read_head
from tests.integrations.test_attach import ROWS
from tests.support.eager_equations import assert_same, eager_loss, gradients

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
OPT = dict(
    hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, dropout=0.0, max_position_embeddings=64
)

PLAIN = [
    {**row, **{kind: [{"text": r["text"]} for r in row[kind]] for kind in ("positives", "negatives")}} for row in ROWS
]


@pytest.fixture
def tokenizer(llama_folder):
    return hf.AutoTokenizer.from_pretrained(llama_folder)


def build(tokenizer, kind=hf.LlamaForCausalLM, **sizes):
    """A tiny model with an untied head and losses that differ."""
    torch.manual_seed(0)
    sizes = {**SIZES, **sizes} if kind is not hf.OPTForCausalLM else {**OPT, **sizes}
    model = kind(
        kind.config_class(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2, **sizes)
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


@pytest.fixture
def model(tokenizer, float64):
    return build(tokenizer)


def assert_equations(model, tokenizer):
    """Loss and gradients of an attached model, by one pass and two, are those of its own logits as it is."""
    collate = RationaleCollator(tokenizer, model)
    loss, expected = gradients(model, collate.prompter, PLAIN, len(PLAIN))
    for two_pass in (True, False):
        model.zero_grad()
        out = model(**collate(PLAIN), two_pass=two_pass)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-10)
        found = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
        }
        assert_same(expected, found)


def assert_loss(model, tokenizer):
    """As `assert_equations`, where nothing has a gradient."""
    collate = RationaleCollator(tokenizer, model)
    with torch.no_grad():
        expected = eager_loss(model, collate.prompter, PLAIN, len(PLAIN))
        assert model(**collate(PLAIN)).loss.item() == pytest.approx(expected.item(), rel=1e-10)


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    defaults = dict(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft, peft.LoraConfig(**{**defaults, **options})


def shake(model):
    """Trained copies of the head that differ from it and from one another."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.5 * torch.randn_like(p))


# ---- PEFT
# ---------------------------------------------------------------------------------------------------------------


def test_every_state_of_a_head_that_peft_trains(model, tokenizer):
    """Two adapters with a head of their own, one without: whichever is active, and none, the answer is that of the
    model."""
    peft, config = lora(modules_to_save=["lm_head"])
    adapted = attach(peft.get_peft_model(model, config))
    adapted.add_adapter("second", config)
    adapted.add_adapter("plain", lora()[1])
    shake(adapted)
    for name in ("default", "second", "plain", "default"):
        adapted.set_adapter(name)
        assert_equations(adapted, tokenizer)
    with adapted.disable_adapter():
        assert_loss(adapted, tokenizer)


def test_attach_while_adapters_are_disabled(model, tokenizer):
    peft, config = lora(modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    shake(adapted)
    with adapted.disable_adapter():
        attach(adapted)
        assert_loss(adapted, tokenizer)
    assert_equations(adapted, tokenizer)


def test_the_bias_of_the_loss_is_that_of_the_active_head(tokenizer, float64):
    """`QCRDLoss.for_model` looks the bias up where PEFT would."""
    peft, config = lora(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model = build(tokenizer, hf.PhiForCausalLM)
    adapted = peft.get_peft_model(model, config)
    loss_fn = QCRDLoss.for_model(adapted)
    shake(adapted)
    original, trained = model.lm_head.original_module, model.lm_head.modules_to_save["default"]
    batch = (torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]), torch.tensor([True, False]))
    hidden = torch.randn(4, 16)

    def losses(layer):
        explicit = loss_fn(hidden, layer.weight, *batch, bias=layer.bias).loss
        return loss_fn(hidden, layer.weight, *batch).loss, explicit

    assert torch.equal(*losses(trained))
    with adapted.disable_adapter():
        assert torch.equal(*losses(original))
        assert read_head(adapted).weight is original.weight
    assert read_head(adapted).weight is trained.weight


def test_a_head_with_lora_answers_while_it_is_off_or_merged(model, tokenizer):
    peft, config = lora(target_modules=["q_proj", "lm_head"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(InputError, match=r"the output head has an adapter of its own \(peft"):
        attach(adapted)
    with adapted.disable_adapter():
        attach(adapted)
        assert_loss(adapted, tokenizer)
    with pytest.raises(InputError, match="has an adapter of its own"):
        adapted(**RationaleCollator(tokenizer, model)(ROWS))
    adapted.merge_adapter()
    assert_loss(adapted, tokenizer)


def test_prompt_tuning_is_refused_in_words(model, tokenizer):
    peft, _ = lora()
    batch = RationaleCollator(tokenizer, model)(ROWS)
    prompted = attach(peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    with pytest.raises(InputError, match=r"PROMPT_TUNING: prompt tuning.*not supported"):
        prompted(**batch)
    with prompted.disable_adapter():
        assert prompted(**batch).loss > 0
    detach(prompted)
    assert not prompted._forward_pre_hooks


# ---- heads and forwards that are replaced
# --------------------------------------------------------------------------------


def test_heads_that_are_replaced_after_attach(model, tokenizer):
    """Resized, exchanged, and given to an adapter: each is looked up, and the one before is left as it was."""
    attach(model)
    first = model.lm_head
    model.resize_token_embeddings(len(tokenizer) + 8)
    assert_equations(model, tokenizer)
    model.set_output_embeddings(torch.nn.Linear(16, len(tokenizer) + 8, bias=True))
    assert_equations(model, tokenizer)
    assert "forward" not in vars(first) and "forward" not in vars(model.lm_head)
    peft, config = lora(modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    shake(adapted)
    assert_equations(adapted, tokenizer)


def test_attach_heals_a_forward_that_was_replaced(model, tokenizer):
    """As Liger's kernels do it, on the instance; `detach` then gives their forward back."""
    attach(model)
    batch = RationaleCollator(tokenizer, model)(ROWS)

    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    model.forward = replaced = types.MethodType(forward, model)
    with pytest.raises(InputError, match=r"replaced the model's forward after attach.*call attach again"):
        score_then_train(model, batch)
    for _ in range(2):
        attach(model)
    assert_equations(model, tokenizer)
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.lm_head.weight.mul_(0.5)
    assert_equations(double, tokenizer)
    detach(model)
    assert model.forward == replaced and not hasattr(model, "_qcrd_fast")


def test_detach_leaves_nothing(model, tokenizer):
    before, batch = dict(vars(model)), RationaleCollator(tokenizer, model)(ROWS)
    assert detach(model) is model  # nothing to undo
    for given in (None, False):
        if given is not None:
            model.accepts_loss_kwargs = before["accepts_loss_kwargs"] = given
        attach(attach(model), alpha_cl=0.0)
        assert detach(model) is model
        assert {k: v for k, v in vars(model).items() if k not in ("_modules", "training")} == {
            k: v for k, v in before.items() if k not in ("_modules", "training")
        }
        with pytest.raises(InputError, match=r"call qcrd_fast\.attach"):
            score_then_train(model, batch)
    assert_equations(attach(model), tokenizer)


def test_copies_and_pickles_are_attached_by_themselves(model, tokenizer):
    attach(model, QCRDLoss.for_model(model, beta=0.2), two_pass=False)
    loss = model(**RationaleCollator(tokenizer, model)(ROWS)).loss.item()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.mul_(0.5)
        assert_equations(other, tokenizer)
        assert model(**RationaleCollator(tokenizer, model)(ROWS)).loss.item() == loss
        detach(other)
        assert "forward" not in vars(other)


def test_a_loss_with_a_models_bias_is_pickled_and_copied(tokenizer, float64):
    model = build(tokenizer, hf.PhiForCausalLM)
    loss_fn = QCRDLoss.for_model(model)
    hidden, weight = torch.randn(4, 16), model.lm_head.weight
    batch = (torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]), torch.tensor([True, False]))
    expected = loss_fn(hidden, weight, *batch).loss
    assert torch.equal(pickle.loads(pickle.dumps(loss_fn))(hidden, weight, *batch).loss, expected)
    other, other_fn = copy.deepcopy((model, loss_fn))
    with torch.no_grad():
        other.lm_head.bias.add_(torch.randn(len(other.lm_head.bias)))
    assert not torch.equal(other_fn(hidden, weight, *batch).loss, expected)  # together they stay together
    assert not list(loss_fn.parameters())


# ---- wrappers
# -----------------------------------------------------------------------------------------------------------


def test_accelerates_mixed_precision_before_and_after_attach(tokenizer):
    """The model's own autocast is used in the check and in the loss, whichever came first."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        model = build(tokenizer)
        batch, plain = RationaleCollator(tokenizer, model)(ROWS), copy.deepcopy(model)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        after = attach(accelerator.prepare(copy.deepcopy(model)))
        first = accelerator.prepare(attach(copy.deepcopy(model)))
        with torch.autocast("cpu", torch.bfloat16):
            expected = attach(plain)(**batch).loss
        assert after(**batch).loss == first(**batch).loss == expected != plain(**batch).loss
        assert attach(first)(**batch).loss == expected  # once more, for other settings
        assert detach(first)(input_ids=batch["input_ids"]).logits.dtype == torch.float32
        for wrapped in (after, attach(first)):
            assert score_then_train(accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False), batch).loss > 0
    finally:
        AcceleratorState._reset_state(True)


class Sharded(torch.nn.Module):
    """Stands in for FSDP1's wrapper: the module inside has its weights only while this is called."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)


def test_fsdp1_after_attach_works_and_before_is_refused(model, tokenizer):
    attach(model)
    model.lm_head = Sharded(model.lm_head)
    batch = RationaleCollator(tokenizer, model)(ROWS)
    assert score_then_train(model, batch).loss > 0
    detach(model)
    for call in (attach, QCRDLoss.for_model):
        with pytest.raises(
            InputError, match=r"sharded by FullyShardedDataParallel \(FSDP1\): call this before wrapping"
        ):
            call(model)


class Split(torch.nn.Module):
    """Stands in for a vocabulary-parallel head: the weight of one rank, the logits of all."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.whole, self.bias = (
            torch.nn.Parameter(head.weight[: len(head.weight) // 2].detach()),
            head,
            None,
        )

    def forward(self, hidden):
        return self.whole(hidden)


def test_heads_that_cannot_be_read_are_named(tokenizer):
    """On the meta device, emptied, or split: each says what to do, before anything else goes wrong."""
    with torch.device("meta"):
        nowhere = build(tokenizer)
    emptied, split = build(tokenizer), build(tokenizer)
    emptied.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    split.lm_head = Split(split.lm_head)
    for wrong, message in (
        (nowhere, r"on the meta device; call this after the weights are there.*to_empty"),
        (emptied, r"weight is \[0\], as ZeRO-3 and FSDP1 leave it between calls"),
        (split, "rows of .* logits; a vocabulary split by tensor parallelism is not supported"),
    ):
        for call in (attach, QCRDLoss.for_model):
            with pytest.raises(InputError, match=message):
                call(wrong)


def test_tensor_parallelism_is_named(tokenizer):
    """A DTensor that no FSDP2 unit gathers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = build(tokenizer)
    batch = RationaleCollator(tokenizer, model)(ROWS)
    attached = attach(copy.deepcopy(model))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for each in (model, attached):
            each.lm_head.weight = torch.nn.Parameter(distribute_tensor(each.lm_head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(InputError, match="split over ranks by tensor parallelism"):
            attach(model)
        with pytest.raises(InputError, match="split over ranks by tensor parallelism"):
            attached(**batch)
    finally:
        torch.distributed.destroy_process_group()


# ---- architectures
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, sizes",
    [
        (hf.OPTForCausalLM, {"word_embed_proj_dim": 16}),
        (hf.OPTForCausalLM, {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
        (hf.Llama4ForCausalLM, {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 16}),
    ],
    ids=["opt", "opt-projected", "llama4"],
)
def test_bodies_of_a_way_of_their_own(kind, sizes, tokenizer, float64):
    """OPT calls its decoder and not the body around it; Llama 4's text model names a base that it has not."""
    assert_equations(attach(build(tokenizer, kind, **sizes)), tokenizer)


def test_a_model_of_models_is_refused(tokenizer):
    bert = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**bert), hf.BertConfig(**bert))
    with pytest.raises(
        InputError, match=r"EncoderDecoderModel.*is not supported: no part of it gives the hidden states"
    ):
        attach(hf.EncoderDecoderModel(config))


@pytest.mark.parametrize("kind", [hf.MixtralForCausalLM, hf.Qwen3MoeForCausalLM])
def test_a_routers_auxiliary_loss_is_not_dropped_without_a_word(kind, tokenizer):
    sizes = (
        {"num_local_experts": 2} if kind is hf.MixtralForCausalLM else {"num_experts": 2, "moe_intermediate_size": 8}
    )
    with pytest.raises(
        InputError, match="output_router_logits is on, but the router's auxiliary loss would be left out"
    ):
        attach(build(tokenizer, kind, head_dim=8, num_experts_per_tok=1, output_router_logits=True, **sizes))
    model = attach(build(tokenizer, kind, head_dim=8, num_experts_per_tok=1, **sizes))
    batch = RationaleCollator(tokenizer, model)(ROWS)
    assert model(**batch).loss > 0
    model.config.output_router_logits = True
    with pytest.raises(InputError, match="output_router_logits is on"):
        model(**batch)


def test_label_smoothing_is_refused_in_words(tokenizer, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    quiet = dict(report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1)
    args = hf.TrainingArguments(str(tmp_path), remove_unused_columns=False, label_smoothing_factor=0.1, **quiet)
    model = build(tokenizer)
    with pytest.raises(InputError, match=r"label smoothing \(label_smoothing_factor\) is not supported"):
        hf.Trainer(attach(model), args, RationaleCollator(tokenizer, model), ROWS).train()
