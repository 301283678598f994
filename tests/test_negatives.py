"""Which student speaks, and what survives in the store."""

import pytest
import torch

from qcrd_fast.config import TrainConfig
from qcrd_fast.negatives import LaggedNegatives, Snapshots
from qcrd_fast.schedule import Schedule


def lagged(tmp_path, **options):
    config = TrainConfig(**options)
    return LaggedNegatives(None, [], Schedule(8, config), Snapshots(tmp_path), tmp_path, config, lambda: None)


@pytest.mark.parametrize("lag, expected", [(1, [0, 0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 0, 1, 2, 3]), (5, [0, 0, 0, 0, 0, 0, 1])])
def test_iteration_t_listens_to_iteration_t_minus_j_and_before_that_to_the_initial_student(tmp_path, lag, expected):
    assert [lagged(tmp_path, negative_lag=lag).source_iteration(t) for t in range(7)] == expected


def test_fixed_is_always_the_initial_student(tmp_path):
    assert {lagged(tmp_path, negative_source="fixed").source_iteration(t) for t in range(7)} == {0}


def test_snapshots_come_back_and_old_ones_go(tmp_path):
    snapshots = Snapshots(tmp_path / "snapshots")
    model = torch.nn.Linear(3, 2)
    for iteration in range(4):
        with torch.no_grad():
            model.weight.fill_(iteration + 0.5)
        snapshots.save(iteration, model)
    snapshots.load_into(1, model)
    assert model.weight.eq(1.5).all()
    snapshots.prune(oldest=2, keep_initial=True)
    assert sorted(p.name for p in snapshots.folder.iterdir()) == [snapshots.path(i).name for i in (0, 2, 3)]
    assert sorted(snapshots.digests(oldest=2)) == [2, 3]
