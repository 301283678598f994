"""Votes and text against the gold answer on published chains, through the command, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.data.load import load_questions, write_prepared
from tests.support.paths import ROOT

FOLDER = ROOT.parent / "shared" / "data" / "mentor-kd"
T5, FLAN, YES_NO = "svamp_aug_t5_large.json", "svamp_aug_flan-t5_large.json", "strategy_qa_aug_t5_large.json"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="Mentor-KD's files are not in ../shared/data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Majority-split rows of some files, each made once."""
    folder, made = tmp_path_factory.mktemp("prepared"), {}

    def prepare(*names: str) -> Path:
        if names not in made:
            made[names] = folder / f"{len(made)}.jsonl"
            write_prepared(made[names], load_questions([FOLDER / name for name in names]).questions)
        return made[names]

    return prepare


@pytest.fixture
def score(capsys, scored):
    """What the command tells of a file, asked for once."""

    def run(data: Path, quality: str, *more: str) -> dict:
        if (data, quality, more) not in scored:
            assert entry(["score", "--quality", quality, "--data", str(data), "--json", *more]) == 0
            scored[data, quality, more] = json.loads(capsys.readouterr().out)
        return scored[data, quality, more]

    return run


@pytest.fixture(scope="module")
def scored():
    return {}


@pytest.mark.parametrize("quality", ["vote", "text"])
@pytest.mark.parametrize(
    "names, low, right, wrong, ece",
    [((T5,), 0.88, 0.80, 0.50, 0.07), ((T5, FLAN), 0.96, 0.85, 0.25, 0.07), ((YES_NO,), 0.69, 0.90, 0.80, 0.04)],
    ids=["K=3", "K=6", "yes-no"],
)
def test_the_teachers_rationales(score, prepared, quality, names, low, right, wrong, ece):
    told = score(prepared(*names), quality)
    assert told["auc_low"] >= low and told["auc_low"] < told["auc"] < told["auc_high"]
    assert told["mean_right"] >= right and told["mean_wrong"] <= wrong and told["ece"] <= ece
    assert told["without_answer"] == told["without_gold"] == 0


@pytest.mark.parametrize("quality", ["vote", "text"])
def test_other_samples_against_the_votes(score, prepared, quality, tmp_path):
    """The chains of one mentor as a student's, judged by the votes of the other."""
    data, out = prepared(T5), tmp_path / "scored.jsonl"
    told = score(data, quality, "--samples", str(FOLDER / FLAN), "--output", str(out))
    assert told["auc_low"] >= 0.93 and told["mean_right"] >= 0.75 and told["mean_wrong"] <= 0.12
    assert told["weight_on_right"] <= 0.40 and told["ece"] <= 0.15
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sum(len(row["student"]) for row in rows) == told["rationales"] and told["of_other_questions"] == 0
    assert load_questions(out).questions[0].positives[0].score == rows[0]["positives"][0]["score"]


def test_text_adds_to_the_vote_for_numbers_alone(score, prepared):
    vote, text = (score(prepared(T5), quality) for quality in ("vote", "text"))
    assert text["auc"] > vote["auc"] + 0.01 and text["mean_wrong"] < vote["mean_wrong"]
    assert score(prepared(YES_NO), "vote") == score(prepared(YES_NO), "text")
