"""Data order, iterations, chunks and learning rates are functions of the step alone."""

import itertools

import pytest

from qcrd_fast.config import TrainConfig
from qcrd_fast.train.schedule import Schedule


def test_an_epoch_visits_every_question_once_and_epochs_differ():
    schedule = Schedule(23, TrainConfig(per_device_train_batch_size=4, seed=3))  # 23: the last step is short
    epochs = [[q for s in range(e * 6, e * 6 + 6) for q in schedule.questions(s)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (4, 2), (2, 4)])
def test_accumulation_does_not_change_the_questions_of_a_step(batch, accumulation):
    config = TrainConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    schedule = Schedule(20, config)
    assert schedule.questions(1) == Schedule(20, TrainConfig(per_device_train_batch_size=8)).questions(1)
    assert list(itertools.chain(*schedule.micro_batches(1))) == schedule.questions(1)
    assert max(map(len, schedule.micro_batches(1))) <= batch


@pytest.mark.parametrize("iteration_steps", [None, 2, 5, 13])
def test_chunks_cover_their_iteration(iteration_steps):
    config = TrainConfig(per_device_train_batch_size=4, sample_batch_size=10, iteration_steps=iteration_steps)
    schedule = Schedule(23, config)
    for step in range(30):
        iteration, chunk = schedule.chunk(step)
        assert iteration == step // schedule.iteration_steps
        assert set(schedule.questions(step)) <= set(schedule.chunk_questions(iteration, chunk))
        assert step >= schedule.first_steps(iteration)[chunk]
        assert chunk == len(schedule.first_steps(iteration)) - 1 or step < schedule.first_steps(iteration)[chunk + 1]


def test_learning_rate_warms_up_and_decays_as_in_hugging_face():
    import torch
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for kind, make in (("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)):
        config = TrainConfig(learning_rate=0.5, max_steps=20, warmup_ratio=0.25, lr_scheduler_type=kind)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        theirs = make(optimizer, 5, 20)
        for step in range(20):
            assert Schedule(8, config).learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()


def test_alpha_d_decays_each_iteration():
    schedule = Schedule(8, TrainConfig(alpha_d=0.5, alpha_d_decay=0.9))
    assert [schedule.alpha_d(t) for t in range(3)] == pytest.approx([0.5, 0.45, 0.405])
