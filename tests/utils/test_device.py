"""How many threads a student trains with on a CPU."""

import pytest
import torch

from qcrd_fast.utils.device import ONE_THREAD, choose_threads, threads_kept


@pytest.mark.parametrize(
    "device, parameters, variable, threads",
    [
        ("cpu", ONE_THREAD - 1, None, 1),
        ("cpu", ONE_THREAD, None, 3),
        ("cuda", 1000, None, 3),
        ("cpu", 1000, "3", 3),  # the user's word
    ],
)
def test_a_small_student_has_one_thread_unless_told_otherwise(device, parameters, variable, threads, monkeypatch):
    before = torch.get_num_threads()
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_kept():
        torch.set_num_threads(3)
        with threads_kept():
            choose_threads(torch.device(device), parameters)
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
