"""Predict a run's peak device memory before it begins, by counting allocations of fake tensors.

Weights, gradients, moments and caches are sums. Activations are counted by running the largest micro-batch on fake
tensors, which have shapes, types and a device but no memory: every storage that the pass makes is added when it appears
and taken off when it is freed. Not in it: what cuBLAS, oneDNN and the CUDA context take for themselves, and what an
allocator loses by rounding.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcrd_fast.config import TrainConfig
from qcrd_fast.data.schema import Question, question_text
from qcrd_fast.discriminator.cross_fit import CrossFitted, build_judge
from qcrd_fast.discriminator.model import Discriminator
from qcrd_fast.distributed.parallel import blocks_of
from qcrd_fast.generation.decoder import Decoder
from qcrd_fast.generation.engine import CACHE_BYTES
from qcrd_fast.models.lm_head import eval_mode, output_layer
from qcrd_fast.models.lora import add_lora
from qcrd_fast.models.model_folder import count_parameters
from qcrd_fast.models.prompts import PREDICT
from qcrd_fast.models.student import Student
from qcrd_fast.ops import chunked, rationale_loss, reference
from qcrd_fast.ops.dispatch import choose_impl
from qcrd_fast.ops.selection import SELECTIONS
from qcrd_fast.runs.load import find_model
from qcrd_fast.train.examples import Candidate, Example, longest_row
from qcrd_fast.train.methods import has_discriminator, lag_of, method_of, samples_student
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.objective import MicroBatch, Objective, Weighted
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.utils.device import make_autocast

log = logging.getLogger(__name__)
LOOKED_AT = 2 * 10**8  # questions times steps whose micro-batches are compared, and
LOOKED_AT_STEPS = 10**5  # of as many steps at the most


class Ledger(TorchDispatchMode):
    """Bytes of live storages allocated inside a context: `now`, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in _pytree.tree_leaves(found):
            if isinstance(x, Tensor):
                self.add(x)
        return found

    def add(self, x: Tensor, counted: bool = True) -> None:
        """Count a tensor's storage once, unless it existed before."""
        storage = x.untyped_storage()
        if storage._cdata in self._seen:
            return
        size = storage.nbytes() if counted else 0
        self._seen.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclasses.dataclass
class Worst:
    """The largest micro-batch: its questions, and the most that each can train on."""

    batch: list[Example]
    weighted: Weighted
    tokens: int


def estimate_memory(
    student: Student, examples: Sequence[Example], validation: Sequence[Question], schedule: Schedule
) -> dict[str, Any]:
    """Return {longest_row, memory} of a run before it begins. Modifies the student as training would."""
    config, model = schedule.config, student.model
    judge = build_judge(config.to_dict(), model, student.tokenizer) if has_discriminator(config) else None
    if config.use_peft:
        add_lora(model, config)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    asked = [len(student.source_ids(PREDICT, question_text(q))) for q in validation]
    autocast = make_autocast(student.device, config.bf16)
    memory = predict_memory(student, examples, schedule, autocast, judge, asked)
    return {"longest_row": longest_row(examples), "memory": memory}


def checkpoint_activations(model: Any) -> None:
    """`--gradient-checkpointing`; transformers renamed the method."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )


def predict_memory(
    student: Student,
    examples: Sequence[Example],
    schedule: Schedule,
    autocast: Callable[[], torch.autocast],
    discriminator: CrossFitted | None,
    eval_sources: Sequence[int],
) -> dict[str, Any]:
    """Bytes on the device, for the largest micro-batch that the schedule holds: {parameters, gradients, optimizer,
    discriminator (weights and moments of each fold, gradients of one), teacher (weights of a local one), sampler (the
    copy of the student that is sampled, and its caches), activations (held when the backward pass begins), workspace
    (of the loss), peak, peak_in, host_snapshots (pinned on the host), micro_batch_questions, micro_batch_tokens}.

    `eval_sources`: lengths of the prompts that are validated on. The student may be one with LoRA. What cannot be
    counted is None, and the log says why.
    """
    config, device = schedule.config, student.device
    parameters = list(student.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    ranks = schedule.world_size if config.fsdp else 1
    whole, grads = _bytes(parameters) + _bytes(student.model.buffers()), _bytes(trained)
    # DistributedDataParallel sends them from copies
    buckets = grads if schedule.world_size > 1 and not config.fsdp else 0
    # roots of the second moments
    temporary = grads if device.type == "cuda" else 2 * max(map(_size, trained), default=0)
    sizes: dict[str, Any] = {
        "parameters": whole // ranks,
        "gradients": (grads + buckets) // ranks,
        "optimizer": 2 * grads // ranks,
        "discriminator": _judge_bytes(discriminator) if discriminator else 0,
        "teacher": teacher_bytes(config, student, autocast),
    }
    on_gpu, lagged = device.type == "cuda", samples_student(config)
    snapshots = sum(2 * p.numel() for p in parameters) * (lag_of(config) + 3) if on_gpu and lagged else 0
    counted: dict[str, Any] = dict.fromkeys(("sampler", "activations", "workspace", "peak", "peak_in"))
    worst = find_worst(student, examples, schedule)
    try:
        fake = _Fake(student, autocast, config)
        sampler = fake.sampler([len(e.explain) for e in examples]) if lagged else 0
        workspace = fake.loss_workspace(worst.weighted, worst.batch)
        # those summed so far are there before the pass
        kept = sizes["gradients"] if config.gradient_accumulation_steps > 1 or buckets else 0
        held, peak = fake.training(worst, workspace, not kept)
        base = sum(sizes.values()) - sizes["gradients"] + sampler
        if ranks > 1:  # what is gathered for a pass: all but the blocks, and two of them
            blocks = [_bytes(block.parameters()) for block in blocks_of(student.model)]
            base += whole - sum(blocks) + 2 * max(blocks, default=0)
        phases = {
            "training pass": base + kept + peak,
            "optimizer step": base + sizes["gradients"] + temporary // ranks,
            "validation": base + fake.evaluation(eval_sources),
        }
        if method_of(config).contrastive and config.forward == "two-pass":
            phases["scoring pass"] = base + kept + fake.scoring(worst)
        if sizes["teacher"]:  # its pass holds the hidden states that the student's scoring of the same tokens does
            phases["teacher's pass"] = base + kept + fake.scoring(worst)
        if discriminator:
            phases["discriminator's training"] = base + fake.judging(discriminator._model(0), examples)
        peak_in = max(phases, key=lambda name: phases[name])
        counted = {
            "sampler": sampler,
            "activations": held,
            "workspace": workspace,
            "peak": phases[peak_in],
            "peak_in": peak_in,
        }
    except Exception as error:  # architectures do things that fake tensors cannot
        log.warning("activations could not be counted: %s", f"{type(error).__name__}: {error}".splitlines()[0][:300])
    counts = {"micro_batch_questions": len(worst.batch), "micro_batch_tokens": worst.tokens}
    return {**sizes, **counted, "host_snapshots": snapshots, **counts}


def find_worst(student: Student, examples: Sequence[Example], schedule: Schedule) -> Worst:
    """Return the micro-batch with the most tokens to train on, over all ranks and the first `LOOKED_AT` steps.

    Of a question's rationales the longest count where one is selected; the student's own negative is as long as it may
    be.
    """
    config = schedule.config
    objective = Objective(student, config, None, contextlib.nullcontext, 0)  # type: ignore[arg-type]
    cost = [_tokens([e], _weigh(objective, [e])) for e in examples]
    steps = range(min(schedule.total_steps, LOOKED_AT_STEPS, max(1, LOOKED_AT // len(examples))))
    micro = (
        rows for step in steps for rank in range(schedule.world_size) for rows in schedule.micro_batches(step, rank)
    )
    batch = [examples[i] for i in max(micro, key=lambda rows: sum(cost[i] for i in rows))]
    weighted = _weigh(objective, batch)
    return Worst(batch, weighted, _tokens(batch, weighted))


def _weigh(objective: Objective, batch: Sequence[Example]) -> Weighted:
    """The candidates that a pass over these questions may have to hold activations of."""
    config = objective.config
    lagged = _samples(batch, config)
    if not method_of(config).contrastive:
        return objective.weigh(MicroBatch(batch, lagged, len(batch), objective.warmup_steps))[0]
    chosen = Weighted([], [], [], config.beta, config.delta)
    for q, example in enumerate(batch):
        candidates = example.candidates(lagged)
        for positive, select in zip((True, False), config.selects, strict=True):
            found = sorted((c for c in candidates if c.positive == positive), key=lambda c: -len(c.tokens))
            every = config.forward == "joint" or not SELECTIONS[select].single
            for candidate in found if every else found[:1]:
                chosen.add(candidate, q, 1.0)
    return chosen


def _samples(batch: Sequence[Example], config: TrainConfig) -> dict[str, Negative]:
    """What the student may say of each question, at its longest; {} where it is not asked."""
    return {e.id: Negative([0] * config.max_new_tokens, "") for e in batch} if samples_student(config) else {}


def teacher_bytes(config: TrainConfig, student: Student, autocast: Callable[[], torch.autocast]) -> int:
    """Weights of a teacher that this process holds: a local folder's as its files count them, or a copy of the
    student."""
    kind = method_of(config).teacher
    own = _bytes(student.model.parameters())
    if kind == "self":
        return own
    local = config.teacher and not config.teacher_is_url and not (kind == "mentor" and not config.kd_lambda)
    if kind is None or not local:
        return 0
    with autocast():
        size = 2 if student.device.type == "cuda" and torch.is_autocast_enabled("cuda") else 4
    return size * (count_parameters(Path(find_model(str(config.teacher)))) or own // 4)


def _tokens(batch: Sequence[Example], weighted: Weighted) -> int:
    """Tokens of labels, prompts and candidates."""
    labels = sum(len(e.predict) + len(e.label) + (sum(map(len, e.reason)) if e.reason else 0) for e in batch)
    prompts = sum(len(batch[q].explain) for q in set(weighted.question))
    return labels + prompts + sum(len(c.tokens) for c in weighted.candidates)


class _Fake:
    """The student on fake tensors; measures what its passes allocate."""

    def __init__(self, student: Student, autocast: Callable[[], torch.autocast], config: TrainConfig):
        sharing = student.sharing if config.shared_prompts else None  # tried out on the real one
        self.mode, self.autocast, self.config = FakeTensorMode(), autocast, config
        self.student = copy.copy(student)
        self.student.model = self._copy(student.model)
        self.weights = _bytes(student.model.parameters())
        self._hold_embeddings()
        if sharing == "flex":  # compiled kernels cannot be faked; a dense mask stands for theirs
            self.student.model.set_attn_implementation("sdpa")
            sharing = "dense"
        self.student.sharing = sharing
        self.objective = Objective(self.student, config, None, autocast, 0)

    def _copy(self, module: Any) -> Any:
        with FakeCopyMode(self.mode):
            return copy.deepcopy(module)

    def _hold_embeddings(self) -> None:
        """Leave the gradient of token embeddings to `training`.

        Autograd sums the gradients of several uses in place, but those of fake tensors into a third tensor.
        """
        model = self.student.model
        weight = model.get_input_embeddings().weight
        self.tied, self.embedding = weight is output_layer(model).weight, _size(weight) if weight.requires_grad else 0
        self.reached: list[int] = []  # what was held whenever the backward pass came to the embeddings
        self.counting: Ledger | None = None

        def watch(module: Any, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                output.requires_grad_().register_hook(
                    lambda _: self.reached.append(self.counting.now if self.counting else 0)
                )

        for module in [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is weight]:
            module.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
            if self.embedding:
                module.register_forward_hook(watch)

    @contextlib.contextmanager
    def ledger(self, *modules: Any) -> Iterator[Ledger]:
        """Count allocations inside the context; the weights existed before."""
        ledger = Ledger()
        for module in (self.student.model, *modules):
            for x in (*module.parameters(), *module.buffers()):
                ledger.add(x, counted=False)
        with self.mode, ledger:
            yield ledger

    def training(self, worst: Worst, workspace: int, gradients: bool) -> tuple[int, int]:
        """Return bytes held when the backward pass begins, and the peak, with or without the parameters' gradients."""
        model = self.student.model.train()
        head = output_layer(model).weight
        freed = [p for p in model.parameters() if p.requires_grad and not gradients and not (self.tied and p is head)]
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in freed]
        self.reached.clear()
        with self.ledger() as self.counting:
            loss = self.loss(worst)
            held = self.counting.now
            loss.backward()
            del loss
            peak = max(self.counting.peak, held + workspace)
        # the sum so far and a new one; the head's is there already
        uses = 1 if self.tied else min(len(self.reached), 2)
        peak = max([peak, *(now + uses * self.embedding for now in self.reached)])
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        return held, peak

    def loss(self, worst: Worst) -> Tensor:
        """The loss of the pass to measure."""
        return self.objective.largest_pass(MicroBatch(worst.batch, {}, len(worst.batch)), worst.weighted)

    def scoring(self, worst: Worst) -> int:
        """The most that the pass without gradient holds, over all candidates of the same questions."""
        every = Weighted([], [], [])
        own = _samples(worst.batch, self.config)
        for q, example in enumerate(worst.batch):
            for candidate in example.candidates(own):
                every.add(candidate, q, 1.0)
        if not every.candidates:
            return 0
        with self.ledger() as ledger, torch.no_grad(), eval_mode(self.student.model):
            self.objective.score_candidates(MicroBatch(worst.batch, {}, len(worst.batch)), every)
        return ledger.peak

    def loss_workspace(self, weighted: Weighted, batch: Sequence[Example]) -> int:
        """Return the bytes that the loss allocates beside its operands and returned gradients."""
        T = sum(len(c.tokens) for c in weighted.candidates) + sum(len(e.label) for e in batch)
        head, device = self.student.head, self.student.device
        with self.autocast():
            dtype = (
                torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.weight.dtype
            )
        impl = choose_impl(self.config.impl, device, dtype)[0]
        (V, H), size = head.weight.shape, dtype.itemsize
        if impl == "triton":
            from csrc_triton.linear_logprob import workspace_bytes

            kept = T * (V + 15) * size
            if head.softcap or kept > rationale_loss.KEPT_BYTES:
                return workspace_bytes(T, V, H, size) + 4 * T * H
            return kept + 4 * V * H + 4 * T * H  # and both products in fp32
        with self.mode:
            hidden_TH = torch.empty(T, H, dtype=dtype, device=device)
            target_T = torch.zeros(T, dtype=torch.long, device=device)
            dlogprob_T = torch.zeros(T, dtype=torch.float32, device=device)
        operands = (hidden_TH, head.weight.detach(), target_T, head.bias)
        options, needs = (
            reference.HeadOptions(head.scale, head.softcap or 0.0, 1.0),
            (True, head.weight.requires_grad, False),
        )
        with self.ledger() as ledger, torch.no_grad():
            if impl == "eager":
                logprob_TV = head.logits(hidden_TH).float().log_softmax(1)
                return ledger.peak + logprob_TV.nbytes
            _, lse_T, logits = chunked.forward_keeping(*operands, options, -100, rationale_loss.KEPT_BYTES)
            grads = chunked.backward_kept(logits, *operands, lse_T, dlogprob_T, options, needs)
            return ledger.peak - sum(x.nbytes for x in grads if x is not None)

    def sampler(self, sources: Sequence[int]) -> int:
        """The student that negatives are drawn from: its own weights, in bf16 on a GPU, and its caches."""
        config, device = self.config, self.student.device
        with self.autocast():
            halved = device.type == "cuda" and torch.is_autocast_enabled(device.type)
        return self.weights // (2 if halved else 1) + self._caches(
            config.sample_batch_size, max(sources), config.max_new_tokens
        )

    def evaluation(self, sources: Sequence[int]) -> int:
        rows = min(self.config.eval_batch_size, len(sources))
        return self._caches(rows, max(sources), self.config.max_answer_tokens) if sources else 0

    def _caches(self, rows: int, longest: int, new: int) -> int:
        with self.ledger() as ledger, torch.no_grad(), eval_mode(self.student.model), self.autocast():
            decoder = Decoder(self.student, rows, longest, new, most_bytes=CACHE_BYTES)
        held = ledger.now
        # logits, and what they are sorted or compared in
        return held + 2 * 4 * decoder.rows * len(self.student.head.weight)

    def judging(self, discriminator: Discriminator, examples: Sequence[Example]) -> int:
        """The most that a training step of the discriminator holds beside its weights, gradients and moments."""
        kinds, count = self.config.augmentations, self.config.discriminator_batch_size

        def pairs(e: Example) -> list[tuple[str, str]]:
            """Corrupted positives make both classes equal; the student's own negative is about as long as a
            positive."""
            wrong: list[Candidate] = [
                *e.minority,
                *e.positives[: max(len(e.positives) - len(e.minority), 1) if kinds else 1],
            ]
            return [(e.text, c.text) for c in (*e.positives, *wrong)]

        largest = sorted(examples, key=lambda e: -sum(len(text) + len(said) for text, said in pairs(e)))[:count]
        fake = self._copy(discriminator).train()
        for p in fake.parameters():
            p.register_post_accumulate_grad_hook(_drop)
        with self.ledger(fake) as ledger:
            fake.rate([pair for e in largest for pair in pairs(e)]).sum().backward()
        return ledger.peak


def _judge_bytes(judge: CrossFitted) -> int:
    """Weights and both moments of each fold's discriminator, and the gradients of the one that is trained."""
    own = _bytes(judge.parameters())
    return 3 * own + own // len(judge.models)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _bytes(tensors: Any) -> int:
    """Of each tensor once, however many modules it is tied to."""
    return sum(_size(x) for x in {id(x): x for x in tensors}.values())
