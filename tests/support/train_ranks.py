"""Runs of `train` in one or more processes, forked from a warm one; `distributed/test_distributed.py` runs `main`.

A scenario is {"size": processes, "config": options of train, "float64": whether all is computed so, "inject": {"rank",
"step", "signal"} or nothing}: before that step that rank sends itself that signal. Prints a line a scenario: {"codes":
exit code by rank, "seconds": since the injection, by rank, "said": to stderr, by ranks that failed}. A process that is
stopped is killed once the others have ended.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import peft
import transformers
from qcrd_fast.cli import console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qcrd_fast.config import TrainConfig
from qcrd_fast.train import trainer as module
from tests.support.doubles import doubles
from tests.support.fork_ranks import run_ranks
from tests.support.students import narrow_discriminators


def train(rank, scenario, mark):
    inject = scenario.get("inject")
    if inject and inject["rank"] == rank:
        step = module.Trainer._train_step

        def injecting(self):
            if self.step == inject["step"]:
                with open(mark, "w") as file:
                    file.write(str(time.time()))
                os.kill(os.getpid(), getattr(signal, inject["signal"]))
            step(self)

        module.Trainer._train_step = injecting
    with narrow_discriminators(), doubles() if scenario["float64"] else contextlib.nullcontext():
        sys.exit(console.run(lambda: module.train(TrainConfig(**scenario["config"])) and 0))


def run(scenario):
    mark = f"{scenario['config']['output_dir']}.mark"
    ended = run_ranks(lambda rank: train(rank, scenario, mark), scenario["size"], scenario.get("timeout", 120))
    at = float(Path(mark).read_text()) if os.path.exists(mark) else None
    return {
        "codes": ended.code,
        "seconds": [at and end - at for end in ended.at],
        "said": [said if code else "" for code, said in zip(ended.code, ended.said, strict=True)],
    }


# What a run would import, so that it is there before the forks.
LOADED = (
    fully_shard,
    DTensor,
    init_device_mesh,
    peft.LoraConfig,
    transformers.LlamaForCausalLM,
    transformers.T5ForConditionalGeneration,
)


def main(scenarios):
    transformers.logging.set_verbosity_error()
    for scenario in scenarios:
        print(json.dumps(run(scenario)), flush=True)
