"""Two forked gloo ranks share a run, and one fails and lives on; `distributed/test_distributed.py` runs `main`.

Prints {case: [what each rank raised, whether it noticed at once]}, the cases one after another in the same processes.
"""

import json
import time

import torch
import torch.distributed as dist

from qcrd_fast.distributed.comm import process_group
from qcrd_fast.errors import InputError, RunError
from tests.support.fork_ranks import fork_ranks

CPU, TIMEOUT_S = torch.device("cpu"), 30.0


def outcome(run):
    began = time.monotonic()
    try:
        run()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"[:60], time.monotonic() - began < TIMEOUT_S / 2]
    return ["ended", True]


def shared(comm, error):
    """What a run is to its group: DDP that holds on to it, an error of one rank, a sum."""
    held = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    if comm.rank == 1 and error:
        raise error
    comm.sum(held(torch.ones(2)).detach())


def failing(error):
    def run():
        with process_group(CPU, TIMEOUT_S) as comm:
            shared(comm, error)

    return run


def owned():
    dist.init_process_group("gloo")
    try:
        return outcome(failing(None))
    finally:
        dist.destroy_process_group()


def child(_):
    errors = {
        "first": None,
        "input": InputError("an option"),
        "run": RunError("a step"),
        "bug": KeyError("a bug"),
        "last": None,
    }
    return {name: outcome(failing(error)) for name, error in errors.items()} | {"owned": owned()}


def main():
    both = fork_ranks(child, 2, timeout_s=60)
    print(json.dumps({name: [found[name] for found in both] for name in both[0]}))
