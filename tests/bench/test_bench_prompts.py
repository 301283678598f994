"""The benchmark of shared prompts runs, counts what it says it counts, and appends its rows."""

import csv

import pytest

from bench import prompts


@pytest.mark.parametrize("shape", [[], ["--shape", "t5-small"]], ids=["own", "t5-small"])
def test_it_measures_both_ways_on_the_same_questions(shape, rows_file, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "RESULTS", tmp_path / "prompts.csv")
    monkeypatch.setattr(prompts, "T5_SMALL", dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    options = [
        "--data",
        str(rows_file),
        "--student",
        str(llama_folder),
        "--questions",
        "2",
        "--repeats",
        "2",
        "--append",
    ]
    for _ in range(2):
        prompts.main([*options, *shape])
    capsys.readouterr()
    with open(tmp_path / "prompts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["pass"] for row in rows] == ["score", "step", "score", "step"]
    for row in rows:
        assert (
            float(row["ms_shared"]) > 0
            and float(row["ms_alone"]) > 0
            and row["mask"] == ("dense" if shape else "varlen")
        )
        assert shape or int(row["tokens_shared"]) < int(row["tokens_alone"])
    assert {row["student"] for row in rows} == {"t5-small" if shape else llama_folder.name}
