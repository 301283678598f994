"""Every option of `train`, once: name, default, meaning, unit and range.

The command line, the YAML file and `config.resolved.yaml` are all made from `TrainConfig`; equation numbers are those
of arXiv 2405.13014.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from qcrd_fast.errors import InputError

METHODS = (
    *("qcrd", "sft-all", "dss", "finetune", "single-task", "mi", "redi"),
    *("dft", "npo", "opd", "sdft", "mentor-kd", "gkd"),
)
SCHEMES = {  # Table 5: (positive selection, negative selection)
    "minmax": ("min", "max"),
    "maxmin": ("max", "min"),
    "sampling": ("sampling", "sampling"),
    "mean": ("mean", "mean"),
    "wmean": ("wmean", "wmean"),
}
POSITIVE_SELECT = ("min", "softmin", "max", "mean", "wmean", "sampling")
NEGATIVE_SELECT = ("max", "max-active", "min", "mean", "wmean", "sampling")
TASKS = ("number", "equation", "math", "choice", "yes-no", "text")
DISCRIMINATOR_LOSSES = ("ratio", "infonce", "bce", "bce-all")
QUALITIES = ("vote", "text", "checks", "discriminator", "none")
# of runs before them
BEFORE_QUALITIES = {"positive_quality": None, "negative_quality": None, "agreeing_negatives": "weigh"}
# of positives and negatives, where neither --quality nor a discriminator is named
DEFAULT_QUALITIES = ("checks", "vote")
DEFAULT_SELECTS = ("softmin", "max")  # of positives and negatives, without a scheme
# Defaults that were others before, or are with `--paper`: see `TrainConfig.resolved`.
DEFAULTS: dict[str, Any] = {
    "negative_source": "none",
    "discriminator_loss": "bce-all",
    "discriminator_augment": "none",
    "discriminator_folds": 3,
    "discriminator_calibration": "platt",
    "discriminator_min_auc": 0.6,
    "discriminator_agreeing": "drop",
}
# What runs did before they had these options.
LEGACY: dict[str, Any] = {
    "negative_source": "lagged",
    "discriminator_folds": 0,
    "discriminator_calibration": "none",
    "discriminator_min_auc": 0.0,
    "discriminator_agreeing": "negative",
}
PAPER: dict[str, Any] = LEGACY | {"discriminator_loss": "ratio", "discriminator_augment": "mask,replace"}  # section 3.3
PAPER_SELECTS = {"positive_select": "min", "negative_select": "max"}  # Eq. 6 and 7
SELECTS = ("scheme", "positive_select", "negative_select")
QUALITY_OPTIONS = ("quality", "positive_quality", "negative_quality")
PARTS = {
    "scheme": "minmax",
    "negative_source": "lagged",
    "quality": "discriminator",
}  # of the paper's method, left out by default
# the mean over a question's positives, by --positive-quality
QUALITY_METHODS = ("sft-all", "dft", "npo", "mentor-kd", "gkd")
_SAMPLED = ("iteration_steps", "max_new_tokens", "sample_batch_size", "overlap")
TEACHER_OPTIONS = ("teacher", "teacher_model", "teacher_logprobs")  # which a method takes says `train.methods`
# options that methods beside qcrd take of the groups Negatives and Teacher, without `TEACHER_OPTIONS`, and of beta
USED: dict[str, tuple[str, ...]] = {
    "redi": ("negative_source",),
    "npo": ("negative_source", "beta", "npo_beta"),
    "opd": _SAMPLED,
    "sdft": (*_SAMPLED, "teacher_ema"),
    "gkd": (*_SAMPLED, "kd_temperature", "gkd_beta", "gkd_lambda"),
    "mentor-kd": ("top_logprobs", "teacher_tail", "kd_lambda", "kd_temperature", "mentor_kd_literal"),
}
SPELLED_OUT = (*DEFAULTS, *SELECTS, *QUALITY_OPTIONS, "paper")  # what `TrainConfig.resolved` may change
AUGMENTATIONS = ("mask", "replace", "answer-swap", "sentence-drop")
CALIBRATIONS = ("platt", "none")
AGREEING_UPDATES = ("drop", "negative")
IMPLS = ("auto", "triton", "torch", "eager")
ATTENTIONS = ("eager", "sdpa")


_QUANTIZED = (
    "not supported: weights are fp32 (bf16 under autocast); --use-peft --gradient-checkpointing takes the least memory"
)
ELSEWHERE = {  # options of TRL, LLaMA-Factory and the scripts of Hugging Face: what they are here
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), _QUANTIZED),
    **dict.fromkeys(("dataset_name", "dataset", "train_file"), "here it is --data"),
    **dict.fromkeys(("validation_file", "eval_dataset"), "here it is --eval-data"),
    **dict.fromkeys(
        ("max_length", "max_seq_length", "cutoff_len"), "here they are --max-source-length and --max-target-length"
    ),
    **dict.fromkeys(("packing", "completion_only_loss", "assistant_only_loss"), "here it is always so"),
    "test_file": "here it is --test-data",
    "val_size": "here it is --validation-fraction",
    "finetuning_type": "LoRA is --use-peft here",
    "lora_rank": "here it is --lora-r",
    "lora_target": "here it is --lora-target-modules",
    "flash_attn": "here it is --attn-implementation",
    "template": "here it is --prompt-template",
    "default_system": "here it is --system-prompt",
    "deepspeed": "here it is --fsdp, under torchrun",
    "overwrite_output_dir": "never: choose another folder, or --resume auto",
    "num_generations": "samples of a teacher are taken before: qcrd-fast collect --num-samples",
}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    aliases: tuple[str, ...] = (),
    group: str = "Training",
    usual: bool = False,
) -> Any:
    """Return a dataclass field with what the command line and the checks need.

    `--help` lists the `usual` ones, `--help-all` every one.
    """
    metadata = dict(
        help=help, choices=choices, low=low, high=high, open_low=open_low, aliases=aliases, group=group, usual=usual
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Data and student."""

    data: str | None = option(None, "training rows, such as prepare writes", group="Data", usual=True)
    student: str | None = option(
        None, "the student: a local folder or hub id", aliases=("model", "model_name_or_path"), group="Data", usual=True
    )
    output_dir: str | None = option(None, "run folder to write", group="Data", usual=True)
    eval_data: str | None = option(None, "validation rows; default: a share of --data", group="Data", usual=True)
    test_data: str | None = option(None, "test rows, read once, at the end", group="Data", usual=True)
    validation_fraction: float = option(
        0.1, "share of the questions of --data held out when there is no --eval-data", low=0, high=0.9, group="Data"
    )
    train_fraction: float = option(
        1.0,
        "share of the training questions to use, drawn by question; a smaller share lies within a larger",
        low=0,
        high=1,
        open_low=True,
        group="Data",
    )
    max_samples: int | None = option(
        None,
        "use at most this many training questions, drawn by question; fewer lie within more",
        low=1,
        aliases=("max_train_samples",),
        group="Data",
    )
    on_bad_row: str = option("error", "what to do with an unreadable row", choices=("error", "skip"), group="Data")
    task: str | None = option(None, "answer type; default: guessed from the answers", choices=TASKS, group="Data")
    label: str | None = option(
        None,
        "answer taught by the label task; default: gold where known, else the majority",
        choices=("gold", "majority"),
        group="Data",
    )
    num_positives: int | None = option(None, "use at most this many positives a question", low=1, group="Data")
    prompt_template: str = option(
        "raw", "raw, chat (the tokenizer's chat template), or a file containing {prompt}", group="Data", usual=True
    )
    system_prompt: str | None = option(
        None,
        "system message of the chat template, or a file that holds it (also @FILE); saved with the checkpoints",
        group="Data",
    )
    reasoning_task: bool = option(
        False,
        "add a third task: `reason: x` -> rationale, then `Answer: a`; the rationale is the first positive, or with "
        "--positive-quality checks the first of those that pass best",
        group="Data",
    )
    views: str | None = option(
        None,
        "YAML table `view: text` of what a prompt says to ask for rationales of a row's view; beside the built-in one",
        group="Data",
    )
    domain_weights: str = option(
        "none",
        "weights of the rows' domains, by the student's loss in each over the teacher's; ddk: by the teacher's error "
        "in the rows; ddk-like: with every teacher's loss 1",
        choices=("none", "ddk", "ddk-like"),
        group="Data",
    )
    domain_weight_steps: int = option(100, "K: steps between updates of the domains' weights", low=1, group="Data")
    max_source_length: int = option(
        1024, "tokens kept of a prompt: the last ones, so that the question stays", low=8, group="Data"
    )
    max_target_length: int = option(256, "tokens kept of a rationale or label", low=2, group="Data")


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """The objective and how it is computed."""

    method: str = option("qcrd", "training objective", choices=METHODS, group="Method", usual=True)
    scheme: str | None = option(None, "named pair of selections (Table 5)", choices=tuple(SCHEMES), group="Method")
    positive_select: str | None = option(
        None,
        f"selection of positives; default: the scheme's, else {DEFAULT_SELECTS[0]}",
        choices=POSITIVE_SELECT,
        group="Method",
    )
    negative_select: str | None = option(
        None,
        f"selection of negatives; default: the scheme's, else {DEFAULT_SELECTS[1]}",
        choices=NEGATIVE_SELECT,
        group="Method",
    )
    beta: float = option(0.2, "weight of the negative term (Eq. 3)", low=0, group="Method")
    delta: float = option(3.0, "margin of the hinge (Eq. 7) [nats/token]", low=0, group="Method")
    alpha_pred: float = option(0.5, "a1: weight of the label task (Eq. 8)", low=0, group="Method")
    alpha_cl: float = option(0.5, "a2: weight of the contrastive loss (Eq. 8)", low=0, group="Method")
    alpha_d: float = option(
        0.5, "a3: weight of the discriminator's loss (Eq. 8); multiplies its learning rate", low=0, group="Method"
    )
    alpha_d_decay: float = option(0.9, "factor on alpha_d each iteration", low=0, high=1, group="Method")
    redi_warmup: float = option(
        0.5, "share of the steps that redi trains as dss before its own loss", low=0, high=1, group="Method"
    )
    forward: str = option(
        "two-pass",
        "two-pass: score without gradient, train what was selected; joint: one pass over all candidates",
        choices=("two-pass", "joint"),
        group="Method",
    )
    paper: bool = option(
        False,
        "defaults as the paper prints them: min and max selections, lagged negatives, a discriminator by Eq. 2 with "
        "masked and replaced words, in-sample scores as they come out; options that are given win",
        group="Method",
    )
    shared_prompts: bool = option(
        True, "a question's rationales ride on one copy of its prompt; else each has its own", group="Method"
    )
    impl: str = option("auto", "implementation of the loss; QCRD_FAST_IMPL overrides", choices=IMPLS, group="Method")
    audit_every: int | None = option(
        None,
        "steps between audits, from the first on: 64 log-probs of each pass, and their gradients, are computed again "
        "in float64 torch; 0: never; default: 200 where the Triton kernels run, else 0",
        low=0,
        group="Method",
    )
    on_audit_failure: str = option(
        "torch",
        "what follows an audit that fails; torch: that step again, and the rest of the run, with --impl torch; stop: "
        "exit 1",
        choices=("torch", "stop"),
        group="Method",
    )


@dataclasses.dataclass(frozen=True)
class NegativeOptions:
    """The student's own negatives: whether, from when, and how they are sampled."""

    negative_source: str | None = option(
        None,
        "lagged: the teacher's minority and the student as it was; fixed: the initial student instead; "
        f"minority: the minority alone; none: no negatives; default: {DEFAULTS['negative_source']}, of redi minority",
        choices=("lagged", "fixed", "minority", "none"),
        group="Negatives",
    )
    negative_lag: int = option(5, "j: iterations between a student and its use", low=1, group="Negatives")
    iteration_steps: int | None = option(
        None, "optimizer steps of an iteration; default: one pass over the data", low=1, group="Negatives"
    )
    negative_temperature: float = option(1.5, "sampling temperature", low=0, open_low=True, group="Negatives")
    negative_top_k: int = option(50, "sample among the k likeliest tokens; 0: all", low=0, group="Negatives")
    negative_top_p: float = option(1.0, "nucleus mass to sample from", low=0, high=1, open_low=True, group="Negatives")
    max_new_tokens: int = option(128, "longest sampled negative [tokens]", low=1, group="Negatives")
    overlap: str = option(
        "auto",
        "when negatives are drawn; serial: in turn with training; the rest ahead of need, beside it; stream: on a "
        "CUDA stream (on a CPU, in a thread) of their own; priority: on one of high priority; green-context: on a "
        "quarter of the GPU; auto: serial, since none is measured on a GPU yet",
        choices=("auto", "serial", "stream", "priority", "green-context"),
        group="Negatives",
    )
    sample_batch_size: int = option(
        64, "questions of a sampling batch, and fewest of a chunk", low=1, group="Negatives"
    )


@dataclasses.dataclass(frozen=True)
class QualityOptions:
    """What weighs the rationales."""

    quality: str | None = option(
        None,
        "what weighs the rationales (s of Eq. 6 and 7); vote: the share of the question's samples that give the same "
        "answer; text: the vote, and for numbers what the rationale's equations say; "
        "checks: the vote, times fixed factors where an equation is false or starts from numbers from nowhere; "
        "discriminator: a trained encoder (the paper's); "
        "none: no weights; default: none with --discriminator none, discriminator where one is named, else "
        f"{DEFAULT_QUALITIES[0]} for positives and {DEFAULT_QUALITIES[1]} for negatives",
        choices=QUALITIES,
        group="Quality",
    )
    positive_quality: str | None = option(
        None,
        "the same for positives alone; sft-all, dft, npo, mentor-kd and gkd take it too: the mean over a question's "
        "positives is weighted; default: as --quality, of those five none",
        choices=QUALITIES,
        group="Quality",
    )
    negative_quality: str | None = option(
        None, "the same for negatives alone; default: as --quality", choices=QUALITIES, group="Quality"
    )
    agreeing_negatives: str = option(
        "weigh",
        "a sample of the student whose answer is the majority's; weigh: it is a negative of the weight 1 - s; drop: "
        "it is none",
        choices=("weigh", "drop"),
        group="Quality",
    )


@dataclasses.dataclass(frozen=True)
class DiscriminatorOptions:
    """A trained judge."""

    discriminator: str = option(
        "auto",
        "auto: a T5 student's encoder, copied, or a small own one; none: as --quality none; "
        "else folder or hub id of an encoder",
        group="Discriminator",
    )
    discriminator_loss: str | None = option(
        None,
        "bce-all: binary cross entropy; bce: without the questions that have one class alone; ratio: Eq. 2; infonce; "
        f"default: {DEFAULTS['discriminator_loss']}",
        choices=DISCRIMINATOR_LOSSES,
        group="Discriminator",
    )
    discriminator_augment: str | None = option(
        None,
        f"ways to make wrong rationales from right ones in pretraining, or none: {', '.join(AUGMENTATIONS)}; "
        f"default: {DEFAULTS['discriminator_augment']}",
        group="Discriminator",
    )
    discriminator_folds: int | None = option(
        None,
        "K: each question is scored by the one of K discriminators that was trained without its fold of the questions; "
        "0 or 1: one discriminator, which scores what it was trained on (in-sample); "
        f"default: {DEFAULTS['discriminator_folds']}",
        low=0,
        high=20,
        group="Discriminator",
    )
    discriminator_calibration: str | None = option(
        None,
        "platt: scores are probabilities, by Platt scaling on held-out questions; none: the sigmoid as it comes out; "
        f"default: {DEFAULTS['discriminator_calibration']}",
        choices=CALIBRATIONS,
        group="Discriminator",
    )
    discriminator_min_auc: float | None = option(
        None,
        "where the lower bound of the held-out AUC (95% interval) is less, the vote weighs instead; 0: never; "
        f"default: {DEFAULTS['discriminator_min_auc']}",
        low=0,
        high=1,
        group="Discriminator",
    )
    discriminator_agreeing: str | None = option(
        None,
        "samples of the student in the updates whose answer is the majority's; drop: left out, as are those cut "
        f"before their end; negative: negatives like the others; default: {DEFAULTS['discriminator_agreeing']}",
        choices=AGREEING_UPDATES,
        group="Discriminator",
    )
    discriminator_learning_rate: float = option(
        1e-4, "learning rate before alpha_d", low=0, open_low=True, group="Discriminator"
    )
    discriminator_batch_size: int = option(4, "questions of a discriminator batch", low=1, group="Discriminator")
    discriminator_pretrain_steps: int = option(
        500, "steps before training; also at most 10 x max_steps", low=0, group="Discriminator"
    )
    discriminator_update_batches: int = option(
        64, "batches at most of the update after each iteration", low=0, group="Discriminator"
    )


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """A teacher that scores, and the losses that learn from it."""

    teacher: str | None = option(
        None,
        "what scores tokens: the folder or hub id of a model with the student's tokenizer (opd, mentor-kd, gkd), or "
        "the URL of a server that scores prompts as vLLM does (opd)",
        group="Teacher",
    )
    teacher_model: str | None = option(
        None, "name of the model at the URL of --teacher; default: the one that it offers", group="Teacher"
    )
    teacher_logprobs: str | None = option(
        None, "folder that score-teacher or collect --top-logprobs wrote, for mentor-kd", group="Teacher"
    )
    top_logprobs: int = option(
        16, "K: likeliest tokens that a --teacher's distribution is cut to (mentor-kd)", low=1, group="Teacher"
    )
    teacher_tail: bool = option(
        True,
        "the teacher's probability beside its K tokens counts as one more token; without, the K are renormalised "
        "(mentor-kd)",
        group="Teacher",
    )
    teacher_ema: float = option(
        1.0,
        "d: after each step a weight of sdft's teacher is d times itself plus 1 - d times the student's; 1: frozen",
        low=0,
        high=1,
        group="Teacher",
    )
    kd_lambda: float = option(
        0.3, "lambda of mentor-kd: (1 - lambda) CE + lambda KL(teacher || student)", low=0, high=1, group="Teacher"
    )
    kd_temperature: float = option(
        1.0, "tau of mentor-kd and gkd: both distributions are of logits / tau", low=0, open_low=True, group="Teacher"
    )
    mentor_kd_literal: bool = option(
        False,
        "mentor-kd as in its released code: the KL is a mean over all positions of the padded batch, padding included",
        group="Teacher",
    )
    gkd_beta: float = option(
        0.5,
        "beta of gkd's divergence: 0 is KL(teacher || student), 1 KL(student || teacher), 0.5 the Jensen-Shannon "
        "divergence",
        low=0,
        high=1,
        group="Teacher",
    )
    gkd_lambda: float = option(
        0.5,
        "share of gkd's loss that what the student says now has; the rest has the teacher's rationales; 0: nothing is "
        "sampled",
        low=0,
        high=1,
        group="Teacher",
    )
    npo_beta: float = option(
        0.1, "b of npo: (2 / b) log(1 + (p / p_ref)^b) of each negative", low=0, open_low=True, group="Teacher"
    )

    @property
    def teacher_is_url(self) -> bool:
        return bool(self.teacher and self.teacher.startswith(("http://", "https://")))


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Optimization, as in Hugging Face."""

    learning_rate: float = option(
        5e-5, "peak learning rate of AdamW", low=0, open_low=True, aliases=("lr",), usual=True
    )
    per_device_train_batch_size: int = option(
        8, "questions of a micro-batch", low=1, aliases=("batch_size",), usual=True
    )
    gradient_accumulation_steps: int = option(1, "micro-batches of an optimizer step", low=1)
    num_train_epochs: float = option(3.0, "passes over the data", low=0, open_low=True, aliases=("epochs",), usual=True)
    max_steps: int = option(-1, "optimizer steps; -1: from num_train_epochs", low=-1, usual=True)
    warmup_ratio: float = option(0.0, "share of the steps spent warming up", low=0, high=1)
    warmup_steps: int = option(0, "steps spent warming up; above 0 in place of --warmup-ratio", low=0)
    lr_scheduler_type: str = option("linear", "decay", choices=("linear", "cosine", "constant"))
    weight_decay: float = option(0.0, "AdamW's decoupled decay", low=0)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: no clipping", low=0)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the student is held and which of its weights are trained."""

    bf16: bool | None = option(None, "bf16 autocast; default: where the GPU has it")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    attn_implementation: str | None = option(
        None, "attention of the student; default: transformers' choice", choices=ATTENTIONS
    )
    use_peft: bool = option(False, "train LoRA matrices alone, by PEFT; checkpoints hold the merged model", usual=True)
    lora_r: int = option(16, "rank of the LoRA matrices", low=1)
    lora_alpha: int = option(32, "their scale, divided by the rank", low=1)
    lora_dropout: float = option(0.0, "dropout before them", low=0, high=1)
    lora_target_modules: str = option(
        "all-linear", "linear layers that get them: all-linear (all but the head), or names such as q_proj,v_proj"
    )


@dataclasses.dataclass(frozen=True)
class MachineOptions:
    """Devices, processes and what is random."""

    fsdp: bool = option(
        False,
        "under torchrun: shard weights, gradients and optimizer over the processes (FSDP2); else each has all (DDP)",
    )
    ddp_timeout: float = option(1800.0, "seconds that processes wait for a silent one", low=0, open_low=True)
    seed: int = option(0, "seed of everything random", low=0, high=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    deterministic: bool = option(
        False, "the same bits on a GPU each time, so that a resume is exact there too; slower (on a CPU it is, without)"
    )


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Evaluation, logging, checkpoints."""

    eval_steps: int | None = option(None, "steps between validations; default: save_steps", low=1, group="Run")
    save_steps: int | None = option(
        None, "steps between checkpoints; default: one pass over the data", low=1, group="Run"
    )
    early_stopping_patience: int | None = option(
        None,
        "end after this many validations in a row that were no better than the best before them",
        low=1,
        group="Run",
    )
    save_total_limit: int | None = option(2, "checkpoints kept beside the best one", low=1, group="Run")
    logging_steps: int = option(1, "steps between lines of metrics.jsonl", low=1, group="Run")
    eval_batch_size: int = option(
        64, "questions of an evaluation batch", low=1, aliases=("per_device_eval_batch_size",), group="Run"
    )
    zero_shot: bool = option(
        True,
        "at the end also ask the untrained student by its chat template, where it has one, 64 questions at most: the "
        "baseline",
        group="Run",
    )
    max_answer_tokens: int = option(48, "longest answer generated in evaluation [tokens]", low=1, group="Run")
    report_to: str = option("none", "also log to", choices=("none", "tensorboard", "wandb"), group="Run")
    run_name: str | None = option(None, "name of the run in TensorBoard, Weights & Biases and its results", group="Run")
    resume: str | None = option(
        None,
        "auto: continue from the latest intact checkpoint; or a checkpoint folder",
        aliases=("resume_from_checkpoint",),
        group="Run",
        usual=True,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    RunOptions,
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    TeacherOptions,
    DiscriminatorOptions,
    QualityOptions,
    NegativeOptions,
    MethodOptions,
    DataOptions,
):
    """Settings of one run. Construction checks every value and raises `InputError` naming the option.

    A function that reads the options of one part takes that part: `OptimizerOptions`. The order of the parts is that of
    the command line, read from the last.
    """

    def __post_init__(self) -> None:
        hints = _hints()
        for field in dataclasses.fields(self):
            value = check_field(field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.max_steps == 0:
            raise InputError("--max-steps must be positive, or -1 for num_train_epochs; got 0")
        self._check_together()
        self._check_quality()
        for kind in self.augmentations:
            if kind not in AUGMENTATIONS:
                known = f"none or some of {', '.join(AUGMENTATIONS)}"
                raise InputError(f"--discriminator-augment is {known}; got {kind!r}{nearest(kind, AUGMENTATIONS)}")

    def _check_together(self) -> None:
        """Raises `InputError` for options that are at odds, or that need another one."""
        if self.early_stopping_patience and not self.validates:
            raise InputError(
                "--early-stopping-patience needs validation questions: --eval-data, or --validation-fraction above 0"
            )
        if self.system_prompt and self.prompt_template != "chat":
            raise InputError("--system-prompt needs --prompt-template chat; a template FILE holds such a text itself")
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise InputError("--system-prompt is empty; leave it out for none")
        name = self.run_name
        if name is not None and (not name.strip(" .") or not name.isprintable() or "/" in name or "\\" in name):
            raise InputError(f"--run-name is the name of a folder and of a line, without / and \\; got {name!r}")
        if self.max_samples and self.train_fraction < 1:
            raise InputError("--max-samples and --train-fraction are given; one of them says how many questions to use")
        alone = [
            f for f in dataclasses.fields(self) if f.name.startswith("lora_") and getattr(self, f.name) != f.default
        ]
        if alone and not self.use_peft:
            raise InputError(f"--{alone[0].name.replace('_', '-')} needs --use-peft")

    def _check_quality(self) -> None:
        without = self.discriminator == "none"
        if without and self.quality not in (None, "none"):
            raise InputError(
                f"--discriminator none is --quality none, but --quality {self.quality} is given; leave one out"
            )
        for name in ("positive_quality", "negative_quality"):
            if without and getattr(self, name) == "discriminator":
                raise InputError(
                    f"--{name.replace('_', '-')} discriminator needs one, but --discriminator none is given"
                )
        named = self.discriminator not in ("none", "auto")
        if named and self.quality == "none" and "discriminator" not in (self.positive_quality, self.negative_quality):
            raise InputError(f"--quality none has no use for --discriminator {self.discriminator}; leave one out")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "options") -> TrainConfig:
        """Build a config from option names (dashes or underscores, aliases). Unknown names raise `InputError`."""
        known = option_names()
        resolved: dict[str, Any] = {}
        for key, value in values.items():
            name = known.get(str(key).replace("-", "_"))
            if name is None:
                raise InputError(f"{source}: unknown option {key!r}{nearest(str(key), known)}")
            if name in resolved:
                raise InputError(f"{source}: option {name!r} is given twice")
            resolved[name] = value
        return cls(**resolved)

    def resolved(self, before: Mapping[str, Any] | None = None) -> TrainConfig:
        """The config with the options of `DEFAULTS` and the quality spelled out.

        What is not given is as `--paper` says, else as in a run which began with the options `before`, else the
        default.
        """
        if before is not None:
            then = completed(before)
            found = {name: then.get(name, value) for name, value in self._defaults().items()}
            found |= {"scheme": then.get("scheme", "minmax")} | {name: then.get(name) for name in PAPER_SELECTS}
            found["paper"] = self.paper or then.get("paper") is True
        else:
            found = self._defaults()
            if self.scheme is None:
                found |= dict(zip(PAPER_SELECTS, DEFAULT_SELECTS, strict=True))
        if self.paper:
            found |= PAPER | (PAPER_SELECTS if (self.scheme or found.get("scheme")) in (None, "minmax") else {})
        if self.method == "qcrd" and self.quality is None:
            if before is None or self.paper or self.discriminator == "none":
                found |= self._default_quality()
            else:
                found |= {name: then[name] for name in QUALITY_OPTIONS}
        return dataclasses.replace(
            self, **{name: value for name, value in found.items() if getattr(self, name) is None or name == "paper"}
        )

    def _defaults(self) -> dict[str, Any]:
        return DEFAULTS | ({} if self.method == "qcrd" else {"negative_source": "minority"})  # which redi takes

    def _default_quality(self) -> dict[str, str]:
        """Return the quality options for a run without `--quality`."""
        if self.discriminator == "none":
            return {"quality": "none"}
        if self.paper or self.discriminator != "auto":
            return {"quality": "discriminator"}
        return dict(zip(QUALITY_OPTIONS[1:], DEFAULT_QUALITIES, strict=True))

    def effective(self, name: str) -> Any:
        """The value of an option of `DEFAULTS`, given or not."""
        value = getattr(self, name)
        return value if value is not None else (self._defaults() | (PAPER if self.paper else {}))[name]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def unused(self) -> list[str]:
        """Options that were set though the run has no use for them."""
        groups, alone = {"Negatives", "Discriminator", "Teacher"}, set[str]()
        if self.method != "qcrd":
            alone = {*SELECTS, "beta", "delta", "forward", "agreeing_negatives", "quality", "negative_quality"}
            alone |= set() if self.method in QUALITY_METHODS else {"positive_quality"}
            kept = set(USED.get(self.method, ()))
        else:
            kept = {"negative_source", "iteration_steps"}
            source = self.effective("negative_source")
            if source == "none":
                alone = {"beta", "delta", "negative_select", "negative_quality", "agreeing_negatives"}
            elif source == "minority":
                alone = {"agreeing_negatives"}
            else:
                groups = {"Discriminator", "Teacher"}
            groups -= {"Discriminator"} if "discriminator" in self.qualities else set()
            kept |= {"discriminator"}  # none: --quality none
        if self.teacher_logprobs:
            kept -= {"top_logprobs"}  # the files have theirs
        alone |= {"redi_warmup"} if self.method != "redi" else set()
        alone |= {"domain_weight_steps"} if self.domain_weights == "none" else set()
        alone |= {"alpha_d", "alpha_d_decay"} if "discriminator" not in self.qualities else set()
        resolved = TrainConfig(method=self.method, paper=self.paper).resolved()
        return [
            "--" + field.name.replace("_", "-")
            for field in dataclasses.fields(self)
            if (field.metadata["group"] in groups or field.name in alone)
            and field.name not in (*kept, *TEACHER_OPTIONS)
            and getattr(self, field.name) not in (field.default, getattr(resolved, field.name), LEGACY.get(field.name))
        ]

    @property
    def validates(self) -> bool:
        """Whether there are validation questions: a file's, or held-out ones."""
        return self.eval_data is not None or self.validation_fraction > 0

    @property
    def folds(self) -> int:
        """How many discriminators are trained; 1 scores in-sample."""
        return max(self.effective("discriminator_folds"), 1)

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The ways of `--discriminator-augment`."""
        ways = self.effective("discriminator_augment")
        return () if ways == "none" else tuple(kind.strip() for kind in ways.split(","))

    @property
    def qualities(self) -> tuple[str, str]:
        """What weighs (positives, negatives), after the defaults and for the method: a name of `QUALITIES` each."""
        if self.method in QUALITY_METHODS:
            return self.positive_quality or "none", "none"
        if self.method != "qcrd":
            return "none", "none"
        found: dict[str, str] = self._default_quality() if self.quality is None else {"quality": self.quality}
        positive, negative = (found[name if name in found else "quality"] for name in QUALITY_OPTIONS[1:])
        return self.positive_quality or positive, self.negative_quality or negative

    @property
    def selects(self) -> tuple[str, str]:
        """(positive selection, negative selection) after the scheme's defaults."""
        scheme = self.scheme or ("minmax" if self.paper else None)
        positive, negative = SCHEMES[scheme] if scheme else DEFAULT_SELECTS
        return self.positive_select or positive, self.negative_select or negative


def completed(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a run began with, completed by what runs did before an option existed."""
    judged = "none" if before.get("discriminator") == "none" else "discriminator"
    return {**LEGACY, "quality": judged, **BEFORE_QUALITIES, **before}


def option_names() -> dict[str, str]:
    """{accepted name or alias, underscored: field name}."""
    names = {}
    for field in dataclasses.fields(TrainConfig):
        for name in (field.name, *field.metadata["aliases"]):
            names[name] = field.name
    return names


def nearest(name: str, known: Any) -> str:
    """Return "; did you mean 'x'?" for the closest name, a hint for an option of another tool, or ""."""
    if told := ELSEWHERE.get(name.strip("-").replace("-", "_")):
        return f"; {told}"
    close = difflib.get_close_matches(name.strip("-").replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def options_markdown() -> str:
    """The tables of `docs/options.md`: every option with its default, range and meaning, by group."""
    lines = ["## Every option", "", "`-` and `_` are the same in names; `--config FILE.yaml` takes the same names.", ""]
    group = None
    for field in dataclasses.fields(TrainConfig):
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines += ["", f"### {group}", "", *TABLE_HEAD]
        lines.append(option_row(field))
    return "\n".join(lines) + "\n"


TABLE_HEAD = ("| option | default | meaning |", "|---|---|---|")


@functools.cache
def _hints() -> dict[str, Any]:
    """The types of the options; to read them anew takes longer than all of a config's checks."""
    return typing.get_type_hints(TrainConfig)


def option_row(field: dataclasses.Field[Any]) -> str:
    """A row of a table of options: names, default, meaning, choices and range."""
    meta = field.metadata
    names = ", ".join(f"`--{name.replace('_', '-')}`" for name in (field.name, *meta["aliases"]))
    default = "" if field.default is None else f"`{str(field.default).lower()}`"
    choices = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
    low, high, above = meta["low"], meta["high"], "above" if meta["open_low"] else "at least"
    bounds = [f"{word} {bound:g}" for word, bound in ((above, low), ("at most", high)) if bound is not None]
    limits = f" ({', '.join(bounds)})" if bounds else ""
    return f"| {names} | {default} | {meta['help']}{choices}{limits} |"


def check_field(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` in the field's type, or `InputError` with the option, what was expected and what came."""
    flag, meta = "--" + field.name.replace("_", "-"), field.metadata
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise InputError(f"{flag} needs a value")
    kind = next(k for k in kinds if k is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 5e-5 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{flag} expects {kind.__name__}, got {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(
            f"{flag} is one of {', '.join(meta['choices'])}; got {value!r}{nearest(value, meta['choices'])}"
        )
    if kind in (int, float):
        low, high = meta["low"], meta["high"]
        if not math.isfinite(value):
            raise InputError(f"{flag} must be finite, got {value}")
        if low is not None and (value < low or (meta["open_low"] and value == low)):
            raise InputError(f"{flag} must be {'above' if meta['open_low'] else 'at least'} {low:g}, got {value:g}")
        if high is not None and value > high:
            raise InputError(f"{flag} must be at most {high:g}, got {value:g}")
    return value
