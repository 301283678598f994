"""Two forked gloo ranks share a run, and one fails and lives on; `distributed/test_distributed.py` runs `main`.

Prints {case: [what each rank raised, whether it noticed at once]}, the cases one after another in the same processes.
"""

import faulthandler
import json
import os
import time

import torch
import torch.distributed as dist

from qcrd_fast.distributed.comm import process_group
from qcrd_fast.errors import InputError, RunError
from tests.support.train_ranks import free_port

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


def child(rank, port, pipe):
    faulthandler.dump_traceback_later(60, exit=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    errors = {
        "first": None,
        "input": InputError("an option"),
        "run": RunError("a step"),
        "bug": KeyError("a bug"),
        "last": None,
    }
    found = {name: outcome(failing(error)) for name, error in errors.items()} | {"owned": owned()}
    os.write(pipe, json.dumps(found).encode())
    os._exit(0)


def main():
    port, pipes = free_port(), []
    for rank in range(2):
        reader, writer = os.pipe()
        if os.fork() == 0:
            child(rank, port, writer)
        os.close(writer)
        pipes.append(os.fdopen(reader))
    both = [json.load(pipe) for pipe in pipes]
    print(json.dumps({name: [found[name] for found in both] for name in both[0]}))
