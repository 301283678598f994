"""One training step of a T5 in a host trainer, in time and memory.

The loss is computed from the model's logits, or through `attach`.

python -m bench.embedding [--append]: each with the same weights, rows and loss, whose value is checked.
The student has T5-small's shape with random weights; the step is a forward and a backward pass from empty gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "embedding.csv"
PROVIDERS = ("logits", "attach-one-pass", "attach-two-passes")
ROUNDS = 5
V, QUESTIONS, POSITIVES, NEGATIVES = 32_128, 4, 5, 2
DELTA = 12.0  # nats/token, above what random weights give, so that every hinge is active


def make_batch(seed: int = 0) -> dict[str, Any]:
    """Draw prompts of 48 random tokens, rationales of 48 to 96 and labels of 4.

    About 2,000 tokens are scored.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    R = QUESTIONS * (POSITIVES + NEGATIVES)
    lengths = torch.cat([torch.randint(48, 97, (R,), generator=generator), torch.full((QUESTIONS,), 4)])
    B, L = len(lengths), int(lengths.max())
    target = torch.randint(3, V, (B, L), generator=generator)
    target[torch.arange(L) >= lengths[:, None]] = -100
    question = torch.cat([torch.arange(QUESTIONS).repeat_interleave(POSITIVES + NEGATIVES), torch.arange(QUESTIONS)])
    positive = torch.ones(B, dtype=torch.bool)
    positive[:R] = torch.arange(R) % (POSITIVES + NEGATIVES) < POSITIVES
    is_label = torch.arange(B) >= R
    shifted = torch.cat([torch.zeros(B, 1, dtype=torch.long), target[:, :-1].clamp(min=0)], 1)
    prompts = torch.randint(3, V, (2 * QUESTIONS, 48), generator=generator)
    return {
        "input_ids": prompts,
        "attention_mask": torch.ones_like(prompts),
        "source": question + QUESTIONS * is_label,
        "decoder_input_ids": shifted,
        "target": target,
        "rationale": torch.arange(B)[:, None].expand(B, L),
        "question": question,
        "positive": positive,
        "is_label": is_label,
        "num_questions": QUESTIONS,
    }


def loss_from_logits(model: Any, batch: dict[str, Any]) -> Any:
    """The loss without the library: the model's logits, log-softmax, gather, Eq. 3, 6 and 7."""
    import torch

    states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    states.last_hidden_state = states.last_hidden_state[batch["source"]]  # each prompt is read once here too
    logits = model(
        encoder_outputs=states,
        attention_mask=batch["attention_mask"][batch["source"]],
        decoder_input_ids=batch["decoder_input_ids"],
        use_cache=False,
    ).logits
    scored = batch["target"] != -100
    logprob = logits.log_softmax(-1).gather(-1, batch["target"].clamp(min=0)[..., None])[..., 0]
    nll = -(logprob * scored).sum(1) / scored.sum(1)
    loss = 0.5 * nll[batch["is_label"]].sum() / QUESTIONS
    for q in batch["question"].unique():
        mine = (batch["question"] == q) & ~batch["is_label"]
        best, worst = nll[mine & batch["positive"]].min(), nll[mine & ~batch["positive"]].max()
        loss = loss + 0.5 * (best - 0.2 * torch.clamp(worst - DELTA, max=0)) / QUESTIONS
    return loss


def make_step(provider: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return (a function that runs one step of the provider and returns the loss, its description)."""
    import torch
    import transformers
    from transformers import T5Config, T5ForConditionalGeneration

    from qcrd_fast import QCRDLoss, attach

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = T5Config(vocab_size=V, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    model, batch = T5ForConditionalGeneration(config).train(), make_batch()
    attach(model, QCRDLoss.for_model(model, delta=DELTA), two_pass=provider == "attach-two-passes")

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = loss_from_logits(model, batch) if provider == "logits" else model(**batch).loss
        loss.backward()
        return loss.item()

    versions = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return step, {"tokens": int((batch["target"] != -100).sum()), "vocabulary": V, **versions}


def memory(provider: str) -> dict[str, Any]:
    """Measure one provider in a new process: the peak of the first step and of the whole process."""
    import torch

    from .timing import peak_mib

    step, where = make_step(provider)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    loss = step()
    process_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    peak = peak_mib(step, torch.device("cpu"))
    return {
        "provider": provider,
        "loss": round(loss, 6),
        "step_mib": round(peak, 1),
        "resident_before_mib": round(before, 1),
        "process_peak_mib": round(process_mib, 1),
        **where,
    }


def processor_ms() -> dict[str, list[float]]:
    """Measure CPU time of each provider's steps in turn; wall time would count other processes too."""
    steps = {provider: make_step(provider)[0] for provider in PROVIDERS}
    times: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for _ in range(1 + ROUNDS):
        for provider, step in steps.items():
            started = time.process_time()
            step()
            times[provider].append(1e3 * (time.process_time() - started))
    return {provider: sorted(values[1:]) for provider, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help=f"add the rows to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--only", choices=(*PROVIDERS, "time"), help="measure this one in this process and print it")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(processor_ms() if args.only == "time" else memory(args.only)))
        return

    from qcrd_fast.utils.environment import commit

    from .record import append

    def run(only: str) -> Any:
        command = [sys.executable, "-m", __spec__.name, "--only", only]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return json.loads(done.stdout)

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    where = {"device": f"CPU {platform.machine()} x{os.cpu_count()}", "commit": commit(), "time": now}
    times, rows = run("time"), []
    for provider in PROVIDERS:
        ms = times[provider]
        spread = {"cpu_ms": round(ms[len(ms) // 2], 1), "cpu_ms_min": round(ms[0], 1), "cpu_ms_max": round(ms[-1], 1)}
        rows.append(run(provider) | spread | where)
        assert abs(rows[-1]["loss"] - rows[0]["loss"]) < 1e-4 * rows[0]["loss"], (
            f"{provider} computed another loss: {rows[-1]}"
        )
        share = {name: rows[-1][name] / rows[0][name] for name in ("step_mib", "cpu_ms", "process_peak_mib")}
        print(f"{provider:18}", *(f"{name} {rows[-1][name]} ({value:.2f} of logits)" for name, value in share.items()))
    if args.append:
        append(RESULTS, list(rows[0]), rows, digits=8)  # of the loss, which shows that all computed the same


if __name__ == "__main__":
    main()
