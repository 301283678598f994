"""`report`: what is on the page, whatever state a run is in; hostile text; nothing is written into a run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cli.main import entry
from qcrd_fast.errors import InputError
from qcrd_fast.report.page import render, write_report
from qcrd_fast.report.run_view import read_objects, read_run

pytest.importorskip("matplotlib", reason="needs matplotlib, the extra `report`")
from qcrd_fast.report.charts import MAX_POINTS, Line, density, line_chart, thin
from tests.support.report_runs import HOSTILE, check, make_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", beta=0.3, negative_source="minority")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    summary = write_report([str(run)], str(tmp_path / "r.html"))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir()) == before
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = check(text)
    assert summary["runs"] == [{"name": "one", "state": "finished", "steps_logged": 40, "scores": 120}]
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 8 and "Discriminator's loss, L_D (Eq. 2)" not in charts  # nothing of that is logged
    for wanted in (
        "0.250", "0.195 to 0.314", "200", "--beta 0.3", "--negative-source minority", "teacher minority: n 30",
        "student at 2",
        "AUC 0.957", "4 wrong", "Question 0", "solid: student's negatives",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "prefers-color-scheme:dark" in text and "currentColor" in text and "width=device-width" in text
    drawn = text[text.index("<svg") :]
    assert not re.search(r"(?:stroke|fill): (?:#0|#f{3}|black|white)", drawn)  # no ink that either theme would swallow


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    assert render(runs) == render(runs)
    assert render(runs) != render(runs[:1])


def test_several_runs_stand_in_one_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", seed=i, method=m) for i, m in enumerate(("qcrd", "dss", "finetune"))]
    page = check(render([read_run(run) for run in runs]))
    assert all(f"run{i}" in page.text for i in range(3)) and "dss" in page.text and "3 runs" in page.text
    assert [tag for tag, _ in page.tags].count("tr") > 3


def test_a_run_given_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (make_run(tmp_path / name) for name in ("one", "two"))
    (tmp_path / "again").symlink_to(one)
    monkeypatch.chdir(tmp_path)
    told = write_report([str(one), "two", "one/", str(tmp_path / "again"), str(two)], str(tmp_path / "r.html"))
    assert [run["name"] for run in told["runs"]] == ["one", "two"]
    assert check((tmp_path / "r.html").read_text(encoding="utf-8")).text.count("2 runs")


def test_raw_outputs_and_greedy_rationales_of_every_method(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / method, method=method) for method in ("qcrd", "finetune")]
    for run in runs:
        said = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        for record in said:
            record["output"] = f"raw {record['id']} of {run.name}"
        said[8]["rationale"] = f"as {run.name} explains q8"  # the last: it is shown before those without
        said[7] |= {"prediction": None, "output": ""}
        (run / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in said))
    (runs[1] / "rationales.jsonl").write_text(json.dumps({"id": "q3", "rationale": "judged q3"}) + "\n")
    text = check(render([read_run(run) for run in runs])).text
    for wanted in (
        "raw q8 of qcrd",
        "as qcrd explains q8",
        "as finetune explains q8",
        "judged q3",
        "of these 1 without a readable",
    ):
        assert wanted in text, wanted


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = []
    for parent in "ab":
        (tmp_path / parent).mkdir()
        runs.append(str(make_run(tmp_path / parent / "run")))
    assert [r["name"] for r in write_report(runs, str(tmp_path / "r.html"))["runs"]] == runs


def test_switches_that_all_runs_share_stand_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", beta=0.3, negative_lag=i + 1) for i in range(3)]
    (tmp_path / "empty").mkdir()
    text = check(render([read_run(run) for run in (*runs, tmp_path / "empty")])).text
    assert text.count("--beta 0.3") == 1 and "in all runs: --beta 0.3" in text
    assert all(text.count(f"--negative-lag {i}") == 1 for i in (1, 2, 3))


def test_a_refused_discriminator_is_said(tmp_path: Path) -> None:
    for low, refused, wanted in (
        (
            0.55,
            False,
            "held-out AUC 0.700, lower bound 0.550; rejected (the lower bound must reach 0.6); the vote weighs",
        ),
        (0.65, False, "held-out AUC 0.700, lower bound 0.650; in use"),
        (None, True, "held-out AUC unknown; rejected"),
    ):
        run = make_run(tmp_path / str(low), discriminator_min_auc=0.6)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told = {"discriminator_auc": 0.7 if low else None, "discriminator_auc_low": low}
        (run / "metrics.jsonl").write_text("".join(json.dumps(line | told) + "\n" for line in lines))
        results = json.loads((run / "eval_results.json").read_text())
        (run / "eval_results.json").write_text(json.dumps(results | {"discriminator_refused": refused}))
        assert wanted in check(render([read_run(run)])).text
    assert "The discriminator, on questions" not in check(render([read_run(make_run(tmp_path / "none"))])).text


@pytest.mark.parametrize("state", ["empty", "crashed", "garbage"])
def test_runs_in_any_state(tmp_path: Path, state: str) -> None:
    run = tmp_path / state
    if state == "empty":
        run.mkdir()
    else:
        make_run(run)
        (run / "eval_results.json").unlink()
        (run / "quality_scores.jsonl").unlink()
    if state == "crashed":
        whole = (run / "metrics.jsonl").read_bytes()
        (run / "metrics.jsonl").write_bytes(whole[: whole.index(b'"step": 21,') + 40])
        (run / "eval_results.json").write_text('{"accuracy"')
    if state == "garbage":
        (run / "metrics.jsonl").write_bytes(
            b'\xff\xfe\x00\n[1]\n{"step": "x"}\n{"step": 1, "loss": NaN, "loss_cl": 1e999, "loss_pred": "high"}\n'
            b'{"step": 2, "loss": 1' + b"0" * 400 + b"}\n" + b'{"step": 3, "loss": 0.5}\n'
        )
        for name in ("eval_results.json", "config.resolved.yaml", "predictions.jsonl", "quality_scores.jsonl"):
            (run / name).write_bytes(b"\x80[{]: !!python/object:os.system\n")
    summary = write_report([str(run)], str(tmp_path / "r.html"))
    page = check((tmp_path / "r.html").read_text(encoding="utf-8"))
    said = {"empty": "no step logged", "crashed": "not finished, step 20", "garbage": "not finished, step 3"}[state]
    assert said in summary["runs"][0]["state"] and said in page.text
    assert "qcrd-fast score" in page.text  # where the missing scores come from
    assert ("Nothing is logged yet" in page.text) == (state == "empty")


def test_a_folder_of_another_kind_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"model: no run folder: it has no config.resolved.yaml"):
        read_run(tmp_path / "model")


def test_a_running_run_is_named_and_neither_locked_nor_touched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "eval_results.json").unlink()
    lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    os.write(lock, f"{os.getpid()}\n".encode())
    fcntl.flock(lock, fcntl.LOCK_EX)
    run.chmod(0o555)
    try:
        assert read_run(run).state == "running, step 40"
        write_report([str(run)], str(tmp_path / "r.html"))
    finally:
        run.chmod(0o755)
        os.close(lock)
    assert read_run(run).state == "not finished, step 40"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a$b&<i>", text=HOSTILE)
    (run / "config.resolved.yaml").write_text(
        yaml.safe_dump({"method": HOSTILE, "scheme": [1], "seed": {"x": HOSTILE}, "label": HOSTILE})
    )
    (run / "eval_results.json").write_text(json.dumps({"accuracy": HOSTILE, "n": HOSTILE, "evaluated_on": HOSTILE}))
    text = render([read_run(run)])
    page = check(text)
    assert (
        "<script>alert(1)</script>" in page.text
        and "<script" not in text
        and "onerror=alert" not in text.replace("x onerror", "")
    )
    assert "default-src 'none'" in text and "\x00" not in text and "\x1b" not in text and "\u202e" not in text


def test_student_negatives_stand_beside_the_teacher_without_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=str(tmp_path / "rows.jsonl"))
    (run / "quality_scores.jsonl").unlink()
    rows = [
        {"id": "q1", "question": "One?", "majority": "1", "positives": ["It is one."], "negatives": [], "votes": {}}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "negatives").mkdir()
    for iteration, text in ((0, "early words"), (1, "late words")):
        lines = [{"chunk": 0, "id": "q1", "tokens": [1], "text": text}, {"chunk": 0, "end": 1}]
        (run / "negatives" / f"iteration-{iteration:05d}.jsonl").write_text(
            "".join(json.dumps(x) + "\n" for x in lines)
        )
    text = check(render([read_run(run)])).text
    assert "It is one." in text and "late words" in text and "early words" not in text and "iteration 1" in text


def test_the_densities_of_a_run_by_votes(tmp_path: Path) -> None:
    """They need no stored scores: teacher right and minority, student samples that agree, differ, or were cut."""
    run = make_run(tmp_path / "run", data=str(tmp_path / "rows.jsonl"), quality="vote")
    (run / "quality_scores.jsonl").unlink()
    said = {"q1": ("So it is 7.", {}), "q2": ("So it is 9.", {}), "q3": ("So", {"cut": True})}
    with open(tmp_path / "rows.jsonl", "w") as rows:
        for i in said:
            row = {"id": i, "question": f"What is {i}?", "majority": "7", "votes": {"7": 4, "9": 1}, "task": "number"}
            row |= {
                "positives": [{"text": "It is 7.", "answer": "7"}],
                "negatives": [{"text": "It is 9.", "answer": "9"}],
            }
            rows.write(json.dumps(row) + "\n")
    (run / "negatives").mkdir()
    lines = [{"chunk": 0, "id": i, "tokens": [1], "text": text, **more} for i, (text, more) in said.items()]
    (run / "negatives" / "iteration-00001.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in [*lines, {"chunk": 0, "end": 3}])
    )
    text = check(render([read_run(run)])).text
    for kind, mean in (
        ("teacher positive: n 3", 0.900), ("teacher minority: n 3", 0.100),
        ("student, agrees with the majority: n 1", 0.900),
        ("student, differs from it: n 1", 0.100), ("student, no conclusion: n 1", 0.500),
    ):  # fmt: skip
        assert f"{kind}, mean {mean:.3f}" in text, text[-3000:]
    assert "last iteration's negatives" in text


def test_the_densities_of_many_kinds_without_a_minority(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = [{"kind": "teacher positive", "score": 0.9}]
    scores += [{"kind": f"student at {t}", "score": 0.5, "agrees": a} for t in range(9) for a in (True, False, None)]
    (run / "quality_scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    text = check(render([read_run(run)])).text
    assert "student at 7, differs from it: n 1, mean 0.500" in text and "student at 8, differs" not in text
    assert "4 more kinds are left out" in text


def test_what_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    run = make_run(tmp_path / "run")
    for args, message in (
        ([str(tmp_path / "no"), "-o", str(tmp_path / "r.html")], "no such run folder"),
        ([str(run), "-o", str(run / "metrics.jsonl")], "does not end in .html"),
        ([str(run), "-o", str(tmp_path / "no" / "r.html")], "folder that exists"),
    ):
        assert entry(["report", *args]) == 2 and message in capsys.readouterr().err
    assert entry(["report", str(run), "-o", str(tmp_path / "r.html"), "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out and not (tmp_path / "r.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"qcrd-fast\[report\]"):
        write_report([str(run)], str(tmp_path / "r.html"))


# ---- pieces ----


def test_densities_have_mass_one_and_peak_where_the_scores_are() -> None:
    grid = np.linspace(0, 1, 2001)
    for scores in ([0.0], [1.0], [0.5], np.random.default_rng(0).random(50)):
        assert abs(np.trapezoid(density(scores, grid), grid) - 1) < 1e-3
    assert grid[density([0.3, 0.3, 0.9], grid).argmax()] == pytest.approx(0.3, abs=0.01)


def test_long_series_are_averaged_and_short_ones_kept() -> None:
    x, y = thin(range(100_000), [1.0, 3.0] * 50_000)
    assert len(x) == MAX_POINTS and np.allclose(y, 2.0) and np.all(np.diff(x) > 0)
    assert thin([1, 2], [3, 4])[1].tolist() == [3, 4]
    assert len(line_chart("c", [Line(range(100_000), [0.0] * 100_000, "#123456")], title="t")) < 40_000


def test_reading_lines_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * (2 << 20) + b'"}\n' + b'{"c": 2}\n' + b'{"cut": ')
    assert list(read_objects(path)) == [{"a": 1}, {"c": 2}]
    assert list(read_objects(tmp_path / "none")) == [] and list(read_objects(tmp_path)) == []


def test_spaces_and_joiners_of_other_languages_stay(tmp_path: Path) -> None:
    text = "10\u202f000\u00a0€, \u6771\u3000\u4eac, \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert text in check(render([read_run(make_run(tmp_path / "run", text=text))])).text
