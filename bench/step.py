"""`qcrd-fast bench step`: a whole training step, negatives included, in every arm of `--overlap`, and as plain Hugging
Face code does it.

All train the same students of random weights on the same questions, m positives and k minority rationales each, and one
negative of the student as it was at the start of the iteration before. Ours: score, select, train what was selected, on
shared prompts; the negatives of a chunk of steps are drawn at once. `hf`: `generate` for each step, then one padded
sequence a rationale, with logits and gradients for all of them.
`hf-NAME`: no padding, and a fused cross entropy. `given`: the negatives are there already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.errors import InputError
from qcrd_fast.losses import contrastive_loss
from qcrd_fast.models.student import Student
from qcrd_fast.train.examples import Candidate, Example
from qcrd_fast.train.negative_store import Negative
from qcrd_fast.train.negatives import LaggedNegatives, SamplingPrompt
from qcrd_fast.train.objective import MicroBatch, Objective
from qcrd_fast.train.overlap import SamplingWorker, choose_overlap
from qcrd_fast.train.schedule import Schedule
from qcrd_fast.train.snapshots import Snapshots
from qcrd_fast.utils.device import make_autocast

from . import timing
from .peers import SOURCES, PerToken, eager_nll, one_line
from .record import WHERE, run_cases
from .sampler import TEMPERATURE, Work, known, load_generate
from .sampler import Case as SamplerCase
from .shapes import SHAPES, draw_from_quantiles, draw_tokens, make_student, plain_layers, table

RESULTS = Path(__file__).parent / "results" / "step.csv"
OVERLAPS = ("serial", "stream", "priority", "green-context")
FUSED = ("torch-fused", "liger", "cce", "quack")
ARMS = (*OVERLAPS, "given", "hf", "hf given", *(f"hf-{name} given" for name in FUSED))
LABEL_TOKENS = (2, 6)
CHUNK_STEPS = 4  # whose negatives are drawn at once on a CPU, an iteration's; `train` draws 64 by default
LENGTHS = {  # quantiles of the prompts' and the rationales' lengths [tokens], at equal steps
    "uniform": ((24, 96), (48, 144)),
    "svamp": (  # three teachers' rationales under SmolLM2's tokenizer; the longest hundredth is cut
        (27, 35, 38, 40, 41, 43, 46, 50, 53, 58, 76),
        (7, 26, 43, 55, 64, 73, 87, 102, 124, 167, 256),
    ),
}
DELTA = 1e3  # every hinge active, as random weights find everything unlikely
WARM_STEPS = 2  # before each timing of an arm that samples beside training: the lane is filled
MEASURED = (
    "status",
    "step_ms",
    "ms_p20",
    "ms_p80",
    "sampling_ms",
    "overlap_fraction",
    "of_longest",
    "of_hf",
    "loss",
    "peak_mib",
)

log = logging.getLogger("qcrd_fast.bench")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    questions: int  # of a step, and of a chunk
    micro: int  # questions of a micro-batch
    positives: int = 5
    minority: int = 1
    new: int = 128
    top_k: int = 50
    lengths: str = "uniform"

    def __str__(self) -> str:
        return (
            f"{self.shape}: {self.questions} questions a step in micro-batches of {self.micro}, each with "
            f"{self.positives} + {self.minority} rationales ({self.lengths} lengths) and a negative of {self.new} "
            f"tokens"
        )


COLUMNS = (*(field.name for field in dataclasses.fields(Case)), "arm", *MEASURED, "repeats", "steps", *WHERE)


class Arm:
    """A way to train, with a student and an optimizer of its own. `step` is one optimizer step; it returns the loss."""

    def __init__(self, case: Case, device: torch.device, folder: Path, kind: str):
        self.case, self.device, self.kind = case, device, kind
        self.student = make_student(case.shape, device)
        self.student.model.train()
        self.config = TrainConfig(
            per_device_train_batch_size=case.micro, gradient_accumulation_steps=case.questions // case.micro,
            max_steps=10**9,
            iteration_steps=4, negative_lag=1, negative_temperature=TEMPERATURE, negative_top_k=case.top_k, delta=DELTA,
            max_new_tokens=case.new, sample_batch_size=case.questions * (1 if device.type == "cuda" else CHUNK_STEPS),
            discriminator="none", overlap=_overlap(kind),
            scheme="minmax", negative_source="lagged",
        )  # fmt: skip
        self.autocast = make_autocast(device, None)
        self.examples = make_examples(case)
        self.schedule = Schedule(len(self.examples), self.config)
        fused = device.type == "cpu" or None  # as `train` has it, and Hugging Face's Trainer by default
        self.optimizer = torch.optim.AdamW(self.student.model.parameters(), lr=1e-6, fused=fused)
        self.folder = folder
        self.sampling_s, self.steps = 0.0, 0
        self.steps_together = 1  # whose negatives are drawn at once

    def negatives(self, step: int) -> dict[str, Negative]:
        return given_negatives(self.case)

    def losses(self, batch: list[Example], said: dict[str, Negative], step: int) -> Tensor:
        """The detached loss of a micro-batch, after its backward pass."""
        raise NotImplementedError

    def begin_iteration(self, iteration: int) -> None:
        """Keep the student as it is."""

    def step(self) -> Tensor:
        step = self.steps
        if step % self.config.iteration_steps == 0:  # type: ignore[operator]
            self.begin_iteration(self.schedule.iteration(step))
        said = self.negatives(step)
        total = torch.zeros((), device=self.device)
        for rows in self.schedule.micro_batches(step):
            total += self.losses([self.examples[i] for i in rows], said, step)
        torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return total

    def rest(self) -> None:
        """Wait for what runs beside training, so that it does not run beside another arm."""

    def close(self) -> None:
        """Threads end."""


class Ours(Arm):
    """qcrd-fast's step; `given`: without sampling."""

    def __init__(self, case: Case, device: torch.device, folder: Path, kind: str):
        super().__init__(case, device, folder, kind)
        self.objective = Objective(self.student, self.config, None, self.autocast)
        self.lagged: LaggedNegatives | None = None
        if kind != "given":
            self.steps_together = self.config.sample_batch_size // case.questions
            worker = SamplingWorker(choose_overlap(self.config, device), device)
            folder.mkdir()
            self.snapshots = Snapshots(folder / "snapshots", in_memory=4 if device.type == "cuda" else 0)
            asked = [SamplingPrompt(e.id, e.explain) for e in self.examples]
            self.lagged = LaggedNegatives(
                self.student,
                asked,
                self.schedule,
                self.snapshots,
                folder / "negatives",
                self.config,
                self.autocast,
                worker,
            )
            self.lagged.prepare()

    def begin_iteration(self, iteration: int) -> None:
        if self.lagged:
            self.snapshots.save(iteration, self.student.model)
            self.snapshots.prune(iteration - 3, keep_initial=False)

    def negatives(self, step: int) -> dict[str, Negative]:
        if self.lagged is None:
            return super().negatives(step)
        before = self.lagged.busy_s
        said = self.lagged.for_step(step)
        self.sampling_s += self.lagged.busy_s - before
        return said

    def losses(self, batch: list[Example], said: dict[str, Negative], step: int) -> Tensor:
        micro = MicroBatch(batch, said, self.case.questions, step, self.schedule.iteration(step))
        return self.objective.step(micro)[0]["loss"]

    def rest(self) -> None:
        if self.lagged:
            for begun in list(self.lagged._prefetched.values()):
                begun.result()

    def close(self) -> None:
        if self.lagged:
            self.lagged.close()
            self.snapshots.close()


class Plain(Arm):
    """Hugging Face alone: `generate` from a copy of the old weights, then one differentiable pass over every
    rationale."""

    def __init__(self, case: Case, device: torch.device, folder: Path, kind: str):
        super().__init__(case, device, folder, kind)
        name = kind.removesuffix(" given").removeprefix("hf").removeprefix("-")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.per_token: PerToken = SOURCES[name].load(device, dtype) if name else eager_nll
        self.packed = bool(name)
        plain_layers(self.student.model)
        self.old: Student | None = None if kind.endswith("given") else make_student(case.shape, device, dtype)
        self.kept: dict[int, dict[str, Tensor]] = {}

    def begin_iteration(self, iteration: int) -> None:
        if self.old is None:
            return
        self.kept[iteration] = {n: p.detach().to("cpu", copy=True) for n, p in self.student.model.named_parameters()}
        source = self.kept.pop(iteration - 1, self.kept[iteration])
        with torch.no_grad():
            for n, p in self.old.model.named_parameters():
                p.copy_(source[n])

    def negatives(self, step: int) -> dict[str, Negative]:
        if self.old is None:
            return super().negatives(step)
        started = timing.clock(self.device)
        case = self.case
        asked = [self.examples[i] for i in self.schedule.questions(step)]
        sampling = SamplerCase(case.shape, len(asked), case.new, "fixed", case.top_k)
        work = Work(sampling, self.old, [e.explain for e in asked], [case.new] * len(asked))
        drawn = load_generate(None, compiled=False)(work)()
        self.sampling_s += timing.clock(self.device) - started
        return {e.id: Negative(t, self.student.text(t)) for e, t in zip(asked, drawn, strict=True)}

    def losses(self, batch: list[Example], said: dict[str, Negative], step: int) -> Tensor:
        candidates = [(q, c) for q, e in enumerate(batch) for c in e.candidates(said)]
        sources = [e.predict for e in batch] + [e.explain for e in batch]
        targets = [e.label for e in batch] + [c.tokens for _, c in candidates]
        source_of = [*range(len(batch)), *(len(batch) + q for q, _ in candidates)]
        N, head = self.case.questions, self.student.head
        with self.autocast():
            if self.packed:
                packed = self.student.hidden(sources, targets, source_of, shared=False)
                hidden_TH, target_T, segment_T = packed.hidden, packed.target, packed.segment
            else:
                hidden_TH, target_T, segment_T = self._padded([sources[i] for i in source_of], targets)
            dtype = (
                torch.get_autocast_dtype(self.device.type)
                if torch.is_autocast_enabled(self.device.type)
                else torch.float32
            )
            nll_T = self.per_token(hidden_TH.to(dtype), head.weight.to(dtype), target_T, head.scale).float()
        labels = len(batch)
        is_label_T = segment_T < labels
        count_R = torch.bincount(segment_T, minlength=len(targets))
        nll_R = torch.zeros(len(targets), device=self.device).index_add(0, segment_T, nll_T) / count_R
        out = contrastive_loss(
            -nll_T[~is_label_T],
            segment_T[~is_label_T] - labels,
            torch.tensor([q for q, _ in candidates], device=self.device),
            torch.tensor([c.positive for _, c in candidates], device=self.device),
            None,
            beta=self.config.beta,
            delta=DELTA,
            num_questions=N,
        )
        loss = self.config.alpha_pred * nll_R[:labels].sum() / N + self.config.alpha_cl * out.loss
        loss.backward()
        return loss.detach()

    def _padded(self, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict the targets' tokens, their targets and which target each belongs to: one padded
        batch."""
        decoded = self.student.decode(self.student.encode(prompts), targets, range(len(targets)))
        return decoded.hidden, decoded.target, decoded.segment


def _overlap(kind: str) -> str:
    return kind if kind in OVERLAPS else "serial"


def make_examples(case: Case, chunks: int = 4) -> list[Example]:
    """Questions of `chunks` steps."""
    count, seeds = case.questions * chunks, itertools.count()

    def some(quantiles: Sequence[int]) -> list[list[int]]:
        return draw_tokens(case.shape, draw_from_quantiles(count, quantiles, seed=next(seeds)), seed=next(seeds))

    prompt_tokens, target_tokens = LENGTHS[case.lengths]
    predict, explain, label = some(prompt_tokens), some(prompt_tokens), some(LABEL_TOKENS)
    sides = {"teacher": case.positives, "minority": case.minority}
    candidates = {s: [some(target_tokens) for _ in range(n)] for s, n in sides.items()}

    def side(source: str, i: int) -> tuple[Candidate, ...]:
        return tuple(Candidate(f"{source} {i} {n}", tokens[i], source) for n, tokens in enumerate(candidates[source]))

    return [
        Example(f"q{i}", i, "", predict[i], explain[i], label[i], side("teacher", i), side("minority", i))
        for i in range(count)
    ]


def given_negatives(case: Case, chunks: int = 4) -> dict[str, Negative]:
    """One of the full length for each question, as `hf` draws them."""
    drawn = draw_tokens(case.shape, [case.new] * case.questions * chunks, seed=99)
    return {f"q{i}": Negative(tokens, f"given {i}") for i, tokens in enumerate(drawn)}


# ---- the run
# ------------------------------------------------------------------------------------------------------------


def find_cases(
    device: torch.device,
    *,
    shapes: Sequence[str] = (),
    questions: int | None = None,
    positives: int | None = None,
    new_tokens: int | None = None,
    lengths: str = "uniform",
) -> list[Case]:
    """On a GPU by default: T5-base and SmolLM2-135M, 64 questions a step, 128 new tokens; on a CPU small ones."""
    known("kind of lengths", [lengths], LENGTHS)
    gpu = device.type == "cuda"
    shapes = known("shape", shapes, SHAPES) or (("t5-base", "smollm2-135m") if gpu else ("tiny-t5",))
    count = questions or (64 if gpu else 4)
    micro = next(n for n in ((8, 4, 2, 1) if gpu else (2, 1)) if count % n == 0)
    sizes = {"positives": positives or (5 if gpu else 3), "new": new_tokens or (128 if gpu else 24)}
    return [Case(shape, count, micro, **sizes, lengths=lengths) for shape in shapes]


def find_names(device: torch.device, providers: Sequence[str]) -> tuple[str, ...]:
    return known("arm", providers, ARMS) or tuple(
        a for a in ARMS if device.type == "cuda" or a not in ("priority", "green-context")
    )


def run_bench(
    cases: Sequence[Case],
    device: torch.device,
    *,
    providers: Sequence[str] = (),
    repeats: int | None = None,
    append_to: Path | None = None,
) -> dict[str, Any]:
    """{"where", "repeats", "steps", "rows": [case, arm and what was measured]}.

    With `append_to`, each case's rows are added to that CSV file as soon as they are measured.
    """
    gpu = device.type == "cuda"
    count, steps = repeats or (5 if gpu else 3), 8 if gpu else 1

    def run(case: Case) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            return run_case(case, device, find_names(device, providers), count, steps, Path(folder))

    return run_cases(cases, run, device, COLUMNS, append_to, repeats=count, steps=steps)


def run_case(
    case: Case, device: torch.device, names: Sequence[str], repeats: int, steps: int, folder: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{**dataclasses.asdict(case), "arm": name, "status": "ok"} for name in names]
    with contextlib.ExitStack() as stack:
        alive = []
        for row in rows:
            with _failure_into(row):
                arm = (Plain if row["arm"].startswith("hf") else Ours)(case, device, folder / row["arm"], row["arm"])
                stack.callback(arm.close)
                row["loss"] = float(arm.step())
                row["peak_mib"] = timing.peak_mib(arm.step, device) if device.type == "cuda" else None
                alive.append((row, arm))
            log.info("%s: %s", row["arm"], row["status"])
        check_losses([row for row, _ in alive])
        times: list[list[float]] = [[] for _ in alive]
        for r in range(repeats):
            for i in range(len(alive)):
                which = (i + r) % len(alive)
                times[which].append(time_steps(alive[which][1], steps))
        for (row, arm), ms in zip(alive, times, strict=True):
            row |= {
                "step_ms": timing.quantile(ms, 0.5),
                "ms_p20": timing.quantile(ms, 0.2),
                "ms_p80": timing.quantile(ms, 0.8),
            }
            row["sampling_ms"] = 1e3 * arm.sampling_s / arm.steps if arm.sampling_s else None
    summarise(rows)
    return rows


def time_steps(arm: Arm, steps: int) -> float:
    """Milliseconds a step in the steady state (a CPU: user time), over whole chunks of negatives. Nothing waits for the
    sampling stream but the arm itself."""
    steps = -(-steps // arm.steps_together) * arm.steps_together

    def finish() -> None:
        if arm.device.type == "cuda":
            torch.cuda.current_stream(arm.device).synchronize()

    def once() -> float:
        started = timing.clock(arm.device)
        for _ in range(steps):
            arm.step()
        finish()
        return 1e3 * (timing.clock(arm.device) - started)

    for _ in range(WARM_STEPS if arm.device.type == "cuda" or arm.kind == "stream" else 0):
        arm.step()
    finish()
    taken_ms = timing.mean_ms(once, arm.device)
    arm.rest()
    return taken_ms / steps


def check_losses(rows: list[dict[str, Any]]) -> None:
    """Arms that are given the same negatives begin with the same loss."""
    given = [row for row in rows if row["arm"].endswith("given")]
    for row in given[1:]:
        # of about 10 nats a token; the hinge's margin is a constant in it
        if not abs(row["loss"] - given[0]["loss"]) <= 0.1:
            row["status"] = f"wrong: its loss is {row['loss']:.4f}, not {given[0]['loss']:.4f}"


def summarise(rows: list[dict[str, Any]]) -> None:
    """overlap_fraction: of serial sampling's time, how much the step no longer shows; of_longest: over the longer of
    training alone and sampling alone; of_hf: the plain implementation's time over this one's, negatives given or not
    alike."""
    by_arm = {row["arm"]: row for row in rows if "step_ms" in row}
    training, sampling = by_arm.get("given"), by_arm.get("serial", {}).get("sampling_ms")
    for name, row in by_arm.items():
        if training and sampling and name in OVERLAPS:
            row["overlap_fraction"] = max(0.0, min(1.0, (training["step_ms"] + sampling - row["step_ms"]) / sampling))
            row["of_longest"] = row["step_ms"] / max(training["step_ms"], sampling)
        plain = by_arm.get("hf given" if name.endswith("given") else "hf")
        row["of_hf"] = plain["step_ms"] / row["step_ms"] if plain else None


def plan_text(cases: Sequence[Case], device: torch.device, providers: Sequence[str]) -> str:
    return "\n".join([f"case  {case}" for case in cases] + [f"arm   {name}" for name in find_names(device, providers)])


def as_text(results: dict[str, Any]) -> str:
    where = results["where"]
    lines = [
        f"{where['device']}, {where['threads']} threads; torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['commit']}; median of {results['repeats']} times {results['steps']} "
        f"steps"
    ]
    for case in dict.fromkeys(
        Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)}) for row in results["rows"]
    ):
        mine = [row for row in results["rows"] if all(row[k] == v for k, v in dataclasses.asdict(case).items())]
        lines += ["", str(case), *table(mine, ("arm", *(m for m in MEASURED if m != "status"), "status"))]
    return "\n".join(
        [
            *lines,
            "",
            "overlap_fraction: of serial sampling's time, how much the step no longer shows",
            "of_longest: over the longer of training alone (given) and sampling alone",
            "of_hf: the plain implementation's time over this one's, both with negatives given or both without",
        ]
    )


@contextlib.contextmanager
def _failure_into(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (Exception, InputError) as error:  # the others still run
        row["status"] = f"not run: {one_line(error)}"
