"""`attach` and `score_then_train`: the loss inside a model's own forward, in every dress that a model wears."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qcrd_fast import QCRDLoss, RationaleCollator, attach, linear_logprob, score_then_train
from qcrd_fast.errors import InputError
from tests.support.doubles import doubles
from tests.support.eager_equations import assert_rounded_alike, assert_same, gradients

ROWS = [
    {
        "id": f"q{i}",
        "question": f"Ann has {i} pens, buys 4 and loses 2. How many are left?",
        "gold": "5",
        "majority": "5",
        "positives": [{"text": t, "score": 0.9 - 0.1 * j} for j, t in enumerate(positives)],
        "negatives": [{"text": t, "score": 0.2 + 0.1 * j} for j, t in enumerate(negatives)],
    }
    for i, (positives, negatives) in enumerate(
        [
            (["Add: 3 + 4 = 7. So 7 - 2 = 5 are left.", "First 3 + 4 = 7."], ["So 9 - 3 = 6 are left.", "2"]),
            (["Now there are 7. Then 7 - 2 = 5."], []),
            ([], ["Subtract: 8 - 2 = 6.", "Ann loses 2: 8 - 2 = 6."]),
        ]
    )
]


def make_students(t5_folder, llama_folder):
    """{name: (model without dropout, collator, margin)}; the margin makes one of the negatives' hinges inactive."""
    found = {}
    for name, folder, auto in (("t5", t5_folder, AutoModelForSeq2SeqLM), ("llama", llama_folder, AutoModelForCausalLM)):
        model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2 if name == "t5" else 12)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        collate = RationaleCollator(tokenizer, model, quality="score")
        batch = collate(ROWS)
        picked = attach(copy.deepcopy(model), two_pass=False)(**batch).nll_R[[2, 3, 5, 6]].view(2, 2).amax(1)
        found[name] = model, collate, round(float(picked.mean()), 3)
    return found


@pytest.fixture
def students(t5_folder, llama_folder, float64):
    return make_students(t5_folder, llama_folder)


@pytest.fixture(params=["t5", "llama"])
def student(request, students):
    return students[request.param]


def grads(model):
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("two_pass", [True, False])
def test_equations(student, two_pass):
    """Both passes give the loss and gradients of the equations, quality scores included; a second micro-batch adds
    up."""
    model, collate, delta = student
    reference = copy.deepcopy(model)
    terms = []
    loss, expected = gradients(reference, collate.prompter, ROWS, 3, delta=delta, terms=terms)
    assert [nll < delta for kind, nll in terms if kind == "negatives"].count(True) == 1
    assert attach(model, QCRDLoss.for_model(model, delta=delta), two_pass=two_pass) is model
    out = model(**collate(ROWS))
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-10)
    terms = {name: getattr(out, name).item() for name in ("loss", "loss_pred", "loss_cl", "loss_pos", "loss_neg")}
    assert terms["loss"] == pytest.approx(0.5 * terms["loss_pred"] + 0.5 * terms["loss_cl"], rel=1e-10)
    assert terms["loss_cl"] == pytest.approx(terms["loss_pos"] - 0.2 * terms["loss_neg"], rel=1e-10)
    assert out.selected_R.sum() == 3 and len(out.nll_R) == 7
    out.loss.backward()
    assert_same(expected, grads(model))
    model.zero_grad()
    for rows in (ROWS[:1], ROWS[1:]):
        score_then_train(model, collate(rows), num_questions=torch.tensor(3)).loss.backward()
    assert_same(expected, grads(model))


def test_weights_of_the_terms(student):
    model, collate, _ = student
    batch = collate(ROWS)
    out = attach(model, alpha_pred=0.0, alpha_cl=2.0)(**batch)
    assert out.loss.item() == pytest.approx(2 * out.loss_cl.item(), rel=1e-10) and out.loss_pred.item() > 0
    quality = torch.full((7,), 0.5)
    halved = score_then_train(model, batch, quality=quality)
    plain = score_then_train(model, {k: v for k, v in batch.items() if k != "quality"})
    assert halved.loss_pos.item() == pytest.approx(plain.loss_pos.item() / 2, rel=1e-10)
    for options in ({"alpha_pred": -1.0}, {"alpha_cl": float("nan")}):
        with pytest.raises(InputError, match="must be finite and at least 0"):
            attach(model, **options)


def test_scoring_is_without_dropout_and_leaves_every_mode_as_it_was(t5_folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_folder).train()
    frozen = model.encoder.block[0].eval()
    collate = RationaleCollator(AutoTokenizer.from_pretrained(t5_folder), model)
    attach(model)
    batch = collate(ROWS)
    torch.manual_seed(0)
    first, second = (model(**batch) for _ in range(2))
    assert torch.equal(first.nll_R, second.nll_R) and first.loss != second.loss  # dropout is in the training pass alone
    assert model.training and model.decoder.training and not frozen.training
    with torch.no_grad():
        # without gradient: one pass, in the mode that there is
        assert not torch.equal(model(**batch).nll_R, first.nll_R)


def test_the_model_is_otherwise_itself(student):
    """Logits, generation, a deep copy with weights of its own, and what is saved."""
    model, collate, _ = student
    reference, batch = copy.deepcopy(model), collate(ROWS)
    attach(model)
    ids = batch["input_ids"][:2]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4), reference.generate(ids, max_new_tokens=4))
    assert set(model.state_dict()) == set(reference.state_dict())
    double = copy.deepcopy(model)
    before = model(**batch).loss
    with torch.no_grad():
        for p in double.parameters():
            p.mul_(0.5)
    assert model(**batch).loss == before and double(**batch).loss != before


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_autocast(kind, t5_folder, llama_folder):
    """bf16 compute changes the loss by its rounding alone."""
    model, collate, delta = make_students(t5_folder, llama_folder)[kind]
    attach(model.train(), QCRDLoss.for_model(model, delta=delta))
    plain = model(**collate(ROWS))
    plain.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**collate(ROWS))
    assert low.loss.dtype == torch.float32 and low.loss.item() == pytest.approx(plain.loss.item(), rel=0.02)


def test_checkpointing(student):
    """Recomputed activations give the same gradients."""
    model, collate, delta = student
    attach(model, QCRDLoss.for_model(model, delta=delta))
    batch = collate(ROWS)
    model.train()
    model(**batch).loss.backward()
    expected = {n: g.clone() for n, g in grads(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert_same(expected, grads(model))


@pytest.mark.slow
def test_compiled(t5_folder, llama_folder):
    """The model between the data-dependent steps is compiled, for scoring and for training."""
    model, collate, delta = make_students(t5_folder, llama_folder)["llama"]
    model.model.layers = model.model.layers[:1]  # compiling takes long
    batch = collate(ROWS)
    attach(model, QCRDLoss.for_model(model, delta=delta))
    exact = copy.deepcopy(model).double()
    with doubles():
        exact(**batch).loss.backward()
    model(**batch).loss.backward()
    plain = {n: g.clone() for n, g in grads(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    score_then_train(torch.compile(model, backend="aot_eager"), batch).loss.backward()
    assert_rounded_alike(grads(exact), plain, grads(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    torch._dynamo.reset()


def test_frozen_head(student):
    """Nothing is computed for a frozen head, and the rest of the model gets what it would get otherwise."""
    model, collate, delta = student
    reference = copy.deepcopy(model)
    for copied in (model, reference):
        output = copied.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)  # untied
    _, expected = gradients(reference, collate.prompter, ROWS, 3, delta=delta)
    attach(model, QCRDLoss.for_model(model, delta=delta))(**collate(ROWS)).loss.backward()
    assert_same(expected, grads(model))
    assert model.get_output_embeddings().weight.grad is None


def test_batches_that_lack_something(student):
    """No rationale, or none selected, or no label: a finite loss, and a gradient for every parameter."""
    model, collate, _ = student
    attach(model, QCRDLoss.for_model(model, delta=0.0))
    prompterless = RationaleCollator(collate.prompter.tokenizer, model, label="none")
    empty = [{**ROWS[0], "positives": [], "negatives": []}]
    for make, rows, zero in ((collate, empty, False), (prompterless, empty, True), (prompterless, ROWS[2:], True)):
        for two_pass in (True, False):
            model.zero_grad()
            out = model(**make(rows), two_pass=two_pass)
            out.loss.backward()
            assert torch.isfinite(out.loss) and (out.loss.item() == 0) is zero
            assert all(p.grad is not None for p in model.parameters())


def test_lora(student, monkeypatch):
    """LoRA before or after `attach`, and a head that PEFT trains in full; one with an adapter of its own is refused."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model, collate, delta = student
    kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    targets = ["q", "v"] if model.config.is_encoder_decoder else ["q_proj", "v_proj"]
    for full, first in ((None, True), (None, False), (["lm_head"], False)):
        base = copy.deepcopy(model)
        if full:
            base.get_output_embeddings().weight = torch.nn.Parameter(
                base.get_output_embeddings().weight.detach().clone()
            )
            base.config.tie_word_embeddings = False
            if model.config.is_encoder_decoder:
                base.config.scale_decoder_outputs = True
        loss_fn = QCRDLoss.for_model(base, delta=delta)
        if first:
            attach(base, loss_fn)
        config = peft.LoraConfig(
            task_type=kind, r=2, target_modules=targets, modules_to_save=full, init_lora_weights=False
        )
        adapted = peft.get_peft_model(base, config)
        if not first:
            assert attach(adapted, loss_fn) is adapted
        _, expected = gradients(adapted, collate.prompter, ROWS, 3, delta=delta)
        score_then_train(adapted, collate(ROWS)).loss.backward()
        assert_same(expected, grads(adapted))
        assert any("lm_head" in name for name in expected) is bool(full)
    head = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type=kind, r=2, target_modules=["lm_head"]))
    with pytest.raises(InputError, match=r"the output head has an adapter of its own \(peft.*modules_to_save"):
        attach(head)


def test_what_is_refused(student):
    model, collate, _ = student
    batch = collate(ROWS)
    with pytest.raises(InputError, match=r"call qcrd_fast.attach\(model\) once before score_then_train"):
        score_then_train(model, batch)
    with pytest.raises(InputError, match="Linear is not a Hugging Face model"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"loss_fn has scale 0.5.*for_model"):
        attach(model, QCRDLoss(scale=0.5))
    with pytest.raises(InputError, match="ignore_index must be -100"):
        attach(model, QCRDLoss.for_model(model, ignore_index=0))
    with pytest.raises(InputError, match="must be a QCRDLoss or None, got CrossEntropyLoss"):
        attach(model, torch.nn.CrossEntropyLoss())
    attach(model)
    with pytest.raises(ValueError, match=r"model\(\*\*batch\)"):
        model(batch)
    with pytest.raises(ValueError, match="takes no position_ids"):
        model(**batch, position_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="question must have one entry a sequence"):
        model(**{**batch, "question": batch["question"][:2]})
    with pytest.raises(ValueError, match=r"rationale must be \[.*to match target"):
        model(**{**batch, "target": batch["target"][:, :-1]})
    with pytest.raises(ValueError, match=r"number the sequences from 0 to 2; nn\.DataParallel cannot"):
        model(**{k: v[-3:] if torch.is_tensor(v) and len(v) == len(batch["target"]) else v for k, v in batch.items()})
    with pytest.raises(ValueError, match="labels must come after"):
        model(**{**batch, "is_label": batch["is_label"].flip(0)})


@pytest.mark.parametrize("weight", [torch.zeros(0), torch.zeros(0, 4)])
def test_an_empty_head_is_named(weight):
    """What FSDP and ZeRO-3 leave of a head outside of a forward."""
    with pytest.raises(ValueError, match=r"weight is empty, as FSDP and ZeRO-3 leave it.*qcrd_fast.attach"):
        linear_logprob(torch.zeros(3, 4), weight, torch.zeros(3, dtype=torch.long))


@pytest.mark.slow
def test_ranks(warm):
    """DDP and FSDP2 on two ranks, plain, with LoRA, in bf16 and compiled, and Hugging Face's Trainer under DDP."""
    for name in ("accelerate", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    assert "compared: " in warm.call("tests.support.embedded_ranks:main")


def test_memory(float64):
    """At T5's vocabulary a step takes at most half of what it takes from logits (`bench.embedding`: T5-small)."""
    from transformers import T5Config, T5ForConditionalGeneration

    from bench import embedding
    from bench.timing import peak_mib

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=embedding.V, decoder_start_token_id=0, **sizes)
    model, batch = T5ForConditionalGeneration(config), embedding.make_batch()
    attach(model, QCRDLoss.for_model(model, delta=embedding.DELTA))
    kept = batch["question"] < 2  # half of the questions will do
    of_sequences = ("source", "decoder_input_ids", "target", "question", "positive", "is_label")
    batch |= {name: batch[name][kept] for name in of_sequences}
    batch |= {"rationale": torch.arange(int(kept.sum()))[:, None].expand(batch["target"].shape)}
    losses = []

    def step(loss):
        model.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())

    dense, one_pass, two_passes = (
        peak_mib(lambda loss=loss: step(loss), torch.device("cpu"))
        for loss in (
            lambda: embedding.loss_from_logits(model, batch),
            lambda: model(**batch, two_pass=False).loss,
            lambda: model(**batch, two_pass=True).loss,
        )
    )
    assert max(one_pass, two_passes) <= dense / 2, (dense, one_pass, two_passes)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-10)
