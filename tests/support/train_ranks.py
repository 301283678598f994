"""Runs of `train` in one or more processes, forked from a warm one; `distributed/test_distributed.py` runs `main`.

A scenario is {"size": processes, "config": options of train, "float64": whether all is computed so, "inject": {"rank",
"step", "signal"} or nothing}: before that step that rank sends itself that signal. Prints a line a scenario: {"codes":
exit code by rank, "seconds": since the injection, by rank, "said": to stderr, by ranks that failed}. A process that is
stopped is killed once the others have ended.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
import traceback
from pathlib import Path

import peft
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers
from qcrd_fast.cli import console

from qcrd_fast.config import TrainConfig
from qcrd_fast.train import trainer as module
from tests.support.doubles import doubles
from tests.support.students import narrow_discriminators


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def said(scenario, rank):
    """What a rank writes to stderr."""
    return f"{scenario['config']['output_dir']}.rank-{rank}.txt"


def child(rank, scenario, port, mark):
    size, inject = scenario["size"], scenario.get("inject")
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    torch.set_num_threads(1)
    with open(said(scenario, rank), "wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    if inject and inject["rank"] == rank:
        step = module.Trainer._train_step

        def injecting(self):
            if self.step == inject["step"]:
                with open(mark, "w") as file:
                    file.write(str(time.time()))
                os.kill(os.getpid(), getattr(signal, inject["signal"]))
            step(self)

        module.Trainer._train_step = injecting
    code = 70
    try:
        with narrow_discriminators(), doubles() if scenario["float64"] else contextlib.nullcontext():
            code = console.run(lambda: module.train(TrainConfig(**scenario["config"])) and 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def run(scenario):
    port, mark = free_port(), f"{scenario['config']['output_dir']}.mark"
    started = {}
    for rank in range(scenario["size"]):
        pid = os.fork()
        if pid == 0:
            child(rank, scenario, port, mark)
        started[pid] = rank
    codes, ended, stopped = {}, {}, set()
    deadline = time.time() + scenario.get("timeout", 120)
    while len(codes) < scenario["size"]:
        for pid, rank in started.items():
            if rank in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                codes[rank], ended[rank] = os.waitstatus_to_exitcode(status), time.time()
        alive = {pid for pid, rank in started.items() if rank not in codes}
        if alive and (alive <= stopped or time.time() > deadline):
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    at = float(Path(mark).read_text()) if os.path.exists(mark) else None
    seconds = {rank: end - at for rank, end in ended.items()} if at else {}
    return {
        "codes": [codes[r] for r in range(scenario["size"])],
        "seconds": [seconds.get(r) for r in range(scenario["size"])],
        "said": ["" if codes[r] == 0 else Path(said(scenario, r)).read_text()[-3000:] for r in range(scenario["size"])],
    }


# What a run would import, so that it is there before the forks.
LOADED = (peft.LoraConfig, transformers.LlamaForCausalLM, transformers.T5ForConditionalGeneration)


def main(scenarios):
    transformers.logging.set_verbosity_error()
    for scenario in scenarios:
        print(json.dumps(run(scenario)), flush=True)
