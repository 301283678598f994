"""Time training steps with one and two CPU threads: python -m qcrd_fast.bench.threads

Forward and backward of decoders with random weights, 24 sequences of 48 tokens, 1 and 2 threads in turn; wall time,
since threads that wait for each other cost no processor time. Beside busy processes (`load`, of the last minute) a
second thread waits for its core.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from .record import append, describe_machine

RESULTS = Path(__file__).parent / "results" / "threads.csv"
SIZES = ((64, 3), (128, 4), (256, 4), (384, 6), (576, 8))  # width, layers
COLUMNS = (
    "parameters",
    "width",
    "layers",
    "ms_1",
    "ms_2",
    "of_one",
    "load",
    "cores",
    "repeats",
    "device",
    "torch",
    "commit",
    "time",
)


def measure(width: int, layers: int, repeats: int) -> dict[str, float]:
    """Return median times of a step [ms] with one thread and with two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids_BL = LlamaForCausalLM(config), torch.randint(0, 512, (24, 48))
    taken: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats + 1):
        for threads, times in taken.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            model(input_ids=ids_BL, labels=ids_BL).loss.backward()
            model.zero_grad()
            if repeat:  # the first warms up
                times.append(1e3 * (time.perf_counter() - started))
    one, two = (float(np.median(times)) for times in taken.values())
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "width": width, "layers": layers, "ms_1": one, "ms_2": two, "of_one": two / one}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--append", action="store_true", help=f"add the rows to {RESULTS.name}")
    options = parser.parse_args(arguments)
    where = describe_machine(torch.device("cpu"))
    for width, layers in SIZES:
        row = measure(width, layers, options.repeats) | {
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "repeats": options.repeats,
        }
        print(
            "{parameters:>10,} parameters: {ms_1:8.1f} ms on 1 thread, {ms_2:8.1f} on 2 ({of_one:.2f})".format(**row),
            flush=True,
        )
        if options.append:
            append(RESULTS, COLUMNS, [where | row], digits=4)


if __name__ == "__main__":
    main()
