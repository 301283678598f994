"""Each example of `docs/examples`, run on tiny models: three optimizer steps give the loss and the gradients of the
equations, worked out from the model's own logits, whatever the accumulation. A host that is not installed is named in
the skip."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qcrd_fast import QCRDLoss, RationaleCollator, attach
from qcrd_fast.data.load import load_questions, write_prepared
from tests.support.eager_equations import assert_same, eager_loss, gradients, nll
from tests.support.paths import ROOT

EXAMPLES = ROOT / "docs" / "examples"
SIZES = [*(("t5_folder", *sizes) for sizes in ((4, 1), (2, 2), (1, 4))), ("llama_folder", 2, 2)]
QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0}


@pytest.fixture(scope="session")
def rows(rows_file, tmp_path_factory):
    """24 prepared rows."""
    path = tmp_path_factory.mktemp("prepared") / "train.jsonl"
    write_prepared(path, load_questions(rows_file).questions)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(folder):
    """(model without dropout and with losses that differ, tokenizer)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2 if model.config.is_encoder_decoder else 12)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model, AutoTokenizer.from_pretrained(folder)


def middle(model, prompter, rows):
    """A margin that leaves about half of the negatives' hinges active."""
    with torch.no_grad():
        found = [
            nll(model, prompter, ("explain: ", row["question"]), r["text"])
            for row in rows[:8]
            for r in row["negatives"]
        ]
    return round(float(torch.stack(found).median()), 3)


@pytest.fixture
def example(monkeypatch):
    """example(name) -> (module, record): the example with a margin that suits the tiny models, and what it trained
    on."""

    def run(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed: pip install {error.name}")
        record = {"rows": [], "losses": [], "steps": [], "delta": 3.0}

        class Collator(RationaleCollator):
            def __call__(self, rows):
                record["rows"].append(list(rows))
                return super().__call__(rows)

        def attached(model):
            record["model"] = model
            model = attach(model, QCRDLoss.for_model(model, delta=record["delta"]))
            model.register_forward_hook(note)
            return model

        def note(module, inputs, out):
            if out.loss is not None:
                record["losses"].append(out.loss.item())

        monkeypatch.setattr(module, "RationaleCollator", Collator)
        monkeypatch.setattr(module, "attach", attached, raising=False)
        return module, record

    return run


@pytest.fixture
def steps(example):
    """Notes, by name, the parameters before each optimizer step and the gradients after it (Lightning's come within
    it)."""

    def start(record):
        def named():
            return [(name, p) for name, p in record["model"].named_parameters() if p.requires_grad]

        def before(*_):
            record["parameters"] = {name: p.detach().clone() for name, p in named()}

        def after(*_):
            grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named()}
            record["steps"].append((record["parameters"], grads))

        handles.extend((register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)))

    handles = []
    yield start
    for handle in handles:
        handle.remove()


def check(record, reference, prompter, accumulation, tolerance=1e-10, mean=False):
    """Three steps, each with the loss and gradients of the equations at the parameters it started from."""
    counts = accumulation if isinstance(accumulation, tuple) else (accumulation,) * 3
    micro, losses, moved, delta = iter(record["rows"]), iter(record["losses"]), [], record["delta"]
    for count, (parameters, grads) in zip(counts, record["steps"], strict=True):
        reference.load_state_dict(parameters, strict=False)
        batches = list(itertools.islice(micro, count))
        batch = [row for rows in batches for row in rows]
        terms = []
        loss, expected = gradients(reference, prompter, batch, len(batch), delta=delta, terms=terms)
        assert_same(expected, grads, tolerance)
        total = sum(itertools.islice(losses, count)) / (count if mean else 1)
        assert total == pytest.approx(float(loss), rel=tolerance)
        negatives = [nll for kind, nll in terms if kind == "negatives"]
        moved.append((sum(nll < delta for nll in negatives), sum(nll >= delta for nll in negatives)))
    assert any(active for active, _ in moved) and any(inactive for _, inactive in moved)


@pytest.fixture
def host(float64, example, steps, rows, request):
    """host(name, folder) -> (module, record, model, tokenizer, check)."""

    def prepare(name, folder):
        module, record = example(name)
        model, tokenizer = load(request.getfixturevalue(folder))
        reference, prompter = copy.deepcopy(model), RationaleCollator(tokenizer, model).prompter
        record["delta"] = middle(model, prompter, rows)
        steps(record)
        return (
            module,
            record,
            model,
            tokenizer,
            lambda *args, **options: check(record, reference, prompter, *args, **options),
        )

    return prepare


@pytest.mark.parametrize("folder, batch_size, accumulation", SIZES)
def test_plain_loop(folder, batch_size, accumulation, host, rows, monkeypatch):
    module, _, model, tokenizer, check = host("plain_loop", folder)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    module.train(model, tokenizer, rows, batch_size=batch_size, accumulation=accumulation)
    check(accumulation)


@pytest.mark.parametrize(
    "plain, folder, batch_size, accumulation",
    [
        *((True, *sizes) for sizes in SIZES),
        (True, "t5_folder", 9, 2),  # of 24 rows: 9 and 9, then 6 alone, then 9 and 9 again
        (False, "t5_folder", 2, 2),
    ],
)
def test_hf_trainer(plain, folder, batch_size, accumulation, host, rows, tmp_path):
    """Also the Trainer as it comes: T5's trap, a loss multiplied by the accumulation, is not stepped into."""
    from transformers import Trainer

    module, record, model, tokenizer, check = host("hf_trainer", folder)
    settings = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        **QUIET,
    }
    kind = Trainer if plain else module.RationaleTrainer
    trainer = module.train(model, tokenizer, rows, str(tmp_path), kind, learning_rate=1e-3, **settings)
    check(accumulation if batch_size < 9 else (2, 1, 2))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    per_step = [sum(record["losses"][i : i + accumulation]) for i in range(0, 3 * accumulation, accumulation)]
    assert batch_size == 9 or [entry["loss"] for entry in logged] == pytest.approx(per_step, rel=1e-10)
    assert plain or all("loss_cl" in entry for entry in logged)
    if not plain:
        expected = eager_loss(model, RationaleCollator(tokenizer, model).prompter, rows[:4], 4, delta=record["delta"])
        assert trainer.evaluate(rows[:4])["eval_loss"] == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (1, 4)])
def test_trl(batch_size, accumulation, host, rows, tmp_path):
    module, _, model, tokenizer, check = host("trl_sft", "llama_folder")
    settings = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        **QUIET,
    }
    # TRL's default is bf16, and checkpointing
    module.train(model, tokenizer, rows, str(tmp_path), bf16=False, **settings)
    check(accumulation)


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (1, 4)])
def test_lightning(batch_size, accumulation, host, rows, tmp_path):
    module, _, model, tokenizer, check = host("lightning_module", "llama_folder")
    module.train(model, tokenizer, rows, batch_size=batch_size, accumulation=accumulation, output_dir=str(tmp_path))
    check(accumulation, mean=True)


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (1, 4)])
def test_accelerate(batch_size, accumulation, host, rows):
    module, _, model, tokenizer, check = host("accelerate_loop", "t5_folder")
    module.train(model, tokenizer, rows, batch_size=batch_size, accumulation=accumulation)
    check(accumulation)


def test_peft(host, rows, tmp_path):
    """LoRA in Hugging Face's Trainer; the reference is the same adapted model, whose logits PEFT computes."""
    module, record, model, tokenizer, _ = host("peft_lora", "llama_folder")
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        **QUIET,
    }
    trainer = module.train(model, tokenizer, rows, str(tmp_path), **settings)
    reference = copy.deepcopy(trainer.model)
    assert all("lora" in name for name in record["steps"][0][0]) and record["steps"][2][1]
    check(record, reference, RationaleCollator(tokenizer, model).prompter, 4)
