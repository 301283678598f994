"""The recipe of mentors runs through, from a teacher's rows to a student, and may be started again."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support.paths import ROOT
from tests.support.students import sampled_rows


@pytest.mark.slow
def test_the_recipe_of_mentors_runs_through(llama_folder, warm, tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(12)))
    test.write_text("".join(json.dumps(row) + "\n" for row in sampled_rows(4, seed=9)))
    small = "--max-steps 2 --per-device-train-batch-size 4 --max-answer-tokens 4 --max-new-tokens 8"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAIN": str(train), "TEST": str(test),
        "OUT": str(tmp_path / "out"), "MENTOR": str(llama_folder), "STUDENT": str(llama_folder),
        "MENTOR_OPTIONS": small, "STUDENT_OPTIONS": small,
    }  # fmt: skip

    def run() -> dict:
        subprocess.run(["sh", str(ROOT / "recipes" / "mentors.sh")], env=environment, cwd=ROOT, check=True)
        return json.loads((tmp_path / "out" / "student" / "eval_results.json").read_text())

    with warm.command(tmp_path / "qcrd-fast"):
        first, again = run(), run()
    assert first["n"] == 4 and first["steps"] == 2
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and all(len(row["samples"]) == 3 for row in samples)
    assert again == first
