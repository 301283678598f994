"""The benchmark of threads measures both and appends its rows."""

import csv

import torch
from qcrd_fast.bench import threads

from qcrd_fast.utils.device import threads_kept


def test_it_measures_one_thread_and_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "RESULTS", tmp_path / "threads.csv")
    monkeypatch.setattr(threads, "SIZES", ((16, 1),))
    with threads_kept():
        threads.main(["--repeats", "1", "--append"])
        assert torch.get_num_threads() == 2
    assert "parameters" in capsys.readouterr().out
    with open(tmp_path / "threads.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["of_one"]) > 0 and int(row["parameters"]) > 512 * 16
