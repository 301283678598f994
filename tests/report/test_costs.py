"""Accuracy against minutes: which runs make a point, what the minutes are, and what a page says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import entry
from qcrd_fast.config import TrainConfig
from qcrd_fast.report import costs
from qcrd_fast.report.page import render, write_report
from qcrd_fast.report.run_view import read_run
from qcrd_fast.sweep.job import Job
from qcrd_fast.sweep.results_csv import COLUMNS, append_row, row
from tests.support.report_runs import HOSTILE, check, make_run

pytest.importorskip("matplotlib", reason="needs matplotlib, the extra `report`")


def timed_run(
    folder: Path, right: int, *, attempts: tuple[float, ...] = (), device: str = "CPU x2", gpu: bool = False,
    parallel: int = 1,
    step_ms: float | None = None, **options: object,
) -> Path:  # fmt: skip
    """A finished run with `right` of 20 answers right, and the time of its attempts or of its 40 steps."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_run(folder, **options)  # type: ignore[arg-type]
    said = [{"id": f"q{i}", "gold": "7", "prediction": "7", "correct": i < right} for i in range(20)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in said))
    results = {"accuracy": right / 20, "n": 20, "evaluated_on": "test"}
    (folder / "eval_results.json").write_text(json.dumps(results))
    if attempts:
        lines = [{"seconds": s, "exit": 0, "parallel": parallel} for s in attempts]
        (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "environment.json").write_text(json.dumps({"gpu": gpu, "device": device}))
    if step_ms:
        lines = [
            {"step": s, "loss": 1.0, "step_ms": step_ms, **({"peak_mib": 9.0} if gpu else {})} for s in (10, 20, 30, 40)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def found(*runs: Path) -> dict:
    return costs.points([one for run in runs if (one := costs.of_view(read_run(run)))])


def test_seeds_of_a_method_are_one_point_with_an_interval(tmp_path: Path) -> None:
    runs = [timed_run(tmp_path / f"q{s}", 10 + s, attempts=(60.0, 30.0 * s), seed=s, method="qcrd") for s in range(3)]
    runs += [timed_run(tmp_path / "d", 8, attempts=(30.0,), method="dss")]
    ((chart, (dss, qcrd)),) = found(*runs).items()
    assert chart.axis == "minutes of training" and chart.device == "CPU x2"
    assert dss.label == "dss" and dss.minutes == [0.5]  # cheapest first
    assert (
        qcrd.label.startswith("qcrd --positive-select softmin")
        and sorted(qcrd.minutes) == [1.0, 1.5, 2.0]
        and qcrd.mean_minutes == 1.5
    )
    assert qcrd.accuracy.mean == pytest.approx(11 / 20) and qcrd.accuracy.low < 0.5 < qcrd.accuracy.high
    assert qcrd.accuracy.seeds == 3 and qcrd.accuracy.questions == 20


def test_options_that_differ_make_points_of_their_own(tmp_path: Path) -> None:
    runs = [
        timed_run(tmp_path / f"r{i}", 5, attempts=(60.0,), beta=0.5, learning_rate=lr)
        for i, lr in enumerate((1e-4, 3e-4))
    ]
    (points,) = found(*runs).values()
    assert sorted(p.label for p in points) == ["qcrd --learning-rate 0.0001", "qcrd --learning-rate 0.0003"]
    runs.append(timed_run(tmp_path / "other", 5, attempts=(60.0,), beta=0.5, learning_rate=1e-4, student="tiny"))
    (points,) = found(*runs).values()
    assert "qcrd student tiny --learning-rate 0.0001" in {p.label for p in points}


def test_what_cannot_be_compared_has_charts_of_its_own(tmp_path: Path) -> None:
    runs = [
        timed_run(tmp_path / "cpu", 5, attempts=(60.0,)),
        timed_run(tmp_path / "gpu", 5, attempts=(60.0,), gpu=True, device="H"),
        timed_run(tmp_path / "steps", 5, step_ms=1500.0),
        timed_run(tmp_path / "gpu-steps", 5, step_ms=3000.0, gpu=True),
    ]
    axes = {chart.axis: points for chart, points in found(*runs).items()}
    assert set(axes) == {"minutes of training", "GPU minutes", "minutes of the steps", "GPU minutes of the steps"}
    assert axes["minutes of the steps"][0].minutes == [1.0] and axes["GPU minutes of the steps"][0].minutes == [2.0]
    other = timed_run(tmp_path / "questions", 5, attempts=(60.0,))
    path = other / "predictions.jsonl"
    path.write_text(path.read_text().replace('"q', '"other'))
    assert len(found(runs[0], other)) == 2


def test_other_data_and_a_run_again_are_no_other_seed(tmp_path: Path) -> None:
    def made(name: str, **options: object) -> Path:
        options = {"method": "dss", "test_data": "t.jsonl"} | options
        return timed_run(tmp_path / name, 5, attempts=(60.0,), **options)  # type: ignore[arg-type]

    def told(*runs: Path) -> dict[str, int]:
        (points,) = found(*runs).values()
        return {point.label: point.accuracy.seeds for point in points}

    first, second = made("first"), made("second", seed=1, data="own/rows.jsonl")
    assert told(first, second) == {"dss": 2}  # a seed may have data of its own
    assert told(first, made("again")) == {"dss": 1, "dss (again)": 1}
    assert told(first, second, made("same", data="own/rows.jsonl")) == {
        "dss (data: rows.jsonl)": 1,
        "dss (data: own/rows.jsonl)": 2,
    }
    assert told(first, made("big", data="big.jsonl", seed=1), made("v", eval_data="v", seed=2)) == {
        "dss --data rows.jsonl": 1,
        "dss --data big.jsonl": 1,
        "dss --data rows.jsonl --eval-data v": 1,
    }
    other = made("other", seed=2)
    said = [{"id": f"q{i}", "question": "Another one?", "correct": True} for i in range(20)]
    (other / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in said))
    assert [len(points) for points in found(first, second, other).values()] == [1, 1]


def test_rows_of_data_that_changed_have_charts_of_their_own(tmp_path: Path) -> None:
    run = timed_run(tmp_path / "run", 5, attempts=(60.0,), method="dss")
    filled = row(Job(TrainConfig(data="rows.jsonl", student="s", output_dir=str(run), method="dss"), "svamp"))
    for seed, data in ((0, "a1"), (1, "a1"), (0, "b2")):
        append_row(tmp_path / "runs.csv", filled | {"seed": seed, "data": data})
    charts = costs.points(costs.of_csv(tmp_path / "runs.csv"))
    told = {chart.title: [point.accuracy.seeds for point in points] for chart, points in charts.items()}
    assert told == {"svamp, s, data a1": [2], "svamp, s, data b2": [1]}


def test_runs_that_do_not_say_are_left_out(tmp_path: Path) -> None:
    silent = timed_run(tmp_path / "silent", 5)  # no time anywhere
    begun = timed_run(tmp_path / "begun", 5, attempts=(60.0,))
    (begun / "eval_results.json").unlink()
    broken = timed_run(tmp_path / "broken", 5, attempts=(60.0,))
    (broken / "config.resolved.yaml").write_text("method: [1]\n")
    mute = timed_run(tmp_path / "mute", 5, attempts=(60.0,))
    (mute / "predictions.jsonl").write_text('{"id": 1}\n')
    assert found(silent, begun, broken, mute) == {}
    assert "Accuracy against" not in render([read_run(silent)])


def test_the_page_draws_runs_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        timed_run(tmp_path / m, 5 + i, attempts=(60.0,), parallel=2, method=m) for i, m in enumerate(("dss", "qcrd"))
    ]
    csv = tmp_path / "runs.csv"
    for run in runs:
        config = TrainConfig(data="rows.jsonl", student="s", output_dir=str(run), method=run.name)
        filled = row(Job(config, HOSTILE)) | {"gpu_minutes": 1.0, "device": HOSTILE}
        append_row(csv, filled)
    page = tmp_path / "r.html"
    assert entry(["report", *map(str, runs), "--results", str(csv), "-o", str(page)]) == 0
    assert "2 finished runs" in capsys.readouterr().out
    seen = check(page.read_text())
    assert "Accuracy against minutes of training and GPU minutes" in seen.text
    assert {"Accuracy against minutes of training", "Accuracy against GPU minutes"} <= {
        a.get("aria-label") for _, a in seen.tags
    }
    assert "dss: 0.250 (" in seen.text and "1 min, 1 run, 2 at a time" in seen.text and "20 questions" in seen.text
    assert write_report([], str(page), results=str(csv))["rows"] == 2 and "While training" not in page.read_text()
    check(page.read_text())


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, empty = tmp_path / "other.csv", tmp_path / "empty.csv"
    other.write_text("a,b\n1,2\n")
    empty.write_text(",".join(COLUMNS) + "\n")
    for args, why in (
        ([], "name a run folder"),
        (["--results", str(other)], "not a CSV of runs"),
        (["--results", str(empty)], "no finished run"),
        (["--results", str(tmp_path / "gone")], "does not exist"),
    ):
        assert entry(["report", *args, "-o", str(tmp_path / "r.html")]) == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
