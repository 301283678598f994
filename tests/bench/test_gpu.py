"""The GPU command: limits, signals and exit codes with parts of a moment, what it reads in results, and a rehearsal of
all."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_parts, gpu_predictions, gpu_training, kernel_checks
from bench.counters import METRICS, read_counters
from bench.gpu_parts import Part
from qcrd_fast.errors import InputError
from tests.support.paths import ROOT

NCU = """==PROF== Connected to process 7
a line of the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel","gpu__time_duration.sum","ns","5,438,112"
"0","7","forward_kernel","lts__t_bytes.sum.per_second","byte/second","5,123,000,000,000.5"
"0","7","forward_kernel","sm__inst_executed_pipe_tensor.sum","inst","n/a"
==PROF== Disconnected
"""


def plain(code: int, results: dict[str, Any], log: str) -> tuple[str, str]:
    return ("ok", "wrong", "failed")[code], gpu_parts.last_line(log)


def part(name: str, code: str, limit_s: float = 60, **more: Any) -> Part:
    return Part(name, limit_s, [sys.executable, "-c", code], plain, least_s=0, **more)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, dict[str, Any]]]]:
    """Runs the command with these parts; (its exit code, the summary's lines by part)."""
    monkeypatch.setattr(gpu, "GRACE_S", 2.0)

    def run(*parts: Part, minutes: float = 1, flags: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, Any]]]:
        monkeypatch.setattr(gpu, "find_parts", lambda setting: list(parts))
        code = gpu.main(["--minutes", str(minutes), "--output-dir", str(tmp_path), "--rehearse", *flags])
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["rehearsal"] == gpu.REHEARSAL and summary["where"]["commit"]
        return code, {row["part"]: row for row in summary["parts"]}

    return run


def test_all_is_well_and_what_is_missing_is_skipped(call: Any, tmp_path: Path) -> None:
    written = f"import json; json.dump({{'rows': [1]}}, open({str(tmp_path / 'a.json')!r}, 'w')); print('all told')"
    code, rows = call(part("a", written), part("b", "", lacks="no ncu here"))
    assert code == 0 and rows["a"]["status"] == "ok" and rows["a"]["said"] == "all told"
    assert rows["b"] == {"part": "b", "status": "skipped", "said": "no ncu here"}
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["rehearsal"] == gpu.REHEARSAL and told["rows"] == [1] and told["where"]["torch"]
    assert (tmp_path / "a.log").read_text().startswith(f"# {gpu.REHEARSAL}")


def test_a_wrong_kernel_is_1_and_the_others_still_run(call: Any) -> None:
    code, rows = call(part("a", "raise SystemExit(1)"), part("b", "print('b')"))
    assert code == 1 and [row["status"] for row in rows.values()] == ["wrong", "ok"]


def test_a_part_beyond_its_limit_is_ended_with_its_children(call: Any, tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    sleeper = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    code, rows = call(part("a", sleeper, limit_s=1), part("b", "print('b')"))
    assert code == 75 and [row["status"] for row in rows.values()] == ["timed out", "ok"]
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_without_time_nothing_begins_and_resume_goes_on(call: Any) -> None:
    parts = part("a", "print('a')"), part("b", "print('b')")._replace(least_s=1e3)
    code, rows = call(*parts, minutes=0.5)
    assert code == 75 and [row["status"] for row in rows.values()] == ["ok", "left"]
    again = part("a", "raise SystemExit(1)"), part("b", "print('b')")
    with pytest.raises(SystemExit):
        call(*again)
    code, rows = call(*again, flags=("--resume",))
    assert code == 0 and [row["status"] for row in rows.values()] == ["ok", "ok"]


def test_a_signal_leaves_what_is_there(call: Any) -> None:
    asks = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    code, rows = call(part("a", "print('a')"), part("b", asks), part("c", "print('c')"))
    assert code == 143 and [row["status"] for row in rows.values()] == ["ok", "stopped"]
    code, rows = call(part("b", "print('b')"), part("c", "print('c')"), flags=("--resume",))
    assert code == 0 and set(rows) == {"a", "b", "c"}


def test_parts_lack_what_is_not_here(tmp_path: Path) -> None:
    setting = gpu_parts.Setting(tmp_path, None, None, 5, False, False)
    parts = {p.name: p for p in gpu_parts.find_parts(setting)}
    assert (
        list(parts)[:6] == ["kernels", "tests", "sanitizer", "model", "counters", "loss-smollm2-135m"]
        and list(parts)[-1] == "training"
    )
    assert parts["training"].lacks and "--data" in parts["training"].lacks
    assert parts["kernels"].lacks is None and "--append" not in parts["loss-t5-base"].command
    parts = {p.name: p for p in gpu_parts.find_parts(setting._replace(append=True, data=tmp_path, student="s"))}
    assert parts["training"].lacks is None and "--append" in parts["loss-t5-base"].command


def test_what_is_wrong_is_read_from_the_results() -> None:
    row = dict(provider="qcrd-triton", mode="joint", status="wrong: beyond 0.02")
    results = {
        "cases": [{"case": {"logits": "random"}, "rows": [row, row | {"provider": "cce", "status": "wrong: beyond"}]}]
    }
    assert gpu_parts.read_loss(0, results, "")[0] == "wrong"
    row["status"] = "ok"
    assert gpu_parts.read_loss(0, results, "")[0] == "ok"
    assert gpu_parts.read_loss(1, {}, "boom\n") == ("failed", "boom")
    rows = [{"pass": "forward", "way": "128x128x64 w8 s3", "status": "wrong"}]
    assert gpu_parts.read_tuning(0, {"rows": rows}, "") == ("wrong", "128x128x64 w8 s3; ")
    checks = [{"check": "log p", "dtype": "bf16", "status": "failed: no kernel image"}]
    assert gpu_parts.read_kernels(1, {"rows": checks}, "") == ("wrong", "log p bf16 failed: no kernel image")
    assert gpu_parts.read_sanitizer(86, {}, "========= ERROR SUMMARY: 3 errors\n") == (
        "wrong",
        "ERROR SUMMARY: 3 errors",
    )


SHARES = {"llama-3-8b": [0.52, 0.61], "smollm2-135m": [0.5, 0.9]}


def test_predictions_stand_beside_what_was_measured() -> None:
    """Of llama-3-8b's 4,096 rows a pass is 4.3 TFLOP: 6.5 ms are 660 TFLOP/s, 67% of an H200's peak."""
    tiles = dict.fromkeys(SHARES, "128x128x64 w8 s3")
    way = {"design": "128 x 128", "variant": "plain", "tile": tiles, "supposed": "", "limited": True, "shares": SHARES}
    row = {
        "pass": "forward",
        "way": "128x128x64 w8 s3",
        "dtype": "bf16",
        "tokens": 4096,
        "head": "llama-3-8b",
        "ms": 6.52,
    }
    results = {"model": {"rows": [way, way | {"supposed": "a cluster"}]}, "tuning-llama-3-8b": {"rows": [row]}}
    first, second = gpu_predictions.compare(results, "NVIDIA H200")
    assert first == {
        "design": "128 x 128", "tile": "128x128x64 w8 s3", "head": "llama-3-8b",
        "predicted": "52 to 61", "measured": "67 (tuning-llama-3-8b)", "verdict": "above 62%: refutes the model",
    }  # fmt: skip
    assert second["predicted"] == "50 to cap" and second["measured"] == gpu_predictions.NOT_MEASURED
    counted = {"way": "128x128x64 w8 s3", "head": "llama-3-8b", "tflops": 560.0}
    first, _ = gpu_predictions.compare(results | {"counters": {"rows": [counted]}}, "NVIDIA H200")
    assert first["measured"] == "57 (counters)" and first["verdict"] == "as predicted"
    assert {row["measured"] for row in gpu_predictions.compare(results, "NVIDIA A100")} == {
        gpu_predictions.NOT_MEASURED
    }
    name = "128x128x64 w8 s5 descriptors resident"
    own = {
        **way,
        "variant": "hidden resident",
        "tile": {"llama-3-8b": name},
        "shares": {"smollm2": None, "llama-3-8b": (0.6, 0.9)},
    }
    timed = {"model": {"rows": [own]}, "tuning-llama-3-8b": {"rows": [row, row | {"way": name}]}}
    (first,) = gpu_predictions.compare(timed, "NVIDIA H200")
    assert first["measured"] == "67 (tuning-llama-3-8b)" and first["verdict"] == "as predicted"
    assert gpu_predictions.judge(0.7, [0.6, 0.9], "128x256x64 w8 s3") == "as predicted"
    assert gpu_predictions.judge(0.85, [0.6, 0.9], "128x256x64 w8 s3") == "above"


def test_counters_are_read_amid_other_output() -> None:
    assert read_counters(NCU) == {METRICS[0]: 5438112.0, METRICS[1]: 5123000000000.5}
    assert read_counters("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_a_kernel_that_is_wrong_or_raises_is_told() -> None:
    def raises(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
        raise RuntimeError("an illegal memory access\nand more")

    checks = [
        kernel_checks.Check("a", ("x",), lambda dtype, device: {"out": 2e-5, "grad": 0.0}),
        kernel_checks.Check("b", ("x",), lambda dtype, device: {"out": float("nan")}),
        kernel_checks.Check("c", ("x",), raises, ("fp32",)),
    ]
    rows = list(kernel_checks.run_checks(checks, ["bf16", "fp32"], torch.device("cpu")))
    assert [row["status"] for row in rows] == ["wrong"] * 4 + ["failed: RuntimeError: an illegal memory access"]


def test_published_files_are_found_at_any_depth(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="svamp_3_train"):
        gpu_training.find_data(tmp_path)
    main = tmp_path / "mentor-kd" / "data" / "main"
    main.mkdir(parents=True)
    other = tmp_path / "dss" / gpu_training.TEST  # of another publication
    other.parent.mkdir()
    for path in (main / gpu_training.MAIN, main / gpu_training.TEST, other):
        path.touch()
    assert gpu_training.find_data(tmp_path) == ("svamp-smollm2", [main / gpu_training.MAIN], main / gpu_training.TEST)
    for name in gpu_training.FLAT:
        (tmp_path / name).touch()
    recipe, files, _ = gpu_training.find_data(tmp_path)
    assert recipe == "svamp-mentors-smollm2" and len(files) == 3


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu", "--minutes", "10", "--output-dir", str(folder), "--rehearse"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    taken_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken_s < 180, f"{taken_s:.0f} s of processor time"  # 70 on an idle core; twice that beside a busy one
    summary = json.loads((folder / "summary.json").read_text())
    skipped = {"sanitizer", "counters"}
    assert {row["part"]: row["status"] for row in summary["parts"]} == {
        row["part"]: "skipped" if row["part"] in skipped else "ok" for row in summary["parts"]
    }
    assert len(summary["parts"]) == 10
    files = [path for path in folder.iterdir() if path.is_file()]
    assert len(files) == 2 + 8 + 7  # the summaries, logs, results
    assert all("rehearsal on a CPU" in path.read_text() for path in files) and "rehearsal" in done.stdout
    page = (folder / "results.md").read_text()
    assert "| design | tile | head | predicted | measured | verdict |" in page
    assert "| 128 x 128, cp.async | 128x128x64 w8 s3 | smollm2-135m | 5" in page
