"""docs/formats.md: each row is read as the format it says, trains, and each option that it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.main import cli, entry
from qcrd_fast.config import ELSEWHERE, option_names
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split("## From TRL")[1]
DATA, OPTIONS = PAGE.split("## Data")[1].split("## Options")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| `(.+?)` \| `(\{.+\})` \|$", DATA, re.MULTILINE)


def test_the_table_of_formats_is_read_whole():
    assert len(ROWS) == DATA.count("\n| ") - 1 == 9


@pytest.mark.parametrize(("tool", "name", "format", "row"), ROWS, ids=[f"{row[0]}, {row[1]}" for row in ROWS])
def test_their_rows_are_read(tool: str, name: str, format: str, row: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    assert entry(["prepare", str(file), "--output", str(tmp_path / "out.jsonl"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["format"] == format
    prepared = json.loads((tmp_path / "out.jsonl").read_text())
    assert prepared["majority"] == "4" and len(prepared["positives"]) == (2 if "generations" in row else 1)
    assert len(prepared["negatives"]) == (1 if "rejected" in row or "generations" in row else 0)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "2 + 2? It is 4."},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "It is 4."},
         "rejected": {"from": "gpt", "value": "It is 5."}},
    ],
)  # fmt: skip
def test_what_the_page_calls_refused_is_refused(row, tmp_path: Path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert entry(["prepare", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_every_option_that_it_names_exists() -> None:
    trained = {name.replace("_", "-") for name in option_names()}
    collected = {flag for param in cli.commands["collect"].params for flag in param.opts}
    rows = [line.split("|")[2] for line in OPTIONS.splitlines() if line.startswith("| ") and "here" not in line]
    assert len(rows) > 25
    for cell in rows:
        for flag in re.findall(r"--([a-z0-9-]+)", cell):
            assert f"--{flag}" in collected if "collect" in cell else flag in trained, flag


def test_names_of_other_tools_lead_to_options_that_exist() -> None:
    for other, told in ELSEWHERE.items():
        assert other not in option_names()
        for flag in re.findall(r"--([a-z-]+)", told):
            assert flag.replace("-", "_") in option_names() or flag == "num-samples", other


def test_a_file_of_another_tool_trains_without_preparation(t5_folder, tmp_path: Path, capsys) -> None:
    rows = [{"instruction": f"Ann has {n} coins and finds {n + 1}. How many are left?",
             "generations": [f"{n} + {n + 1} = {2 * n + 1}. The answer is {2 * n + 1}."] * 2 + [f"The answer is {n}."]}
            for n in range(2, 12)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "train",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--model",
        str(t5_folder),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert entry([*args, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["train"], plan["validation"], plan["task"]) == (9, 1, "number")
    assert not (tmp_path / "run").exists()
