"""`qcrd-fast bench sampler`: tokens per second of our sampler and of transformers' on the same work.

The same prompts, batch, temperature, top-k and lengths.

Students have the shapes of real ones and random weights, and EOS is off: every continuation has the length that the
case gives it. `fixed`: all the longest. `ragged`: a quarter of it to all of it, in half as many rows as there are
prompts, which is where a batch that waits for its longest row loses.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qcrd_fast.config import nearest
from qcrd_fast.errors import InputError
from qcrd_fast.generation.engine import Sampler, SampleSettings
from qcrd_fast.generation.sample import make_sampler
from qcrd_fast.models.prompts import TokenIds
from qcrd_fast.models.student import Student
from qcrd_fast.ops.philox import key_words

from . import timing
from .peers import one_line
from .record import WHERE, run_cases
from .shapes import SHAPES, draw_lengths, draw_tokens, make_student, plain_layers, table

RESULTS = Path(__file__).parent / "results" / "sampler.csv"
LENGTHS = ("fixed", "ragged")
PROMPT_TOKENS = (24, 96)  # shortest and longest
TEMPERATURE = 1.5
NO_EOS = -1
MEASURED = ("status", "tokens_per_s", "ms", "ms_p20", "ms_p80", "of_generate", "peak_mib", "first_call_s", "new_tokens")

log = logging.getLogger("qcrd_fast.bench")


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    prompts: int
    new: int = 128
    lengths: str = "fixed"
    top_k: int = 50
    dtype: str = "bf16"

    @property
    def rows(self) -> int:
        return self.prompts if self.lengths == "fixed" else max(1, self.prompts // 2)

    def __str__(self) -> str:
        rows = f"{self.prompts} prompts in {self.rows} rows"
        return f"{self.shape} {rows}, {self.lengths} lengths up to {self.new}, top-k {self.top_k}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Work:
    """The student and the prompts of a case."""

    case: Case
    student: Student
    sources: list[TokenIds]
    limits: list[int]

    @staticmethod
    def of(case: Case, device: torch.device) -> Work:
        sources = draw_tokens(case.shape, draw_lengths(case.prompts, *PROMPT_TOKENS, seed=1), seed=2)
        shortest = case.new if case.lengths == "fixed" else max(1, case.new // 4)
        limits = draw_lengths(case.prompts, shortest, case.new, seed=3)
        return Work(case, make_student(case.shape, device, DTYPES[case.dtype]), sources, limits)


COLUMNS = (*(field.name for field in dataclasses.fields(Case)), "provider", *MEASURED, "repeats", *WHERE)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Draw = Callable[[], list[TokenIds]]


# ---- who samples
# --------------------------------------------------------------------------------------------------------


def load_ours(work: Work) -> Draw:
    case = work.case
    settings = SampleSettings(TEMPERATURE, case.top_k, 1.0, case.new, case.rows)
    sampler = make_sampler(work.student, settings, max(map(len, work.sources)))
    assert isinstance(sampler, Sampler)
    sampler.eos = NO_EOS
    keys = [key_words(0, str(i)) for i in range(case.prompts)]
    return lambda: sampler.generate(work.sources, keys, limits=work.limits)


class _Limits(StoppingCriteria):
    """Stop each row at its own length."""

    def __init__(self, start: int, limit_B: Tensor):
        self.start, self.limit_B = start, limit_B

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        return input_ids.shape[1] - self.start >= self.limit_B


def load_generate(cache: str | None, compiled: bool) -> Callable[[Work], Draw]:
    def load(work: Work) -> Draw:
        model, case, pad = work.student.model, work.case, work.student.pad_id
        device = work.student.device
        if device.type == "cpu":
            model = plain_layers(copy.deepcopy(model))
        config = GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=case.top_k, max_new_tokens=case.new, pad_token_id=pad,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None), cache_implementation=cache,
            disable_compile=not compiled,
        )  # fmt: skip
        order = sorted(range(case.prompts), key=lambda i: (-len(work.sources[i]), i))

        @torch.no_grad()
        def draw() -> list[TokenIds]:
            drawn: list[TokenIds] = [[] for _ in order]
            for at in range(0, len(order), case.rows):
                rows = order[at : at + case.rows]
                width = max(len(work.sources[i]) for i in rows)
                pads = [width - len(work.sources[i]) for i in rows]
                ids = torch.tensor(
                    [[pad] * p + work.sources[i] for i, p in zip(rows, pads, strict=True)], device=device
                )
                mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads], device=device)
                start = 1 if work.student.is_encoder_decoder else width
                limits = torch.tensor([work.limits[i] for i in rows], device=device)
                ends = StoppingCriteriaList([_Limits(start, limits)])
                out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=ends)
                for i, tokens in zip(rows, out[:, start:].tolist(), strict=True):
                    drawn[i] = tokens[: work.limits[i]]
            return drawn

        return draw

    return load


def load_generate_batch(work: Work) -> Draw:
    """transformers' continuous batching with a persistent manager, as in a server."""
    from transformers import ContinuousBatchingConfig

    if work.student.is_encoder_decoder:
        raise ImportError("generate_batch is for decoder-only models")
    if work.case.lengths != "fixed":
        raise ImportError("generate_batch takes one length for all")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = copy.deepcopy(work.student.model)  # it changes its attention
    config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=work.case.top_k, max_new_tokens=work.case.new,
        eos_token_id=NO_EOS,
        pad_token_id=work.student.pad_id,
    )  # fmt: skip
    # Else it takes nearly all of the memory for its cache, and keeps it
    gpu = work.student.device.type == "cuda"
    sizes = dict(max_memory_percent=0.25) if gpu else dict(num_blocks=2 * work.case.prompts, max_batch_tokens=4096)

    def draw() -> list[TokenIds]:
        settings = ContinuousBatchingConfig(max_requests_per_batch=work.case.rows, **sizes)  # type: ignore[arg-type]
        out = model.generate_batch(
            work.sources, generation_config=config, continuous_batching_config=settings, persistent_manager=True
        )
        return [list(reply.generated_tokens) for reply in out.values()]

    return draw


# In this order. Ours is the last to capture graphs: when torch.compile records its own, it frees the workspaces of
# cuBLAS that graphs captured before it go on using.
PROVIDERS: dict[str, Callable[[Work], Draw]] = {
    "generate": load_generate(None, compiled=False),
    "generate-static": load_generate("static", compiled=False),
    "generate-compiled": load_generate("static", compiled=True),
    "generate-batch": load_generate_batch,
    "qcrd": load_ours,
}


def absent_vllm() -> dict[str, str]:
    """Explain why vLLM is not run: it needs weights on disk and a process of its own."""
    installed = importlib.util.find_spec("vllm") is not None
    return {"vllm": "installed, but not driven from here" if installed else "not installed"}


# ---- the run
# ------------------------------------------------------------------------------------------------------------


def find_cases(
    device: torch.device,
    *,
    shapes: Sequence[str] = (),
    prompts: Sequence[int] = (),
    lengths: Sequence[str] = (),
    new_tokens: int | None = None,
    top_k: int = 50,
) -> list[Case]:
    """Return the cases; default on a GPU: T5-base and SmolLM2-135M, 64 and 256 prompts, 128 new tokens.

    On a CPU: small ones.
    """
    gpu = device.type == "cuda"
    shapes = known("shape", shapes, SHAPES) or (("t5-base", "smollm2-135m") if gpu else ("tiny-t5", "tiny-llama"))
    lengths = known("kind of lengths", lengths, LENGTHS) or LENGTHS
    grid = itertools.product(shapes, prompts or ((64, 256) if gpu else (32,)), lengths)
    new, dtype = new_tokens or (128 if gpu else 32), "bf16" if gpu else "fp32"
    return [Case(shape, count, new, kind, top_k, dtype) for shape, count, kind in grid]


def find_names(device: torch.device, providers: Sequence[str]) -> tuple[str, ...]:
    """Return the requested providers, or all.

    On a CPU `generate-compiled` must be requested: it compiles for minutes.
    """
    every = tuple(name for name in PROVIDERS if device.type == "cuda" or name != "generate-compiled")
    asked = known("provider", providers, PROVIDERS)
    return tuple(name for name in PROVIDERS if name in asked) or every


def run_bench(
    cases: Sequence[Case],
    device: torch.device,
    *,
    providers: Sequence[str] = (),
    repeats: int | None = None,
    append_to: Path | None = None,
) -> dict[str, Any]:
    """{"where", "repeats", "rows": [case, provider and what was measured], "absent"}.

    With `append_to`, each case's rows are added to that CSV file as soon as they are measured.
    """
    names, count = find_names(device, providers), repeats or (7 if device.type == "cuda" else 3)
    told = run_cases(
        cases, lambda case: run_case(case, device, names, count), device, COLUMNS, append_to, repeats=count
    )
    return told | {"absent": absent_vllm()}


def run_case(case: Case, device: torch.device, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    gc.collect()  # what the last case's providers kept
    torch.cuda.empty_cache()
    work = Work.of(case, device)
    rows, calls = [], []
    for name in names:
        row: dict[str, Any] = {**dataclasses.asdict(case), "provider": name, "status": "ok"}
        rows.append(row)
        try:
            out: list[list[TokenIds]] = []
            draw = PROVIDERS[name](work)
            first_ms = timing.time_once_ms(lambda d=draw, o=out: o.append(d()), device)  # type: ignore[misc]
            row["first_call_s"] = first_ms / 1e3
            if [len(tokens) for tokens in out[0]] != work.limits:
                raise ValueError(f"drew {sum(map(len, out[0]))} tokens, not {sum(work.limits)}")
            row["peak_mib"] = timing.peak_mib(draw, device) if device.type == "cuda" else None
            calls.append((row, draw))
        except Exception as error:  # the others still run
            row["status"] = f"not run: {one_line(error)}"
        log.info("%s: %s", name, row["status"])
    tokens = sum(work.limits)
    times = timing.rounds([draw for _, draw in calls], repeats, device)
    median = {row["provider"]: timing.quantile(ms, 0.5) for (row, _), ms in zip(calls, times, strict=True)}
    for (row, _), ms in zip(calls, times, strict=True):
        row |= {"ms": median[row["provider"]], "ms_p20": timing.quantile(ms, 0.2), "ms_p80": timing.quantile(ms, 0.8)}
        row |= {"tokens_per_s": 1e3 * tokens / row["ms"], "new_tokens": tokens}
        row["of_generate"] = median["generate"] / row["ms"] if "generate" in median else None
    return rows


def plan_text(cases: Sequence[Case], device: torch.device, providers: Sequence[str]) -> str:
    lines = [f"case      {case}" for case in cases] + [f"provider  {name}" for name in find_names(device, providers)]
    return "\n".join(lines + [f"absent    {name}: {reason}" for name, reason in absent_vllm().items()])


def as_text(results: dict[str, Any]) -> str:
    where = results["where"]
    lines = [
        f"{where['device']}, {where['threads']} threads; torch {where['torch']}, transformers {where['transformers']}, "
        f"commit {where['commit']}; median of {results['repeats']}"
    ]
    for case in dict.fromkeys(
        Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)}) for row in results["rows"]
    ):
        mine = [row for row in results["rows"] if all(row[k] == v for k, v in dataclasses.asdict(case).items())]
        lines += ["", str(case), *table(mine, ("provider", *(m for m in MEASURED if m != "status"), "status"))]
    lines += [f"{name}: {reason}" for name, reason in results["absent"].items()]
    return "\n".join([*lines, "", "of_generate: tokens/s over those of generate (dynamic cache)"])


def known(what: str, names: Sequence[str], every: Any) -> tuple[str, ...]:
    for name in names:
        if name not in every:
            raise InputError(f"no {what} {name!r}; there are {', '.join(every)}{nearest(name, every)}")
    return tuple(dict.fromkeys(names))
