"""Two gloo ranks train attached models under DDP and FSDP2, plain, with LoRA and compiled.

`integrations/test_attach.py` runs `main`. The ranks have different questions, one of them no negatives; the
gradients must be those of one process that has them all.
"""

import contextlib
import copy
import tempfile

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from qcrd_fast import QCRDLoss, RationaleCollator, attach, score_then_train
from qcrd_fast.demo.students import build_tokenizer
from tests.support.doubles import doubles
from tests.support.eager_equations import relative_error
from tests.support.fork_ranks import fork_ranks, in_group

QUESTIONS = [f"Ann has {i} pens, buys 4 and loses 2. How many are left?" for i in range(4)]
POSITIVES = [
    ["Add: 3 + 4 = 7. So 7 - 2 = 5 are left.", "First 3 + 4 = 7."],
    ["Now there are 7. Then 7 - 2 = 5."],
    ["5"],
    ["4 + 4"],
]
NEGATIVES = [["So 9 - 3 = 6 are left.", "2"], [], [], ["Subtract: 8 - 2 = 6.", "Ann loses 2: 8 - 2 = 6."]]
ROWS = [
    {"id": q, "question": q, "gold": "5", "majority": "5", "positives": p, "negatives": n}
    for q, p, n in zip(QUESTIONS, POSITIVES, NEGATIVES, strict=True)
]
EXACT, ROUNDED = 1e-10, 1e-5  # of the gradients' norm: in float64, and in fp32, whose rounding is that of 1e-7
SHARES = (ROWS[:2] + ROWS[3:], ROWS[2:3])  # ragged


def build(kind, tokenizer):
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer) + 3, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**common, **sizes, dropout_rate=0.0, decoder_start_token_id=0))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tied = {"tie_word_embeddings": kind == "llama-tied", "num_key_value_heads": 2, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**common, **sizes, **tied))


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def shard(model, policy=None, head=False):
    """FSDP2: the layers, the head by itself if asked, then the rest."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [*inner.encoder.block, *inner.decoder.block] if hasattr(inner, "encoder") else [*inner.model.layers]
    options = {} if policy is None else {"mp_policy": policy}
    for layer in [*layers, *([inner.lm_head] if head else [])]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def compiled(model):
    """Layer by layer, as is usual under FSDP2."""
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


def grads(model):
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            found[name.replace("module.", "").replace("_orig_mod.", "")] = getattr(
                p.grad, "full_tensor", lambda g=p.grad: g
            )()
    return found


def step(model, collate, rank, split):
    """One optimizer step's backward passes; with `split`, over two micro-batches, of which rank 1 has data for one
    alone."""
    micro_batches = [SHARES[rank][:1], SHARES[rank][1:]] if split else [SHARES[rank]]
    for rows in micro_batches:
        weight = 2.0 if rows else 0.0  # the average over two ranks is undone
        # each rank runs its model, data or not
        batch = collate(rows or [{**ROWS[0], "positives": [], "negatives": []}])
        (score_then_train(model, batch, num_questions=len(ROWS)).loss * weight).backward()


def compare(name, expected, actual, tolerance):
    error = relative_error(expected, actual)
    assert error <= tolerance, f"{name}: relative error {error:.2g}"
    return f"{name} {error:.1g}"


def train(rank, folder):
    transformers.logging.set_verbosity_error()
    texts = [*QUESTIONS, *(t for group in (*POSITIVES, *NEGATIVES) for t in group)]
    tokenizer = build_tokenizer(texts)
    done = []
    # fp32 master weights, bf16 compute
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, kind, wrap, tolerance in (
        ("DDP", "t5", DistributedDataParallel, EXACT),
        ("DDP, LoRA", "lora", DistributedDataParallel, EXACT),
        ("FSDP2", "t5", shard, EXACT),
        ("FSDP2, head apart", "llama", lambda m: shard(m, head=True), EXACT),
        ("FSDP2, compiled", "llama", lambda m: shard(compiled(m)), ROUNDED),
        ("FSDP2, LoRA", "lora", shard, EXACT),
        ("FSDP2, bf16", "llama-tied", lambda m: shard(m, low), 0.05),
        ("FSDP2, bf16, LoRA", "lora", lambda m: shard(m, low), 0.05),
    ):
        with doubles() if tolerance == EXACT else contextlib.nullcontext():
            model = with_lora(build("llama", tokenizer)) if kind == "lora" else build(kind, tokenizer)
            collate = RationaleCollator(tokenizer, model)
            whole, loss_fn = copy.deepcopy(model), margin(model, collate)
            score_then_train(attach(whole, loss_fn), collate(ROWS)).loss.backward()
            first = "head" in name  # attached before it is wrapped, otherwise after
            wrapped = wrap(attach(model, loss_fn)) if first else attach(wrap(model), loss_fn)
            step(wrapped, collate, rank, split="compiled" not in name)  # each shape compiles anew
            if "bf16" in name:
                assert all(p.dtype == torch.float32 for p in wrapped.parameters())
            done.append(compare(name, grads(whole), grads(wrapped), tolerance))
    with doubles():
        done.append(trainer(rank, folder, tokenizer))
    if rank == 0:
        print("compared:", "; ".join(done), flush=True)


def margin(model, collate):
    """The loss with a margin between the two questions' negatives: one hinge is active, the other is not."""
    nll_R = attach(copy.deepcopy(model), two_pass=False)(**collate(ROWS)).nll_R
    return QCRDLoss.for_model(model, delta=float((nll_R[2:4].max() + nll_R[7:9].max()) / 2))


def trainer(rank, folder, tokenizer):
    """Hugging Face's Trainer as it comes, on both ranks: N is counted over ranks and micro-batches."""
    model = build("llama", tokenizer)
    before, seen = copy.deepcopy(model), []
    collate = RationaleCollator(tokenizer, model)

    def recording(rows):
        seen.extend(row["id"] for row in rows)
        return collate(rows)

    args = TrainingArguments(
        f"{folder}/out", use_cpu=True, ddp_backend="gloo", max_steps=1, per_device_train_batch_size=1, report_to="none",
        gradient_accumulation_steps=2, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
        max_grad_norm=0.0,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    assert args.world_size == 2
    loss_fn = margin(model, collate)
    Trainer(attach(model, loss_fn), args, recording, ROWS).train()
    gathered = [None, None]
    dist.all_gather_object(gathered, seen[:2])
    rows = [row for row in ROWS if row["id"] in [*gathered[0], *gathered[1]]]
    assert len(rows) == 4
    attach(before, loss_fn)(**collate(rows)).loss.backward()
    # SGD at a rate of 1
    moved = {n: before.get_parameter(n).detach() - p.detach() for n, p in model.named_parameters()}
    return compare("Trainer, DDP", grads(before), moved, EXACT)


def main():
    with tempfile.TemporaryDirectory() as folder:
        fork_ranks(in_group(lambda rank: train(rank, folder)), 2)
