"""Measurements are added to CSV files: those in the repository can be added to, and no file gets rows of other
columns."""

import csv
import importlib
import shutil
from pathlib import Path

import pytest
import torch

from bench import record
from cli.main import entry
from qcrd_fast.errors import InputError

RESULTS = Path(record.__file__).parent / "results"


@pytest.mark.parametrize("name", ["loss", "sampler", "step", "prompts"])
def test_rows_are_added_to_the_files_that_are_there(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"bench.{name}")
    path = tmp_path / f"{name}.csv"
    shutil.copy(RESULTS / path.name, path)
    before = path.read_text()
    where = record.describe_machine(torch.device("cpu"))
    record.append(path, module.COLUMNS, [{**where, "repeats": 3, "ms": 1.23456789, "not a column": 1}])
    assert path.read_text().startswith(before)
    *_, last = csv.DictReader(path.read_text().splitlines())
    assert set(last) == set(module.COLUMNS) and last["repeats"] == "3" and last["commit"] == where["commit"]
    assert last["torch"] == torch.__version__ and last.get("ms", "1.2346") == "1.2346"


def test_every_file_has_plain_line_ends() -> None:
    assert [path.name for path in RESULTS.glob("*.csv") if b"\r" in path.read_bytes()] == []


def test_other_columns_are_refused_and_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.touch()
    record.append(path, ["a", "b"], [{"a": 0.123456789, "b": None}])
    record.append(path, ["a", "b"], [{"a": 0.123456789}], digits=8)
    assert path.read_text() == "a,b\n0.12346,\n0.12345679,\n"
    with pytest.raises(InputError, match="other columns"):
        record.append(path, ["a"], [{"a": 1}])
    with pytest.raises(InputError, match="no folder"):
        record.append(tmp_path / "gone" / "x.csv", ["a"], [{"a": 1}])
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("name", ["sampler", "step"])
def test_a_file_that_cannot_take_the_rows_is_found_before_anything_is_timed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "x.csv")
    monkeypatch.setattr(module, "run_case", lambda *_: pytest.fail("it began"))
    (tmp_path / "x.csv").write_text("other,columns\n")
    assert entry(["bench", name, "--device", "cpu", "--append"]) == 2
    assert "other columns" in capsys.readouterr().err
