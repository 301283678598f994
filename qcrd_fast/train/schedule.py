"""Which questions a step trains on, which iteration and chunk it belongs to, and its learning rate.

Everything here is a pure function of the configuration and the step, so a resumed run needs no cursor. Steps,
iterations and chunks count from 0.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qcrd_fast.config import TrainConfig
from qcrd_fast.train.methods import is_on_policy


@dataclasses.dataclass(frozen=True)
class Schedule:
    num_questions: int
    config: TrainConfig
    world_size: int = 1  # processes that share a step's questions

    @property
    def questions_per_step(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_questions / self.questions_per_step)

    @property
    def total_steps(self) -> int:
        if self.config.max_steps > 0:
            return self.config.max_steps
        return max(1, math.ceil(self.config.num_train_epochs * self.steps_per_epoch))

    @property
    def iteration_steps(self) -> int:
        """As given; else one pass over the data, or, of an on-policy method, as many steps as one sampling batch
        feeds."""
        if self.config.iteration_steps or not is_on_policy(self.config):
            return self.config.iteration_steps or self.steps_per_epoch
        return min(math.ceil(self.config.sample_batch_size / self.questions_per_step), self.steps_per_epoch)

    @property
    def save_steps(self) -> int:
        return self.config.save_steps or self.steps_per_epoch

    @property
    def eval_steps(self) -> int:
        return self.config.eval_steps or self.save_steps

    def questions(self, step: int) -> list[int]:
        """Return the indices of a step's questions: a slice of its epoch's shuffled order, shorter at its end."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch])).permutation(self.num_questions)
        return order[at * self.questions_per_step : (at + 1) * self.questions_per_step].tolist()

    def micro_batches(self, step: int, rank: int = 0) -> list[list[int]]:
        """Return a rank's questions of a step by micro-batch: every `world_size`-th question.

        All ranks get the same number of micro-batches; one is empty if a short step leaves a rank fewer questions.
        """
        questions, size = self.questions(step), self.config.per_device_train_batch_size
        own = questions[rank :: self.world_size]
        return [own[i : i + size] for i in range(0, math.ceil(len(questions) / self.world_size), size)]

    # Iterations and the chunks that negatives are drawn in

    def iteration(self, step: int) -> int:
        return step // self.iteration_steps

    @property
    def chunk_steps(self) -> int:
        """Steps of a chunk: as many as one sampling batch of each process feeds."""
        return math.ceil(self.config.sample_batch_size * self.world_size / self.questions_per_step)

    def chunk(self, step: int) -> tuple[int, int]:
        """(iteration, chunk within it) of a step."""
        return self.iteration(step), step % self.iteration_steps // self.chunk_steps

    def first_steps(self, iteration: int) -> range:
        """The first step of each chunk of an iteration."""
        start = iteration * self.iteration_steps
        return range(start, start + self.iteration_steps, self.chunk_steps)

    def chunk_questions(self, iteration: int, chunk: int) -> list[int]:
        """Indices of a chunk's questions, each once, in the order of their first step."""
        start = iteration * self.iteration_steps
        steps = range(
            start + chunk * self.chunk_steps, start + min((chunk + 1) * self.chunk_steps, self.iteration_steps)
        )
        return list(dict.fromkeys(i for step in steps for i in self.questions(step)))

    # Optimization

    @property
    def warmup_steps(self) -> int:
        return self.config.warmup_steps or math.ceil(self.config.warmup_ratio * self.total_steps)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then the chosen decay to 0 at the last step, as in Hugging Face."""
        config, total, warmup = self.config, self.total_steps, self.warmup_steps
        if step < warmup:
            return config.learning_rate * step / warmup
        progress = (step - warmup) / max(1, total - warmup)
        factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}
        return config.learning_rate * factor[config.lr_scheduler_type]

    def alpha_d(self, iteration: int) -> float:
        """a3 of Eq. 8: alpha_d, times its decay each iteration."""
        return self.config.alpha_d * self.config.alpha_d_decay**iteration
