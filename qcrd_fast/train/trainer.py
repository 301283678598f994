"""The loop: score, select, train; draw negatives when an iteration needs them; validate, save, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from qcrd_fast.config import SPELLED_OUT, OptimizerOptions, TrainConfig
from qcrd_fast.data.schema import question_text
from qcrd_fast.data.splits import label_of
from qcrd_fast.discriminator.cross_fit import Check, CrossFitTrainer, build_judge
from qcrd_fast.distributed.comm import SINGLE, Comm, own_device, process_group
from qcrd_fast.distributed.parallel import Strategy, make_strategy, unshard
from qcrd_fast.errors import InputError, RunError, Stopped
from qcrd_fast.models.lora import add_lora, find_target_modules, load_adapter
from qcrd_fast.models.model_folder import count_parameters
from qcrd_fast.models.prompts import PREDICT, PromptSettings
from qcrd_fast.models.student import Student
from qcrd_fast.ops.dispatch import require_impl
from qcrd_fast.ops.selection import SELECTIONS
from qcrd_fast.runs import checkpoints
from qcrd_fast.runs.folder import NEGATIVES, RESULTS, SNAPSHOTS, RunFolder
from qcrd_fast.teacher_signal.local import weights_digest
from qcrd_fast.train import checkpointer
from qcrd_fast.train.audit import Audit, Audits
from qcrd_fast.train.checkpointer import Checkpointer, as_before, resume_point
from qcrd_fast.train.domains import DomainWeights, domain_of, few_of_each
from qcrd_fast.train.evaluation import Best, Evaluation
from qcrd_fast.train.examples import Candidate, Example, make_examples
from qcrd_fast.train.judging import Judges, make_judges
from qcrd_fast.train.memory_estimate import checkpoint_activations, estimate_memory
from qcrd_fast.train.methods import has_discriminator, is_on_policy, label_kind, lag_of, method_of, samples_student
from qcrd_fast.train.metrics_log import MetricsLog, Progress, mean, step_record
from qcrd_fast.train.negatives import LaggedNegatives, SamplingPrompt
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.overlap import SamplingWorker, choose_overlap
from qcrd_fast.train.preflight import check_start, require_memory
from qcrd_fast.train.questions import Data
from qcrd_fast.train.run_state import RunState
from qcrd_fast.train.run_text import example_text
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.snapshots import Snapshots
from qcrd_fast.train.student_answers import StudentAnswers
from qcrd_fast.train.teaching import make_teaching
from qcrd_fast.utils.determinism import deterministic, require_deterministic
from qcrd_fast.utils.device import choose_threads, make_autocast, resolve_device, threads_kept
from qcrd_fast.utils.files import disk_space_text
from qcrd_fast.utils.keyed import seed_from
from qcrd_fast.utils.oom import explaining_oom, explains_oom, for_weights
from qcrd_fast.utils.signals import StopSignals
from qcrd_fast.utils.torchrun import world_size

log = logging.getLogger(__name__)
# samples that agree with the majority, and that do not; weights of a judge that is blind
FEWEST_TO_COMPARE, BLIND = 20, 0.8
DOMAIN_QUESTIONS = 64  # of each domain, whose labels say how far the student is
IDLE_WEIGHT = 0.1  # a mean weight of positives or of negatives (Eq. 6, 7) under which they teach little


def train(
    config: TrainConfig,
    run: RunFolder | None = None,
    *,
    dry_run: bool = False,
    data: Data | None = None,
    judges: Judges | None = None,
    make_objective: Callable[..., Objective] = Objective,
) -> dict[str, Any]:
    """Train a student as `config` says; return the content of `eval_results.json`.

    `data`: the result of `Data.load(config)`, if the caller has run it after `preflight`'s checks.

    `judges` take the place of those of `--quality`: objects with `scores(cases)`, for positives and for negatives.
    `make_objective` takes the arguments of `Objective` and gives what computes the loss, for experiments with one.

    Raises `InputError` for options or data at fault, `RunError` when training fails (a loss that is not finite, a full
    disk), `Stopped` after a signal, with everything saved. With `dry_run`, loads and checks everything, writes nothing
    and returns the plan.
    """
    if not config.student:
        raise InputError("--student is needed: a local folder or a hub id")
    if data is None:
        check_start(config, dry_run=dry_run, names=dry_run or run is not None)
    if run is None and not dry_run:
        with RunFolder(config) as run:
            return train(config, run, data=data, judges=judges, make_objective=make_objective)
    config = dataclasses.replace(config, impl=os.environ.get("QCRD_FAST_IMPL") or config.impl)
    device = resolve_device(own_device(config.device))
    if device.type == "cuda" and (parameters := count_parameters(Path(str(config.student)))):
        require_memory(config, parameters, torch.cuda.mem_get_info(device)[0], str(device))
    if run is None:
        return _train(config.resolved(), None, device, SINGLE, data)
    with (
        process_group(device, config.ddp_timeout) as comm,
        deterministic(config.deterministic),
        threads_kept(),
        explaining_oom(for_weights(config)),
    ):
        # of a run that is resumed, those that it began with
        spelled = comm.on_rank0(lambda: {name: getattr(run.config, name) for name in SPELLED_OUT})
        return _train(dataclasses.replace(config, **spelled), run, device, comm, data, judges, make_objective)


def _train(
    config: TrainConfig,
    run: RunFolder | None,
    device: torch.device,
    comm: Comm,
    data: Data | None,
    judges: Judges | None = None,
    make_objective: Callable[..., Objective] = Objective,
) -> dict[str, Any]:
    require_impl(config.impl, device)
    choose_overlap(config, device)
    require_deterministic(config, device, samples_student(config))
    if config.fsdp and method_of(config).mutual_information:
        raise InputError(f"--fsdp: --method {config.method} is not supported with it; leave --fsdp out")
    torch.manual_seed(config.seed)
    data = data or Data.load(config)
    schedule = Schedule(len(data.train), config, world_size())
    log.info("%d training, %d validation, %d test questions; task %s; %d steps, %d an iteration; dropped %d that are "
        "tested",
             len(data.train), len(data.validation), len(data.test), data.task, schedule.total_steps,
             schedule.iteration_steps, data.dropped)  # fmt: skip
    resume_from = comm.on_rank0(lambda: resume_point(config, run.path, schedule)) if run and config.resume else None
    prompts = PromptSettings.from_option(
        config.prompt_template, config.max_source_length, config.max_target_length, config.system_prompt, config.views
    )
    if resume_from:
        prompts = as_before(Path(resume_from), prompts)
    else:
        checkpoints.verify_checkpoint(Path(str(config.student)))
    name = str(config.student) if config.use_peft else resume_from or str(config.student)
    student = Student.load(name, prompts, device, config.attn_implementation)
    if config.use_peft:
        find_target_modules(student.model, config.lora_target_modules)  # before a discriminator is made or pretrained
    examples = make_examples(data.train, student, config)
    if run is None:
        return _plan(config, data, schedule, student) | estimate_memory(student, examples, data.validation, schedule)
    if unused := config.unused():
        log.info("this run (--method %s) does not use %s", config.method, ", ".join(unused))
    resumed = Path(resume_from) if resume_from else None
    choose_threads(device, sum(p.numel() for p in student.model.parameters()))
    trainer = Trainer(config, run.path, data, schedule, student, examples, comm, resumed, judges, make_objective)
    try:
        with trainer.log:
            if resume_from:
                trainer.restore(Path(resume_from))
            if not trainer.ended:
                comm.on_rank0(lambda: trainer.checkpointer.require_room(trainer.step))
            comm.on_rank0(run.write_config)
            log.info("%s", trainer.describe())
            if not resume_from:
                trainer.truncate_after(0)
                log.info("%s", trainer.example())
            with StopSignals() as stop, _no_bars_of_transformers():
                trainer.loop(stop)
                if signum := comm.max(stop.signum):
                    raise Stopped(signum)
            with _no_bars_of_transformers():
                return trainer.finish()
    except OSError as error:
        room = disk_space_text(run.path, checkpointer.checkpoint_bytes(student, trainer.discriminator_trainer))
        raise RunError(f"{run.path}: {error} (the next checkpoint: {room}); existing checkpoints are intact") from error


def _plan(config: TrainConfig, data: Data, schedule: Schedule, student: Student) -> dict[str, Any]:
    return {
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
        "dropped": data.dropped,
        "task": data.task,
        "steps": schedule.total_steps,
        "iteration_steps": schedule.iteration_steps,
        "student": config.student,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "output_dir": config.output_dir,
    }


class Trainer:
    """A run in progress: student, optimizer, discriminator, negatives and log."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: Data,
        schedule: Schedule,
        student: Student,
        examples: list[Example],
        comm: Comm = SINGLE,
        resume_from: Path | None = None,
        judges: Judges | None = None,
        make_objective: Callable[..., Objective] = Objective,
    ):
        self.config, self.run, self.data, self.schedule, self.comm = config, run, data, schedule, comm
        self.student, self.examples = student, examples
        self.autocast = make_autocast(student.device, config.bf16)
        self.state = RunState(config.impl)
        self.evaluation = Evaluation(config, self.state, run, data, self.autocast, comm)
        self.log = MetricsLog(run, config.report_to, comm, config.run_name)
        self.discriminator_trainer: CrossFitTrainer | None = None
        self.check: Check | None = None  # of the discriminator, the last one
        if has_discriminator(config) and judges is None:
            judge = build_judge(config.to_dict(), student.model, student.tokenizer)
            self.discriminator_trainer = CrossFitTrainer(judge, config) if judge else None
        self.sources: dict[str, str] = {}  # sha256 of what is read and no checkpoint holds, by the option that names it
        if config.use_peft:  # after the discriminator has copied what it needs
            self.sources["student"] = weights_digest(student.model)
            add_lora(student.model, config)
            if resume_from:
                load_adapter(resume_from, student.model)
        on_gpu = student.device.type == "cuda"
        self.snapshots = Snapshots(run / SNAPSHOTS, lag_of(config) + 3 if on_gpu else 0, comm)
        self.lagged: LaggedNegatives | None = None
        if samples_student(config):
            asked = [SamplingPrompt(e.id, e.explain) for e in examples]
            worker = SamplingWorker(choose_overlap(config, student.device), student.device)
            self.lagged = LaggedNegatives(
                student, asked, schedule, self.snapshots, run / NEGATIVES, config, self.autocast, worker, comm,
                StudentAnswers(data.train, schedule, student.tokenizer.eos_token_id),
            )  # fmt: skip
        self.teaching = make_teaching(
            config, student, examples, self.autocast, run, data.digest, comm, resume_from is not None
        )
        if self.teaching:
            self.sources |= self.teaching.sources
        if config.gradient_checkpointing:
            checkpoint_activations(student.model)
        self.strategy = self._share_model()
        self.optimizer = _adamw(student.model, config, self.strategy.sharded)
        snapshots = self.snapshots if self.lagged else None
        self.checkpointer = Checkpointer(
            config, run, data, schedule, student, self.optimizer, self.discriminator_trainer, self.strategy, snapshots,
            self.teaching.moving if self.teaching else None,
        )  # fmt: skip
        warmup = round(config.redi_warmup * schedule.total_steps)
        if judges is None:
            judges = make_judges(
                config, data.train, self.discriminator_trainer.discriminator if self.discriminator_trainer else None
            )
        self.state.judges = judges
        self.objective = make_objective(
            student, config, self.state, self.autocast, warmup, self.strategy, self.teaching
        )
        self.audits = Audits(config, student.device, comm)
        self.domains = self._weigh_domains() if config.domain_weights != "none" else None
        self.step = 0  # optimizer steps done
        self.best: Best = None
        self.stale = 0  # validations in a row that were no better than the best
        self.loss_d: float | None = None
        self.weights_seen: Counter[str] = Counter()  # in the current iteration
        student.model.train()
        if config.forward == "joint" and _has_dropout(student.model):
            log.warning("--forward joint scores with dropout on; the two-pass default scores without")

    def _weigh_domains(self) -> DomainWeights:
        """Weights of the domains by the student's loss on labels: of validation questions where each domain has some,
        else of training questions."""
        if self.comm.size > 1:
            raise InputError("--domain-weights is for one process; leave it out under torchrun")
        kind, domains = label_kind(self.config), set(map(domain_of, self.data.train))
        held_out = few_of_each(self.data.validation, DOMAIN_QUESTIONS)
        known = held_out if domains <= set(held_out) else few_of_each(self.data.train, DOMAIN_QUESTIONS)
        texts = [(domain, question_text(q), str(label_of(q, kind) or label_of(q, None))) for domain in sorted(domains)
                 for q in known[domain]]  # fmt: skip
        prompts = [self.student.source_ids(PREDICT, text) for _, text, _ in texts]
        labels = [self.student.target_ids(label) for *_, label in texts]

        def losses() -> dict[str, float]:
            found: dict[str, list[float]] = {}
            for (domain, *_), loss in zip(texts, self.objective.label_losses(prompts, labels), strict=True):
                found.setdefault(domain, []).append(loss)
            return {domain: sum(some) / len(some) for domain, some in found.items()}

        return DomainWeights(self.data.train, self.config.domain_weights, self.config.domain_weight_steps, losses)

    def _share_model(self) -> Strategy:
        if self.config.fsdp and self.comm.size > 1:  # what needs the model in one piece comes first
            if self.config.shared_prompts:
                self.student.probe_sharing()
            if self.lagged:
                self.lagged.prepare()
        strategy = make_strategy(self.student.model, self.comm, self.config.fsdp)
        self.student.run_as_often(strategy.most)
        return strategy

    def describe(self) -> str:
        """Describe student, device, steps and learning rate on one line."""
        config, schedule, device = self.config, self.schedule, self.student.device
        every = sum(p.numel() for p in self.student.model.parameters())
        trained = sum(p.numel() for p in self.student.model.parameters() if p.requires_grad)
        some = "all" if trained == every else f"{trained / 1e6:,.2f} million"
        with self.autocast():
            number = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
        epochs = schedule.total_steps / schedule.steps_per_epoch
        return (
            f"student {config.student}: {every / 1e6:,.2f} million parameters, {some} of them trained, on {device}, "
            f"{number}; {schedule.total_steps} steps of {schedule.questions_per_step} questions, {epochs:.3g} passes "
            f"over the data; learning rate {config.learning_rate:g}, {config.lr_scheduler_type}, "
            f"{schedule.warmup_steps} warm-up steps"
        )

    def example(self) -> str:
        """Format an example of the first step, if possible one with a rationale."""
        first = [self.examples[i] for i in self.schedule.questions(0)]
        return example_text(next((e for e in first if e.positives), first[0]), self.student, self.config)

    @property
    def ended(self) -> bool:
        """Whether the run is complete or was stopped early by its validations."""
        patience = self.config.early_stopping_patience
        return self.step >= self.schedule.total_steps or (patience is not None and self.stale >= patience)

    # The loop

    def loop(self, stop: StopSignals) -> None:
        try:
            self._loop(stop)
        finally:
            if self.lagged:
                self.lagged.close()
            self.snapshots.close()

    def _loop(self, stop: StopSignals) -> None:
        if self.lagged and not self.ended:
            self.lagged.prepare()
        if self.step == 0 and self.discriminator_trainer:
            self._pretrain_discriminator(stop)
        with contextlib.closing(Progress(self.schedule.total_steps, self.step, shown=self.comm.first)) as progress:
            self._steps(progress, stop)
        self._warn_of_idle_rationales(self.schedule.iteration(self.step - 1))
        if self.step < self.schedule.total_steps:
            many = "validation was" if self.stale == 1 else f"{self.stale} validations in a row were"
            log.info("stopped early after step %d of %d: %s no better than %.4f at step %d",
                     self.step, self.schedule.total_steps, many, *_accuracy_and_step(self.best))  # fmt: skip

    def _steps(self, progress: Progress, stop: StopSignals) -> None:
        while not self.ended:
            if self.step % self.schedule.iteration_steps == 0:
                self._begin_iteration(self.schedule.iteration(self.step))
            self._train_step()
            progress.step(self.step, self.log.last)
            done = self.step == self.schedule.total_steps
            if self.data.validation and (done or self.step % self.schedule.eval_steps == 0):
                progress.stage("validating")
                self._validate()
                progress.stage("")
                self._save()
            elif done or self.step % self.schedule.save_steps == 0:
                self._save()
            if signum := self.comm.max(stop.signum):  # also after the last step: a resume evaluates
                self._save()
                raise Stopped(signum)
        progress.last(self.log.last)

    @explains_oom("the optimizer's step", for_weights)
    def _train_step(self) -> None:
        step, started = self.step, time.perf_counter()
        iteration = self.schedule.iteration(step)
        lagged = self.lagged.for_step(step) if self.lagged else {}
        sampled = time.perf_counter()
        questions = self.schedule.questions(step)
        drawn = [lagged[i] for index in questions if (i := self.examples[index].id) in lagged]
        agreeing = [n for n in drawn if n.case and n.case.agrees]
        sampled_tokens = sum(len(n.tokens) for n in drawn)
        if self.config.agreeing_negatives == "drop" and not is_on_policy(self.config):
            lagged = {i: n for i, n in lagged.items() if not (n.case and n.case.agrees)}
        batches = self.schedule.micro_batches(step, self.comm.rank)
        factors = self.domains.factors(step) if self.domains else {}

        def compute(watched: int, audit: Audit | None) -> tuple[dict[str, torch.Tensor], Counter[str]]:
            losses: dict[str, torch.Tensor] = {}
            counts: Counter[str] = Counter()
            for micro, rows in enumerate(batches):
                # dropout, a function of the step and the rank alone
                torch.manual_seed(seed_from(self.config.seed, step, micro * self.comm.size + self.comm.rank))
                batch = [self.examples[i] for i in rows or questions[:1]]
                of_step = MicroBatch(
                    batch, lagged, len(questions), step, iteration, 1.0 if rows else 0.0, sampled_tokens, factors,
                    audit if micro == watched else None,
                )  # fmt: skip
                with self.strategy.accumulating(last=micro == len(batches) - 1):
                    try:
                        terms, stats = self.objective.step(of_step)
                    except RunError as error:
                        raise RunError(f"step {step + 1}: {error}") from error
                for name, value in terms.items():
                    losses[name] = losses[name] + value if name in losses else value  # stays on the device
                counts.update(stats)
            return losses, counts

        (losses, counts), audited = self.audits.run(step, len(batches), compute, self._fall_back)
        counts = sum(map(Counter, self.comm.gather(counts)), Counter())
        ids = [self.examples[i].id for i in questions]
        if self.discriminator_trainer and counts["weighed"] and not counts["weight"]:
            raise RunError(
                f"step {step + 1}: the discriminator assigns weight 0 to every rationale; questions {', '.join(ids)}"
            )
        losses = dict(zip(losses, self.comm.sum(torch.stack(list(losses.values()))), strict=True))
        norm = unshard(
            torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), self.config.max_grad_norm or math.inf)
        )
        lr = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teaching:
            self.teaching.after_step(self.student.model)
        self.step += 1
        watched = ["lagged", "lagged_active"]
        watched += [f"{what}_{kind}" for what in ("quality", "num") for kind in ("positive", "negative")]
        watched += [f"{what}_lagged_{kind}" for what in ("weight", "weighed") for kind in ("agrees", "differs")]
        self.weights_seen.update({name: counts[name] for name in watched})
        elapsed = time.perf_counter() - started
        record = step_record(
            counts,
            step=self.step,
            iteration=iteration,
            loss_d=self.loss_d,
            lagged_agrees=len(agreeing) / len(drawn) if drawn else None,
            lr=lr,
            elapsed_s=elapsed,
            sample_wait_s=sampled - started,
            sampled_tokens_per_s=self.lagged.tokens_per_s if self.lagged else None,
            overlap_fraction=self.lagged.overlap_fraction if self.lagged else None,
            auc=(self.check.auc, self.check.auc_low) if self.check else (None, None),
        )
        record |= ({"domain_weights": self.domains.weights} if self.domains else {}) | audited
        if self.student.device.type == "cuda":
            record["peak_mib"] = torch.cuda.max_memory_allocated(self.student.device) / 2**20
        extra = self.schedule.alpha_d(iteration) * (self.loss_d or 0.0)  # a3 L_D of Eq. 8
        logged = self.step % self.config.logging_steps == 0 or self.step == self.schedule.total_steps
        self.log.put(record, {**losses, "grad_norm": norm}, extra, ids, logged)

    def _fall_back(self) -> None:
        """From here on with `--impl torch`, and without the gradients that are there."""
        self.optimizer.zero_grad(set_to_none=True)
        self.state.impl = "torch"
        if self.lagged:
            self.lagged.use("torch")
        if self.teaching:
            self.teaching.use("torch")

    def _begin_iteration(self, iteration: int) -> None:
        """Learn from the last iteration's negatives, then keep the student as it is now for a later one."""
        self._warn_of_idle_rationales(iteration - 1)
        if self.discriminator_trainer and iteration:
            # of the iteration that is learnt from
            self.discriminator_trainer.set_alpha(self.schedule.alpha_d(iteration - 1))
            drawn = self.lagged.of_iteration(iteration - 1) if self.lagged else {}
            texts = {e.id: [c.text] for e in self.examples for c in e.candidates(drawn) if self._is_wrong(c)}
            loss = self.discriminator_trainer.update(self.data.train, texts, iteration)
            self.loss_d = self.loss_d if loss is None else loss
            if loss is not None:
                self._check_discriminator(f"iteration {iteration}")
        self.checkpointer.snapshot(self.step)

    def _warn_of_idle_rationales(self, iteration: int) -> None:
        seen, self.weights_seen = self.weights_seen, Counter()
        judge = self.state.judges.name or "the judge"
        # where qualities share out a question's weight, their level is nothing
        shared = self.config.method != "qcrd" or SELECTIONS[self.config.selects[0]].by_quality
        positive, negative = (mean(seen, f"quality_{kind}", f"num_{kind}") for kind in ("positive", "negative"))
        if not shared and positive is not None and positive < IDLE_WEIGHT:
            log.warning(
                "iteration %d: %s rates positives %.3f on average, so they weigh as much and teach little, while "
                "negatives may push the student away from all rationales (see --quality vote, --discriminator-loss)",
                iteration, judge, positive,
            )  # fmt: skip
        if negative is not None and negative > 1 - IDLE_WEIGHT:
            log.warning(
                "iteration %d: %s rates negatives %.2f on average, so they weigh %.2f and teach little "
                "(see --quality vote, --discriminator-pretrain-steps, --discriminator-loss)",
                iteration, judge, negative, 1 - negative,
            )  # fmt: skip
        agrees, differs = (
            mean(seen, f"weight_lagged_{kind}", f"weighed_lagged_{kind}") for kind in ("agrees", "differs")
        )
        fewest = min(seen["weighed_lagged_agrees"], seen["weighed_lagged_differs"])
        if self.discriminator_trainer and fewest >= FEWEST_TO_COMPARE and (agrees or 0.0) > BLIND * (differs or 0.0):
            log.warning(
                "iteration %d: samples of the student that give the majority's answer weigh %.3f as negatives, those "
                "that give another %.3f: the discriminator does not tell them apart, and may push away from right "
                "reasoning (see --quality vote, --agreeing-negatives drop)",
                iteration, agrees, differs,
            )  # fmt: skip
        if seen["lagged_active"] < 0.05 * seen["lagged"]:
            log.warning(
                "iteration %d: only %.1f%% of the student's own negatives had an active hinge; they teach little "
                "(see --negative-top-k, --negative-temperature, --delta)",
                iteration, 100 * seen["lagged_active"] / seen["lagged"],
            )  # fmt: skip

    def _pretrain_discriminator(self, stop: StopSignals) -> None:
        assert self.discriminator_trainer
        steps = min(self.config.discriminator_pretrain_steps, 10 * self.schedule.total_steps)

        def check(_: int) -> None:
            if signum := self.comm.max(stop.signum):  # nothing is trained yet, so nothing is lost
                raise Stopped(signum)

        if steps:
            folds = self.config.folds
            log.info(
                "pretraining the discriminator for %d steps%s", steps, f" on each of {folds} folds" if folds > 1 else ""
            )
            self.discriminator_trainer.set_alpha(1.0)  # a3 weighs the online updates alone
            self.loss_d = self.discriminator_trainer.pretrain(self.data.train, steps, check)
        self._check_discriminator("pretrained")

    def _is_wrong(self, candidate: Candidate) -> bool:
        """Return whether the discriminator trains on a candidate as a wrong rationale."""
        if candidate.source != "lagged" or self.config.effective("discriminator_agreeing") == "negative":
            return candidate.source == "lagged"
        case = candidate.case
        return case is None or not (case.agrees or case.rationale.truncated)

    def _check_discriminator(self, when: str) -> None:
        """Calibrate the scores; if they do not tell right from wrong, weigh by the vote from now on."""
        trainer = self.discriminator_trainer
        assert trainer

        def check() -> dict[str, Any]:
            assert trainer
            found = trainer.check(self.data.train, self.data.validation)
            return {"check": found.to_dict(), "platt": trainer.discriminator.platt}

        told = self.comm.on_rank0(check)  # ranks whose GPUs round otherwise must not decide otherwise
        self.check = Check(**told["check"])
        trainer.discriminator.platt = told["platt"] and [(slope, offset) for slope, offset in told["platt"]]
        log.info("discriminator, %s: %s", when, self.check.text)
        if self.check.refused:
            log.warning(
                "discriminator, %s: rejected, since its held-out AUC %s (--discriminator-min-auc %g); the vote weighs "
                "the rationales instead, as with --quality vote",
                when, self.check.low_text, self.config.effective("discriminator_min_auc"),
            )  # fmt: skip
            self._drop_discriminator()

    def _drop_discriminator(self) -> None:
        self.discriminator_trainer = None
        self.checkpointer.drop_discriminator()
        self.state.judges = make_judges(self.config, self.data.train, None)
        self.loss_d = None

    # Validation, checkpoints, results

    def _validate(self) -> None:
        self.log.flush()
        with self.strategy.unsharded():
            value, text = self.evaluation.validate(self.student)
        if self.best is None or value > self.best["accuracy"]:
            self.best, self.stale = {"step": self.step, "accuracy": value}, 0
        else:
            self.stale += 1
        self.log.write({"step": self.step, "eval_accuracy": value})
        log.info("step %d: validation accuracy %s", self.step, text)

    def _save(self) -> None:
        if self.checkpointer.saved_step != self.step:
            self.log.sync()  # a loss that is not finite stops here, before anything is overwritten
            progress = {
                "loss_d": self.loss_d,
                "failed_impl": self.audits.failed,
                "stale": self.stale,
                "sources_sha256": self.sources,
                **self._checked(),
            }
            if self.domains:
                progress["domain_weights"] = self.domains.state()
            self.checkpointer.save(self.step, self.best, progress)

    def _checked(self) -> dict[str, Any]:
        return {"discriminator_check": self.check.to_dict()} if self.check else {}

    def truncate_after(self, step: int) -> None:
        """Truncate log and negatives after a step (0: delete all), and delete results of an unfinished run."""
        self.log.truncate_after(step)
        if self.lagged:
            self.lagged.store.truncate_after(self.schedule.iteration(step) if step else -1)
        if not self.ended:
            self.comm.on_rank0(lambda: (self.run / RESULTS).unlink(missing_ok=True))

    def restore(self, resume_from: Path) -> None:
        """Resume from a checkpoint; the student's weights are loaded already."""
        if told := checkpoints.read_state(resume_from).get("discriminator_check"):
            self.check = Check(**told)
            if self.check.refused:
                self._drop_discriminator()
        state = self.checkpointer.restore(resume_from)
        for name, digest in state.get("sources_sha256", {}).items():  # runs before had none
            if self.sources.get(name, digest) != digest:
                path, flag = getattr(self.config, name), "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag}: the contents of {path} differ from those that {resume_from} was trained with"
                )
        self.step, self.best, self.loss_d = state["step"], state["best"], state["loss_d"]
        self.stale = state.get("stale", 0)
        if self.domains:
            self.domains.restore(state.get("domain_weights"))
        if self.audits.restore(state.get("failed_impl")):
            self._fall_back()
        if not self.log.path.exists():
            log.warning("%s is missing; starting a new one", self.log.path)
        self.truncate_after(self.step)
        log.info("resuming from %s", resume_from)

    def finish(self) -> dict[str, Any]:
        """Evaluate the best checkpoint; return the content of `eval_results.json`."""
        self.optimizer.state.clear()
        told = dict(self.check.results) if self.check else {}
        if self.domains:
            told["domain_weights"] = self.domains.weights
        stopped_early = self.step < self.schedule.total_steps
        return self.evaluation.finish(self.student, self.log, self.best, self.step, told, stopped_early)


def _adamw(model: Any, config: OptimizerOptions, sharded: bool) -> torch.optim.AdamW:
    """AdamW as in Hugging Face: no decay on biases and norms. Fused on a CPU, where other variants read and write the
    weights a dozen times a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = True if not sharded and all(p.device.type == "cpu" for p in parameters) else None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=fused)


@contextlib.contextmanager
def _no_bars_of_transformers() -> Iterator[None]:
    """Disable transformers' progress bars for weights; they would break the run's own bar."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _accuracy_and_step(best: Best) -> tuple[float, int]:
    assert best is not None  # a run that validates has one
    return best["accuracy"], best["step"]


def _has_dropout(model: Any) -> bool:
    names = (name for name in dir(model.config) if "drop" in name and not name.startswith("_"))
    return any(isinstance(p := getattr(model.config, name), float) and p > 0 for name in names)
