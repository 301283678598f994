"""Active runs in a report: the curve by strategy, the rounds, revisions side by side; nothing of a run is markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qcrd_fast.report.active_view import curves, read_active
from qcrd_fast.report.page import write_report

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert(1)</script>"


def make(folder: Path, by: str, seed: int, right: tuple[int, ...], tokens: tuple[int, ...]) -> Path:
    """A run whose student has `right[r]` of 20 questions right after round r."""
    folder.mkdir()
    config = {"active": {"by": by, "revise": "repair", "show": "all"}, "train": {"seed": seed}, "data_sha256": "x"}
    (folder / "active.resolved.yaml").write_text(yaml.safe_dump(config))
    for at, (count, spent) in enumerate(zip(right, tokens, strict=True)):
        within = folder / f"round-{at:03d}"
        within.mkdir()
        record = {"round": at, "tokens": spent, "accuracy_validation": count / 20}
        if at:
            record |= {
                "by": by,
                "revise": "repair",
                "asked": 2,
                "results": {"kept": 1, "no fault": 1},
                "mean_nll_kept": 0.5,
            }
            rows = [
                {"id": f"{HOSTILE}{at}", "mode": "repair", "explanation": f"1 + 1 = 3. {HOSTILE}",
                "explained_answer": "3",
                 "steps": 1, "wrong_step": 1, "critique": "1 + 1 is 2", "text": "1 + 1 = 2.", "answer": "2",
                 "result": "kept"},
                {"id": "b", "mode": "repair", "explanation": "Fine.", "explained_answer": "2", "steps": 1,
                "wrong_step": None,
                 "text": "Fine.", "answer": "2", "result": "no fault"},
            ]  # fmt: skip
            (within / "revisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (within / "round.json").write_text(json.dumps(record))
        (within / "predictions.jsonl").write_text(
            "".join(json.dumps({"id": f"q{i}", "correct": i < count}) + "\n" for i in range(20))
        )
    return folder


def test_a_curve_is_the_mean_over_the_seeds_of_a_strategy(tmp_path):
    views = [
        read_active(make(tmp_path / "a", "random", 0, (2, 10), (0, 1000))),
        read_active(make(tmp_path / "b", "random", 1, (2, 12), (0, 1200))),
        read_active(make(tmp_path / "c", "known", 0, (2, 16, 18), (0, 900, 1900))),
    ]
    found = curves(views)
    assert [*found] == ["random, repair", "known, repair"]
    last = found["random, repair"][-1]
    assert (last.seeds, last.tokens) == (2, (1100.0, 1000.0, 1200.0))
    assert last.accuracy[0] == pytest.approx(0.55) and 0 <= last.accuracy[1] < 0.55 < last.accuracy[2] <= 1
    assert [p.accuracy[0] for p in found["known, repair"]] == [0.1, 0.8, 0.9]


def test_runs_with_other_settings_are_another_curve(tmp_path):
    views = [read_active(make(tmp_path / name, "random", 0, (2, 10), (0, 1000))) for name in "abc"]
    views[1].config["top"] = 8
    assert [*curves(views)] == ["random, repair, top None", "random, repair, top 8", "random, repair, top None (c)"]
    assert curves(views)["random, repair, top 8"][-1].seeds == 1
    views[0].train["student"] = views[2].train["output_dir"] = "elsewhere"
    assert len(curves(views)) == 3 and len(curves(views[:1] + views[2:])) == 2


def test_the_page_shows_the_transcript_and_escapes_it(tmp_path):
    runs = [make(tmp_path / "a", "random", 0, (2, 10), (0, 1000)), make(tmp_path / "b", "known", 0, (2, 12), (0, 1000))]
    (runs[0] / "eval_results.json").write_text(json.dumps({"stopped": "budget: spent", "best_round": 1}))
    summary = write_report(list(map(str, runs)), str(tmp_path / "page.html"))
    assert [run["state"] for run in summary["runs"]] == ["finished, budget: spent", "not finished, round 1"]
    page = (tmp_path / "page.html").read_text()
    assert "Accuracy against teacher tokens" in page and "<svg" in page and HOSTILE not in page
    assert "step 1 of 1 is wrong: 1 + 1 is 2" in page and "repair: kept" in page and "repair: no fault" in page
    assert "<b>0.500</b>" in page  # of the best round


@pytest.mark.parametrize("damage", ["round-001/round.json", "round-001/predictions.jsonl", "active.resolved.yaml"])
def test_what_is_damaged_is_left_out(tmp_path, damage):
    run = make(tmp_path / "a", "random", 0, (2, 10), (0, 1000))
    (run / damage).write_text("{broken")
    write_report([str(run)], str(tmp_path / "page.html"))
    assert "Rounds" in (tmp_path / "page.html").read_text()
